"""Starts a W&B run, or goes on with it, and gives its pipelines their step axes."""

from __future__ import annotations

import contextlib
import glob
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import wandb_internals
from .ledger import line
from .state import State

if TYPE_CHECKING:  # importing it takes a second, and workers don't need it
    import wandb


def wandb_init(state: State, init: dict[str, Any]) -> tuple[wandb.Run, float]:
    """Calls `wandb.init`. Where no server answers, the run is kept here.

    Returns the run, and the seconds that `finish` has.
    """
    import wandb

    if state.facts.get("begun"):  # in this life of the id
        init = _to_go_on(init, state.facts["mode"])
    folder, settings = Path(init["dir"], "wandb"), init["settings"]
    defaults = dict(silent=True, console="off", console_multipart=True, init_timeout=10, finish_timeout=60)
    settings = wandb_internals.unless_set(defaults | wandb_internals.repository()) | settings
    timeout = float(settings.get("finish_timeout") or wandb_internals.session_settings().finish_timeout) or math.inf
    settings |= dict(finish_timeout_raises=True)
    init = init | dict(settings=wandb.Settings(**settings), reinit="create_new")
    own = f"run-????????_??????-{glob.escape(init['id'])}"
    before = {*folder.glob(own)}
    try:
        run = wandb.init(**init)
    except wandb.Error as error:
        if not wandb_internals.is_unreachable(error):  # the server answers, and says no
            raise
        away = f"the W&B server does not answer, so the run is kept here (offline): {line(error)}"
        state.warn("offline", away)
        wandb.teardown()  # its service would not take the id a second time
        for failed in {*folder.glob(own)} - before:
            shutil.rmtree(failed)
        run = wandb.init(**init | dict(mode="offline"))
    if not run.disabled:
        _keep_staging_beside(folder, run)
    return run, timeout


def _to_go_on(init: dict[str, Any], mode: str) -> dict[str, Any]:
    """Arguments for a run that goes on by itself. What has been edited in the app meanwhile stays as it is.

    To be called before wandb reads the environment, which it does once.
    """
    init = init | dict(resume="allow", mode=mode)
    if mode == "online":
        for name in ("name", "notes", "tags", "config"):
            init.pop(name, None)
            os.environ.pop(f"WANDB_{name.upper()}", None)
    return init


def _keep_staging_beside(folder: Path, run: wandb.Run) -> None:
    """Puts what wandb stages beside the run: else it is in the home folder, and gone when `wandb sync` needs it."""
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR"):
        os.environ[name] = os.environ.get(name) or f"{run.sync_dir}/artifacts"
    with contextlib.suppress(FileExistsError), open(folder / ".gitignore", "x") as file:
        file.write("*\n")  # Ray, too, obeys it, and would bring all runs along in a job's working directory


class Axes:
    """The step axes of a run's pipelines."""

    def __init__(self, run: wandb.Run):
        self._run, self._has_bare_keys = run, False
        self._named: dict[str, set[str]] = {}  # prefix -> keys that have been defined by their name

    def define(self, prefix: str, best: Mapping[str, str]) -> None:
        """Gives a pipeline's keys their step axis. best: key -> max or min, which the runs' table shows, too.

        Which of two overlapping globs wins is undefined, so behind bare keys (`*`) each key is defined by its name.
        """
        axis = dict(step_metric=f"{prefix}step", step_sync=False)
        self._has_bare_keys |= not prefix
        if prefix and self._has_bare_keys:
            self._named[prefix] = {f"{prefix}step", f"{prefix}workers"}
        else:
            self._run.define_metric(f"{prefix}*", **axis)
        self._run.define_metric(f"{prefix}step", hidden=True)
        for key, op in best.items():
            name = wandb_internals.metric_name(prefix + key)
            self._run.define_metric(name, **axis, summary=f"{op},last")
        self._run.define_metric(f"{prefix}workers", **axis, hidden=True)

    def name(self, keys: Iterable[str]) -> None:
        """Defines those of a row's keys that have to be defined by their name."""
        for prefix, known in self._named.items():
            for key in [key for key in keys if key.startswith(prefix) and key not in known]:
                known.add(key)
                wandb_internals.define_by_name(self._run, key, f"{prefix}step")
