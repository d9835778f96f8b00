"""The benchmarks run, and log what they say they log."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT


def measured(environment: dict[str, str], program: str, *arguments: str) -> dict:
    command = [sys.executable, str(ROOT / "benchmarks" / program), "--json", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_every_way_is_measured_and_loses_no_report(environment):
    load = ["--workers", "2", "--reports", "20", "--paced", "5", "--rounds", "1"]
    result = measured(environment, "logging_cost.py", *load)
    assert list(result["ways"]) == [
        *("blocking", "unbounded", "own run", "driver", "queue", "WandbRun rows", "WandbRun reduced", "ceiling"),
    ]
    assert {row["lost"] for row in result["ways"].values()} == {0}
    assert result["ways"]["blocking"]["x blocking"] == 1
    assert len(result["targets"]) == 6


@pytest.mark.slow
def test_what_one_pipeline_carries_is_measured_and_none_of_it_lost(environment):
    load = ["--million", "1000", "--reports", "64", "--workers", "8", "--steps", "2", "--processes", "1"]
    result = measured(environment, "one_pipeline.py", "--only", "million", "thousand", *load)
    rows = [row for part in ("million", "thousand") for row in result[part].values()]
    assert len(rows) == 1 + 3
    assert {row["lost"] for row in rows} == {0}
    steps = [100, 2, 2, 2]
    assert [row["rows"] for row in rows] == [1 + each for each in steps], "all workers of a step are in its row"
    assert len(result["targets"]) == 5
