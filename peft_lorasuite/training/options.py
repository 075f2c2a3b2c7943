"""Options of fine-tuning; the defaults are those of the LoRASuite paper (light fine-tuning)."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real

from ..errors import LoraSuiteError, check_integer, check_seed

NEW_LAYERS = ("train", "freeze")
MAX_EXAMPLES = 4096
"""Records that are drawn of a longer source before the samples are chosen among them."""


@dataclass(frozen=True)
class FinetuneOptions:
    """How to train; see `finetune.finetune` for each option. The defaults are those of the paper."""

    samples: int | None = 100
    epochs: int = 3
    batch_size: int = 16
    learning_rate: float = 1e-3
    warmup: float = 0.0
    cutoff: int = 256
    template: str | None = None
    new_layers: str = "train"
    seed: int = 0
    micro_batch_size: int | None = None

    def __post_init__(self) -> None:
        for name in ("samples", "epochs", "batch_size", "cutoff", "micro_batch_size"):
            value = getattr(self, name)
            if value is not None or name in ("epochs", "batch_size", "cutoff"):
                check_integer(name, value)
        check_seed(self.seed)
        if self.batch_size % self.effective_micro_batch_size:
            raise LoraSuiteError(
                "must divide the batch size", where="micro_batch_size",
                got=f"{self.effective_micro_batch_size}, batch size {self.batch_size}",
            )  # fmt: skip
        if not isinstance(self.learning_rate, Real) or not 0 < self.learning_rate <= 1:
            raise LoraSuiteError("must be above 0 and at most 1", where="learning_rate", got=repr(self.learning_rate))
        if not isinstance(self.warmup, Real) or not 0 <= self.warmup < 1:
            raise LoraSuiteError(
                "must be a fraction of the steps, at least 0 and below 1", where="warmup", got=repr(self.warmup)
            )
        if self.new_layers not in NEW_LAYERS:
            raise LoraSuiteError(
                "unknown value", where="new_layers", got=repr(self.new_layers), wanted=" or ".join(NEW_LAYERS)
            )

    @property
    def effective_micro_batch_size(self) -> int:
        """Samples per forward pass; gradients are accumulated over the passes of a step."""
        return self.micro_batch_size or self.batch_size
