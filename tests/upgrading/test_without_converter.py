"""Backbones whose model type has no converter: old, new or both, by the methods that run the models."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from any_model import OTHERS, PROMPTS, WORDS, divergence, load, log_probs, other_backbone, write_adapter
from pico import pico_model, pico_tokenizer, save_backbone

from peft_lorasuite import LoraSuiteError, PeftModel, UpgradeMap
from peft_lorasuite.arch.registry import without_converters
from peft_lorasuite.cli.main import main
from peft_lorasuite.upgrading.inputs import open_inputs
from peft_lorasuite.upgrading.upgrade import Upgraded, upgrade

FAST = {"length": 4, "entropy_gate": 0.0, "anchor_text_tokens": 0, "anchor_tokens": 8}
DISTILL = FAST | {"epochs": 12, "batch_size": 4, "learning_rate": 5e-3}
MODULES = {"mpt": ["Wqkv", "out_proj"], "codegen": ["qkv_proj", "fc_in"], "mamba": ["in_proj"], "jamba": ["in_proj", "q_proj"]}


@pytest.fixture(autouse=True)
def no_converters() -> Iterator[None]:
    with without_converters(*OTHERS):
        yield


def modules_of(model_type: str) -> list[str]:
    return MODULES.get(model_type, ["q_proj", "v_proj"])


def transfer(adapter: Path, new: Path, method: str, options: dict[str, Any] | None, **settings: Any) -> Upgraded:
    inputs = open_inputs(adapter, str(new), method=method, prompts=True)
    return upgrade(
        inputs.source, inputs.upgrade_map, method=method, options=options, old=inputs.old, new=inputs.new,
        prompts=PROMPTS, **settings,
    )  # fmt: skip


@pytest.mark.parametrize("model_type", OTHERS)
def test_the_behavior_of_an_adapter_comes_back_on_its_own_backbone(model_type: str, tmp_path: Path) -> None:
    base = other_backbone(tmp_path / "base", model_type)
    modules = r".*language_model.*\.q_proj" if model_type == "glm4v" else modules_of(model_type)
    adapter = write_adapter(tmp_path / "adapter", base, modules)
    upgraded = transfer(adapter, base, "distill", DISTILL)
    upgraded.save(tmp_path / "result")
    wanted = log_probs(base, adapter)
    before, left = divergence(wanted, log_probs(base)), divergence(wanted, log_probs(base, tmp_path / "result"))
    assert left < 0.6 * before, (before, left)
    assert upgraded.report.facts["without_converter"] == [model_type]
    assert upgraded.report.by_behavior
    assert all(fate == "transferred" for fate in upgraded.report.tensors.values())
