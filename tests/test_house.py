"""Imports point one way: down the list of rooms in CONTRIBUTING.md, and never in a circle."""

import ast
import graphlib
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = re.findall(
    r"^\| `(calr[a-z_/]*?)/?` \|", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.MULTILINE
)


def modules():
    """Every module by name, a package by that of its __init__."""
    files = [f for package in ("calr", "calr_kernels") for f in (ROOT / package).rglob("*.py")]
    named = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in files}
    return {name.removesuffix(".__init__"): file for name, file in named.items()}


def imports(file, known):
    """The project's modules that a file imports, wherever in it, but for type checkers alone."""
    found, tree = set(), ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in known else node.module for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & known.keys()


def room(module):
    """The place of a module's room in the list."""
    parts = module.split(".")
    return ROOMS.index("/".join(parts[:2]))


MODULES = modules()
ARROWS = {name: imports(file, MODULES) - {name} for name, file in MODULES.items()}


def test_every_room_is_on_the_map_and_nothing_else():
    assert {ROOMS[room(name)] for name in MODULES} == set(ROOMS)
    assert len(ROOMS) == len(set(ROOMS))


def test_rooms_import_only_from_rooms_below():
    up = [
        f"{name} imports {other}"
        for name, others in ARROWS.items()
        for other in others
        if room(other) < room(name)
    ]
    assert up == []


def test_no_two_modules_import_each_other():
    list(graphlib.TopologicalSorter(ARROWS).static_order())  # raises CycleError, naming them


def test_the_kernels_know_nothing_of_the_compressor():
    kernels = [name for name in MODULES if name.split(".")[0] == "calr_kernels"]
    assert not [n for n in kernels if any(o.split(".")[0] == "calr" for o in ARROWS[n])]


def test_no_file_is_longer_than_can_be_read_in_one_sitting():
    sources = [*MODULES.values(), *(ROOT / "calr_kernels" / "csrc").iterdir()]
    assert {f.name for f in sources if len(f.read_text().splitlines()) > 350} == set()
