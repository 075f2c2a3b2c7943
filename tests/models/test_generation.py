"""Answers and the states behind them: the same, however the prompts of a batch are read."""

from __future__ import annotations

import pytest
import torch
from pico import PICO, pico_model, pico_tokenizer, save_backbone

from peft_lorasuite import Backbone, LoraSuiteError
from peft_lorasuite.models.generation import generate_answers
from peft_lorasuite.models.prefix_cache import cache_shared_prefix, decoder

WORDS = ["red", "blue", "tree", "stone", "river", "cloud", "small", "big", "runs", "sleeps"]
BEGINNING = " the red stone runs and the small river sleeps ;"
PROMPTS = [BEGINNING + rest for rest in (" big", " blue cloud", " the tree the tree the tree", " stone runs")]


@pytest.mark.parametrize("family", sorted(set(PICO) - {"gemma3"}))
def test_a_batch_answers_as_every_prompt_alone(family, opened):
    model, backbone = opened(family)
    together = generate_answers(model, backbone, PROMPTS, length=6)
    for prompt, (turn, written) in zip(PROMPTS, together, strict=True):
        ((alone, apart),) = generate_answers(model, backbone, [prompt], length=6)
        assert (turn, written.ids) == (alone, apart.ids)
        assert len(written.states) == len(written.ids) + turn.ended
        torch.testing.assert_close(written.states, apart.states, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2", "bloom"])
def test_the_states_are_those_of_a_pass_over_the_whole_turn(family, opened):
    model, backbone = opened(family)
    for turn, written in generate_answers(model, backbone, PROMPTS, length=6):
        prompt = backbone.tokenizer(turn.prompt)["input_ids"]
        with torch.no_grad():
            states = decoder(model)(torch.tensor([[*prompt, *written.ids]])).last_hidden_state[0, len(prompt) - 1 :]
        torch.testing.assert_close(written.states, states[: len(written.states)], rtol=1e-4, atol=1e-4)


def test_a_beginning_is_read_once_unless_a_window_would_count_the_padding(opened):
    model, backbone = opened("llama")
    rows = [backbone.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    common = cache_shared_prefix(model, rows)[0]
    assert common >= len(backbone.tokenizer(BEGINNING)["input_ids"]) - 1
    read = []
    hook = decoder(model).register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    generate_answers(model, backbone, PROMPTS, length=1)
    hook.remove()
    assert read == [common, len(rows) * (max(map(len, rows)) - common)]
    assert cache_shared_prefix(model, rows[:1]) == (0, None)
    assert cache_shared_prefix(pico_model("gemma2"), rows) == (0, None)


@pytest.mark.parametrize("asks", [{"repetition_penalty": 5.0}, {"no_repeat_ngram_size": 1}, {"use_cache": False}])
def test_the_likeliest_token_follows_whatever_the_checkpoint_asks_for(asks, opened):
    model, backbone = opened("llama")
    expected = [(turn, written.ids) for turn, written in generate_answers(model, backbone, PROMPTS, length=8)]
    for name, value in asks.items():
        setattr(model.generation_config, name, value)
    assert [(turn, written.ids) for turn, written in generate_answers(model, backbone, PROMPTS, length=8)] == expected
    assert all(getattr(model.generation_config, name) == value for name, value in asks.items())


def test_the_head_reads_every_pass_in_one_piece(opened):
    """Else torch, in bfloat16 on a CPU, copies a frozen head once for every row."""
    model, backbone = opened("llama")
    whole = []
    hook = model.get_output_embeddings().register_forward_hook(lambda *info: whole.append(info[1][0].is_contiguous()))
    generate_answers(model, backbone, PROMPTS, length=3)
    assert whole
    assert all(whole)
    whole.clear()
    model.generate(torch.ones(4, 5, dtype=torch.long), max_new_tokens=1, pad_token_id=2)
    assert whole == [False], "transformers does so itself by now: contiguous_head_input can go"
    hook.remove()


def test_a_tokenizer_without_an_end_is_reported(opened):
    model, backbone = opened("llama")
    backbone.tokenizer.eos_token = None
    with pytest.raises(LoraSuiteError, match="no end-of-sequence token"):
        generate_answers(model, backbone, PROMPTS, length=3)


@pytest.fixture
def opened(tmp_path):
    """Write a pico backbone of a family and open it: the model, and the backbone with its tokenizer."""

    def write(family: str):
        backbone = Backbone.open(save_backbone(tmp_path / family, pico_model(family), pico_tokenizer(WORDS)))
        return backbone.load(), backbone

    return write
