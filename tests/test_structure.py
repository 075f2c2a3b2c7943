"""Rules of the source tree that import-linter does not check."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import peft_lorasuite

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "peft_lorasuite"
FOLDERS = ("peft_lorasuite", "converters", "tests", "hub_scripts", "benchmarks")
LONGEST, LONGEST_CONVERTER, MOST_IN_ROOT = 300, 60, 8


def length(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_file_is_longer_than_300_lines(folder):
    lengths = {str(path.relative_to(ROOT)): length(path) for path in (ROOT / folder).rglob("*.py")}
    assert lengths
    assert {name: lines for name, lines in lengths.items() if lines > LONGEST} == {}


def test_converters_are_short():
    lengths = {path.name: length(path) for path in (ROOT / "converters").glob("*.py")}
    assert {name: lines for name, lines in lengths.items() if lines > LONGEST_CONVERTER} == {}


def test_the_package_root_has_few_modules():
    assert 0 < len(list(PACKAGE.glob("*.py"))) <= MOST_IN_ROOT


def test_no_module_in_the_root_hides_a_public_function():
    """``peft_lorasuite.upgrade`` must stay the function: a submodule of that name would replace it once imported."""
    children = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert children & set(peft_lorasuite.__all__) == set()


def test_nobody_imports_a_converter_statically():
    """Converters are found by model type, so that importing the package stays cheap."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            assert not any("converters" in name for name in names), path
