"""Names of an adapter's tensors, as wrappers, other classes and other tools save them: one line of the table each."""

from __future__ import annotations

import json
import shutil

import command_fixtures
import pytest
import torch
from command_fixtures import Pair
from pico import pico_config, pico_model, pico_tokenizer, save_backbone
from safetensors.torch import load_file, save_file

from peft_lorasuite import Backbone, LoraSuiteError, upgrade
from peft_lorasuite.adapters.adapter import Adapter
from peft_lorasuite.adapters.key_names import parse_name
from peft_lorasuite.adapters.loading import adapter_folder
from peft_lorasuite.adapters.peft_model import load_with_adapter
from peft_lorasuite.adapters.reading import read_adapter
from peft_lorasuite.arch.registry import architecture
from peft_lorasuite.io.source import Source

pair = command_fixtures.pair
PREFIX = "base_model.model."
Q = "layers.1.self_attn.q_proj"
WEIGHTS = "adapter_model.safetensors"

NAMES = {
    "PEFT": (f"{PREFIX}model.{Q}.lora_A.weight", f"{PREFIX}model.{Q}.lora_A.weight"),
    "no prefix (AutoModel)": (f"{Q}.lora_A.weight", f"{PREFIX}model.{Q}.lora_A.weight"),
    "PEFT on AutoModel": (f"{PREFIX}{Q}.lora_B.weight", f"{PREFIX}model.{Q}.lora_B.weight"),
    "prefix twice": (f"{PREFIX}{PREFIX}model.{Q}.lora_A.weight", f"{PREFIX}model.{Q}.lora_A.weight"),
    "torch.compile": (f"{PREFIX}_orig_mod.model.{Q}.lora_A.weight", f"{PREFIX}model.{Q}.lora_A.weight"),
    "torch.compile outside": (f"_orig_mod.{PREFIX}model.{Q}.lora_A.weight", f"{PREFIX}model.{Q}.lora_A.weight"),
    "torch.compile per layer": (
        f"{PREFIX}model.layers.1._orig_mod.self_attn.q_proj.lora_A.weight", f"{PREFIX}model.{Q}.lora_A.weight"
    ),
    "FSDP": (
        f"{PREFIX}model.layers.1._fsdp_wrapped_module.self_attn.q_proj.lora_A.weight",
        f"{PREFIX}model.{Q}.lora_A.weight",
    ),
    "checkpointing": (
        f"{PREFIX}model.layers.1._checkpoint_wrapped_module.self_attn.q_proj.lora_A.weight",
        f"{PREFIX}model.{Q}.lora_A.weight",
    ),
    "DDP": (f"module.{PREFIX}model.{Q}.lora_A.weight", f"{PREFIX}model.{Q}.lora_A.weight"),
    "text tower, new class": (f"{PREFIX}model.language_model.{Q}.lora_A.weight", f"{PREFIX}model.{Q}.lora_A.weight"),
    "text tower, old class": (f"{PREFIX}language_model.model.{Q}.lora_A.weight", f"{PREFIX}model.{Q}.lora_A.weight"),
    "adapter name": (f"{PREFIX}model.{Q}.lora_A.default.weight", f"{PREFIX}model.{Q}.lora_A.weight"),
    "another adapter name": (f"{PREFIX}model.{Q}.lora_B.my-task.weight", f"{PREFIX}model.{Q}.lora_B.weight"),
    "magnitude": (f"{PREFIX}model.{Q}.lora_magnitude_vector.weight", f"{PREFIX}model.{Q}.lora_magnitude_vector"),
    "magnitude with a name": (
        f"{PREFIX}model.{Q}.lora_magnitude_vector.default", f"{PREFIX}model.{Q}.lora_magnitude_vector"
    ),
    "embedding factor": (
        f"{PREFIX}model.embed_tokens.lora_embedding_A.default", f"{PREFIX}model.embed_tokens.lora_embedding_A"
    ),
    "trained head": (f"{PREFIX}lm_head.modules_to_save.default.weight", f"{PREFIX}lm_head.weight"),
    "trained head, no name": (f"{PREFIX}lm_head.modules_to_save.weight", f"{PREFIX}lm_head.weight"),
    "DDP inside": (f"{PREFIX}module.model.{Q}.lora_A.weight", f"{PREFIX}model.{Q}.lora_A.weight"),
    "Fabric": (f"_forward_module.{PREFIX}model.{Q}.lora_A.weight", f"{PREFIX}model.{Q}.lora_A.weight"),
    "FSDP outside, on each level": (
        f"_fsdp_wrapped_module.{PREFIX}model._fsdp_wrapped_module.layers.1._checkpoint_wrapped_module.self_attn."
        "_fsdp_wrapped_module.q_proj._orig_mod.lora_A._fsdp_wrapped_module.default.weight",
        f"{PREFIX}model.{Q}.lora_A.weight",
    ),
    "TRL's value head": (f"pretrained_model.{PREFIX}model.{Q}.lora_A.weight", f"{PREFIX}model.{Q}.lora_A.weight"),
    "sentence-transformers": (f"0.auto_model.{Q}.lora_A.weight", f"{PREFIX}model.{Q}.lora_A.weight"),
    "adapter name with spaces and signs": (
        f"{PREFIX}model.{Q}.lora_A.v2 (final)_[x].weight", f"{PREFIX}model.{Q}.lora_A.weight"
    ),
    "adapter named weight": (f"{PREFIX}model.{Q}.lora_A.weight.weight", f"{PREFIX}model.{Q}.lora_A.weight"),
    "adapter name of a bias": (f"{PREFIX}model.{Q}.lora_B.default.bias", f"{PREFIX}model.{Q}.lora_B.bias"),
    "thinker of an Omni model": (f"{PREFIX}thinker.model.{Q}.lora_A.weight", f"{PREFIX}model.{Q}.lora_A.weight"),
    "text tower of Idefics": (f"{PREFIX}model.text_model.{Q}.lora_A.weight", f"{PREFIX}model.{Q}.lora_A.weight"),
    "head of the old class": (f"{PREFIX}language_model.lm_head.lora_A.weight", f"{PREFIX}lm_head.lora_A.weight"),
    "text tower's embedding": (
        f"{PREFIX}model.language_model.embed_tokens.modules_to_save.weight", f"{PREFIX}model.embed_tokens.weight"
    ),
}  # fmt: skip
"""Kind -> name as it is saved, name that PEFT gives it on the backbone."""
LEFT_OUT = {
    "vision tower": f"{PREFIX}model.vision_tower.encoder.layers.1.self_attn.q_proj.lora_A.weight",
    "vision model": f"{PREFIX}vision_model.layers.1.self_attn.q_proj.lora_A.weight",
    "visual": f"{PREFIX}model.visual.blocks.1.attn.qkv.lora_A.weight",
    "audio tower": f"{PREFIX}audio_tower.layers.1.self_attn.q_proj.lora_A.weight",
    "encoder of another model": f"{PREFIX}model.encoder.layers.1.self_attn.q_proj.lora_A.weight",
    "decoder of another model": f"{PREFIX}model.decoder.layers.1.self_attn.q_proj.lora_A.weight",
    "text tower of CLIP": f"{PREFIX}text_model.encoder.layers.1.self_attn.q_proj.lora_A.weight",
    "resampler": f"{PREFIX}model.resampler.layers.1.self_attn.q_proj.lora_A.weight",
    "vision tower of MiniCPM-V": f"{PREFIX}vpm.encoder.layers.1.self_attn.q_proj.lora_A.weight",
    "vision tower of LLaVA": (
        f"{PREFIX}model.vision_tower.vision_tower.vision_model.encoder.layers.1.self_attn.q_proj.lora_A.weight"
    ),
    "talker of an Omni model": f"{PREFIX}talker.model.layers.1.self_attn.q_proj.lora_A.weight",
    "head of a talker": f"{PREFIX}talker.lm_head.lora_A.weight",
    "embedding of a talker": f"{PREFIX}talker.model.embed_tokens.lora_embedding_A",
    "depth decoder": f"{PREFIX}depth_decoder.model.layers.1.self_attn.q_proj.lora_A.weight",
    "draft layers": f"{PREFIX}model.mtp.layers.1.self_attn.q_proj.lora_A.weight",
    "projector": f"{PREFIX}model.multi_modal_projector.linear_1.lora_A.weight",
    "copy of a trained module": f"{PREFIX}lm_head.original_module.weight",
    "copy under a token adapter": f"{PREFIX}model.embed_tokens.token_adapter.base_layer.weight",
}


