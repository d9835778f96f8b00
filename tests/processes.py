"""Processes of a demo or a run, to be killed, and what is on the disk afterwards."""

import re
from pathlib import Path

from conftest import Log, folders, read_rows
from ray._private import state, worker


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def below(ancestor: int, name: str) -> list[int]:
    """The processes started, however indirectly, by `ancestor` whose command line has `name` in it."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            pid = int(entry.name)
            if name not in entry.joinpath("cmdline").read_text():
                continue
            while pid not in (0, 1, ancestor):
                pid = parent(pid)
        except OSError:
            continue
        if pid == ancestor:
            found.append(int(entry.name))
    return sorted(found)


def everything(pid: int) -> list[int]:
    """A process and all below it."""
    return [pid, *[other for other in below(pid, "") if other != pid]]


def pipeline_process(made) -> int:
    """The process of a run's pipeline actor."""
    return state.actors(made._owned.actor._actor_id.hex())["Pid"]


def session() -> Path:
    """The folder of the Ray that this process is in."""
    return Path(worker._global_node.get_session_dir_path())


def steps_on_disk(directory: Path, name: str) -> int:
    """Rows so far, of a run that may be going on."""
    rows = 0
    for path in folders(directory):
        if name in path.name:
            rows += len(list(read_rows(path)))
    return rows


def ledger(stdout: str, name: str) -> dict[str, int]:
    line = next(line for line in stdout.splitlines() if line.startswith(f"{name}-x:"))
    counts = {what: int(n) for n, what in re.findall(r"(\d+) (\w+)", line.split(":")[1])}
    return {"reports": int(re.search(r"from (\d+) reports", line)[1])} | counts


def check_ledger(stdout: str, directory: Path) -> None:
    """Every report is in a row, says the ledger, and so says the disk."""
    for name in ("training", "inference"):
        each = (row for path in folders(directory) if name in path.name for row in Log(path).rows)
        rows = {row["_step"]: row for row in each}.values()  # what a dying wandb-core writes last may be there again
        counts = ledger(stdout, name)
        assert counts.get("lost", 0) == 0
        assert counts["reports"] == reports_in_rows(rows)
        assert counts["rows"] == len(rows)


def reports_in_rows(rows: list[dict]) -> int:
    """Where each worker reports a step in one call."""
    return sum(row["workers"] for row in rows)
