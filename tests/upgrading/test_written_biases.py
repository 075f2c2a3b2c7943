"""Adapters with biases, and with parts that are not transferred: the result loads in PEFT, and the verdict says so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from pico import pico_model, pico_tokenizer, save_backbone
from random_adapter import write_random_adapter
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from peft_lorasuite import MapOptions, UpgradeMap, upgrade
from peft_lorasuite.adapters.peft_model import add_adapter_strict

pytestmark = [pytest.mark.filterwarnings(f"ignore:.*{text}.*") for text in ("lora_bias=True", "invalid shape")]
WEIGHTS = "adapter_model.safetensors"
PROMPTS = ["the cat sat on", "the dog ran to", "the red mat", "big sun in the"] * 4
IDS = torch.tensor([[3, 4, 5, 6, 7, 8, 20]])


def base_of(folder: Path, family: str, **sizes: Any) -> Path:
    words = sorted({word for text in PROMPTS for word in text.split()})
    return save_backbone(folder, pico_model(family, **sizes), pico_tokenizer(words))


def train(folder: Path, base: Path, **config: Any) -> Any:
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | config
    return write_random_adapter(AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(**settings), folder)


@torch.no_grad()
def strict_logits(folder: Path, base: Path) -> torch.Tensor:
    """Load with PEFT, with an error for every missing or unused tensor."""
    return add_adapter_strict(AutoModelForCausalLM.from_pretrained(base).eval(), folder, "the result")(IDS).logits


def moved(folder: Path, base: Path) -> tuple[Any, Path]:
    """Upgrade by weights to the same backbone, where the result is exact."""
    same = UpgradeMap.build(base, base, MapOptions(layer_map="first"))
    made = upgrade(folder, same, method="lorasuite", old=base, new=base)
    return made, made.save(folder.parent / "out")


def test_a_lora_with_biases_is_upgraded_by_behavior(tmp_path: Path) -> None:
    """PEFT cannot merge it where the backbone has no bias."""
    old, new = base_of(tmp_path / "old", "llama"), base_of(tmp_path / "new", "llama", hidden_size=40)
    train(tmp_path / "lora", old, lora_bias=True)
    made = upgrade(
        tmp_path / "lora", UpgradeMap.build(old, new), method="transplant", options={"extra": 50, "length": 4},
        old=old, new=new, prompts=PROMPTS,
    )  # fmt: skip
    strict_logits(made.save(tmp_path / "out"), new)
    assert made.adapter.updates


def test_a_lora_of_the_head_among_loras_with_biases(tmp_path: Path) -> None:
    """PEFT then expects a bias of the head's LoRA as well."""
    base = base_of(tmp_path / "base", "llama")
    train(tmp_path / "lora", base, lora_bias=True, target_modules=["q_proj", "lm_head"])
    made, out = moved(tmp_path / "lora", base)
    strict_logits(out, base)
    assert not load_file(out / WEIGHTS)["base_model.model.lm_head.lora_B.bias"].any()
    assert made.report.tensors["base_model.model.lm_head.lora_B.bias"].startswith("not transferred: ")


@pytest.mark.parametrize("trained", [False, True])
def test_biases_in_the_file_that_the_config_does_not_name(tmp_path: Path, *, trained: bool) -> None:
    base = base_of(tmp_path / "base", "qwen2")
    model = train(tmp_path / "lora", base, target_modules=["q_proj", "embed_tokens"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if trained and name.endswith("q_proj.base_layer.bias"):
                parameter.add_(0.5)
        wanted = model(IDS).logits
    biases = {name: tensor for name, tensor in model.state_dict().items() if name.endswith("base_layer.bias")}
    assert biases
    save_file(load_file(tmp_path / "lora" / WEIGHTS) | biases, tmp_path / "lora" / WEIGHTS)
    made, out = moved(tmp_path / "lora", base)
    assert torch.allclose(strict_logits(out, base), wanted, atol=1e-4)
    assert made.report.coverage == 1.0


def test_trained_norms_are_left_out_and_the_verdict_is_doubtful(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", "llama")
    train(tmp_path / "lora", base, modules_to_save=["input_layernorm", "post_attention_layernorm"])
    made, _ = moved(tmp_path / "lora", base)
    assert made.report.coverage < 0.9
    assert made.report.verdict.startswith("doubtful")
    assert "tensors transferred" in made.report.facts["prediction"]["because"]


def test_a_state_dict_that_was_saved_as_a_whole_is_covered(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", "llama")
    model = train(tmp_path / "lora", base)
    save_file({name: one.contiguous().clone() for name, one in model.state_dict().items()}, tmp_path / "lora" / WEIGHTS)
    made, out = moved(tmp_path / "lora", base)
    assert made.report.coverage == 1.0
    assert made.report.verdict.startswith("likely to hold")
    with torch.no_grad():
        assert torch.allclose(strict_logits(out, base), model(IDS).logits, atol=1e-4)


def test_a_base_model_without_a_config_is_named_with_what_to_do(tmp_path: Path, capsys: Any) -> None:
    from peft_lorasuite.cli.main import main

    base = base_of(tmp_path / "base", "llama")
    train(tmp_path / "lora", base)
    shutil.rmtree(base)
    base.mkdir()
    assert main(["upgrade", str(tmp_path / "lora"), "--to", str(base), "-o", str(tmp_path / "out"), "--quiet"]) == 1
    (tmp_path / "new").mkdir()
    new = base_of(tmp_path / "new", "llama")
    assert main(["upgrade", str(tmp_path / "lora"), "--to", str(new), "-o", str(tmp_path / "out"), "--quiet"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "it is the base model in the config" in error
    assert "--from" in error
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
