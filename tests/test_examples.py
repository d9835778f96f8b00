"""What can be checked of the examples for real systems without torch, which they need and this project doesn't."""

import ast
import copy
import logging
import re
import subprocess
import sys

import common

import pytest
from conftest import ROOT

EXAMPLES = [ROOT / "examples" / f"{name}.py" for name in ("ray_train", "rllib_ppo")]
each_example = pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
MARK = "  # W&B"


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
    diff = re.search(r"```diff\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1].splitlines()
    source = (ROOT / "examples" / "first_steps.py").read_text().split('"""\n\n')[1].split("\n\n\nif __name__")[0]
    shown = [("+" if line.endswith(MARK) else " ") + line.removesuffix(MARK) for line in source.splitlines()]
    assert [line.strip(" ") for line in diff] == [line.strip(" ") for line in shown]