@pytest.fixture(scope="module")
def arch(tmp_path_factory):
    folder = save_backbone(tmp_path_factory.mktemp("llama"), pico_model("llama"), pico_tokenizer(["a", "b"]))
    return Backbone.open(folder).arch


@pytest.mark.parametrize("kind", NAMES)
def test_a_saved_name_is_resolved_to_pefts_own(kind, arch):
    saved, wanted = NAMES[kind]
    found = parse_name(saved, arch)
    assert (found.peft_name, found.reason) == (wanted, "")


@pytest.mark.parametrize("kind", LEFT_OUT)
def test_what_is_not_the_text_model_or_only_a_copy_says_so(kind, arch):
    found = parse_name(LEFT_OUT[kind], arch)
    assert found.reason.startswith(("it belongs to ", "a copy of "))
    if found.reason.startswith("it belongs to "):
        assert not found.module.startswith((arch.layer_path, arch.embedding, arch.head))


GEMMA3 = {
    "since transformers 4.52": "model.language_model.layers.1.self_attn.q_proj",
    "before transformers 4.52": "language_model.model.layers.1.self_attn.q_proj",
    "text class": "model.layers.1.self_attn.q_proj",
    "AutoModel of the text class": "layers.1.self_attn.q_proj",
    "AutoModel": "language_model.layers.1.self_attn.q_proj",
}


