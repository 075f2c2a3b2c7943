"""The training loop behind `finetune`: the Hugging Face Trainer with the paper's settings and nothing beside them."""

from __future__ import annotations

import math
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from ..checks import check_seed, check_whole
from ..errors import LoraSuiteError
from ..models.distributed import on_cpu
from ..models.prefix_cache import after_beginning
from ..models.restore import no_dropout
from ..progress import Progress
from .encoding import IGNORED, Encoded, batch

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


class Rows(Dataset[Encoded]):
    """Encoded examples as torch wants them."""

    def __init__(self, rows: Sequence[Encoded]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Encoded:
        return self.rows[number]


class LengthSampler(Sampler[int]):
    """An order, new in every epoch, in which rows of like length stand together and batches at random places.

    Little is padded then. The one batch that is not full comes last, as the loader cuts batches from the order.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size = lengths, batch_size
        self.generator = random.Random(seed)

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        order = list(range(len(self)))
        self.generator.shuffle(order)
        rest = len(order) % self.batch_size
        last, order = order[:rest], order[rest:]
        order.sort(key=self.lengths.__getitem__)
        batches = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        self.generator.shuffle(batches)
        return iter([number for chosen in [*batches, last] for number in chosen])


class ResponseTrainer(Trainer):
    """The Trainer with `LengthSampler`; accelerate deals the batches out to the processes as ever."""

    def get_train_dataloader(self) -> DataLoader[Encoded]:
        """Return the loader of the training rows."""
        rows = self.train_dataset
        if not isinstance(rows, Rows):
            raise TypeError("the rows are not ours")
        size = self.args.train_batch_size
        step = size * self.args.gradient_accumulation_steps * self.args.world_size
        sampler = LengthSampler([len(row.ids) for row in rows.rows], step, self.args.seed)
        loader = DataLoader(
            rows, size, sampler=sampler, collate_fn=self.data_collator, pin_memory=self.args.dataloader_pin_memory
        )
        return self.accelerator.prepare(loader)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Loss on the responses; the beginning that all rows share is read once, and no logits are made before them."""
        labels = inputs.pop("labels")
        first = int((labels != IGNORED).int().argmax(dim=1).min()) - 1
        inputs, taken = self.begun(model, inputs, first)
        keep = torch.arange(first - taken, inputs["input_ids"].shape[1], device=labels.device)
        wanted = {"labels": labels[:, first:], "logits_to_keep": keep}
        return super().compute_loss(model, inputs | wanted, return_outputs, num_items_in_batch)

    def begun(self, model: Any, inputs: Any, first: int) -> tuple[dict[str, Any], int]:
        """Read the shared beginning, see `after_beginning`; wrappers for several processes read each batch whole."""
        if self.args.world_size > 1:
            return {name: inputs[name] for name in ("input_ids", "attention_mask")} | {"use_cache": False}, 0
        return after_beginning(model, inputs["input_ids"], inputs["attention_mask"], first)


class StepBar(TrainerCallback):
    """Moves our own progress bar by one a step."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.steps: Iterator[int] = iter(())

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Open the bar."""
        self.steps = iter(self.progress("fine-tuning", range(state.max_steps)))
        next(self.steps, None)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Move it, and close it with the last step."""
        next(self.steps, None)


@dataclass(frozen=True)
class Taught(Encoded):
    """A row whose loss is taken against a teacher.

    Attributes:
        positions: Positions that predict what the teacher speaks of.
        targets: The teacher's rows for them.
    """

    positions: tuple[int, ...] = ()
    targets: tuple[int, ...] = ()


class TaughtTrainer(ResponseTrainer):
    """Divergence from a teacher's probabilities instead of the loss on labels."""

    teacher_ids: Tensor
    teacher_target: Tensor
    loss_is_scaled_for_ga = True

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """Return a step's batches and how many positions are taught in them.

        Several processes count what they have on average, since their gradients are averaged afterwards.
        """
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        count = torch.tensor(float(sum(len(one["target"]) for one in samples)), device=device)
        return samples, self.accelerator.reduce(count, "mean")

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """``KL(teacher || model)`` on the teacher's candidate tokens: this batch's part of the step's mean."""
        line, position, target = (inputs.pop(name) for name in ("line", "position", "target"))
        begun, taken = self.begun(model, inputs, int(position.min()))
        columns, column = position.unique(return_inverse=True)
        outputs = model(**begun, logits_to_keep=columns - taken)
        logits = outputs.logits[line, column][:, self.teacher_ids.to(position.device)].float()
        wanted = self.teacher_target[target.cpu()].to(position.device)
        summed = torch.nn.functional.kl_div(logits.log_softmax(-1), wanted, reduction="sum", log_target=True)
        loss = summed / num_items_in_batch
        return (loss, outputs) if return_outputs else loss


def taught_batch(rows: Sequence[Taught], *, padding: int) -> dict[str, Tensor]:
    """Pad rows, and list what the teacher speaks of: line, position and the teacher's row."""
    listed = [
        (line, position, target)
        for line, row in enumerate(rows)
        for position, target in zip(row.positions, row.targets, strict=True)
    ]
    table = torch.tensor(listed, dtype=torch.long).reshape(-1, 3)
    return batch(rows, padding=padding) | {"line": table[:, 0], "position": table[:, 1], "target": table[:, 2]}


def train(
    model: Any, rows: Sequence[Encoded], padding: int, options: FinetuneOptions, progress: Progress, teacher: Any = None
) -> tuple[float, dict[str, Tensor] | None]:
    """Train what is trainable in a PEFT model, on labels or, with rows of `Taught`, on a `teacher.Teacher`.

    Returns:
        The mean training loss; and, where FSDP has spread the model over processes, the trained weights, whole, in
        each of them (None elsewhere: the model has them).
    """
    kind, collate = (ResponseTrainer, batch) if teacher is None else (TaughtTrainer, taught_batch)
    with tempfile.TemporaryDirectory() as scratch, no_dropout(model):
        trainer = kind(
            model,
            _arguments(options, scratch, model.config),
            data_collator=partial(collate, padding=padding),
            train_dataset=Rows(rows),
            callbacks=[StepBar(progress)],
        )
        if teacher is not None and isinstance(trainer, TaughtTrainer):
            trainer.teacher_ids, trainer.teacher_target = teacher.ids, teacher.target
        trainer.remove_callback(PrinterCallback)
        loss = trainer.train().training_loss
        weights = whole_weights(trainer.model_wrapped) if trainer.is_fsdp_enabled else None
    _check_finite(loss, weights or {name: one for name, one in model.named_parameters() if one.requires_grad})
    return loss, weights


def _check_finite(loss: float, weights: Mapping[str, Tensor]) -> None:
    """Refuse what has run away: nobody would notice before the adapter answers."""
    bad = [name for name, weight in weights.items() if not torch.isfinite(weight).all()]
    if bad or not math.isfinite(loss):
        raise LoraSuiteError(
            "the training ended in values that are not finite", where=bad[0] if bad else None, got=f"loss {loss}",
            do="lower the learning rate, or run the backbone in another dtype",
        )  # fmt: skip


def whole_weights(model: Any) -> dict[str, Tensor]:
    """Gather the trained weights of a model that FSDP has spread; every process has to call it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    weights: Any = get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, ignore_frozen_params=True)
    )
    return weights


def _arguments(options: FinetuneOptions, scratch: str, config: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir=scratch,
        per_device_train_batch_size=options.at_once,
        gradient_accumulation_steps=options.batch_size // options.at_once,
        num_train_epochs=options.epochs,
        learning_rate=options.learning_rate,
        warmup_steps=options.warmup,  # below 1: a share of the steps
        lr_scheduler_type="linear",
        optim="adamw_torch",
        weight_decay=0.0,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        label_names=["labels"],
        use_cpu=on_cpu(),
        use_cache=getattr(config, "use_cache", False),  # the Trainer writes it into the config, and leaves it there
        seed=options.seed,
    )
