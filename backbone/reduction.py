"""All reports of a step become one row: group by key, reduce by the kind of the value. Pure."""

from __future__ import annotations

import dataclasses
import fnmatch
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from . import media
from .ledger import line

Warn = Callable[[str, str], None]  # (what kind of thing, what exactly): a kind is told once
_NUMBERS = {int, float}
BETTER = {"max": max, "min": min}  # of two values of a key, by what `Reduction.best` says of it
REFUSED = "refused"  # how a kind begins that means a lost value
_SMALL = 2.0**-520  # a double, times this, can be squared and added up


class Rule(NamedTuple):
    """How the values of one key become one."""

    how: str = "mean"  # or "sum", or "largest"
    weight: str | None = None  # key of the same report
    total: bool = False
    statistics: Sequence[str] = ("mean", "min", "max")
    worst: bool = False


@dataclasses.dataclass(frozen=True)
class Reduction:
    """What `reduce_reports` can't tell from a value: how a pipeline's metrics are combined over workers.

    A key may be a pattern: `reward/*` is every key below `reward/`; the first that fits counts.

    Per-token means need `weights`: with `weights={"loss": "tokens"}` two ranks that report (loss 1, 10 tokens) and
    (loss 0, 990 tokens) make a loss of 0.01. The mean of their means would be 0.5.
    """

    sums: Sequence[str] = ()  # rates and counts, which add up over workers
    totals: Sequence[str] = ()  # keys whose running sum over steps is logged too, as `<key>_total`
    largest: Sequence[str] = ()  # the largest worker's value passes through
    weights: Mapping[str, str] = dataclasses.field(default_factory=dict)  # of a mean: key -> key of its weight
    statistics: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)  # of samples: mean, p99, …
    worst: Sequence[str] = ()  # the largest is logged too, as `<key>/max`, and whose it is, as `<key>/worst`
    best: Mapping[str, str] = dataclasses.field(default_factory=dict)  # key of a row -> max or min, for the runs' table

    def __post_init__(self) -> None:
        if not all(isinstance(rules, Mapping) for rules in (self.weights, self.statistics, self.best)):
            raise TypeError("weights, statistics and best must be mappings from keys")
        for names in (self.sums, self.totals, self.largest, self.worst, *self.statistics.values()):
            if isinstance(names, str) or not all(isinstance(name, str) for name in names):
                raise TypeError(f"{names!r} must be a sequence of strings: ({names!r},)")
        if not all(isinstance(weight, str) for weight in self.weights.values()):
            raise TypeError(f"weights must be keys of metrics: {self.weights!r}")
        for name in itertools.chain.from_iterable(self.statistics.values()):
            if not re.fullmatch(r"mean|min|max|std|histogram|p\d\d?", name):
                raise ValueError(f"statistic {name!r} must be mean, min, max, std, histogram or a percentile as p99")
        for key, best in self.best.items():
            if best not in BETTER or "*" in key:
                raise ValueError(f"best must say of a key, and of no pattern, max or min; not {best!r} of {key!r}")
        object.__setattr__(self, "_rules", {})

    def rule(self, key: str) -> Rule:
        """What is declared for `key`, by name or by pattern."""
        if key not in self._rules:
            how = "sum" if _first(self.sums, key) else "largest" if _first(self.largest, key) else "mean"
            weight = self.weights.get(_first(self.weights, key))
            weight = None if weight == key else weight  # which fits a pattern such as `actor/*`, too
            names = self.statistics.get(_first(self.statistics, key), Rule().statistics)
            self._rules[key] = Rule(how, weight, bool(_first(self.totals, key)), names, bool(_first(self.worst, key)))
        return self._rules[key]


def _first(patterns: Iterable[str], key: str) -> str | None:
    return next((pattern for pattern in patterns if key == pattern or fnmatch.fnmatchcase(key, pattern)), None)


def reduce_reports(
    reports: Sequence[Mapping[str, Any]],
    reduction: Reduction,
    warn: Warn = lambda kind, what: None,
    who: Sequence[str] = (),
) -> dict[str, Any]:
    """The reports of one step as one row. who: the worker that each is from. The kind of a value says how:

    - a scalar is a worker's measurement: averaged over the reports that have it, unless `reduction` names its key
    - an array (any shape) holds samples: pooled over the reports before any statistic is taken; the statistics become
      `key/mean`, … (mean, min and max if `reduction` names none); sums and weights are for scalars
    - a bool array holds outcomes: pooled to one fraction under `key`
    - tables of the same columns become one table with all their rows
    - of strings and other W&B data types one passes through; if they differ, a warning says so

    Reports that lack a key, or have an empty array or the weight 0 for it, don't count for it. Otherwise NaN makes a
    result NaN. What can't be reduced, and what W&B would cut off, is left out; the warning begins with `REFUSED`.
    """
    row: dict[str, Any] = {}
    computed: dict[str, Any] = {}
    for key in dict.fromkeys(itertools.chain.from_iterable(reports)):
        values = [report[key] for report in reports if key in report]
        if not _NUMBERS.issuperset(map(type, values)):
            values = [_plain(value) for value in values]
        kinds = {*map(type, values)}
        try:
            if kinds <= _NUMBERS:
                row[key] = _scalar(key, values, reports, reduction.rule(key), warn)
            elif kinds <= _NUMBERS | {np.ndarray}:
                computed |= _statistics(key, values, reduction.rule(key), warn)
            else:
                row[key] = _object(key, values, warn)
            if who and reduction.rule(key).worst:
                computed = _worst(key, reports, who) | computed
        except Exception as error:  # of a class that the user has derived from one of W&B's
            warn(f"{REFUSED} {key}", f"the values of {key!r} can't be reduced to one: {line(error)}")
    for key in row.keys() & computed.keys():
        warn("logged and computed", f"{key!r} is logged, and computed from samples as well: the computed value is kept")
    return row | computed


