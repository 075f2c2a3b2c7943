"""Similarities against their definitions, computed in the plainest way and in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pico import pico_model, pico_tokenizer, save_backbone
from torch import Tensor

from peft_lorasuite.arch.layout import group_of
from peft_lorasuite.arch.spec import Heads
from peft_lorasuite.errors import LoraSuiteError
from peft_lorasuite.linalg.similarity import (
    SIMILARITIES,
    SKETCH_SIZE,
    head_similarity,
    layer_similarity,
    sketch,
    sketch_signs,
    unit_rows,
)
from peft_lorasuite.models import activations
from peft_lorasuite.models.activations import Sampling, paired_activations
from peft_lorasuite.models.backbone import Backbone

TEXTS = ["the cat sat on the mat.", "a dog ran to the red sun, and it ran on and on.", "two 2 or 3 cats, big cats!"]


def hsic(K: Tensor, L: Tensor) -> Tensor:
    """The formula of method and paper, term by term."""
    n, one = len(K), torch.ones(len(K)).double()
    K, L = K - torch.diag(K.diagonal()), L - torch.diag(L.diagonal())
    sums = (one @ K @ one) * (one @ L @ one) / ((n - 1) * (n - 2))
    return ((K @ L).trace() + sums - 2 / (n - 2) * (one @ K @ L @ one)) / (n * (n - 3))


def brute_force_cka(X: Tensor, Y: Tensor) -> Tensor:
    X, Y = X.double(), Y.double()
    K, L = X @ X.T, Y @ Y.T
    return hsic(K, L) / (hsic(K, K) * hsic(L, L)).sqrt()


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def alike(layers: int, tokens: int, old: int, new: int) -> tuple[Tensor, Tensor]:
    """Activations that have something in common, more or less from layer to layer."""
    X = draw(layers, tokens, old)
    share = torch.linspace(0.1, 2, layers)[:, None, None]
    return X, share * X @ draw(layers, old, new, seed=1) + draw(layers, tokens, new, seed=2)


@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_one_full_block_equals_the_formula_in_float64_even_at_an_offset(offset: float) -> None:
    X, Y = alike(3, 40, 12, 9)
    wanted = torch.tensor([[brute_force_cka(x - x.mean(0), y - y.mean(0)) for y in Y] for x in X])
    got = layer_similarity("cka", X + offset, Y - offset, block=40)
    assert got == pytest.approx(wanted, abs=1e-4 if offset else 1e-6)


def test_centring_does_not_change_the_unbiased_estimate() -> None:
    X, Y = alike(1, 30, 6, 7)
    moved = brute_force_cka(X[0] + draw(6, seed=3), Y[0] - draw(7, seed=4))
    assert float(layer_similarity("cka", X, Y, block=30)) == pytest.approx(float(moved), abs=1e-5)


def test_minibatches_average_the_terms_and_not_the_ratios() -> None:
    X, Y = alike(2, 64, 8, 8)
    for i in range(2):
        blocks = [(X[i, s : s + 16].double(), Y[i, s : s + 16].double()) for s in range(0, 64, 16)]
        grams = [((x - x.mean(0)) @ (x - x.mean(0)).T, (y - y.mean(0)) @ (y - y.mean(0)).T) for x, y in blocks]
        cross, left, right = (
            sum(hsic(*pair) for pair in terms)
            for terms in (grams, [(K, K) for K, _ in grams], [(L, L) for _, L in grams])
        )
        got = layer_similarity("cka", X, Y, block=16)[i, i]
        assert float(got) == pytest.approx(float(cross / (left * right) ** 0.5), abs=1e-6)


@pytest.mark.parametrize("name", SIMILARITIES)
def test_a_rotated_and_scaled_layer_is_the_same_layer(name: str) -> None:
    X = draw(1, 200, 10) * torch.linspace(1, 3, 10)
    Q = torch.linalg.qr(draw(10, 10, seed=5))[0]
    assert float(layer_similarity(name, X, 3.7 * X @ Q, block=100)) == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("name", SIMILARITIES)
def test_a_like_layer_scores_above_an_unlike_one(name: str) -> None:
    X, Y = alike(2, 200, 10, 10)
    unlike, like = layer_similarity(name, X, Y, block=50).diagonal()
    assert unlike < like


def test_unrelated_layers_score_about_zero_without_bias() -> None:
    scores = layer_similarity("cka", draw(8, 64, 200), draw(8, 64, 200, seed=1), block=64)
    assert abs(float(scores.mean())) < 0.01


def test_a_layer_that_never_changes_scores_zero() -> None:
    still = torch.ones(1, 20, 4)
    assert float(layer_similarity("cka", still, draw(1, 20, 4), block=20)) == 0.0


def test_fewer_than_four_tokens_are_refused() -> None:
    with pytest.raises(LoraSuiteError, match="too few paired tokens"):
        layer_similarity("cka", draw(1, 3, 4), draw(1, 3, 4))
    with pytest.raises(LoraSuiteError, match="too few paired tokens"):
        layer_similarity("cka", draw(1, 9, 4), draw(1, 9, 4), block=3)


def test_an_unknown_similarity_is_refused_by_name() -> None:
    with pytest.raises(LoraSuiteError, match="'ckaa'"):
        layer_similarity("ckaa", draw(1, 8, 4), draw(1, 8, 4))


def test_forward_batches_do_not_change_the_similarity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = pico_tokenizer(["the", "cat", "and"])
    sides = [
        Backbone.open(save_backbone(tmp_path / name, pico_model(name), tokenizer)) for name in ("llama", "gpt_neox")
    ]
    scores = []
    for tokens in (16, 64, 4096):
        monkeypatch.setattr(activations, "BATCH_TOKENS", tokens)
        pair = paired_activations(*sides, TEXTS * 3, Sampling(tokens=60, block=20))
        scores.append(layer_similarity("cka", pair.old, pair.new, block=20))
    assert scores[1] == pytest.approx(scores[0], abs=1e-5)
    assert scores[2] == pytest.approx(scores[0], abs=1e-5)


def parts(heads: Heads, hidden: int, seed: int) -> dict[str, Tensor]:
    return {part: draw(heads.count(part), heads.size, hidden, seed=seed + n) for n, part in enumerate("qkvo")}


@pytest.mark.parametrize("old", [Heads(4, 2, 3), Heads(3, 3, 5), Heads(4, 1, 2)])
@pytest.mark.parametrize("new", [Heads(6, 2, 4), Heads(2, 2, 3)])
def test_head_similarity_equals_the_cosine_of_the_interaction_matrices(old: Heads, new: Heads) -> None:
    sides = [(parts(old, 11, 0), old), (parts(new, 11, 9), new)]
    vectors = []
    for side, heads in sides:
        wide = {part: side[part][group_of(heads)] if part in ("k", "v") else side[part] for part in "qkvo"}
        QK, VO = wide["q"].mT @ wide["k"], wide["v"].mT @ wide["o"]
        vectors.append(torch.nn.functional.normalize(torch.cat([QK.flatten(1), VO.flatten(1)], dim=1)))
    got = head_similarity(sides[0][0], sides[1][0], old, new)
    assert got == pytest.approx(vectors[0] @ vectors[1].T, abs=1e-5)


def test_a_head_of_zeros_is_like_none() -> None:
    heads = Heads(2, 2, 3)
    side = {part: torch.zeros(2, 3, 5) for part in "qkvo"}
    assert not head_similarity(side, parts(heads, 5, 0), heads, heads).any()


def unit_similarity(old: dict[str, Tensor], new: dict[str, Tensor], *, sketches: bool = False) -> Tensor:
    left, right = unit_rows(old, new, sketches=sketches)
    return left @ right.T


def test_unit_similarity_looks_only_at_parts_that_both_layers_have() -> None:
    gate, up, other = draw(4, 6), draw(4, 6, seed=1), draw(4, 6, seed=2)
    got = unit_similarity({"gate": gate, "up": up}, {"up": 2 * up[[2, 0, 1, 3]], "down": other})
    assert got.argmax(dim=1).tolist() == [1, 2, 0, 3]
    assert got.max(dim=1).values == pytest.approx(torch.ones(4), abs=1e-6)


@pytest.mark.parametrize("width", [600, 1536, 2304])
def test_wide_units_are_compared_through_a_sketch_that_keeps_their_cosines(width: int) -> None:
    old = {part: draw(40, width, seed=n) for n, part in enumerate(("gate", "up", "down"))}
    near = {part: values + 0.5 * draw(40, width, seed=9 + n) for n, (part, values) in enumerate(old.items())}
    unit = torch.nn.functional.normalize
    exact = sum(unit(old[part]) @ unit(near[part]).T for part in old) / 3
    signs = sketch_signs(tuple(old), width)
    left, right = ({part: sketch(side[part], signs[part]) for part in side} for side in (old, near))
    found = unit_similarity(left, right, sketches=True)
    assert float((found - exact).abs().max()) < 6 / SKETCH_SIZE**0.5
    assert torch.equal(found.argmax(dim=1), torch.arange(40))
    assert unit_similarity(left, left, sketches=True).diagonal() == pytest.approx(1.0, abs=1e-5)
    assert all(part.shape == (40, SKETCH_SIZE) for part in left.values())


@pytest.mark.parametrize("width", [512, 768, 1300])
def test_the_sketch_of_a_product_is_the_product_with_a_sketch(width: int) -> None:
    rows, R = draw(60, 20), draw(20, width, seed=1)
    signs = sketch_signs(("gate", "up", "down"), width)["up"]
    assert sketch(rows @ R, signs) == pytest.approx(rows @ sketch(R, signs), abs=1e-4)


def test_narrow_units_are_compared_whole() -> None:
    rows, signs = draw(5, 300), sketch_signs(("gate", "up", "down"), 300)
    assert set(signs) == {"gate", "up", "down"}
    assert all(torch.equal(sketch(rows, sign), rows) for sign in signs.values())


@pytest.mark.parametrize("name", ["gpt2", "gemma3"])
def test_a_text_of_more_tokens_than_a_context_is_read_up_to_there(name: str, tmp_path: Path) -> None:
    """As Japanese is to a byte-level tokenizer: a piece of few characters is more tokens than GPT-2 has positions."""
    small = {"n_positions": 64} if name == "gpt2" else {"max_position_embeddings": 64}
    models = pico_model("llama"), pico_model(name, **small)
    old, new = (
        Backbone.open(save_backbone(tmp_path / str(side), model, pico_tokenizer(["the", "cat"])))
        for side, model in enumerate(models)
    )
    assert (old.context, new.context) == (256, 64)
    text = "the " + "q" * 400 + " cat"
    pair = paired_activations(old, new, [text], Sampling(tokens=500))
    assert pair.old.shape[1] == pair.new.shape[1] == 64 - activations.SINK_TOKENS
