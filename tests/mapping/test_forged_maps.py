"""Forged and stale maps are refused: A3 of the list of real inputs, one case a line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_pair import WORDS, make_lora
from pico import pico_model, pico_tokenizer, save_backbone
from versions import installed_spelling

from peft_lorasuite import LoraSuiteError, MapOptions, UpgradeMap, upgrade
from peft_lorasuite.arch import registry
from peft_lorasuite.arch.experts import Experts
from peft_lorasuite.arch.spec import OPTIONAL, Architecture, Borrowed, Heads, LayerSizes
from peft_lorasuite.mapping.samples import EMPTY, KINDS
from peft_lorasuite.models.backbone import Backbone
from peft_lorasuite.upgrading.map_cache import cache_folder, load_or_build_map

OPTIONS = MapOptions(layer_map="proportional")
SEEDS = {"old": 1, "new": 2}


def model_of(role: str) -> Any:
    """A Qwen2, which has biases, norms and a head of its own."""
    return pico_model("qwen2", seed=SEEDS[role])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``old``, ``new``, ``lora`` and ``map``."""
    folder = tmp_path_factory.mktemp("forged")
    for role in SEEDS:
        save_backbone(folder / role, model_of(role), pico_tokenizer(WORDS))
    make_lora(folder / "lora", model_of("old"))
    UpgradeMap.build(folder / "old", folder / "new", OPTIONS).save(folder / "map")
    return folder


def scale(path: str, factor: float, more: float = 0.0) -> Callable[[Any], None]:
    """Return a change of one tensor of a model."""
    return lambda model: model.get_parameter(path).mul_(factor).add_(more)


def each_norm(model: Any) -> None:
    for name, weight in model.named_parameters():
        if "layernorm" in name:
            weight.mul_(2)


STALE: dict[str, tuple[Callable[[Any], object], str]] = {
    "norm gains x 2": (each_norm, "norms"),
    "one gain": (lambda m: m.model.layers[2].post_attention_layernorm.weight[5].add_(0.1), "norms"),
    "q biases + 1": (scale("model.layers.0.self_attn.q_proj.bias", 1, 1), "biases"),
    "final norm x 3": (scale("model.norm.weight", 3), "norms"),
    "another head": (lambda m: torch.nn.init.normal_(m.lm_head.weight), "head"),
    "another embedding": (scale("model.embed_tokens.weight", -1), "embedding"),
    "o of the last layer": (scale("model.layers.2.self_attn.o_proj.weight", 1.1), "projections"),
    "one head's queries": (lambda m: m.model.layers[1].self_attn.q_proj.weight[8:16].mul_(-1), "projections"),
    "q and k swapped": (lambda m: m.model.layers[0].mlp.gate_proj.weight.copy_(m.model.layers[0].mlp.up_proj.weight),
                        "projections"),
}  # fmt: skip
"""Change of a backbone after its map was built -> the kind of tensors that differs."""


@pytest.mark.parametrize("role", SEEDS)
@pytest.mark.parametrize("change", STALE)
def test_a3_the_map_of_a_backbone_that_was_changed_is_refused(
    change: str, role: str, place: Path, tmp_path: Path
) -> None:
    model = model_of(role)
    with torch.no_grad():
        STALE[change][0](model)
    save_backbone(tmp_path / "changed", model, pico_tokenizer(WORDS))
    wanted = rf"built for another {role} backbone \(got the values of the {STALE[change][1]} differ, wanted {role}\)"
    with pytest.raises(LoraSuiteError, match=wanted):
        upgrade(place / "lora", place / "map", method="copy", **{role: tmp_path / "changed"})


def forge(place: Path, tmp_path: Path, role: str, change: Callable[[dict[str, Any]], object]) -> Path:
    """Copy the map and change the identity of one of its backbones."""
    shutil.copytree(place / "map", tmp_path / "forged")
    meta = json.loads((place / "map" / "map.json").read_text())
    change(meta[role])
    (tmp_path / "forged" / "map.json").write_text(json.dumps(meta))
    return tmp_path / "forged"


def swap_paths(arch: dict[str, Any]) -> None:
    q, k = arch["sites"][:2]
    q["path"], k["path"] = k["path"], q["path"]


FORGED: dict[str, tuple[Callable[[dict[str, Any]], object], str, str]] = {
    "layer path": (lambda a: a.update(layer_path="model.blocks"), "layer_path 'model.layers'", "'model.blocks'"),
    "swapped paths": (swap_paths, "sites[0].path 'self_attn.q_proj'", "'self_attn.k_proj'"),
    "residual scale": (lambda a: a.update(residual_scale=0.01), "residual_scale 1.0", "0.01"),
    "tied": (lambda a: a.update(tied=True), "tied False", "True"),
    "norm path": (lambda a: a["sites"][0].update(norm="other"), "sites[0].norm 'input_layernorm'", "'other'"),
    "no norm": (lambda a: a["sites"][0].update(norm=None), "sites[0].norm 'input_layernorm'", "None"),
    "no bias": (lambda a: a["sites"][0].update(bias=False), "sites[0].bias True", "False"),
    "rotary base": (lambda a: a.update(rope_thetas=[9.0]), "rope_thetas[0] 10000.0", "9.0"),
}
"""Forged architecture -> the field with the backbone's value, and the forged value."""


