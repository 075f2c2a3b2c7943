"""Other PEFT kinds as a LoRA of a backbone in memory: its dtype rounds nothing away, and it stays as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from pico import pico_model

from peft_lorasuite.adapters.reading import read_adapter
from peft_lorasuite.io.source import Source
from peft_lorasuite.models.backbone import Backbone

COMMON = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "down_proj"]}
KINDS = {
    "ia3": peft.IA3Config(feedforward_modules=["down_proj"], **COMMON),
    "oft": peft.OFTConfig(oft_block_size=8, **COMMON),
    "c3a": peft.C3AConfig(block_size=16, **COMMON),
    "loha": peft.LoHaConfig(r=2, alpha=3, **COMMON),
}


def adapter(folder: Path, config: Any, size: float) -> Path:
    """Save an adapter whose weights are drawn at a distance from those that change nothing."""
    model = peft.get_peft_model(pico_model("llama"), config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in (weight for weight in model.parameters() if weight.requires_grad):
            weight.add_(size * torch.randn(weight.shape, generator=generator))
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [0.02, 0.002])
@pytest.mark.filterwarnings("ignore")
def test_a_backbone_in_bfloat16_gives_the_update_of_the_same_in_float32(kind: str, size: float, tmp_path: Path) -> None:
    folder, rounded = adapter(tmp_path, KINDS[kind], size), pico_model("llama").bfloat16()
    before = {name: weight.clone() for name, weight in rounded.state_dict().items()}
    found, wanted = (
        read_adapter(Source(str(folder), "adapter"), old.arch, old=old, rank=32).updates
        for old in map(Backbone.open, (rounded, pico_model("llama").bfloat16().float()))
    )
    assert found.keys() == wanted.keys()
    for key, update in wanted.items():
        assert (found[key].delta_weight() - update.delta_weight()).norm() < 1e-3 * update.delta_weight().norm(), key
    after = rounded.state_dict()
    assert after.keys() == before.keys()
    assert all(after[name].dtype == torch.bfloat16 and torch.equal(after[name], before[name]) for name in before)
