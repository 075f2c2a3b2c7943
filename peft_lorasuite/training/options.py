"""Options of light fine-tuning; the defaults are those of the LoRASuite paper."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real

from ..errors import LoraSuiteError, check_seed, check_whole

NEW_LAYERS = ("train", "freeze")


@dataclass(frozen=True)
class FinetuneOptions:
    """How to train; `finetune.finetune` says what each means. The defaults are the paper's."""

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
                check_whole(name, value)
        check_seed(self.seed)
        if self.batch_size % self.at_once:
            raise LoraSuiteError(
                "does not divide the batch size", where="micro_batch_size", got=f"{self.at_once} of {self.batch_size}"
            )
        if not isinstance(self.learning_rate, Real) or not 0 < self.learning_rate <= 1:
            raise LoraSuiteError("must be above 0 and at most 1", where="learning_rate", got=repr(self.learning_rate))
        if not isinstance(self.warmup, Real) or not 0 <= self.warmup < 1:
            got = repr(self.warmup)
            raise LoraSuiteError("is a share of the steps", where="warmup", got=got, wanted="0 <= warmup < 1")
        if self.new_layers not in NEW_LAYERS:
            raise LoraSuiteError(
                "unknown choice", where="new_layers", got=repr(self.new_layers), wanted=" or ".join(NEW_LAYERS)
            )

    @property
    def at_once(self) -> int:
        """Samples of one forward pass; the gradients of a step's passes add up."""
        return self.micro_batch_size or self.batch_size
