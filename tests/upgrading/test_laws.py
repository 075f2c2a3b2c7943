"""Laws of the package: what undoes what, what changes nothing, what is linear."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pico import pico_config, pico_model, pico_tokenizer, save_backbone
from planted import EVERY
from torch import Tensor

from peft_lorasuite.adapters.adapter import Adapter
from peft_lorasuite.adapters.reading import read_adapter
from peft_lorasuite.adapters.writing import write_adapter
from peft_lorasuite.arch.layout import group_of, head_rows, heads_first, join, place_rows, split
from peft_lorasuite.arch.registry import architecture
from peft_lorasuite.arch.spec import Architecture, Heads, Site
from peft_lorasuite.io.source import Source
from peft_lorasuite.linalg.lowrank import LowRank, stack
from peft_lorasuite.mapping.upgrade_map import UpgradeMap
from peft_lorasuite.upgrading.upgrade import upgrade

WORDS = ["the", "cat", "sat", "on", "mat", "dog", "ran", "to"]
TEXTS = ["the cat sat on the mat, a dog ran to the cat, the mat ran on the dog and the cat sat on a dog." * 3]


Mapped = Callable[[str, str], UpgradeMap]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@st.composite
def layouts(draw_from: st.DrawFn) -> tuple[Site, Architecture]:
    """A site of any layout, in an architecture of any head counts."""
    parts, rows = draw_from(
        st.sampled_from(
            [
                *((("q", "k", "v"), rows) for rows in ("part head dim", "head part dim", "group part dim")),
                *((parts, "part head dim") for parts in (("q",), ("k",), ("o",), ("gate", "up"), ("down",))),
            ]
        )
    )
    groups = draw_from(st.integers(1, 4))
    each = 1 if rows == "head part dim" else draw_from(st.integers(1, 3))
    heads = Heads(groups * each, groups, draw_from(st.integers(1, 5)))
    site = Site("module", parts, rows)
    sizes = {"layers": 1, "hidden": draw_from(st.integers(1, 9)), "intermediate": draw_from(st.integers(1, 9))}
    rotated = 2 * draw_from(st.integers(0, heads.size // 2))
    sizes |= {"rotary_size": rotated, "rotary_interleaved": draw_from(st.booleans())}
    return site, Architecture(family="any", heads=heads, vocabulary=1, sites=(site,), **sizes)


@settings(deadline=None, derandomize=True)
@given(layout=layouts(), columns=st.sampled_from([(), (1,), (4,)]))
def test_joining_undoes_splitting_and_splitting_joining(
    layout: tuple[Site, Architecture], columns: tuple[int, ...]
) -> None:
    site, arch = layout
    whole = draw(sum(arch.shape(part)[0] for part in site.parts), *columns)
    parts = split(whole, site, arch)
    assert torch.equal(join(parts, site, arch), whole)
    again = split(join(parts, site, arch), site, arch)
    assert all(torch.equal(again[part], parts[part]) for part in site.parts)


@settings(deadline=None, derandomize=True)
@given(layout=layouts())
def test_the_row_numbers_of_a_site_are_a_permutation(layout: tuple[Site, Architecture]) -> None:
    site, arch = layout
    rows = head_rows(site, arch)
    assert list(rows) == list(site.parts)
    assert [len(numbers) for numbers in rows.values()] == [arch.shape(part)[0] for part in site.parts]
    together = torch.cat(list(rows.values()))
    assert torch.equal(together.sort().values, torch.arange(len(together)))


@settings(deadline=None, derandomize=True)
@given(groups=st.integers(1, 5), each=st.integers(1, 4))
def test_placing_undoes_giving_every_query_head_its_group(groups: int, each: int) -> None:
    heads, x = Heads(groups * each, groups, 3), draw(groups, 3, 7)
    assert torch.equal(group_of(heads), torch.arange(groups).repeat_interleave(each))
    back, kept = place_rows(x[group_of(heads)], group_of(heads), groups)
    assert torch.allclose(back.reshape(x.shape), x)
    assert kept == pytest.approx(1.0, abs=1e-5)


def test_heads_that_disagree_lose_what_their_mean_lacks() -> None:
    blocks = torch.stack([torch.ones(2, 3), -torch.ones(2, 3), torch.ones(2, 3)])
    rows, kept = place_rows(blocks, torch.tensor([0, 0, 2]), 3)
    assert torch.equal(rows, torch.cat([torch.zeros(4, 3), torch.ones(2, 3)]))
    assert kept == pytest.approx(1 / 3)


def test_a_heads_block_holds_its_rows_and_os_its_columns() -> None:
    heads = Heads(2, 1, 3)
    W = draw(6, 5)
    assert torch.equal(heads_first(W, "q", heads)[1], W[3:])
    assert torch.equal(heads_first(W.T, "o", heads)[1], W[3:])


def test_a_low_rank_update_keeps_its_product_whatever_is_done_to_its_factors() -> None:
    update = LowRank(draw(4, 9), draw(7, 4, seed=1), draw(7, seed=2))
    wide = update.padded(6, torch.Generator().manual_seed(0))
    assert torch.equal(wide.delta_weight(), update.delta_weight())
    assert wide.A[4:].abs().min() > 0
    assert update.norm() == pytest.approx(float(update.delta_weight().norm()), rel=1e-5)
    assert torch.allclose(update.scaled(-2.0).delta_weight(), -2 * update.delta_weight())


def test_truncation_is_the_best_there_is_and_tells_the_energy_it_keeps() -> None:
    update = LowRank(draw(4, 9), draw(7, 4, seed=1))
    U, s, Vt = torch.linalg.svd(update.delta_weight())
    cut, kept = update.truncated(2)
    assert torch.allclose(cut.delta_weight(), U[:, :2] @ torch.diag(s[:2]) @ Vt[:2], atol=1e-5)
    assert kept == pytest.approx(float((s[:2] ** 2).sum() / (s**2).sum()), rel=1e-5)
    assert update.truncated(4)[1] == pytest.approx(1.0)


def test_stacked_updates_are_the_updates_above_one_another() -> None:
    q, v = LowRank(draw(2, 6), draw(3, 2)), LowRank(draw(2, 6, seed=1), draw(4, 2), draw(4))
    whole = stack({"q": q, "v": v}, {"q": 3, "k": 5, "v": 4})
    assert torch.allclose(whole.delta_weight(), torch.cat([q.delta_weight(), torch.zeros(5, 6), v.delta_weight()]))
    assert whole.rank == 4
    assert whole.bias is not None
    assert torch.equal(whole.bias, torch.cat([torch.zeros(8), draw(4)]))
    shared = stack({"q": q, "k": LowRank(q.A, draw(5, 2))}, {"q": 3, "k": 5})
    assert shared.rank == 2


@pytest.fixture(scope="module")
def mapped(tmp_path_factory: pytest.TempPathFactory) -> Mapped:
    """Return a function that maps a pico backbone to another one of other weights, or to itself; each pair once."""

    @cache
    def backbone(name: str, seed: int) -> Path:
        folder = tmp_path_factory.mktemp(name)
        return save_backbone(folder, pico_model(name, seed), pico_tokenizer(WORDS))

    @cache
    def build(old: str, new: str) -> UpgradeMap:
        return UpgradeMap.build(backbone(old, 0), backbone(new, 0 if old == new else 5), calibration=TEXTS)

    return build


def random_adapter(arch: Architecture, rank: int = 3, *, shared: bool = True) -> Adapter:
    """An update of every part of every layer; the parts of a fused module share their A, as PEFT's do."""
    updates = {}
    for layer in range(arch.layers):
        for number, part in enumerate(arch.parts):
            if not arch.has(layer, part):
                continue
            out, into = arch.in_layer(layer).shape(part)
            seed = 100 * layer + (arch.sites.index(arch.site(part)) if shared else number)
            updates[layer, part] = LowRank(draw(rank, into, seed=seed), draw(out, rank, seed=seed + 7 * number))
    return Adapter(arch, updates)


