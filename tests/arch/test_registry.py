"""The registry of converters: the built-in table, the decorator, entry points of other packages, collisions."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pico import pico_config

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
from peft_lorasuite.arch.registry import architecture, families
try:
    arch = architecture(SimpleNamespace(model_type={model_type!r}, depth=7))
    print(arch.family, arch.layers, arch.site("v").path, families()[{model_type!r}].origin)
except LoraSuiteError as error:
    print(error)
"""


def install(folder: Path, package: str, model_type: str) -> None:
    """Write a package as pip installs it."""
    (folder / f"{package}.py").write_text(PLUGIN)
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[peft_lorasuite.converters]\n{model_type} = {package}:describe\n")


def ask(folder: Path, model_type: str) -> str:
    """Ask for an architecture in a new interpreter that finds the packages in ``folder``."""
    return python(folder, "-W", "error", "-c", ASK.format(model_type=model_type)).strip()


def python(folder: Path, *words: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run([sys.executable, *words], env=env, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Undo the registrations of a test."""
    table = dict(registry._registered)
    monkeypatch.setattr(registry, "_registered", table)
    return table


def owl(config: Any) -> Architecture:
    return Architecture("owl", config.depth, 32, Heads(4, 4, 8), 48, 120, (Site("mix", ("q", "k", "v")),))


def other(config: Any) -> Architecture:
    return owl(config)


def test_a_converter_of_another_package_works_through_its_entry_point(tmp_path: Path) -> None:
    install(tmp_path, "owl_family", "owl")
    assert ask(tmp_path, "owl") == "owl 7 mix.qkv owl_family.describe"


def test_a_converter_of_another_package_is_listed_without_importing_it(tmp_path: Path) -> None:
    install(tmp_path, "owl_family", "owl")
    (tmp_path / "owl_family.py").write_text("raise ImportError\n")
    lines = python(tmp_path, "-m", "peft_lorasuite", "families").splitlines()
    assert ["owl", "(no summary; from owl_family:describe)"] in [line.split(maxsplit=1) for line in lines]


def test_a_package_may_register_its_converter_with_a_summary(tmp_path: Path) -> None:
    install(tmp_path, "owl_family", "owl")
    decorated = PLUGIN.replace("def describe", "@register('owl', summary='fused q, k, v')\ndef describe")
    imports = "from peft_lorasuite.arch.registry import register"
    (tmp_path / "owl_family.py").write_text(f"{imports}\n{decorated}")
    code = f"{ASK.format(model_type='owl')}\nprint(families()['owl'].summary)"
    answer = "owl 7 mix.qkv owl_family.describe\nfused q, k, v\n"
    assert python(tmp_path, "-W", "error", "-c", code) == answer


@pytest.mark.parametrize(("packages", "model_type"), [(("owl_a", "owl_b"), "owl"), (("my_llama",), "llama")])
def test_two_converters_for_one_type_are_an_error(tmp_path: Path, packages: tuple[str, ...], model_type: str) -> None:
    for package in packages:
        install(tmp_path, package, model_type)
    answer = ask(tmp_path, model_type)
    assert f"two converters for model type '{model_type}'" in answer
    assert all(f"{package}:describe" in answer for package in packages)
    assert "uninstall one" in answer


def test_the_decorator_registers_once(registered: dict[str, Any]) -> None:
    assert registry.register("owl", "barn_owl", summary="fused q, k, v")(owl) is owl
    assert registry.register("owl", "barn_owl", summary="fused q, k, v")(owl) is owl
    assert registry.architecture(SimpleNamespace(model_type="barn_owl", depth=3)).layers == 3
    assert registry.families()["owl"] == ("fused q, k, v", f"{__name__}.owl")
    with pytest.raises(ValueError, match=r"two converters for model type 'owl' .*other and .*owl"):
        registry.register("tawny_owl", "owl")(other)
    assert registered["owl"].converter is owl
    assert "tawny_owl" not in registered


def test_a_built_in_type_cannot_be_taken(registered: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="two converters for model type 'bloom'"):
        registry.register("bloom")(owl)
    assert registered.get("bloom") is None or registered["bloom"].converter is not owl


def test_the_error_for_a_type_without_a_converter_lists_the_supported_ones(registered: dict[str, Any]) -> None:
    """D15. It proposes no similar type: editing ``model_type`` in the config would only make the upgrade wrong."""
    registry.register("owl")(owl)
    with pytest.raises(ValueError, match="no converter for model type 'lama' ") as caught:
        registry.architecture(SimpleNamespace(model_type="lama"))
    assert f"(wanted one of {', '.join(sorted({*registry.BUILT_IN, 'owl'}))})" in str(caught.value)
    assert "did you mean" not in str(caught.value)
    assert "keep the model_type in config.json" in str(caught.value)
    assert str(caught.value).endswith("to add a converter with peft_lorasuite.register, see docs/add-a-family.md")


def test_the_built_in_types_have_the_converters_in_the_folder() -> None:
    folder = Path(__file__).parents[2] / "converters"
    modules = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert modules == {one.module for one in registry.BUILT_IN.values()}
    for model_type in registry.BUILT_IN:
        with pytest.raises(ValueError, match=f"{model_type}: the config lacks a value: "):
            registry.architecture(SimpleNamespace(model_type=model_type))


def test_converters_are_short() -> None:
    folder = Path(__file__).parents[2] / "converters"
    long = {path.name: count for path in folder.glob("*.py") if (count := len(path.read_text().splitlines())) > 60}
    assert not long


@pytest.mark.parametrize("model_type", registry.BUILT_IN)
def test_a_summary_says_what_the_converter_does(model_type: str) -> None:
    """Two configs, with every switch off and on: what differs between them depends on the config."""
    off, on = (arch_with_switches(model_type, on) for on in (False, True))
    fused = [f"{'+'.join(site.parts)} {ORDERS[site.rows]}" for site in on.sites if site.fused]
    positions = " or ".join(dict.fromkeys(POSITIONS[arch.positions] for arch in (off, on)))
    heads = "GQA" if on.heads.group > 1 else "MHA"
    norm = "LayerNorm" if on.norm == "layer" else "RMSNorm"
    words = (", ".join(fused) or "not fused", biases(off, on), heads, positions, norm)
    assert registry.BUILT_IN[model_type].summary == "; ".join(words)


ORDERS = {"part head dim": "by part", "head part dim": "by head", "group part dim": "by group"}
POSITIONS = {"rotary": "rotary", "alibi": "ALiBi", "learned": "learned"}


def arch_with_switches(model_type: str, on: bool) -> Architecture:
    config = pico_config(model_type)
    text = config.get_text_config()
    values = dict.fromkeys(
        ("alibi", "attention_bias", "bias", "enable_bias", "mlp_bias", "use_bias", "use_qkv_bias"), on
    )
    for name, value in (values | {"num_key_value_heads": 2 if on else 4}).items():
        if hasattr(text, name):
            setattr(text, name, value)
    return registry.architecture(config)


def biases(off: Architecture, on: Architecture) -> str:
    always, possible = ([part for part in arch.parts if arch.site(part).bias] for arch in (off, on))
    parts = "" if possible == list(on.parts) else f"{', '.join(possible)} "
    if not possible:
        return "no biases"
    if always == ["up", "down"] and not parts:
        return "MLP biases, others optional"
    return f"{parts}biases" if always == possible else f"optional {parts}biases"
