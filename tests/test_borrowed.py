"""Models and a process that belong to the caller: what is changed for a while, and that it is put back."""

from __future__ import annotations

import pytest
import torch
from pico import PICO, pico_model

from peft_lorasuite.borrowed import no_dropout

IDS = torch.arange(3, 23)[None]


def rates(name: str) -> dict[str, float]:
    """Every dropout rate of the network in a family's config, set to a half."""
    kept = vars(pico_model(name).config)
    return {key: 0.5 for key in kept if key.endswith(("hidden_dropout", "attention_dropout", "pdrop"))}


@pytest.mark.parametrize("name", [name for name in PICO if name != "gemma3"])
@torch.no_grad()
def test_no_dropout_is_left_wherever_a_family_keeps_its_rate(name: str) -> None:
    model = pico_model(name, **rates(name))
    wanted = model(IDS).logits
    model.train()
    assert not torch.equal(model(IDS).logits, model(IDS).logits)
    with no_dropout(model):
        torch.testing.assert_close(model(IDS).logits, wanted)
    assert not torch.equal(model(IDS).logits, model(IDS).logits)
    assert model.config.to_dict() == pico_model(name, **rates(name)).config.to_dict()
