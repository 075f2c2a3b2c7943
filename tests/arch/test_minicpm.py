"""MiniCPM without its own code: the first release's folder runs through Granite and equals the "llama format"."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from pico import MINICPM, pico_config, pico_model, pico_tokenizer, save_backbone
from transformers import LlamaForCausalLM
from versions import needs

from peft_lorasuite import MapOptions, PeftModel, UpgradeMap
from peft_lorasuite.compat import current_config
from peft_lorasuite.models.backbone import Backbone

IDS = torch.tensor([[1, 17, 40, 3, 99, 58, 7, 110]])
LAYERS = MINICPM["num_hidden_layers"]


class ThresholdedReLU(torch.nn.Module):
    def forward(self, gate: torch.Tensor) -> torch.Tensor:
        return torch.where(gate > 0.3, gate, torch.zeros(()))


def saved(folder: Path, **overrides: Any) -> Path:
    model = pico_model("minicpm", seed=5, **{name: value for name, value in overrides.items() if name != "model_type"})
    return save_backbone(folder, model, pico_tokenizer(["cat", "dog"]), MINICPM | overrides)


@torch.no_grad()
def llama_format(backbone: Backbone, **overrides: Any) -> LlamaForCausalLM:
    """Fold the three multipliers into the weights, as the published conversion does; the head is untied by it."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    values = {name: MINICPM[name] for name in (*names, "num_key_value_heads", "rms_norm_eps")} | overrides
    llama = LlamaForCausalLM(pico_config("llama", **values, tie_word_embeddings=False)).eval()
    weights = {name: backbone.weights[name].clone() for name in backbone.weights}
    head = weights.pop("lm_head.weight", weights["model.embed_tokens.weight"].clone())
    weights["lm_head.weight"] = head / (MINICPM["hidden_size"] / MINICPM["dim_model_base"])
    weights["model.embed_tokens.weight"] *= MINICPM["scale_emb"]
    for name in weights:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weights[name] *= MINICPM["scale_depth"] / LAYERS**0.5
    llama.load_state_dict(weights)
    return llama


@pytest.mark.parametrize("overrides", [{}, {"tie_word_embeddings": False}, {"model_type": "minicpm"}], ids=str)
@torch.no_grad()
def test_the_release_computes_what_the_llama_format_computes(overrides: dict[str, Any], tmp_path: Path) -> None:
    backbone = Backbone.open(str(saved(tmp_path / "plain", **overrides)))
    model = backbone.load(dtype=torch.float32)
    assert type(model).__name__ == "GraniteForCausalLM"
    logits, folded = model(input_ids=IDS).logits, llama_format(backbone)(input_ids=IDS).logits
    assert (logits - folded).abs().max() < 1e-5 * folded.abs().max()
    assert Backbone.open(model).arch.sizes() == backbone.arch.sizes()
    assert backbone.arch.embedding_scale == 12
    assert backbone.arch.residual_scale == pytest.approx(1.4 / LAYERS**0.5)
    assert backbone.arch.tied == overrides.get("tie_word_embeddings", True)


@torch.no_grad()
def test_the_sparse_release_runs_with_its_thresholded_relu(tmp_path: Path) -> None:
    sparse = {"hidden_act": "fatrelu", "hidden_act_param": 0.3}
    backbone = Backbone.open(str(saved(tmp_path / "sparse", **sparse)))
    assert (backbone.arch.activation, backbone.arch.activation_floor) == ("relu", 0.3)
    logits = backbone.load(dtype=torch.float32)(input_ids=IDS).logits
    llama = llama_format(backbone, hidden_act="relu")
    plain = llama(input_ids=IDS).logits
    for layer in range(LAYERS):
        llama.get_submodule(f"model.layers.{layer}.mlp").act_fn = ThresholdedReLU()
    folded = llama(input_ids=IDS).logits
    assert (logits - folded).abs().max() < 1e-5 * folded.abs().max()
    assert (plain - folded).abs().max() > 1e-2 * folded.abs().max()


@torch.no_grad()
def test_the_llama_format_is_read_as_a_llama(tmp_path: Path) -> None:
    plain = Backbone.open(str(saved(tmp_path / "plain")))
    llama = llama_format(plain)
    folded = Backbone.open(str(save_backbone(tmp_path / "folded", llama)))
    assert (folded.arch.family, folded.arch.residual_scale) == ("llama", 1.0)
    ids = torch.tensor([3, 4, 5])
    assert torch.allclose(folded.embedding(ids), plain.embedding(ids), atol=1e-5)
    ratio = plain.arch.residual_scale
    assert torch.allclose(folded.part(1, "o"), plain.part(1, "o") * ratio, atol=1e-6)


@pytest.mark.parametrize("to_llama", [True, False], ids=["to the llama format", "from the llama format"])
def test_an_adapter_moves_between_the_two_formats_exactly(to_llama: bool, tmp_path: Path) -> None:
    plain = saved(tmp_path / "plain")
    llama = llama_format(Backbone.open(plain))
    folded = save_backbone(tmp_path / "folded", llama, pico_tokenizer(["cat", "dog"]))
    old, new = (plain, folded) if to_llama else (folded, plain)
    before = Backbone.open(old).load(dtype=torch.float32)
    torch.manual_seed(3)
    settings = {"r": 3, "target_modules": "all-linear", "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    adapted = peft.get_peft_model(before, peft.LoraConfig(**settings)).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    upgrade_map = UpgradeMap.build(old, new, MapOptions(layer_map="first"))
    moved = PeftModel.from_upgraded(str(new), tmp_path / "adapter", upgrade_map=upgrade_map, dtype="float32")
    with torch.no_grad():
        wanted, got = adapted(IDS).logits, moved(IDS).logits
        with adapted.disable_adapter():
            effect = (wanted - adapted(IDS).logits).norm()
    assert (wanted - got).norm() < 1e-4 * effect


@pytest.mark.parametrize("named", [True, False], ids=["tokenizer class named", "no tokenizer class"])
def test_the_tokenizer_loads_without_the_releases_code(named: bool, tmp_path: Path) -> None:
    folder = saved(tmp_path / "plain")
    if not named:
        needs("transformers", "5.0", "a tokenizer_config.json without tokenizer_class")
        path = folder / "tokenizer_config.json"
        settings = json.loads(path.read_text())
        del settings["tokenizer_class"]
        path.write_text(json.dumps(settings))
    tokenizer = Backbone.open(str(folder)).tokenizer
    assert tokenizer.tokenize("a cat a dog") == ["a", "Ġcat", "Ġ", "a", "Ġdog"]


def test_scaled_rotary_positions_reach_the_model(tmp_path: Path) -> None:
    rope = {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 1e6}
    backbone = Backbone.open(str(saved(tmp_path / "long", **rope)))
    assert backbone.arch.theta(0) == 1e6
    parameters = current_config(backbone.load().config).rope_parameters
    assert (parameters["rope_theta"], parameters["factor"], parameters["rope_type"]) == (1e6, 4.0, "linear")


def test_a_config_without_any_type_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "plain", architectures=None)
    with pytest.raises(ValueError, match=r"config\.json: the config has no model_type"):
        _ = Backbone.open(str(folder)).config
