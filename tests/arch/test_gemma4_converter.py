"""Gemma 4: heads of two sizes, partial rotation across a head, shared keys and values, layer scales."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pico import GEMMA4_SHARED, pico_config, pico_model, save_backbone
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from peft_lorasuite import LoraSuiteError
from peft_lorasuite.arch.config_values import check_architecture, read_config_values
from peft_lorasuite.arch.layout import split
from peft_lorasuite.arch.registry import UndescribedLayoutError, architecture
from peft_lorasuite.arch.spec import Heads
from peft_lorasuite.mapping.samples import hash_weights
from peft_lorasuite.models.backbone import Backbone
from peft_lorasuite.models.derived import read_architecture

IDS = torch.tensor([[1, 17, 40, 3, 99, 58, 7, 110]])
TIED = {"attention_k_eq_v": True}


def test_layers_have_heads_units_and_rotations_of_their_own() -> None:
    arch = architecture(pico_config("gemma4_text", **GEMMA4_SHARED, **TIED))
    views = [arch.in_layer(layer) for layer in range(4)]
    assert [view.heads for view in views] == [Heads(4, 2, 16), Heads(4, 1, 32)] * 2
    assert [view.intermediate for view in views] == [48, 48, 96, 96]
    assert [view.rotary_size for view in views] == [16, 8, 16, 8]
    assert [view.shape("o") for view in views] == [(32, 64), (32, 128)] * 2
    assert arch.source(1, "v") == (1, "k")
    assert [arch.source(layer, "v") for layer in (2, 3)] == [(0, "v"), (1, "k")]
    assert arch.gives(1, "k") == ("k", "v")
    assert arch.gives(0, "k") == ("k",)
    assert arch.gives(3, "k") == ()
    assert [layer for layer, site in arch.modules if site.parts == ("v",)] == [0]


def test_the_counts_of_released_models() -> None:
    """The 31B has 4 key/value heads of 512 in the layers with full attention, and 16 of 256 in the others."""
    kinds = (["sliding_attention"] * 5 + ["full_attention"]) * 10
    arch = architecture(
        pico_config(
            "gemma4_text", hidden_size=5376, num_hidden_layers=60, num_attention_heads=32, num_key_value_heads=16,
            intermediate_size=21504, head_dim=256, global_head_dim=512, num_global_key_value_heads=4, layer_types=kinds,
            attention_k_eq_v=True, vocab_size=262144,
        )
    )  # fmt: skip
    assert (arch.in_layer(4).shape("k"), arch.in_layer(5).shape("k")) == ((4096, 5376), (2048, 5376))
    assert arch.in_layer(5).rotary_size == 128
    assert arch.theta(5) == pytest.approx(1e6**0.25)
    assert arch.parameter_count() == pytest.approx(30.7e9, rel=0.02)


@pytest.mark.parametrize("values", [{"enable_moe_block": True, "num_experts": 4}, {"num_kv_shared_layers": 3}])
def test_experts_and_draft_models_are_as_if_they_had_no_converter(values: dict[str, Any]) -> None:
    config = pico_config("gemma4_text", **values)
    with pytest.raises(UndescribedLayoutError, match="this Gemma 4 has experts, or no keys and values of its own"):
        architecture(config)
    assert read_config_values(config) == {}


def test_experts_are_read_from_the_model() -> None:
    values = {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24}
    arch = read_architecture(pico_config("gemma4_text", enable_moe_block=True, **values))
    assert not arch.has_converter


@pytest.mark.parametrize("values", [{}, GEMMA4_SHARED, TIED])
@pytest.mark.parametrize("model_type", ["gemma4", "gemma4_text"])
def test_an_architecture_can_be_checked_without_its_backbone(model_type: str, values: dict[str, Any]) -> None:
    config = pico_config(model_type, **values)
    check_architecture(architecture(config), read_config_values(config))


@torch.no_grad()
def test_the_two_halves_of_a_pair_rotate_together_in_the_order_of_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotate the projections' output, with its rows in the order of `split`, by the frequencies of the architecture."""
    model = pico_model("gemma4_text", seed=3)
    arch = architecture(model.config)
    layer = model.model.layers[1].self_attn
    seen: dict[str, Tensor] = {}

    def spy(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any) -> Any:
        if module is layer:
            seen.update(q=q, k=k)
        return sdpa_attention_forward(module, q, k, v, mask, **options)

    AttentionInterface.register("spy", spy)
    AttentionMaskInterface.register("spy", sdpa_mask)
    monkeypatch.setattr(model.config, "_attn_implementation", "spy")
    for part in "qk":
        getattr(layer, f"{part}_norm").weight.fill_(1.0)
        module = getattr(layer, f"{part}_proj")
        module.register_forward_hook(lambda _, args, out, part=part: seen.update({f"{part} out": out[0]}))
    model(input_ids=IDS)
    own = arch.in_layer(1)
    half, size = own.rotary_size // 2, own.heads.size
    angles = torch.arange(IDS.shape[1])[:, None] * arch.theta(1) ** -(torch.arange(half) / half)
    for part in "qk":
        rows = split(seen[f"{part} out"].T, arch.site(part), own)[part]
        heads = torch.nn.functional.rms_norm(rows.reshape(-1, size, IDS.shape[1]).transpose(1, 2), (size,), eps=1e-6)
        left, right = heads[..., :half], heads[..., half : 2 * half]
        turned = [left * angles.cos() - right * angles.sin(), right * angles.cos() + left * angles.sin()]
        wanted = torch.cat([*turned, heads[..., 2 * half :]], dim=-1)
        native = seen[part][0].transpose(1, 2).reshape(-1, IDS.shape[1])
        got = split(native, arch.site(part), own)[part].reshape(-1, size, IDS.shape[1]).transpose(1, 2)
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_keys_that_are_stored_but_not_read_do_not_count(tmp_path: Path) -> None:
    """The released E2B and E4B store keys and values of all layers."""
    model = pico_model("gemma4_text", **GEMMA4_SHARED)
    folder = save_backbone(tmp_path / "model", model)
    weights = load_file(folder / "model.safetensors")
    prefix = "model.layers.3.self_attn"
    weights |= {f"{prefix}.k_proj.weight": torch.ones(64, 32), f"{prefix}.k_norm.weight": torch.ones(32)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert hash_weights(Backbone.open(str(folder))) == hash_weights(Backbone.open(model))


def test_layer_scales_are_part_of_the_weights(tmp_path: Path) -> None:
    model = pico_model("gemma4_text")
    backbone = Backbone.open(str(save_backbone(tmp_path / "model", model)))
    scales = [float(layer.layer_scalar) for layer in model.model.layers]
    assert backbone.layer_scales.at(1) == scales[1]
    assert backbone.layer_scales.before(2) == pytest.approx(scales[0] * scales[1])
    gain = model.model.layers[2].post_attention_layernorm.weight / (scales[0] * scales[1])
    torch.testing.assert_close(backbone.gain(2, "o"), gain)
    known = hash_weights(backbone)
    model.model.layers[0].layer_scalar *= 1.5
    assert hash_weights(Backbone.open(model)) != known


def test_a_layer_scale_of_zero_is_an_error() -> None:
    model = pico_model("gemma4_text")
    model.model.layers[1].layer_scalar.zero_()
    wanted = r"model.layers.1.layer_scalar: a layer scale is not one positive number \(got \[0.0\]\)"
    with pytest.raises(LoraSuiteError, match=wanted):
        Backbone.open(model).gain(2, "o")
