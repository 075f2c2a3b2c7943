"""In which dtype a model runs: what the processor computes fast, what fits, and what the user asks for."""

from __future__ import annotations

import copy
import logging

import peft
import pytest
import torch
from pico import pico_model, pico_tokenizer, save_backbone

from peft_lorasuite import Backbone, LoraSuiteError
from peft_lorasuite.models import dtype as dtypes
from peft_lorasuite.models.dtype import choose_dtype, has_instructions
from peft_lorasuite.models.upcast import compute_in_float32

WORDS = ["red", "blue", "tree", "stone"]
FAMILIES = ("llama", "gemma2", "gpt2", "bloom", "phi")


@pytest.fixture
def slow(monkeypatch):
    """A processor without instructions for 16-bit floating point."""
    monkeypatch.setattr(dtypes, "has_instructions", lambda dtype, *, on_cpu: False)


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(dtypes, "has_instructions", lambda dtype, *, on_cpu: True)


def backbone(folder, family="llama", **settings):
    model = pico_model(family).to(torch.bfloat16)
    return Backbone.open(save_backbone(folder, model, pico_tokenizer(WORDS)), **settings)


def test_a_16_bit_checkpoint_runs_in_float32_where_the_processor_lacks_instructions(tmp_path, slow, caplog):
    with caplog.at_level(logging.INFO, logger="peft_lorasuite"):
        models = [backbone(tmp_path).load() for _ in range(2)]
    assert {model.dtype for model in models} == {torch.float32}
    assert caplog.text.count("runs in float32: the processor has no instructions for bfloat16") == 1


def test_and_in_its_own_dtype_where_it_has_them(tmp_path, fast, caplog):
    with caplog.at_level(logging.INFO, logger="peft_lorasuite"):
        assert backbone(tmp_path).load().dtype == torch.bfloat16
    assert "runs in" not in caplog.text


@pytest.mark.parametrize("asked", ["bfloat16", torch.bfloat16, "float32"])
def test_what_the_user_asks_for_is_what_runs(tmp_path, slow, asked):
    wanted = getattr(torch, asked) if isinstance(asked, str) else asked
    assert backbone(tmp_path, dtype=asked).load().dtype == wanted
    assert backbone(tmp_path).load(dtype=asked).dtype == wanted


def test_a_float32_checkpoint_stays_as_it_is(slow):
    assert choose_dtype("auto", torch.float32, parameters=10**12) == (torch.float32, False, "")


@pytest.mark.parametrize("asked", ["int8", "float31", torch.int64, 16])
def test_other_dtypes_are_refused_in_one_sentence(asked):
    with pytest.raises(LoraSuiteError, match=r"unknown dtype .*wanted auto, float32, bfloat16 or float16"):
        choose_dtype(asked, torch.float32, parameters=1)


def test_the_choice_for_this_processor_follows_torch():
    """On x86 the flags of torch.cpu decide; elsewhere oneDNN is asked."""
    found = choose_dtype("auto", torch.bfloat16, parameters=1)
    if not torch.accelerator.is_available():
        assert (found.dtype == torch.bfloat16) == has_instructions(torch.bfloat16, on_cpu=True)
        measured = torch.backends.cpu.get_cpu_capability()
        assert measured != "AVX2" or found.dtype == torch.float32


@pytest.mark.parametrize("family", FAMILIES)
def test_where_float32_does_not_fit_the_weights_stay_and_layers_compute_in_float32(tmp_path, slow, family, monkeypatch):
    monkeypatch.setattr(dtypes, "available_memory", lambda: 1000)
    one = backbone(tmp_path, family)
    assert one.running_dtype().upcast
    model, reference = one.load(), one.load(dtype="float32")
    matrices = {name: weight.dtype for name, weight in model.named_parameters() if weight.ndim == 2}
    assert matrices
    assert set(matrices.values()) == {torch.bfloat16}
    ids = torch.tensor([[3, 4, 5, 6, 7]])
    with torch.no_grad():
        got, wanted = model(ids).logits, reference(ids).logits
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_a_lora_on_such_a_model_gets_the_gradients_of_float32():
    plain = pico_model("llama").to(torch.bfloat16)
    sides = [compute_in_float32(copy.deepcopy(plain)), copy.deepcopy(plain).float()]
    ids, found = torch.tensor([[3, 4, 5, 6, 7]]), []
    for side in sides:
        config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        tuned = peft.get_peft_model(side, config)
        for name, weight in tuned.named_parameters():  # PEFT rounds its factors to the dtype of the base weights
            if "lora_" in name:
                weight.data = torch.linspace(-0.1, 0.1, weight.numel()).view_as(weight)
        tuned(input_ids=ids, labels=ids).loss.backward()
        found.append({name: weight.grad for name, weight in tuned.named_parameters() if weight.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert any(bool(grad.any()) for grad in found[0].values())
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-3, atol=1e-5)
