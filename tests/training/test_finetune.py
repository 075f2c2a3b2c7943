"""Light fine-tuning and scoring on pico models: what is trained, on what, and what is written."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from pico import pico_model, pico_tokenizer, random_states, save_backbone
from safetensors.torch import load_file

from peft_lorasuite.adapters.writing import RECORD
from peft_lorasuite.errors import LoraSuiteError
from peft_lorasuite.text.examples import Example
from peft_lorasuite.training.encoding import IGNORE_INDEX, batch, encode, encode_examples
from peft_lorasuite.training.finetune import draw_samples, finetune
from peft_lorasuite.training.loop import LengthSampler
from peft_lorasuite.training.scoring import score

TEMPLATE = "{instruction}:"
WORDS = ["red", "blue", "green", "cat", "dog", "bird"]
FACTS = {"cat": "red", "dog": "blue", "bird": "green"}
DATA = [{"instruction": animal, "output": f" the {hue}", "answer": hue} for animal, hue in FACTS.items()] * 4
EXAMPLES = [Example(item["instruction"], item["output"], answer=item["answer"]) for item in DATA]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return pico_tokenizer(WORDS, bos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    return save_backbone(tmp_path_factory.mktemp("base"), pico_model("llama"), tokenizer)


def adapted(**settings: Any) -> Any:
    torch.manual_seed(3)
    chosen = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
        "task_type": "CAUSAL_LM",
    }
    return peft.get_peft_model(pico_model("llama"), peft.LoraConfig(**(chosen | settings)))


def trained(model: Any, words: Any, **settings: Any) -> Any:
    chosen = {"tokenizer": words, "template": TEMPLATE, "batch_size": 4, "learning_rate": 1e-2}
    return finetune(model, DATA, **(chosen | settings))


def factors(model: Any) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in peft.get_peft_model_state_dict(model, save_embedding_layers=False).items()}


def test_it_learns_and_touches_nothing_but_the_factors(tokenizer: Any) -> None:
    model = adapted(lora_dropout=0.5)
    frozen = {k: v.clone() for k, v in model.state_dict().items() if "lora_" not in k}
    before = score(model, tokenizer, EXAMPLES, TEMPLATE)
    random_state = random_states()
    after = score(trained(model, tokenizer, epochs=30, learning_rate=3e-2, samples=None), tokenizer, EXAMPLES, TEMPLATE)
    assert before.accuracy == 0
    assert after.accuracy == 1
    assert after.nll < 0.5 < before.nll
    assert all(torch.equal(frozen[k], v) for k, v in model.state_dict().items() if "lora_" not in k)
    assert not model.training
    assert random_states() == random_state
    assert model.config.use_cache
    assert [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)][:1] == [0.5]


def test_the_same_seed_gives_the_same_adapter_and_another_seed_another(tokenizer: Any) -> None:
    first, second, third = (trained(adapted(), tokenizer, seed=seed, samples=6) for seed in (1, 1, 2))
    assert all(torch.equal(factors(second)[k], v) for k, v in factors(first).items())
    assert not all(torch.equal(factors(third)[k], v) for k, v in factors(first).items())


def test_samples_are_the_first_of_a_seeded_shuffle() -> None:
    assert draw_samples(range(10), 4, 5) == draw_samples(range(10), None, 5)[:4]
    assert sorted(draw_samples(range(10), 99, 5)) == list(range(10))
    assert draw_samples(range(10), 4, 5) != draw_samples(range(10), 4, 6)


def test_the_loss_is_on_the_response_and_its_end(tokenizer: Any) -> None:
    one = encode(tokenizer, "cat:", " the red")
    text = tokenizer.decode([i for i in one.labels if i != IGNORE_INDEX])
    assert text.strip().replace(" ", "") == "thered</s>"
    assert tokenizer.decode(one.ids[: one.start]).replace(" ", "") == "<s>cat:"
    model = adapted()
    inputs = batch([one], padding=0)
    loss = float(model(**inputs).loss.detach())
    assert score(model, tokenizer, EXAMPLES[:1], TEMPLATE).nll == pytest.approx(loss, abs=1e-5)


def test_a_first_token_that_the_response_is_part_of_is_not_asked_for(tokenizer: Any) -> None:
    """``re`` + ``d blue`` reads ``red blue``: no position predicts its first token."""
    words = pico_tokenizer(["red", "blue"])
    assert words(" re")["input_ids"][0] != words(" red blue")["input_ids"][0]
    row = encode(words, " re", "d blue")
    assert (row.start, len(row.ids)) == (1, 3)


def test_padding_changes_no_score(tokenizer: Any) -> None:
    rows = [*EXAMPLES[:3], Example("cat dog bird cat dog bird", " the red red red")]
    model = adapted()
    alone = [score(model, tokenizer, [row], TEMPLATE) for row in rows]
    lengths = [len(one.ids) - one.start for one in encode_examples(tokenizer, rows, TEMPLATE)]
    mean = sum(one.nll * n for one, n in zip(alone, lengths, strict=True)) / sum(lengths)
    assert score(model, tokenizer, rows, TEMPLATE).nll == pytest.approx(mean, abs=1e-5)


def test_options_are_weighed_after_the_words_before_the_answer(tokenizer: Any) -> None:
    hues = list(FACTS.values())
    model = trained(adapted(), tokenizer, epochs=30, learning_rate=3e-2)
    assert score(model, tokenizer, EXAMPLES[:3], TEMPLATE, hues).accuracy == 1
    assert score(model, tokenizer, EXAMPLES[:3], TEMPLATE, lambda example: [example.answer]).accuracy == 1
    wrong = [Example("cat", " the blue", answer="blue")]
    assert score(model, tokenizer, wrong, TEMPLATE, hues).accuracy == 0
    with pytest.raises(LoraSuiteError, match="example 1: the answer is not an option"):
        score(model, tokenizer, EXAMPLES[:1], TEMPLATE, ["blue"])
    with pytest.raises(LoraSuiteError, match="no examples to score"):
        score(model, tokenizer, [], TEMPLATE)


def only_layer_one(tokenizer: Any, **settings: Any) -> tuple[dict[str, torch.Tensor], Any]:
    model = adapted(target_modules=["model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"])
    return factors(model), trained(model, tokenizer, **settings)


def test_layers_without_lora_get_one_and_the_others_keep_theirs(tokenizer: Any) -> None:
    before, model = only_layer_one(tokenizer, learning_rate=1e-9, epochs=1)
    now = factors(model)
    assert len(before) == 4
    assert len(now) == 12
    for name, tensor in before.items():
        assert torch.allclose(now[name], tensor, atol=1e-6), name
    new = {name: tensor for name, tensor in now.items() if name not in before}
    assert all(tensor.abs().max() < 1e-6 for name, tensor in new.items() if "lora_B" in name)
    assert all(tensor.abs().max() > 0.01 for name, tensor in new.items() if "lora_A" in name)
    _, model = only_layer_one(tokenizer, epochs=2)
    assert all(tensor.abs().max() > 1e-4 for name, tensor in factors(model).items() if "lora_B" in name)


def test_new_layers_can_be_left_frozen_as_in_the_paper(tokenizer: Any) -> None:
    before, model = only_layer_one(tokenizer, new_layers="freeze")
    assert factors(model).keys() == before.keys()


def test_layers_that_the_adapter_chose_itself_stay_the_only_ones(tokenizer: Any) -> None:
    model = adapted(layers_to_transform=[0], layers_pattern="layers")
    before = factors(model)
    assert factors(trained(model, tokenizer)).keys() == before.keys()


def test_an_adapter_by_name_is_trained_and_written_whole(folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    base = pico_model("llama")
    start = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    start.peft_config["default"].base_model_name_or_path = str(folder)
    start.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    model = trained(str(tmp_path / "adapter"), None, output=tmp_path / "out", samples=5)
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    assert record["used"] == record["samples"] == 5
    again = peft.PeftModel.from_pretrained(pico_model("llama"), str(tmp_path / "out"))
    ids = torch.tensor([[5, 6, 7]])
    assert torch.allclose(again(ids).logits, model(ids).logits, atol=1e-5)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", RECORD,
    }  # fmt: skip
    with pytest.raises(LoraSuiteError, match="not empty"):
        trained(str(tmp_path / "adapter"), None, output=tmp_path / "out")
    trained(str(tmp_path / "adapter"), None, output=tmp_path / "out", overwrite=True, samples=4, base=str(folder))
    assert json.loads((tmp_path / "out" / RECORD).read_text())["used"] == 4


@pytest.mark.parametrize(
    ("targets", "settings"),
    [
        (["q_proj"], {}),
        (["q_proj"], {"modules": ["v_proj"]}),
        (["model.layers.1.self_attn.q_proj"], {"new_layers": "train"}),
    ],
    ids=["as it is", "more modules", "more layers"],
)
def test_factors_of_a_bfloat16_backbone_are_trained_in_float32(
    targets: list[str], settings: dict[str, Any], tokenizer: Any, tmp_path: Path
) -> None:
    config = peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")
    model = peft.get_peft_model(pico_model("llama").bfloat16(), config)
    before = factors(model)
    model = trained(model, tokenizer, output=tmp_path / "out", learning_rate=1e-9, epochs=1, **settings)
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.float32}
    assert model.get_base_model().dtype == torch.bfloat16
    for name, tensor in before.items():
        torch.testing.assert_close(written[name], tensor, rtol=0, atol=1e-6)


def test_samples_read_a_few_at_a_time_give_the_same_steps(tokenizer: Any) -> None:
    whole, parts = (trained(adapted(), tokenizer, samples=11, micro_batch_size=size) for size in (None, 2))
    started = factors(adapted())
    for name, tensor in factors(whole).items():
        assert torch.allclose(factors(parts)[name], tensor, atol=1e-5), name
    assert any(not torch.allclose(factors(whole)[name], tensor, atol=1e-3) for name, tensor in started.items())


def test_no_logits_are_made_before_the_responses(tokenizer: Any) -> None:
    model, shapes = adapted(), []
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape[:2])))
    trained(model, tokenizer, samples=4, epochs=1)
    rows = encode_examples(tokenizer, draw_samples(EXAMPLES, 4, 0), TEMPLATE)
    first, longest = min(row.start for row in rows), max(len(row.ids) for row in rows)
    assert shapes == [(4, longest - first + 1)]


def test_every_epoch_has_every_row_once_and_like_lengths_together() -> None:
    lengths = [7, 1, 7, 1, 7, 1, 7, 1, 7, 1]
    sampler = LengthSampler(lengths, 4, seed=0)
    first, second = list(sampler), list(sampler)
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert all(len({lengths[n] for n in order[cut : cut + 2]}) == 1 for order in (first, second) for cut in (0, 6))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs: must be at least 1"),
        ({"samples": 0}, "samples: must be at least 1"),
        ({"samples": 1.5}, "samples: must be an integer"),
        ({"epochs": None}, "epochs: must be an integer"),
        ({"learning_rate": -1.0}, "learning_rate: must be above 0"),
        ({"learning_rate": float("inf")}, "learning_rate: must be above 0 and at most 1"),
        ({"learning_rate": 1e30}, "learning_rate: must be above 0 and at most 1"),
        ({"learning_rate": "1e-3"}, "learning_rate: must be above 0 and at most 1"),
        ({"seed": -1}, "seed: must be at least 0"),
        ({"seed": 2**32}, "seed: must be at most 4294967295"),
        ({"modules": ["foo"]}, "modules: no layer has such a linear module .got .'foo'., wanted a list of down_proj, "),
        ({"modules": ["lm_head"]}, "modules: no layer has such a linear module"),
        ({"modules": "lm_head"}, "modules: no layer has such a linear module"),
        ({"warmup": 2.0}, "warmup: must be a fraction of the steps"),
        ({"new_layers": "grow"}, "new_layers: unknown value"),
        ({"micro_batch_size": 3}, "micro_batch_size: must divide the batch size"),
        ({"cutoff": 2}, "no example has a response within the cutoff"),
        ({"template": "none"}, "has no {instruction}"),
        ({"tokenizer": None}, "does not say where its tokenizer is"),
    ],
)
def test_invalid_options_are_refused(tokenizer: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(LoraSuiteError, match=message):
        trained(adapted(), tokenizer, **settings)


def test_a_diverged_training_is_refused_and_not_written(tokenizer: Any, tmp_path: Path) -> None:
    model = adapted()
    for name, weight in model.named_parameters():
        if "layers.1" in name and "lora_B" in name:
            torch.nn.init.constant_(weight, float("nan"))
    with pytest.raises(LoraSuiteError, match=r"layers\.0.*: the training diverged"):
        trained(model, tokenizer, output=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_conv1d_modules_of_gpt2_are_found(tokenizer: Any) -> None:
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    model = trained(peft.get_peft_model(pico_model("gpt2"), config), tokenizer, modules=["c_fc"], samples=4)
    assert model.finetune_record["new_modules"] == [f"transformer.h.{layer}.mlp.c_fc" for layer in range(3)]


def test_a_frozen_or_plain_model_is_refused(tokenizer: Any) -> None:
    model = copy.deepcopy(adapted())
    model.requires_grad_(False)
    with pytest.raises(LoraSuiteError, match="is_trainable=True"):
        trained(model, tokenizer)
    with pytest.raises(LoraSuiteError, match="got LlamaForCausalLM"):
        trained(pico_model("llama"), tokenizer)
