"""The shared beginning of a batch, read once: the same logits and gradients as reading every row whole."""

from __future__ import annotations

import peft
import pytest
import torch
from pico import PICO, pico_model

from peft_lorasuite.models.prefix_cache import count_shared_columns, reuse_shared_prefix

LENGTH, BEGINNING, ROWS = 24, 13, 3


def batch(*, beginning: int = BEGINNING, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows that agree in their first tokens, the last one padded."""
    ids = torch.randint(3, 100, (ROWS, LENGTH), generator=torch.Generator().manual_seed(seed))
    ids[:, :beginning] = ids[:1, :beginning]
    ids[:, beginning] = torch.arange(50, 50 + ROWS)
    mask = torch.ones_like(ids)
    mask[-1, -5:] = 0
    return ids, mask


@pytest.mark.parametrize("family", sorted(PICO))
def test_logits_and_gradients_are_those_of_whole_rows(family):
    torch.manual_seed(0)  # of the LoRA: float32 keeps the bound below for this draw, not for every one
    model = pico_model(family)  # in evaluation mode: no dropout, as in our training
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, fan_in_fan_out=family == "gpt2")
    tuned = peft.get_peft_model(model, config)
    ids, mask = batch()
    found = []
    for whole in (True, False):
        tuned.zero_grad()
        begun, taken = {"input_ids": ids, "attention_mask": mask, "use_cache": False}, 0
        if not whole:
            begun, taken = reuse_shared_prefix(tuned, ids, mask, LENGTH - 2)
        assert taken == (0 if whole or family == "qwen3_5_text" else BEGINNING)  # it has recurrent layers
        logits = tuned(**begun).logits[:, BEGINNING - taken :]
        wanted = mask[:, BEGINNING:].bool()
        (logits[wanted] ** 2).mean().backward()
        grads = torch.cat([w.grad.flatten() for w in tuned.parameters() if w.requires_grad and w.grad is not None])
        found.append((logits[wanted].detach(), grads))
    (logits, grads), (again, grads_again) = found
    assert torch.allclose(logits, again, atol=1e-4 * float(logits.abs().max()))
    assert float((grads - grads_again).norm() / grads.norm()) < 1e-4
    assert float(grads.norm()) > 0


def test_a_wanted_position_is_never_taken_off():
    ids, mask = batch()
    assert count_shared_columns(ids, 9) == 9
    assert reuse_shared_prefix(pico_model("llama"), ids, mask, 9)[1] == 9


def test_a_short_beginning_or_a_single_row_is_read_whole():
    ids, mask = batch(beginning=4)
    assert reuse_shared_prefix(pico_model("llama"), ids, mask, LENGTH - 2)[1] == 0
    ids, mask = batch()
    assert reuse_shared_prefix(pico_model("llama"), ids[:1], mask[:1], LENGTH - 2)[1] == 0
