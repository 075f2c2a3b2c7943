"""Activation-aligned transport: each module's update goes through maps fitted on what the modules read and write.

For matched modules with inputs ``X_o, X_n`` and outputs ``Y_o, Y_n`` (without biases) on the same calibration tokens,
``A' = A R_in`` with ``X_o ≈ R_in X_n`` and ``B' = R_out B`` with ``Y_n ≈ R_out Y_o``. What q, k, v, gate and up put out
is linear in the input, so that its products follow from the input's and the weights. Both maps are kept as two thin
factors, cut to the directions in which they put out most. What lies outside of everything that a projection ever puts
out (most of gate and up, wider than what they read) cannot be fitted and is lost; gradients reach it. With
``outputs="gradients"`` R_out is such that ``R_out^T`` carries the new model's output gradients to the old one's: then
both updates change the loss alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..arch.layout import group_of
from ..arch.spec import WRITERS, Heads
from ..errors import LoraSuiteError, unknown
from ..linalg.lowrank import LowRank, truncated_svd
from ..mapping.moments import Moments, gather
from ..mapping.sections import Request, Section, SectionSpec
from ..mapping.upgrade_map import LayerPair
from ..models.activations import Sampling, calibration_texts
from .base import Draft, Job, method
from .per_module import carry

FITS = ("ridge", "procrustes")
OUTPUTS = ("outputs", "gradients")
ROUNDING = 1e-5
"""Share of a direction's energy that is no more than the rounding of float32 sums."""
INPUT = {"q": "q", "k": "q", "v": "q", "o": "o", "gate": "up", "up": "up", "down": "down"}
"""Part -> the part whose module's input stands for its own."""


@dataclass(frozen=True)
class TransportOptions:
    """Options of `transport`.

    Attributes:
        fit: ``"ridge"`` regression, or orthogonal ``"procrustes"``.
        outputs: What R_out is fitted on: the modules' ``"outputs"``, or the ``"gradients"`` there of the next tokens'
            NLL, by a backward pass through either model.
        energy: Scale each update so that ``||dW X|| / ||W X||`` is what it was, over the matched heads and units.
        gain: Factor on the whole update.
        directions: Directions that a map keeps at most.
        tokens: Calibration tokens.
        ridge: Of the regression, as a share of the median diagonal of the products.
    """

    fit: str = "ridge"
    outputs: str = "outputs"
    energy: bool = True
    gain: float = 1.0
    directions: int = 256
    tokens: int = 4096
    ridge: float = 0.01

    def __post_init__(self) -> None:
        if self.fit not in FITS:
            raise unknown("fit", self.fit, FITS)
        if self.outputs not in OUTPUTS:
            raise unknown("choice of outputs", self.outputs, OUTPUTS)
        if self.directions < 1 or self.tokens < 4 or self.ridge < 0:
            got = f"directions {self.directions}, tokens {self.tokens}, ridge {self.ridge}"
            raise LoraSuiteError("an option of transport is too small", got=got, wanted="at least 1, 4 and 0")


def build(request: Request) -> dict[str, Tensor]:
    """Fit the maps of every matched layer on calibration text, in bfloat16.

    With k directions that is ``2 k (2 in_o + in_n)`` bytes an input and ``2 k (out_o + out_n)`` an output.
    """
    names = sorted({INPUT[part] for part in request.parts})
    names += [f"{part} out" for part in request.parts if part in WRITERS]
    options: TransportOptions = request.options
    names += [f"{part} grad" for part in request.parts if options.outputs == "gradients"]
    tensors: dict[str, Tensor] = {}
    found = gather(
        request.old, request.new, request.map.pairs, names, calibration_texts(request.calibration),
        Sampling(options.tokens, seed=request.map.options.seed), device_map=request.device_map, dtype=request.dtype,
        progress=request.progress,
    )  # fmt: skip
    pairs = {pair.new: pair for pair in request.map.layers}
    for (_, j), moments in found:
        for name in names:
            if " " not in name:
                fitted = fit_input(moments[name], options, f"layer {j}, input of {name}")
                tensors |= {f"{j}.{name}.{key}": value for key, value in fitted.items()}
        for part in request.parts:
            tensors |= {f"{j}.{part}.{key}": value for key, value in _output(request, pairs[j], part, moments).items()}
    return tensors


