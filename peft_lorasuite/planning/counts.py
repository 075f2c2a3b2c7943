"""What the stages of a map and of an upgrade read, compute and hold, counted from two architectures alone.

The counts follow `build` line by line: products as 2 m n k operations, decompositions of an n x n matrix as 10 n^3 (the
speed that LAPACK reaches makes that fit), whole models without their heads, which calibration leaves out.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..arch.spec import ATTENTION, Architecture
from ..linalg.assignment import SMALL
from ..linalg.similarity import SKETCH_SIZE, is_wide
from ..mapping.hidden import FIT_TOKENS
from ..mapping.upgrade_map import MapOptions
from ..models.activations import BATCH_TOKENS, BUDGET
from ..text.calibration import PIECE
from .stages import Side, Stage

SVD = 10
"""Operations of a symmetric or singular value decomposition, times n^3."""
SURPLUS = 1.3
"""Tokens run for each token kept: the tokenizers cut apart, the first positions of a text do not count."""
PIECE_TOKENS = PIECE // 4
"""Tokens of the longest calibration text."""
MATCHED = 0.65
"""Share of the free feed-forward units that one look at the scores matches: measured on layers between a 0.5B and a
1.5B model of one family; nearer backbones need fewer looks."""
CHUNK = 8192
"""Rows of the embeddings that are in float64 at a time."""


@dataclass(frozen=True)
class Costs:
    """The shapes of a pair, and what each stage of `build.build_map` costs on them.

    Attributes:
        old: Old backbone.
        new: New backbone.
        options: How the map is built.
        shared: Tokens that the tokenizers share.
        item: Bytes of a weight while the models run; None for the checkpoints' own.
        low_memory: Whether the layers stay on disk meanwhile.
    """

    old: Side
    new: Side
    options: MapOptions
    shared: int
    item: int | None = None
    low_memory: bool = False

    @property
    def layers(self) -> int:
        """Matched layers."""
        return min(self.old.arch.layers, self.new.arch.layers)

    @property
    def units(self) -> tuple[str, ...]:
        """Feed-forward parts that both families have."""
        return tuple(
            part for part in ("gate", "up", "down") if {part} <= {*self.old.arch.parts} & {*self.new.arch.parts}
        )

    @property
    def pairs(self) -> int:
        """Matched heads of a layer."""
        return min(self.old.arch.heads.query, self.new.arch.heads.query)

    @property
    def widths(self) -> tuple[int, int]:
        """Hidden sizes, old and new."""
        return self.old.arch.hidden, self.new.arch.hidden

    @property
    def kept(self) -> int:
        """Bytes of the map itself: hidden map, per layer its heads, units and gains."""
        (D, E), (old, new) = self.widths, (self.old.arch, self.new.arch)
        head = 4 * (4 * old.heads.size * new.heads.size + 12) + 16 + 4
        unit = 16 + 4 * len(self.units)
        gains = 4 * (4 + len(self.units)) * (D + E)
        layer = self.pairs * head + min(old.intermediate, new.intermediate) * unit + gains
        return 4 * (D * E + old.layers * new.layers) + self.layers * layer

    def stages(self) -> list[Stage]:
        """Return the stages in the order in which they run."""
        calibrated = [self.run_old(), self.run_new(), self.similarity()] if self.options.layer_map == "cka" else []
        return [
            self.hidden_map(),
            *calibrated,
            self.moving(),
            self.head_similarity(),
            self.head_fits(),
            self.matching(),
        ]

    def hidden_map(self) -> Stage:
        """Embeddings of the shared tokens, normal equations, an eigendecomposition, the pseudo-inverse."""
        (D, E), S = self.widths, self.shared
        few, many = min(D, E), max(D, E)
        fp64 = 2 * few**2 * many * 2 + few**3 // 3
        if self.options.hidden_map != "identity":
            fp64 += 3 * S * D * (D + E) + 2 * (SVD * D**3 + 4 * D * D * E)  # once on all tokens, once on half of them
        if self.options.hidden_map == "polar":
            fp64 += SVD * few**2 * many + 2 * E * D * (D + E)
        memory = 4 * S * (D + 3 * E) + 8 * CHUNK * (D + E) + 8 * (4 * D * D + 2 * D * E)
        read = self.old.table * self.old.item + self.new.table * self.new.item
        return Stage("hidden map", read, fp32=4 * S * D * E, fp64=fp64, memory=memory)

    def run_old(self) -> Stage:
        """Forward passes of the old backbone over the calibration text."""
        return self._run("calibration, old", self.old, 0)

    def run_new(self) -> Stage:
        """Forward passes of the new backbone; the old one's activations are kept."""
        return self._run("calibration, new", self.new, min(self.outputs(self.old), BUDGET))

    def _run(self, name: str, side: Side, held: int) -> Stage:
        arch, tokens, item = side.arch, round(self.options.tokens * SURPLUS), self.item or side.item
        attention = 4 * PIECE_TOKENS * arch.heads.query * arch.heads.size
        run = tokens * arch.layers * (2 * side.layer + attention)
        batch = BATCH_TOKENS * (3 * arch.intermediate + 6 * arch.hidden) * item
        kept = self.outputs(side)
        memory = self._base + batch + min(kept, BUDGET) + held
        mapped = kept if kept > BUDGET else 0
        times = -(-tokens // BATCH_TOKENS) if self.low_memory else 1
        if item == side.item:  # the file is mapped as it is
            mapped += side.module * item if self.low_memory else side.total * item
        else:
            memory += (side.table + side.module if self.low_memory else side.total) * item
        read = (side.table + times * arch.layers * side.layer) * side.item
        work = {"fp32" if item == 4 else "run": run}
        return Stage(name, read, memory=memory, mapped=mapped, **work)

    def outputs(self, side: Side) -> int:
        """Bytes of the layer outputs that are kept."""
        return side.arch.layers * self.options.tokens * side.arch.hidden * (self.item or side.item)

    def similarity(self) -> Stage:
        """Every old layer with every new one, on the tokens kept."""
        (D, E), N, block = self.widths, self.options.tokens, min(self.options.block, self.options.tokens)
        L, M = self.old.arch.layers, self.new.arch.layers
        memory = self._base + sum(min(self.outputs(side), BUDGET) for side in (self.old, self.new))
        if self.options.similarity == "cka":
            memory += 16 * block**2 * (L + M) + 12 * block * max(D, E)
            fp64 = 2 * (L * M + L + M) * block * N
            return Stage("layer similarity", fp32=2 * block * N * (L * D + M * E), fp64=fp64, memory=memory)
        memory += 12 * N * (D + E)
        if self.options.similarity == "procrustes":
            memory += 8 * D * E
            fp32 = L * M * (2 * N * D * E + SVD * min(D, E) ** 2 * max(D, E))
        else:
            few = min(D, E, N // 4)
            memory += 4 * N * few * (L + M)
            bases = SVD * N * (L * min(N, D) * D + M * min(N, E) * E)
            fp32 = bases + L * M * (2 * N * few**2 + 2 * SVD * few**3)
            fp32 += L * M * 2 * N * few * (few + D) if self.options.similarity == "pwcca" else 0
        return Stage("layer similarity", fp32=fp32, memory=memory)

    def moving(self) -> Stage:
        """Read the matched layers and bring the old ones into the new hidden basis."""
        E, parts = self.new.arch.hidden, (*ATTENTION, *self.units)
        read = self.layers * (self.old.weights(parts) * self.old.item + self.new.weights(parts) * self.new.item)
        moved = E * self.old.weights(ATTENTION) + self._unit_width * self.old.weights(self.units)
        part = max(self.old.weights((part,)) for part in parts)
        memory = self._base + self._heads + 12 * part
        return Stage("moving old weights", read, fp32=self.layers * 2 * moved, memory=memory)

    def head_similarity(self) -> Stage:
        """Two products for all heads of a layer pair, block products, norms; then the assignment."""
        a, b, E = self.old.arch.heads, self.new.arch.heads, self.new.arch.hidden
        query, group = a.query * a.size * b.query * b.size, a.key_value * a.size * b.key_value * b.size
        norms = sum(4 * (h.query + h.key_value) * h.size**2 * E for h in (a, b))
        fp32 = self.layers * (4 * (query + group) * E + 4 * query + norms)
        assign = self.layers * min(a.query, b.query) ** 2 * max(a.query, b.query)
        hungarian = self.options.head_map == "hungarian"
        memory = self._base + self._heads + 8 * (query + group)
        return Stage("head similarity", fp32=fp32, assign=assign * hungarian, memory=memory)

    def head_fits(self) -> Stage:
        """One least-squares map per matched head and part, in float64."""
        a, b, E = self.old.arch.heads.size, self.new.arch.heads.size, self.new.arch.hidden
        one = 2 * a * a * E + 2 * a * b * E + 3 * SVD * a**3 + 4 * a * a * b
        memory = self._base + self._heads + 8 * self.pairs * E * (2 * a + 2 * b)
        return Stage("head fits", fp64=self.layers * 4 * self.pairs * one, memory=memory)

    def matching(self) -> Stage:
        """Cosines of all feed-forward units, in a sketch where they are wide; best pairs first, an assignment."""
        few, many = sorted((self.old.arch.intermediate, self.new.arch.intermediate))
        parts, width = len(self.units), self._unit_width
        products = 2 * few * many * width * (1 if self._wide else parts)
        scores, left, places = looks(few, many)
        units = 4 * (few + many) * width * parts
        compare = 8 * (few + many) * width
        looked = 4 * few * many + 4 * round((1 - MATCHED) * few) * (many - round(MATCHED * few))
        return Stage(
            "unit matching",
            fp32=self.layers * (products + 6 * few * width * parts),
            assign=self.layers * left**2 * places,
            scores=self.layers * scores,
            memory=self._base + self._heads + units + max(compare + 4 * few * many, looked),
        )

    def upgrade(self, rank: int) -> Stage:
        """One adapter of that rank on every linear module, with a ready map (method lorasuite)."""
        (D, E), (old, new) = self.widths, (self.old.arch, self.new.arch)
        parts = (*ATTENTION, *self.units)
        heads = 4 * self.pairs * 2 * old.heads.size * new.heads.size * rank
        fp32 = self.layers * (len(parts) * 2 * rank * D * E + heads)
        joined = [(new.shape(site.parts[0])[1], site.parts, self._stacked(site.parts, rank)) for site in new.sites]
        widths = [(width + sum(new.shape(part)[0] for part in held), r) for width, held, r in joined]
        inverse = 4 * min(D, E) ** 2 * max(D, E)
        fp64 = self.layers * sum(8 * width * r * r + 2 * SVD * r**3 for width, r in widths) + inverse
        factors = [4 * rank * a.layers * sum(sum(a.shape(part)) for part in a.parts) for a in (old, new)]
        memory = self.kept + 4 * D * E + 2 * sum(factors)
        return Stage(f"upgrade at rank {rank}", self.kept + factors[0], fp32=fp32, fp64=fp64, memory=memory)

    def _stacked(self, parts: tuple[str, ...], rank: int) -> int:
        """Rank of a joined module before it is cut: parts of one old module share their A."""
        homes = {self.old.arch.site(part).path for part in parts if part in self.old.arch.parts}
        return rank * max(len(homes), 1)

    @property
    def _base(self) -> int:
        """Bytes held from the hidden map on: the map as it grows, counted full, and the pseudo-inverse."""
        return self.kept + 4 * self.widths[0] * self.widths[1]

    @property
    def _unit_width(self) -> int:
        """Dimensions in which feed-forward units are moved and compared: all, or those of a sketch."""
        return SKETCH_SIZE if self._wide else self.new.arch.hidden

    @property
    def _wide(self) -> bool:
        return is_wide(len(self.units), self.new.arch.hidden)

    @property
    def _heads(self) -> int:
        """Bytes of the cached heads: old ones moved, and new ones."""
        E, a = self.new.arch.hidden, self.old.arch.heads
        moved = 2 * (a.query + a.key_value) * a.size * E
        return 4 * (moved + self.new.weights(ATTENTION))


def looks(few: int, many: int) -> tuple[int, int, int]:
    """Scores that `matching.assign_units` looks at, and the units and places left to the assignment."""
    scores = 0
    while True:
        scores += few * many
        gone = round(MATCHED * few)
        few, many = few - gone, many - gone
        if few <= SMALL:
            return scores, few, many


def shared_at_most(old: Architecture, new: Architecture, shared: int | None) -> int:
    """Shared tokens that the hidden map is fitted on; without a count, as many as the smaller vocabulary has."""
    known = min(old.vocabulary, new.vocabulary) if shared is None else shared
    return min(known, max(FIT_TOKENS, 8 * old.hidden))
