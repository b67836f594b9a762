"""The rooms of the tools stand on the map, and each imports only rooms below it, as `bat_audio_tools` says.

What is counted are imports of one room by another; the package's own file, which starts the program, is no room.
"""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

import bat_audio_tools

TOOLS = ROOT / "tools"
MAP = re.findall(r"^    ([a-z_.]+)  +\S", bat_audio_tools.__doc__, re.MULTILINE)
ROOT_FILES = sorted(file.stem for file in ROOT.glob("*.py"))
MOST_FLOORS = 8


def imported(file: Path) -> set[str]:
    """The modules that a file imports, inside functions too; `from package import name` counts as package.name."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add("." * node.level + (node.module or ""))
            names.update(f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)
    return names


def rooms() -> dict[str, set[str]]:
    """Of each room by its name on the map, the rooms that it imports."""
    files = {".".join(file.relative_to(TOOLS).with_suffix("").parts): file for file in TOOLS.rglob("*.py")}
    files = {name: file for name, file in files.items() if not name.endswith("__init__")}
    return {
        name: {module.removeprefix("bat_audio_tools.") for module in imported(file)} & files.keys()
        for name, file in files.items()
    }


ROOMS = rooms()


def floors() -> dict[str, int]:
    """The floor of each room, 1 for those that import no other."""
    numbers = {}
    for name in TopologicalSorter(ROOMS).static_order():  # raises CycleError for a circle
        numbers[name] = 1 + max((numbers[below] for below in ROOMS[name]), default=0)
    return numbers


def test_every_room_stands_on_the_map_once():
    assert sorted(MAP) == sorted(ROOMS)


@pytest.mark.parametrize("name", ROOMS)
def test_a_room_imports_only_rooms_below_it(name):
    assert [below for below in ROOMS[name] if MAP.index(below) <= MAP.index(name)] == []


def test_the_house_has_few_floors():
    numbers = floors()
    assert max(numbers.values()) <= MOST_FLOORS
    assert [numbers[name] for name in MAP] == sorted(numbers.values(), reverse=True)  # so the map goes down


@pytest.mark.parametrize("name", ROOT_FILES)
def test_the_package_imports_no_room(name):
    names = imported(ROOT / f"{name}.py")
    assert [module for module in names if re.match(r"\.*(bat_audio_tools|tools)\b", module)] == []


def test_rooms_import_each_other_by_their_full_names():
    """So that the tests above see every import."""
    relative = [(name, module) for name in ROOMS for module in imported(TOOLS / f"{name.replace('.', '/')}.py")
                if module.startswith(".")]  # fmt: skip
    assert relative == []


def test_nothing_outside_a_folder_hides_a_room():
    """The folders' own files hold no code, only what the folder is for."""
    for file in TOOLS.rglob("*/__init__.py"):
        assert [type(node).__name__ for node in ast.parse(file.read_text()).body] == ["Expr"]
