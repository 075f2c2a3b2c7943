"""Adapters of every type under names of wrappers, other classes and other tools: nothing is silently left out (A1)."""

from __future__ import annotations

import shutil
from typing import Any

import added
import peft
import pytest
import torch
from added import identity_map
from random_adapter import write_random_adapter
from safetensors.torch import load_file, save_file
from versions import needs

from peft_lorasuite import upgrade
from peft_lorasuite.adapters.peft_model import load_with_adapter
from peft_lorasuite.adapters.reading import read_adapter
from peft_lorasuite.io.source import Source
from peft_lorasuite.models.backbone import Backbone

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"
NAMES = ["q_proj", "v_proj", "down_proj"]
TYPES: dict[str, Any] = {
    "LoRA": peft.LoraConfig(r=4, target_modules=NAMES, rank_pattern={"q_proj": 2}, use_rslora=True),
    "DoRA": peft.LoraConfig(r=4, target_modules=NAMES, use_dora=True),
    "AdaLoRA": peft.AdaLoraConfig(init_r=4, target_r=2, target_modules=NAMES, total_step=10),
    "LoHa": peft.LoHaConfig(r=4, target_modules=NAMES),
    "LoKr": peft.LoKrConfig(r=4, target_modules=NAMES),
    "IA3": peft.IA3Config(target_modules=NAMES, feedforward_modules=["down_proj"]),
    "VeRA": peft.VeraConfig(r=4, target_modules=["q_proj"]),
    "VB-LoRA": peft.VBLoRAConfig(r=4, num_vectors=20, vector_length=4, topk=2, target_modules=["q_proj"]),
    "OFT": peft.OFTConfig(r=0, oft_block_size=4, target_modules=NAMES, use_cayley_neumann=False),
}


def with_name(name: str, adapter: str = "my-task") -> str:
    """Put the name of the adapter where PEFT has it in memory."""
    stem, dot, end = name.rpartition(".")
    return f"{stem}.{adapter}.{end}" if dot and end in ("weight", "bias") else f"{name}.{adapter}"


SPELLINGS = {
    "torch.compile outside": lambda name, _: f"_orig_mod.{name}",
    "torch.compile": lambda name, _: name.replace(PREFIX, f"{PREFIX}_orig_mod."),
    "torch.compile per layer": lambda name, _: name.replace(".self_attn", "._orig_mod.self_attn"),
    "FSDP": lambda name, _: name.replace(".mlp", "._fsdp_wrapped_module.mlp"),
    "text tower, new class": lambda name, _: name.replace("model.layers", "model.language_model.layers"),
    "text tower, old class": lambda name, _: name.replace(f"{PREFIX}model.", f"{PREFIX}language_model.model."),
    "no prefix": lambda name, _: name.removeprefix(PREFIX),
    "AutoModel": lambda name, _: name.replace(f"{PREFIX}model.", PREFIX),
    "half of the names": lambda name, number: name.removeprefix(f"{PREFIX}model.") if number % 2 else name,
    "adapter name": lambda name, _: with_name(name),
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    home = tmp_path_factory.mktemp("pair")
    old = added.base(home / "old")
    new = added.base(home / "new", seed=2, hidden_size=40, num_attention_heads=4)
    return old, new, identity_map(old, new)


@torch.no_grad()
def trained(old, folder, config: Any) -> torch.Tensor:
    """Save an adapter with random weights; return the logits of its model."""
    return write_random_adapter(old.model(), config, folder)(torch.tensor([[3, 4, 5, 6, 7]])).logits


def respelled(folder, target, change):
    shutil.copytree(folder, target)
    tensors = load_file(folder / WEIGHTS)
    save_file({change(name, n): value for n, (name, value) in enumerate(tensors.items())}, target / WEIGHTS)
    return target


@pytest.mark.parametrize("kind", TYPES)
def test_a1_the_old_model_gets_the_update_under_any_names(kind, pair, tmp_path):
    if kind == "VeRA":
        needs("peft", "0.21", "a VeRA with save_projection")
    old, _, _ = pair
    ids = torch.tensor([[3, 4, 5, 6, 7]])
    wanted = trained(old, tmp_path / "adapter", TYPES[kind])
    backbone = Backbone.open(old.folder, dtype="float32")
    with torch.no_grad():
        effect = (wanted - backbone.load()(ids).logits).norm()
    plain = read_adapter(Source(str(tmp_path / "adapter"), "adapter"), backbone.arch, old=backbone)
    for number, (spelling, change) in enumerate(SPELLINGS.items()):
        folder = respelled(tmp_path / "adapter", tmp_path / str(number), change)
        adapter = read_adapter(Source(str(folder), "adapter"), backbone.arch, old=backbone)
        with load_with_adapter(backbone, adapter) as model, torch.no_grad():
            got = model(ids).logits
        assert float((got - wanted).norm() / effect) < 1e-3, spelling
        assert not adapter.unused, spelling
        assert {name for names in adapter.names.values() for name in names} == set(load_file(folder / WEIGHTS)), (
            spelling
        )
        for key, update in plain.updates.items():
            same = adapter.updates[key].delta_weight()
            torch.testing.assert_close(same, update.delta_weight(), rtol=1e-3, atol=1e-5, msg=spelling)


@pytest.mark.parametrize(
    ("spelling", "method"),
    [("half of the names", "transplant"), ("text tower, new class", "transplant"), ("torch.compile", "distill")],
)
def test_a1_methods_of_behavior_give_the_same_result(spelling, method, pair, tmp_path):
    old, new, upgrade_map = pair
    trained(old, tmp_path / "adapter", TYPES["LoRA"])
    folder = respelled(tmp_path / "adapter", tmp_path / "other", SPELLINGS[spelling])
    options = {"extra": 50, "length": 4} | ({"epochs": 1} if method == "distill" else {})
    prompts = ["the cat sat on", "the dog ran to", "the red mat", "big sun in the"] * 4
    results = [
        upgrade(one, upgrade_map, method=method, options=options, old=old.folder, new=new.folder, prompts=prompts)
        for one in (tmp_path / "adapter", folder)
    ]
    assert results[0].report.verdict == results[1].report.verdict
    for key, update in results[0].adapter.updates.items():
        torch.testing.assert_close(results[1].adapter.updates[key].delta_weight(), update.delta_weight())