def fit_input(moments: Moments, options: TransportOptions, where: str) -> dict[str, Tensor]:
    """Fit ``R_in ≈ U M``: ``U (in_o, k)`` orthonormal, ``M (k, in_n)``; ``var (k,)`` is the energy of ``M X_n``.

    ``X_o X_o^T`` is kept as ``F F^T + diag(rest)``, ``F (in_o, k)``; where it is too wide to be gathered, F is what the
    fit explains.
    """
    if moments.new is None:
        raise LoraSuiteError("the products of an input are missing", where=where)
    R = fit_map(options.fit, moments.cross, moments.new, options.ridge, where)
    U, M, var = shortened(R, moments.new, options.directions)
    F = U * var.sqrt()
    if moments.old is not None:
        directions, level, _ = truncated_svd(moments.old, options.directions)
        F = directions * level.sqrt()
    rest = (moments.old_energy - (F**2).sum(dim=1)).clamp(min=0)
    M = M if moments.sketch is None else M @ moments.sketch.T
    return {"U": U.bfloat16(), "M": M.bfloat16(), "var": var, "F": F.bfloat16(), "rest": rest}


def fit_map(
    kind: str, cross: Float[Tensor, "to from_"], gram: Float[Tensor, "from_ from_"], ridge: float, where: str
) -> Float[Tensor, "to from_"]:
    """Fit R in ``X_to ≈ R X_from`` from ``cross = X_to X_from^T`` and ``gram = X_from X_from^T``; float64 inside."""
    if kind == "procrustes":
        U, _, Vt = torch.linalg.svd(cross.double(), full_matrices=False)
        return (U @ Vt).float()
    level = gram.diagonal().median() if bool(gram.diagonal().median() > 0) else gram.diagonal().mean()
    if not bool(level > 0):
        return torch.zeros_like(cross)  # a module that reads or writes nothing
    damped = gram.double() + ridge * float(level) * torch.eye(len(gram), dtype=torch.float64)
    factor, failed = torch.linalg.cholesky_ex(damped)
    # Without a ridge, rounding can let a singular covariance through: a direction that the others span is noise then.
    spanned = not ridge and bool((factor.diagonal() ** 2 < ROUNDING * damped.diagonal()).any())
    if int(failed) or spanned:
        raise LoraSuiteError(
            "the covariance of the activations is singular", where=where, got=f"ridge {ridge}",
            do="raise the option ridge, or calibrate on more text",
        )  # fmt: skip
    return torch.cholesky_solve(cross.double().T, factor).T.float()


