"""Parts of a decoder layer, attention heads, and the linear modules that they are in. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..errors import LoraSuiteError, unknown_name_error

OUTPUT_PROJECTIONS = ("o", "down", "ple_down")
"""Parts whose output is added to the residual stream. The others, the input projections, take its normalized state."""
PARTS = ("q", "k", "v", "o", "q_gate", "gate", "up", "down", "ple_gate", "ple_down")
"""Those of per-layer embeddings (PLE), ``ple_gate`` and ``ple_down``, are Gemma 4's."""
UNITS = (("gate", "up", "down"), ("ple_gate", "ple_down"))
"""Parts with rows, or columns, in the same units."""
ATTENTION = ("q", "k", "v", "o", "q_gate")
"""Parts with rows, or columns, in heads. The heads of ``q_gate`` multiply the output of attention (Qwen3.5)."""
ROWS = ("part head dim", "head part dim", "group part dim")
"""Orders of a projection's output rows: one part after another (Phi-3, and every projection that is not fused); all
parts of one head after another (GPT-NeoX, Bloom, Qwen3.5); or, for each key/value group, its query heads, its key and
its value (Falcon)."""

FUSED_HEADS = {"head part dim": (("q", "k", "v"), ("q", "q_gate")), "group part dim": (("q", "k", "v"),)}
"""Order of rows -> the parts that can be fused in it."""


def check_parts(parts: Iterable[str]) -> None:
    """Raise an error for a name that is not in `PARTS`."""
    for part in parts:
        if part not in PARTS:
            raise unknown_name_error("part", part, PARTS)


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
                "inconsistent attention heads",
                got=f"{self.query} query heads, {self.key_value} key/value heads of {self.size}",
                wanted="positive numbers, and query heads a multiple of key/value heads",
                do="check num_attention_heads, num_key_value_heads and head_dim in the backbone's config.json",
            )

    @classmethod
    def of(cls, config: Any) -> Heads:
        """Read the heads from a config; ``head_dim`` and ``num_key_value_heads`` may be absent or None."""
        query = config.num_attention_heads
        size = getattr(config, "head_dim", None)
        if not size and config.hidden_size % query:
            raise LoraSuiteError(
                "the hidden size must be a multiple of the number of heads",
                got=f"hidden size {config.hidden_size}, {query} heads",
            )
        return cls(query, getattr(config, "num_key_value_heads", None) or query, size or config.hidden_size // query)

    @property
    def group(self) -> int:
        """Number of query heads per key/value head."""
        return self.query // self.key_value

    def count(self, part: str) -> int:
        """Return the number of heads of ``part``: G for keys and values, H for queries and for the columns of ``o``."""
        return self.key_value if part in ("k", "v") else self.query


@dataclass(frozen=True)
class LayerSizes:
    """Sizes of some layers in which they differ from the others (Gemma 4).

    Attributes:
        layers: Indices of the layers.
        heads: Their attention heads.
        intermediate: Size of their feed-forward layer, I.
        rotary_size: Number of rotated dimensions of their heads.
    """

    layers: tuple[int, ...]
    heads: Heads
    intermediate: int
    rotary_size: int


@dataclass(frozen=True)
class Borrowed:
    """Keys or values that a layer takes from another projection (Gemma 4).

    Attributes:
        layer: Index of the layer.
        part: ``k`` or ``v``.
        from_layer: The layer whose projection gives them, at or before ``layer``.
        from_part: Part of the projection.
    """

    layer: int
    part: str
    from_layer: int
    from_part: str


@dataclass(frozen=True)
class Site:
    """One linear module of a decoder layer.

    Attributes:
        path: Path of the module in the layer, such as ``self_attn.q_proj``.
        parts: Parts in the module, in order: ``("q",)``, ``("q", "k", "v")``, ``("gate", "up")``, ...
        rows: Order of the output rows, one of `ROWS`.
        bias: Whether the module has a bias.
        norm: Path of the norm before an input projection, or None (OLMo 2).
        post_norm: Path of the norm after an output projection (Gemma 2, OLMo 2), or None.
        conv1d: Whether the weight is stored as ``(in, out)`` (GPT-2).
        layers: Indices of the layers that have the module; None for all.
        shape: Shape of the weight, ``(out, in)``, in a backbone without a converter, where the site is one module of
            the whole model: ``path`` is its full name and the site's only part. None where the parts give the shape.
        trained: Whether training puts a LoRA there: not on the routers of a mixture of experts, for example.
    """

    path: str
    parts: tuple[str, ...]
    rows: str = "part head dim"
    bias: bool = False
    norm: str | None = None
    post_norm: str | None = None
    conv1d: bool = False
    layers: tuple[int, ...] | None = None
    shape: tuple[int, int] | None = None
    trained: bool = True

    def __post_init__(self) -> None:
        if self.shape is not None and self.parts == (self.path,):
            return
        if not self.parts or len(set(self.parts) & set(PARTS)) < len(self.parts):
            raise LoraSuiteError(
                "invalid parts of a site", where=self.path, got=self.parts, wanted=f"one or more of {PARTS}, each once"
            )
        if self.rows not in ROWS:
            raise LoraSuiteError("unknown order of rows", where=self.path, got=repr(self.rows), wanted=ROWS)
        if self.rows != "part head dim" and self.parts not in FUSED_HEADS[self.rows]:
            raise LoraSuiteError(
                "this order of rows needs a fused projection of heads", where=self.path, got=(self.rows, self.parts),
                wanted=FUSED_HEADS[self.rows],
            )  # fmt: skip

    @property
    def fused(self) -> bool:
        """Whether the module has more than one part."""
        return len(self.parts) > 1

    def is_in(self, layer: int) -> bool:
        """Return whether a layer has the module."""
        return self.layers is None or layer in self.layers

    @property
    def number(self) -> int:
        """The first number in the path, which is that of the layer if the path is a module's full name; else 0."""
        return next((int(name) for name in self.path.split(".") if name.isdecimal()), 0)
