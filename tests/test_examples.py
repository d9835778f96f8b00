"""The examples for real systems: what can be checked without torch, and, slow because they need it, what they log."""

import ast
import copy
import logging
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import common
from backbone.steps import Steps

import pytest
from conftest import ROOT, Log, logs, short_folder

EXAMPLES = [ROOT / "examples" / f"{name}.py" for name in ("ray_train", "rllib_ppo")]
each_example = pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
MARK = "  # W&B"
README = ROOT / "README.md"


def imports(source: str) -> dict[str, set[str]]:
    """Module -> names that are taken from it."""
    found: dict[str, set[str]] = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name: set() for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.setdefault(node.module, set()).update(alias.name for alias in node.names)
    return found


@each_example
def test_an_example_is_short_and_takes_from_common_what_is_public_there(path):
    source = path.read_text()
    assert len(source.splitlines()) <= 60
    names = imports(source)["common"]
    assert names
    assert names <= set(common.__all__)


@each_example
def test_the_docstring_gives_one_command_that_brings_all_that_is_imported(path):
    source = path.read_text()
    (command,) = re.findall(r"^ {4}(uv run .*)$", ast.get_docstring(ast.parse(source)), re.MULTILINE)
    assert command.endswith(f" python -m examples.{path.stem}")
    brought = {re.split(r"\W", package)[0] for package in re.findall(r'--with "?([^" ]+)', command)}
    needed = {module.split(".")[0] for module in imports(source)} - sys.stdlib_module_names - {"common"}
    assert needed == brought


@each_example
def test_without_the_marked_lines_it_is_a_plain_example_and_they_are_under_ten(path):
    lines = path.read_text().splitlines()
    marked = [line for line in lines if MARK in line]
    assert 0 < len(marked) < 10
    plain = "\n".join(line for line in lines if line not in marked) + "\n"
    assert not re.search(r"wandb|common|\brun\b(?!_)|rollouts", plain.split('"""')[2], re.IGNORECASE)
    ruff = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F", "--output-format", "concise", "-"]
    checked = subprocess.run(ruff, input=plain, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout  # no name is missing and none is left over


def as_it_says(name: str, folder: Path) -> dict[str, Log]:
    """The runs of an example that is started by the command in its docstring, by name."""
    source = (ROOT / "examples" / f"{name}.py").read_text()
    [command] = re.findall(r"^ {4}(uv run .*)$", ast.get_docstring(ast.parse(source)), re.MULTILINE)
    _, *words = shlex.split(command)
    with short_folder() as short:
        where = os.environ | {"WANDB_DIR": str(folder), "RAY_TMPDIR": short}
        done = subprocess.run([os.environ.get("UV", "uv"), *words], cwd=ROOT, env=where, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = logs(folder)
    assert done.stdout.count(" 0 lost") == len(found)
    return found


@pytest.mark.slow
def test_ray_train_goes_on_from_its_checkpoint_and_each_attempt_has_its_rows(tmp_path):
    [log] = as_it_says("ray_train", tmp_path).values()
    steps = [row["step"] for row in log.rows]
    again = steps.index(59) + 1
    assert steps == [*range(60), *range(steps[again], 150)]
    assert steps[again] in (25, 50)  # the last checkpoint that Ray Train had
    assert {row["workers"] for row in log.rows} == {2}
    assert log.rows[-1]["accuracy"] > 0.9 > log.rows[0]["accuracy"]


@pytest.mark.slow
def test_rllibs_env_runners_log_to_one_run_and_its_learner_to_another(tmp_path):
    found = as_it_says("rllib_ppo", tmp_path)
    assert [row["step"] for row in found["ppo"].rows] == list(range(10))
    assert any(key.startswith("learners/default_policy/") for key in found["ppo"].keys)
    rewards = [row["reward/mean"] for row in found["rollouts"].rows]
    assert max(rewards[-3:]) > 2 * rewards[0]


@pytest.mark.slow
def test_a_copy_of_a_run_in_a_driver_makes_ray_say_nothing(ray_here, tmp_path, caplog):
    """As RLlib and Ray Train copy it with their configs."""
    ray_log = logging.getLogger("ray")
    with common.WandbRun("examples", mode="offline", dir=tmp_path) as run:
        level, _ = ray_log.level, ray_log.setLevel(logging.WARNING)
        ray_log.addHandler(caplog.handler)
        try:
            copy.deepcopy(run).log({"loss": 1.0}, 0)
        finally:
            ray_log.removeHandler(caplog.handler)
            ray_log.setLevel(level)
    assert not caplog.messages


def test_the_readme_shows_the_first_steps_as_a_diff():
    diff = re.search(r"```diff\n(.*?)```", README.read_text(), re.DOTALL)[1].splitlines()
    source = (ROOT / "examples" / "first_steps.py").read_text().split('"""\n\n')[1]
    shown = [("+" if line.endswith(MARK) else " ") + line.removesuffix(MARK) for line in source.splitlines()]
    assert [line.strip(" ") for line in diff] == [line.strip(" ") for line in shown]


def test_the_readmes_worked_example_of_four_workers_is_what_the_rule_does():
    """The times of its table, in seconds, and the rows that it has then."""
    steps, rows = Steps(4), []

    def look(now: int) -> None:
        steps.tick(now)
        rows.extend((now, step, len(being.workers)) for step, being in steps.over)
        steps.over.clear()

    def log(workers: str, step: int, now: int) -> None:
        for worker in workers:
            steps.log(worker, step, 0, False, now)
        look(now)

    log("ABCD", 7, 0)
    log("ABC", 8, 1)
    log("D", 8, 3)
    steps.end("D", 4, died=True)
    log("ABC", 9, 5)
    log("ABC", 10, 6)
    for now in range(7, 16):
        look(now)
    log("ABC", 11, 16)
    assert rows == [(3, 7, 4), (5, 8, 4), (14, 9, 3), (16, 10, 3)]
    table = re.findall(r"^\| 0:(\d\d) \|.*\| steps? (\d+)\D*, on (\d) workers", README.read_text(), re.MULTILINE)
    assert [tuple(map(int, row)) for row in table] == rows[:3]


def test_what_workers_that_are_too_few_or_too_many_do_is_what_the_readme_says():
    few, many = Steps(2), Steps(8)
    for worker in "ABCD":  # one after the other
        for step in range(3):
            few.log(worker, step, 0, True, 1.0)
    few.tick(2.0)
    assert len([step for step, _ in few.over if step == 0]) > 1
    for step in range(3):
        for worker in "ABCD":
            many.log(worker, step, 0, False, 1.0)
    many.tick(60.0)
    assert not many.over
    many.tick(61.0)
    assert [len(being.workers) for _, being in many.over] == [4] * 3
    assert ["pass workers=4" in told for _, told in (few.warnings[-1], many.warnings[-1])] == [True, True]
