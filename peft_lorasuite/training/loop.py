"""The training loop behind `finetune`: the Hugging Face Trainer with the paper's settings and nothing beside them."""

from __future__ import annotations

import math
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from ..errors import LoraSuiteError
from ..models.distributed import on_cpu
from ..models.prefix_cache import after_shared_prefix
from ..models.restore import no_dropout
from ..progress import Progress
from .encoding import IGNORED, Encoded, batch
from .options import FinetuneOptions


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
        """Return the loss on the responses; a shared prefix is read once, and no logits are computed before them."""
        labels = inputs.pop("labels")
        first = int((labels != IGNORED).int().argmax(dim=1).min()) - 1
        inputs, taken = self.begun(model, inputs, first)
        keep = torch.arange(first - taken, inputs["input_ids"].shape[1], device=labels.device)
        wanted = {"labels": labels[:, first:], "logits_to_keep": keep}
        return super().compute_loss(model, inputs | wanted, return_outputs, num_items_in_batch)

    def begun(self, model: Any, inputs: Any, first: int) -> tuple[dict[str, Any], int]:
        """Read the shared prefix once, see `after_shared_prefix`; wrappers for several processes read whole rows."""
        if self.args.world_size > 1:
            return {name: inputs[name] for name in ("input_ids", "attention_mask")} | {"use_cache": False}, 0
        return after_shared_prefix(model, inputs["input_ids"], inputs["attention_mask"], first)


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


def train(
    model: Any, rows: Sequence[Encoded], padding: int, options: FinetuneOptions, progress: Progress, *,
    trainer: Callable[..., ResponseTrainer] = ResponseTrainer, collate: Callable[..., dict[str, Tensor]] = batch,
) -> tuple[float, dict[str, Tensor] | None]:  # fmt: skip
    """Train what is trainable in a PEFT model.

    Args:
        model: The PEFT model, trained in place.
        rows: The training rows.
        padding: Token id to pad with.
        options: How to train.
        progress: Shows the progress.
        trainer: What computes the loss: by default the loss on the responses; see `distillation` for another.
        collate: ``(rows, padding=) -> batch``: what that trainer reads.

    Returns:
        The mean training loss; and, where FSDP has sharded the model over processes, the whole trained weights, in
        each of them (None elsewhere: the model has them).
    """
    with tempfile.TemporaryDirectory() as scratch, no_dropout(model):
        running = trainer(
            model,
            _arguments(options, scratch, model.config),
            data_collator=partial(collate, padding=padding),
            train_dataset=Rows(rows),
            callbacks=[StepBar(progress)],
        )
        running.remove_callback(PrinterCallback)
        loss = running.train().training_loss
        weights = whole_weights(running.model_wrapped) if running.is_fsdp_enabled else None
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
