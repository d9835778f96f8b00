"""What runs have left in a folder: which folders are a run's, and what their transaction logs hold."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from . import transaction_log


def folders(parent: Path, run_id: str, begun: bool = False) -> list[Path]:
    """The folders of the run of this very id below `parent`, oldest first.

    begun: with those that have no transaction log, because the run could not start.
    """
    name = re.compile(rf"(offline-)?run-\d{{8}}_\d{{6}}-{re.escape(run_id)}(-\d+)?")  # wandb counts within a second
    found = []
    for path in parent.glob("*run-*"):
        if name.fullmatch(path.name):
            logs = [log.name for log in path.glob("*.wandb")]
            if logs == [f"run-{run_id}.wandb"] or (begun and not logs and path.name.endswith(f"-{run_id}")):
                found.append(path)
    return sorted(found, key=lambda path: path.name.removeprefix("offline-"))


def numbers(paths: Iterable[str | Path]) -> set[int]:
    """Of all rows in the transaction logs of these run folders."""
    return set().union(*(transaction_log.numbers(Path(path)) for path in paths))


def totals(metrics: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """The running sums of a pipeline among a row's or a summary's metrics: key without prefix and `_total` -> value."""
    found = {
        key[len(prefix) :].removesuffix("_total"): value
        for key, value in metrics.items()
        if key.endswith("_total") and key.startswith(prefix)
    }
    return {key: value for key, value in found.items() if isinstance(value, int | float) and math.isfinite(value)}
