"""Updates of experts: as LoRA modules of each expert (transformers 4), or of 3-D parameters (``target_parameters``).

PEFT wraps a module with two such parameters twice: the tensors of the first one have ``base_layer`` in their names. The
factors of all experts are stacked. PEFT before 0.19 had those of parameters ``(E, out, in)`` the other way round.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..arch.experts import EXPERT_PARTS, PARAMETERS, ROUTER, Experts
from ..arch.spec import Architecture
from ..errors import LoraSuiteError
from ..linalg.lowrank import LowRank, check_values, stack
from .modules import Paths, check_rank, parameter_paths, scaling
from .peft_format import PREFIX

ExpertKey = tuple[int, int, str]
"""Layer, expert and part; a router is part ``router`` of expert 0."""
INNER = "base_layer"
SWAPPED_BEFORE = (0, 19)
"""Version of PEFT since which the factors of a parameter ``(E, out, in)`` are those of a linear module."""


@dataclass(frozen=True)
class ExpertModule:
    """Where a module's tensors belong: all experts of a layer, or one part of one expert.

    Attributes:
        layer: The layer.
        expert: The expert; None for the 3-D parameters.
        part: Its part; None for the 3-D parameters.
        inner: Whether it is the inner one of two wrappers.
    """

    layer: int
    expert: int | None = None
    part: str | None = None
    inner: bool = False


def find_expert_module(module: str, arch: Architecture) -> ExpertModule | None:
    """Return what of the experts a module path belongs to; None for other modules."""
    if router := _find_router(module, arch):
        return router
    match = re.fullmatch(rf"{re.escape(arch.layer_path)}\.(\d{{1,9}})\.([^.]+)\.experts(?:\.(.+))?", module)
    if match is None or arch.experts is None or match[2] not in arch.experts.mixtures:
        return None
    rest = match[3] or ""
    if rest in ("", INNER):
        return ExpertModule(int(match[1]), inner=rest == INNER)
    own = re.fullmatch(rf"(\d{{1,9}})\.({'|'.join(map(re.escape, arch.experts.modules))})", rest)
    if own is None:
        return None
    return ExpertModule(int(match[1]), int(own[1]), EXPERT_PARTS[arch.experts.modules.index(own[2])])


def _find_router(module: str, arch: Architecture) -> ExpertModule | None:
    match = re.fullmatch(rf"{re.escape(arch.layer_path)}\.(\d{{1,9}})\.([^.]+)\.([^.]+)", module)
    if match is None or arch.experts is None or match[2] not in arch.experts.mixtures:
        return None
    is_router = match[3] == arch.experts.router.rpartition(".")[2]
    return ExpertModule(int(match[1]), 0, ROUTER) if is_router else None


@dataclass
class ExpertReader:
    """Reads the tensors of experts.

    Attributes:
        config: The adapter's PEFT config.
        arch: Architecture of the backbone.
        where: Place for error messages.
        updates: ``(layer, expert, part)`` -> update, with the scaling in its factors.
        names: The same -> names of the tensors that it was read from.
    """

    config: Mapping[str, Any]
    arch: Architecture
    where: str
    updates: dict[ExpertKey, LowRank] = field(default_factory=dict)
    names: dict[ExpertKey, tuple[str, ...]] = field(default_factory=dict)

    def read(
        self, place: ExpertModule, used: Mapping[str, Tensor], names: tuple[str, ...], paths: Paths, *, both: bool
    ) -> None:
        """Read the tensors of one module.

        Args:
            place: Where they belong.
            used: Ending -> tensor.
            names: Names of the tensors.
            paths: The module's paths.
            both: Whether both parameters of the layer's experts are wrapped.
        """
        saved = paths[0]
        experts = self._experts(place, saved)
        if set(used) != {"lora_A.weight", "lora_B.weight"}:
            raise self._error(saved, got=", ".join(sorted(used)), wanted="lora_A.weight and lora_B.weight")
        A, B = (used[f"lora_{end}.weight"].float() for end in "AB")
        if place.expert is not None and place.part is not None:
            out, in_ = experts.shape(place.part, self.arch.hidden)
            if A.ndim != 2 or tuple(A.shape) != (len(A), in_) or tuple(B.shape) != (out, len(A)):
                raise self._error(saved, got=f"{tuple(A.shape)} and {tuple(B.shape)}", wanted=f"(r, {in_}), ({out}, r)")
            if place.part == ROUTER:
                paths = parameter_paths(self.config, paths)
            check_rank(self.config, paths, len(A), self.where)
            self._add(place.layer, place.expert, place.part, A, B * scaling(self.config, paths, len(A)), names)
            return
        parameter, A, B = self._unstacked(A, B, place, experts, saved, both=both)
        paths = tuple(f"{path.removesuffix(f'.{INNER}')}.{parameter}" for path in paths)
        check_rank(self.config, paths, A.shape[1], self.where)
        B = B * scaling(self.config, paths, A.shape[1])
        for expert in range(experts.count):
            for part, rows in _parts(B[expert], parameter, experts).items():
                self._add(place.layer, expert, part, A[expert], rows, names)

    def _add(self, layer: int, expert: int, part: str, A: Tensor, B: Tensor, names: tuple[str, ...]) -> None:
        if (layer, expert, part) in self.updates:
            raise self._error(f"layer {layer}, {part} of expert {expert}", got="two updates", wanted="one")
        A, B = check_values(A, B, where=f"{self.where}, layer {layer}, {part} of expert {expert}")
        self.updates[layer, expert, part], self.names[layer, expert, part] = LowRank(A, B), names

    def _experts(self, place: ExpertModule, saved: str) -> Experts:
        experts = self.arch.experts
        if experts is None or place.layer >= self.arch.layers or place.layer in experts.dense:
            raise self._error(saved, got=f"layer {place.layer}", wanted="a layer with experts")
        if (place.expert or 0) >= experts.count:
            raise self._error(saved, got=f"expert {place.expert}", wanted=f"{experts.count} experts")
        return experts

    def _unstacked(
        self, A: Tensor, B: Tensor, place: ExpertModule, experts: Experts, saved: str, *, both: bool
    ) -> tuple[str, Tensor, Tensor]:
        """Return the parameter, and the factors of all experts: ``(E, r, in)`` and ``(E, out, r)``."""
        count, hidden = experts.count, self.arch.hidden
        shapes = {"gate_up_proj": (2 * experts.intermediate, hidden), "down_proj": (hidden, experts.intermediate)}
        stacked = A.ndim == B.ndim == 2 and len(A) == B.shape[1] and len(A) > 0 and len(A) % count == 0
        fitting = [
            (name, swapped)
            for name, (out, in_) in shapes.items()
            for swapped in ((False,) if experts.transposed else (False, True))
            if stacked and (len(B), A.shape[1]) == ((in_, out) if swapped else (out, in_))
        ]
        if not fitting:
            raise self._error(
                saved, got=f"{tuple(A.shape)} and {tuple(B.shape)}",
                wanted=" or ".join(f"({count} r, {in_}) and ({out}, {count} r)" for out, in_ in shapes.values()),
            )  # fmt: skip
        wanted = self._targeted(place, both=both), self._swapped()
        name, swapped = min(fitting, key=lambda one: (one[0] != wanted[0], one[1] != wanted[1]))
        A, B = A.reshape(count, -1, A.shape[1]), B.reshape(len(B), -1, count).permute(2, 0, 1)
        return (name, B.mT, A.mT) if swapped else (name, A, B)

    def _targeted(self, place: ExpertModule, *, both: bool) -> str:
        """Return the parameter that PEFT wraps in this place, where the shapes fit both."""
        targets = [str(target) for target in self.config.get("target_parameters") or ()]
        named = [name for name in PARAMETERS if any(target.endswith(name) for target in targets)] or [*PARAMETERS]
        return PARAMETERS[0 if place.inner else 1] if both else named[0]

    def _swapped(self) -> bool:
        version = re.match(r"(\d+)\.(\d+)", str(self.config.get("peft_version") or ""))
        return version is None or (int(version[1]), int(version[2])) < SWAPPED_BEFORE

    def _error(self, saved: str, *, got: object, wanted: object) -> LoraSuiteError:
        return LoraSuiteError(
            "the adapter does not fit the experts of the old backbone", where=f"{self.where}, {saved}", got=got,
            wanted=wanted, do="pass the backbone that it was trained on (--from, source_model=)",
        )  # fmt: skip


def _parts(rows: Tensor, parameter: str, experts: Experts) -> dict[str, Tensor]:
    """Split the output rows of a parameter into its parts."""
    if parameter == "down_proj":
        return {"down": rows}
    if experts.transposed:
        return {"gate": rows[0::2], "up": rows[1::2]}
    return {"gate": rows[: experts.intermediate], "up": rows[experts.intermediate :]}


def join_experts(updates: Mapping[ExpertKey, LowRank], arch: Architecture) -> dict[tuple[int, str], list[LowRank]]:
    """Join the parts of each 3-D parameter.

    Returns:
        ``(layer, parameter)`` -> the update of every expert, of rank zero where it has none; ``(layer, "router")`` ->
        that of the router alone.
    """
    experts, joined = arch.experts, {}
    for layer, parameter in sorted({(layer, _parameter(part)) for layer, _, part in updates}):
        parts = ("down",) if parameter == "down_proj" else ("gate", "up")
        if experts is None:
            continue
        if parameter == ROUTER:
            joined[layer, parameter] = [updates[layer, 0, ROUTER]]
            continue
        shapes = {part: experts.shape(part, arch.hidden) for part in parts}
        whole = []
        for expert in range(experts.count):
            present = {part: updates[layer, expert, part] for part in parts if (layer, expert, part) in updates}
            out, in_ = sum(shape[0] for shape in shapes.values()), shapes[parts[0]][1]
            none = LowRank(torch.zeros(0, in_), torch.zeros(out, 0))
            whole.append(stack(present, {part: shapes[part][0] for part in parts}) if present else none)
        joined[layer, parameter] = whole
    return joined


def _parameter(part: str) -> str:
    return ROUTER if part == ROUTER else PARAMETERS[part == "down"]


def parameter_path(layer: int, parameter: str, arch: Architecture) -> str:
    """Return the full name of a 3-D parameter, or of a router's weight, in the backbone."""
    if arch.experts is None:
        raise LoraSuiteError("the backbone has no experts", got=arch.family)
    own = f"{arch.experts.router}.weight" if parameter == ROUTER else f"{arch.experts.path}.{parameter}"
    return f"{arch.layer_path}.{layer}.{own}"


