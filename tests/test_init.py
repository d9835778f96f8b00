"""What a run is given: a mistake is told in one line before anything is started, the rest is recorded as by wandb."""

import argparse
import dataclasses
import enum
import json
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from backbone import wandb_internals
from common import WandbRun

import numpy as np
import pytest
import wandb
from conftest import Log, each_log
from omegaconf import OmegaConf
from ray._private import state
from ray.util import client


@pytest.fixture
def run(run_at_home) -> Callable[..., WandbRun]:
    return run_at_home


@pytest.fixture
def refused(run, ray_here, tmp_path_factory, monkeypatch) -> Callable[..., None]:
    """refused(ValueError, "group", group=…): such a run does not start, and nothing of it is left."""
    scratch = tmp_path_factory.mktemp("scratch")
    monkeypatch.setattr("tempfile.tempdir", str(scratch))

    def everything() -> set[object]:
        job = ray_here.get_runtime_context().get_job_id()
        actors = {id_ for id_, actor in state.actors().items() if actor["JobID"] == job}
        return {*Path.cwd().rglob("*"), *scratch.iterdir(), *actors}

    def refused(kind: type[Exception], why: str, **init: Any) -> None:
        before = everything()
        with pytest.raises(kind, match=why) as error:
            run(**init)
        assert "\n" not in str(error.value)
        assert not everything() - before

    return refused


@pytest.mark.parametrize(
    ("init", "variables", "why"),
    [
        (dict(sync_tensorboard=True), {}, "sync_tensorboard"),
        (dict(settings={"sync_tensorboard": True}), {}, "sync_tensorboard"),
        (dict(), dict(SYNC_TENSORBOARD="true"), "sync_tensorboard"),
        (dict(mode="shared"), {}, "shared"),
        (dict(settings=wandb.Settings(mode="shared")), {}, "shared"),
        (dict(), dict(MODE="shared"), "shared"),
        (dict(resume_from="a?_step=80"), {}, "resume_from"),
        (dict(settings={"resume_from": "a?_step=80"}), {}, "resume_from"),
        (dict(), dict(RESUME_FROM="a?_step=80"), "resume_from"),
        (dict(fork_from="a?_step=80"), {}, "fork_from"),
        (dict(resume=True), {}, "resume"),
        (dict(resume="alow"), {}, "resume 'alow' must be allow, must or never"),
        (dict(), dict(RESUME="auto"), "resume"),
    ],
)
def test_what_can_not_go_with_numbered_rows_is_refused(refused, monkeypatch, init, variables, why):
    for name, value in variables.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    refused(ValueError, why, **dict(mode=None) | init)


@pytest.mark.parametrize(
    ("environment", "argument"), [pytest.param("false", None, marks=pytest.mark.slow), ("true", False)]
)
def test_a_refusal_is_only_of_what_is_asked_for(run, monkeypatch, environment, argument):
    monkeypatch.setenv("WANDB_SYNC_TENSORBOARD", environment)
    monkeypatch.setenv("WANDB_MODE", "shared")
    with run(mode="offline", sync_tensorboard=argument) as made:
        assert made.mode == "offline"


@pytest.mark.parametrize(
    ("init", "variables", "why"),
    [
        (dict(name="n" * 129), {}, "name 'nnnn.*128 characters"),
        (dict(group="g" * 129), {}, "group 'gggg"),
        (dict(job_type="j" * 129), {}, "job_type 'jjjj"),
        (dict(settings={"run_group": "g" * 129}), {}, "group 'gggg"),
        (dict(), dict(NAME="n" * 129), "name 'nnnn"),
        (dict(), dict(RUN_GROUP="g" * 129), "group 'gggg"),
        (dict(), dict(JOB_TYPE="j" * 129), "job_type 'jjjj"),
        (dict(name=7), {}, "name 7"),
        (dict(entity="team/project"), {}, "entity 'team/project'"),
        (dict(settings={"entity": "team/project"}), {}, "entity 'team/project'"),
        (dict(), dict(ENTITY="team/project"), "entity 'team/project'"),
        (dict(tags=["a", "t" * 65]), {}, "tag 'tttt.*64 characters"),
        (dict(tags="t" * 65), {}, "tag 'tttt"),
        (dict(tags=["a", ""]), {}, "tag ''"),
        (dict(settings={"run_tags": ["t" * 65]}), {}, "tag 'tttt"),
        (dict(), dict(TAGS=f"a,{'t' * 65}"), "tag 'tttt"),
        (dict(), dict(TAGS="a,,b"), "tag ''"),
    ],
)
def test_names_that_the_server_would_refuse_are_refused(refused, monkeypatch, init, variables, why):
    for name, value in variables.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    refused(ValueError, why, **init)


