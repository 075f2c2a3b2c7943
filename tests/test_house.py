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
    "progress": set(),
    "places": {"errors"},
    "folder": {"errors", "places"},
    "retry": set(),
    "source": {"errors", "places", "retry"},
    "weights": {"errors", "source"},
    "answers": {"errors"},
    "adalora": {"lowrank"},
    "variants": {"errors", "source"},
}
"""Rooms that may import no more than this from the package: values in, values out."""
VERBS = {"upgrade_map": {"hub"}}
"""Rooms of the core that hand a verb of theirs (``push_to_hub``) on to the rim, which is imported when it is called."""


def imports(path: Path) -> set[str]:
    """Rooms of the package that a file imports, at the top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("peft_lorasuite")):
            name = (node.module or "").removeprefix("peft_lorasuite").lstrip(".")
            found |= {name.split(".")[0]} if name else {alias.name for alias in node.names}
    return found - {"_version"}


@pytest.mark.parametrize("room", sorted(PURE))
def test_a_pure_room_imports_no_more_than_it_may(room):
    assert imports(PACKAGE / f"{room}.py") <= PURE[room]


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
    both = {path.stem for path in PACKAGE.glob("*.py") if {"adapter", "upgrade_map"} <= imports(path)}
    assert both <= {"upgrading", "model", "commands", "hub", "many", "demo"}


def test_converters_state_facts_and_import_no_more():
    for path in (ROOT / "converters").glob("*.py"):
        siblings = {other.stem for other in (ROOT / "converters").glob("*.py")}
        assert imports(path) <= {"registry", "spec", "errors"} | siblings, path.name
        assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST_CONVERTER, path.name


def test_nobody_imports_a_converter_statically():
    for path in PACKAGE.rglob("*.py"):
        assert "converters" not in imports(path), path


PICTURES = {
    "report",
    "figures",
    "pages",
    "drawn",
    "map_pages",
    "adapter_figures",
    "adapter_pages",
    "gains",
    "inspection",
}
RIM = {"cli", "commands", "looking", "demo", "hub", "evaluation", "chat"} | PICTURES
DELEGATES = {"upgrade_map": {"hub"}}
"""``UpgradeMap.push_to_hub`` is where users look for it; it hands over to the Hub's room when called."""


def test_the_core_does_not_import_the_rim():
    for path in PACKAGE.glob("*.py"):
        if path.stem not in RIM | {"__init__", "__main__", "finetuning"}:
            assert imports(path) & RIM <= DELEGATES.get(path.stem, set()), path.name


@pytest.mark.parametrize(
    "path", [*SOURCES, *(ROOT / "tests").glob("*.py"), *(ROOT / "hub_scripts").glob("*.py")], ids=lambda path: path.stem
)
def test_a_file_stays_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST
