"""What holds for the code as a whole."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import ray
from conftest import ROOT

CODE = [path for path in sorted(ROOT.rglob("*.py")) if not {".venv", "wandb"} & set(path.relative_to(ROOT).parts)]
ROOMS = sorted((ROOT / "backbone").glob("*.py"))


def imports(path: Path) -> set[str]:
    """Names of the modules that a file imports anywhere, those of its own folder with a dot before them."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
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


def test_the_rooms_import_each_other_one_way():
    graph = {f".{path.stem}": {name for name in imports(path) if name.startswith(".")} for path in ROOMS}
    assert len(graph) > 10
    TopologicalSorter(graph).prepare()  # raises for a circle


def test_no_room_knows_who_uses_it():
    users = {path.stem for path in ROOT.glob("*.py")}
    assert "common" in users
    for path in ROOMS:
        assert not imports(path) & users, path


def test_what_is_not_public_of_wandb_has_rooms_of_its_own():
    for path in ROOMS:
        inside = [name for name in imports(path) if re.match(r"wandb\.(sdk|proto|util|apis|errors\.)", name)]
        assert not inside or path.name in ("wandb_internals.py", "transaction_log.py", "media.py"), path


def functions(tree: ast.AST, kind: type | tuple[type, ...]) -> dict[str, int]:
    return {node.name: node.end_lineno - node.lineno + 1 for node in ast.walk(tree) if isinstance(node, kind)}


def test_a_file_is_one_idea_and_a_function_one_screen():
    for path in [*ROOMS, ROOT / "common.py"]:
        tree = ast.parse(path.read_text())
        assert path.name == "common.py" or len(path.read_text().splitlines()) <= 230, path
        assert max(functions(tree, ast.ClassDef).values(), default=0) <= 180, path
        assert max(functions(tree, (ast.FunctionDef, ast.AsyncFunctionDef)).values(), default=0) <= 50, path


def calls(path: Path) -> set[str]:
    """Functions of modules that a file calls, as `module.function`."""
    found = (node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
    return {ast.unparse(function) for function in found}


def test_nothing_waits_inside_ray_and_no_process_is_killed():
    """A thread that waits in `ray.get` crashes a process that ends, and Windows has no signals."""
    for path in [*ROOMS, ROOT / "common.py"]:
        assert not calls(path) & {"ray.get", "ray.wait", "os.kill"}, path


def test_nothing_starts_a_ray_by_asking_for_it():
    """`ray.get_runtime_context()` and its like do, where Ray has left the process; who is killed is there."""
    for path in [*ROOMS, ROOT / "common.py"]:
        assert not calls(path) & {f"ray.{name}" for name in ray.AUTO_INIT_APIS - {"kill"}}, path


def test_a_run_is_finished_without_its_actor_by_a_process_without_ray():
    program = "import sys, backbone.ending; sys.exit('ray' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_the_store_and_the_writer_know_nothing_of_ray():
    """So that whoever finds the store of a dead actor can go on from it."""
    ray_s = {path.stem for path in ROOMS if "ray" in imports(path)}
    assert "actor" in ray_s
    assert not ray_s & {"store", "inbox", "steps", "reduction", "values", "pipeline", "writer", "artifacts"}
