"""Converters of third parties: the decorator, the entry point of a separately installed package, collisions."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from peft_lorasuite.arch import registry
from peft_lorasuite.arch.spec import Architecture, Heads, Site

PLUGIN = """
from peft_lorasuite.arch.spec import Architecture, Heads, Site

def describe(config):
    sites = (Site("mix.qkv", ("q", "k", "v"), norm="ln"), Site("mix.out", ("o",)))
    return Architecture("owl", config.depth, 32, Heads(4, 2, 8), 48, 120, sites)
"""
ASK = """
from types import SimpleNamespace
from peft_lorasuite.errors import LoraSuiteError
from peft_lorasuite.arch.registry import architecture, known
try:
    arch = architecture(SimpleNamespace(model_type={model_type!r}, depth=7))
    print(arch.family, arch.layers, arch.site("v").path, known()[{model_type!r}])
except LoraSuiteError as error:
    print(error)
"""


def installed(folder: Path, package: str, model_type: str) -> None:
    """Lay a package out as pip leaves it behind."""
    (folder / f"{package}.py").write_text(PLUGIN)
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[peft_lorasuite.converters]\n{model_type} = {package}:describe\n")


def ask(folder: Path, model_type: str) -> str:
    """Ask for an architecture in a fresh interpreter that finds the packages in ``folder``."""
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", ASK.format(model_type=model_type)],
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=True,
    )
    return run.stdout.strip()


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Let a test register without leaving traces."""
    table = dict(registry._registered)
    monkeypatch.setattr(registry, "_registered", table)
    return table


def owl(config: Any) -> Architecture:
    return Architecture("owl", config.depth, 32, Heads(4, 4, 8), 48, 120, (Site("mix", ("q", "k", "v")),))


def other(config: Any) -> Architecture:
    return owl(config)


def test_a_converter_of_another_package_works_through_its_entry_point(tmp_path: Path) -> None:
    installed(tmp_path, "owl_family", "owl")
    assert ask(tmp_path, "owl") == "owl 7 mix.qkv owl_family.describe"


@pytest.mark.parametrize(("packages", "model_type"), [(("owl_a", "owl_b"), "owl"), (("my_llama",), "llama")])
def test_two_converters_for_one_type_are_an_error(tmp_path: Path, packages: tuple[str, ...], model_type: str) -> None:
    for package in packages:
        installed(tmp_path, package, model_type)
    answer = ask(tmp_path, model_type)
    assert f"two converters for model type '{model_type}'" in answer
    assert all(f"{package}:describe" in answer for package in packages)
    assert "uninstall one" in answer


def test_the_decorator_registers_once(registered: dict[str, Any]) -> None:
    assert registry.register("owl", "barn_owl")(owl) is owl
    registry.register("owl")(owl)
    assert set(registered) >= {"owl", "barn_owl"}
    assert registry.architecture(SimpleNamespace(model_type="barn_owl", depth=3)).layers == 3
    assert registry.known()["owl"].endswith("test_registry.owl")
    with pytest.raises(ValueError, match=r"two converters for model type 'owl' .*other and .*owl"):
        registry.register("owl")(other)
    assert registered["owl"].converter is owl


def test_a_built_in_type_cannot_be_taken(registered: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="two converters for model type 'bloom'"):
        registry.register("bloom")(owl)
    assert registered.get("bloom") is None or registered["bloom"].converter is not owl


def test_an_unknown_type_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown model type 'lama'") as caught:
        registry.architecture(SimpleNamespace(model_type="lama"))
    assert "did you mean 'llama'?" in str(caught.value)
    assert all(name in str(caught.value) for name in registry.BUILT_IN)
    assert "peft_lorasuite.register" in str(caught.value)


def test_every_built_in_type_has_its_converter_and_no_file_is_left_over() -> None:
    folder = Path(__file__).parents[1] / "converters"
    modules = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert modules == set(registry.BUILT_IN.values())
    for model_type in registry.BUILT_IN:
        with pytest.raises(ValueError, match="the config lacks what its family needs"):
            registry.architecture(SimpleNamespace(model_type=model_type))


def test_converters_are_short() -> None:
    folder = Path(__file__).parents[1] / "converters"
    long = {path.name: count for path in folder.glob("*.py") if (count := len(path.read_text().splitlines())) > 60}
    assert not long
