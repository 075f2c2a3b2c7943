"""Cross-LoRA: the low-rank form against the paper's dense one, planted pairs, determinism."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pico import pico_model, pico_tokenizer, save_backbone
from torch import Tensor

from peft_lorasuite import Backbone, LoraSuiteError, MapOptions, UpgradeMap, upgrade
from peft_lorasuite.adapters.adapter import Adapter
from peft_lorasuite.linalg.basis import Basis
from peft_lorasuite.linalg.lowrank import LowRank, truncated_svd
from peft_lorasuite.methods.base import MethodInput
from peft_lorasuite.methods.cross_lora import CrossLoraOptions, align_svd, cross_lora
from peft_lorasuite.methods.sections import add_section

WORDS = ["the", "cat", "sat", "on", "mat", "dog", "ran", "to", "red", "sun"]
OPTIONS = MapOptions(layer_map="proportional")
"""No calibration run: Cross-LoRA looks at the weights alone."""


def pico(folder: Path, name: str, seed: int, **values: Any) -> Backbone:
    return Backbone.open(save_backbone(folder, pico_model(name, seed, **values), pico_tokenizer(WORDS)))


def random_adapter(arch: Any, rank: int = 2) -> Adapter:
    """A random LoRA on every part of every layer; the parts of a fused module share their A."""
    generator = torch.Generator().manual_seed(5)
    updates = {}
    for layer in range(arch.layers):
        for site in arch.sites:
            A = torch.randn(rank, arch.shape(site.parts[0])[1], generator=generator)
            for part in site.parts:
                updates[layer, part] = LowRank(A, torch.randn(arch.shape(part)[0], rank, generator=generator))
    return Adapter(arch, updates)


def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


def dense(old: Tensor, new: Tensor, delta: Tensor, k: int, basis: Basis, part: str) -> Tensor:
    """Compute the formulas literally: signs, P_U and P_V by least squares, ``U~_s (U_s^T dW_s V_s) V~_s^T``."""
    U_s, _, Vt_s = torch.linalg.svd(old.double(), full_matrices=False)
    U_t, _, Vt_t = torch.linalg.svd(new.double(), full_matrices=False)
    U_s, V_s, U_t, V_t = U_s[:, :k], Vt_s[:k].T, U_t[:, :k], Vt_t[:k].T
    if part in ("o", "down"):
        sign = torch.sign((U_t * (basis.map_outputs(torch.eye(old.shape[0])).double() @ U_s)).sum(dim=0))
    else:
        sign = torch.sign((V_t * (basis.map_inputs(torch.eye(old.shape[1])).double().T @ V_s)).sum(dim=0))
    U_t, V_t = U_t * sign, V_t * sign
    P_U, P_V = U_t @ torch.linalg.pinv(U_s), V_t @ torch.linalg.pinv(V_s)
    assert (P_U @ U_s - U_t).norm() < 1e-10
    return (P_U @ U_s) @ (U_s.T @ delta.double() @ V_s) @ (P_V @ V_s).T


def test_the_low_rank_form_is_the_papers_dense_formula(tmp_path: Path) -> None:
    old = pico(tmp_path / "old", "llama", 1)
    new = pico(tmp_path / "new", "llama", 2, hidden_size=40, intermediate_size=64, num_attention_heads=5,
               num_key_value_heads=1)  # fmt: skip
    built = UpgradeMap.build(old, new, OPTIONS)
    pair = built.layers[1]
    adapter = random_adapter(old.arch)
    upgraded = upgrade(adapter, built, method="cross-lora", options={"rank": 24}, old=old, new=new).adapter
    for part in old.arch.parts:
        weights = old.part(pair.old, part), new.part(pair.new, part)
        k = min(24, *weights[0].shape, *weights[1].shape)
        wanted = dense(*weights, adapter.updates[pair.old, part].delta_weight(), k, built.basis(pair, part), part)
        assert relative(upgraded.updates[pair.new, part].delta_weight(), wanted.float()) < 0.02  # kept in bfloat16


@pytest.mark.parametrize("part", ["q", "k", "o", "gate", "down"])
def test_under_a_rotation_of_the_hidden_space_the_aligned_part_is_exact(part: str, tmp_path: Path) -> None:
    """Singular vectors turn with the space; what lies outside of the align subspaces is lost, as it must be."""
    old = pico(tmp_path / "old", "llama", 1)
    weight = old.part(0, part)
    size = old.arch.hidden
    Q = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(3)))[0]
    ones = torch.ones(size)
    basis = Basis(Q.T, Q, ones, ones)
    turned = Q @ weight if part in ("o", "down") else weight @ Q.T
    delta = torch.randn(weight.shape, generator=torch.Generator().manual_seed(4))
    U_s, V_s, U_t, V_t = align_svd(weight, turned, 999, basis, part)
    inside = U_s @ U_s.T @ delta @ V_s @ V_s.T
    wanted = Q @ inside if part in ("o", "down") else inside @ Q.T
    assert relative(U_t @ (U_s.T @ delta @ V_s) @ V_t.T, wanted) < 1e-3
    if part in ("q", "o"):  # square: nothing lies outside
        assert relative(inside, delta) < 1e-4


def test_an_identical_backbone_gets_the_update_back(tmp_path: Path) -> None:
    old, new = pico(tmp_path / "old", "llama", 1), pico(tmp_path / "new", "llama", 1)
    adapter = random_adapter(old.arch)
    upgraded = upgrade(
        adapter, add_section(UpgradeMap.build(old, new, OPTIONS), "cross-lora", old, new), method="cross-lora"
    )
    for layer in range(3):
        for part in ("q", "o"):
            wanted, got = (
                adapter.updates[layer, part].delta_weight(),
                upgraded.adapter.updates[layer, part].delta_weight(),
            )
            assert relative(got, wanted) < 0.01  # the section is kept in bfloat16


@pytest.mark.parametrize("names", [("gpt_neox", "llama"), ("llama", "phi3"), ("qwen2", "bloom"), ("gpt2", "falcon")])
def test_any_two_families_meet(names: tuple[str, str], tmp_path: Path) -> None:
    old, new = pico(tmp_path / "old", names[0], 1), pico(tmp_path / "new", names[1], 2)
    adapter = random_adapter(old.arch)
    upgraded = upgrade(adapter, UpgradeMap.build(old, new, OPTIONS), method="cross-lora", old=old, new=new, rank=6)
    common = {part for part in old.arch.parts if part in new.arch.parts}
    assert {part for _, part in upgraded.adapter.updates} >= common
    draft = upgraded.report
    assert 0 < sum(module["norm"] for module in draft.modules) < float("inf")


def test_parts_of_one_side_alone_are_dropped_with_a_reason(tmp_path: Path) -> None:
    old, new = pico(tmp_path / "old", "llama", 1), pico(tmp_path / "new", "gpt_neox", 2, num_hidden_layers=2)
    adapter = random_adapter(old.arch)
    inputs = MethodInput(adapter, UpgradeMap.build(old, new, OPTIONS), old, new)
    result = cross_lora(inputs, CrossLoraOptions())
    matched = {i for i, _ in inputs.map.pairs}
    for (layer, _), reason in result.dropped.items():
        assert reason == (
            "gpt_neox has no gate projection" if layer in matched else "no new layer is matched with this layer"
        )
    assert set(adapter.updates) == {*result.dropped, *result.sources.values()}


def test_the_update_is_the_same_for_the_same_seed(tmp_path: Path) -> None:
    old, new = pico(tmp_path / "old", "llama", 1), pico(tmp_path / "new", "qwen2", 2)
    torch.manual_seed(1)
    built = [
        add_section(UpgradeMap.build(old, new, OPTIONS), "cross-lora", old, new, options={"rank": 8}) for _ in range(2)
    ]
    first, second = (item.sections["svd"].tensors for item in built)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_gain_and_rank_are_options(tmp_path: Path) -> None:
    old, new = pico(tmp_path / "old", "llama", 1), pico(tmp_path / "new", "qwen2", 2)
    built = add_section(UpgradeMap.build(old, new, OPTIONS), "cross-lora", old, new)
    adapter = random_adapter(old.arch)
    once, twice = (upgrade(adapter, built, method="cross-lora", options={"gain": gain}).adapter for gain in (1, 2.0))
    low = upgrade(adapter, built, method="cross-lora", options={"rank": 1}).adapter
    for key, update in once.updates.items():
        assert relative(twice.updates[key].delta_weight(), 2 * update.delta_weight()) < 1e-5
        assert torch.linalg.matrix_rank(low.updates[key].delta_weight(), rtol=1e-4) == 1
    with pytest.raises(LoraSuiteError, match="rank: an option is out of range"):
        upgrade(adapter, built, method="cross-lora", options={"rank": 0})


def test_a_bias_moves_with_the_output_space(tmp_path: Path) -> None:
    old, new = pico(tmp_path / "old", "llama", 1), pico(tmp_path / "new", "llama", 1)
    A, B = torch.randn(2, 32), torch.randn(32, 2)
    bias = torch.randn(32)
    adapter = Adapter(old.arch, {(0, "q"): LowRank(A, B, bias)})
    upgraded = upgrade(adapter, UpgradeMap.build(old, new, OPTIONS), method="cross-lora", old=old, new=new)
    moved = upgraded.adapter.updates[0, "q"].bias
    assert moved is not None
    assert relative(moved, bias) < 0.01


def test_a_random_range_finds_the_leading_singular_vectors() -> None:
    generator = torch.Generator().manual_seed(0)
    U, _ = torch.linalg.qr(torch.randn(90, 60, generator=generator))
    V, _ = torch.linalg.qr(torch.randn(200, 60, generator=generator))
    s = 0.8 ** torch.arange(60)
    for matrix, left, right in (((U * s) @ V.T, U, V), ((V * s) @ U.T, V, U)):
        found = truncated_svd(matrix, 10, seed=3)
        assert relative(found[1], s[:10]) < 1e-4
        assert relative((found[0] * found[1]) @ found[2].T, (left[:, :10] * s[:10]) @ right[:, :10].T) < 1e-3
        assert all(torch.equal(a, b) for a, b in zip(found, truncated_svd(matrix, 10, seed=3), strict=True))
