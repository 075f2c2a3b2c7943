"""Adapters of the demo pair's old backbone, trained on its task in a given prompt format.

The templates are those of well-known chat formats, as far as the vocabulary of 430 words has them: what it lacks is one
token for unknown words, as in the models that never saw the format.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import peft
import torch
from chat_demo import CHATML, LLAMA2, conversations
from common import modules_of
from demo_pair import DATA, FULL, TEMPLATE

from peft_lorasuite import Backbone
from peft_lorasuite.progress import no_progress
from peft_lorasuite.text.chat import Chat
from peft_lorasuite.text.examples import Example, format_example, read_records
from peft_lorasuite.training.encoding import encode_examples
from peft_lorasuite.training.loop import train
from peft_lorasuite.training.options import FinetuneOptions
from peft_lorasuite.training.scoring import score

LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant"
    "<|end_header_id|>\n\n{% endif %}"
)
ZEPHYR = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>{{ 'model' if message['role'] == 'assistant' else "
    "message['role'] }}\n{{ message['content'] }}{{ eos_token if message['role'] == 'assistant' else '<end_of_turn>' }}"
    "\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
CHATS = {"chatml": CHATML, "llama2": LLAMA2, "llama3": LLAMA3, "zephyr": ZEPHYR, "gemma": GEMMA}
"""Chat format -> its template."""
PROMPTS: dict[str, str | None] = {
    "alpaca": None, "alpaca-input": None, "question": TEMPLATE, "vicuna": "USER: {instruction} ASSISTANT:",
    "plain": "{instruction}",
}  # fmt: skip
"""Format without a chat template -> prompt template; None for those of Alpaca."""
FORMATS = (*CHATS, *PROMPTS)
LOSSES = ("answers", "all")
"""Tokens that have a loss: those of the answers, or all but the first."""


@dataclass(frozen=True)
class Trained:
    """An adapter in a format.

    Attributes:
        old: The old backbone, without a chat template of its own.
        folder: The adapter, with its tokenizer and chat template beside it.
        form: The format.
    """

    old: Backbone
    folder: Path
    form: str

    @property
    def expected(self) -> str:
        """Name of the format in this package."""
        return "chat" if self.form in CHATS else self.form.removesuffix("-input")


def with_input(item: Example) -> Example:
    """Return an item whose animal is the input rather than the end of the instruction."""
    *words, last = item.instruction.rstrip(".?").split()
    return replace(item, instruction=" ".join(words[:-2]) + ".", input=f"{words[-1]} {last}.")


def train_adapter(
    work: Path, form: str, loss: str, items: Sequence[Example], seed: int = 0, **training: Any
) -> Trained:
    """Train an adapter, or return the one that is there."""
    old, folder = Backbone.open(DATA / "old"), work / f"adapter-{form}-{loss}-{seed}"
    if folder.is_dir():
        return Trained(old, folder, form)
    tokenizer = old.tokenizer
    chat = Chat("old", tokenizer, CHATS.get(form, "none"))
    records: Any = [with_input(item) for item in items] if form == "alpaca-input" else list(items)
    records = read_records(conversations(items)) if form in CHATS else records
    rows = encode_examples(tokenizer, records, PROMPTS.get(form), chat=chat)
    rows = [replace(row, start=1, prompts=frozenset()) for row in rows] if loss == "all" else rows
    parts = modules_of(old.arch, old.arch.parts)
    config = peft.LoraConfig(r=16, lora_alpha=32, target_modules=parts, task_type="CAUSAL_LM")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = peft.get_peft_model(old.load(dtype="float32"), config)
        train(model, rows, tokenizer.pad_token_id, FinetuneOptions(**{**FULL, "seed": seed, **training}), no_progress)
    part = folder.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(str(part), save_embedding_layers=False)
    if form in CHATS:
        tokenizer.chat_template = CHATS[form]
        tokenizer.save_pretrained(part)
    part.rename(folder)
    return Trained(old, folder, form)


def unlabeled(form: str, items: Sequence[Example]) -> list[Any]:
    """Return prompts without answers in a format: conversations, or texts."""
    if form in CHATS:
        return conversations(items, labeled=False)
    return [format_example(item, PROMPTS[form]) for item in items]


def score_answers(model: Any, tokenizer: Any, form: str, items: Sequence[Example]) -> dict[str, Any]:
    """Score answers in a format; conversations are rendered by the tokenizer's chat template."""
    if form in CHATS:
        found = score(model.eval(), tokenizer, read_records(conversations(items)))
    else:
        found = score(model.eval(), tokenizer, items, PROMPTS[form], batch_size=64)
    return {"nll": round(found.nll, 4), "exact": round(found.exact, 4), "items": found.n}
