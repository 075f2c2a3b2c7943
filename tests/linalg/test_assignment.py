"""Layer maps against all maps there are, assignments against all assignments."""

from __future__ import annotations

import time
from itertools import combinations, pairwise, permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from patience import limit

from peft_lorasuite.errors import LoraSuiteError
from peft_lorasuite.linalg.assignment import (
    FIXED_PATHS,
    TIE,
    Pairs,
    assign,
    assign_by_index,
    assign_units,
    fixed_path,
    layer_path,
)

SHAPES = [(few, many) for few in range(1, 6) for many in range(few, 8)]


def brute_force(S: torch.Tensor) -> float:
    """Largest total score of all strictly increasing maps of the rows into the columns."""
    rows, columns = S.shape
    return max(float(sum(S[i, j] for i, j in enumerate(chosen))) for chosen in combinations(range(columns), rows))


def total(S: torch.Tensor, path: Pairs) -> float:
    return float(sum(S[i, j] for i, j in path))


def increasing(path: Pairs) -> bool:
    return all(a < c and b < d for (a, b), (c, d) in pairwise(path))


@pytest.mark.parametrize("shape", SHAPES)
def test_no_map_scores_more_than_the_layer_path(shape: tuple[int, int]) -> None:
    for seed in range(6):
        S = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
        S = (3 * S).round() / 3 if seed % 2 else S  # every second one is full of ties
        path = layer_path(S)
        assert increasing(path)
        assert len(path) == shape[0]
        assert total(S, path) == pytest.approx(brute_force(S), abs=1e-6)
        turned = layer_path(S.T)
        assert increasing(turned)
        assert total(S.T, turned) == pytest.approx(brute_force(S), abs=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_among_equal_maps_the_earlier_layers_win(shape: tuple[int, int]) -> None:
    assert layer_path(torch.ones(shape)) == [(i, i) for i in range(shape[0])]


def test_tied_layers_are_distinguished_by_the_second_opinion_alone() -> None:
    S = torch.tensor([[0.9, 0.9, 0.1], [0.1, 0.5, 0.5]])
    right = {(0, 1), (1, 2)}
    asked: list[tuple[int, int]] = []

    def opinion(i: int, j: int) -> float:
        asked.append((i, j))
        return float((i, j) in right)

    assert layer_path(S) == [(0, 0), (1, 1)]
    assert layer_path(S, opinion) == [(0, 1), (1, 2)]
    assert set(asked) == {(0, 0), (0, 1), (1, 1), (1, 2)}
    flipped = layer_path(S.T, lambda i, j: opinion(j, i))
    assert flipped == [(1, 0), (2, 1)]


def test_a_second_opinion_cannot_outweigh_a_score() -> None:
    S = torch.tensor([[0.9, 0.9 - 3 * TIE]])
    assert layer_path(S, lambda i, j: float(j == 1)) == [(0, 0)]


@pytest.mark.parametrize("name", FIXED_PATHS)
@settings(max_examples=60, derandomize=True)
@given(old=st.integers(1, 60), new=st.integers(1, 60))
def test_fixed_maps_are_increasing_and_mirror_images(name: str, old: int, new: int) -> None:
    path = fixed_path(name, old, new)
    assert len(path) == min(old, new)
    assert increasing(path)
    assert all(0 <= i < old and 0 <= j < new for i, j in path)
    assert fixed_path(name, new, old) == [(j, i) for i, j in path]


def test_fixed_maps_lie_where_their_names_say() -> None:
    assert [j for _, j in fixed_path("first", 3, 7)] == [0, 1, 2]
    assert [j for _, j in fixed_path("medium", 3, 7)] == [2, 3, 4]
    assert [j for _, j in fixed_path("last", 3, 7)] == [4, 5, 6]
    assert [j for _, j in fixed_path("proportional", 3, 7)] == [0, 3, 6]


def test_an_unknown_layer_map_is_refused_by_name() -> None:
    with pytest.raises(LoraSuiteError, match="'middle'"):
        fixed_path("middle", 3, 4)


@pytest.mark.parametrize("shape", [(3, 3), (2, 4), (4, 3)])
def test_no_assignment_scores_more(shape: tuple[int, int]) -> None:
    S = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    pairs = assign(S)
    few, wide = min(shape), S if shape[0] <= shape[1] else S.T
    best = max(sum(float(wide[i, j]) for i, j in enumerate(chosen)) for chosen in permutations(range(max(shape)), few))
    assert float(S[pairs[:, 0], pairs[:, 1]].sum()) == pytest.approx(best, abs=1e-6)
    assert len(set(pairs[:, 0].tolist())) == len(set(pairs[:, 1].tolist())) == few


def test_without_head_mapping_the_ith_meets_the_ith() -> None:
    assert assign_by_index(2, 3).tolist() == assign_by_index(3, 2).tolist() == [[0, 0], [1, 1]]


@settings(max_examples=50, deadline=None, derandomize=True)
@given(old=st.integers(1, 9), new=st.integers(1, 9), seed=st.integers(0, 1000))
def test_units_are_matched_one_to_one_and_mutual_favorites_stay_together(old: int, new: int, seed: int) -> None:
    S = torch.randn(old, new, generator=torch.Generator().manual_seed(seed))
    pairs = assign_units(S, torch.eye(new)).tolist()  # the inner products are S
    assert len({a for a, _ in pairs}) == len({b for _, b in pairs}) == len(pairs) == min(old, new)
    assert pairs == sorted(pairs)
    mutual = {(a, int(S[a].argmax())) for a in range(old) if int(S[:, int(S[a].argmax())].argmax()) == a}
    assert mutual <= {(a, b) for a, b in pairs}


def test_permuted_units_are_found() -> None:
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    pairs = assign_units(torch.eye(20)[order], torch.eye(20))
    assert torch.equal(pairs[:, 1], order)


def test_many_units_without_a_clear_favorite_are_matched_nearly_as_well_as_can_be():
    """Two sides that share some directions, as units of models trained apart do; beyond `SMALL`, so rounds run."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(900, 24, generator=generator)
    old = torch.nn.functional.normalize(common[:700] + torch.randn(700, 24, generator=generator), dim=1)
    new = torch.nn.functional.normalize(common + torch.randn(900, 24, generator=generator), dim=1)
    scores = old @ new.T
    pairs, best = assign_units(old, new), assign(scores)
    assert len(pairs) == len(set(pairs[:, 0].tolist())) == len(set(pairs[:, 1].tolist())) == 700
    assert scores[pairs[:, 0], pairs[:, 1]].sum() > 0.97 * scores[best[:, 0], best[:, 1]].sum()


def test_units_that_are_all_alike_are_matched_at_once():
    """Dead units score the same with everything: rounds would match them one by one."""
    started = time.perf_counter()
    assert len(assign_units(torch.zeros(1500, 8), torch.zeros(1500, 8))) == 1500
    assert time.perf_counter() - started < limit(5)