@pytest.mark.parametrize("family", ["gemma3", "gemma3_text"])
@pytest.mark.parametrize("spelling", GEMMA3)
def test_c10_every_spelling_of_gemma_3_is_that_of_the_backbone(spelling, family):
    arch = architecture(pico_config(family))
    found = parse_name(f"{PREFIX}{GEMMA3[spelling]}.lora_A.weight", arch)
    assert (found.module, found.reason) == (f"{arch.layer_path}.1.self_attn.q_proj", "")


TABLES = {
    "since transformers 4.52": ("model.language_model.embed_tokens", "lm_head"),
    "before transformers 4.52": ("language_model.model.embed_tokens", "language_model.lm_head"),
    "text class": ("model.embed_tokens", "lm_head"),
    "AutoModel": ("language_model.embed_tokens", "lm_head"),
}


@pytest.mark.parametrize("family", ["gemma3", "gemma3_text"])
@pytest.mark.parametrize("spelling", TABLES)
def test_c10_the_token_tables_of_gemma_3_are_found(spelling, family):
    arch = architecture(pico_config(family))
    modules = [parse_name(f"{PREFIX}{path}.modules_to_save.weight", arch).module for path in TABLES[spelling]]
    assert modules == [arch.embedding, arch.head]


def renamed(pair: Pair, folder, change):
    """Copy the adapter with other names for its tensors."""
    shutil.copytree(pair.adapter, folder)
    tensors = load_file(folder / WEIGHTS)
    save_file({change(name, number): tensor for number, (name, tensor) in enumerate(tensors.items())}, folder / WEIGHTS)
    return folder


WRAPPED = {
    "torch.compile": lambda name, _: name.replace(PREFIX, f"{PREFIX}_orig_mod."),
    "half of them": lambda name, number: name.replace(PREFIX, f"{PREFIX}_orig_mod.") if number % 2 else name,
    "text tower": lambda name, _: name.replace("model.layers", "model.language_model.layers"),
    "bare names": lambda name, _: name.removeprefix(f"{PREFIX}model."),
    "adapter name": lambda name, _: name.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default."),
    "FSDP": lambda name, _: name.replace(".self_attn", "._fsdp_wrapped_module.self_attn"),
}


@torch.no_grad()
def logits(pair: Pair, folder) -> torch.Tensor:
    old = Backbone.open(pair.old, dtype="float32")
    adapter: Adapter = read_adapter(Source(str(folder), "adapter"), old.arch)
    with load_with_adapter(old, adapter) as model:
        return model(torch.tensor([[3, 4, 5, 6]])).logits


