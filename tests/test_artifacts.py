"""Artifacts: what of a folder is in them, how their files get to the run, and that each is logged once and kept."""

import json
import os
import pickle
from pathlib import Path

from backbone import artifacts

import wandb
from conftest import Log, folders
from rooms import Opened


def staged(made: Opened, name: str, content: bytes, **more) -> tuple[str, dict]:
    """A folder and a description, as `WandbRun.log_artifact` makes them."""
    what, found = artifacts.check(name, "model", None, more.pop("aliases", ())), {"a.bin": content, **more}
    found = artifacts.contents(name, found)
    folder = Path(made.writer.run.sync_dir, "artifacts", f"{name}-{len(list(Path(made.init['dir']).rglob('*')))}")
    return str(folder), what | artifacts.stage(found, folder, None)


def test_artifacts_are_logged_once_over_a_restart_and_their_files_are_kept(opened, tmp_path):
    made = opened()
    made.join()
    queue = made.artifacts
    queue.log(*staged(made, "first", b"1", aliases=["best"]))
    queue.use("other:latest")
    queue.finish(60)
    folder, what = staged(made, "second", b"2")
    task = pickle.dumps(("log", what | {"folder": folder}))
    made.store.db.execute("INSERT INTO artifacts (task) VALUES (?)", (task,))  # and killed before W&B had it
    made.abandon()
    made = opened()
    queue = made.artifacts
    table, reference = wandb.Table(columns=["x"], data=[[1]]), "s3://bucket/weights"  # whose library isn't here
    queue.log(*staged(made, "third", b"3", table=table, at=reference))
    queue.use("other:best")
    queue.finish(60)
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
    queue = made.artifacts
    table = wandb.Table(columns=["reward"], data=[[0.5]])
    for step in range(3):
        made.report(step, {"rollouts": table})
        queue.log(*staged(made, "trajectories", b"notes", rollouts=table))
        queue.finish(60)
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
        artifacts.put_piece(to, offset, piece)

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
    queue = made.artifacts
    folder, what = staged(made, "gone", b"1")
    Path(folder, "a.bin").unlink()
    queue.log(folder, what)
    queue.log(*staged(made, "there", b"2"))
    queue.finish(60)
    account = made.finish()[""]
    assert (account.lost_artifacts, account.ok) == (1, False)
    assert account.warnings[0].startswith("1 artifacts were not logged or used: ")
