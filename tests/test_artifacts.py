"""Artifacts: what of a folder is in them, how their files get to the run, and that each is logged once and kept."""

import enum
import gc
import json
import os
import pickle
import sqlite3
import time
from pathlib import Path

from backbone import artifacts
from backbone.actor import PipelineActor

import numpy as np
import pytest
import wandb
from conftest import Log, folders
from rooms import Opened
from wandb.sdk.data_types._private import MEDIA_TMP

# What is in one


def names(files) -> list[str]:
    return sorted(artifacts.contents("model", files)["files"])


@pytest.fixture
def tree(tmp_path):
    """tree(path=content, …): a folder of such files. What begins with `->` is a link."""

    def tree(**files: str) -> Path:
        top = tmp_path / "tree"
        for name, content in files.items():
            path = top / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            if content.startswith("->"):
                path.symlink_to(content.removeprefix("->"))
            else:
                path.write_text(content)
        return top

    return tree


def test_links_to_folders_and_files_are_followed(tree, tmp_path):
    """As `latest` links and the caches of Hugging Face have them."""
    (tmp_path / "big" / "deep").mkdir(parents=True)
    (tmp_path / "big" / "deep" / "layer").write_text("weights")
    top = tree(
        config="c", blobs__1="w", snapshots__a__model="->../../blobs/1", weights="->../big", latest="->snapshots/a"
    )
    expected = ["blobs/1", "config", "latest/model", "snapshots/a/model", "weights/deep/layer"]
    assert names(top) == expected
    assert names({"x": top}) == [f"x/{name}" for name in expected]
    (tmp_path / "link").symlink_to(top)
    assert names(str(tmp_path / "link")) == expected
    what = artifacts.stage(artifacts.contents("model", top), tmp_path / "staged", None)
    copy = tmp_path / "staged" / "weights" / "deep" / "layer"
    assert sorted(what["files"]) == expected
    assert (copy.read_text(), copy.is_symlink()) == ("weights", False)


def test_a_link_to_a_folder_that_it_is_in_is_not_followed(tree):
    top = tree(config="c", self="->.", run__up="->..", run__weights="w", a__file="f", a__b="->../b", b__a="->../a")
    assert names(top) == ["a/file", "b/a/file", "config", "run/weights"]


@pytest.mark.parametrize("where", ["", "deep__"])
def test_a_broken_link_is_told_at_the_caller(tree, where):
    top = tree(**{f"{where}weights": "->gone", "config": "c"})
    with pytest.raises(FileNotFoundError, match="weights"):
        artifacts.contents("model", top)


def test_what_is_no_file_is_left_out_and_waited_for_by_nobody(tree):
    top = tree(config="c")
    os.mkfifo(top / "pipe")
    assert names(top) == ["config"]


# Staging


@pytest.mark.parametrize("trouble", ["none", "other file system", "no such call", "knows no end"])
def test_a_staged_file_is_a_copy_that_a_later_change_does_not_change(tree, tmp_path, monkeypatch, trouble):
    """A trainer that rewrites its checkpoint in place would change "step 10" into "step 20" behind a hard link."""

    def fails(*_):
        raise OSError(18, "Invalid cross-device link")

    if trouble == "no such call":
        monkeypatch.delattr(os, "copy_file_range")
    elif trouble != "none":
        monkeypatch.setattr(os, "copy_file_range", fails if trouble == "other file system" else lambda *_: 0)
    content = os.urandom(3_000_001)
    top, staged = tree(empty="", weights=""), tmp_path / "staged"
    (top / "weights").write_bytes(content)
    artifacts.stage(artifacts.contents("model", {"a": top, "b": b"bytes"}), staged, None)
    with open(top / "weights", "r+b") as file:
        file.write(b"step 20")
    assert (staged / "a" / "weights").read_bytes() == content
    assert (staged / "a" / "weights").stat().st_nlink == 1
    assert [(staged / name).read_bytes() for name in ("a/empty", "b")] == [b"", b"bytes"]


# Logging


def staged(made: Opened, name: str, content: bytes, **more) -> dict:
    """What `WandbRun.log_artifact` says, when the files are in a folder."""
    what, found = artifacts.check(name, "model", None, more.pop("aliases", ())), {"a.bin": content, **more}
    found = artifacts.contents(name, found)
    folder = Path(made.writer.run.sync_dir, "artifacts", f"{name}-{len(list(Path(made.init['dir']).rglob('*')))}")
    return what | artifacts.stage(found, folder, None) | dict(folder=str(folder))


