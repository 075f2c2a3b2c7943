"""Forward passes that compute the head at some places alone."""

from __future__ import annotations

import peft
import pytest
import torch
from pico import pico_model

from peft_lorasuite.models.forward import logits_at_places

ROWS, COLUMNS = torch.tensor([1, 0, 1, 1]), torch.tensor([4, 2, 0, 4])


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "PEFT"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_logits_at_places_are_those_of_the_whole_pass(name: str, wrapped: bool) -> None:
    model = pico_model(name)
    if wrapped:
        config = peft.LoraConfig(target_modules="all-linear", init_lora_weights=False, fan_in_fan_out=name == "gpt2")
        model = peft.get_peft_model(model, config)
    ids = torch.randint(0, 20, (2, 5), generator=torch.Generator().manual_seed(0))
    whole = model.eval()(input_ids=ids).logits
    _, found = logits_at_places(model, {"input_ids": ids}, ROWS, COLUMNS)
    assert found.detach() == pytest.approx(whole[ROWS, COLUMNS].detach(), abs=1e-5)
    assert torch.equal(model(input_ids=ids).logits, whole)  # the next pass is a whole one again
