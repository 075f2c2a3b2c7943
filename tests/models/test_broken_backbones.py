"""Backbones that are damaged, or none: refused in one sentence, never filled up with random weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import command_fixtures
import peft
import pytest
import torch
from command_fixtures import Pair, refused
from pico import pico_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from versions import installed_spelling

from peft_lorasuite import LoraSuiteError, MapOptions, PeftModel, UpgradeMap
from peft_lorasuite.compat import has
from peft_lorasuite.mapping.samples import hash_weights
from peft_lorasuite.models.backbone import Backbone

pair = command_fixtures.pair
WEIGHTS, UP = "model.safetensors", "model.layers.1.mlp.up_proj.weight"
Tensors = dict[str, Tensor]


def backbone(folder: Path, source: Path, change: Callable[[Tensors], object] = len, **values: Any) -> Path:
    """Copy a backbone with its tensors and config changed."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / WEIGHTS, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))
    return folder


def fill(name: str, value: float) -> Callable[[Tensors], object]:
    return lambda tensors: [tensors[key].fill_(value) for key in tensors if name in key]


LOADS: dict[str, tuple[Callable[[Tensors], object], dict[str, Any], str]] = {
    "no head": (lambda t: t.pop("lm_head.weight"), {}, "the checkpoint lacks a tensor (wanted lm_head.weight)"),
    "no projection": (lambda t: t.pop(UP), {}, f"the checkpoint lacks a tensor (wanted {UP})"),
    "flat": (lambda t: t.update({UP: t[UP].flatten()}), {}, "a weight does not fit the config (got (2560,)"),
    "sizes": (len, {"intermediate_size": 128}, "a weight does not fit the config (got (40, 64), wanted (40, 128)"),
    "activation": (len, {"hidden_act": "foo"}, "the model cannot be loaded: KeyError 'foo'"),
    "quantized": (len, {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "the model cannot be loaded: "),
}


@pytest.mark.parametrize("kind", LOADS)
def test_a_model_that_cannot_be_loaded_whole(kind: str, pair: Pair, tmp_path: Path) -> None:
    change, values, message = LOADS[kind]
    broken = Backbone.open(backbone(tmp_path / "new", pair.new, change, **values))
    with pytest.raises(LoraSuiteError) as caught:
        broken.load()
    info = str(caught.value)
    assert info.startswith(f"backbone {tmp_path / 'new'}")
    shapes = has("transformers", "5.0")  # before, it tells the names alone
    assert f": {message if shapes else message.partition(' (got (')[0]}" in info
    assert "\n" not in info
    assert len(info) < 500


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"dtype": "foo"}, "unknown dtype .got 'foo', wanted auto, float32"),
     ({"device_map": "foo"}, "the model cannot be loaded: "),
     ({"device_map": "cuda:77"}, "the model cannot be loaded: ")],
)  # fmt: skip
def test_an_unknown_dtype_or_device(settings: dict[str, Any], message: str, pair: Pair) -> None:
    with pytest.raises(LoraSuiteError, match=message):
        Backbone.open(pair.new).load(**settings)


MAPS: dict[str, tuple[Callable[[Tensors], object], dict[str, Any], str]] = {
    "a projection": (fill("layers.1.mlp.up", float("nan")), {}, f"{UP}: values are not finite"),
    "the embedding": (fill("embed", float("inf")), {}, "embed_tokens.weight: values are not finite"),
    "norms": (fill("input_layernorm", float("inf")), {}, "input_layernorm.weight: values are not finite"),
    "more tokens": (len, {"vocab_size": 500}, "a weight does not fit the config (got 120 rows"),
    "no base": (
        len,
        installed_spelling({"rope_parameters": {"rope_type": "default", "rope_theta": "x"}}),
        "the config " if has("transformers", "5.0") else "rope_theta: malformed value",
    ),
    "no heads": (len, {"num_key_value_heads": 0}, "config.json, num_key_value_heads: malformed value (got 0"),
}