def test_artifacts_are_logged_once_over_a_restart_and_their_files_are_kept(opened, tmp_path):
    made = opened()
    made.join()
    made.tell("log_artifact", **staged(made, "first", b"1", aliases=["best"]))
    made.tell("use_artifact", name="other:latest")
    made.artifacts.finish(time.monotonic() + 60)
    task = pickle.dumps(("log_artifact", staged(made, "second", b"2")))
    made.state.db.execute("INSERT INTO artifacts (task) VALUES (?)", (task,))  # and killed before W&B had it
    made.abandon()
    made = opened()
    table, reference = wandb.Table(columns=["x"], data=[[1]]), "s3://bucket/weights"  # whose library isn't here
    made.tell("log_artifact", **staged(made, "third", b"3", table=table, at=reference))
    made.tell("use_artifact", name="other:best")
    made.artifacts.finish(time.monotonic() + 60)
    account = made.finish()[""]
    first, second = (Log(path) for path in folders(tmp_path))
    assert [artifact["name"] for artifact in first.of("artifact")] == ["first"]
    assert "best" in first.of("artifact")[0]["aliases"]
    assert first.config["used_artifacts"] == ["other:latest"]
    assert [artifact["name"] for artifact in second.of("artifact")] == ["second", "third"]
    assert second.config["used_artifacts"] == ["other:latest", "other:best"]
    assert account.lost_artifacts == 0
    assert sorted(path.read_bytes() for path in tmp_path.rglob("a.bin")) == [b"1", b"2", b"3"]
    manifest = {entry["path"]: entry for entry in second.of("artifact")[-1]["manifest"]["contents"]}
    assert sorted(manifest) == ["a.bin", "at", "table.table.json"]
    assert reference in json.dumps(manifest["at"])


def test_one_table_may_be_logged_in_many_rows_and_artifacts(opened, tmp_path):
    made = opened()
    made.join()
    table = wandb.Table(columns=["reward"], data=[[0.5]])
    for step in range(3):
        made.say(step, {"rollouts": table})
        made.tell("log_artifact", **staged(made, "trajectories", b"notes", rollouts=table))
        made.artifacts.finish(time.monotonic() + 60)
    account = made.finish()[""]
    assert (account.rows, account.lost_values, account.lost_artifacts, account.warnings) == (3, 0, 0, [])
    log = Log(folders(tmp_path)[0])
    assert [row["rollouts._type"] for row in log.rows] == ["table-file"] * 3
    assert [artifact["name"] for artifact in log.of("artifact")].count("trajectories") == 3


def test_a_folder_comes_to_another_node_in_pieces_as_it_is(tmp_path):
    source, arrived, sizes = tmp_path / "source", tmp_path / "arrived", []
    (source / "deep").mkdir(parents=True)
    (source / "empty").touch()
    (source / "deep" / "weights.bin").write_bytes(os.urandom(2 * artifacts.PIECE + 5))

    def send(to: Path, offset: int, piece: bytes) -> None:
        sizes.append(len(piece))
        PipelineActor.stage(None, to, offset, piece)

    found = artifacts.contents("model", {"part": source, "notes.txt": b"x"})
    what = artifacts.stage(found, arrived, send)
    assert sorted(what["files"]) == ["notes.txt", "part/deep/weights.bin", "part/empty"]
    assert sorted(sizes) == [0, 1, 5, artifacts.PIECE, artifacts.PIECE]
    assert (arrived / "notes.txt").read_bytes() == b"x"
    for path in ("empty", "deep/weights.bin"):
        assert (arrived / "part" / path).read_bytes() == (source / path).read_bytes()


def test_an_artifact_that_can_not_be_logged_is_counted_and_named(opened):
    made = opened()
    made.join()
    what = staged(made, "gone", b"1")
    Path(what["folder"], "a.bin").unlink()
    made.tell("log_artifact", **what)
    made.tell("log_artifact", **staged(made, "there", b"2"))
    made.artifacts.finish(time.monotonic() + 60)
    account = made.finish()[""]
    assert (account.lost_artifacts, account.ok) == (1, False)
    assert account.warnings[0].startswith("1 artifacts were not logged or used: ")


def test_an_artifact_is_logged_once_though_the_actor_has_died_and_reads_it_again(opened, tmp_path):
    made = opened()
    made.join()
    for _ in range(2):  # by the user
        made.tell("log_artifact", **staged(made, "checkpoint", b"1"))
    made.artifacts.finish(time.monotonic() + 60)
    made.abandon()
    made = opened()
    made.artifacts.finish(time.monotonic() + 60)
    assert made.finish()[""].lost_artifacts == 0
    logged = [artifact["name"] for path in folders(tmp_path) for artifact in Log(path).of("artifact")]
    assert logged == ["checkpoint", "checkpoint"]


def test_an_artifact_that_the_state_has_no_room_for_waits_until_there_is_some(opened, tmp_path):
    made = opened()
    made.join()
    made.state.db.execute("PRAGMA max_page_count = 1")  # or what there is
    with pytest.raises(sqlite3.Error):
        made.tell("log_artifact", **staged(made, "large", b"1") | dict(metadata={"text": "x" * 1_000_000}))
    made.state.db.execute("PRAGMA max_page_count = 1073741823")
    assert made.finish()[""].ok
    assert [artifact["name"] for artifact in Log(folders(tmp_path)[0]).of("artifact")] == ["large"]


