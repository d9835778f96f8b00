"""Every interface of wandb that this project uses without its being public, each with the reason for it.

Two other files have some, too: transaction_log.py for the format of a transaction log, media.py for the data types.
`tests/test_wandb_internals.py` fails when wandb changes one of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import wandb

FLUSH_EVERY = {"x_transaction_log_flush_interval": 0.5}  # `x_` may change. By default a run's log is written every 15 s


def client_id(artifact: wandb.Artifact) -> str:
    return artifact._client_id


def add_reference(artifact: wandb.Artifact, file: str, reference: str) -> None:
    """Adds a reference: to what is here with its content's digest, else as it is.

    For that wandb's own function wants the library of `s3://`, even where it looks nothing up.
    """
    from wandb.sdk.artifacts.artifact_manifest_entry import ArtifactManifestEntry

    if reference.startswith("file://") and os.path.exists(reference.removeprefix("file://")):
        artifact.add_reference(reference, file)
        return
    artifact.manifest.add_entry(ArtifactManifestEntry(path=file, ref=reference, digest=reference))


def metric_name(key: str) -> str:
    """A key as `define_metric` wants it: a bare `.` in it would be nesting."""
    return key.replace(".", "\\.")


def define_by_name(run: wandb.Run, key: str, axis: str) -> None:
    """Gives one key its step axis. `define_metric` would take `*` in its name for a pattern."""
    from wandb.proto.wandb_internal_pb2 import MetricRecord

    record = MetricRecord(name=metric_name(key), step_metric=axis)
    record.options.defined = True
    run._metric_callback(record)


def agent_is_running() -> bool:
    """Whether `wandb.agent(function=…)` runs trials in this process, which it stops itself."""
    return bool((agent := sys.modules.get("wandb.agents.pyagent")) and agent.is_running())


def upload_was_refused(folder: Path) -> bool:
    """Whether the server has refused a run's rows for good, which wandb tells nobody but the run's own log."""
    with contextlib.suppress(OSError):
        return "filestream: fatal error" in (folder / "logs" / "debug-internal.log").read_text()
    return False


def is_unreachable(error: Exception) -> bool:
    """Whether `wandb.init` failed because no server answers, which has no class of its own."""
    return any(text in str(error).lower() for text in ("timed out", "context deadline exceeded"))


def service_has_died(error: BaseException) -> bool:
    """Whether an error of a run's method means that wandb-core is gone: only a new process gets a new one."""
    from wandb.sdk.mailbox import HandleAbandonedError, MailboxClosedError

    return isinstance(error, ConnectionError | HandleAbandonedError | MailboxClosedError)


def service_is_dead() -> bool:
    """Whether the wandb-core of this process has ended. The first row after that is dropped without an error."""
    from wandb.sdk import wandb_setup

    connection = wandb_setup.singleton()._connection
    return bool(connection and connection._proc and connection._proc._process.poll() is not None)


def end_service(timeout: float) -> None:
    """Has wandb-core write what is left, and end: `run.finish` returns a moment before the last records are written.

    Raises ConnectionError if it dies meanwhile, TimeoutError if it takes more than so many seconds.
    """
    import wandb
    from wandb.sdk import wandb_setup

    def teardown() -> None:
        with contextlib.suppress(Exception):
            wandb.teardown()

    connection = wandb_setup.singleton()._connection
    if connection and connection._proc:  # else the run is disabled, or this has been done
        threading.Thread(target=teardown, daemon=True).start()
        try:
            status = connection._proc._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"wandb-core does not end within {timeout:.0f} s") from None
        if status:
            raise ConnectionError(f"wandb-core has died: {status}")


def session_settings() -> wandb.Settings:
    """What the environment and wandb's files say. `wandb.setup()` would start a wandb-core, and hang if that dies."""
    from wandb.sdk import wandb_setup

    return wandb_setup.singleton().settings