@pytest.mark.parametrize("opened", [True, False], ids=["opened", "not opened"])
@pytest.mark.parametrize("role", SEEDS)
@pytest.mark.parametrize("kind", FORGED)
def test_a3_a_forged_architecture_is_refused(kind: str, role: str, opened: bool, place: Path, tmp_path: Path) -> None:
    change, own, other = FORGED[kind]
    forged = forge(place, tmp_path, role, lambda identity: change(identity["arch"]))
    backbones = {role: place / role} if opened else {}
    with pytest.raises(LoraSuiteError) as caught:
        upgrade(place / "lora", forged, method="copy", **backbones)
    if opened:
        assert f"built for another {role} backbone (got {own}, wanted {other} in {role})" in str(caught.value)
    else:
        name, _, value = own.partition(" ")
        assert str(caught.value).startswith(f"{role} backbone of the upgrade map, {role}: ")
        assert f"(got {name} {other}, wanted {value})" in str(caught.value)


def other(value: Any) -> Any:
    """Return another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, str):
        return f"{value}x"
    if isinstance(value, dict):
        return {**value, "query": 2 * value["query"]}
    return "x" if value is None else [*value, *value] if value else [["a", "b"]]


ADDED = {
    "experts": asdict(Experts(3, 24, "norm")),
    "other_sizes": [asdict(LayerSizes((1,), Heads(4, 2, 16), 48, 16))],
    "borrowed": [asdict(Borrowed(1, "v", 1, "k"))],
    "layer_scale": "scale",
}
"""Fields that the record of most backbones does not have -> values of them."""


@pytest.mark.parametrize("opened", [True, False], ids=["opened", "not opened"])
@pytest.mark.parametrize("name", [field.name for field in fields(Architecture)])
def test_a3_every_field_of_the_architecture_is_compared(name: str, opened: bool, place: Path, tmp_path: Path) -> None:
    def change(one: dict[str, Any]) -> None:
        one["arch"][name] = ADDED[name] if name in ADDED else other(one["arch"].get(name, OPTIONAL.get(name)))

    forged = forge(place, tmp_path, "old", change)
    with pytest.raises(LoraSuiteError):
        upgrade(place / "lora", forged, method="copy", **({"old": place / "old"} if opened else {}))


def test_a3_a_residual_scale_of_zero_is_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(LoraSuiteError, match=r"old.arch.residual_scale: malformed value \(got 0.0"):
        UpgradeMap.load(forge(place, tmp_path, "old", lambda one: one["arch"].update(residual_scale=0.0)))


HASHES: dict[str, Callable[[dict[str, Any]], object]] = {
    "no tokenizer": lambda one: one.update(tokenizer=None),
    "no tokenizer field": lambda one: one.pop("tokenizer"),
    "no samples": lambda one: one.update(samples=None),
    "no samples field": lambda one: one.pop("samples"),
    "empty samples": lambda one: one.update(samples={}),
    **{f"no hash of the {kind}": lambda one, kind=kind: one["samples"].update({kind: None}) for kind in KINDS},
    **{f"no {kind}": lambda one, kind=kind: one["samples"].pop(kind) for kind in KINDS},
    "a word": lambda one: one["samples"].update(head="none"),
    "one more": lambda one: one["samples"].update(tail=EMPTY),
    "a list": lambda one: one.update(samples=[EMPTY] * 5),
}


@pytest.mark.parametrize("kind", HASHES)
def test_a3_missing_hashes_are_refused(kind: str, place: Path, tmp_path: Path) -> None:
    with pytest.raises(LoraSuiteError, match=r"old\.(tokenizer|samples[.a-z]*): (malformed|missing|unknown) "):
        UpgradeMap.load(forge(place, tmp_path, "old", HASHES[kind]))


@pytest.mark.parametrize("kind", KINDS)
def test_a3_the_hash_of_no_tensors_is_not_that_of_the_backbone(kind: str, place: Path, tmp_path: Path) -> None:
    forged = forge(place, tmp_path, "new", lambda one: one["samples"].update({kind: EMPTY}))
    with pytest.raises(LoraSuiteError, match=f"the values of the {kind} differ"):
        upgrade(place / "lora", forged, method="copy", new=place / "new")


CONFIGS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no values": (lambda one: one.update(config={}), "cannot be checked without its backbone"),
    "no model type": (lambda one: one["config"].update(model_type=None), "cannot be checked without its backbone"),
    "an unknown model type": (lambda one: one["config"].update(model_type="qwen9"), "no converter for model type"),
    "another model type": (lambda one: one["config"].update(model_type="llama"), "converter of 'llama' gives"),
    "words for numbers": (lambda one: one["config"].update(hidden_size="many"), "the config has an invalid value"),
    "no hidden size": (lambda one: one["config"].pop("hidden_size"), "the config lacks a value"),
    "a list": (lambda one: one.update(config=[1]), "old.config: malformed value"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a3_config_values_that_do_not_give_the_architecture_are_refused(kind: str, place: Path, tmp_path: Path) -> None:
    change, message = CONFIGS[kind]
    with pytest.raises(LoraSuiteError, match=message):
        upgrade(place / "lora", forge(place, tmp_path, "old", change), method="copy")


def test_a_map_alone_is_checked_and_used(place: Path) -> None:
    assert upgrade(place / "lora", place / "map", method="copy").adapter.updates


def test_a3_a_tied_backbone_gets_a_map_of_its_own(tmp_path: Path) -> None:
    twins = {tied: pico_model("qwen2", seed=2, tie_word_embeddings=tied) for tied in (False, True)}
    twins[True].load_state_dict(twins[False].state_dict(), strict=False)
    twins[True].model.embed_tokens.load_state_dict(twins[False].model.embed_tokens.state_dict())
    for tied, model in twins.items():
        save_backbone(tmp_path / f"{tied}", model, pico_tokenizer(WORDS))
    old = Backbone.open(save_backbone(tmp_path / "old", model_of("old"), pico_tokenizer(WORDS)))
    untied, tied = (Backbone.open(tmp_path / f"{tied}") for tied in twins)
    first = load_or_build_map(old, untied, OPTIONS)
    second = load_or_build_map(old, tied, OPTIONS)
    assert (first.new.arch.tied, second.new.arch.tied) == (False, True)
    assert len(list(cache_folder().iterdir())) == 2
    make_lora(tmp_path / "lora", model_of("old"))
    with pytest.raises(LoraSuiteError, match=r"another new backbone \(got tied True, wanted False in "):
        upgrade(tmp_path / "lora", first, method="copy", new=tied)


@pytest.mark.parametrize(
    "change", [{"rms_norm_eps": 0.1}, {"rope_parameters": {"rope_theta": 9.0, "rope_type": "default"}}]
)
def test_a_config_with_which_the_layers_compute_something_else_gets_a_map_of_its_own(
    change: dict[str, Any], place: Path, tmp_path: Path
) -> None:
    new = shutil.copytree(place / "new", tmp_path / "new")
    old = Backbone.open(place / "old")
    load_or_build_map(old, Backbone.open(new), OPTIONS)
    values = json.loads((new / "config.json").read_text())
    (new / "config.json").write_text(json.dumps({**values, "use_cache": False, "eos_token_id": 5}))
    assert load_or_build_map(old, Backbone.open(new), OPTIONS).source, "found again"
    (new / "config.json").write_text(json.dumps({**values, **installed_spelling(change)}))
    assert load_or_build_map(old, Backbone.open(new), OPTIONS).source is None
    assert len(list(cache_folder().iterdir())) == 2


def test_a_map_of_an_older_format_is_refused_and_says_what_to_do(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "map", tmp_path / "map")
    meta = json.loads((tmp_path / "map" / "map.json").read_text())
    (tmp_path / "map" / "map.json").write_text(json.dumps({**meta, "format": 1}))
    with pytest.raises(LoraSuiteError, match=r"unsupported format .*got 1, wanted 3\); build it again .*map OLD NEW"):
        UpgradeMap.load(tmp_path / "map")


def test_a_converter_that_calls_its_config_needs_the_backbone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The values of such a config are not stored, so that the map alone cannot be checked."""
    from peft_lorasuite.converters.llama import llama

    entry = registry.Entry(lambda config: llama(config.get_text_config()), "here")
    monkeypatch.setitem(registry._registered, "mistral-with-method", entry)
    model = pico_model("llama", seed=1)
    model.config.model_type = "mistral-with-method"
    model.config._name_or_path = str(
        save_backbone(tmp_path / "old", pico_model("llama", seed=1), pico_tokenizer(WORDS))
    )
    new = save_backbone(tmp_path / "new", model_of("new"), pico_tokenizer(WORDS))
    built = UpgradeMap.build(model, new, OPTIONS)
    assert built.old.config == {}
    lora = make_lora(tmp_path / "lora", pico_model("llama", seed=1))
    with pytest.raises(LoraSuiteError, match="cannot be checked without its backbone"):
        upgrade(lora, built, method="copy")
    assert upgrade(lora, built, method="copy", old=model).adapter.updates
