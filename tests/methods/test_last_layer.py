"""What the last state lacks, and the update that brings it: planted ones are found again."""

from __future__ import annotations

import pytest
import torch
from pico import pico_model, pico_tokenizer, save_backbone

from peft_lorasuite import Backbone
from peft_lorasuite.linalg.lowrank import LowRank, reduced_rank_ridge
from peft_lorasuite.methods.behavior.last_layer import divergence, refine, solve_shift
from peft_lorasuite.methods.behavior.targets import Head, Targets

WORDS = ["red", "blue", "tree", "stone", "river", "cloud", "small", "big", "runs", "sleeps"]
FAMILIES = ["llama", "gemma2", "bloom", "minicpm"]
"""Plain; with a cap; with a bias of the norm; with a scaling of the logits."""


class Planted:
    """States, inputs and a true update of rank 2, whose probabilities are wanted."""

    def __init__(self, head: Head, hidden: int, factor: float = 1.0) -> None:
        draw = torch.Generator().manual_seed(0)
        self.head, self.factor, self.ids = head, torch.tensor(factor), torch.arange(0, 120, 2)
        self.true = LowRank(torch.randn(2, 24, generator=draw) / 5, torch.randn(hidden, 2, generator=draw))
        self.x, self.quiet = torch.randn(60, 24, generator=draw), torch.randn(20, 24, generator=draw)
        self.h = torch.randn(60, hidden, generator=draw)
        target = head.restrict(self.ids).logits(self.moved(self.true)).log_softmax(-1)
        self.teacher = Targets(self.ids, target, torch.ones(60))

    def moved(self, update: LowRank) -> torch.Tensor:
        return self.h + self.factor * update.apply(self.x)

    def off(self, update: LowRank) -> float:
        return divergence(self.head, self.moved(update), self.teacher)

    def start(self) -> tuple[LowRank, torch.Tensor]:
        """The least-squares fit to the wanted shifts, and what was wanted of it."""
        shift = solve_shift(self.head, self.h, self.teacher, ridge=0.01, steps=25)
        wanted = shift / self.factor
        return reduced_rank_ridge(self.x, wanted, self.quiet, weight=8.0, ridge=0.1, rank=2)[0], wanted

    def refine(self, steps: int = 200, quiet: torch.Tensor | None = None) -> tuple[LowRank, LowRank]:
        """The start and what came of it."""
        start, wanted = self.start()
        quiet = self.x[:0] if quiet is None else quiet
        more = {"x": self.x, "wanted": wanted, "anchors": quiet, "factor": self.factor, "steps": steps}
        return start, refine(start, self.head, self.h, self.teacher, **more)


def head_of(family: str, folder) -> tuple[Head, int]:
    backbone = Backbone.open(save_backbone(folder, pico_model(family), pico_tokenizer(WORDS)), dtype="float32")
    return Head(backbone.load(), backbone), backbone.arch.hidden


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    return Planted(*head_of("llama", tmp_path_factory.mktemp("new")))


def test_the_wanted_shift_gives_the_teachers_probabilities(planted):
    shift = solve_shift(planted.head, planted.h, planted.teacher, ridge=1e-6, steps=200)
    assert divergence(planted.head, planted.h + shift, planted.teacher) < 1e-3
    got = planted.head.restrict(planted.ids).logits(planted.h + shift).log_softmax(-1)
    torch.testing.assert_close(got.exp(), planted.teacher.log_probs.exp(), atol=0.01, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_planted_update_is_found_by_what_it_does(family, tmp_path):
    """Where states and inputs have nothing in common, least squares misses much of it."""
    case = Planted(*head_of(family, tmp_path), factor=0.7)
    start, found = case.refine()
    before = divergence(case.head, case.h, case.teacher)
    assert case.off(found) < 0.05 * before
    assert case.off(found) < 0.25 * case.off(start)


def test_the_sharpened_update_is_right_at_other_inputs_too(planted):
    start, found = planted.refine()
    draw = torch.Generator().manual_seed(9)
    x, h = torch.randn(80, 24, generator=draw), torch.randn(80, planted.h.shape[1], generator=draw)
    part = planted.head.restrict(planted.ids)

    def off(update: LowRank) -> float:
        target = part.logits(h + planted.true.apply(x)).log_softmax(-1)
        return divergence(planted.head, h + update.apply(x), Targets(planted.ids, target, torch.ones(80)))

    assert off(found) < 0.2 * off(start)


def test_where_nothing_is_wanted_it_stays_nearer_to_the_start(planted):
    start, free = planted.refine()
    _, held = planted.refine(quiet=planted.quiet)

    def moved(update: LowRank) -> float:
        return float((planted.quiet @ (update.delta_weight() - start.delta_weight()).T).norm())

    assert moved(held) < 0.9 * moved(free)


def test_a_start_that_is_right_stays(planted):
    """However large it is: a smaller one that does as well here would do less elsewhere."""
    _, wanted = planted.start()
    more = {"x": planted.x, "wanted": wanted, "anchors": planted.quiet, "factor": planted.factor, "steps": 60}
    found = refine(planted.true, planted.head, planted.h, planted.teacher, **more)
    assert float((found.delta_weight() - planted.true.delta_weight()).norm()) < 0.02 * planted.true.norm()


def test_no_steps_leave_the_start(planted):
    start, found = planted.refine(steps=0)
    assert found is start


def test_nothing_wanted_leaves_the_start(planted):
    start, _ = planted.start()
    still = Targets(planted.ids, planted.head.restrict(planted.ids).logits(planted.h).log_softmax(-1), torch.zeros(60))
    wanted = torch.zeros_like(planted.h)
    more = {"x": planted.x, "wanted": wanted, "anchors": planted.quiet, "factor": planted.factor, "steps": 20}
    assert refine(start, planted.head, planted.h, still, **more) is start


def test_the_same_twice_is_the_same(planted):
    first, second = planted.refine(steps=20)[1], planted.refine(steps=20)[1]
    torch.testing.assert_close(first.delta_weight(), second.delta_weight(), rtol=0, atol=0)
