"""What may be logged, and how it is packed for the way to the pipeline actor, and for its state."""

from __future__ import annotations

import io
import pickle
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from . import media
from .ledger import line

_KNOWN_KEYS: set[str] = set()  # that have passed `_check_key`; looking here is cheaper than checking again
_PLAIN = {float, int, str, np.ndarray}  # have no media in them
_FLOATS, _NUMBERS, _TEXTS = {float}, {float, int, bool}, {str}


def as_step(step: Any) -> int:
    """A step as it was given to `log`: a whole number of any kind. Raises TypeError or ValueError for what is none."""
    if type(step) is not int:
        try:
            array = _as_array(step)
            number = int(array) if array.dtype.kind in "iuf" and not array.ndim and int(array) == array else None
        except Exception:  # what is no number, or infinite
            number = None
        if number is None:
            raise TypeError(f"step must be a whole number, not {shown(step)}")
        step = number
    if not 0 <= step < 2**63:
        hint = ": what comes before training, such as an evaluation, is step 0" if step < 0 else ""
        raise ValueError(f"step must be a number from 0 to 2**63, not {shown(step)}{hint}")
    return step


def as_report(metrics: Mapping[str, Any], step: int | None = None) -> dict[str, Any]:
    """What is sent for `metrics`: nested mappings as paths, without None, tensors and the like as numbers or arrays.

    step: which the metrics may have, too, as `step`; that is left out. Raises TypeError or ValueError naming the key.
    """
    if type(metrics) is not dict and not isinstance(metrics, Mapping):
        raise TypeError(f"metrics must be a mapping from key to value, not {shown(metrics)}")
    are_known = _KNOWN_KEYS.issuperset(metrics) and _TEXTS.issuperset(map(type, metrics))
    if are_known and _FLOATS.issuperset(map(type, metrics.values())):  # as most reports are: this is quicker
        return metrics if type(metrics) is dict else dict(metrics)
    report: dict[str, Any] = {}
    for key, value in metrics.items():
        if type(value) is float and type(key) is str and key in _KNOWN_KEYS and key not in report:
            report[key] = value
        elif key == "step" and not isinstance(value, Mapping):
            if value is not None and as_step(value) != step and step is not None:
                raise ValueError(f"metric 'step' is {shown(value)}, but log was called for step {step}")
        else:
            _add(report, key, value)
    return report


def _add(report: dict[str, Any], key: Any, value: Any) -> None:
    if value is None:
        return
    if not isinstance(key, str):
        raise TypeError(f"metric key {shown(key)} must be a string, not {type(key).__name__}")
    key = as_text(key)
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if not isinstance(name, str | int | float | np.generic):
                raise TypeError(f"metric key {shown(name)} below {key!r} must be a string, not {type(name).__name__}")
            _add(report, f"{key}/{as_text(name) if isinstance(name, str) else name}", inner)
        return
    if key not in _KNOWN_KEYS:
        _check_key(key)
    if key in report:
        raise ValueError(f"metric key {key!r} is there twice, once as a path and once as a nested mapping")
    if (value := _value(key, value)) is not None:
        report[key] = value


def as_text(value: str) -> str:
    """A string without its class, such as an Enum's, which the actor might not know."""
    return str.__str__(value)


def encodable(value: str) -> str:
    """As `as_text`; half of a character, such as a tokenizer makes, is written out."""
    return as_text(value).encode("utf-8", "backslashreplace").decode()


def check_label(label: Any) -> None:
    if not isinstance(label, str):
        raise TypeError(f"label must be a string, not {shown(label)}")


def shown(value: Any) -> str:
    """How a message shows a value: in one line, and not all of a long one."""
    try:
        return " ".join(repr(value)[:1000].split())[:80]
    except Exception:  # of an integer of thousands of digits, or of somebody's class
        return f"a {type(value).__name__}"


def _check_key(key: str) -> None:
    if not key or key[0] == "_" or key in ("workers", "\\"):  # in a run with axes, wandb-core dies of the backslash
        raise ValueError(f"metric key {key!r} must not be empty, a backslash or 'workers', nor begin with '_'")
    try:
        key.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"metric key {key!r} can't be encoded: {error.reason}") from None
    if len(_KNOWN_KEYS) < 10_000:
        _KNOWN_KEYS.add(key)


