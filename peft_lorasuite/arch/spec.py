"""The facts about a model family that a conversion needs: frozen records that check themselves (no torch here)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..errors import LoraSuiteError, unknown

OUTPUT_PROJECTIONS = ("o", "down")
"""Parts that write to the residual stream: output is the hidden size. The others read its normalised state."""
PARTS = ("q", "k", "v", "o", "gate", "up", "down")
ATTENTION = ("q", "k", "v", "o")
ROWS = ("part head dim", "head part dim", "group part dim")
"""Orders of a projection's output rows: all of one part after the other (Phi-3, and every projection that is not
fused), query, key and value head by head (GPT-NeoX, Bloom), or per key/value group: its query heads, its key, its
value (Falcon)."""


def check_parts(parts: Iterable[str]) -> None:
    """Refuse what is not one of `PARTS`."""
    for part in parts:
        if part not in PARTS:
            raise unknown("part", part, PARTS)


@dataclass(frozen=True)
class Heads:
    """Attention heads of one layer.

    Attributes:
        query: Number of query heads, H.
        key_value: Number of key/value heads, G; divides ``query`` (G = H is MHA, G = 1 is MQA).
        size: Dimensions of one head, d.
    """

    query: int
    key_value: int
    size: int

    def __post_init__(self) -> None:
        if min(self.query, self.key_value, self.size) < 1 or self.query % self.key_value:
            raise LoraSuiteError(
                "head counts do not fit together",
                got=f"{self.query} query heads, {self.key_value} key/value heads of {self.size}",
                wanted="positive numbers, query heads a multiple of key/value heads",
                do="check num_attention_heads, num_key_value_heads and head_dim in the backbone's config.json",
            )

    @classmethod
    def of(cls, config: Any) -> Heads:
        """Read the usual config names; ``head_dim`` and ``num_key_value_heads`` may be absent or None."""
        query = config.num_attention_heads
        size = getattr(config, "head_dim", None)
        if not size and config.hidden_size % query:
            raise LoraSuiteError(
                "the hidden size is no multiple of the head count", got=f"{config.hidden_size} over {query} heads"
            )
        return cls(query, getattr(config, "num_key_value_heads", None) or query, size or config.hidden_size // query)

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.query // self.key_value

    def count(self, part: str) -> int:
        """Heads of ``part``: G for keys and values, H for queries and for the output projection's columns."""
        return self.key_value if part in ("k", "v") else self.query


@dataclass(frozen=True)
class Site:
    """One linear module of a decoder layer.

    Attributes:
        path: Module path inside the layer, such as ``self_attn.q_proj``.
        parts: What the module holds, in order: ``("q",)``, ``("q", "k", "v")``, ``("gate", "up")``, ...
        rows: Order of the output rows, one of `ROWS`.
        bias: Whether the module has a bias.
        norm: Path of the norm in front of a reader; None where there is none (OLMo 2).
        post_norm: Path of the norm between a writer and the residual sum (Gemma 2, OLMo 2), or None.
        conv1d: Whether the weight is stored as ``(in, out)`` (GPT-2).
    """

    path: str
    parts: tuple[str, ...]
    rows: str = "part head dim"
    bias: bool = False
    norm: str | None = None
    post_norm: str | None = None
    conv1d: bool = False

    def __post_init__(self) -> None:
        strange = [part for part in self.parts if part not in PARTS]
        if strange or not self.parts or len(set(self.parts)) < len(self.parts):
            raise LoraSuiteError(
                "a site names no, doubled or unknown parts", where=self.path, got=self.parts, wanted=PARTS
            )
        if self.rows not in ROWS:
            raise LoraSuiteError("unknown fused layout", where=self.path, got=repr(self.rows), wanted=ROWS)
        if self.rows != "part head dim" and self.parts != ("q", "k", "v"):
            raise LoraSuiteError("only a fused q, k, v has rows ordered by head", where=self.path, got=self.parts)

    @property
    def fused(self) -> bool:
        """Whether the module holds more than one part."""
        return len(self.parts) > 1


