"""The same base in another format: new names and layouts for the same factors, without loss."""

from __future__ import annotations

from dataclasses import dataclass

from ..adapters.adapter import join_sites
from ..adapters.experts import join_experts
from ..errors import LoraSuiteError
from ..mapping.same_base import compare_pair
from ..mapping.sample_pairs import residual_factor
from .base import MethodInput, MethodResult
from .experts import keep_experts
from .registry import method


@dataclass(frozen=True)
class RekeyOptions:
    """Options of `rekey`.

    Attributes:
        prove: Whether both adapted models are run on a few tokens, to compare their logits for the report.
    """

    prove: bool = True


@method("rekey", options=RekeyOptions)
def rekey(inputs: MethodInput, options: RekeyOptions) -> MethodResult:
    """Give every update to the same part of the same layer, times the factor of the weight there.

    The rank grows where updates of split modules are joined in a fused one and have different A, so that nothing is
    lost.
    """
    del options  # read by `upgrading.equal_logits`
    old, new = inputs.map.old.arch, inputs.map.new.arch
    found = compare_pair(inputs.map, inputs.old, inputs.new)
    if not found.same:
        raise LoraSuiteError(
            "the backbones do not hold the same weights", where=f"{inputs.map.old.name} and {inputs.map.new.name}",
            got=found.difference, do="use method='auto'",
        )  # fmt: skip
    factors = {part: residual_factor(old, new, part) for part in old.parts}
    updates = {
        key: update if factors[key[1]] == 1 else update.scaled(factors[key[1]])
        for key, update in inputs.adapter.updates.items()
    }
    kept = keep_experts(inputs, {"down": old.residual_scale / new.residual_scale})
    joint = [*join_sites(updates, new).values()]
    joint += [one for experts in join_experts(kept.updates, new).values() for one in experts]
    scaled = {part: factor for part, factor in factors.items() if factor != 1}
    facts = {"equal": list(found.equal), "unread": list(found.unread), "factors": scaled}
    rank = max((update.rank for update in joint), default=None)
    return MethodResult(updates, {key: key for key in updates}, facts={"rekey": facts}, rank=rank, experts=kept)
