"""What TRL makes of an old adapter: LoRAs of the new backbone, with the old adapted model as the teacher.

Rows of the benchmarks of adapters trained on conversations (conversation_pair.py), each followed by a learning rate.
All see the same prompts, in as many steps of the same size, and train the same modules.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import torch
from common import names_of

from peft_lorasuite.io.output import atomic_folder
from peft_lorasuite.training.lora_modules import add_modules

if TYPE_CHECKING:
    from conversation_pair import ConversationPair

NAMES = ("gold", "gkd", "on-policy", "transplant+on-policy")
"""Names of the rows; see the functions of these names, and `from_transplant`."""
TRL_ROW = re.compile(rf"(?P<name>{'|'.join(map(re.escape, NAMES))})-(?P<rate>[\d.]+)")


def settings(pair: ConversationPair, rate: float) -> dict[str, Any]:
    """Return what the configs of TRL's trainers have in common."""
    return {
        "output_dir": str(pair.folder / "trainer"), "num_train_epochs": 3, "per_device_train_batch_size": 8,
        "learning_rate": rate, "warmup_steps": 5, "lr_scheduler_type": "linear", "seed": pair.seed, "report_to": [],
        "save_strategy": "no", "logging_steps": 20, "bf16": False, "gradient_checkpointing": False,
    }  # fmt: skip


def train(pair: ConversationPair, name: str, rate: float, folder: Path) -> None:
    """Train a row's LoRA and write it."""
    torch.manual_seed(pair.seed)
    trainers = {"gold": gold, "gkd": gkd, "on-policy": on_policy, "transplant+on-policy": from_transplant}
    trainer = trainers[name](pair, rate)
    trainer.train()
    with atomic_folder(folder, overwrite=True) as part:
        trainer.save_model(str(part))


def gold(pair: ConversationPair, rate: float) -> Any:
    """Return a trainer with the ULD loss that reads the old adapted model's answers in both templates."""
    from datasets import Dataset
    from trl.experimental.gold import GOLDConfig, GOLDTrainer

    teacher = pair.old_adapted()
    records = [{"prompt": one[:-1], "completion": one[-1:]} for one in pair.answered(teacher)]
    config = GOLDConfig(
        **settings(pair, rate), max_length=512, lmbda=0.0, use_uld_loss=True,
        teacher_tokenizer_name_or_path=str(pair.adapter),
    )  # fmt: skip
    return GOLDTrainer(
        pair.new.load(), teacher, args=config, train_dataset=Dataset.from_list(records),
        processing_class=pair.new.tokenizer, peft_config=pair.config(pair.new),
    )  # fmt: skip


def gkd(pair: ConversationPair, rate: float) -> Any:
    """Return a trainer with the KL divergence from the old adapted model, on its greedy answers, for one vocabulary.

    The answers are made once, not sampled in every epoch.
    """
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    teacher = pair.old_adapted()
    records = [{"messages": one} for one in pair.answered(teacher)]
    config = GKDConfig(**settings(pair, rate), max_length=512, lmbda=0.0, beta=0.0, temperature=1.0)
    return GKDTrainer(
        pair.new.load(), teacher, args=config, train_dataset=Dataset.from_list(records),
        processing_class=pair.new.tokenizer, peft_config=pair.config(pair.new),
    )  # fmt: skip


def on_policy(pair: ConversationPair, rate: float) -> Any:
    """Return a trainer on answers that the model being trained samples, for one vocabulary."""
    return _on_policy(pair, rate, peft.get_peft_model(pair.new.load(), pair.config(pair.new)))


def from_transplant(pair: ConversationPair, rate: float) -> Any:
    """Return the same trainer, starting from the result of ``transplant``."""
    start = pair.folder / f"transplant-{pair.seed}"
    model = peft.PeftModel.from_pretrained(pair.new.load(), str(start), is_trainable=True)
    add_modules(model, modules=names_of(pair.new.arch, pair.new.arch.parts))
    return _on_policy(pair, rate, model)


def _on_policy(pair: ConversationPair, rate: float, model: peft.PeftModel) -> Any:
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    config = DistillationConfig(**settings(pair, rate), max_completion_length=pair.length)
    return DistillationTrainer(
        model, pair.old_adapted(), args=config, processing_class=pair.new.tokenizer,
        train_dataset=Dataset.from_list([{"prompt": one[:-1]} for one in pair.unlabeled]),
    )  # fmt: skip
