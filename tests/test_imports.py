"""Imports point one way, also those inside functions, and private names stay in their file."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "polygrad_fast"
# A room of the package (a folder, or a file beside them) imports from those it can reach here.
ARROWS = {
    "__main__": "cli runs",
    "cli": "agent baselines cli_data cli_offline cli_reproduce cli_seeds",
    "cli_data": "recipes",
    "cli_offline": "offline",
    "cli_reproduce": "reproduce",
    "cli_seeds": "evaluation runs",
    "reproduce": "recipes offline baselines",
    "baselines": "evaluation runs",
    "compat": "agent",
    "recipes": "agent",
    "agent": "training",
    "offline": "world_models learners evaluation",
    "training": "diagnostics world_models learners data evaluation runs",
    "diagnostics": "world_models learners data",
    "world_models": "sampling data",  # data for the windows it learns from
    "sampling": "reference kernels",
    "reference": "diffusion denoisers protocols",
    "kernels": "diffusion denoisers",
    "learners": "protocols kernels",
    "protocols": "config policy normalizer",
    "diffusion": "denoisers",
    "denoisers": "config policy normalizer",
    "evaluation": "data runs",
    "data": "runs",
    "config": "",
    "policy": "",
    "normalizer": "",
    "runs": "",
}
# What any room imports from, with all that these import from themselves.
FOUNDATION = {
    "errors": "",
    "_version": "",
    "structure": "",
    "initialization": "",
    "terminals": "",
    "threads": "",
    "arguments": "errors",
    "ranks": "errors",
    "transitions": "arguments errors",
    "trajectory_normalizer": "errors",
    "profiling": "arguments errors runs",
}
RUNS = "arguments errors _version"  # not profiling, which writes its traces by `runs.files`
# File and what it should not import or use.
KNOWN: set[tuple[str, str]] = set()


def source_files() -> dict[str, Path]:
    """Return module name -> file of the package, kernels included."""
    files = {}
    for folder, prefix in ((ROOT / PACKAGE, PACKAGE), (ROOT / "kernels", f"{PACKAGE}.kernels")):
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            files[".".join((prefix, *parts)).removesuffix(".__init__")] = path
    return files


def benchmark_files() -> list[Path]:
    return sorted((ROOT / "benchmarks").rglob("*.py"))


def imported(source: str, modules: set[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield (module, names taken from it) of every import of the package in a file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == PACKAGE:
                    yield alias.name, []
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: wanted an absolute import"
            if node.module.split(".")[0] == PACKAGE:
                for alias in node.names:
                    whole = f"{node.module}.{alias.name}"
                    yield (whole, []) if whole in modules else (node.module, [alias.name])


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else PACKAGE


def reachable(room: str) -> set[str]:
    """Return the rooms that one may import from, itself included."""
    if room in FOUNDATION or room == "runs":
        return {room, *FOUNDATION.get(room, RUNS).split()}
    found, waiting = {room}, [room]
    while waiting:
        for other in ARROWS[waiting.pop()].split():
            if other not in found:
                found.add(other)
                waiting.append(other)
    return found | set(FOUNDATION)


def wrong_imports(module: str, source: str, modules: set[str]) -> list[str]:
    """Return what a module of the package imports from rooms that it should not."""
    targets = [target for target, _ in imported(source, modules)]
    return [target for target in targets if room_of(target) not in reachable(room_of(module))]


def defined(tree: ast.AST) -> set[str]:
    """Return the names that a file defines: functions, classes, variables, attributes of self."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and is_own(node) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
    return names


def is_own(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_uses(source: str, elsewhere: set[str]) -> set[str]:
    """Return the private names of other files that a file imports, or uses of an object.

    Args:
        elsewhere: names that the other files define; others are not ours, as torch's.
    """
    tree = ast.parse(source)
    own = defined(tree)
    used = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.name in elsewhere
    }
    used |= {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in elsewhere - own and not is_own(node)
    }
    return {name for name in used if is_private(name)}


MODULES = source_files()