def bytes_below(folder: Path) -> list[bytes]:
    return sorted(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_online_the_copies_are_gone_when_the_server_has_them(opened, tmp_path, server, monkeypatch):
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    server.artifacts = {}
    wandb.teardown()
    made = opened(mode="online")
    made.join()
    for step in range(3):
        made.tell("log_artifact", **staged(made, f"checkpoint-{step}", b"%d" % step))
    made.artifacts.finish(time.monotonic() + 60)
    assert {artifact["state"] for artifact in server.artifacts.values()} == {"COMMITTED"}
    assert not [*tmp_path.rglob("a.bin")]
    task = pickle.dumps(("log_artifact", staged(made, "last", b"3")))
    made.state.db.execute("INSERT INTO artifacts (task, done) VALUES (?, 1)", (task,))  # and killed before it went
    made.abandon()
    made = opened(mode="online")
    assert not [*tmp_path.rglob("a.bin")]
    assert made.finish()[""].lost_artifacts == 0
    wandb.teardown()


def test_of_a_table_in_an_artifact_what_is_beyond_w_b_s_limit_is_told(opened, tmp_path, monkeypatch):
    monkeypatch.setattr(wandb.Table, "MAX_ARTIFACT_ROWS", 3)
    made = opened()
    made.join()
    made.tell(
        "log_artifact", **staged(made, "rollouts", b"1", table=wandb.Table(columns=["x"], data=[[i] for i in range(5)]))
    )
    made.artifacts.finish(time.monotonic() + 60)
    account = made.finish()[""]
    assert (account.lost_artifacts, account.ok) == (1, False)
    assert account.warnings == ["'table' of artifact 'rollouts' has 5 rows, of which W&B takes 3: the others are lost"]
    [artifact] = Log(folders(tmp_path)[0]).of("artifact")
    [path] = [entry["local_path"] for entry in artifact["manifest"]["contents"] if entry["path"] == "table.table.json"]
    assert json.loads(Path(path).read_text())["data"] == [[0], [1], [2]]


def test_no_temporary_file_is_left_of_the_media_in_an_artifact(opened):
    for path in Path(MEDIA_TMP.name).glob("*"):
        path.unlink()
    made = opened()
    made.join()
    page = wandb.Html("a page")
    for _ in range(2):
        cells = [[page, wandb.Html("in a table"), np.zeros((300, 2))]]
        table = wandb.Table(columns=["page", "other", "array"], data=cells)
        made.tell("log_artifact", **staged(made, "pages", b"1", page=page, table=table))
    made.artifacts.finish(time.monotonic() + 60)
    del page, cells, table
    gc.collect()  # wandb's tables refer to themselves
    assert bytes_below(Path(MEDIA_TMP.name)) == []
    assert made.finish()[""].lost_artifacts == 0


class Stage(enum.StrEnum):
    TRAIN = "train"


def test_an_artifact_s_description_has_none_of_the_caller_s_classes():
    """The pipeline actor could not read it, and the artifact would be lost."""
    what = artifacts.check(Stage.TRAIN, Stage.TRAIN, {"stage": Stage.TRAIN}, [Stage.TRAIN])
    names = artifacts.contents("model", {Stage.TRAIN: "s3://bucket/weights"})
    assert type(what["metadata"]["stage"]) is str
    assert {*map(type, (what["name"], what["type"], *what["aliases"], *names["references"]))} == {str}


def test_offline_a_restart_forgets_no_artifact_that_was_used(opened, tmp_path):
    made = opened()
    made.join()
    made.tell("use_artifact", name="other:latest")
    made.artifacts.finish(time.monotonic() + 60)
    made.abandon()
    made = opened()
    made.finish()
    assert Log(folders(tmp_path)[-1]).config["used_artifacts"] == ["other:latest"]


def test_what_a_reference_to_a_file_stands_for_is_the_content_that_it_has(opened, tmp_path):
    """Else a checkpoint that is written again would be no new version."""
    made, weights = opened(), tmp_path / "weights"
    made.join()
    for step in range(2):
        weights.write_text(f"of step {step}")
        made.tell("log_artifact", **staged(made, f"step-{step}", b"", weights=weights.as_uri()))
        made.artifacts.finish(time.monotonic() + 60)
    made.finish()
    [log] = (Log(path) for path in folders(tmp_path))
    entries = [entry for each in log.of("artifact") for entry in each["manifest"]["contents"]]
    digests = [entry["digest"] for entry in entries if entry["path"] == "weights"]
    assert len({*digests}) == 2
