"""The demo pair that the package ships: two different backbones, and an adapter worth transferring."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import peft_lorasuite

DEMO = Path(peft_lorasuite.__file__).parent / "data" / "demo"


def read(name: str):
    return json.loads((DEMO / name).read_text())


def backbone(name: str):
    model = AutoModelForCausalLM.from_pretrained(DEMO / name, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(DEMO / name)


@pytest.fixture(scope="module")
def old():
    return backbone("old")


@pytest.fixture(scope="module")
def new():
    return backbone("new")


def greedy_accuracy(model, tokenizer, items: list[dict]) -> float:
    """Share of the items whose greedy answer is the reference."""
    template = read("task.json")["template"]
    prompts = [template.format(instruction=item["instruction"]) for item in items]
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    written = model.generate(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=6, do_sample=False
    )
    answers = tokenizer.batch_decode(written[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return sum(got.strip() == item["answer"] for got, item in zip(answers, items, strict=True)) / len(items)


def test_the_whole_pair_takes_at_most_ten_megabytes():
    assert sum(path.stat().st_size for path in DEMO.rglob("*") if path.is_file()) <= 10 * 2**20


def test_backbones_differ_in_all_six_respects(old, new):
    a, b = old[0].config, new[0].config
    for field in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        assert getattr(a, field) != getattr(b, field), field
    assert a.num_key_value_heads == a.num_attention_heads
    assert b.num_key_value_heads < b.num_attention_heads
    ours, theirs = old[1].get_vocab(), new[1].get_vocab()
    shared = ours.keys() & theirs.keys()
    assert len(shared) >= 400 > a.hidden_size
    assert ours.keys() - theirs.keys()
    assert theirs.keys() - ours.keys()
    assert sum(ours[token] == theirs[token] for token in shared) < len(shared) / 10


def test_tokenizers_and_configs_agree(old, new):
    text = "on monday clara went to the market and bought a lamp for 37 coins."
    for model, tokenizer in (old, new):
        assert len(tokenizer) == model.config.vocab_size
        for role in ("bos_token_id", "eos_token_id", "pad_token_id"):
            assert getattr(tokenizer, role) == getattr(model.config, role)
        found = tokenizer(text, return_offsets_mapping=True)
        assert tokenizer.unk_token_id not in found["input_ids"]
        assert found["offset_mapping"][-1] == (len(text) - 1, len(text))
        assert tokenizer.decode(found["input_ids"], skip_special_tokens=True) == text
    assert len(old[1].tokenize(text)) < len(new[1].tokenize(text))  # the new one cuts numbers into digits


def test_items_have_the_collections_keys_and_no_instruction_comes_twice():
    parts = [read(f"{name}.json") for name in ("train", "test", "prompts")]
    assert [len(part) for part in parts] == [2000, 300, 100]
    asked = [item["instruction"] for part in parts for item in part]
    assert len(set(asked)) == len(asked)
    assert all(item.keys() == {"instruction", "input", "output", "answer"} for item in parts[0] + parts[1])


def test_no_path_of_the_training_machine_is_left():
    assert read("adapter/adapter_config.json")["base_model_name_or_path"] == "peft-lorasuite/old"
    for path in DEMO.rglob("*.json"):
        content = path.read_text()
        assert "/home" not in content, path
        assert "/tmp" not in content, path
        assert "_name_or_path" not in content.replace("base_model_name_or_path", ""), path


def test_vanilla_lora_on_a_hundred_samples_reaches_less_than_sixty_percent():
    rows = read("reference.json")["new_vanilla_100"]
    assert max(row["gap_recovered"] for row in rows) < 0.6


def test_adapter_brings_the_old_backbone_from_under_20_to_over_90_percent(old):
    model, tokenizer = old
    items = read("test.json")[:60]
    assert greedy_accuracy(model, tokenizer, items) < 0.2
    base = AutoModelForCausalLM.from_pretrained(DEMO / "old", dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(base, DEMO / "adapter").eval()
    assert greedy_accuracy(adapted, tokenizer, items) > 0.9
