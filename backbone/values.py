"""What may be logged, and how it gets to another process and to a restarted actor."""

from __future__ import annotations

import contextlib
import io
import pickle
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from . import wandb_internals
from .ledger import line

_KNOWN_KEYS: set[str] = set()  # that were found right before; looking here is cheaper than looking at them again
_RESERVED = ("step", "workers")  # what every row has


_PLAIN = {float, int, str, np.ndarray}  # have no media in them


def as_step(step: Any) -> int:
    """A step as it was given to `log`. Raises TypeError or ValueError for what is none."""
    if isinstance(step, bool) or not isinstance(step, int | np.integer):
        raise TypeError(f"step must be an integer, not {step!r}")
    if not 0 <= step < 2**63:
        raise ValueError(f"step must be a number from 0 to 2**63, not {step}")
    return int(step)


def as_report(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What is sent for `metrics`: nested mappings as paths, without None, tensors and the like as numbers or arrays.

    Raises TypeError or ValueError that name the key.
    """
    if not isinstance(metrics, Mapping):
        raise TypeError(f"metrics must be a mapping from key to value, not {metrics!r:.80}")
    report: dict[str, Any] = {}
    for key, value in metrics.items():
        if type(value) is float and type(key) is str and key in _KNOWN_KEYS and key not in report:
            report[key] = value
        else:
            _add(report, key, value)
    return report


def _add(report: dict[str, Any], key: Any, value: Any) -> None:
    if value is None:
        return
    if not isinstance(key, str):
        raise TypeError(f"metric key {key!r} must be a string, not {type(key).__name__}")
    key = _text(key)
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if not isinstance(name, str | int):
                raise TypeError(f"metric key {name!r} below {key!r} must be a string, not {type(name).__name__}")
            _add(report, f"{key}/{_text(name) if isinstance(name, str) else name}", inner)
        return
    if key not in _KNOWN_KEYS:
        _check_key(key)
    if key in report:
        raise ValueError(f"metric key {key!r} is there twice, once as a path and once as a nested mapping")
    report[key] = _value(key, value)


def _text(value: str) -> str:
    """A string without its class, such as an Enum's, which the actor might not know."""
    return str.__str__(value)


def _check_key(key: str) -> None:
    if not key or key[0] == "_" or key in _RESERVED:
        raise ValueError(f"metric key {key!r} must not be empty, 'step' or 'workers', nor start with '_'")
    try:
        key.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"metric key {key!r} can't be encoded: {error.reason}") from None
    if len(_KNOWN_KEYS) < 10_000:
        _KNOWN_KEYS.add(key)


def _value(key: str, value: Any) -> Any:
    """`value` as int, float, str, numeric array, W&B data type or list of W&B media."""
    if isinstance(value, float):
        return float(value)
    if isinstance(value, int):
        return _integer(key, int(value))
    if wandb_internals.is_data_type(value):
        return value
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, list | tuple) and value and all(map(wandb_internals.is_data_type, value)):
        return list(value)
    array = None
    with contextlib.suppress(Exception):  # ragged lists, tensors that can't be read from here
        array = _as_array(value)
    if array is None or array.dtype.kind not in "iufb":
        raise TypeError(
            f"metric {key!r} must be a number, a string, an array or tensor of numbers, or a W&B data type, not "
            f"{value!r:.80} ({type(value).__name__}): log a number of it, its str(), or a wandb.Image, wandb.Table, …"
        )
    if array.ndim:
        return array
    return float(array) if array.dtype.kind == "f" else _integer(key, int(array))


def _integer(key: str, value: int) -> int:
    if not -(2**63) <= value < 2**63:
        raise TypeError(f"metric {key!r} must be below 2**63, not {value}: log it as a float")
    return value


def _as_array(value: Any) -> np.ndarray:
    if hasattr(value, "detach"):  # a torch tensor, maybe with gradient, maybe on a GPU
        value = value.detach().cpu()
        try:
            value = value.numpy()
        except TypeError:  # bfloat16, which numpy has not
            value = value.float().numpy()
    array = np.asarray(value)
    foreign = array.dtype.isbuiltin == 2  # jax's bfloat16, float8, …
    return array.astype(np.float64) if foreign or array.dtype == np.longdouble else array


class _Pickler(pickle.Pickler):
    """Puts the bytes of media beside them, which otherwise are a path in a temporary folder of one process."""

    def reducer_override(self, value: Any) -> Any:
        path = wandb_internals.media_file(value)
        if path is None:
            return NotImplemented
        return wandb_internals.media, (type(value), value.__dict__, path.read_bytes())


def pack(report: Mapping[str, Any], what: str = "metric") -> bytes:
    """A report or a row as bytes, media included. Raises TypeError that names the key of what can't be sent."""
    if "wandb" not in sys.modules or _PLAIN.issuperset(map(type, report.values())):
        return pickle.dumps(report, pickle.HIGHEST_PROTOCOL)
    buffer = io.BytesIO()
    try:
        _Pickler(buffer, pickle.HIGHEST_PROTOCOL).dump(report)
    except Exception as error:
        if len(report) > 1:
            for key, value in report.items():
                pack({key: value}, what)
        raise TypeError(f"{what} {next(iter(report))!r} can't be sent: {line(error)}") from error
    return buffer.getvalue()


unpack = pickle.loads
