"""Light fine-tuning: training an upgraded adapter on a few labeled samples, with the Hugging Face Trainer."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..adapters.chat_template import read_chat_template
from ..adapters.opening import adapter_source, adapter_task_type, open_adapter
from ..adapters.writing import write_peft_model
from ..errors import LoraSuiteError
from ..io.output import atomic_folder, check_output
from ..io.source import LoadOptions, Source
from ..models.classification import padding_of_model
from ..models.distributed import is_main_process
from ..models.restore import fixed_seed
from ..models.task import CLASSIFIERS, LabelsLike, model_task
from ..progress import Progress, no_progress
from ..text.chat_options import ChatLike, ChatOptions
from ..text.examples import read_records, read_texts
from ..text.vocabulary import pad_token_id
from .classification import class_examples
from .encoding import encode_examples
from .loop import train
from .lora_modules import add_modules
from .options import MAX_EXAMPLES, FinetuneOptions

log = logging.getLogger(__name__)


def finetune(
    model: Any,
    data: Any,
    *,
    samples: int | None = 100,
    epochs: int = 3,
    batch_size: int = 16,
    micro_batch_size: int | None = None,
    learning_rate: float = 1e-3,
    warmup: float = 0.0,
    cutoff: int = 256,
    template: str | None = None,
    chat: ChatLike = None,
    new_layers: str = "train",
    modules: Sequence[str] = (),
    labels: LabelsLike | None = None,
    problem_type: str | None = None,
    seed: int = 0,
    base: Any = None,
    revision: str | None = None,
    tokenizer: Any = None,
    token: str | bool | None = None,
    cache_dir: str | None = None,
    trust_remote_code: bool = False,
    dtype: Any = "auto",
    device_map: Any = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> Any:
    """Fine-tune an adapter on labeled samples: loss on the response only, AdamW, linear decay, no dropout.

    A new adapter can be trained in the same way, on a few samples or on all::

        fresh = get_peft_model(backbone, LoraConfig(r=32, lora_alpha=32, target_modules="all-linear"))
        finetune(fresh, "train.json", learning_rate=3e-4, warmup=0.1)  # LoRA on 100 samples
        finetune(fresh, "train.json", learning_rate=3e-4, warmup=0.1, samples=None)  # on all samples

    Under ``accelerate launch`` every process trains on its share of each batch; the main process writes the output.

    A classifier is trained on texts with labels, with transformers' loss of its ``problem_type``.

    Args:
        model: A PEFT model (loaded with ``is_trainable=True``), which is trained in place, or the folder or Hub id of
            an adapter.
        data: Labeled examples: a file (JSON, JSON Lines, CSV or Parquet), the Hub id of a dataset, a `datasets.Dataset`
            or a list, with ``messages``, with ``instruction`` and ``output``, or in another shape (see `read_records`).
            In conversations all assistant turns have a loss. For a classifier ``text`` and ``label``, or another
            shape (see `read_texts`).
        samples: Number of samples, the first ones of a shuffle by ``seed``; all if None.
        epochs: Passes over the samples.
        batch_size: Samples per step and device.
        micro_batch_size: Samples per forward pass, a divisor of ``batch_size``: less memory, the same steps. By
            default the whole batch.
        learning_rate: Peak learning rate.
        warmup: Fraction of the steps in which the learning rate rises to its peak.
        cutoff: Maximum length of a sample in tokens; the rest is cut off.
        template: Prompt template with ``{instruction}`` (and ``{input}``); by default that of LLM-Adapters.
        chat: How conversations are rendered: `ChatOptions`, or a mapping of their names to values; by default with the
            chat template of the tokenizer.
        new_layers: How to treat layers without any LoRA, which an upgrade leaves where a new layer has no matching
            old one: ``"train"`` adds new LoRA modules (A Kaiming, B zero), ``"freeze"`` adds none, as in the paper.
        modules: Last names of modules that get a new LoRA in every layer, in addition to those of the adapter; for
            adapters with few modules, such as those of `transplant`.
        labels: Names of a classifier's labels by index, for an adapter by name; by default those of files beside it.
        problem_type: transformers' ``problem_type`` of a classifier, likewise.
        seed: Seed of the choice of samples, their order and the new modules.
        base: The backbone, for an adapter by name; by default the base model of its config.
        revision: Revision of the adapter on the Hub.
        tokenizer: Tokenizer, or its folder or Hub id; by default that of the backbone.
        token: Hub token, for an adapter by name.
        cache_dir: Hub cache, likewise.
        trust_remote_code: Whether transformers may run code of the backbone's repository, likewise.
        dtype: Dtype in which the backbone runs, likewise.
        device_map: As in transformers, likewise.
        output: Folder to write the adapter to, whole or not at all.
        overwrite: Replace the output folder if it is not empty.
        progress: Shows the progress.

    Returns:
        The PEFT model, in evaluation mode, with the settings and the loss as ``finetune_record``.

    Raises:
        LoraSuiteError: If the data or an option is invalid, the model has nothing to train, or the training diverges.
    """
    options = FinetuneOptions(
        samples, epochs, batch_size, learning_rate, warmup, cutoff, template, new_layers, seed, micro_batch_size
    )  # checked before anything is read
    if output is not None:
        check_output(output, overwrite=overwrite, inputs=(model, base, data))
    load = LoadOptions(token, cache_dir, False, trust_remote_code, dtype, device_map)
    source = adapter_source(model, revision, load)
    chat = _with_own_template(ChatOptions.of(chat), source)
    limit = None if samples is None else max(samples, MAX_EXAMPLES)
    kind = adapter_task_type(model, revision, load)
    classifies = kind in CLASSIFIERS
    if kind == "FEATURE_EXTRACTION":
        raise LoraSuiteError("embedding models are not fine-tuned here", got=kind, do="train it with its own library")
    examples: Any = read_texts(data, template, limit, seed) if classifies else read_records(data, limit, seed)
    model, tokenizer = open_adapter(model, tokenizer, base, revision, load, labels=labels, problem_type=problem_type)
    drawn, settings = draw_samples(examples, samples, seed), {}
    size = model.config.get_text_config().vocab_size
    padding = pad_token_id(tokenizer, size)
    if classifies:
        padding = padding_of_model(model, tokenizer)
        rows, settings = class_examples(model, tokenizer, drawn, padding=padding, cutoff=cutoff)
    else:
        side = chat.one_side("the model", tokenizer)
        rows = encode_examples(tokenizer, drawn, template, cutoff=cutoff, chat=side, rows=size)
    with fixed_seed(seed):
        added = add_modules(model, fill=new_layers == "train", modules=modules)
        if added:
            log.info("%d modules without an old counterpart get a new LoRA", len(added))
        _check_trainable(model)
        trained = train(model, rows, padding, options, progress, **settings)
    record = {**asdict(options), "used": len(rows), "new_modules": added, "loss": round(trained.loss, 6)}
    if classifies:
        record["task"] = model_task(model, kind or "").facts()
    model.finetune_record = record
    if output is not None and is_main_process():
        with atomic_folder(output, overwrite=overwrite) as part:
            write_peft_model(model, part, weights=trained.weights)
    return model.eval()


def _with_own_template(chat: ChatOptions, source: Source | None) -> ChatOptions:
    """Return the options with the chat template beside an adapter that is given by name, if there is one."""
    if chat.new_template is not None or source is None:
        return chat
    return replace(chat, new_template=read_chat_template(source))


def draw_samples(examples: Sequence[Any], samples: int | None, seed: int) -> list[Any]:
    """Return the first ``samples`` examples of a shuffle by ``seed``; all if None."""
    order = list(range(len(examples)))
    random.Random(seed).shuffle(order)
    return [examples[index] for index in order[:samples]]


def _check_trainable(model: Any) -> None:
    if not any(weight.requires_grad for weight in model.parameters()):
        raise LoraSuiteError("the model has no trainable parameters", do="load the adapter with is_trainable=True")