def shortened(R: Tensor, gram: Tensor, directions: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cut R to the directions of its output with most energy: ``R ≈ U M``; also return the energy of each."""
    U, s, _ = truncated_svd(R.double() @ _root(gram.double()), directions)
    U = U.float()
    return U, U.T @ R, (s**2).float()


def _root(gram: Tensor) -> Tensor:
    """Return L with ``L L^T = gram``, of a matrix that rounding may have made a little less than semi-definite."""
    level = max(float(gram.diagonal().mean()), 1e-30)
    for exponent in range(-12, 0):
        root, failed = torch.linalg.cholesky_ex(gram + 10.0**exponent * level * torch.eye(len(gram), dtype=gram.dtype))
        if not int(failed):
            return root
    raise LoraSuiteError("the products of the activations are no covariance", do="calibrate on other text")


def _output(request: Request, pair: LayerPair, part: str, moments: Mapping[str, Moments]) -> dict[str, Tensor]:
    """Fit ``R_out ≈ P Q`` of one part, and the energies of ``W X`` on the old and the new side, matched rows only."""
    fitted = _output_on_outputs(request, pair, part, moments)
    if request.options.outputs == "gradients":
        back = fit_input(moments[f"{part} grad"], request.options, f"layer {pair.new}, gradient of {part}")
        fitted |= {"P": back["M"].T, "Q": back["U"].T}
    return fitted


def _output_on_outputs(
    request: Request, pair: LayerPair, part: str, moments: Mapping[str, Moments]
) -> dict[str, Tensor]:
    options, where = request.options, f"layer {pair.new}, output of {part}"
    if part in WRITERS:
        seen = moments[f"{part} out"]
        if seen.old is None:
            raise LoraSuiteError("the products of an output are missing", where=where)
        R = fit_map(options.fit, seen.cross.T, seen.old, options.ridge, where)
        P, Q, _ = shortened(R, seen.old, options.directions)
        energy = torch.stack([seen.old_energy.sum(), seen.new_energy.sum()])
        return {"P": P.bfloat16(), "Q": Q.bfloat16(), "energy": energy}
    seen = moments[INPUT[part]]
    if seen.old is None or seen.new is None:
        raise LoraSuiteError("the products of an input are missing", where=where)
    W_o, W_n = request.old.part(pair.old, part), request.new.part(pair.new, part)
    (Q_o, T_o), (Q_n, T_n) = torch.linalg.qr(W_o), torch.linalg.qr(W_n)
    gram = T_o @ seen.old @ T_o.T
    R = fit_map(options.fit, T_n @ seen.cross.T @ T_o.T, gram, options.ridge, where)
    P, Q, _ = shortened(R, gram, options.directions)
    left, right = matched_rows(pair, part, request.map.old.arch.heads, request.map.new.arch.heads)
    energy = torch.stack([((W @ C) * W).sum() for W, C in ((W_o[left], seen.old), (W_n[right], seen.new))])
    return {"P": (Q_n @ P).bfloat16(), "Q": (Q @ Q_o.T).bfloat16(), "energy": energy}


def matched_rows(pair: LayerPair, part: str, old: Heads, new: Heads) -> tuple[Tensor, Tensor]:
    """Rows of a reading part's weight that belong to matched heads or units, old and new."""
    if part in ("gate", "up"):
        return pair.units[:, 0], pair.units[:, 1]
    left, right = pair.heads[:, 0], pair.heads[:, 1]
    if part in ("k", "v"):
        left, right = group_of(old)[left], group_of(new)[right]
    return _rows(left.unique(), old.size), _rows(right.unique(), new.size)


def _rows(heads: Tensor, size: int) -> Tensor:
    return (heads[:, None] * size + torch.arange(size)).reshape(-1)


def serves(kept: Mapping[str, Any], options: TransportOptions) -> bool:
    """Directions are in order of their energy: a section of more serves fewer."""
    same = all(kept.get(name) == getattr(options, name) for name in ("fit", "outputs", "tokens", "ridge"))
    return same and kept.get("directions", 0) >= options.directions


MAPS = SectionSpec("transport", build, ("fit", "outputs", "directions", "tokens", "ridge"), serves)


@method("transport", options=TransportOptions, section=MAPS)
def transport(job: Job, options: TransportOptions) -> Draft:
    """Carry updates through maps fitted on both models' activations on calibration text, their size matched."""
    section = job.section("transport", MAPS, options)

    def move(pair: LayerPair, part: str, update: LowRank) -> tuple[LowRank, Mapping[str, float]]:
        return _move(job, section, options, pair, part, update)

    return carry(job, move)


def _move(
    job: Job, section: Section, options: TransportOptions, pair: LayerPair, part: str, update: LowRank
) -> tuple[LowRank, Mapping[str, float]]:
    old, new, k = job.map.old.arch, job.map.new.arch, options.directions
    here, there = f"{pair.new}.{INPUT[part]}", f"{pair.new}.{part}"
    (out_o, in_o), (out_n, in_n) = old.shape(part), new.shape(part)
    U, M = section.read(f"{here}.U", (in_o, None))[:, :k], section.read(f"{here}.M", (None, in_n))[:k]
    var, rest = section.read(f"{here}.var", (None,))[:k], section.read(f"{here}.rest", (in_o,))
    F = section.read(f"{here}.F", (in_o, None))
    P, Q = section.read(f"{there}.P", (out_n, None))[:, :k], section.read(f"{there}.Q", (None, out_o))[:k]
    energy = section.read(f"{there}.energy", (2,))
    inner = update.A @ U
    moved = LowRank(inner @ M, P @ (Q @ update.B))
    left = right = slice(None)
    if part not in WRITERS:
        left, right = matched_rows(pair, part, old.heads, new.heads)
    seen = update.A @ F
    before = (update.A * rest) @ update.A.T + seen @ seen.T
    sizes = _energy(update.B[left], before), _energy(moved.B[right], (inner * var) @ inner.T)
    usable = options.energy and min(*sizes, *energy.tolist()) > 0
    factor = (sizes[0] / float(energy[0]) * float(energy[1]) / sizes[1]) ** 0.5 if usable else 1.0
    explained = float(var.sum() / ((F**2).sum() + rest.sum()).clamp(min=1e-30))
    bias = None if update.bias is None else options.gain * (P @ (Q @ update.bias))
    figures = {"explained": explained, "factor": factor}
    return LowRank(moved.A, moved.B * (factor * options.gain), bias), figures


def _energy(B: Tensor, gram: Tensor) -> float:
    """Return ``||B Z||^2`` from ``gram = Z Z^T``."""
    return float(((B @ gram) * B).sum())
