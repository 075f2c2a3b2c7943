"""The record of a backbone's structure: sites, heads and sizes. Nothing here imports torch."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import Any

from ..errors import LoraSuiteError
from .experts import Experts, read_experts
from .site import ATTENTION, OUTPUT_PROJECTIONS, PARTS, ROWS, UNITS, Borrowed, Heads, LayerSizes, Site, check_parts

__all__ = [
    "ATTENTION", "OUTPUT_PROJECTIONS", "PARTS", "ROWS", "UNITS", "Architecture", "Borrowed", "Heads", "LayerSizes",
    "Site", "check_parts",
]  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """Sizes and layout of a backbone, from its config.

    Without a converter (`has_converter`) only the names and shapes of the modules are known. Every linear module of the
    text model is then a site of its own, ``heads``, ``intermediate`` and what follows ``final_norm`` are placeholders,
    and the path of the final norm is empty.

    Attributes:
        family: Name of the converter.
        layers: Number of decoder layers, L.
        hidden: Hidden size, D.
        heads: Attention heads.
        intermediate: Size of the feed-forward layer, I.
        vocabulary: Rows of the embedding.
        sites: Every linear module of a decoder layer.
        layer_path: Path of the list of decoder layers.
        embedding: Path of the token embedding.
        head: Path of the language-model head.
        final_norm: Path of the norm before the head.
        norm: ``"rms"`` or ``"layer"``.
        gain_offset: Added to a stored gain (Gemma stores the gain minus one).
        activation: Activation function of the feed-forward layer.
        activation_floor: Threshold up to which values are set to zero before the activation (FATReLU), or 0.
        positions: ``"rotary"``, ``"alibi"`` or ``"learned"``.
        rotary_size: Number of rotated dimensions of a head; they come first.
        rotary_interleaved: Whether dimensions 2i and 2i + 1 of a head rotate together (GPT-J), and not those of two
            halves.
        rotary_across: Whether the two dimensions that rotate together are half a head apart even where a part of a head
            rotates; their frequencies are then the first ones of a whole head (Gemma 4).
        rope_thetas: Base of the rotary frequencies: one for all layers, or one per layer; 0 in layers that do not
            rotate (SmolLM3).
        tied: Whether the language-model head and the embedding share their weight.
        parallel: Whether attention and feed-forward run in parallel, on the same residual state.
        qk_norm: Whether queries and keys are normalized after their projection.
        v_norm: Whether values are normalized after their projection.
        embedding_scale: Multiplier of the embedding's output.
        embedding_norm: Path of a norm after the embedding (Bloom), or None.
        residual_scale: Multiplier of what an output projection adds to the residual stream.
        other_weights: Number of weights of linear modules in the layers that are not among the sites (Qwen3.5).
        disk: Pairs (path in the model, path in the checkpoint) where the two differ.
        runs_as: Config values, including ``model_type``, with which transformers loads a checkpoint whose own model
            type it does not support; empty for the types that it supports.
        experts: Its experts, if it is a mixture of experts; they are not among the sites.
        other_sizes: Layers whose heads or feed-forward layer have other sizes than those above.
        borrowed: Keys and values that layers take from other projections.
        layer_scale: Path in a layer of the scalar that its output is multiplied by, with the whole residual stream, or
            None.
        ple_size: Size of the per-layer embeddings, or 0.
    """

    family: str
    layers: int
    hidden: int
    heads: Heads
    intermediate: int
    vocabulary: int
    sites: tuple[Site, ...]
    layer_path: str = "model.layers"
    embedding: str = "model.embed_tokens"
    head: str = "lm_head"
    final_norm: str = "model.norm"
    norm: str = "rms"
    gain_offset: float = 0.0
    activation: str = "silu"
    activation_floor: float = 0.0
    positions: str = "rotary"
    rotary_size: int = 0
    rotary_interleaved: bool = False
    rotary_across: bool = False
    rope_thetas: tuple[float, ...] = (10000.0,)
    tied: bool = False
    parallel: bool = False
    qk_norm: bool = False
    v_norm: bool = False
    embedding_scale: float = 1.0
    embedding_norm: str | None = None
    residual_scale: float = 1.0
    other_weights: int = 0
    disk: tuple[tuple[str, str], ...] = ()
    runs_as: tuple[tuple[str, Any], ...] = ()
    experts: Experts | None = None
    other_sizes: tuple[LayerSizes, ...] = ()
    borrowed: tuple[Borrowed, ...] = ()
    layer_scale: str | None = None
    ple_size: int = 0

    def __post_init__(self) -> None:
        parts = [part for site in self.sites for part in site.parts]
        if len(parts) != len(set(parts)):
            raise LoraSuiteError("two sites have the same part", where=self.family, got=parts)
        if min(self.layers, self.hidden, self.intermediate, self.vocabulary) < 1:
            raise LoraSuiteError("sizes must be positive", where=self.family, got=self.sizes())
        if len(self.rope_thetas) not in (1, self.layers):
            got, wanted = len(self.rope_thetas), f"1 or {self.layers}, one per layer"
            raise LoraSuiteError("wrong number of rotary bases", where=self.family, got=got, wanted=wanted)

    @property
    def parts(self) -> tuple[str, ...]:
        """Parts of the decoder layers, in the order of `PARTS`; without a converter, of the whole model."""
        return tuple(self._sites) if not self.has_converter else tuple(part for part in PARTS if part in self._sites)

    @cached_property
    def _sites(self) -> dict[str, Site]:
        return {part: site for site in self.sites for part in site.parts}

    @property
    def last_part(self) -> str | None:
        """The part whose output a layer adds last to the residual stream; None where experts do."""
        part = "ple_down" if self.ple_size else "down"
        return part if part in self._sites else None

    @property
    def has_converter(self) -> bool:
        """Whether a converter describes the layers; weights can be transferred only if it does."""
        return not any(site.shape for site in self.sites)

    def in_layer(self, layer: int) -> Architecture:
        """Return the architecture with the sizes of a layer, where `heads`, `intermediate` and `shape` are its own."""
        return self._with_sizes.get(layer, self)

    @cached_property
    def _with_sizes(self) -> dict[int, Architecture]:
        found: dict[int, Architecture] = {}
        for own in self.other_sizes:
            sizes = {"heads": own.heads, "intermediate": own.intermediate, "rotary_size": own.rotary_size}
            found |= dict.fromkeys(own.layers, replace(self, **sizes, other_sizes=()))
        return found

    def source(self, layer: int, part: str) -> tuple[int, str] | None:
        """Return layer and part of the projection that gives a part's output in a layer; None if there is none."""
        found = {(one.layer, one.part): (one.from_layer, one.from_part) for one in self.borrowed}
        return (layer, part) if self.has(layer, part) else found.get((layer, part))

    def gives(self, layer: int, part: str) -> tuple[str, ...]:
        """Return what a part of a layer is used for there: ``("k", "v")`` where keys and values are the same."""
        return tuple(other for other in PARTS if self.source(layer, other) == (layer, part))

    def site(self, part: str) -> Site:
        """Return the site of ``part``."""
        if part in self._sites:
            return self._sites[part]
        raise LoraSuiteError(f"the family has no {part!r} projection", where=self.family, wanted=self.parts)

    def module(self, layer: int, site: Site) -> str:
        """Return the name of a site's module in the model."""
        return site.path if site.shape else f"{self.layer_path}.{layer}.{site.path}"

    @property
    def modules(self) -> tuple[tuple[int, Site], ...]:
        """Every linear module of the model, as its layer and its site."""
        if not self.has_converter:
            return tuple((site.number, site) for site in self.sites)
        return tuple((layer, site) for layer in range(self.layers) for site in self.sites if site.is_in(layer))

    def has(self, layer: int, part: str) -> bool:
        """Return whether a layer has a part."""
        return part in self._sites and self._sites[part].is_in(layer)

    def find(self, module: str) -> tuple[int, Site] | None:
        """Return the layer and the site of a module, by its name in the model; None for other modules."""
        if not self.has_converter:
            site = self._sites.get(module)
            return None if site is None else (site.number, site)
        match = re.fullmatch(rf"{re.escape(self.layer_path)}\.(\d{{1,9}})\.(.+)", module)
        layer, path = (int(match[1]), match[2]) if match else (0, "")
        known = [site for site in self.sites if site.path == path and (site.is_in(layer) or layer >= self.layers)]
        return (layer, known[0]) if known else None

    def theta(self, layer: int) -> float:
        """Return the base b of a layer's frequencies, ``b ** (-2 i / rotary_size)``; 0 if it rotates nothing."""
        base, own = self.rope_thetas[layer if len(self.rope_thetas) > 1 else 0], self.in_layer(layer)
        if not self.rotary_across:
            return base
        return base ** (own.rotary_size / own.heads.size) if base and own.rotary_size else 0.0

    def shape(self, part: str) -> tuple[int, int]:
        """Return the shape of a part's weight as ``(out_features, in_features)``."""
        if (own := self.site(part).shape) is not None:
            return own
        width = self.heads.count(part) * self.heads.size if part in ATTENTION else self.units(part)
        return (self.hidden, width) if part in OUTPUT_PROJECTIONS else (width, self.hidden)

    def module_shape(self, layer: int, site: Site) -> tuple[int, int]:
        """Return the shape of a module's weight in a layer, with the rows of all its parts, as `shape` does."""
        shapes = [self.in_layer(layer).shape(part) for part in site.parts]
        return sum(rows for rows, _ in shapes), shapes[0][1]

    def units(self, part: str) -> int:
        """Return the number of units of a part outside attention."""
        return self.ple_size if part in UNITS[1] else self.intermediate

    def parameter_count(self) -> int:
        """Return the number of weights of all linear modules, the embedding and an untied head; no norms or biases."""
        shapes = [self.in_layer(layer).shape(part) for layer, site in self.modules for part in site.parts]
        experts = self.layers * self.experts.parameter_count(self.hidden) if self.experts else 0
        tables = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return sum(rows * columns for rows, columns in shapes) + self.other_weights + experts + tables

    def sizes(self) -> dict[str, Any]:
        """Return the family and the sizes that distinguish two backbones.

        The family of a checkpoint with ``runs_as`` is that of its loaded model.
        """
        names = ("layers", "hidden", "heads", "intermediate", "vocabulary")
        return {"family": dict(self.runs_as).get("model_type", self.family)} | {n: asdict(self)[n] for n in names}

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; `from_dict` is the inverse. Sites have a shape only without a converter.

        The fields of `OPTIONAL` are left out where they have their defaults.
        """
        values = asdict(self)
        if self.has_converter:
            for site in values["sites"]:
                del site["shape"], site["trained"]
        return {name: value for name, value in values.items() if name not in OPTIONAL or value != OPTIONAL[name]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Architecture:
        """Create an architecture from the values of `to_dict`; unknown or missing fields are an error."""
        values, known = {**OPTIONAL, **values}, {field.name for field in fields(cls)}
        if set(values) != known:
            raise LoraSuiteError("unknown or missing fields in an architecture record", got=sorted(set(values) ^ known))
        sites = tuple(map(_read_site, values["sites"]))
        pairs = {name: tuple((left, right) for left, right in values[name]) for name in ("disk", "runs_as")}
        fixed = {"heads": Heads(**values["heads"]), "sites": sites, "rope_thetas": tuple(values["rope_thetas"])}
        fixed |= {"other_sizes": tuple(map(_read_sizes, values["other_sizes"]))}
        fixed |= {"borrowed": tuple(Borrowed(**one) for one in values["borrowed"])}
        return cls(**{**values, **pairs, **fixed, "experts": read_experts(values["experts"])})


OPTIONAL = {
    field.name: field.default for field in fields(Architecture)
    if field.name in ("experts", "rotary_across", "v_norm", "other_sizes", "borrowed", "layer_scale", "ple_size")
}  # fmt: skip
"""Fields that records of most families lack -> their defaults."""


def _read_sizes(values: dict[str, Any]) -> LayerSizes:
    return LayerSizes(**{**values, "layers": tuple(values["layers"]), "heads": Heads(**values["heads"])})


def _read_site(values: dict[str, Any]) -> Site:
    shape, layers = values.get("shape"), values["layers"]
    fixed = {"parts": tuple(values["parts"]), "shape": shape and (shape[0], shape[1])}
    return Site(**{**values, **fixed, "layers": None if layers is None else tuple(layers)})
