"""Cross-LoRA (arXiv 2508.05232): transfer of an update between the singular subspaces of the base weights.

LoRA-Align solves ``P_U = argmin ||P U_s - U_t||_F`` and likewise ``P_V``. As ``U_s`` has orthonormal columns,
``P_U = U_t U_s^T``. So LoRA-Shift, ``dW_t = P_U dW_s P_V^T``, is ``(U_t (U_s^T B)) ((A V_s) V_t^T)``: no dense update,
no fit, no data. Singular vectors are paired by their order.
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
from .options import check_bounds
from .per_module import transfer_modules
from .registry import method
from .sections import get_section


@dataclass(frozen=True)
class CrossLoraOptions:
    """Options of `cross-lora`.

    Attributes:
        rank: Singular vectors of each weight that are used, at most the dimensions of both weights.
        gain: Factor on the whole update.
    """

    rank: int = 320
    gain: float = 1.0

    def __post_init__(self) -> None:
        check_bounds(self, {"rank": 1})


Factors = tuple[Tensor, Tensor, Tensor, Tensor]
"""``U_s (out_o, k)``, ``V_s (in_o, k)``, ``U_t (out_n, k)``, ``V_t (in_n, k)``."""
FACTORS = ("U_s", "V_s", "U_t", "V_t")


def build_svd(request: SectionRequest) -> dict[str, Tensor]:
    """Decompose the weights of every matched layer, in bfloat16: ``2 k (out_o + in_o + out_n + in_n)`` bytes a part."""
    tensors: dict[str, Tensor] = {}
    for pair in request.progress("decomposing weights", request.layers):
        for part in [part for part in request.parts if part in pair.gains]:
            weights = request.old.part(pair.old, part), request.new.part(pair.new, part)
            factors = align_svd(*weights, request.options.rank, request.basis(pair, part), part, request.seed)
            tensors |= {
                f"{pair.new}.{part}.{name}": factor.to(torch.bfloat16)
                for name, factor in zip(FACTORS, factors, strict=True)
            }
    return tensors


def align_svd(old: Tensor, new: Tensor, rank: int, basis: Basis, part: str, seed: int = 0) -> Factors:
    """Return the leading singular vectors of both weights, with the signs of the new pairs aligned to the old ones.

    The sign of a pair (u, v) is arbitrary, and a wrong one reverses that component of the update. The vectors in hidden
    space (v of input projections, u of output projections) determine it: they are mapped by the change of basis, and
    both vectors of a new pair are negated where ``v_t . R_in^T v_s`` or ``u_t . R_out u_s`` is negative. This is a
    departure from the paper.

    Args:
        old: Old weight, (out_o, in_o).
        new: New weight, (out_n, in_n).
        rank: Singular vectors at most.
        basis: The change of basis of the part.
        part: The part.
        seed: Random seed of the truncated SVD.
    """
    k = min(rank, *old.shape, *new.shape)
    U_s, _, V_s = truncated_svd(old, k, seed)
    U_t, _, V_t = truncated_svd(new, k, seed)
    if part in OUTPUT_PROJECTIONS:
        agreement = (basis.map_outputs(U_s) * U_t).sum(dim=0)
    else:
        agreement = (basis.map_inputs(V_s.T).T * V_t).sum(dim=0)
    sign = torch.where(agreement < 0, -1.0, 1.0)
    return U_s, V_s, U_t * sign, V_t * sign


def has_enough_vectors(stored: Mapping[str, Any], options: CrossLoraOptions) -> bool:
    """Return whether a stored section has enough singular vectors; they are in order, so more than needed are fine."""
    return stored.get("rank", 0) >= options.rank


SVD = SectionSpec("svd", build_svd, ("rank",), has_enough_vectors)


@method("cross-lora", options=CrossLoraOptions, section=SVD)
def cross_lora(inputs: MethodInput, options: CrossLoraOptions) -> MethodResult:
    """Project the factors between the leading singular subspaces of the weights."""
    section = get_section(inputs, "cross-lora", SVD, options)
    old, new = inputs.map.old.arch, inputs.map.new.arch

    def transfer(pair: LayerPair, part: str, update: LowRank) -> tuple[LowRank, Mapping[str, float]]:
        heights = (*old.in_layer(pair.old).shape(part), *new.in_layer(pair.new).shape(part))
        factors = [
            section.read(f"{pair.new}.{part}.{name}", (size, None)) for name, size in zip(FACTORS, heights, strict=True)
        ]
        k = min(options.rank, *heights)
        U_s, V_s, U_t, V_t = (_leading(factor, k, section.where) for factor in factors)
        bias = None if update.bias is None else options.gain * (U_t @ (U_s.T @ update.bias))
        shifted = LowRank((update.A @ V_s) @ V_t.T, options.gain * (U_t @ (U_s.T @ update.B)), bias)
        before = update.norm()
        return shifted, {"aligned": float(k), "norm_kept": shifted.norm() / before if before else 1.0}

    return transfer_modules(inputs, transfer)


def _leading(factor: Tensor, k: int, where: str) -> Tensor:
    if factor.shape[1] < k:
        raise LoraSuiteError("the section has too few singular vectors", where=where, got=factor.shape[1], wanted=k)
    return factor[:, :k]
