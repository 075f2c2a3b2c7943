"""The training loop of `finetune` and `distill`: the Hugging Face Trainer with the settings of the paper."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from ..compat import training_arguments
from ..errors import LoraSuiteError
from ..io.temporary import temporary_folder
from ..models.distributed import runs_on_cpu
from ..models.forward import keeps_logits, model_inputs
from ..models.prefix_cache import reuse_shared_prefix
from ..models.restore import disable_dropout
from ..progress import Progress
from .encoding import IGNORE_INDEX, Encoded, batch
from .options import FinetuneOptions

CURVE = 50
"""Points of the curve of the loss at most."""


class RowDataset(Dataset[Encoded]):
    """Tokenized examples as a torch dataset."""

    def __init__(self, rows: Sequence[Encoded]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Encoded:
        return self.rows[number]


class LengthSampler(Sampler[int]):
    """Random order of batches, new in every epoch, in which the rows of a batch have similar lengths.

    This saves padding. An incomplete batch comes last, since the loader cuts batches from the order.

    Args:
        lengths: Length of every row in tokens.
        batch_size: Rows per step, over all processes.
        seed: Seed of the order.
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
        return iter([number for batch_rows in [*batches, last] for number in batch_rows])


class ResponseTrainer(Trainer):
    """A Trainer with `LengthSampler` and a loss on the responses; accelerate shards the batches as usual."""

    def get_train_dataloader(self) -> DataLoader[Encoded]:
        """Return the loader of the training rows."""
        rows = self.train_dataset
        if not isinstance(rows, RowDataset):
            raise TypeError(f"train_dataset must be a RowDataset, got {type(rows).__name__}")
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
        """Return the loss on the responses; logits are computed from the first response token of the batch on."""
        labels = inputs.pop("labels")
        first = int((labels != IGNORE_INDEX).int().argmax(dim=1).min()) - 1
        inputs, offset = self.read_prefix(model, inputs, first)
        if not keeps_logits(model):  # nor has it read a prefix, so that the labels are as long as its logits
            return super().compute_loss(model, inputs | {"labels": labels}, return_outputs, num_items_in_batch)
        keep = torch.arange(first - offset, inputs["input_ids"].shape[1], device=labels.device)
        inputs |= {"labels": labels[:, first:], "logits_to_keep": keep}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def read_prefix(self, model: Any, inputs: Any, first: int) -> tuple[dict[str, Any], int]:
        """Read the prefix that all rows share once (`reuse_shared_prefix`), at most ``first`` tokens of it.

        Returns:
            The inputs that are left, and how many positions were taken off. With several processes it is none: the
            prefix can only be read with a model that is not wrapped.
        """
        if self.args.world_size > 1:
            names = ("input_ids", "attention_mask")
            return model_inputs(model, **{name: inputs[name] for name in names}, use_cache=False), 0
        return reuse_shared_prefix(model, inputs["input_ids"], inputs["attention_mask"], first)


class ProgressCallback(TrainerCallback):
    """Reports the steps of the Trainer to a `Progress`."""

    def __init__(self, progress: Progress, title: str) -> None:
        self.progress, self.title = progress, title
        self.steps: Iterator[int] = iter(())

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the bar."""
        self.steps = iter(self.progress(self.title, range(state.max_steps)))
        next(self.steps, None)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Advance the bar; the last step closes it."""
        next(self.steps, None)


class Trained(NamedTuple):
    """Result of a training.

    Attributes:
        loss: The mean training loss.
        weights: The trained weights if FSDP has sharded them over processes, gathered in every process; None
            otherwise: the model has them.
        curve: The loss over time, as means of at most `CURVE` equal parts of the steps.
    """

    loss: float
    weights: dict[str, Tensor] | None
    curve: list[float]


def train(
    model: Any, rows: Sequence[Encoded], padding: int, options: FinetuneOptions, progress: Progress, *,
    trainer: Callable[..., ResponseTrainer] = ResponseTrainer, collate: Callable[..., dict[str, Tensor]] = batch,
    title: str = "fine-tuning",
) -> Trained:  # fmt: skip
    """Train the trainable parameters of a PEFT model, in place.

    Args:
        model: The PEFT model.
        rows: The tokenized training examples.
        padding: Token id to pad with.
        options: How to train.
        progress: Shows the progress.
        trainer: Trainer class, or a partial of one; it computes the loss. By default the loss on the responses.
        collate: ``(rows, padding=) -> batch``, with the tensors that the trainer reads.
        title: What the progress says.

    Raises:
        LoraSuiteError: If the loss or a weight is not finite.
    """
    with temporary_folder() as scratch, disable_dropout(model):
        hf_trainer = trainer(
            model,
            _training_arguments(
                options, str(scratch), model.config, -(-len(rows) // options.batch_size) * options.epochs
            ),
            data_collator=partial(collate, padding=padding),
            train_dataset=RowDataset(rows),
            callbacks=[ProgressCallback(progress, title)],
        )
        hf_trainer.remove_callback(PrinterCallback)
        loss = hf_trainer.train().training_loss
        weights = gather_weights(hf_trainer.model_wrapped) if hf_trainer.is_fsdp_enabled else None
    _check_finite(loss, weights or {name: weight for name, weight in model.named_parameters() if weight.requires_grad})
    curve = [entry["loss"] for entry in hf_trainer.state.log_history if "loss" in entry]
    return Trained(loss, weights, curve)


def _check_finite(loss: float, weights: Mapping[str, Tensor]) -> None:
    """Refuse a diverged training; it would go unnoticed until the adapter is used."""
    bad = [name for name, weight in weights.items() if not torch.isfinite(weight).all()]
    if bad or not math.isfinite(loss):
        raise LoraSuiteError(
            "the training diverged: the weights or the loss are not finite", where=bad[0] if bad else None,
            got=f"loss {loss}", do="lower the learning rate, or use another dtype for the backbone",
        )  # fmt: skip


def gather_weights(model: Any) -> dict[str, Tensor]:
    """Gather the trained weights of a model that FSDP has sharded; every process must call it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    weights: Any = get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, ignore_frozen_params=True)
    )
    return weights


def _training_arguments(options: FinetuneOptions, scratch: str, config: Any, steps: int) -> TrainingArguments:
    return TrainingArguments(
        output_dir=scratch,
        per_device_train_batch_size=options.effective_micro_batch_size,
        gradient_accumulation_steps=options.batch_size // options.effective_micro_batch_size,
        num_train_epochs=options.epochs,
        learning_rate=options.learning_rate,
        lr_scheduler_type="linear",
        optim="adamw_torch",
        weight_decay=0.0,
        save_strategy="no",
        logging_strategy="steps",
        logging_steps=-(-steps // CURVE),
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        label_names=["labels"],
        use_cpu=runs_on_cpu(),
        seed=options.seed,
        **training_arguments(warmup=options.warmup, use_cache=getattr(config, "use_cache", False)),
    )
