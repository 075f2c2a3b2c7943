"""Options of building an upgrade map, checked before anything is read."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import LoraSuiteError, check_seed, unknown_name_error
from ..linalg.assignment import HEAD_MAPS, LAYER_MAPS
from ..linalg.basis import HIDDEN_MAPS
from ..linalg.similarity import MIN_TOKENS, SIMILARITIES


@dataclass(frozen=True)
class MapOptions:
    """How a map is built.

    Attributes:
        hidden_map: ``embeddings``, ``polar`` or ``identity`` (see `linalg.basis.hidden_map`).
        similarity: Similarity of layer outputs: ``cka``, ``cca``, ``pwcca`` or ``procrustes``.
        layer_map: ``cka`` (the path of the largest total similarity), ``first``, ``medium``, ``last`` or
            ``proportional``.
        head_map: ``hungarian``, or ``index`` to pair heads by their index.
        tokens: Calibration tokens used for the similarity, at least 4.
        block: Tokens of one minibatch of CKA, at least 4.
        seed: Seed of the choice of calibration tokens.
    """

    hidden_map: str = "embeddings"
    similarity: str = "cka"
    layer_map: str = "cka"
    head_map: str = "hungarian"
    tokens: int = 2048
    block: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        check_seed(self.seed)
        tables = {"hidden_map": HIDDEN_MAPS, "similarity": SIMILARITIES, "layer_map": LAYER_MAPS, "head_map": HEAD_MAPS}
        for name, known in tables.items():
            if getattr(self, name) not in known:
                raise unknown_name_error(name.replace("_", " "), getattr(self, name), known)
        for name in ("tokens", "block"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < MIN_TOKENS:
                raise LoraSuiteError(
                    "an option is out of range", where=name, got=value, wanted=f"at least {MIN_TOKENS}"
                )
