"""The layout of the package, kept by a test: what each room may import, and how long a file may be."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "peft_lorasuite"
SOURCES = [*PACKAGE.rglob("*.py"), *(ROOT / "converters").glob("*.py")]
LONGEST, LONGEST_CONVERTER = 300, 60

NUMERICAL = {"errors", "spec"}
PURE = {
    "errors": set(),
    "spec": {"errors"},
    "registry": {"errors", "spec"},
    "layout": NUMERICAL,
    "lowrank": {"errors"},
    "similarity": NUMERICAL,
    "matching": {"errors"},
    "transfer": NUMERICAL,
    "vocabulary": set(),
    "files": {"errors"},
    "files.places": {"errors"},
    "files.folder": {"errors", "files.places"},
    "files.retry": set(),
    "files.source": {"errors", "files.places", "files.retry"},
    "files.weights": {"errors", "files.source"},
    "running": {"errors", "spec"},
    "running.progress": set(),
    "suites": {"errors"},
    "suites.answers": {"errors"},
    "adapters.adalora": {"lowrank"},
    "adapters.variants": {"errors", "files.source"},
}
"""Rooms, and single modules of them, that may import no more than this from the package: values in, values out."""
PARTS = {"adapters": "adapter", "mapping": "upgrade_map", "pictures": "report"}
"""Folder -> the room whose parts it holds: these two may know one another."""
LATER = {("upgrade_map", "hub"), ("upgrade_map", "methods")}
"""A room -> one above it that it hands on to when called: ``push_to_hub``, and what methods keep in a map."""


def modules(path: Path) -> set[str]:
    """Modules of the package that a file imports, at the top or inside functions, by their dotted names in it."""
    package, found = path.relative_to(PACKAGE).parts[:-1] if path.is_relative_to(PACKAGE) else ("converters",), set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("peft_lorasuite")):
            base = package[: len(package) - node.level + 1] if node.level else ()
            name = ".".join([*base, (node.module or "").removeprefix("peft_lorasuite").lstrip(".")]).strip(".")
            found |= {name} if name else {alias.name for alias in node.names}
    return found - {"_version"}


def room(path: Path) -> str:
    """The room that a file of the package is, or belongs to."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(path: Path) -> set[str]:
    """Other rooms of the package that a file imports."""
    own = room(path) if path.is_relative_to(PACKAGE) else None
    return {name.split(".")[0] for name in modules(path)} - {own}


FILES = [path for path in PACKAGE.rglob("*.py") if room(path) not in ("__init__", "__main__", "_version")]


@pytest.mark.parametrize("name", sorted(PURE))
def test_a_pure_room_imports_no_more_than_it_may(name):
    if "." in name:
        assert modules(PACKAGE / f"{name.replace('.', '/')}.py") <= PURE[name]
        return
    own = [path for path in FILES if room(path) == name]
    assert own
    for path in own:
        assert imports(path) <= PURE[name], path.name


def test_rooms_do_not_import_one_another_in_a_circle():
    graph = {}
    for path in FILES:
        one = PARTS.get(room(path), room(path))
        needed = {PARTS.get(name, name) for name in imports(path)} - {one}
        graph.setdefault(one, set()).update(other for other in needed if (one, other) not in LATER)
    assert set(PARTS.values()) <= set(graph)
    assert len(list(TopologicalSorter(graph).static_order())) == len(graph)


def test_no_import_at_the_top_of_a_file_goes_in_a_circle():
    graph = {}
    for path in PACKAGE.rglob("*.py"):
        package = list(path.parent.relative_to(ROOT).parts)
        needed = set()
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom) and node.level:
                base = package[: len(package) - node.level + 1]
                needed.add(".".join([*base, node.module or ""]).strip("."))
                needed |= {".".join([*base, alias.name]) for alias in node.names if node.module is None}
        graph[".".join([*package, path.stem]).removesuffix(".__init__")] = needed
    known = {name: {one for one in needed if one in graph and one != name} for name, needed in graph.items()}
    assert any(known.values())
    assert len(list(TopologicalSorter(known).static_order())) == len(graph)


def test_only_upgrade_and_methods_bring_adapter_and_map_together():
    both = {path.stem for path in FILES if room(path) != "methods" and {"adapter", "upgrade_map"} <= imports(path)}
    assert both <= {"upgrading", "model", "commands", "hub", "many", "demo"}


def test_converters_state_facts_and_import_no_more():
    for path in (ROOT / "converters").glob("*.py"):
        assert imports(path) <= {"registry", "spec", "errors", "converters"}, path.name
        assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST_CONVERTER, path.name


def test_nobody_imports_a_converter_statically():
    for path in PACKAGE.rglob("*.py"):
        assert "converters" not in imports(path), path


RIM = {"cli", "terminal", "hub", "publishing", "evaluation", "report", "pictures", "inspection"}


def test_the_core_does_not_import_the_rim():
    for path in FILES:
        if room(path) not in RIM:
            assert {(room(path), name) for name in imports(path) & RIM} <= LATER, path.name


@pytest.mark.parametrize(
    "path", [*SOURCES, *(ROOT / "tests").glob("*.py"), *(ROOT / "hub_scripts").glob("*.py")], ids=lambda path: path.stem
)
def test_a_file_stays_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST
