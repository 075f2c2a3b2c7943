"""Changes of basis on pairs whose right answer is known: the numerical proofs of the transfer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peft_lorasuite.errors import LoraSuiteError
from peft_lorasuite.linalg.basis import EXACT, Basis, Rotary, fit_heads, fit_units, hidden_map, pseudo_inverse


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def turn(size: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(draw(size, size, seed=seed))[0]


def gains(size: int, seed: int = 0) -> Tensor:
    return 0.5 + torch.rand(size, generator=torch.Generator().manual_seed(seed))


def rms(x: Tensor) -> Tensor:
    return x / (x**2).mean(dim=-1, keepdim=True).sqrt()


def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("sizes", [(12, 12), (12, 20), (12, 7)])
def test_least_squares_finds_any_linear_map_of_the_embeddings(sizes: tuple[int, int]) -> None:
    E, W = draw(50, sizes[0]), draw(*sizes, seed=1)
    assert relative(hidden_map(E, E @ W), W) < 1e-5


def test_the_normal_equations_in_chunks_are_the_least_squares_solution() -> None:
    E_o, E_n = draw(20000, 6), draw(20000, 5, seed=1)
    assert relative(hidden_map(E_o, E_n), torch.linalg.lstsq(E_o, E_n).solution) < 1e-3


def test_polar_is_semi_orthogonal_up_to_a_scale_and_finds_scaled_rotations() -> None:
    E, Q = draw(60, 8), turn(8)
    assert relative(hidden_map(E, 2.5 * E @ Q, "polar"), 2.5 * Q) < 1e-5
    W = hidden_map(E, E @ draw(8, 11, seed=2), "polar")
    gram = W @ W.T
    assert relative(gram, torch.eye(8) * gram.diagonal().mean()) < 1e-5


def test_polar_stands_noise_better() -> None:
    E, Q = draw(60, 20), turn(20)
    noisy = E @ Q + 0.5 * draw(60, 20, seed=3)
    assert relative(hidden_map(E, noisy, "polar"), Q) < relative(hidden_map(E, noisy), Q)


def test_the_identity_looks_at_nothing_but_the_sizes() -> None:
    assert torch.equal(hidden_map(draw(2, 5), draw(2, 5), "identity"), torch.eye(5))
    with pytest.raises(LoraSuiteError, match=r"the identity needs equal hidden sizes.*5 and 6"):
        hidden_map(draw(9, 5), draw(9, 6), "identity")


@pytest.mark.parametrize("E", [draw(7, 8), draw(50, 3) @ draw(3, 8, seed=1)], ids=["few", "flat"])
def test_tokens_that_do_not_span_the_old_hidden_space_are_refused(E: Tensor) -> None:
    with pytest.raises(LoraSuiteError, match=r"do not span the old hidden space.*rank \d from \d+ shared tokens"):
        hidden_map(E, draw(len(E), 6))


def test_an_unknown_hidden_map_is_refused_by_name() -> None:
    with pytest.raises(LoraSuiteError, match="'procrustes'"):
        hidden_map(draw(9, 5), draw(9, 5), "procrustes")


@pytest.mark.parametrize(
    "W", [draw(4, 9), draw(9, 4), draw(6, 6), draw(8, 2) @ draw(2, 5)], ids=["wide", "tall", "square", "flat"]
)
def test_the_pseudo_inverse_is_one(W: Tensor) -> None:
    inverse = pseudo_inverse(W)
    assert relative(W @ inverse @ W, W) < 1e-4
    assert relative(inverse @ W @ inverse, inverse) < 1e-4


def basis(hidden: Tensor, old: Tensor, new: Tensor, **facts: bool | float) -> Basis:
    return Basis(hidden, pseudo_inverse(hidden), old, new, **facts)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    "hidden", [turn(8), 3 * turn(8), torch.eye(8, 13), 0.2 * torch.eye(8, 13)], ids=["turn", "scaled", "wide", "both"]
)
def test_what_reads_behind_a_norm_reads_the_same_in_the_new_basis(hidden: Tensor) -> None:
    old, new, rows, x = gains(8), gains(hidden.shape[1], 1), draw(5, 8, seed=2), draw(30, 8, seed=3)
    wanted = (rms(x) * old) @ rows.T
    got = (rms(x @ hidden) * new) @ basis(hidden, old, new).map_inputs(rows).T
    assert relative(got, wanted) < 1e-5


def test_what_reads_the_bare_residual_stream_reads_the_same_at_any_scale() -> None:
    hidden, ones, rows, x = 3 * turn(8), torch.ones(8), draw(5, 8, seed=2), draw(30, 8, seed=3)
    assert relative((x @ hidden) @ basis(hidden, ones, ones, normed=False).map_inputs(rows).T, x @ rows.T) < 1e-5


def test_what_writes_adds_the_same_to_the_new_stream() -> None:
    hidden, ones, columns = draw(8, 11), torch.ones(8), draw(8, 4, seed=1)
    wide = Basis(hidden, pseudo_inverse(hidden), ones, torch.ones(11), normed=False, residual=0.25)
    assert relative(wide.map_outputs(columns), 0.25 * hidden.T @ columns) < 1e-6


def test_a_norm_behind_a_writer_is_undone_by_its_gains() -> None:
    order, old, columns = torch.randperm(8, generator=torch.Generator().manual_seed(0)), gains(8), draw(8, 4)
    new = gains(8, 1)
    got = basis(torch.eye(8)[:, order], old, new, normed=False).map_outputs(columns)
    assert relative(got * new[:, None], (columns * old[:, None])[order]) < 1e-5


def test_a_gain_of_nearly_zero_is_not_divided_by() -> None:
    new = gains(8)
    new[3] = 1e-12
    read = basis(torch.eye(8), torch.ones(8), new).map_inputs(torch.ones(1, 8))
    assert float(read.abs().max()) < 1e4


def test_any_invertible_map_of_a_heads_dimensions_is_found() -> None:
    M, maps = draw(3, 5, 20), draw(3, 5, 5, seed=1)
    fit = fit_heads(M, maps @ M, torch.ones(3))
    assert relative(fit.T.mT, maps) < 1e-4
    assert float(fit.residual.max()) < EXACT
    assert fit.norms[:, 1] == pytest.approx((maps @ M).flatten(1).norm(dim=1), rel=1e-5)


def test_dead_heads_fit_nothing_and_nothing_breaks() -> None:
    fit = fit_heads(torch.zeros(1, 5, 20), draw(1, 5, 20), torch.zeros(1))
    assert not fit.T.any()
    assert float(fit.residual) == pytest.approx(1.0)
    assert float(fit_heads(draw(1, 5, 20), torch.zeros(1, 5, 20), torch.ones(1)).residual) == 0.0


ROTARY = {
    "same": (Rotary(8, 8, 1e4, 1e4), [0, 1, 2, 3]),
    "twice as many": (Rotary(4, 8, 1e4, 1e4), [0, 0, 1, 1]),
    "half as many": (Rotary(8, 4, 1e4, 1e4), [0, 2]),
    "another base": (Rotary(8, 4, 1e4, 1e2), [0, 1]),
}
"""Old and new rotary dimensions, and per new pair the old pair of the nearest frequency."""


def planted_pairs(rotary: Rotary, sources: list[int], rest: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Old heads, and new ones whose rotary pairs are old pairs turned and scaled; other dimensions mixed at will."""
    M = draw(3, rotary.old_size + rest[0], 30).double()
    half_o, half_n = rotary.old_size // 2, rotary.new_size // 2
    z = torch.complex(M[:, :half_o], M[:, half_o : 2 * half_o])[:, sources]
    w = z * torch.complex(draw(3, half_n, 1, seed=1), draw(3, half_n, 1, seed=2))
    mixed = draw(3, rest[1], rest[0], seed=3).double() @ M[:, rotary.old_size :]
    return M, torch.cat([w.real, w.imag, mixed], dim=1)