def test_every_room_has_its_place():
    rooms = {room_of(module) for module in MODULES} - {PACKAGE}
    assert rooms == {*ARROWS, *FOUNDATION}
    graph = {room: reachable(room) - {room} for room in rooms}
    graphlib.TopologicalSorter(graph).prepare()  # raises where there is a circle


def test_imports_point_one_way():
    found = {
        (str(path.relative_to(ROOT)), target)
        for module, path in MODULES.items()
        if module != PACKAGE  # its public names, imported when they are first used
        for target in wrong_imports(module, path.read_text(), set(MODULES))
    }
    assert found - KNOWN == set()


def test_no_module_imports_itself_by_way_of_others():
    graph = {
        module: {target for target, _ in imported(path.read_text(), set(MODULES))} - {module}
        for module, path in MODULES.items()
        if module != PACKAGE
    }
    graphlib.TopologicalSorter(graph).prepare()  # raises where there is a circle


def test_the_package_knows_nothing_of_tests_and_benchmarks():
    own = {path.stem for path in (*benchmark_files(), *ROOT.glob("tests/*.py"))}
    own |= {"harness", "benchmarks", "tests"}
    for path in MODULES.values():
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not {name.split(".")[0] for name in names} & own, path


def test_private_names_stay_in_their_file():
    files = [*MODULES.values(), *benchmark_files()]
    names = {path: defined(ast.parse(path.read_text())) for path in files}
    found = set()
    for path in files:
        elsewhere = set().union(*(names[other] for other in files if other != path))
        for name in private_uses(path.read_text(), elsewhere - set(vars(nn.Module()))):
            found.add((str(path.relative_to(ROOT)), name))
    assert found - KNOWN == set()


def test_nothing_known_is_mended_already():
    """An entry of KNOWN goes when its cause does."""
    for file, what in KNOWN:
        assert what in (ROOT / file).read_text(), f"{file} no longer mentions {what}"


@pytest.mark.parametrize(
    ("module", "source", "wrong"),
    [
        ("evaluation.video", "from polygrad_fast.agent import PolyGRAD", ["polygrad_fast.agent"]),
        (
            "sampling.sampler",
            "def f():\n    from polygrad_fast.world_models import base",
            ["polygrad_fast.world_models.base"],
        ),
        ("config.train", "if TYPE_CHECKING:\n    import polygrad_fast.cli", ["polygrad_fast.cli"]),
        ("denoisers.build", "from polygrad_fast.diffusion.ddpm import TABLES", None),
        ("reference.guided_step", "import polygrad_fast.kernels.guided_step", None),
        ("data.replay", "from polygrad_fast.config import TrainConfig", ["polygrad_fast.config"]),
        ("runs.files", "from polygrad_fast import profiling", ["polygrad_fast.profiling"]),
        ("policy", "from polygrad_fast import Normalizer", ["polygrad_fast"]),
        ("cli", "import polygrad_fast as pg", ["polygrad_fast"]),
        ("cli", "from polygrad_fast import profiling\nfrom polygrad_fast.agent import A", []),
        ("training.memory", "from polygrad_fast.sampling.linear import LinearOps", []),
        ("evaluation.plots", "def f():\n    from polygrad_fast.runs import files", []),
    ],
)
def test_what_counts_as_a_wrong_import(module, source, wrong):
    found = wrong_imports(f"{PACKAGE}.{module}", source, set(MODULES))
    if wrong is None:
        assert len(found) == 1
    else:
        assert found == wrong


@pytest.mark.parametrize(
    ("source", "used"),
    [
        ("from polygrad_fast.a import _f", {"_f"}),
        ("def g(engine):\n    return engine._steps", {"_steps"}),
        ("import a\na._f()", {"_f"}),
        ("class A:\n    def f(self):\n        return self._steps", set()),
        ("class A:\n    def f(self, o):\n        self._steps = 1\n        return o._steps", set()),
        ("import os\nos._exit(1)", set()),
        ("from polygrad_fast.a import public", set()),
    ],
)
def test_what_counts_as_private(source, used):
    assert private_uses(source, {"_f", "_steps", "public"}) == used
