"""The weights of experts and routers, stored as 3-D parameters or as one module for each expert."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from ..arch.experts import EXPERT_PARTS, Experts
from ..errors import LoraSuiteError
from ..io.checkpoint import DTYPES
from .backbone import Backbone
from .quantized import quantization, quantized_error
from .stored_names import find_stored


def read_expert(backbone: Backbone, layer: int, expert: int, part: str) -> Float[Tensor, "out in_"]:
    """Read the weight of one part of one expert in float32, in PyTorch's orientation.

    Raises:
        LoraSuiteError: When it is missing, quantized or of another shape.
    """
    experts = _experts_of(backbone)
    path = f"{backbone.arch.layer_path}.{layer}"
    whole = find_stored(f"{path}.{experts.path}.{experts.parameter(part)}", backbone.weights, backbone.arch)
    if whole is not None:
        weight = _unfused(backbone.weights.rows(whole, [expert])[0], part, experts)
        return _checked(backbone, weight, experts.shape(part, backbone.arch.hidden), whole)
    module = experts.modules[EXPERT_PARTS.index(part)]
    for mixture in experts.mixtures:
        name = f"{path}.{mixture}.experts.{expert}.{module}.weight"
        stored = find_stored(name, backbone.weights, backbone.arch)
        if stored is not None:
            return _checked(backbone, backbone.weights[stored], experts.shape(part, backbone.arch.hidden), stored)
    raise _missing(backbone, f"{path}.{experts.path}, {part} of expert {expert}")


def _unfused(weight: Tensor, part: str, experts: Experts) -> Tensor:
    """Take one part of an expert's slice of a parameter."""
    if experts.transposed:
        weight = weight.mT
    if part == "down":
        return weight
    first = part == "gate"
    if experts.transposed:
        return weight[0 if first else 1 :: 2]
    return weight[: len(weight) // 2] if first else weight[len(weight) // 2 :]


def read_router(backbone: Backbone, layer: int) -> Float[Tensor, "experts hidden"]:
    """Read the weight of the router of one layer in float32."""
    experts = _experts_of(backbone)
    last = experts.router.partition(".")[2]
    for mixture in experts.mixtures:
        name = f"{backbone.arch.layer_path}.{layer}.{mixture}.{last}.weight"
        stored = find_stored(name, backbone.weights, backbone.arch)
        if stored is not None:
            shape = experts.count, backbone.arch.hidden
            return _checked(backbone, backbone.weights[stored], shape, stored)
    raise _missing(backbone, f"{backbone.arch.layer_path}.{layer}.{experts.router}.weight")


def belongs_to_mixture(path: str, experts: Experts | None) -> bool:
    """Whether a module, by its path in the layer, is a router or belongs to the experts."""
    if experts is None:
        return False
    names = (experts.router.partition(".")[2], "experts")
    return any(f"{path}.".startswith(f"{mixture}.{name}.") for mixture in experts.mixtures for name in names)


def _experts_of(backbone: Backbone) -> Experts:
    if backbone.arch.experts is None:
        raise LoraSuiteError("the backbone has no experts", where=repr(backbone), got=backbone.arch.family)
    return backbone.arch.experts


def _checked(backbone: Backbone, weight: Tensor, shape: tuple[int, int], name: str) -> Tensor:
    if weight.dtype not in DTYPES.values():
        raise quantized_error(backbone.name, f"{backbone!r}, {name}", weight.dtype)
    if tuple(weight.shape) != shape:
        raise LoraSuiteError(
            "a weight does not fit the config", where=f"{backbone!r}, {name}", got=tuple(weight.shape), wanted=shape
        )
    return weight.float()


def _missing(backbone: Backbone, name: str) -> LoraSuiteError:
    if method := quantization(backbone.config):
        return quantized_error(backbone.name, repr(backbone), method)
    return LoraSuiteError("the checkpoint lacks a tensor", where=repr(backbone), wanted=name, do="fetch it again")
