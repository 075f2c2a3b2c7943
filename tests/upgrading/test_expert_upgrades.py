"""Experts: re-keyed from modules to parameters, matched by their routers, or left out with a reason (C13)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from expert_adapters import split_adapter
from pico import EXPERTS, pico_model, pico_tokenizer, save_backbone
from safetensors.torch import load_file, save_file
from torch import Tensor

from peft_lorasuite import LoraSuiteError, MapOptions, PeftModel, UpgradeMap, upgrade
from peft_lorasuite.cli.main import main
from peft_lorasuite.mapping.same_base import compare_bases
from peft_lorasuite.models.backbone import Backbone
from peft_lorasuite.models.experts import read_expert

WORDS = ["cat", "dog", "red"]
IDS = torch.tensor([[1, 17, 40, 3, 99, 58, 7, 110]])
OPTIONS = MapOptions(layer_map="proportional")
PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def saved(folder: Path, family: str, seed: int = 1, **overrides: Any) -> Path:
    return save_backbone(folder, pico_model(family, seed, **overrides), pico_tokenizer(WORDS))


def adapted(folder: Path, family: str, **overrides: Any) -> Tensor:
    """Write a random LoRA of attention and experts; return the logits with it."""
    torch.manual_seed(1)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], target_parameters=PARAMETERS,
                           init_lora_weights=False, task_type="CAUSAL_LM")  # fmt: skip
    model = peft.get_peft_model(pico_model(family, 1, **overrides), lora).eval()
    model.save_pretrained(folder)
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_c13_modules_of_experts_become_the_parameters_of_today(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = saved(tmp_path / "base", family)
    split_adapter(family, tmp_path / "adapter")
    call = ["upgrade", tmp_path / "adapter", "--from", base, "--to", base, "-o", tmp_path / "out"]
    assert main([str(word) for word in call]) == 0
    assert capsys.readouterr().out.startswith("lossless: both backbones hold the same weights; logits of both adapted")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert len(config["target_parameters"]) == 9  # two of the experts and the router, in three layers
    assert config["r"] == 4  # gate and up have different A
    assert main(["check", str(tmp_path / "out"), "--base", str(base), "--for", "vllm"]) == 1
    said = capsys.readouterr().out
    assert "a LoRA of experts" in said  # no engine has been tried with the stacked factors
    report = json.loads((tmp_path / "out" / "lorasuite_report.json").read_text())
    assert set(report["tensors"].values()) == {"transferred"}
    assert report["coverage"] == 1
    folders = [str(tmp_path / name) for name in ("adapter", "out")]
    by_peft, ours = (peft.PeftModel.from_pretrained(pico_model(family, 1), folder).eval() for folder in folders)
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS).logits, by_peft(IDS).logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", EXPERTS)
def test_the_same_mixture_of_experts_is_rekeyed(family: str, tmp_path: Path) -> None:
    base = saved(tmp_path / "base", family)
    wanted = adapted(tmp_path / "adapter", family)
    upgraded = PeftModel.from_upgraded(base, tmp_path / "adapter", source_model=base)
    assert upgraded.upgrade_report.method["name"] == "rekey"
    assert "experts" in upgraded.upgrade_report.facts["rekey"]["equal"]
    with torch.no_grad():
        torch.testing.assert_close(upgraded(IDS).logits, wanted, rtol=1e-4, atol=1e-5)
    tensors = [load_file(tmp_path / "adapter" / "adapter_model.safetensors")]
    upgrade(tmp_path / "adapter", UpgradeMap.build(base, base, OPTIONS), old=base, new=base, method="lorasuite").save(
        tmp_path / "out"
    )
    tensors.append(load_file(tmp_path / "out" / "adapter_model.safetensors"))
    assert tensors[0].keys() == tensors[1].keys()


def test_experts_in_another_order_are_other_weights(tmp_path: Path) -> None:
    model = pico_model("mixtral", 1)
    old = Backbone.open(saved(tmp_path / "old", "mixtral"))
    with torch.no_grad():
        for layer in model.model.layers:
            for weight in (layer.mlp.gate.weight, layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
                weight.copy_(weight[[1, 2, 0]])
    new = Backbone.open(save_backbone(tmp_path / "new", model, pico_tokenizer(WORDS)))
    assert compare_bases(old, new).difference == "the experts differ (layer 0, router)"


PAIRS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "another number": ("mixtral", "qwen3_moe", {"num_experts": 4}, "the old layers have 3 experts and the new ones 4"),
    "none": ("qwen3_moe", "llama", {}, "llama has no experts"),
    "not in this layer": ("mixtral", "qwen3_moe", {"mlp_only_layers": [1]}, "qwen3_moe has no experts in layer 1"),
}  # fmt: skip


@pytest.mark.parametrize("kind", PAIRS)
def test_experts_without_a_counterpart_are_reported_and_attention_is_transferred(kind: str, tmp_path: Path) -> None:
    old, new, overrides, reason = PAIRS[kind]
    folders = saved(tmp_path / "old", old), saved(tmp_path / "new", new, 2, **overrides)
    adapted(tmp_path / "adapter", old)
    built = UpgradeMap.build(*folders, OPTIONS)
    upgraded = upgrade(tmp_path / "adapter", built, method="lorasuite", old=folders[0], new=folders[1])
    upgraded.save(tmp_path / "out")
    fates = upgraded.report.tensors
    experts = {name: fate for name, fate in fates.items() if "experts" in name}
    assert {fates[name] for name in fates if name not in experts} == {"transferred"}
    lost = {fate for name, fate in experts.items() if kind != "not in this layer" or ".1." in name}
    assert all(fate.startswith("not transferred: ") and reason in fate for fate in lost), lost
    model = peft.PeftModel.from_pretrained(pico_model(new, 2, **overrides), str(tmp_path / "out"))
    found = model.load_adapter(str(tmp_path / "out"), "default")
    assert not found.missing_keys
    assert not found.unexpected_keys


@pytest.mark.parametrize(("old", "new"), [("llama", "mixtral"), ("mixtral", "gpt_oss")])
def test_between_other_weights_something_is_transferred(old: str, new: str, tmp_path: Path) -> None:
    folders = saved(tmp_path / "old", old), saved(tmp_path / "new", new, 2)
    if old == "llama":
        config = peft.LoraConfig(target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        peft.get_peft_model(pico_model(old, 1), config).save_pretrained(tmp_path / "adapter")
    else:
        adapted(tmp_path / "adapter", old)
    upgraded = upgrade(
        tmp_path / "adapter", UpgradeMap.build(*folders, OPTIONS), method="lorasuite", old=folders[0], new=folders[1]
    )
    fates = {name: fate for name, fate in upgraded.report.tensors.items() if fate != "transferred"}
    assert all("mlp" in name and "mixtral has no" in fate for name, fate in fates.items())
    assert bool(fates) == (old == "llama")
    assert len(upgraded.adapter.experts) == (27 if old == "mixtral" else 0)
    crossed = upgrade(
        tmp_path / "adapter", UpgradeMap.build(*folders, OPTIONS), method="cross-lora", old=folders[0], new=folders[1]
    ).report.tensors
    reasons = {fate.split(": ")[-1] for name, fate in crossed.items() if "experts" in name}
    assert reasons == ({"cross-lora does not transfer experts"} if old == "mixtral" else set())


def packed(folder: Path, place: Path) -> Path:
    """Copy a GPT-OSS with its experts as MXFP4 stores them; all other weights are plain."""
    shutil.copytree(folder, place)
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))
    tensors = load_file(place / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj") and "experts" in name]:
        count, into, out = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = torch.zeros(count, out, into // 32, 16, dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.zeros(count, out, into // 32, dtype=torch.uint8)
    save_file(tensors, place / "model.safetensors", {"format": "pt"})
    return place


def test_quantized_experts_do_not_keep_attention_from_being_mapped(tmp_path: Path) -> None:
    plain, other = saved(tmp_path / "oss", "gpt_oss"), saved(tmp_path / "other", "gpt_oss", 2)
    old = packed(plain, tmp_path / "packed")
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    peft.get_peft_model(pico_model("gpt_oss", 1), config).save_pretrained(tmp_path / "adapter")
    built = [UpgradeMap.build(one, other, OPTIONS) for one in (old, plain)]
    one, two = (upgrade(tmp_path / "adapter", pair, method="lorasuite").adapter.updates for pair in built)
    assert all(torch.equal(one[key].delta_weight(), two[key].delta_weight()) for key in two)
    copies = (
        Backbone.open(packed(plain, tmp_path / "copy" / "oss")),
        Backbone.open(saved(tmp_path / "copy" / "oss-BF16", "gpt_oss")),
    )
    found = compare_bases(*copies)
    assert found.same
    assert found.unread == ("experts",)
    with pytest.raises(LoraSuiteError, match="the weights are quantized"):
        read_expert(copies[0], 0, 0, "down")