def test_tags_may_come_from_an_iterator_which_can_be_read_once(run):
    with run(tags=map(str, (1, 2))) as made:
        pass
    assert Log(made.path).run["tags"] == ["1", "2"]


def test_what_can_not_be_right_is_named(refused, run):
    refused(TypeError, "tags must be a sequence of strings, not 5", tags=5)
    refused(TypeError, "settings must be a mapping or wandb.Settings, not 5", settings=5)
    refused(TypeError, "dir must be a path, not 5", dir=5)
    refused(ValueError, "job_type 5 must be a string of at most 128 characters", job_type=5)
    refused(ValueError, "mode 'off' must be online, offline or disabled", mode="off")
    refused(TypeError, "'worker' is no argument of WandbRun, nor of wandb.init", worker=8)
    with pytest.raises(ValueError, match=r"can't start: .*console"):  # which wandb says, in the actor
        run(settings={"console": "sideways"})


@pytest.mark.parametrize("project", ["p" * 129, "team/project", "100%"])
def test_a_project_that_wandb_would_refuse_is_refused(ray_here, project):
    with pytest.raises(ValueError, match=rf"project '{project[:20]}") as error:
        WandbRun(project, mode="offline")
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_names_of_the_greatest_length_are_recorded_whole(run):
    names = dict(name="n" * 128, group="g" * 128, job_type="j" * 128)
    with run(**names, tags=["t" * 64]) as made:
        pass
    recorded = Log(made.path).run
    keys = ("display_name", "run_group", "job_type", "tags")
    assert [recorded[key] for key in keys] == [*names.values(), ["t" * 64]]


@pytest.mark.parametrize("where", ["file", "file/below", "/proc/nowhere"])
def test_a_folder_that_can_not_be_written_is_an_os_error(refused, where):
    Path("file").touch()
    refused(OSError, f"{where} can't be written: ", dir=where)


def test_a_file_where_the_runs_would_be_is_an_os_error(refused):
    Path("wandb").touch()
    refused(OSError, "can't be written: ")


def test_what_can_not_be_sent_to_the_actor_is_a_type_error(refused):
    refused(TypeError, "notes=.* can't be sent", notes=threading.Lock())


def test_ray_client_is_refused(refused, monkeypatch):
    """What says that a process is a client is Ray's; here nothing but that is different."""
    monkeypatch.setattr(client.ray, "is_connected", lambda: True)
    refused(RuntimeError, r"Ray Client .*ray job submit")


@pytest.mark.parametrize(
    "init",
    [
        pytest.param(dict(group="g" * 129), marks=pytest.mark.slow),
        pytest.param(dict(notes=threading.Lock()), marks=pytest.mark.slow),
        dict(mode="online", settings={"api_key": "short"}),
    ],
)
def test_an_id_that_a_failed_start_has_claimed_is_free_again(run, monkeypatch, caplog, init):
    monkeypatch.setenv("WANDB_RUN_ID", id_ := uuid.uuid4().hex)
    with pytest.raises(Exception, match=r"group|notes|API key"):
        run(**init)
    with run() as made:
        assert made.id == id_
    assert "stays outside" not in caplog.text


# Config


class Colour(enum.Enum):
    RED = 1


@dataclasses.dataclass
class Optimiser:
    lr: float = 0.1
    path: Path = Path("/models/a")


