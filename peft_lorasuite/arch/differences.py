"""Structural differences of two architectures, and how an upgrade handles each, as sentences for the report."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from .spec import PARTS, Architecture, Heads

SAME_FUNCTION = {
    "swish": "silu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_new",
    "gelu_python_tanh": "gelu_new",
    "gelu_fast": "gelu_new",
    "gelu_accurate": "gelu_new",
}
"""Other names in transformers of an activation function -> the name used here."""
ORDERS = {"part head dim": "part after part", "head part dim": "head by head", "group part dim": "group by group"}


def differences(old: Architecture, new: Architecture) -> list[str]:
    """List every structural difference of two backbones and how an upgrade handles it.

    Sizes (layers, hidden size, heads, units, vocabulary) are not listed, except for the number of query heads per
    key/value head.

    Returns:
        One sentence per difference; none if a backbone has no converter, since its layers are not known.
    """
    if not (old.has_converter and new.has_converter):
        return []
    checks = (
        _parts, _experts, _fusion, _biases, _attention, _shared, _positions, _blocks, _norms, _activation, _scales,
    )  # fmt: skip
    return [sentence for check in checks for sentence in check(old, new)]


def _parts(old: Architecture, new: Architecture) -> Iterator[str]:
    for part in PARTS:
        if part in old.parts and part not in new.parts:
            yield f"only the old layers have a {part} projection: its updates are dropped"
        if part in new.parts and part not in old.parts:
            yield f"only the new layers have a {part} projection: it gets no update"


def _experts(old: Architecture, new: Architecture) -> Iterator[str]:
    counts = [side.experts.count if side.experts else 0 for side in (old, new)]
    if counts[0] != counts[1]:
        kinds = [f"{count} experts" if count else "no experts" for count in counts]
        yield (
            f"the old layers have {kinds[0]} and the new ones {kinds[1]}: updates of experts are dropped, new experts"
            " get no update"
        )


def _fusion(old: Architecture, new: Architecture) -> Iterator[str]:
    """Compare the modules of the parts that both have: fused or split, and the order of fused rows."""
    shared = [part for part in old.parts if part in new.parts]
    for site in new.sites:
        parts = [part for part in site.parts if part in shared]
        if len({old.site(part).path for part in parts}) > 1:
            yield (
                f"{', '.join(parts)} are split in the old layers and fused in {site.path} of the new ones: their"
                " updates are truncated to one joint rank (see the energy kept)"
            )
    for site in old.sites:
        parts = [part for part in site.parts if part in shared]
        if len({new.site(part).path for part in parts}) > 1:
            yield f"{', '.join(parts)} are fused in {site.path} of the old layers and split in the new ones: exact"
        elif len(parts) > 1 and site.rows != new.site(parts[0]).rows:
            orders = ORDERS[site.rows], ORDERS[new.site(parts[0]).rows]
            yield f"{', '.join(parts)} are fused {orders[0]} in the old layers and {orders[1]} in the new ones: exact"


def _biases(old: Architecture, new: Architecture) -> Iterator[str]:
    shared = [part for part in old.parts if part in new.parts]
    for one, other, name, other_name in ((old, new, "old", "new"), (new, old, "new", "old")):
        parts = [part for part in shared if one.site(part).bias and not other.site(part).bias]
        if parts:
            yield (
                f"{', '.join(parts)} have a bias in the {name} layers and none in the {other_name} ones:"
                " a low-rank update cannot compensate for this constant offset"
            )


def _attention(old: Architecture, new: Architecture) -> Iterator[str]:
    kinds = [_each(side, lambda one: (one.heads.query, one.heads.key_value)) for side in (old, new)]
    if {query // groups for query, groups in kinds[0]} == {query // groups for query, groups in kinds[1]}:
        return
    handling = "repeated for" if old.heads.group > new.heads.group else "averaged over"
    yield (
        f"attention is {_list(old)} in the old backbone and {_list(new)} in the new one: key and value"
        f" updates are {handling} the query heads that share them"
    )


def _each(arch: Architecture, value: Callable[[Architecture], Any]) -> list[Any]:
    """Return the different values that the layers have, in the order of the layers."""
    return list(dict.fromkeys(value(arch.in_layer(layer)) for layer in range(arch.layers)))


def _list(arch: Architecture) -> str:
    return " and ".join(_each(arch, lambda one: _kind(one.heads)))


def _kind(heads: Heads) -> str:
    kind = "MHA" if heads.group == 1 else "MQA" if heads.key_value == 1 else "GQA"
    return f"{kind} ({heads.query} query and {heads.key_value} key/value heads)"


def _shared(old: Architecture, new: Architecture) -> Iterator[str]:
    """Compare in how many layers keys and values share a projection, or come from another layer."""
    tied, taken = (
        [len({one.layer for one in side.borrowed if (one.layer == one.from_layer) == same}) for side in (old, new)]
        for same in (True, False)
    )
    if tied[0] != tied[1]:
        yield (
            f"keys and values share a projection in {tied[0]} of the old layers and in {tied[1]} of the new ones:"
            " their updates are dropped between a layer where they do and one where they do not"
        )
    if taken[0] != taken[1]:
        yield (
            f"{taken[0]} of the old layers and {taken[1]} of the new ones take keys and values from an earlier layer:"
            " key and value updates are dropped where only one of two matched layers has its own"
        )


def _positions(old: Architecture, new: Architecture) -> Iterator[str]:
    if old.positions != new.positions:
        yield (
            f"positions are {old.positions} in the old backbone and {new.positions} in the new one: query and key"
            " updates are fitted without positions"
        )
        return
    if old.positions != "rotary":
        return
    fractions = [_each(side, lambda one: f"{one.rotary_size / one.heads.size:.0%}") for side in (old, new)]
    if set(fractions[0]) != set(fractions[1]):
        texts = [" or ".join(side) for side in fractions]
        yield (
            f"{texts[0]} of a head is rotated in the old backbone and {texts[1]} in the new one:"
            " rotated dimensions are matched by the nearest frequency"
        )
    shares = [sum(theta > 0 for theta in side.rope_thetas) / len(side.rope_thetas) for side in (old, new)]
    if shares[0] != shares[1]:
        yield (
            f"heads are rotated in {shares[0]:.0%} of the old layers and in {shares[1]:.0%} of the new ones: query and"
            " key updates between a layer with rotation and one without are fitted without positions"
        )
    bases = [sorted({theta for theta in side.rope_thetas if theta}) for side in (old, new)]
    if bases[0] != bases[1]:
        texts = [" and ".join(f"{base:g}" for base in side) for side in bases]
        yield (
            f"the rotary base is {texts[0]} in the old backbone and {texts[1]} in the new one: rotated dimensions are"
            " matched by the nearest frequency"
        )


def _blocks(old: Architecture, new: Architecture) -> Iterator[str]:
    if old.parallel != new.parallel:
        orders = ["in parallel" if side.parallel else "one after the other" for side in (old, new)]
        yield (
            f"attention and feed-forward run {orders[0]} in the old layers and {orders[1]} in the new ones: the effect"
            " of attention on the feed-forward input of the same layer is not mapped"
        )


def _norms(old: Architecture, new: Architecture) -> Iterator[str]:
    names = {"rms": "RMSNorm", "layer": "LayerNorm"}
    if old.norm != new.norm:
        yield (
            f"norms are {names[old.norm]} in the old backbone and {names[new.norm]} in the new one: gains are mapped,"
            " the mean and bias of LayerNorm are not"
        )
    for field, position, parts in (("norm", "before", ("q", "up")), ("post_norm", "after", ("o", "down"))):
        for block, part in zip(("attention", "feed-forward"), parts, strict=True):
            if part not in old.parts or part not in new.parts:
                continue
            has = [getattr(side.site(part), field) is not None for side in (old, new)]
            if has[0] != has[1]:
                side = "old" if has[0] else "new"
                yield f"only the {side} layers have a norm {position} {block}: its gain is mapped, its scaling is not"
    for what, has in (
        ("queries and keys", (old.qk_norm, new.qk_norm)),
        ("values", (old.v_norm, new.v_norm)),
    ):
        if has[0] != has[1]:
            side = "old" if has[0] else "new"
            yield f"only the {side} backbone normalizes {what}: the size of their updates may be wrong"


def _activation(old: Architecture, new: Architecture) -> Iterator[str]:
    names = [_activation_name(side) for side in (old, new)]
    if names[0] != names[1]:
        yield (
            f"the activation function is {names[0]} in the old backbone and {names[1]} in the new one: feed-forward"
            " units are matched by their weights alone"
        )


def _activation_name(arch: Architecture) -> str:
    name = SAME_FUNCTION.get(arch.activation, arch.activation)
    return f"{name} above {arch.activation_floor:g}" if arch.activation_floor else name


def _scales(old: Architecture, new: Architecture) -> Iterator[str]:
    if old.residual_scale != new.residual_scale:
        yield (
            f"the output of a block is multiplied by {old.residual_scale:.4g} in the old backbone and by"
            f" {new.residual_scale:.4g} in the new one: compensated"
        )
    if (old.layer_scale is None) != (new.layer_scale is None):
        side = "old" if old.layer_scale else "new"
        yield f"only the {side} backbone multiplies the output of each layer by a scalar of its own: compensated"
