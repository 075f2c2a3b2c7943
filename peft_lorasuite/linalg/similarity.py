"""Similarity of layers, attention heads and feed-forward units."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ..arch.spec import Heads
from ..errors import LoraSuiteError, unknown_name_error

Activations = Float[Tensor, "layers tokens hidden"]
Scores = Float[Tensor, "old new"]
SKETCH_SIZE = 256
"""Dimensions to which the units of a wide feed-forward layer are reduced before they are compared."""
WIDE = 1024
"""Feed-forward layers with more dimensions than this, summed over their parts, are wide."""
CHUNK = 256
"""Rows that are converted to float32 at once: the copy stays in the processor's cache."""
MIN_TOKENS = 4
"""Fewest tokens for which the unbiased HSIC, divided by ``n (n - 3)``, is defined."""


def layer_similarity(name: str, old: Activations, new: Activations, *, block: int = 256) -> Scores:
    """Return the similarity of every old layer with every new layer, ``(L_o, L_n)``.

    Args:
        name: ``cka`` (LoRASuite), ``cca``, ``pwcca`` or ``procrustes`` (ablations of appendix A.6).
        old: Hidden states of the old layers, ``(L_o, tokens, D_o)``.
        new: Hidden states of the new layers on the same tokens, ``(L_n, tokens, D_n)``.
        block: Tokens per minibatch of CKA; an incomplete last minibatch is left out.

    Raises:
        LoraSuiteError: For an unknown name, and for fewer than `MIN_TOKENS` tokens.
    """
    if name not in SIMILARITIES:
        raise unknown_name_error("similarity", name, SIMILARITIES)
    if old.shape[1] != new.shape[1] or min(old.shape[1], block) < MIN_TOKENS:
        raise LoraSuiteError(
            "too few paired tokens", got=f"{old.shape[1]} and {new.shape[1]} in blocks of {block}",
            wanted=f"at least {MIN_TOKENS} pairs",
        )  # fmt: skip
    return SIMILARITIES[name](old, new, min(block, old.shape[1]))


def cka(old: Activations, new: Activations, block: int) -> Scores:
    """Return the unbiased minibatch CKA with a linear kernel (LoRASuite section 3.2, with the estimator HSIC_1)."""
    cross = torch.zeros(len(old), len(new), dtype=torch.float64)
    auto_old, auto_new = torch.zeros(len(old)).double(), torch.zeros(len(new)).double()
    for start in range(0, old.shape[1] - block + 1, block):
        K, L = (torch.stack([_gram(layer[start : start + block]) for layer in x]) for x in (old, new))
        cross += _hsic(K, L)
        auto_old += torch.stack([_hsic(k[None], k[None]).squeeze() for k in K])
        auto_new += torch.stack([_hsic(k[None], k[None]).squeeze() for k in L])
    scale = (auto_old.clamp(min=0)[:, None] * auto_new.clamp(min=0)[None]).sqrt()
    return torch.where(scale > 0, cross / scale.clamp(min=1e-300), 0.0).float()


