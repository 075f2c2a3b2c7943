"""Planted upgrades: the new backbone computes the same function, so the transferred adapter has the same effect."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from canon import Canon, read, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pico import MINICPM, PICO, pico_tokenizer, save_backbone
from planted import ADMITS, CHANGES, EVERY, NEW_WORDS, OLD_WORDS, replicated_groups
from torch import Tensor

from peft_lorasuite import PeftModel, UpgradeMap
from peft_lorasuite.arch.layout import group_of, join, split
from peft_lorasuite.arch.spec import Architecture, Heads
from peft_lorasuite.text.vocabulary import shared_tokens
from peft_lorasuite.upgrading.map_cache import cache_folder

TOLERANCE = 1e-4
"""Of the adapter's own effect on the logits."""
SHARED_WORDS = [word for word in OLD_WORDS if word in NEW_WORDS]
TEXTS = [" ".join(random.Random(number).choices(SHARED_WORDS, k=40)) for number in range(6)]
"""Of words that both tokenizers know: random models do not put out the same for other cuts of a text."""
pytestmark = pytest.mark.filterwarnings("ignore:Adapter 'default'. [0-9]+ LoRA tensor:UserWarning")
"""PEFT 0.21 takes every bias of a LoRA B for a shard."""


@dataclass(frozen=True)
class Case:
    """A planted upgrade: the old backbone's type, the changes in order, and the adapter."""

    name: str
    changes: tuple[str, ...]
    seed: int = 0
    values: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)


def planted(case: Case) -> tuple[Canon, Canon, Heads | None]:
    """Return old and new backbone, and the new heads if old groups are merged."""
    values = dict(case.values)
    if "rotated hidden" in case.changes:
        values["tie_word_embeddings"] = False
    generator = torch.Generator().manual_seed(case.seed)
    old = read(case.name, case.seed, **values)
    new, merged = old.copy(), None
    for change in case.changes:
        if change == "merged groups":
            merged = old.arch.heads
            replicated_groups(old, generator)
        else:
            CHANGES[change](new, generator)
    return old, new, merged


def save(folder: Path, canon: Canon, words: list[str]) -> Path:
    config = MINICPM | canon.values if canon.name == "minicpm" else None
    return save_backbone(folder, write(canon), pico_tokenizer(words), config)


def adapter(folder: Path, model: Any, arch: Architecture, case: Case, merged: Heads | None) -> Any:
    """Put a random LoRA on every linear module, save it, and return the model with it."""
    torch.manual_seed(case.seed)
    names = [f"{arch.layer_path}.{n}.{site.path}" for n in range(arch.layers) for site in arch.sites]
    conv1d = any(site.conv1d for site in arch.sites)
    lora = {"r": 3, "lora_alpha": 5, "fan_in_fan_out": conv1d} | case.lora
    tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules=names, task_type="CAUSAL_LM", **lora))
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "lora_B" in name:
                weight.copy_(torch.randn(weight.shape) / 2)
                site = next(site for site in arch.sites if f"{site.path}.lora_B" in name)
                if merged and {"k", "v"} & set(site.parts):
                    parts = {part: alike(rows, part, merged) for part, rows in split(weight, site, arch).items()}
                    weight.copy_(join(parts, site, arch))
    tuned.save_pretrained(folder)
    return tuned.eval()


def alike(rows: Tensor, part: str, heads: Heads) -> Tensor:
    """Make the updates of keys and values equal within the groups that are merged."""
    if part not in ("k", "v"):
        return rows
    blocks = rows.reshape(heads.query, heads.size, *rows.shape[1:])
    means = blocks.unflatten(0, (heads.key_value, heads.group)).mean(dim=1)
    return means[group_of(heads)].reshape(rows.shape)


