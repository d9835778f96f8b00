"""What runs have left in a folder: which folders are a run's, and what their transaction logs hold. Files for a run:
what is below a folder, copies, pieces.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
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


def files_below(folder: Path, above: Sequence[Path] = ()) -> Iterator[Path]:
    """Files and broken links. Follows links, as W&B's `Artifact.add_dir` does, but to no folder that the link is in."""
    above = [*above, folder.resolve()]
    for path in folder.iterdir():
        if path.is_dir():
            yield from files_below(path, above) if path.resolve() not in above else ()
        elif path.is_file() or (path.is_symlink() and not path.exists()):
            yield path


def copy(source: str | Path, to: Path) -> None:
    """Makes a file that stays as it is, whatever becomes of its source, even if that is rewritten in place.

    It takes no room where the file system can let files share blocks until one of them changes.
    """
    with open(source, "rb") as file, open(to, "wb") as made:
        with contextlib.suppress(AttributeError, OSError):  # not on this system, not between these two
            while os.copy_file_range(file.fileno(), made.fileno(), 1 << 30):
                pass
        shutil.copyfileobj(file, made, 1 << 20)  # the rest, if there is one


def pieces(content: bytes | str | Path, size: int) -> Iterator[tuple[int, bytes]]:
    """Offset and bytes of each piece of a file, `size` bytes at most; at least one."""
    total, offset = len(content) if isinstance(content, bytes) else Path(content).stat().st_size, 0
    with contextlib.nullcontext() if isinstance(content, bytes) else open(content, "rb") as file:
        while offset == 0 or offset < total:
            yield offset, content[offset : offset + size] if file is None else file.read(size)
            offset += size
