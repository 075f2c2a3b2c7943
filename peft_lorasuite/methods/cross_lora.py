"""Cross-LoRA (arXiv 2508.05232): singular subspaces of the base weights aligned, the update carried between them.

LoRA-Align asks for ``P_U = argmin ||P U_s - U_t||_F``; ``U_s`` has orthonormal columns, so ``P_U = U_t U_s^T``, ``P_V``
alike, with nothing left over. LoRA-Shift, ``dW_t = P_U dW_s P_V^T``, is therefore ``(U_t (U_s^T B)) ((A V_s) V_t^T)``:
no dense delta, no fit, no data. Singular vectors are paired by their order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..arch.spec import OUTPUT_PROJECTIONS
from ..errors import LoraSuiteError
from ..linalg.basis import Basis
from ..linalg.lowrank import LowRank, truncated_svd
from ..mapping.layer_pair import LayerPair
from ..mapping.sections import SectionRequest, SectionSpec
from .base import MethodInput, MethodResult
from .per_module import transfer_modules
from .registry import method
from .sections import get_section


@dataclass(frozen=True)
class CrossLoraOptions:
    """Options of `cross-lora`.

    Attributes:
        rank: Singular vectors of each weight that are aligned, at most its dimensions on either side.
        gain: Factor on the whole update.
    """

    rank: int = 320
    gain: float = 1.0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise LoraSuiteError("the number of singular vectors is not positive", where="rank", got=self.rank)


Factors = tuple[Tensor, Tensor, Tensor, Tensor]
"""``U_s (out_o, k)``, ``V_s (in_o, k)``, ``U_t (out_n, k)``, ``V_t (in_n, k)``."""
FACTORS = ("U_s", "V_s", "U_t", "V_t")


def build_svd(request: SectionRequest) -> dict[str, Tensor]:
    """Decompose the weights of every matched layer; bfloat16, ``2 k (out_o + in_o + out_n + in_n)`` bytes a part."""
    tensors: dict[str, Tensor] = {}
    for pair in request.progress("decomposing weights", request.layers):
        for part in request.parts:
            weights = request.old.part(pair.old, part), request.new.part(pair.new, part)
            factors = align_svd(*weights, request.options.rank, request.basis(pair, part), part, request.seed)
            tensors |= {
                f"{pair.new}.{part}.{name}": factor.to(torch.bfloat16)
                for name, factor in zip(FACTORS, factors, strict=True)
            }
    return tensors


def align_svd(old: Tensor, new: Tensor, rank: int, basis: Basis, part: str, seed: int = 0) -> Factors:
    """Return the leading singular vectors of an old and a new weight, the signs of the new pairs fitted to the old.

    The sign of a pair (u, v) is arbitrary, and a wrong one turns the update round. The shared tokens fix it: what
    stands in hidden space (v of readers, u of writers) is moved by the map's change of basis, ``v_t . R_in^T v_s`` or
    ``u_t . R_out u_s``, and both vectors of a new pair are turned where this is negative. The other vector stands in
    head or unit space, of which the tokens say nothing.
    """
    k = min(rank, *old.shape, *new.shape)
    U_s, _, V_s = truncated_svd(old, k, seed)
    U_t, _, V_t = truncated_svd(new, k, seed)
    agreement = (
        (basis.map_outputs(U_s) * U_t).sum(dim=0)
        if part in OUTPUT_PROJECTIONS
        else (basis.map_inputs(V_s.T).T * V_t).sum(dim=0)
    )
    sign = torch.where(agreement < 0, -1.0, 1.0)
    return U_s, V_s, U_t * sign, V_t * sign


def has_enough_vectors(kept: Mapping[str, Any], options: CrossLoraOptions) -> bool:
    """A section of more singular vectors serves fewer: they are in order."""
    return kept.get("rank", 0) >= options.rank


SVD = SectionSpec("svd", build_svd, ("rank",), has_enough_vectors)


@method("cross-lora", options=CrossLoraOptions, section=SVD)
def cross_lora(inputs: MethodInput, options: CrossLoraOptions) -> MethodResult:
    """Carry updates between the leading singular subspaces of the base weights (Cross-LoRA; data-free)."""
    section = get_section(inputs, "cross-lora", SVD, options)
    old, new = inputs.map.old.arch, inputs.map.new.arch

    def move(pair: LayerPair, part: str, update: LowRank) -> tuple[LowRank, Mapping[str, float]]:
        heights = (*old.shape(part), *new.shape(part))
        read = [
            section.read(f"{pair.new}.{part}.{name}", (size, None)) for name, size in zip(FACTORS, heights, strict=True)
        ]
        k = min(options.rank, *heights)
        U_s, V_s, U_t, V_t = (_leading(factor, k, section.where) for factor in read)
        bias = None if update.bias is None else options.gain * (U_t @ (U_s.T @ update.bias))
        moved = LowRank((update.A @ V_s) @ V_t.T, options.gain * (U_t @ (U_s.T @ update.B)), bias)
        before = update.norm()
        return moved, {"aligned": float(k), "norm_kept": moved.norm() / before if before else 1.0}

    return transfer_modules(inputs, move)


def _leading(factor: Tensor, k: int, where: str) -> Tensor:
    if factor.shape[1] < k:
        raise LoraSuiteError("the section has too few singular vectors", where=where, got=factor.shape[1], wanted=k)
    return factor[:, :k]
