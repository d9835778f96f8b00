"""What holds for the code as a whole."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import ray
from conftest import ROOT

CODE = [path for path in sorted(ROOT.rglob("*.py")) if not {".venv", "wandb"} & set(path.relative_to(ROOT).parts)]
ROOMS = sorted((ROOT / "backbone").glob("*.py"))


def for_type_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All of a file that runs."""
    yield tree
    for child in ast.iter_child_nodes(tree):
        if not for_type_checkers(child):
            yield from nodes(child)


def imports(path: Path) -> set[str]:
    """Names of the modules that a file imports anywhere, those of its own folder with a dot before them."""
    found = set()
    for node in nodes(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found |= {"." * node.level + name for name in names}
    return found


def test_the_code_names_nothing_of_the_machine_it_was_written_on():
    assert len(CODE) > 30
    for path in CODE:
        assert path == Path(__file__) or not re.search(r"/(work|root|home)/", path.read_text()), path


def test_the_rooms_import_each_other_without_circles():
    """Also where a function imports."""
    graph = {f".{path.stem}": {name for name in imports(path) if name.startswith(".")} for path in ROOMS}
    assert len(graph) > 10
    TopologicalSorter(graph).prepare()  # raises for a circle


def test_no_room_knows_who_uses_it():
    users = {path.stem for path in ROOT.glob("*.py")}
    assert "common" in users
    for path in ROOMS:
        assert not imports(path) & users, path


def test_the_way_of_a_report_is_the_functions_that_the_backbone_says_and_no_file_is_left_out():
    told = ROOMS[0].read_text()
    found = re.findall(r"^(`[^:\n]*`) +([\w., ]+\.py):", told, re.MULTILINE)
    assert len(found) > 10
    for names, files in found:
        paths = [folder / file for file in files.split(", ") for folder in (ROOT, ROOT / "backbone")]
        source = "\n".join(path.read_text() for path in paths if path.exists())
        for name in re.findall(r"`(?:(\w+)\.)?(\w+)`", names):
            assert re.search(
                rf"class {name[0]}\b[\s\S]*?\n    def {name[1]}\(" if name[0] else rf"\ndef {name[1]}\(", source
            ), name
    assert {path.name for path in ROOMS[1:]} <= {*re.findall(r"\w+\.py", told)}


def test_what_is_not_public_of_wandb_has_rooms_of_its_own():
    for path in ROOMS:
        inside = [name for name in imports(path) if re.match(r"wandb\.(sdk|proto|util|apis|errors\.)", name)]
        assert not inside or path.name in ("wandb_internals.py", "transaction_log.py", "media.py"), path


def test_what_is_not_public_of_ray_has_a_room_of_its_own():
    for path in [*ROOMS, ROOT / "common.py", ROOT / "session.py"]:
        inside = re.search(r"ray\._private|internal_kv|core_worker|_actor_id\b", path.read_text())
        assert bool(inside) == (path.name == "ray_internals.py"), path


def functions(tree: ast.AST, kind: type | tuple[type, ...]) -> dict[str, int]:
    return {node.name: node.end_lineno - node.lineno + 1 for node in ast.walk(tree) if isinstance(node, kind)}


def test_a_file_is_one_idea_and_a_function_one_screen():
    for path in [*ROOMS, ROOT / "common.py", ROOT / "session.py"]:
        tree = ast.parse(path.read_text())
        assert path not in ROOMS or len(path.read_text().splitlines()) <= 220, path
        assert max(functions(tree, ast.ClassDef).values(), default=0) <= 150, path
        assert max(functions(tree, (ast.FunctionDef, ast.AsyncFunctionDef)).values(), default=0) <= 40, path


def calls(path: Path) -> set[str]:
    """Functions of modules that a file calls, as `module.function`."""
    found = (node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
    return {ast.unparse(function) for function in found}


def functions_that_call(path: Path, name: str) -> list[str]:
    """The source of each function that calls `name` itself."""
    tree = ast.parse(path.read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return [ast.unparse(each) for each in functions if name in map(ast.unparse, called(each))]


def called(tree: ast.AST) -> Iterator[ast.AST]:
    return (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))


def test_nothing_waits_inside_ray_and_no_process_is_signalled():
    """A thread that waits in `ray.get` crashes a process that ends, and Windows has no signals.

    What relays have brought the pipeline actor takes without waiting.
    """
    for path in [*ROOMS, ROOT / "common.py"]:
        waits = {"ray.get", "ray.wait"} if path.name != "relay.py" else set()
        assert not calls(path) & {"os.kill", *waits}, path
    relay = ROOT / "backbone" / "relay.py"
    [taking], [asking] = functions_that_call(relay, "ray.get"), functions_that_call(relay, "ray.wait")
    assert "in self._answered(" in taking.partition("ray.get")[0]
    assert asking.startswith("def _answered(") and "timeout=0" in asking


def test_nothing_starts_or_joins_a_ray_by_asking_for_it():
    """`ray.get_runtime_context()` and its like do, where Ray has left the process or was never in it.

    Who is killed is there. For asking for an actor by its name see the next test.
    """
    assert {"get_runtime_context", "get_actor"} <= ray.AUTO_INIT_APIS
    for path in [*ROOMS, ROOT / "common.py"]:
        there = {"actor.py": {"get_actor"}, "relay.py": {"get", "wait"}}.get(path.name, set())
        assert not calls(path) & {f"ray.{name}" for name in ray.AUTO_INIT_APIS - {"kill"} - there}, path


JOINS = """
from pathlib import Path
from backbone import actor
from backbone.files import Address
import ray
try:
    actor.call(Address("n", "nonce", Path("nowhere"), "", "", ""), "progress", "")
except actor.ActorGoneError:
    pass
assert not ray.is_initialized()
"""


def test_a_process_without_ray_that_asks_for_an_answer_joins_no_ray_that_is_around(foreign):
    subprocess.run([sys.executable, "-c", JOINS], cwd=ROOT, env=os.environ | {"RAY_ADDRESS": foreign}, check=True)


# What a run is finished by when all of Ray is gone, and what a process without Ray logs by.
WITHOUT_RAY = [
    "records",
    "page",
    "outbox",
    "reading",
    "tail",
    "inbox",
    "steps",
    "reduction",
    "pipeline",
    "state",
    "run",
    "takeover",
]
WITHOUT_RAY += ["writer", "starting", "artifacts", "recover", "exits", "values", "media", "files"]
WITHOUT_RAY += ["ledger", "transaction_log", "wandb_internals"]


def without(modules: str, program: str) -> None:
    """Does the program in a process in which these modules can't be imported."""
    hide = f"import sys; sys.modules.update(dict.fromkeys({modules.split()}))"
    subprocess.run([sys.executable, "-c", f"{hide}\n{program}"], cwd=ROOT, check=True)


def test_what_finishes_a_run_and_what_takes_reports_does_without_ray():
    """So that whoever finds the state of a dead actor can go on from it."""
    rooms = {path.stem for path in ROOMS}
    assert {*WITHOUT_RAY} < rooms
    for name in {*WITHOUT_RAY} - {"files"}:  # which imports it where it is needed
        assert not {each for each in imports(ROOT / "backbone" / f"{name}.py") if each.partition(".")[0] == "ray"}, name
    without("ray", f"from backbone import {', '.join(WITHOUT_RAY)}")
    assert "ray" in imports(ROOT / "backbone" / "actor.py")  # so that this can fail


def test_the_code_can_be_imported_where_there_are_no_posix_locks_and_no_forks():
    """On Windows. What others need is there before it is taken away."""
    windows = "import os, ray, wandb\nsys.modules['fcntl'] = None\ndel os.register_at_fork, os.getuid\n"
    without("", f"{windows}import common\nfrom backbone import {', '.join(path.stem for path in ROOMS[1:])}")


def test_a_process_that_logs_does_not_wait_for_wandb_to_be_imported():
    """That takes a second."""
    without("wandb", "from backbone import process, outbox, values")
