"""The experts of a mixture-of-experts layer: where they are and how their weights are laid out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import LoraSuiteError

EXPERT_PARTS = ("gate", "up", "down")
ROUTER = "router"
PARAMETERS = ("gate_up_proj", "down_proj")
"""The 3-D parameters of all experts in transformers 5."""


@dataclass(frozen=True)
class Experts:
    """Experts of the decoder layers, each a gated feed-forward layer.

    In a loaded model they are 3-D parameters, ``gate_up_proj (E, 2 I, D)`` and ``down_proj (E, D, I)``. Many
    checkpoints, and adapters trained with transformers 4, have linear modules for each expert instead.

    Attributes:
        count: Number of experts, E.
        intermediate: Size of one expert's feed-forward layer, I.
        norm: Path of the norm before the experts.
        path: Path of the module with the parameters in the layer.
        router: Path of the router in the layer.
        modules: Names of the gate, up and down modules of a single expert.
        stored: Path of the mixture in checkpoints and adapters of transformers 4; the first component of ``path`` if
            empty.
        transposed: Whether the parameters are stored as ``(E, in, out)``, with alternating columns of gate and up
            (GPT-OSS).
        dense: Layers that have a plain feed-forward layer instead.
    """

    count: int
    intermediate: int
    norm: str
    path: str = "mlp.experts"
    router: str = "mlp.gate"
    modules: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    stored: str = ""
    transposed: bool = False
    dense: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if min(self.count, self.intermediate) < 1:
            raise LoraSuiteError("sizes of experts must be positive", got=f"{self.count} of {self.intermediate}")

    def shape(self, part: str, hidden: int) -> tuple[int, int]:
        """Return the shape of one expert's part, or of the router, as ``(out_features, in_features)``."""
        if part == ROUTER:
            return self.count, hidden
        return (hidden, self.intermediate) if part == "down" else (self.intermediate, hidden)

    def parameter_count(self, hidden: int) -> int:
        """Return the number of weights of all experts of a layer."""
        return self.count * len(EXPERT_PARTS) * self.intermediate * hidden

    @property
    def mixtures(self) -> tuple[str, ...]:
        """Paths of the mixture in a layer, in the loaded model and where it is stored under another name."""
        own = self.path.partition(".")[0]
        return (own, self.stored) if self.stored else (own,)

    def parameter(self, part: str) -> str:
        """Return the name of the parameter that a part is in."""
        return PARAMETERS[part == "down"]


def read_experts(values: dict[str, Any] | None) -> Experts | None:
    """Create a record from its JSON values; None if there are none."""
    if values is None:
        return None
    return Experts(**{**values, **{name: tuple(values[name]) for name in ("modules", "dense")}})