@pytest.mark.parametrize("kind", WRAPPED)
def test_the_old_model_gets_the_update_whatever_wrapper_saved_it(kind, pair, tmp_path):
    folder = renamed(pair, tmp_path / "adapter", WRAPPED[kind])
    old = Backbone.open(pair.old, dtype="float32")
    with torch.no_grad():
        bare = old.load()(torch.tensor([[3, 4, 5, 6]])).logits
    wanted = logits(pair, pair.adapter)
    assert (wanted - bare).abs().max() > 1e-3
    torch.testing.assert_close(logits(pair, folder), wanted, rtol=1e-5, atol=1e-6)
    by_weights = [upgrade(one, pair.map, method="lorasuite").adapter for one in (folder, pair.adapter)]
    for key, update in by_weights[1].updates.items():
        torch.testing.assert_close(by_weights[0].updates[key].delta_weight(), update.delta_weight())


def test_a_pattern_of_the_config_matches_the_names_that_were_saved(pair, tmp_path):
    folder = renamed(pair, tmp_path / "adapter", WRAPPED["text tower"])
    config = json.loads((folder / "adapter_config.json").read_text())
    chosen = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    patterns = {"alpha_pattern": {"model.language_model.layers.0.self_attn.q_proj": 3 * config["lora_alpha"]}}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": chosen} | patterns))
    plain = renamed(pair, tmp_path / "plain", lambda name, _: name)
    patterns = {"alpha_pattern": {"model.layers.0.self_attn.q_proj": 3 * config["lora_alpha"]}}
    (plain / "adapter_config.json").write_text(json.dumps(config | patterns))
    torch.testing.assert_close(logits(pair, folder), logits(pair, plain), rtol=1e-5, atol=1e-6)
    assert (logits(pair, plain) - logits(pair, pair.adapter)).abs().max() > 1e-4


def test_c12_tensors_that_were_not_gathered_say_how_to_save_again(pair, tmp_path):
    folder = renamed(pair, tmp_path / "adapter", lambda name, _: name)
    tensors = load_file(folder / WEIGHTS)
    save_file({name: tensor if "layers.0" in name else torch.empty(0) for name, tensor in tensors.items()},
              folder / WEIGHTS)  # fmt: skip
    wanted = (
        r"saved under DeepSpeed ZeRO-3 without gathering .*\(got 12 of 18 of shape \(0,\).*; save it again with stage3"
    )
    with pytest.raises(LoraSuiteError, match=wanted):
        upgrade(folder, pair.map, method="lorasuite")
    with pytest.raises(LoraSuiteError, match=wanted):
        adapter_folder(Source(str(folder), "adapter"))


def test_c13_experts_on_a_backbone_without_any_are_reported(pair, tmp_path):
    def expert(name: str, _: int) -> str:
        return name.replace("mlp.down_proj", "mlp.experts.3.down_proj")

    fates = upgrade(
        renamed(pair, tmp_path / "adapter", expert), pair.map, method="lorasuite", old=pair.old, new=pair.new
    ).report.tensors
    assert {fate for name, fate in fates.items() if "experts" in name} == {"not transferred: llama has no such experts"}


def test_a_tensor_that_peft_would_leave_out_is_an_error(pair, tmp_path):
    folder = renamed(pair, tmp_path / "adapter", lambda name, number: name if number else f"{name}.unknown")
    old = Backbone.open(pair.old, dtype="float32")
    adapter = read_adapter(Source(str(pair.adapter), "adapter"), old.arch)
    shutil.rmtree(tmp_path / "copy", ignore_errors=True)
    broken = Adapter(**{**vars(adapter), "source": Source(str(folder), "adapter")})
    with pytest.raises(LoraSuiteError, match="the tensors do not match those of LORA"), load_with_adapter(old, broken):
        pass


def test_the_saved_path_keeps_the_wrappers_that_patterns_match(arch):
    name = f"{PREFIX}model._orig_mod.layers.1.self_attn._orig_mod.q_proj._orig_mod.lora_A.default.weight"
    assert parse_name(name, arch).saved_module == "model._orig_mod.layers.1.self_attn._orig_mod.q_proj"
    assert parse_name("module", arch).module == ""