def deltas(adapter: Adapter) -> dict[tuple[int, str], Tensor]:
    return {key: update.delta_weight() for key, update in adapter.updates.items()}


def assert_same(got: Adapter, wanted: dict[tuple[int, str], Tensor], tolerance: float = 1e-5) -> None:
    assert set(got.updates) == set(wanted)
    for key, delta in deltas(got).items():
        assert (delta - wanted[key]).norm() <= tolerance * wanted[key].norm(), key


REPEATED = ("gemma3_text", "granite", "minicpm", "ministral", "mistral", "olmo2", "qwen3")
"""Types whose layer differs in nothing that counts here from that of another type."""


@pytest.mark.parametrize("name", [name for name in EVERY if name not in REPEATED])
def test_a_backbone_mapped_to_itself_changes_nothing(name: str, mapped: Mapped) -> None:
    same = mapped(name, name)
    arch = same.old.arch
    assert torch.allclose(same.hidden, torch.eye(arch.hidden), atol=1e-5)
    assert same.pairs == [(i, i) for i in range(arch.layers)]
    for pair in same.layers:
        assert torch.equal(pair.heads[:, 0], pair.heads[:, 1])
        assert torch.equal(pair.units[:, 0], pair.units[:, 1])
        assert pair.head_scores == pytest.approx(torch.ones(arch.heads.query * arch.has(pair.new, "q")), abs=1e-5)
    adapter = random_adapter(arch)
    result = upgrade(adapter, same)
    assert_same(result.adapter, deltas(adapter))
    assert result.report.energy_kept == pytest.approx(1.0, abs=1e-6)