@dataclass(frozen=True)
class Architecture:
    """A backbone's shape and layout, as its config states it.

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
        activation_floor: Values up to this one become zero before the activation is applied (FATReLU); 0 where the
            activation is a usual one.
        positions: ``"rotary"``, ``"alibi"`` or ``"learned"``.
        rotary_size: Head dimensions that are rotated; they come first.
        rope_thetas: Base of the rotary frequencies, one for all layers or one a layer.
        tied: Whether head and embedding share their weight.
        parallel: Whether attention and feed-forward read the same residual state.
        qk_norm: Whether queries and keys are normalised after their projection.
        embedding_scale: Multiplier of the embedding's output.
        embedding_norm: Path of a norm right after the embedding (Bloom), or None.
        residual_scale: Multiplier of what a writer adds to the residual stream.
        disk: Pairs (path in memory, path on disk) where the two differ.
        runs_as: Config values, ``model_type`` among them, with which transformers runs a checkpoint whose own type it
            does not know; empty for the types that it knows.
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
    rope_thetas: tuple[float, ...] = (10000.0,)
    tied: bool = False
    parallel: bool = False
    qk_norm: bool = False
    embedding_scale: float = 1.0
    embedding_norm: str | None = None
    residual_scale: float = 1.0
    disk: tuple[tuple[str, str], ...] = ()
    runs_as: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        held = [part for site in self.sites for part in site.parts]
        if len(held) != len(set(held)):
            raise LoraSuiteError("two sites hold the same part", where=self.family, got=held)
        if min(self.layers, self.hidden, self.intermediate, self.vocabulary) < 1:
            raise LoraSuiteError("a size is not positive", where=self.family, got=self.sizes())
        if len(self.rope_thetas) not in (1, self.layers):
            raise LoraSuiteError(
                "the rotary bases fit no layer count", where=self.family, got=len(self.rope_thetas), wanted=self.layers
            )

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that this family has, in the order of `PARTS`."""
        held = {part for site in self.sites for part in site.parts}
        return tuple(part for part in PARTS if part in held)

    def site(self, part: str) -> Site:
        """Return the site that holds ``part``."""
        for site in self.sites:
            if part in site.parts:
                return site
        raise LoraSuiteError(f"the family has no {part!r} projection", where=self.family, wanted=self.parts)

    def theta(self, layer: int) -> float:
        """Return the rotary base of a layer."""
        return self.rope_thetas[layer if len(self.rope_thetas) > 1 else 0]

    def shape(self, part: str) -> tuple[int, int]:
        """Return ``(out, in)`` of a part's weight, PyTorch's orientation."""
        width = self.heads.count(part) * self.heads.size if part in ATTENTION else self.intermediate
        return (self.hidden, width) if part in OUTPUT_PROJECTIONS else (width, self.hidden)

    def sizes(self) -> dict[str, Any]:
        """Return the family and the numbers that tell two backbones apart.

        A checkpoint that runs as another type counts as that type, for that is what it is once it is loaded.
        """
        names = ("family", "layers", "hidden", "heads", "intermediate", "vocabulary")
        family = dict(self.runs_as).get("model_type", self.family)
        return {**{name: asdict(self)[name] for name in names}, "family": family}

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; `from_dict` is the inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Architecture:
        """Rebuild an architecture from `to_dict`, refusing unknown or missing fields."""
        known = {field.name for field in fields(cls)}
        if set(values) != known:
            raise LoraSuiteError(
                "an architecture record has other fields than this version knows", got=sorted(set(values) ^ known)
            )
        sites = tuple(Site(**{**site, "parts": tuple(site["parts"])}) for site in values["sites"])
        pairs = {name: tuple((left, right) for left, right in values[name]) for name in ("disk", "runs_as")}
        thetas = tuple(values["rope_thetas"])
        return cls(**{**values, **pairs, "heads": Heads(**values["heads"]), "sites": sites, "rope_thetas": thetas})
