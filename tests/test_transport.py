"""Transport: sums against a plain run, planted changes of basis recovered, energy matched, clear errors."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from canon import read, write
from pico import pico_model, pico_tokenizer, save_backbone
from planted import CHANGES, OLD_WORDS
from torch import Tensor

from peft_lorasuite import Backbone, LoraSuiteError, MapOptions, UpgradeMap, upgrade
from peft_lorasuite.adapters.adapter import Adapter
from peft_lorasuite.linalg.lowrank import LowRank
from peft_lorasuite.mapping import moments
from peft_lorasuite.mapping.moments import Moments, gather
from peft_lorasuite.methods.transport import TransportOptions, fit_input, fit_map, matched_rows, shortened
from peft_lorasuite.model import attach
from peft_lorasuite.models.activations import Sampling

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
TEXTS = [
    "".join(random.Random(number).choices([*LETTERS, *(f" {word}" for word in OLD_WORDS)], k=60)) for number in range(9)
]
"""Of so many tokens that the embeddings of what is read span the hidden space: no fit sees the rest."""
EXACT = {"ridge": 1e-6, "tokens": 400}
PARTS = ("q", "k", "v", "o", "down")
"""All but gate and up: an output of 48 units that read 32 dimensions spans 32 directions, and no fit finds the rest."""


def pair(folder: Path, *changes: str, name: str = "llama", **values: Any) -> tuple[Backbone, Backbone]:
    """Save an old backbone and a new one that differs by changes which keep what it computes."""
    old = read(name, 0, **{"tie_word_embeddings": False, **values})
    new, generator = old.copy(), torch.Generator().manual_seed(0)
    for change in changes:
        CHANGES[change](new, generator)
    sides = (save_backbone(folder / side, write(canon), pico_tokenizer(OLD_WORDS))
             for side, canon in (("old", old), ("new", new)))  # fmt: skip
    return Backbone.open(next(sides)), Backbone.open(next(sides))


def random_adapter(arch: Any, parts: tuple[str, ...] = PARTS, rank: int = 3) -> Adapter:
    generator = torch.Generator().manual_seed(5)
    updates = {
        (layer, part): LowRank(
            torch.randn(rank, arch.shape(part)[1], generator=generator) / arch.shape(part)[1] ** 0.5,
            torch.randn(arch.shape(part)[0], rank, generator=generator) / 2,
        )
        for layer in range(arch.layers)
        for part in parts
    }
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM"}
    return Adapter(arch, updates, config)


def logits(model: Any) -> Tensor:
    tokenizer = pico_tokenizer(OLD_WORDS)
    with torch.inference_mode():
        return torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in TEXTS[:2]], dim=1)


def error(old: Backbone, new: Backbone, folder: Path, options: dict[str, Any]) -> float:
    """Error of the new backbone's logits with the carried adapter, relative to the adapter's effect."""
    from peft_lorasuite.adapters import adapter as files

    source = random_adapter(old.arch)
    built = UpgradeMap.build(old, new, calibration=TEXTS)
    built = built.with_section("transport", old, new, options=options, parts=PARTS, calibration=TEXTS)
    carried = upgrade(source, built, method="transport", options=options)
    (folder / "adapter").mkdir()
    files.write(source, folder / "adapter", base=old.name)
    plain = logits(old.load())
    wanted = logits(peft.PeftModel.from_pretrained(old.load(), str(folder / "adapter")))
    got = logits(attach(new.load(), carried))
    return float((got - wanted).norm() / (wanted - plain).norm())


@pytest.mark.parametrize(
    "changes", [("rotated hidden", "turned heads"), ("widened hidden", "permuted heads", "permuted units")]
)
def test_a_planted_change_of_basis_is_recovered(changes: tuple[str, ...], tmp_path: Path) -> None:
    """Sizes are not matched here: heads that are stretched keep no ratio. The maps are kept in bfloat16."""
    assert error(*pair(tmp_path, *changes), tmp_path, {**EXACT, "energy": False}) < 0.05


def test_gradients_reach_what_outputs_do_not(tmp_path: Path) -> None:
    """Gate and up put out only as many directions as they read; the gradients there span all units."""
    old, new = pair(tmp_path, "rotated hidden", "permuted units")
    models = [backbone.load() for backbone in (old, new)]
    old, new = map(Backbone.open, models)
    source = random_adapter(old.arch, ("gate", "up", "k"))
    built = UpgradeMap.build(old, new, calibration=TEXTS)
    exact = upgrade(source, built, method="lorasuite").adapter
    errors = {}
    for outputs in ("outputs", "gradients"):
        options = {**EXACT, "energy": False, "outputs": outputs}
        mapped = built.with_section("transport", old, new, options=options, parts=source.parts, calibration=TEXTS)
        carried = upgrade(source, mapped, method="transport", options=options).adapter
        errors[outputs] = [
            max(relative(carried.updates[1, part].delta(), exact.updates[1, part].delta()) for part in parts)
            for parts in (("gate", "up"), ("k",))
        ]
    assert errors["gradients"][0] < 0.05
    assert errors["outputs"][0] > 0.3
    assert max(errors["gradients"][1], errors["outputs"][1]) < 0.05
    assert all(weight.requires_grad for model in models for weight in model.parameters())


def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


def test_procrustes_recovers_a_rotation_of_the_activations() -> None:
    generator = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(12, 12, generator=generator)).Q[:8]
    y = torch.randn(200, 12, generator=generator) @ Q.T @ Q
    sums = Moments(8, 12)
    sums.add(y @ Q.T, y)
    assert sums.new is not None
    assert (fit_map("procrustes", sums.cross, sums.new, 0.0, "here") - Q).norm() < 1e-4
    R = fit_map("ridge", sums.cross, sums.new, 1e-4, "here")
    assert (y @ (R - Q).T).norm() < 1e-3 * y.norm()


def test_a_map_is_cut_to_the_directions_with_most_energy() -> None:
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([5.0, 4.0, 3.0, 0.01, 0.01])
    y = torch.randn(500, 5, generator=generator) * scales
    R = torch.linalg.qr(torch.randn(7, 5, generator=generator)).Q
    U, M, var = shortened(R, y.T @ y, 3)
    assert U.shape == (7, 3)
    assert M.shape == (3, 5)
    assert (y @ (U @ M - R).T).norm() < 0.01 * y.norm()
    assert (var / (M @ y.T).pow(2).sum(dim=1) - 1).abs().max() < 1e-4
    assert var.tolist() == sorted(var.tolist(), reverse=True)


def test_a_wide_input_is_looked_at_in_random_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "WIDE", 20)
    monkeypatch.setattr(moments, "SKETCH", 16)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(400, 6, generator=generator)
    x, y = hidden @ torch.randn(6, 24, generator=generator), hidden @ torch.randn(6, 40, generator=generator)
    sums = Moments(24, 40)
    sums.add(x[:150], y[:150])
    sums.add(x[150:], y[150:])
    assert sums.sketch is not None
    assert sums.old is None
    fitted = fit_input(sums, TransportOptions(ridge=1e-4, directions=8), "here")
    found = y @ fitted["M"].float().T @ fitted["U"].float().T
    assert (found - x).norm() < 0.02 * x.norm()
    assert float(fitted["rest"].sum()) < 1e-3 * float((x**2).sum())


@pytest.mark.parametrize("names", [("gpt_neox", "phi3"), ("gpt2", "llama")])
def test_the_sums_are_those_of_a_plain_run(
    names: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = (
        Backbone.open(save_backbone(tmp_path / name, pico_model(name, seed), pico_tokenizer(OLD_WORDS)))
        for seed, name in enumerate(names)
    )
    kinds = ["q", "o", "up", "down", "o out", "down out"]
    found = dict(gather(old, new, [(0, 0), (2, 1)], kinds, TEXTS[:3], Sampling(1000)))
    monkeypatch.setattr(moments, "BUDGET", 1)  # one layer a run
    again = dict(gather(old, new, [(0, 0), (2, 1)], kinds, TEXTS[:3], Sampling(1000)))
    for (i, j), sums in found.items():
        for name in kinds:
            x, y = plain(old, i, name), plain(new, j, name)
            assert torch.allclose(sums[name].cross, x.T @ y, atol=1e-3)
            assert torch.allclose(sums[name].new_energy, (y**2).sum(dim=0), atol=1e-3)
            assert torch.equal(sums[name].cross, again[i, j][name].cross)


def plain(backbone: Backbone, layer: int, name: str) -> Tensor:
    """Signals of one module, text by text; the tokenizers are the same: all tokens but the first four count."""
    model, kept = backbone.load(), []
    path = f"{backbone.arch.layer_path}.{layer}.{backbone.arch.site(name.split()[0]).path}"
    module = model.get_submodule(path)

    def hook(module: Any, args: Any, output: Any) -> None:
        values = output - (0 if getattr(module, "bias", None) is None else module.bias) if " out" in name else args[0]
        kept.append(values.detach()[0, 4:])

    handle = module.register_forward_hook(hook)
    with torch.no_grad():
        for text in TEXTS[:3]:
            model(**backbone.tokenizer(text, return_tensors="pt"))
    handle.remove()
    return torch.cat(kept)


@pytest.mark.parametrize("fit", ["ridge", "procrustes"])
def test_the_size_of_an_update_relative_to_its_weight_is_kept(fit: str, tmp_path: Path) -> None:
    """Over the rows of the matched heads alone: the new backbone has heads of its own."""
    old, new = pair(tmp_path, "dead heads", "permuted heads")
    built = UpgradeMap.build(old, new, calibration=TEXTS)
    source = random_adapter(old.arch)
    settings = {"fit": fit, **EXACT}
    built = built.with_section("transport", old, new, options=settings, parts=PARTS, calibration=TEXTS)
    carried = upgrade(source, built, method="transport", options=settings)
    sums = dict(gather(old, new, built.pairs, ["q"], TEXTS, Sampling(400)))
    assert len(built.layers[0].heads) < new.arch.heads.query
    for layers in built.layers:
        found = sums[layers.old, layers.new]["q"]
        assert found.old is not None
        assert found.new is not None
        for part in ("q", "k", "v"):
            left, right = matched_rows(layers, part, old.arch.heads, new.arch.heads)
            before = share(source.updates[layers.old, part].delta()[left], old.part(layers.old, part)[left], found.old)
            update = carried.adapter.updates[layers.new, part].delta()[right]
            after = share(update, new.part(layers.new, part)[right], found.new)
            assert abs(after / before - 1) < 0.05


def share(delta: Tensor, weight: Tensor, gram: Tensor) -> float:
    size = [float(((matrix @ gram) * matrix).sum()) for matrix in (delta, weight)]
    return (size[0] / size[1]) ** 0.5


def test_the_result_is_linear_in_the_gain_and_says_what_it_explains(tmp_path: Path) -> None:
    old, new = pair(tmp_path, "rotated hidden")
    built = UpgradeMap.build(old, new, MapOptions(layer_map="proportional"))
    source = random_adapter(old.arch, ("q", "gate"))
    once, twice = (
        upgrade(source, built, method="transport", options={"gain": gain, "tokens": 200}, old=old, new=new)
        for gain in (1.0, 2.0)
    )
    for key, update in once.adapter.updates.items():
        assert torch.allclose(twice.adapter.updates[key].delta(), 2 * update.delta(), rtol=1e-3, atol=1e-5)
    figures = once.report.modules[0]["figures"]["q"]
    assert 0.5 < figures["explained"] <= 1


def test_a_dead_module_stops_nothing(tmp_path: Path) -> None:
    """``W X = 0``: an inserted layer that does nothing gets an update whose size is not matched."""
    old, new = pair(tmp_path, "rotated hidden")
    with torch.no_grad():
        model = new.load()
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.zero_()
    dead = Backbone.open(save_backbone(tmp_path / "dead", model, pico_tokenizer(OLD_WORDS)))
    built = UpgradeMap.build(old, dead, MapOptions(layer_map="proportional"))
    carried = upgrade(random_adapter(old.arch), built, method="transport", old=old, new=dead)
    downs = [module["figures"]["down"] for module in carried.report.modules if module["figures"].get("down")]
    assert all(figures["factor"] == 1 for figures in downs)


def test_bad_options_and_a_singular_covariance_are_told(tmp_path: Path) -> None:
    bad: list[tuple[dict[str, Any], str]] = [
        ({"fit": "magic"}, "unknown fit"),
        ({"outputs": "magic"}, "unknown choice"),
        ({"tokens": 1}, "too small"),
        ({"ridge": -1}, "too small"),
    ]
    for options, words in bad:
        with pytest.raises(LoraSuiteError, match=words):
            TransportOptions(**options)
    x = torch.zeros(10, 6)
    x[:, 0] = 1
    gram = x.T @ x + torch.diag(torch.tensor([0.0, 0, 0, 0, -1e-3, 0]))
    with pytest.raises(LoraSuiteError, match="singular"):
        fit_map("ridge", x.T @ x, gram + torch.eye(6) * 0, 0.0, "layer 1")
    assert not fit_map("ridge", x.T @ x * 0, x.T @ x * 0, 0.01, "layer 1").any()


def test_the_parts_of_a_fused_module_and_other_families_work(tmp_path: Path) -> None:
    old, new = (
        Backbone.open(save_backbone(tmp_path / name, pico_model(name, seed), pico_tokenizer(OLD_WORDS)))
        for seed, name in enumerate(("gpt_neox", "phi3"))
    )
    built = UpgradeMap.build(old, new, MapOptions(layer_map="proportional"))
    carried = upgrade(random_adapter(old.arch, old.arch.parts), built, method="transport", old=old, new=new)
    assert {part for _, part in carried.adapter.updates} >= {"q", "k", "v", "o", "up", "down"}