PAIRS = [("llama", "qwen2"), ("gpt_neox", "llama"), ("qwen3", "phi3"), ("cohere2", "glm4"), ("gptj", "smollm3")]
PAIRS += [("opt", "olmo3")]


@pytest.mark.parametrize(("old", "new"), PAIRS)
def test_the_upgrade_is_linear_in_the_adapters_scale(old: str, new: str, mapped: Mapped) -> None:
    pair = mapped(old, new)
    adapter = random_adapter(pair.old.arch)
    louder = replace(adapter, updates={key: update.scaled(-3.0) for key, update in adapter.updates.items()})
    once = deltas(upgrade(adapter, pair).adapter)
    assert_same(upgrade(louder, pair).adapter, {key: -3 * delta for key, delta in once.items()}, 1e-4)


@pytest.mark.parametrize(("old", "new"), PAIRS)
def test_the_rank_never_grows_and_every_layer_gets_all_it_can(old: str, new: str, mapped: Mapped) -> None:
    pair = mapped(old, new)
    result = upgrade(random_adapter(pair.old.arch), pair)
    assert {update.rank for update in result.adapter.updates.values()} == {3}
    common = [part for part in pair.new.arch.parts if part in pair.old.arch.parts]
    moved = {key for key, update in result.adapter.updates.items() if update.norm() > 0}
    wanted = {(new, part) for old, new in pair.pairs for part in common if pair.old.arch.has(old, part)}
    assert moved >= {(layer, part) for layer, part in wanted if pair.new.arch.has(layer, part)}


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "phi3", "gpt2", "falcon", "glm4"])
def test_what_was_written_is_read_again(name: str, tmp_path: Path) -> None:
    arch = architecture(pico_config(name))
    adapter = random_adapter(arch)
    write_adapter(adapter, tmp_path, base="owner/base")
    again = read_adapter(Source(str(tmp_path), "adapter"), arch)
    assert_same(again, deltas(adapter), 1e-6)
    assert not again.unused


def test_a_map_that_was_saved_moves_an_adapter_as_before(tmp_path: Path, mapped: Mapped) -> None:
    pair = mapped("gpt_neox", "llama")
    adapter = random_adapter(pair.old.arch)
    loaded = UpgradeMap.load(pair.save(tmp_path / "map"))
    assert loaded.pairs == pair.pairs
    assert_same(upgrade(adapter, loaded).adapter, deltas(upgrade(adapter, pair).adapter), 1e-6)
