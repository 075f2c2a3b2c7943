"""What two architectures differ in beyond their sizes, and what an upgrade makes of it: plain sentences by name."""

from __future__ import annotations

from collections.abc import Iterator

from .spec import PARTS, Architecture, Heads

SAME_FUNCTION = {
    "swish": "silu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_new",
    "gelu_python_tanh": "gelu_new",
    "gelu_fast": "gelu_new",
    "gelu_accurate": "gelu_new",
}
"""Names in transformers that stand for one activation function: its name here."""
ORDERS = {"part head dim": "part after part", "head part dim": "head by head", "group part dim": "group by group"}


def differences(old: Architecture, new: Architecture) -> list[str]:
    """Name every structural difference of two backbones and say how it is met.

    Differing sizes (layers, hidden size, heads, units, vocabulary) are what an upgrade map is for and not listed, but
    for attention types, where updates are averaged or repeated.

    Returns:
        One sentence each; an empty list for two backbones of one structure.
    """
    checks = (_parts, _fusion, _biases, _attention, _positions, _blocks, _norms, _activation, _scales)
    return [sentence for check in checks for sentence in check(old, new)]


def _parts(old: Architecture, new: Architecture) -> Iterator[str]:
    for part in PARTS:
        if part in old.parts and part not in new.parts:
            yield f"only the old layers have a {part} projection: its updates have no place and are not carried"
        if part in new.parts and part not in old.parts:
            yield f"only the new layers have a {part} projection: it gets no update"


def _fusion(old: Architecture, new: Architecture) -> Iterator[str]:
    """Compare the modules that hold the parts of both: fused or split, and the order of fused rows."""
    shared = [part for part in old.parts if part in new.parts]
    for site in new.sites:
        held = [part for part in site.parts if part in shared]
        homes = {old.site(part).path for part in held}
        if len(homes) > 1:
            yield (
                f"{', '.join(held)} are split in the old layers and fused in {site.path} of the new ones: their updates"
                " are cut to one rank together, at the cost that the energy kept tells"
            )
    for site in old.sites:
        held = [part for part in site.parts if part in shared]
        homes = {new.site(part).path for part in held}
        if len(homes) > 1:
            yield f"{', '.join(held)} are fused in {site.path} of the old layers and split in the new ones: exact"
        elif len(held) > 1 and site.rows != new.site(held[0]).rows:
            rows = ORDERS[site.rows], ORDERS[new.site(held[0]).rows]
            yield f"{', '.join(held)} are fused {rows[0]} in the old layers and {rows[1]} in the new ones: exact"


def _biases(old: Architecture, new: Architecture) -> Iterator[str]:
    shared = [part for part in old.parts if part in new.parts]
    for one, other, here, there in ((old, new, "old", "new"), (new, old, "new", "old")):
        held = [part for part in shared if one.site(part).bias and not other.site(part).bias]
        if held:
            yield (
                f"{', '.join(held)} have a bias in the {here} layers and none in the {there} ones: "
                "a constant offset that no low-rank update makes up for"
            )


def _attention(old: Architecture, new: Architecture) -> Iterator[str]:
    if old.heads.group == new.heads.group:
        return
    met = "repeated for" if old.heads.group > new.heads.group else "averaged over"
    yield (
        f"attention is {_kind(old.heads)} in the old backbone and {_kind(new.heads)} in the new one: key and value"
        f" updates are {met} the query heads that share them"
    )


def _kind(heads: Heads) -> str:
    kind = "MHA" if heads.group == 1 else "MQA" if heads.key_value == 1 else "GQA"
    return f"{kind} ({heads.query} query heads on {heads.key_value} key/value heads)"


def _positions(old: Architecture, new: Architecture) -> Iterator[str]:
    if old.positions != new.positions:
        yield (
            f"positions are {old.positions} in the old backbone and {new.positions} in the new one: query and key"
            " updates are fitted without regard to them"
        )
        return
    if old.positions != "rotary":
        return
    shares = old.rotary_size / old.heads.size, new.rotary_size / new.heads.size
    if shares[0] != shares[1]:
        yield (
            f"{shares[0]:.0%} of a head is rotated in the old backbone and {shares[1]:.0%} in the new one: rotated"
            " dimensions are matched by the nearest frequency"
        )
    bases = sorted(set(old.rope_thetas)), sorted(set(new.rope_thetas))
    if bases[0] != bases[1]:
        told = [" and ".join(f"{base:g}" for base in side) for side in bases]
        yield (
            f"the rotary base is {told[0]} in the old backbone and {told[1]} in the new one: rotated dimensions are"
            " matched by the nearest frequency"
        )


def _blocks(old: Architecture, new: Architecture) -> Iterator[str]:
    if old.parallel != new.parallel:
        told = ["in parallel" if side.parallel else "one after the other" for side in (old, new)]
        yield (
            f"attention and feed-forward run {told[0]} in the old layers and {told[1]} in the new ones: what one adds"
            " for the other to read within a layer is not mapped"
        )


def _norms(old: Architecture, new: Architecture) -> Iterator[str]:
    names = {"rms": "RMSNorm", "layer": "LayerNorm"}
    if old.norm != new.norm:
        yield (
            f"norms are {names[old.norm]} in the old backbone and {names[new.norm]} in the new one: gains are mapped,"
            " the LayerNorm's mean and bias are not"
        )
    for field, place, probes in (("norm", "in front of", ("q", "up")), ("post_norm", "behind", ("o", "down"))):
        for block, part in zip(("attention", "feed-forward"), probes, strict=True):
            has = [getattr(side.site(part), field) is not None for side in (old, new)]
            if has[0] != has[1]:
                side = "old" if has[0] else "new"
                yield f"only the {side} layers have a norm {place} {block}: its gain is mapped, its rescaling is not"
    if old.qk_norm != new.qk_norm:
        side = "old" if old.qk_norm else "new"
        yield f"only the {side} backbone normalises queries and keys: the size of their updates may be off"


def _activation(old: Architecture, new: Architecture) -> Iterator[str]:
    sides = [_function(side) for side in (old, new)]
    if sides[0] != sides[1]:
        yield (
            f"the activation function is {sides[0]} in the old backbone and {sides[1]} in the new one: feed-forward"
            " updates are matched by weights, not by what the function makes of them"
        )


def _function(arch: Architecture) -> str:
    name = SAME_FUNCTION.get(arch.activation, arch.activation)
    return f"{name} above {arch.activation_floor:g}" if arch.activation_floor else name


def _scales(old: Architecture, new: Architecture) -> Iterator[str]:
    if old.residual_scale != new.residual_scale:
        yield (
            f"what a block adds is multiplied by {old.residual_scale:.4g} in the old backbone and by"
            f" {new.residual_scale:.4g} in the new one: divided out"
        )