VALUES = {
    "path": Path("a/b"), "set": {2, 1}, "frozen set": frozenset([1]), "float32": np.float32(0.1), "int64": np.int64(3),
    "bool": np.bool_(True), "array": np.arange(3), "large array": np.arange(100), "enum": Colour.RED, "bytes": b"x",
    "tuple": (1, (2,)), "range": range(3), "dataclass": Optimiser(), "class": Optimiser, "function": len, "none": None,
    "infinite": float("inf"), "dtype": np.dtype("f4"), "complex": 1j, "nested": {1: 2, (1, 2): 3}, "-dashes-": 1,
    "large": 2**70,
}  # fmt: skip
KINDS = [VALUES, argparse.Namespace(**VALUES), Optimiser(), "config.yaml", SimpleNamespace(a={1})]


@pytest.mark.parametrize("config", KINDS, ids=lambda config: type(config).__name__)
def test_a_config_of_any_kind_becomes_what_wandb_makes_of_it(tmp_path, monkeypatch, config):
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text("lr:\n  value: 3\n")
    with wandb.init(mode="disabled", config=config, reinit="create_new") as own:
        expected = dict(own.config)
    assert expected
    assert wandb_internals.recorded_config(config) == expected


def test_a_config_is_recorded_as_wandb_in_the_driver_would_record_it(run, tmp_path):
    quiet = wandb.Settings(silent=True)
    with wandb.init(mode="offline", dir=tmp_path / "own", config=VALUES, reinit="create_new", settings=quiet) as own:
        pass
    with run(config=VALUES) as made:
        pass
    of_wandb = {"_wandb"}
    ours, theirs = Log(made.path).config, Log(Path(own.sync_dir)).config
    assert {key: ours[key] for key in ours.keys() - of_wandb} == {key: theirs[key] for key in theirs.keys() - of_wandb}


def test_interpolations_of_an_omegaconf_config_are_resolved_where_its_resolvers_are(run):
    OmegaConf.register_resolver("double", lambda x: 2 * x, replace=True)  # only in this process
    config = OmegaConf.create({"lr": 3, "twice": "${double:${lr}}", "layers": [1, {"lr": "${lr}"}], "data": {"n": 1}})
    expected = {"lr": 3, "twice": 6, "layers": [1, {"lr": 3}], "data": {"n": 1}}
    with run(config=config) as made:
        assert made.config == expected
    assert {key: Log(made.path).config[key] for key in expected} == expected


MISSING, UNSET = {"lr": "???"}, {"lr": "${oc.env:NOT_THERE}"}


@pytest.mark.parametrize(
    "config",
    [OmegaConf.create(MISSING), OmegaConf.create(UNSET), "none.yaml", [1], {1: 2}, {"a": ValueError("x")}],
)
def test_a_config_that_can_not_be_recorded_is_refused(refused, config):
    refused((TypeError, ValueError), "config=.* can't be recorded", config=config)


# Environment


@pytest.mark.slow
def test_variables_of_the_jobs_runtime_environment_count_less_than_the_drivers(drive, tmp_path, server):
    done = drive(
        """
import json, os, sys
from common import WandbRun
import ray
ray.init(os.environ.pop("CLUSTER"), log_to_driver=False, runtime_env={"env_vars": json.loads(sys.argv[1])})

def run(folder):
    with WandbRun("p", dir=folder) as made:
        made.log({"a": 1.0}, 0)
    return made.finish().ok

print(run(os.getcwd()), ray.get(ray.remote(run).remote(os.getcwd())))
""",
        json.dumps(server.environment | {"WANDB_MODE": "online", "WANDB_RUN_GROUP": "job's", "WANDB_NAME": "job's"}),
        before="",
        WANDB_NAME="driver's",
    )
    assert done.stdout == "True True\n", done.stderr
    found = [(log.run["run_group"], log.run["display_name"]) for log in each_log(tmp_path)]
    assert found == [("job's", "driver's"), ("job's", "job's")]
    assert len(server.runs) == 2
