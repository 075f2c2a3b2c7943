"""The converters of mixtures of experts against small transformers models: attention, experts, routers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pico import EXPERTS, pico_config, pico_model, pico_tokenizer, save_backbone
from torch import nn

from peft_lorasuite.arch.registry import architecture
from peft_lorasuite.arch.spec import ATTENTION, Architecture
from peft_lorasuite.mapping.samples import hash_weights
from peft_lorasuite.models.backbone import Backbone
from peft_lorasuite.models.experts import read_expert, read_router

CASES: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in EXPERTS),
    ("gpt_oss", {"attention_bias": False}),
    ("qwen3_moe", {"attention_bias": True, "mlp_only_layers": [1]}),
    ("qwen3_moe", {"decoder_sparse_step": 2}),
]
FAMILIES = pytest.mark.parametrize(("family", "overrides"), CASES, ids=str)


@FAMILIES
def test_the_sites_are_the_linear_modules_outside_the_experts(family: str, overrides: dict[str, Any]) -> None:
    model, arch = pico_model(family, **overrides), architecture(pico_config(family, **overrides))
    assert arch.experts is not None
    assert arch.parts == tuple(part for part in ATTENTION if part != "q_gate")
    layers = model.get_submodule(arch.layer_path)
    assert len(layers) == arch.layers
    for number, layer in enumerate(layers):
        linear = {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
        plain = {name for name in linear if name.startswith("mlp.")}
        assert set(linear) - plain == {site.path for site in arch.sites}
        assert (number in arch.experts.dense) == bool(plain)
        for site in arch.sites:
            assert (linear[site.path].bias is not None) == site.bias
            assert tuple(linear[site.path].weight.shape) == arch.shape(site.parts[0])
        assert layer.get_submodule(arch.experts.norm).weight.shape == (arch.hidden,)
    assert Architecture.from_dict(arch.to_dict()) == arch
    assert model.model.rotary_emb.inv_freq[1] == pytest.approx(arch.theta(0) ** (-2 / arch.rotary_size), rel=1e-4)


@FAMILIES
@torch.no_grad()
def test_experts_and_routers_are_read_as_the_model_uses_them(
    family: str, overrides: dict[str, Any], tmp_path: Path
) -> None:
    model = pico_model(family, 1, **overrides)
    model.config._name_or_path = str(save_backbone(tmp_path, model, pico_tokenizer(["cat"])))
    stored, loaded = Backbone.open(tmp_path), Backbone.open(model)
    assert hash_weights(stored) == hash_weights(loaded)
    arch = stored.arch
    assert arch.experts is not None
    x = torch.randn(5, arch.hidden, generator=torch.Generator().manual_seed(0))
    for layer in [number for number in range(arch.layers) if number not in arch.experts.dense]:
        module = model.get_submodule(f"{arch.layer_path}.{layer}.{arch.experts.path}")
        router = model.get_submodule(f"{arch.layer_path}.{layer}.{arch.experts.router}").weight
        for backbone in (stored, loaded):
            assert torch.equal(read_router(backbone, layer), router)
            gate, up, down = (read_expert(backbone, layer, 2, part) for part in ("gate", "up", "down"))
            first, second = x @ gate.T, x @ up.T
            if family == "gpt_oss":
                biases = module.gate_up_proj_bias[2], module.down_proj_bias[2]
                both = torch.stack([first, second], dim=-1).flatten(1) + biases[0]
                wanted = module._apply_gate(both) @ down.T + biases[1]
            else:
                wanted = (module.act_fn(first) * second) @ down.T
            got = module(x, torch.full((5, 1), 2), torch.ones(5, 1))
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
