"""What the code and the environment say of a W&B run, checked before anything is started. Free of Ray.

wandb, or its server at an upload a week later, would refuse the same, but in more lines and after more was started.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Mapping
from typing import Any

from . import wandb_internals
from .files import check_run_id
from .ledger import line
from .values import shown

LONGEST, LONGEST_TAG = 128, 64  # characters that the server takes
MODES = ("online", "offline", "disabled", "dryrun", "run")  # of which the last two are old names
RESUMES = ("allow", "must", "never", "auto", True)
SAME = {"run_id": "id", "root_dir": "dir", "run_name": "name", "run_group": "group", "run_job_type": "job_type"}
SAME |= {"run_tags": "tags", "run_notes": "notes"}  # settings -> arguments
SAME |= {name: name for name in ("entity", "mode", "resume")}
USUAL = {*SAME.values(), "project", "config", "settings"}  # arguments of `wandb.init`


def as_given(init: Mapping[str, Any]) -> dict[str, Any]:
    """What the code says to `wandb.init`; settings are a dict, without those that are arguments as well."""
    init = {key: value for key, value in init.items() if value is not None}
    settings = init.get("settings") or {}
    if not isinstance(settings, Mapping):
        if not hasattr(settings, "model_fields_set"):  # which wandb.Settings has
            raise TypeError(f"settings must be a mapping or wandb.Settings, not {shown(settings)}")
        settings = {key: getattr(settings, key) for key in settings.model_fields_set}
    settings = {key: value for key, value in settings.items() if value is not None}
    return {SAME[key]: settings.pop(key) for key in SAME if key in settings} | init | dict(settings=settings)


def complete(init: Mapping[str, Any], own: Mapping[str, Any], environ: Mapping[str, str]) -> dict[str, Any]:
    """What goes to `wandb.init`, with an absolute `dir` and a config of plain values.

    init: see `as_given`. own: what holds unless `init` or the environment say else. Raises ValueError or TypeError for
    what can't work.
    """
    variables = {name.removeprefix("WANDB_").lower(): value for name, value in environ.items()}
    _check_arguments(init.keys() - USUAL)
    same = dict(id="run_id", dir="dir", job_type="job_type")
    from_environment = {key: variables[name] for key, name in same.items() if variables.get(name)}

    def given(name: str) -> Any:
        found = next((place[name] for place in (init, init["settings"], variables) if name in place), None)
        return None if str(found).lower() in ("false", "0", "") else found

    if given("sync_tensorboard") or given("mode") == "shared":
        raise ValueError("sync_tensorboard and mode='shared' make wandb ignore the numbers of rows: use neither here")
    if name := next((name for name in ("resume_from", "fork_from") if given(name)), None):
        raise ValueError(f"{name} counts in W&B's own steps, which are rows here: use id= and resume='allow'")
    if given("resume") in (True, "auto") and "id" not in from_environment | init:
        raise ValueError(
            "resume='auto' goes on with the last run of a folder, whichever it was: use id= and resume='allow'"
        )
    if (resume := given("resume")) and resume not in RESUMES:
        raise ValueError(f"resume {shown(resume)} must be allow, must or never")
    if (mode := given("mode")) and mode not in MODES:
        raise ValueError(f"mode {shown(mode)} must be online, offline or disabled")
    _check_names({"name": variables.get("name"), "group": variables.get("run_group")} | from_environment | init)
    _check_project_and_entity(init["project"], given("entity"))
    if "tags" in init:
        init = {**init, "tags": _as_tags(init["tags"])}
    elif variables.get("tags"):
        _as_tags(variables["tags"].split(","))
    init = {**own, **from_environment, **init}
    check_run_id(init["id"])
    if not isinstance(init["dir"], str | os.PathLike):
        raise TypeError(f"dir must be a path, not {shown(init['dir'])}")
    if init.get("config"):
        init["config"] = as_recorded(init["config"])
    return init | dict(dir=os.path.abspath(os.path.expanduser(init["dir"])))


def check_workers(workers: Any, least: int) -> None:
    if isinstance(workers, bool) or not isinstance(workers, int) or not least <= workers < 2**31:
        raise ValueError(f"workers must be an integer from {least}, not {workers!r}")


def _check_arguments(names: set[str]) -> None:
    if names:
        import wandb  # only now, because that takes a while

        if unknown := names - inspect.signature(wandb.init).parameters.keys():
            raise TypeError(f"{min(unknown)!r} is no argument of WandbRun, nor of wandb.init")


def _check_names(names: Mapping[str, Any]) -> None:
    for key in ("name", "group", "job_type"):
        name = names.get(key)
        if name is not None and not (isinstance(name, str) and len(name) <= LONGEST):
            raise ValueError(f"{key} {shown(name)} must be a string of at most {LONGEST} characters")


def _check_project_and_entity(project: str, entity: Any) -> None:
    if len(project) > LONGEST or set(project) & set(r"/\#?%:"):
        raise ValueError(rf"project {shown(project)} must be at most {LONGEST} characters without / \ # ? % :")
    if entity is not None and not (isinstance(entity, str) and "/" not in entity):
        raise ValueError(
            f"entity {shown(entity)} must be the name of a user or team; the project is an argument of its own"
        )


def _as_tags(tags: Any) -> list[str]:
    """A list of them, because an iterator can be read only once. Raises TypeError or ValueError for what is no tag."""
    if not isinstance(tags, Iterable):
        raise TypeError(f"tags must be a sequence of strings, not {shown(tags)}")
    tags = [tags] if isinstance(tags, str) else [*tags]
    for tag in tags:
        if not 1 <= len(str(tag)) <= LONGEST_TAG:
            raise ValueError(f"tag {shown(tag)} must be 1 to {LONGEST_TAG} characters")
    return tags


def as_recorded(config: Any, name: str = "config") -> dict[str, Any]:
    """What wandb records of a config or a summary; here, because the actor has neither its classes nor its files."""
    is_summary = name == "summary"
    try:
        return wandb_internals.recorded_summary(config) if is_summary else wandb_internals.recorded_config(config)
    except Exception as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        hint = "; log arrays, frames and media instead" if is_summary else ""
        raise kind(f"{name}={shown(config)} can't be recorded: {line(error)}{hint}") from None