def _value(key: str, value: Any) -> Any:
    """`value` as int, float, str, numeric array, W&B data type or list of W&B media; None if there is nothing."""
    if isinstance(value, float):
        return float(value)
    if isinstance(value, int):
        return _integer(key, int(value))
    if getattr(value, "log_mode", None) == "INCREMENTAL":
        increment = media.Increment(value, key)
        return increment if increment.is_new else None
    if media.is_data_type(value):
        return value
    if isinstance(value, str):
        return as_text(value)
    if isinstance(value, list | tuple) and value and all(map(media.is_data_type, value)):
        return list(value)
    if isinstance(value, np.ma.MaskedArray) and not value.ndim:
        return None if value.mask else _value(key, value.item())
    array, error = None, None
    try:
        if (made := media.made_of(value)) is not None:
            return made
        if isinstance(value, list | tuple) and any(media.made_of(each) is not None for each in _one_of_each(value)):
            raise TypeError("log each under a key of its own")
        array = _as_array(value)
    except Exception as raised:  # ragged lists, tensors that can't be read from here
        error = raised
    if array is None or array.dtype.kind not in "iufb":
        raise TypeError(
            f"metric {key!r} must be a number, a string, an array or tensor of numbers, or a W&B data type, not "
            f"{shown(value)} ({type(value).__name__}): log a number of it, its str(), or a wandb.Image, wandb.Table, …"
            + (f" ({line(error)})" if error else "")
        ) from error
    if array.ndim:
        return array
    return float(array) if array.dtype.kind == "f" else _integer(key, int(array))


def _integer(key: str, value: int) -> int:
    if abs(value) >= 2**1023:
        raise TypeError(f"metric {key!r} must be below 2**1023, not {shown(value)}")
    return value if abs(value) < 2**63 else float(value)  # as W&B does


def _as_array(value: Any) -> np.ndarray:
    """Raises what the libraries raise for what is no array."""
    kinds = _one_of_each(value) if isinstance(value, list | tuple) else ()
    if any(hasattr(each, "detach") or isinstance(each, np.ma.MaskedArray) for each in kinds):
        return np.concatenate([np.ravel(_as_array(each)) for each in value])
    if hasattr(value, "full_tensor"):  # torch's DTensor
        if not all(placement.is_replicate() for placement in value.placements):
            raise TypeError("of this DTensor each rank has a part: log its .full_tensor(), which all ranks must call")
        value = value.to_local()
    if hasattr(value, "detach") and hasattr(value, "cpu"):  # a torch tensor, maybe with gradient, maybe on a GPU
        value = value.detach().cpu()
        try:
            value = value.numpy()
        except TypeError:  # bfloat16, which numpy has not
            value = value.float().numpy()
    elif isinstance(value, np.ma.MaskedArray):
        value = value.compressed()
    elif hasattr(value, "dropna") and not isinstance(value.dtype, np.dtype):  # a pandas Series with a mask
        value = value.dropna()
    array = np.asarray(value)
    array = np.asarray(array.tolist()) if array.dtype == object else array
    foreign = array.dtype.isbuiltin == 2  # jax's bfloat16, float8, …
    return array.astype(np.float64) if foreign or array.dtype == np.longdouble else array


def _one_of_each(values: list | tuple) -> list:
    """A value of each type, if any is no number of Python's."""
    return [] if _NUMBERS.issuperset(map(type, values)) else [*{type(value): value for value in values}.values()]


class _Pickler(pickle.Pickler):
    """Sends media with their bytes, as their path means nothing elsewhere, and without the run they are bound to."""

    def reducer_override(self, value: Any) -> Any:
        if (parts := media.parts(value)) is not None:
            return media.assembled, parts
        return (object.__new__, (type(value),), media.unbound(value)) if media.is_bound(value) else NotImplemented


def pack(report: Mapping[str, Any], what: str = "metric") -> bytes:
    """A report or a row as bytes, media included. Raises TypeError that names the key of what can't be sent."""
    return pack_report(report, what)[0]


def pack_report(report: Mapping[str, Any], what: str = "metric") -> tuple[bytes, list[media.Increment]]:
    """A report as bytes, and the growing tables in it. Call `note()` of each table when the report is written."""
    if "wandb" not in sys.modules or _PLAIN.issuperset(map(type, report.values())):
        return pickle.dumps(report, pickle.HIGHEST_PROTOCOL), []
    return _dumps(report, what), [value for value in report.values() if isinstance(value, media.Increment)]


def _dumps(report: Mapping[str, Any], what: str) -> bytes:
    buffer = io.BytesIO()
    try:
        _Pickler(buffer, pickle.HIGHEST_PROTOCOL).dump(report)
    except Exception as error:
        if len(report) > 1:
            for key, value in report.items():
                _dumps({key: value}, what)
        raise TypeError(f"{what} {next(iter(report))!r} can't be sent: {line(error)}") from error
    return buffer.getvalue()


unpack = pickle.loads
