"""Options of `transplant` and `distill`; their defaults are resolved here alone."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, TypeVar

from ...arch.spec import check_parts
from ...training.options import FinetuneOptions
from ..options import check_bounds

Options = TypeVar("Options", bound="BehaviorOptions")

LEAST: dict[str, float] = {
    "prompts": 2, "length": 1, "top": 1, "extra": 0, "teacher_weight": 0, "change_threshold": 1e-9,
    "anchor_tokens": 0, "anchor_text_tokens": 0, "synthetic_prompts": 0, "samples": 0, "rank": 1, "ridge": 1e-9,
    "weight": 1e-9, "positions": 4, "shift_ridge": 0, "steps": 1, "refine_steps": 0, "epochs": 1, "batch_size": 1,
    "micro_batch_size": 1, "learning_rate": 1e-9,
}  # fmt: skip
"""Option -> its smallest value."""
MOST: dict[str, float] = {"teacher_weight": 1, "learning_rate": 1}
"""Option -> its largest value."""
RATE, CLASSIFIER_RATE = 1e-3, 3e-4
"""Learning rates of `distill`, unless the option says otherwise. At 1e-3 a classifier is as good on texts like those it
reads, and worse on texts of other phrasings (`benchmarks/classifiers.py --dev`)."""


@dataclass(frozen=True)
class BehaviorOptions:
    """Options that both methods share.

    Options that are None depend on the length of the old adapted model's answers: `resolve` takes their defaults from
    `BY_LENGTH`.

    Attributes:
        prompts: Prompts used at most, drawn at random; by default 128, and 2,000 texts for a classifier.
        length: Tokens of a response at most.
        top: Candidate tokens per position.
        extra: Further candidate tokens, drawn at random.
        teacher_weight: Weight of the old adapted model's own probabilities in the target where the adapter changed
            them; the rest is the difference that the adapter makes to the logits. See `targets.build_targets`.
        change_threshold: KL divergence, in nats, of the old adapted model from the old one at which the adapter counts
            as having changed a prediction. A higher one keeps more of what the new model knows.
        anchor_tokens: Prompt positions used as anchors at most: positions regularized toward the base model.
        anchor_text_tokens: Tokens of the built-in text used as anchors as well, approximately.
        synthetic_prompts: Further prompts, recombined from given ones that share a template, about entities that the
            old adapted model is most certain of; see `elicitation`.
        samples: Prompts of which the report has the answers of the old adapted model and of the new one, without and
            with the result; other ones than those of the fit, if enough are given. 0 keeps prompts and answers out of
            the report.
    """

    prompts: int | None = None
    length: int = 48
    top: int | None = None
    extra: int = 1000
    teacher_weight: float | None = None
    change_threshold: float | None = None
    anchor_tokens: int = 1000
    anchor_text_tokens: int = 0
    synthetic_prompts: int = 0
    samples: int = 10

    BY_LENGTH: ClassVar[dict[str, tuple[Any, Any]]] = {
        "top": (64, 32),
        "teacher_weight": (1.0, 0.5),
        "change_threshold": (0.5, 0.1),
    }
    """Option -> its default for short answers (formats, choices) and for long ones (chains of thought)."""

    def __post_init__(self) -> None:
        names = {item.name for item in fields(self)}
        check_bounds(
            self, *({name: bound for name, bound in table.items() if name in names} for table in (LEAST, MOST))
        )

    def resolve(self: Options, *, long: bool) -> Options:
        """Return the options with every None replaced by its default for short or long answers."""
        defaults = {name: pair[long] for name, pair in self.BY_LENGTH.items()}
        return replace(self, **{name: value for name, value in defaults.items() if getattr(self, name) is None})


@dataclass(frozen=True)
class TransplantOptions(BehaviorOptions):
    """Options of `transplant`, in addition to the shared ones.

    Attributes:
        edit_facts: Write what the answers state about the entities of a prompt template into an early layer (see
            `fact_editing`).
        rank: Rank of the update; the adapter's rank, if that is larger.
        ridge: Ridge of the regression, as a fraction of the mean diagonal of the Gram matrix.
        weight: Weight of a response position relative to an anchor.
        positions: Response positions used at most for the fit of the last layer, drawn at random.
        shift_ridge: Ridge of the solve for the wanted shift.
        steps: Steps of that solve at most.
        refine_steps: Steps at most of the refinement (L-BFGS) from the regression's update toward the target
            probabilities; 0 for none.
    """

    edit_facts: bool = True
    rank: int | None = None
    ridge: float = 0.1
    weight: float = 8.0
    positions: int | None = None
    shift_ridge: float = 0.01
    steps: int = 25
    refine_steps: int | None = None

    # Chains of thought get fewer refinement steps, since each takes ten times as long.
    BY_LENGTH: ClassVar[dict[str, tuple[Any, Any]]] = BehaviorOptions.BY_LENGTH | {
        "rank": (16, 64), "positions": (2000, 10000), "refine_steps": (60, 20),
    }  # fmt: skip


@dataclass(frozen=True)
class DistillOptions(BehaviorOptions):
    """Options of `distill`, in addition to the shared ones.

    Attributes:
        epochs: Passes over the prompts.
        batch_size: Prompts per optimizer step.
        micro_batch_size: Prompts per forward pass, a divisor of ``batch_size``; a smaller one takes less memory for the
            same steps. By default ``batch_size``.
        learning_rate: Peak learning rate, which decays linearly; by default 1e-3, and 3e-4 for a classifier.
        start: Start from the update of `transplant` rather than from zero.
        parts: Parts to train in addition to those of the adapter.
    """

    anchor_text_tokens: int = 3000
    epochs: int = 3
    batch_size: int = 8
    micro_batch_size: int | None = None
    learning_rate: float | None = None
    start: bool = True
    parts: tuple[str, ...] = ("q", "k", "v", "o")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_parts(self.parts)
        self.training(seed=0)

    def training(self, seed: int) -> FinetuneOptions:
        """Return the options of the training, which are checked there."""
        return FinetuneOptions(
            epochs=self.epochs, batch_size=self.batch_size, micro_batch_size=self.micro_batch_size,
            learning_rate=RATE if self.learning_rate is None else self.learning_rate, seed=seed,
        )  # fmt: skip

    def transplant(self) -> TransplantOptions:
        """Return the options of the `transplant` that training starts from; its rank is that of all trained modules."""
        shared = {item.name: getattr(self, item.name) for item in fields(BehaviorOptions)}
        return TransplantOptions(**shared, rank=16, refine_steps=0)