def _worst(key: str, reports: Sequence[Mapping], who: Sequence[str]) -> dict[str, Any]:
    """The largest value that a worker has reported, and the worker's name: a mean hides one that is slow."""
    reported = [(report[key], name) for report, name in zip(reports, who, strict=True) if key in report]
    theirs = [(np.ravel(value), name) for value, name in reported if isinstance(value, int | float | np.ndarray)]
    largest = [(float(np.nanmax(value)), name) for value, name in theirs if not np.isnan(value).all()]
    return dict(zip((f"{key}/max", f"{key}/worst"), max(largest), strict=True)) if largest else {}


def _plain(value: Any) -> Any:
    """numpy's numbers as Python's, and what is true as 1."""
    value = value.item() if isinstance(value, np.generic) else value
    return int(value) if isinstance(value, bool) else value


def _scalar(key: str, values: list[float], reports: Sequence[Mapping], rule: Rule, warn: Warn) -> float:
    if rule.how == "sum":
        return sum(values)
    if rule.how == "largest":
        return max(values, key=lambda value: (math.isnan(value), value))
    if rule.weight:
        weights = [_plain(report.get(rule.weight)) for report in reports if key in report]
        if all(isinstance(weight, int | float) for weight in weights):
            weighted = [pair for pair in zip(values, weights, strict=True) if pair[1]]  # 0 times NaN would be NaN
            if total := sum(weight for _, weight in weighted):
                return sum(value * weight for value, weight in weighted) / total
            warn(f"weights of {key}", f"the weights {rule.weight!r} of {key!r} add up to 0: such a row has NaN")
            return math.nan
        if len(values) > 1:
            warn(f"no weight {key}", f"{key!r} has the plain mean where its weight {rule.weight!r} is no number")
    total, n = sum(values), len(values)
    return total // n if isinstance(total, int) and total % n == 0 else total / n  # whole numbers have up to 64 bits


def _statistics(key: str, values: list[Any], rule: Rule, warn: Warn) -> dict[str, Any]:
    samples = [np.ravel(value) for value in values if np.size(value)]
    if rule.how != "mean" or rule.weight or rule.total:
        warn(f"samples {key}", f"{key!r} has samples, so the row has statistics of them, and no sum or weighted mean")
    if not samples:
        return {}
    pooled = np.concatenate([[], *samples])  # as float64
    if all(some.dtype == bool for some in samples):
        return {key: pooled.mean().item()}
    found = {}
    for name in rule.statistics:
        try:
            found[f"{key}/{name}"] = _histogram(pooled) if name == "histogram" else _statistic(name, pooled)
        except Exception as error:
            warn(f"{REFUSED} {key}/{name}", f"'{key}/{name}' can't be computed: {line(error)}")
    return found


def _statistic(name: str, pooled: np.ndarray) -> float:
    def compute(samples: np.ndarray) -> float:
        return (np.percentile(samples, int(name[1:])) if name[0] == "p" else getattr(np, name)(samples)).item()

    with np.errstate(over="ignore", invalid="ignore"):
        value = compute(pooled)
        if not math.isfinite(value) and np.isfinite(pooled).all():  # a sum or difference is more than a double holds
            value = compute(pooled * _SMALL) / _SMALL
    return value


def _histogram(pooled: np.ndarray) -> Any:
    """Of the finite samples. It has one bin where numpy can't make more: of neighbouring doubles, or of huge ones."""
    import wandb

    finite = pooled[np.isfinite(pooled)]
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            return wandb.Histogram(finite)
    except ValueError:
        return wandb.Histogram(np_histogram=([finite.size], [finite.min().item(), finite.max().item()]))


def _object(key: str, values: list[Any], warn: Warn) -> Any:
    first, *others = [value for value in values if not isinstance(value, int | float | np.ndarray)]
    columns = first.columns if media.is_table(first) else None
    if others and columns and all(media.is_table(value) and value.columns == columns for value in others):
        first = _one_table([first, *others])
    elif len(values) > 1 + len(others) or any(type(other) is not type(first) or other != first for other in others):
        warn(f"differs {key}", f"{key!r} differs between workers: one of them is kept")
    if excess := media.excess(first):
        warn(f"{REFUSED} {key}", f"{key!r} has {excess}")
    return first


def _one_table(tables: Sequence[Any]) -> Any:
    import wandb

    data = [row for table in tables for row in table.data]
    options = dict(columns=list(tables[0].columns), data=data, log_mode=tables[0].log_mode)
    try:
        return wandb.Table(**options)
    except TypeError:  # a column's types differ between workers
        return wandb.Table(**options, allow_mixed_types=True)
