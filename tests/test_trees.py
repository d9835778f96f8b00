"""The README's trees are what the demos log."""

import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, logs

pytestmark = pytest.mark.xdist_group("trees")  # in one process, for they share what takes long

README = (ROOT / "README.md").read_text()


@functools.cache
def print_tree(*directories: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, ROOT / "trees.py", *directories], capture_output=True, text=True)


@pytest.fixture
def made(ran):
    """made("demo3", "--one-run"): the folder of a demo's runs; the same runs as in test_demos."""

    def made(demo: str, *flags: str) -> Path:
        return ran(demo, *flags)[1]

    return made


@pytest.mark.parametrize(
    "command", [("demo1",), ("demo2",), ("demo3",), ("demo3", "--one-run"), ("demo4",)], ids=" ".join
)
def test_the_readme_has_the_tree_of_each_demos_runs(made, command):
    demo, *flags = command
    name = " ".join([f"**Demo {demo[-1]}", *(f"`{flag}`" for flag in flags)])
    block = re.search(rf"^{re.escape(name)}: .*?```text\n(.*?)```\n", README, re.DOTALL | re.MULTILINE)
    assert block, f"README.md has no ```text block behind {name}"
    printed = print_tree(made(*command)).stdout
    assert block[1] == re.sub(r"\bexp\b", "7", printed), f"paste this into README.md:\n{printed}"
    lines = block[1].splitlines()
    assert len(lines) <= 6
    assert max(map(len, lines)) <= 100


def named(printed: str) -> dict[str, set[str]]:
    """The keys that a tree names, by run."""
    runs = {}
    for line in printed.splitlines():
        _, branch, text = line.rpartition("── ")
        if branch and not text.startswith(("artifact ", "config ")):
            if " (job type " in text:
                name, text = text.partition(" (")[0], text.partition("): ")[2]
                runs[name] = set()
            runs[name] |= {*text.split(", ")} - {"", "…"}
    return runs


@pytest.mark.parametrize("command", [("demo1",), ("demo3", "--one-run"), ("demo4",)], ids=" ".join)
def test_a_tree_names_keys_with_and_without_a_section_and_none_that_is_not_logged(made, command):
    found, shown = logs(made(*command)), named(print_tree(made(*command)).stdout)
    assert shown.keys() == found.keys()
    for name, log in found.items():
        keys = {key.partition(".")[0] for key in log.keys}  # a table is one key
        in_sections = {key for key in keys if "/" in key.removeprefix("training/").removeprefix("inference/")}
        assert shown[name] <= keys
        assert len(shown[name] & in_sections) >= 2
        assert shown[name] - in_sections
        assert not {key for key in shown[name] if key.endswith(("step", "workers"))} - {"checkpoint_step"}


def test_a_tree_says_what_ties_runs_together(made):
    of_config = print_tree(made("demo2")).stdout
    assert "── config training_project: rl-agent, training_run: demo2-training-exp\n" in of_config
    printed = print_tree(made("demo4")).stdout
    assert printed.startswith("rl-agent-extended (group exp, tags demo4 seed-42 experiment-exp, axis step)\n")
    assert "── evaluation-exp (job type evaluation): checkpoint_step, " in printed
    assert (
        "── artifact checkpoint: best latest step-0 step-10 (training-exp → inference-exp, evaluation-exp)\n" in printed
    )
    assert "── artifact trajectories: latest step-0 step-10 (inference-exp)\n" in printed


def test_what_not_all_runs_of_a_project_are_stands_at_the_run(made):
    assert (
        "── exp (job type training, axes training/step inference/step)\n"
        in print_tree(made("demo3", "--one-run")).stdout
    )
    assert "── inference-exp (job type inference, axis inference/step)\n" in print_tree(made("demo3")).stdout


@pytest.mark.slow
def test_a_run_with_two_folders_is_there_once(made):
    folder = made("demo1")
    assert print_tree(folder, folder).stdout == print_tree(folder / "wandb").stdout


def test_where_no_runs_are_it_says_how_it_is_used(tmp_path):
    done = print_tree(tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert "python trees.py runs" in done.stderr