def expert_tensors(updates: Mapping[ExpertKey, LowRank], arch: Architecture, rank: int) -> dict[str, Tensor]:
    """Return the tensors of experts by their PEFT names, every expert with the same rank.

    Args:
        updates: ``(layer, expert, part)`` -> update.
        arch: Architecture of the backbone.
        rank: At least the joint rank of every expert's parameters.
    """
    tensors: dict[str, Tensor] = {}
    joined = join_experts(updates, arch)
    if arch.experts is None:
        return tensors
    generator = torch.Generator().manual_seed(0)
    for (layer, parameter), stacked in joined.items():
        inner = parameter == PARAMETERS[0] and (layer, PARAMETERS[1]) in joined
        module = f"{PREFIX}{arch.layer_path}.{layer}.{arch.experts.path}{f'.{INNER}' if inner else ''}"
        padded = [one.padded(rank, generator) for one in stacked]
        if parameter == ROUTER:
            module = f"{PREFIX}{parameter_path(layer, parameter, arch)}".removesuffix(".weight")
            tensors |= {f"{module}.lora_A.weight": padded[0].A, f"{module}.lora_B.weight": padded[0].B}
            continue
        A, B = torch.stack([one.A for one in padded]), torch.stack([one.B for one in padded])
        if parameter == PARAMETERS[0] and arch.experts.transposed:  # gate and up rows alternate
            B = B.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
        tensors[f"{module}.lora_A.weight"] = A.flatten(0, 1)
        tensors[f"{module}.lora_B.weight"] = B.permute(1, 2, 0).flatten(1, 2)
    return tensors


def target_parameters(updates: Mapping[ExpertKey, LowRank], arch: Architecture) -> list[str]:
    """Return the full names of the parameters that updates of experts change, for the PEFT config."""
    return [parameter_path(layer, parameter, arch) for layer, parameter in join_experts(updates, arch)]