@torch.no_grad()
def error(case: Case, folder: Path, *, built_in: bool = False) -> float:
    """Upgrade as a user does; return the error in the logits of the shared tokens relative to the adapter's effect."""
    old, new, merged = planted(case)
    words = NEW_WORDS if "vocabulary" in case.changes else OLD_WORDS
    left, right = save(folder / "old", old, OLD_WORDS), save(folder / "new", new, words)
    ids = shared_tokens(
        pico_tokenizer(OLD_WORDS), pico_tokenizer(words), old_rows=old.arch.vocabulary, new_rows=new.arch.vocabulary
    )
    order = torch.randint(len(ids[0]), (2, 24), generator=torch.Generator().manual_seed(case.seed))
    plain = write(old)(ids[0][order]).logits[..., ids[0]]
    unchanged = write(new)(ids[1][order]).logits[..., ids[1]]
    tuned = adapter(folder / "adapter", write(old), old.arch, case, merged)(ids[0][order]).logits[..., ids[0]]
    effect = tuned - plain
    assert (unchanged - plain).norm() < 1e-4 * plain.norm(), "the planted backbone computes something else"
    assert effect.norm() > 0.05 * plain.norm()
    upgrade_map = None if built_in else UpgradeMap.build(left, right, calibration=TEXTS)
    model = PeftModel.from_upgraded(right, folder / "adapter", source_model=left, upgrade_map=upgrade_map)
    return float((model(ids[1][order]).logits[..., ids[1]] - tuned).norm() / effect.norm())


SINGLE = [Case(name, (change,)) for change, names in ADMITS.items() for name in names]


@pytest.mark.parametrize("case", SINGLE, ids=[f"{case.name}-{case.changes[0]}" for case in SINGLE])
def test_each_change_alone_is_exact(case: Case, tmp_path: Path) -> None:
    assert error(case, tmp_path) < TOLERANCE


LORA = {
    "plain": {},
    "rank-stabilised": {"use_rslora": True, "r": 4},
    "patterns": {"rank_pattern": {r".*\.0\..*": 2}, "alpha_pattern": {r".*\.1\..*": 9}},
    "one rank": {"r": 1, "lora_alpha": 4},
}
BIASED = ("bloom", "falcon", "gpt2", "gpt_neox", "phi", "granite", "llama")
"""Types that can have a bias in every linear module, as PEFT wants it for ``lora_bias``."""
WITH_BIAS = {name: {"attention_bias": True, "mlp_bias": True} for name in ("granite", "llama")}


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Some changes that a type admits, in any order, with any of the adapters."""
    name = draw(st.sampled_from(EVERY))
    admitted = [change for change, names in ADMITS.items() if name in names]
    changes = draw(st.lists(st.sampled_from(admitted), min_size=2, unique=True))
    lora, values = dict(LORA[draw(st.sampled_from(sorted(LORA)))]), {}
    if name in BIASED and draw(st.booleans()):
        lora, values = lora | {"lora_bias": True}, WITH_BIAS.get(name, {})
    return Case(name, tuple(changes), draw(st.integers(0, 99)), values, lora)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=cases())
def test_changes_in_any_order_are_exact(case: Case, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert error(case, tmp_path_factory.mktemp("case")) < TOLERANCE


@pytest.mark.parametrize("name", EVERY)
def test_all_changes_at_once_are_exact(name: str, tmp_path: Path) -> None:
    changes = tuple(change for change, names in ADMITS.items() if name in names)
    assert error(Case(name, changes, seed=1), tmp_path) < TOLERANCE


@pytest.mark.parametrize("lora", LORA)
@pytest.mark.parametrize("name", ["llama", "phi3", "gpt_neox"])
def test_every_kind_of_scaling_is_exact(name: str, lora: str, tmp_path: Path) -> None:
    assert error(Case(name, ("permuted hidden", "permuted heads"), 2, {}, LORA[lora]), tmp_path) < TOLERANCE


@pytest.mark.parametrize("name", BIASED)
def test_biases_of_the_adapter_are_carried(name: str, tmp_path: Path) -> None:
    changes = ("widened hidden", "turned heads", "units" if name != "bloom" else "permuted units")
    case = Case(name, changes, 3, WITH_BIAS.get(name, {}), {"lora_bias": True})
    assert error(case, tmp_path) < TOLERANCE


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_the_map_that_is_built_when_none_is_given_is_exact_and_kept(name: str, tmp_path: Path) -> None:
    changes = tuple(change for change, names in ADMITS.items() if name in names and change != "vocabulary")
    assert error(Case(name, changes, seed=4), tmp_path, built_in=True) < TOLERANCE
    assert len(list(cache_folder().iterdir())) == 1


def test_every_type_that_has_a_converter_is_planted() -> None:
    assert set(EVERY) == set(PICO) - {"gemma3"}