@pytest.mark.parametrize("kind", MAPS)
def test_values_that_no_map_can_be_made_of(
    kind: str, pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, values, message = MAPS[kind]
    broken = backbone(tmp_path / "new", pair.new, change, **values)
    call = ["map", pair.old, broken, "-o", tmp_path / "place" / "out", "--calibration", pair.text, "--tokens", 256]
    assert message in refused(tmp_path, capsys, *call)


@pytest.mark.parametrize(("name", "message"), [("lm_head", "not finite"), ("model.norm", "logits that are not finite")])
def test_values_that_nothing_can_be_transplanted_to(
    name: str, message: str, pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A map of fixed layers reads neither head nor final norm; the method does."""
    broken = backbone(tmp_path / "new", pair.new, fill(name, float("nan")))
    UpgradeMap.build(pair.old, broken, MapOptions(layer_map="proportional")).save(tmp_path / "map")
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps([f"the red cat and the {word} dog" for word in command_fixtures.WORDS] * 4))
    call = ["upgrade", pair.adapter, "--to", broken, "--map", tmp_path / "map", "-o", tmp_path / "place" / "out"]
    options = ["--method", "transplant", "--prompts", prompts, "--set", "prompts=16", "--set", "length=8"]
    assert message in refused(tmp_path, capsys, *call, *options)


@pytest.mark.parametrize(("name", "kind"), [("lm_head", "head"), ("model.norm", "norms"), ("down_proj", "projections")])
def test_values_that_are_not_those_of_the_map(
    name: str, kind: str, pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = backbone(tmp_path / "new", pair.new, fill(name, float("nan")))
    call = ["upgrade", pair.adapter, "--to", broken, "--map", pair.map, "-o", tmp_path / "place" / "out"]
    assert f"the values of the {kind} differ" in refused(tmp_path, capsys, *call)


def adapted() -> Any:
    return peft.get_peft_model(pico_model("llama"), peft.LoraConfig(target_modules=["q_proj"]))


IN_MEMORY: dict[str, tuple[Callable[[], Any], str]] = {
    "a PEFT model": (adapted, "the model already has an adapter"),
    "its insides": (lambda: adapted().get_base_model(), "the model already has an adapter"),
    "one layer": (lambda: torch.nn.Linear(3, 4), "must be a transformers model"),
    "no model": (lambda: 5, "the backbone must be a folder, a Hub id or a loaded model"),
}


@pytest.mark.parametrize("kind", IN_MEMORY)
def test_a_model_in_memory_that_is_no_backbone(kind: str) -> None:
    make, message = IN_MEMORY[kind]
    with pytest.raises(LoraSuiteError, match=message):
        Backbone.open(make())


def test_a_model_in_memory_without_a_head_is_no_causal_language_model() -> None:
    headless = Backbone.open(pico_model("llama").model)
    with pytest.raises(LoraSuiteError, match="must be a causal language model"):
        headless.load()


def test_a_model_on_the_meta_device_has_no_values() -> None:
    empty = Backbone.open(pico_model("llama").to("meta"))
    with pytest.raises(LoraSuiteError, match="the model's weights are not in memory"):
        empty.part(0, "q")


def test_a_table_in_memory_that_is_shorter_than_its_config() -> None:
    model = pico_model("llama")
    model.config.vocab_size = 500
    with pytest.raises(LoraSuiteError, match=r"a weight does not fit the config \(got 120 rows"):
        hash_weights(Backbone.open(model))


def test_an_upgrade_is_not_put_on_a_model_that_carries_an_adapter(pair: Pair) -> None:
    """PEFT would have put it beside the model's own and used neither as it was meant."""
    for settings in ({"model": adapted(), "upgrade_map": pair.map}, {"model": pair.new, "source_model": adapted()}):
        with pytest.raises(LoraSuiteError, match="the model already has an adapter"):
            PeftModel.from_upgraded(**settings, model_id=pair.adapter)
