"""Answers and the states behind them: the same, however the prompts of a batch are read."""

from __future__ import annotations

import pytest
import torch
from pico import PICO, pico_model, pico_tokenizer, save_backbone

from peft_lorasuite import Backbone
from peft_lorasuite.answering import answered
from peft_lorasuite.beginning import before_padding, decoder

WORDS = ["red", "blue", "tree", "stone", "river", "cloud", "small", "big", "runs", "sleeps"]
BEGINNING = " the red stone runs and the small river sleeps ;"
PROMPTS = [BEGINNING + rest for rest in (" big", " blue cloud", " the tree the tree the tree", " stone runs")]


@pytest.mark.parametrize("family", sorted(set(PICO) - {"gemma3"}))
def test_a_batch_answers_as_every_prompt_alone(family, opened):
    model, backbone = opened(family)
    together = answered(model, backbone, PROMPTS, length=6)
    for prompt, (turn, written) in zip(PROMPTS, together, strict=True):
        ((alone, apart),) = answered(model, backbone, [prompt], length=6)
        assert (turn, written.ids) == (alone, apart.ids)
        assert len(written.states) == len(written.ids) + turn.ended
        torch.testing.assert_close(written.states, apart.states, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2", "bloom"])
def test_the_states_are_those_of_a_pass_over_the_whole_turn(family, opened):
    model, backbone = opened(family)
    for turn, written in answered(model, backbone, PROMPTS, length=6):
        prompt = backbone.tokenizer(turn.prompt)["input_ids"]
        with torch.no_grad():
            states = decoder(model)(torch.tensor([[*prompt, *written.ids]])).last_hidden_state[0, len(prompt) - 1 :]
        torch.testing.assert_close(written.states, states[: len(written.states)], rtol=1e-4, atol=1e-4)


def test_a_beginning_is_read_once_unless_a_window_would_count_the_padding(opened):
    model, backbone = opened("llama")
    rows = [backbone.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    common = before_padding(model, rows)[0]
    assert common >= len(backbone.tokenizer(BEGINNING)["input_ids"]) - 1
    read = []
    hook = decoder(model).register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    answered(model, backbone, PROMPTS, length=1)
    hook.remove()
    assert read == [common, len(rows) * (max(map(len, rows)) - common)]
    assert before_padding(model, rows[:1]) == (0, None)
    assert before_padding(pico_model("gemma2"), rows) == (0, None)


@pytest.fixture
def opened(tmp_path):
    """Write a pico backbone of a family and open it: the model, and the backbone with its tokenizer."""

    def write(family: str):
        backbone = Backbone.open(save_backbone(tmp_path / family, pico_model(family), pico_tokenizer(WORDS)))
        return backbone.load(), backbone

    return write