def _gram(x: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens tokens"]:
    """Return the Gram matrix with a zero diagonal; activations are centered first for precision in float32."""
    x = x.float() - x.float().mean(dim=0)
    gram = (x @ x.T).double()
    gram.diagonal().zero_()
    return gram


def _hsic(K: Tensor, L: Tensor) -> Float[Tensor, "old new"]:
    """Return HSIC_1 of every Gram matrix in K with every one in L, all ``(n, n)`` with a zero diagonal."""
    n = K.shape[-1]
    rows_k, rows_l = K.sum(dim=2), L.sum(dim=2)
    trace = K.flatten(1) @ L.flatten(1).T
    sums = rows_k.sum(dim=1)[:, None] * rows_l.sum(dim=1)[None]
    return (trace + sums / ((n - 1) * (n - 2)) - 2 / (n - 2) * (rows_k @ rows_l.T)) / (n * (n - 3))


def _cca(old: Activations, new: Activations, weighted: bool) -> Scores:
    """Return the mean canonical correlation; ``weighted`` by the projections of the old activations (PWCCA)."""
    bases_old, bases_new = [_basis(x) for x in old], [_basis(x) for x in new]
    scores = torch.zeros(len(old), len(new))
    for i, basis in enumerate(bases_old):
        centered = (old[i] - old[i].mean(dim=0)).float()
        for j, other in enumerate(bases_new):
            U, s, _ = torch.linalg.svd(basis.T @ other, full_matrices=False)
            weight = ((basis @ U).T @ centered).abs().sum(dim=1) if weighted else torch.ones_like(s)
            scores[i, j] = (weight * s.clamp(max=1)).sum() / weight.sum().clamp(min=1e-30)
    return scores


def _basis(x: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens kept"]:
    """Return an orthonormal basis of 99 % of the variance, with at most a quarter as many columns as tokens."""
    x = x.float() - x.float().mean(dim=0)
    U, s, _ = torch.linalg.svd(x, full_matrices=False)
    energy = (s**2).cumsum(0) / (s**2).sum().clamp(min=1e-30)
    return U[:, : max(1, min(int((energy < 0.99).sum()) + 1, len(x) // 4))]


def procrustes(old: Activations, new: Activations, block: int) -> Scores:
    """Return one minus the normalized Procrustes distance: nuclear norm of ``X^T Y`` over both Frobenius norms."""
    del block
    rows = []
    for x in map(_normalize, old):
        rows.append(torch.stack([torch.linalg.svdvals(x.T @ _normalize(y)).sum() for y in new]))
    return torch.stack(rows)


def _normalize(x: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens hidden"]:
    """Center one layer's activations and scale them to a norm of one."""
    x = (x - x.mean(dim=0)).float()
    return x / x.norm().clamp(min=1e-30)


SIMILARITIES: dict[str, Callable[[Activations, Activations, int], Scores]] = {
    "cka": cka,
    "cca": lambda old, new, block: _cca(old, new, weighted=False),
    "pwcca": lambda old, new, block: _cca(old, new, weighted=True),
    "procrustes": procrustes,
}


def head_similarity(old: dict[str, Tensor], new: dict[str, Tensor], old_heads: Heads, new_heads: Heads) -> Scores:
    """Return the cosine similarity of the heads' interaction matrices ``[Q^T K; V^T O^T]`` (LoRASuite section 3.3).

    The interaction matrices are never formed: ``<Q_a^T K_a, Q_b^T K_b> = sum(Q_a * (K_a K_b^T Q_b))``.

    Args:
        old: Weights of q, k, v and o as ``(heads, d_o, D_n)``, converted to the new hidden size; k and v have one
            entry per key/value head.
        new: The same of the new layer, ``(heads, d_n, D_n)``.
        old_heads: Head counts of the old layer.
        new_heads: Head counts of the new layer.

    Returns:
        ``(H_o, H_n)``, by query heads.
    """
    dot = _dots(old["q"], old["k"], new["q"], new["k"], old_heads, new_heads)
    dot += _dots(old["o"], old["v"], new["o"], new["v"], old_heads, new_heads)
    return dot / (_norms(old, old_heads)[:, None] * _norms(new, new_heads)[None]).clamp(min=1e-30)


def _dots(old: Tensor, old_group: Tensor, new: Tensor, new_group: Tensor, old_heads: Heads, new_heads: Heads) -> Scores:
    """Return ``<Q_a^T K_a, Q_b^T K_b>`` of all query heads, each with its key/value head, for one of these at a time.

    The smallest products come first: all query heads of a group share ``K_a K_b^T``.
    """
    left, right = old.flatten(1), new.unflatten(0, (new_heads.key_value, new_heads.group))
    found = []
    for query, group in zip(left.split(old_heads.group), old_group, strict=True):
        moved = (group @ new_group.mT)[:, None] @ right  # (key_value, group, d_o, D_n)
        found.append(query @ moved.flatten(2).flatten(0, 1).T)
    return torch.cat(found)


def _norms(parts: dict[str, Tensor], heads: Heads) -> Float[Tensor, " heads"]:
    """Return the Frobenius norms of the interaction matrices."""
    grams = {part: weight @ weight.mT for part, weight in parts.items()}
    pairs = (grams["q"] * grams["k"].repeat_interleave(heads.group, 0)).sum(dim=(1, 2))
    pairs += (grams["o"] * grams["v"].repeat_interleave(heads.group, 0)).sum(dim=(1, 2))
    return pairs.clamp(min=0).sqrt()


def unit_rows(old: dict[str, Tensor], new: dict[str, Tensor], *, sketches: bool = False) -> tuple[Tensor, Tensor]:
    """Return a row for every feed-forward unit, old and new, so that inner products are similarities.

    The similarity of two units is the mean cosine over the parts that both layers have.

    Args:
        old: Part -> weights ``(units, width)``, converted to the new hidden size.
        new: The same of the new layer.
        sketches: Whether the weights are sketches, with different signs for each part. They are then summed over the
            parts, which shortens the rows: equal up to ``1 / sqrt(SKETCH_SIZE)``, and exact for equal units.
    """
    unit = torch.nn.functional.normalize
    parts = [[unit(side[part]) for part in old if part in new] for side in (old, new)]
    if sketches:
        left, right = (unit(sum(side, torch.zeros(()))) for side in parts)
    else:
        left, right = (torch.cat(side, dim=1) / len(side) ** 0.5 for side in parts)
    return left, right


def is_wide(parts: int, width: int) -> bool:
    """Whether units with this many parts of this width are compared by sketches."""
    return parts * width > WIDE


def sketch_signs(parts: Sequence[str], width: int) -> dict[str, Tensor | None]:
    """Return the random signs of each part's sketch, the same on every call; None if the layer is not wide."""
    if not is_wide(len(parts), width):
        return dict.fromkeys(parts)
    drawn = torch.randint(0, 2, (len(parts), width), generator=torch.Generator().manual_seed(0)) * 2.0 - 1.0
    return dict(zip(parts, drawn, strict=True))


def sketch(rows: Float[Tensor, "rows width"], signs: Float[Tensor, " width"] | None) -> Float[Tensor, "rows sketch"]:
    """Reduce rows to `SKETCH_SIZE` dimensions: sums of a few dimensions each, with random signs, in float32.

    Inner products are preserved on average, as by a dense random projection, at the cost of reading the rows once.
    Sketches are linear: ``sketch(X @ R) = X @ sketch(R)``. Without signs the rows are returned unchanged.
    """
    if signs is None:
        return rows.float()
    sums = torch.zeros_like(rows[:, :SKETCH_SIZE], dtype=torch.float32)  # with the order of dimensions of the rows
    for part, total in zip(rows.split(CHUNK), sums.split(CHUNK), strict=True):
        part = part.float()
        for start in range(0, len(signs), SKETCH_SIZE):
            piece = part[:, start : start + SKETCH_SIZE]
            total[:, : piece.shape[1]].addcmul_(piece, signs[start : start + SKETCH_SIZE])
    return sums
