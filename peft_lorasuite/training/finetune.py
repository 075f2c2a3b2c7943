"""Light fine-tuning: a few labeled samples on top of an upgraded adapter, on the Hugging Face Trainer."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..adapters.loading import adapter_folder, open_tokenizer, put_on
from ..adapters.writing import write_adapter
from ..errors import LoraSuiteError
from ..io.output import check_free, whole_folder
from ..models.backbone import Backbone
from ..models.distributed import is_first
from ..models.restore import seeded
from ..progress import Progress, silent
from ..text.examples import read_examples
from ..text.vocabulary import padding
from .encoding import encode_examples
from .loop import train
from .lora_modules import add_modules
from .options import FinetuneOptions

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
    new_layers: str = "train",
    modules: Sequence[str] = (),
    seed: int = 0,
    base: Any = None,
    revision: str | None = None,
    tokenizer: Any = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Any:
    """Train an adapter on labeled samples: loss on the response and its end, AdamW, linear decay, no dropout.

    Full retraining and the vanilla baseline are the same function on a fresh adapter::

        fresh = get_peft_model(backbone, LoraConfig(r=32, lora_alpha=32, target_modules="all-linear"))
        finetune(fresh, "train.json", learning_rate=3e-4, warmup=0.1)  # vanilla LoRA on 100 samples
        finetune(fresh, "train.json", learning_rate=3e-4, warmup=0.1, samples=None)  # retraining on all of them

    It follows ``accelerate launch``: every process trains on its share of each batch, the first one writes.

    Args:
        model: A PEFT model (loaded with ``is_trainable=True``), which is trained in place, or the folder or Hub id of
            an adapter.
        data: Labeled examples: a file, a `datasets.Dataset` or a list (see `prompts.read_examples`).
        samples: Use the first so many after a shuffle by ``seed``; fewer if there are fewer, all if None.
        epochs: Passes over the samples.
        batch_size: Samples of one step on each device.
        micro_batch_size: Samples read at once, a divisor of ``batch_size``: less memory, the same steps. By default a
            step's samples are read together.
        learning_rate: Peak learning rate.
        warmup: Share of the steps in which the learning rate rises to its peak.
        cutoff: Longest sample in tokens; the rest is cut off.
        template: Prompt template with ``{instruction}`` (and ``{input}``); by default the one of LLM-Adapters.
        new_layers: What becomes of decoder layers that have no LoRA while others do, as an upgrade leaves the layers
            that match no old one: ``"train"`` gives them an ordinary new LoRA (A Kaiming, B zero), ``"freeze"``
            leaves them as they are, as the paper does.
        modules: Modules, by the end of their names, that get an ordinary new LoRA wherever they have none: room to
            learn for an adapter that sits in few places, as `transplant` leaves it.
        seed: Of the choice of samples, their order and the new layers.
        base: The backbone, for an adapter by name; by default the one that its config names.
        revision: The adapter's revision on the Hub.
        tokenizer: Tokenizer, or its folder or Hub id; by default the backbone's.
        output: Folder to write the adapter to, whole or not at all.
        overwrite: Whether that folder may hold something.
        progress: Shows how far it is.

    Returns:
        The PEFT model, in evaluation mode.

    Raises:
        LoraSuiteError: For data or options that cannot be used, or a model with nothing to train.
    """
    options = FinetuneOptions(
        samples, epochs, batch_size, learning_rate, warmup, cutoff, template, new_layers, seed, micro_batch_size
    )  # checked before anything is read
    if output is not None:
        check_free(output, overwrite=overwrite, inputs=(model, base, data))
    examples = read_examples(data)
    model = open_adapter(model, base, revision)
    tokenizer = open_tokenizer(model, tokenizer)
    rows = encode_examples(tokenizer, choose(examples, samples, seed), template, cutoff=cutoff)
    with seeded(seed):
        added = add_modules(model, fill=new_layers == "train", modules=modules)
        _check_trainable(model)
        loss, weights = train(model, rows, padding(tokenizer), options, progress)
    record = {**asdict(options), "used": len(rows), "new_modules": added, "loss": round(loss, 6)}
    model.finetune_record = record
    if output is not None and is_first():
        with whole_folder(output, overwrite=overwrite) as part:
            write_adapter(model, part, weights=weights)
    return model.eval()


def choose(examples: Sequence[Any], samples: int | None, seed: int) -> list[Any]:
    """Return the first ``samples`` of a shuffle by ``seed``."""
    order = list(range(len(examples)))
    random.Random(seed).shuffle(order)
    return [examples[number] for number in order[:samples]]


def open_adapter(model: Any, base: Any = None, revision: str | None = None) -> Any:
    """Return a PEFT model as it is; load an adapter by name onto its backbone, ready to train."""
    from peft import PeftModel

    from ..adapters.loading import old_backbone
    from ..adapters.peft_format import READ, check
    from ..adapters.reading import read, read_config
    from ..io.source import Source

    if isinstance(model, PeftModel):
        return model
    if not isinstance(model, (str, Path)):
        raise LoraSuiteError("no adapter", got=type(model).__name__, wanted="a PEFT model, a folder or a Hub id")
    source = Source(str(model), "adapter", revision)
    config, folder = read_config(source), adapter_folder(source)
    check(config, source.name)
    backbone: Backbone = old_backbone(source, base, None, {})()
    if config["peft_type"] in READ:
        read(source, backbone.arch, old=backbone)  # refuses what `upgrade` refuses: PEFT fills in what is missing
    return put_on(backbone.load(), folder, source, base=repr(backbone), is_trainable=True)


def _check_trainable(model: Any) -> None:
    if not any(weight.requires_grad for weight in model.parameters()):
        raise LoraSuiteError("the adapter is frozen", do="load it with is_trainable=True")
