"""The paper's ablations: each option gives a working adapter; on planted depth similarities find the true layers."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from canon import Canon, read, write
from pico import pico_model, pico_tokenizer, save_backbone
from planted import CHANGES, OLD_WORDS
from torch import Tensor

from peft_lorasuite import MapOptions, UpgradeMap
from peft_lorasuite.adapters.adapter import Adapter
from peft_lorasuite.adapters.writing import state_dict
from peft_lorasuite.arch.layout import heads_first
from peft_lorasuite.linalg.assignment import FIXED_PATHS, Pairs, fixed_path
from peft_lorasuite.linalg.lowrank import LowRank
from peft_lorasuite.linalg.similarity import SIMILARITIES
from peft_lorasuite.models.backbone import Backbone
from peft_lorasuite.upgrading.upgrade import Upgraded, upgrade

SMALL: dict[str, Any] = {"tokens": 128, "block": 64}
TEXTS = [" ".join(random.Random(n).choices(OLD_WORDS, k=40)) for n in range(4)]
IDS = torch.randint(100, (2, 16), generator=torch.Generator().manual_seed(0))
OPTIONS = [
    *[{"similarity": name} for name in SIMILARITIES],
    *[{"layer_map": name} for name in FIXED_PATHS],
    {"head_map": "index"},
    {"hidden_map": "polar"},
    {"hidden_map": "identity"},
]


def saved(folder: Path, model: Any) -> str:
    return str(save_backbone(folder, model, pico_tokenizer(OLD_WORDS)))


def random_adapter(folder: Path, model: Any) -> Tensor:
    """Save a random LoRA of a Llama; return the logits of the model with it."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(model, config)
    tuned.save_pretrained(folder)
    return logits(tuned)


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        return model(IDS).logits


def loaded(model: Any, upgraded: Upgraded, folder: Path) -> Tensor:
    return logits(peft.PeftModel.from_pretrained(model, upgraded.save(folder)))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, Path]:
    """Two unrelated Llamas of one hidden size, the new one deeper and with more heads; an adapter of the old one."""
    home = tmp_path_factory.mktemp("pair")
    sizes = {"num_hidden_layers": 5, "num_attention_heads": 8, "intermediate_size": 64, "head_dim": 8}
    old = saved(home / "old", pico_model("llama"))
    new = saved(home / "new", pico_model("llama", seed=1, **sizes))
    random_adapter(home / "adapter", pico_model("llama"))
    return old, new, home / "adapter"


@pytest.mark.parametrize("chosen", OPTIONS, ids=lambda chosen: "-".join([*chosen, *chosen.values()]))
def test_an_ablation_gives_a_working_adapter(
    chosen: dict[str, str], pair: tuple[str, str, Path], tmp_path: Path
) -> None:
    old, new, adapter = pair
    built = UpgradeMap.build(old, new, MapOptions(**SMALL, **chosen), calibration=TEXTS)
    assert UpgradeMap.load(built.save(tmp_path / "map")).options == MapOptions(**SMALL, **chosen)
    if "layer_map" in chosen:
        assert built.pairs == fixed_path(chosen["layer_map"], 3, 5)
        assert not built.similarity.any()
    if "head_map" in chosen:
        assert all(pair.heads.tolist() == [[n, n] for n in range(4)] for pair in built.layers)
    if chosen.get("hidden_map") == "identity":
        assert torch.equal(built.hidden, torch.eye(32))
    if chosen.get("hidden_map") == "polar":
        gram = built.hidden @ built.hidden.T
        torch.testing.assert_close(gram, gram[0, 0] * torch.eye(32), atol=1e-4, rtol=1e-4)
    model = pico_model("llama", seed=1, num_hidden_layers=5, num_attention_heads=8, intermediate_size=64, head_dim=8)
    plain = logits(model)
    tuned = loaded(model, upgrade(adapter, built), tmp_path / "transferred")
    assert torch.isfinite(tuned).all()
    assert (tuned - plain).norm() > 1e-3 * plain.norm()


@pytest.fixture(scope="module", params=[0, 3, 5])
def deeper(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Pairs]:
    """An old Llama and a new one with two layers more, which add nothing, and its hidden units permuted."""
    home = tmp_path_factory.mktemp("deeper")
    old = read("llama", request.param)
    new = old.copy()
    generator = torch.Generator().manual_seed(request.param)
    CHANGES["depth"](new, generator)
    truth = [(i, j) for j, layer in enumerate(new.layers) for i in same(old, layer["q"])]
    CHANGES["permuted hidden"](new, generator)
    saved(home / "old", write(old))
    saved(home / "new", write(new))
    return home, truth


def same(canon: Canon, weight: Tensor) -> list[int]:
    return [number for number, layer in enumerate(canon.layers) if torch.equal(layer["q"], weight)]


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_every_similarity_finds_the_true_layers(similarity: str, deeper: tuple[Path, Pairs]) -> None:
    home, truth = deeper
    options = MapOptions(**SMALL, similarity=similarity)
    assert UpgradeMap.build(home / "old", home / "new", options, calibration=TEXTS).pairs == truth


def test_the_true_layers_give_the_right_adapter_and_the_first_layers_do_not(
    deeper: tuple[Path, Pairs], tmp_path: Path
) -> None:
    home, truth = deeper
    old, new = (Backbone.open(home / side) for side in ("old", "new"))
    plain = logits(old.load())
    wanted = random_adapter(tmp_path / "adapter", old.load())
    errors = {}
    for layer_map in ("cka", "first"):
        built = UpgradeMap.build(old, new, MapOptions(**SMALL, layer_map=layer_map), calibration=TEXTS)
        assert (built.pairs == truth) == (layer_map == "cka")
        tuned = loaded(new.load(), upgrade(tmp_path / "adapter", built), tmp_path / layer_map)
        errors[layer_map] = float((tuned - wanted).norm() / (wanted - plain).norm())
    assert errors["cka"] < 1e-4
    assert errors["first"] > 0.1


def test_the_papers_formula_carries_a_bias_as_it_carries_b(tmp_path: Path) -> None:
    """Between a Phi and itself: unchanged where B is, through the head's ``W W^T`` where B goes through that."""
    home = Backbone.open(saved(tmp_path / "phi", pico_model("phi")))
    arch, generator = home.arch, torch.Generator().manual_seed(0)
    updates = {
        (1, part): LowRank(
            torch.randn(2, arch.shape(part)[1], generator=generator),
            torch.randn(arch.shape(part)[0], 2, generator=generator),
            torch.randn(arch.shape(part)[0], generator=generator),
        )
        for part in arch.parts
    }
    built = UpgradeMap.build(home, home, MapOptions(layer_map="first", hidden_map="identity"))
    given = Adapter(arch, updates, names={key: (key[1],) for key in updates})
    upgraded = upgrade(given, built, method="lorasuite", options={"normalize": "none"}, old=home, new=home)
    assert upgraded.report.coverage == 1.0
    assert sum(name.endswith("lora_B.bias") for name in state_dict(upgraded.adapter)) == len(updates)
    for (_, part), update in updates.items():
        wanted = update.bias
        if part in ("q", "k", "v"):
            heads = heads_first(home.part(1, part), part, arch.heads)
            wanted = (heads @ heads.mT @ update.bias.reshape(arch.heads.query, -1, 1)).flatten()
        if part == "up":
            wanted = home.part(1, part) @ torch.linalg.pinv(home.part(1, part)) @ update.bias
        assert (upgraded.adapter.updates[1, part].bias - wanted).norm() < 1e-3 * wanted.norm(), part