@pytest.mark.parametrize("case", ROTARY)
@pytest.mark.parametrize("rest", [(0, 0), (3, 2)])
def test_a_turned_and_scaled_rotary_pair_is_found_between_any_head_sizes(case: str, rest: tuple[int, int]) -> None:
    rotary, sources = ROTARY[case]
    M, N = planted_pairs(rotary, sources, rest)
    assert relative(rotary.fit(M @ M.mT, M @ N.mT).mT @ M, N) < 1e-10
    assert float(fit_heads(M.float(), N.float(), torch.ones(3), rotary).residual.max()) < 1e-5


def rotation(size: int, theta: float, position: float) -> Tensor:
    """The matrix by which transformers turns a head at a position: dimension p with p + size / 2."""
    angle = position * theta ** (-2 * torch.arange(size // 2).double() / size)
    cos, sin = angle.cos().diag(), angle.sin().diag()
    return torch.cat([torch.cat([cos, -sin], dim=1), torch.cat([sin, cos], dim=1)])


def test_where_no_map_is_exact_the_fit_lets_positions_through() -> None:
    T = fit_heads(draw(2, 8, 30), draw(2, 8, 30, seed=1), torch.ones(2), Rotary(8, 8, 1e4, 1e4)).T.double()
    for position in (1.0, 7.0, 100.0):
        R = rotation(8, 1e4, position)
        assert relative(R @ T.mT, T.mT @ R) < 1e-6


def test_the_narrow_fit_is_the_best_of_its_kind() -> None:
    rotary, M, N = Rotary(6, 6, 1e4, 1e4), draw(1, 6, 30).double(), draw(1, 6, 30, seed=1).double()
    T = rotary.fit(M @ M.mT, M @ N.mT)
    best = (T.mT @ M - N).norm()
    first, second = torch.arange(3), torch.arange(3, 6)
    for seed in range(20):
        step = torch.zeros_like(T)
        a, b = 0.1 * draw(3, seed=seed).double(), 0.1 * draw(3, seed=seed + 50).double()
        step[:, first, first] = step[:, second, second] = a
        step[:, first, second], step[:, second, first] = b, -b
        assert ((T + step).mT @ M - N).norm() > best


def test_units_are_scaled_one_by_one() -> None:
    M, scale = draw(6, 20), 0.5 + draw(6, seed=1).abs()
    fit = fit_units(M, scale[:, None] * M, 3.0)
    assert fit.scale == pytest.approx(scale, rel=1e-5)
    assert float(fit.residual) < 1e-6
    assert fit.norms.tolist() == pytest.approx([3.0, float((scale[:, None] * M).norm())], rel=1e-5)
    assert float(fit_units(torch.zeros(2, 4), draw(2, 4), 0.0).residual) == pytest.approx(1.0)