def has_login(keep: bool = False) -> bool:
    """Whether wandb finds a key, without a prompt, and may `keep` it. Raises ValueError for one that can't be right."""
    import wandb
    from wandb.sdk.lib import wbauth

    host = session_settings().base_url
    try:
        return bool(wbauth.authenticate_session(host=host, source="", prompt=False, update_session=keep))
    except wandb.errors.AuthenticationError as error:
        raise ValueError(str(error)) from None


def mode_of_this_folder() -> str | None:
    """What `wandb offline` or `wandb online` was typed in the working directory, or set for the user."""
    settings = session_settings()
    return settings.mode if "mode" in settings.model_fields_set else None


def open_in_leet(folder: Path, runs: Sequence[Path], metrics: str) -> None:
    """Has LEET show these runs, and first the metrics that the regular expression `metrics` finds.

    On its own it shows the newest run and all metrics by alphabet. A filter that the user has typed stays.
    """
    memory = folder / ".wandb-leet.json"
    with contextlib.suppress(OSError, ValueError, TypeError):
        state = json.loads(memory.read_text()) if memory.exists() else {}
        names = [path.name for path in runs]
        state |= {"selected_runs": names, "pinned_run": names[0], "latest_run": names[-1]}
        state.setdefault("metrics_filter", {"query": metrics})
        memory.write_text(json.dumps(state))


def recorded_config(config: Any) -> dict[str, Any]:
    """What `wandb.init(config=config)` records if it is called in this process; no public function says that.

    A mapping that is no `dict`, such as OmegaConf's, is taken with what it looks up; wandb raises a TypeError.
    """
    import wandb

    known = wandb.Config()  # also takes config-defaults.yaml, which is not in what follows
    known._set_artifact_callback(lambda key, artifact: artifact)  # those stay for `wandb.init`
    config = config if isinstance(config, dict) else _plain(config)
    recorded = known._sanitize_dict(wandb.helper.parse_config(config), allow_val_change=True)
    wandb.util.json_dumps_safer(recorded)  # raises for what would spoil all else that is sent with it
    return recorded


def recorded_summary(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What a run's summary has of it. Raises TypeError or ValueError for media, frames and large arrays."""
    import wandb

    return json.loads(wandb.util.json_dumps_safer(dict(summary)))


def _plain(value: Any) -> Any:
    """Mappings and sequences of all kinds as dicts and lists."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return [*map(_plain, value)] if isinstance(value, Sequence) and not isinstance(value, str | bytes) else value


def unless_set(settings: dict[str, Any]) -> dict[str, Any]:
    """Those settings that neither the environment nor a file of wandb's sets, and how often the log is written."""
    already_set = session_settings().model_fields_set
    return {key: value for key, value in (settings | FLUSH_EVERY).items() if key not in already_set}


def _in_environment(setting: str) -> bool:
    name = setting.upper()
    return f"WANDB_{name}" in os.environ or f"WANDB_{name.removeprefix('X')}" in os.environ  # X_STATS or _STATS


def with_endpoints(settings: Mapping[str, Any], endpoints: Mapping[str, str], filters: list[str]) -> dict[str, Any]:
    """`settings`, with Prometheus endpoints whose numbers wandb-core adds to the run's system metrics.

    The settings for that are `x_` ones, which may change. Who sets endpoints, by argument or environment, has those.
    endpoints: name -> URL. filters: regular expressions for "<name>.<metric>", as long as nobody sets others.
    """
    own, filtering = "x_stats_open_metrics_endpoints", "x_stats_open_metrics_filters"
    if not endpoints or own in settings or _in_environment(own):
        return dict(settings)
    filtered = {} if _in_environment(filtering) else {filtering: filters}
    return {own: dict(endpoints)} | filtered | settings


def repository() -> dict[str, str]:
    """A setting for the repository around the working directory: wandb would look around the runs' folder."""
    from wandb.sdk.lib.gitlib import GitRepo

    return {"git_root": str(root)} if (root := GitRepo().root_dir) else {}
