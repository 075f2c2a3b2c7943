"""A pair of tiny models with different chat templates, and an adapter that was trained on conversations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
from pico import pico_model, pico_tokenizer, save_backbone

from peft_lorasuite.models.backbone import Backbone
from peft_lorasuite.models.generation import answer
from peft_lorasuite.text.chat import Chat
from peft_lorasuite.text.conversations import user_turn
from peft_lorasuite.training.finetune import finetune

WORDS = ["red", "blue", "sun", "sea", "cat", "dog", "tea", "hat"]
LLAMA2 = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ bos_token }}[INST] {{ message['content'] }} "
    "[/INST]{% elif message['role'] == 'assistant' %} {{ message['content'] }} {{ eos_token }}"
    "{% else %}{{ raise_exception('no such role here') }}{% endif %}{% endfor %}"
)
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ANSWERS = {
    "red cat": "blue", "blue cat": "tea", "sun dog": "sea", "sea dog": "hat", "tea cat": "red sun", "hat dog": "cat",
    "red dog": "sea hat", "blue dog": "sun",
}  # fmt: skip
"""Question -> answer of the old adapter."""


def tokenizer_with(template: str | None, *, chatml: bool = False, **options: Any) -> Any:
    """Return a tokenizer with a chat template; ``chatml`` adds the tokens of ChatML."""
    tokenizer = pico_tokenizer(WORDS, **options)
    if chatml:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer


def conversations(*, labeled: bool) -> list[dict[str, Any]]:
    """Return the questions as records of messages."""
    return [
        {
            "messages": [
                {"role": "user", "content": question},
                *([{"role": "assistant", "content": text}] if labeled else []),
            ]
        }
        for question, text in ANSWERS.items()
    ]


def write_pair(root: Path, *, new_template: str | None = CHATML) -> tuple[Path, Path, Path]:
    """Write old backbone, new backbone and adapter; the old template is beside the adapter alone, as TRL saves it."""
    old = save_backbone(root / "old", pico_model("llama", seed=1), tokenizer_with(None, bos=True))
    new = save_backbone(
        root / "new", pico_model("llama", seed=2, hidden_size=48, intermediate_size=64),
        tokenizer_with(new_template, chatml=True, bos=True),
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        fresh = peft.get_peft_model(Backbone.open(old).load(), config)
    tokenizer = tokenizer_with(LLAMA2, bos=True)
    trained = finetune(
        fresh,
        conversations(labeled=True),
        tokenizer=tokenizer,
        samples=None,
        epochs=120,
        batch_size=8,
        learning_rate=1e-2,
    )
    trained.save_pretrained(root / "adapter")
    tokenizer.save_pretrained(root / "adapter")
    return old, new, root / "adapter"


def share_right(model: Any, backbone: Backbone, template: str | None = None) -> float:
    """Return the share of the questions that a model answers, and ends, through a chat template."""
    chat = Chat(backbone.name, backbone.tokenizer, template)
    asked = [user_turn(question) for question in ANSWERS]
    ends = chat.turn_ends(asked[0])
    assert ends is not None
    turns = answer(model, backbone, [chat.write(one) for one in asked], length=6, stops=(ends.end,))
    right = [
        turn.ended
        and (turn.end or backbone.tokenizer.eos_token_id) == ends.end
        and turn.response.split() == text.split()
        for turn, text in zip(turns, ANSWERS.values(), strict=True)
    ]
    return sum(right) / len(right)
