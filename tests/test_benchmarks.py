"""The benchmark runs, and logs what it says it logs."""

import json
import subprocess
import sys

from conftest import ROOT


def test_every_way_is_measured_and_wandb_run_loses_no_report(environment):
    command = [sys.executable, str(ROOT / "benchmarks" / "logging_cost.py"), "--json", "--workers", "2"]
    command += ["--reports", "20", "--paced", "5", "--rounds", "1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    ways = json.loads(done.stdout)["ways"]
    assert {*ways} == {
        *("blocking", "unbounded", "own run", "driver", "queue", "WandbRun rows", "WandbRun reduced", "ceiling"),
    }
    assert {ways[name]["lost"] for name in ways} == {0}
