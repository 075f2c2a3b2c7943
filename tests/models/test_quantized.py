"""Quantized new backbones: the map is read from the original or dequantized weights, the adapter goes on top."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from gguf_file import write_gguf
from hub_pair import make_lora
from pico import pico_model, pico_tokenizer, save_backbone
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from versions import needs

from peft_lorasuite import MapOptions, PeftModel, UpgradeMap, upgrade
from peft_lorasuite.adapters.peft_model import load_with_adapter
from peft_lorasuite.adapters.reading import read_adapter
from peft_lorasuite.errors import LoraSuiteError
from peft_lorasuite.io.source import Source
from peft_lorasuite.models.backbone import Backbone

WORDS = ["red", "blue", "tree", "stone", "river", "cloud", "small", "big", "runs", "sleeps"]
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
OPTIONS = MapOptions(layer_map="proportional")
IDS = torch.arange(3, 60)[None]
needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
needs_gguf = pytest.mark.skipif(find_spec("gguf") is None, reason="gguf is not installed")
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
BITS: dict[str, dict[str, Any]] = {"8 bits": {"load_in_8bit": True}, "4 bits": NF4}
AGREED = {"8 bits": 0.98, "4 bits": 0.9}
"""Cosine of the adapter's effect on the quantized and on the original backbone."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("quantized")
    tokenizer = pico_tokenizer(WORDS)
    save_backbone(root / "old", pico_model("llama", seed=1), tokenizer)
    save_backbone(root / "new", pico_model("qwen2", seed=2, **SIZES), tokenizer)
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        peft.get_peft_model(pico_model("llama", seed=1), config).save_pretrained(root / "adapter")
    UpgradeMap.build(root / "old", root / "new", OPTIONS).save(root / "map")
    upgrade(root / "adapter", root / "map", method="lorasuite").save(root / "upgraded")
    return root


def effect(model: Any, adapter: Path) -> Tensor:
    """What a plain PEFT load of the adapter does to the logits."""
    with torch.no_grad():
        plain = model(IDS).logits.float()
        return peft.PeftModel.from_pretrained(model, str(adapter))(IDS).logits.float() - plain


def cosine(left: Tensor, right: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(left.flatten(), right.flatten(), dim=0))


def in_bits(place: Path, name: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        place, quantization_config=BitsAndBytesConfig(**BITS[name]), device_map="cpu"
    )


@pytest.fixture
def loose() -> Any:
    """Let bitsandbytes say that it casts."""
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        yield


@needs_bitsandbytes
@pytest.mark.usefixtures("loose")
@pytest.mark.parametrize("bits", BITS)
def test_an_upgraded_adapter_does_the_same_to_a_backbone_in_few_bits(bits: str, folders: Path) -> None:
    original = effect(AutoModelForCausalLM.from_pretrained(folders / "new"), folders / "upgraded")
    quantized = effect(in_bits(folders / "new", bits), folders / "upgraded")
    assert original.norm() > 1
    assert cosine(original, quantized) > AGREED[bits]


@needs_bitsandbytes
@pytest.mark.usefixtures("loose")
@pytest.mark.parametrize("bits", BITS)
def test_from_upgraded_takes_a_backbone_in_few_bits(bits: str, folders: Path) -> None:
    original = effect(AutoModelForCausalLM.from_pretrained(folders / "new"), folders / "upgraded")
    model = in_bits(folders / "new", bits)
    plain = model(IDS).logits.float()
    upgraded = PeftModel.from_upgraded(
        model, folders / "adapter", source_model=folders / "old", upgrade_map=folders / "map", method="lorasuite"
    )
    with torch.no_grad():
        assert cosine(original, upgraded(IDS).logits.float() - plain) > AGREED[bits]


@needs_bitsandbytes
@pytest.mark.usefixtures("loose")
@pytest.mark.parametrize("bits", BITS)
def test_no_map_is_built_from_few_bits(bits: str, folders: Path) -> None:
    with pytest.raises(LoraSuiteError, match=r"the weights are quantized .*dequantized checkpoint"):
        UpgradeMap.build(folders / "old", in_bits(folders / "new", bits), OPTIONS)


@needs_bitsandbytes
@pytest.mark.usefixtures("loose")
def test_d14_an_old_backbone_in_few_bits_is_run_as_it_was_trained(folders: Path, tmp_path: Path) -> None:
    tokenizer, base = pico_tokenizer(WORDS), tmp_path / "old-bnb-4bit"
    save_backbone(tmp_path / "old", pico_model("llama", seed=1, **SIZES), tokenizer)
    save_backbone(base, in_bits(tmp_path / "old", "4 bits"), tokenizer)
    UpgradeMap.build(tmp_path / "old", folders / "new", OPTIONS).save(tmp_path / "map")
    adapter = make_lora(tmp_path / "adapter", pico_model("llama", seed=1, **SIZES), base=str(base))
    with pytest.raises(LoraSuiteError, match=rf"the weights are quantized .*probably {tmp_path}/old "):
        PeftModel.from_upgraded(folders / "new", adapter)
    old = Backbone.open(base)
    with load_with_adapter(old, read_adapter(Source(str(adapter), "adapter"), old.arch)) as model, torch.no_grad():
        own = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter))
        torch.testing.assert_close(model(IDS).logits, own(IDS).logits)
    upgraded = PeftModel.from_upgraded(
        folders / "new", adapter, upgrade_map=tmp_path / "map", method="transplant",
        prompts=[f"the {one} {two}" for one in WORDS for two in WORDS], options={"prompts": 16, "length": 4},
    )  # fmt: skip
    assert upgraded.upgrade_report.method["name"] == "transplant"


@needs_gguf
def test_a_gguf_backbone_is_dequantized_for_the_map_and_takes_the_adapter(folders: Path, tmp_path: Path) -> None:
    needs("transformers", "5.20", "GgufConfig")
    from transformers import GgufConfig

    place = save_backbone(tmp_path / "gguf", pico_model("qwen2", seed=2, **SIZES), pico_tokenizer(WORDS))
    write_gguf(place / "model-q8_0.gguf", AutoModelForCausalLM.from_pretrained(folders / "new"))
    (place / "model.safetensors").unlink()
    dense = AutoModelForCausalLM.from_pretrained(
        place, gguf_file="model-q8_0.gguf", quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    original = AutoModelForCausalLM.from_pretrained(folders / "new")
    off = (dense.model.layers[0].mlp.up_proj.weight - original.model.layers[0].mlp.up_proj.weight).norm()
    assert 0 < off < 0.01 * original.model.layers[0].mlp.up_proj.weight.norm()
    assert cosine(effect(original, folders / "upgraded"), effect(dense, folders / "upgraded")) > 0.98
    dense = AutoModelForCausalLM.from_pretrained(
        place, gguf_file="model-q8_0.gguf", quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    save_backbone(tmp_path / "dense", dense, Backbone.open(folders / "new").tokenizer)
    maps = UpgradeMap.load(folders / "map"), UpgradeMap.build(folders / "old", tmp_path / "dense", OPTIONS)
    for one, two in zip(maps[0].layers, maps[1].layers, strict=True):
        assert torch.equal(one.heads, two.heads)
        assert (one.units == two.units).float().mean() > 0.9
    assert (maps[0].hidden - maps[1].hidden).norm() < 0.02 * maps[0].hidden.norm()
