"""The structure of a package, read off its imports: `python tests/helpers/structure.py` counts the core's.

A *room* is a sub-package, or a module beside them. A *floor* stands above all that it imports from. An *arrow*
says that one room imports from another.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import cached_property
from graphlib import TopologicalSorter
from pathlib import Path

NFQ_CORE = Path(__file__).resolve().parents[2] / "nfq_core"


@dataclass(frozen=True)
class Structure:
    """What imports what inside a package."""

    imports: dict[str, set[str]]
    """Modules of the package that each module imports, wherever the statement stands; names without the package's."""
    lines: dict[str, int]
    """Lines of each module."""

    @cached_property
    def rooms(self) -> set[str]:
        """All rooms by name."""
        return {room(module) for module in self.imports}

    @cached_property
    def between(self) -> list[tuple[str, str]]:
        """Every pair of modules of different rooms of which the first imports the second."""
        pairs = [(module, other) for module, found in self.imports.items() for other in found]
        return [(module, other) for module, other in pairs if room(module) != room(other)]

    @cached_property
    def arrows(self) -> set[tuple[str, str]]:
        """Pairs of rooms of which the first imports from the second."""
        return {(room(module), room(other)) for module, other in self.between}

    @cached_property
    def floors(self) -> int:
        """How many floors the rooms make."""
        graph = {name: {below for above, below in self.arrows if above == name} for name in self.rooms}
        height: dict[str, int] = {}
        for name in TopologicalSorter(graph).static_order():
            height[name] = 1 + max((height[below] for below in graph[name]), default=0)
        return max(height.values())


def room(module: str) -> str:
    """The room that a module of `Structure.imports` belongs to."""
    return module.split(".")[0]


def read(package: Path) -> Structure:
    """Read a package's modules; only relative imports are looked at, for the package uses no others of its own."""
    paths = {".".join(path.relative_to(package).with_suffix("").parts): path for path in package.rglob("*.py")}
    modules = {name.removesuffix(".__init__"): path for name, path in paths.items()}
    imports: dict[str, set[str]] = {}
    lines = {}
    for name, path in modules.items():
        text = path.read_text("utf-8")
        lines[name] = len(text.splitlines())
        folder = list(path.relative_to(package).parent.parts)
        imports[name] = set()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = [*folder[: len(folder) - node.level + 1], *(node.module.split(".") if node.module else [])]
                for alias in node.names:
                    longer = ".".join([*base, alias.name])
                    imports[name].add(longer if longer in modules else ".".join(base) or "__init__")
        imports[name].discard(name)
    return Structure(imports, lines)


def absolute_imports(path: Path) -> set[str]:
    """Top-level names of a module's absolute imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add((node.module or "").partition(".")[0])
    return names


if __name__ == "__main__":
    house = read(NFQ_CORE)
    print(f"{len(house.imports)} modules, {sum(house.lines.values()):,} lines, the longest {max(house.lines.values())}")
    print(f"{len(house.rooms)} rooms on {house.floors} floors, {len(house.arrows)} arrows between them, from ", end="")
    print(f"{len(house.between)} imports")
    for name in sorted(house.rooms):
        print(f"{name} → {' '.join(sorted(below for above, below in house.arrows if above == name))}")
