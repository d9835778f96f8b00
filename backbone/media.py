"""W&B's data types: what is one, what becomes one, how its file gets to another process, how much of it W&B takes.

Some of what is used here is not public. `tests/test_wandb_internals.py` fails when wandb changes it.
"""

from __future__ import annotations

import os
import sys
import tempfile
import weakref
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import wandb


def is_data_type(value: Any) -> bool:
    """Whether it is a `wandb.Table`, `wandb.Histogram`, a chart of `wandb.plot` or the like."""
    if "wandb" not in sys.modules:  # then nobody can have made one
        return False
    import wandb
    from wandb.sdk.data_types.base_types.wb_value import WBValue

    return isinstance(value, WBValue | wandb.plot.CustomChart)


def is_table(value: Any) -> bool:
    """Whether it is a `wandb.Table`, without importing wandb."""
    return getattr(value, "_log_type", None) == "table"


def made_of(value: Any) -> Any:
    """What `wandb.log` makes of a matplotlib or plotly figure, or of a pandas data frame: a plot, image or table.

    None for other values. Raises an exception for images and for other libraries' frames, of which `wandb.log` makes
    nothing: numpy would take their pixels and cells for samples.
    """
    library = (value.__name__ if isinstance(value, ModuleType) else type(value).__module__).partition(".")[0]
    if library in ("matplotlib", "plotly"):  # wandb, too, looks at names: neither has to be installed
        import wandb
        from wandb.sdk.data_types.plotly import Plotly

        try:
            return Plotly.make_plot_media(value)
        except Exception:  # of matplotlib's figures plotly, if it is installed, can draw some only
            if library == "plotly":
                raise
            return wandb.Image(value)
    if library == "PIL":
        raise TypeError("W&B takes a wandb.Image of it")
    if hasattr(value, "columns"):
        import wandb

        return wandb.Table(dataframe=value)
    return None


# Files


def parts(value: Any) -> tuple[type, dict[str, Any], bytes] | None:
    """Class, state and file of a `wandb.Image`, `wandb.Html` or the like, for `assembled`; None if it has no file.

    A temporary file of wandb's is removed with the object: wandb would keep it until the process ends.
    """
    path = getattr(value, "_path", None) if is_data_type(value) else None
    if not isinstance(path, str) or "://" in path:
        return None
    content = Path(path).read_bytes()
    if vars(value).get("_is_tmp") and not hasattr(value, "_goes_with_it") and _is_temporary(path):
        value._goes_with_it = True
        weakref.finalize(value, _remove, path, os.getpid())
    return type(value), unbound(value), content


# What ties an object to a run that it was logged to, or to an artifact that it is in. Neither can be sent.
_TIES = ("_run", "_artifact_source", "_artifact_target", "_run_target_for_increments")


def is_bound(value: Any) -> bool:
    return is_data_type(value) and any(vars(value).get(tie) for tie in _TIES)


def unbound(value: Any) -> dict[str, Any]:
    """The state of a W&B data type that somebody may have logged to a run of his own, without that run."""
    return {name: None if name in _TIES else each for name, each in vars(value).items()}


def _remove(path: str, pid: int) -> None:
    if pid == os.getpid():  # else this is a fork of the process that has the object
        Path(path).unlink(missing_ok=True)


def assembled(kind: type, state: dict[str, Any], content: bytes) -> Any:
    """Such an object again, in another process. wandb moves its file into a run's folder as if it had made it."""
    from wandb.sdk.data_types._private import MEDIA_TMP

    value = kind.__new__(kind)
    os.makedirs(MEDIA_TMP.name, exist_ok=True)  # some systems clean their temporary folder
    descriptor, path = tempfile.mkstemp(Path(state["_path"]).name, dir=MEDIA_TMP.name)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
    value.__dict__.update(state, _path=path, _is_tmp=True, _goes_with_it=True)
    weakref.finalize(value, _remove, path, os.getpid())  # unless it is a run's by then
    return value


def _is_temporary(path: str) -> bool:
    from wandb.sdk.data_types._private import MEDIA_TMP

    return Path(path).is_relative_to(MEDIA_TMP.name)


def remove_copied_files(logged: Iterable[Any]) -> None:
    """Removes temporary files of logged tables' cells, or of artifacts: wandb has copied them and leaves them."""
    for value in logged:
        target = getattr(getattr(value, "table", value), "_artifact_target", None)  # a chart has a table
        for path in getattr(target.artifact if target else value, "_added_local_paths", ()):
            if _is_temporary(path):
                Path(path).unlink(missing_ok=True)


# Tables that grow


class Increment:
    """The rows of a growing table that have not been logged under this key. It arrives as a table of those rows."""

    def __init__(self, table: Any, key: str):
        self._table, self._key, self._rows = table, key, len(table.data)
        self._sent = vars(table).get("_sent", {}).get(key)  # number of rows

    @property
    def is_new(self) -> bool:
        return self._rows != self._sent  # the first one is, even without rows

    def note(self) -> None:
        """It has been logged, so the next one has the rows behind it."""
        vars(self._table).setdefault("_sent", {})[self._key] = self._rows

    def __reduce__(self) -> tuple:
        state = unbound(self._table) | {"data": self._table.data[self._sent : self._rows]}
        return object.__new__, (type(self._table),), state


def growing_tables(metrics: Mapping[str, Any]) -> dict[str, wandb.Table]:
    return {key: value for key, value in metrics.items() if getattr(value, "log_mode", None) == "INCREMENTAL"}


def continue_table(table: wandb.Table, logged: Sequence[tuple[int, str]], number: int, resumed: bool) -> None:
    """Makes a row's table, which holds only what is new, the increment behind those that were `logged` before.

    logged: of each, the number of its row and what W&B calls it.
    """
    before = [name for row, name in logged if row < number]
    if before or not resumed:  # else wandb looks itself
        table._increment_num, table._previous_increments_paths = len(before), before


def logged_increments(table: wandb.Table, logged: Sequence[tuple[int, str]], number: int) -> list[tuple[int, str]]:
    """A table's increments when it has been logged with a row, as `continue_table` takes them. logged: those before."""
    before = [each for each in logged if each[0] < number]
    before = before or [(-1, name) for name in table._previous_increments_paths or ()]  # where wandb has looked itself
    return [*before, (number, table._get_artifact_entry_ref_url())]


# Limits


def excess(value: Any) -> str:
    """What W&B cuts off of a table, a chart or a list of media without a word, if anything."""
    value = getattr(value, "table", value)  # a chart has one
    if is_table(value):
        import wandb

        items, limit, kind = value.data, wandb.Table.MAX_ARTIFACT_ROWS, "rows"
    elif isinstance(value, list) and all(isinstance(item, type(value[0])) for item in value):
        items, limit, kind = value, getattr(value[0], "MAX_ITEMS", len(value)), "elements"
    else:
        return ""
    return f"{len(items)} {kind}, of which W&B takes {limit}: the others are lost" if len(items) > limit else ""
