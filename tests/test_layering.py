"""Who imports whom: the core knows no host and nothing heavy, and its modules form no cycle; what belongs to one
program knows the core alone.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
import structure

ROOT = Path(__file__).resolve().parent.parent
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "nfq_core").rglob("*.py"))
}

PROGRAMS = [path for folder in ("nodes", "nfq_webui") for path in sorted((ROOT / folder).rglob("*.py"))]

HOST = {"comfy", "comfy_api", "comfy_extras", "execution", "folder_paths", "nodes", "server"}
HOST |= {"backend", "gradio", "launch", "modules", "nfq_webui", "scripts"}
LIGHT = {"numpy", "safetensors", "torch", "tqdm", "zstandard"}
"""What a plain `pip install` brings."""

ON_CHOICE = {module: {"diffusers"} for module in MODULES if module.startswith("nfq_core.diffusers")}
ON_CHOICE |= {"nfq_core.diffusers.lora": {"peft"}, "nfq_core.packed.triton_decode": {"triton"}}
ON_CHOICE |= {f"nfq_core.diffusers.{module}": {"transformers"} for module in ("text_model", "text_quantizer")}
"""What modules need that are imported only after they were chosen."""

EXTRAS = {"PIL", "accelerate", "diffusers", "huggingface_hub", "matplotlib", "numba", "peft", "transformers"}
"""What only some features need: imported where such a feature starts."""


def imports(nodes: Iterator[ast.AST] | list[ast.stmt], package: list[str]) -> Iterator[str]:
    """Full dotted names that import statements bind, for `from a import b` both `a` and `a.b`."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            parts = [*base, *([node.module] if node.module else [])]
            # Where nothing is around the folder, `from .. import b` names `b` alone.
            if parts:
                yield ".".join(parts)
            yield from (".".join([*parts, alias.name]) for alias in node.names)


def package_of(path: Path) -> list[str]:
    return list(path.relative_to(ROOT).parent.parts)


def all_imports(module: str) -> set[str]:
    path = MODULES[module]
    return set(imports(ast.walk(ast.parse(path.read_text("utf-8"))), package_of(path)))


def relative_imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text("utf-8"))
    nodes = (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level)
    return set(imports(nodes, package_of(path)))


def imports_at_import(module: str) -> set[str]:
    """What importing the module imports: statements outside functions and `if TYPE_CHECKING`."""

    def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
        for statement in body:
            if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if isinstance(statement, ast.If) and ast.unparse(statement.test).endswith("TYPE_CHECKING"):
                continue
            yield statement
            for field in ("body", "orelse", "finalbody"):
                yield from statements(getattr(statement, field, []))
            for handler in getattr(statement, "handlers", []):
                yield from statements(handler.body)

    path = MODULES[module]
    return set(imports(statements(ast.parse(path.read_text("utf-8")).body), package_of(path)))


def top_names(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def test_the_modules_are_found():
    assert {"nfq_core", "nfq_core.packed.formats", "nfq_core.cli"} <= MODULES.keys()
    assert "nfq_core.errors" in all_imports("nfq_core.packed.formats")
    assert "torch" in imports_at_import("nfq_core.packed.layout")
    assert {ROOT / "nodes" / "host.py", ROOT / "nfq_webui" / "page.py"} <= set(PROGRAMS)


@pytest.mark.parametrize(
    ("statement", "wanted"),
    [
        ("from .host import a", {"nodes.host", "nodes.host.a"}),
        ("from . import host", {"nodes", "nodes.host"}),
        ("from ..nfq_webui.page import a", {"nfq_webui.page", "nfq_webui.page.a"}),
        ("from .. import nfq_webui", {"nfq_webui"}),
        ("import nodes.host as a, torch", {"nodes.host", "torch"}),
    ],
)
def test_names_are_full_ones(statement, wanted):
    """In a module of `nodes`."""
    assert set(imports(ast.parse(statement).body, ["nodes"])) == wanted


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_belongs_to_one_program_imports_the_core_alone(path):
    """Relatively, as it has to: `test_plugin` and `test_webui` see to absolute imports."""
    assert top_names(relative_imports(path)) <= {path.relative_to(ROOT).parts[0], "nfq_core"}


@pytest.mark.parametrize("module", MODULES)
def test_no_module_imports_the_host(module):
    assert not top_names(all_imports(module)) & HOST


@pytest.mark.parametrize("module", MODULES)
def test_importing_a_module_needs_only_the_light_dependencies(module):
    needed = LIGHT | ON_CHOICE.get(module, set())
    assert top_names(imports_at_import(module)) <= {*sys.stdlib_module_names, "nfq_core"} | needed
    assert top_names(all_imports(module)) <= {*sys.stdlib_module_names, "nfq_core"} | needed | EXTRAS


FLOORS = (
    {"cli"},
    {"demo"},
    {"report", "diffusers"},
    {"checkpoints"},
    {"calibration"},
    {"planning"},
    {"files", "fitting", "layers"},
    {"packed"},
    {"models"},
    {"decibels", "errors", "parallel", "sizes", "version"},
)
"""The rooms of the core from top to bottom: each imports only from floors below its own."""

FACE = {"__init__", "__main__"}
"""The public names, and `python -m nfq_core`: they may import from any floor."""


def test_rooms_import_only_from_the_floors_below():
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    house = structure.read(ROOT / "nfq_core")
    assert house.rooms == floor.keys() | FACE
    upward = [edge for edge in house.arrows if edge[0] not in FACE and floor[edge[0]] >= floor[edge[1]]]
    assert not upward


def test_no_circle_of_modules():
    """Imports inside functions and for type checkers count too."""
    graph = {module: set(found) for module, found in structure.read(ROOT / "nfq_core").imports.items()}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" → ".join(reversed(error.args[1])))


def test_every_package_says_what_it_is_for():
    for package in (ROOT / "nfq_core").rglob("__init__.py"):
        assert ast.get_docstring(ast.parse(package.read_text("utf-8"))), package


def test_files_are_short():
    """About 350 lines are what a reader holds in the head."""
    long = {path.name: lines for path in MODULES.values() if (lines := len(path.read_text("utf-8").splitlines())) > 350}
    assert not long
