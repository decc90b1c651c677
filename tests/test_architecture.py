"""The rooms of famba import each other downwards, without circles."""

from __future__ import annotations

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "famba").rglob("*.py"))
}
# Each room imports from those below it; what stands in famba itself, such as errors.py, is below them all.
ROOMS = (("__main__",), ("cli",), ("export",), ("analysis",), ("training",), ("data", "models"), ("fusion",), ("ops",))
LEVELS = {room: len(ROOMS) - level for level, rooms in enumerate(ROOMS) for room in rooms}


def imports(module: str, tree: ast.AST) -> set[str]:
    """Modules of famba that a module imports; `from famba import ops` is of famba.ops."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
            # A package is imported for a name that it defines, not for a module in it.
            found |= {str(node.module)} if any(f"{node.module}.{a.name}" not in FILES for a in node.names) else set()
    return {name for name in found if name in FILES} - {module}


# famba itself looks its names up when they are asked for.
GRAPH = {module: imports(module, ast.parse(path.read_text())) for module, path in FILES.items() if module != "famba"}


def test_no_module_imports_itself_by_way_of_others() -> None:
    assert "famba.fusion.rules" in GRAPH["famba.fusion.schedules"]
    TopologicalSorter(GRAPH).prepare()  # raises CycleError, with the circle


@pytest.mark.parametrize("module", [module for module in FILES if module.count(".")])
def test_imports_run_downwards(module: str) -> None:
    room = module.split(".")[1]
    for other in GRAPH[module] - {"famba"}:
        below = other.split(".")[1]
        same = below == room or LEVELS.get(below, 0) == LEVELS.get(room, 0) == 0
        assert same or LEVELS.get(below, 0) < LEVELS.get(room, 0), f"{module} imports {other}"


def test_no_room_but_models_asks_for_the_class_of_a_network() -> None:
    """`Backbone` is what every network offers: a class to ask for where others may be given."""
    texts = {module: path.read_text() for module, path in FILES.items()}
    of_models = "".join(text for module, text in texts.items() if module.startswith("famba.models"))
    classes = "|".join(set(re.findall(r"^class (\w+)", of_models, re.MULTILINE)) - {"Backbone"})
    assert "VimMixer" in classes
    for module, text in texts.items():
        asked = re.findall(rf"isinstance\([^,()]*, [^)]*\b({classes})\b", text)
        assert module.startswith("famba.models") or not asked, f"{module} asks for {asked}"
