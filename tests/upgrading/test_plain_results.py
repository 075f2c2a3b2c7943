"""Results of the type ``lora``, and of any type: nothing in them that only the newest PEFT reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from variants import error, pair, trained, upgraded

from peft_lorasuite import LoraSuiteError, upgrade
from peft_lorasuite.adapters.peft_format import CONFIG, WEIGHTS
from peft_lorasuite.serving.features import OLD_ENTRIES


def lora(**values: Any) -> peft.LoraConfig:
    return peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", target_modules=["q_proj"], **values)


def test_new_rows_of_tokens_become_a_lora_of_the_embedding(tmp_path: Path) -> None:
    planted = pair(tmp_path, "llama", "permuted hidden")
    config = lora(trainable_token_indices={"embed_tokens": [40, 50]})
    tuned = trained(tmp_path / "adapter", planted, config)
    new = upgraded(tmp_path / "adapter", planted, output_type="lora")
    assert new.peft_config["default"].trainable_token_indices is None
    assert error(planted, tuned, new) < 1e-4


def test_a_table_whose_change_has_a_higher_rank_is_an_error_that_names_it(tmp_path: Path) -> None:
    planted = pair(tmp_path, "llama", "permuted hidden")
    trained(tmp_path / "adapter", planted, lora(modules_to_save=["lm_head"]))
    with pytest.raises(LoraSuiteError, match=r"lm_head\.weight: the rank is too small for the change of the head"):
        upgraded(tmp_path / "adapter", planted, output_type="lora")


def test_an_adalora_becomes_a_lora(tmp_path: Path) -> None:
    planted = pair(tmp_path, "llama", "permuted hidden")
    config = peft.AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules=["q_proj"], task_type="CAUSAL_LM")
    tuned = trained(tmp_path / "adapter", planted, config)
    new = upgraded(tmp_path / "adapter", planted, output_type="lora")
    assert new.peft_config["default"].peft_type == peft.PeftType.LORA
    assert error(planted, tuned, new) < 1e-4


@pytest.mark.filterwarnings("ignore")  # PEFT's, of a tied head that it saves
def test_a_lora_of_a_tied_head_is_reported(tmp_path: Path) -> None:
    planted = pair(tmp_path, "llama", tie_word_embeddings=True)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    trained(tmp_path / "adapter", planted, config)
    result = upgrade(tmp_path / "adapter", planted.map, method="lorasuite", old=planted.left, new=planted.right)
    assert "head shares its weight with the embedding" in result.report.facts["hints"][-1]


def test_a_result_has_entries_that_old_versions_know_and_halves_on_request(tmp_path: Path) -> None:
    planted = pair(tmp_path, "llama", "permuted hidden")
    trained(tmp_path / "adapter", planted, lora())
    result = upgrade(tmp_path / "adapter", planted.map, method="lorasuite")
    result.save(tmp_path / "out", dtype="float16")
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert set(config) <= OLD_ENTRIES
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / WEIGHTS).values()} == {torch.float16}
    with pytest.raises(LoraSuiteError, match="unknown dtype 'half'"):
        result.save(tmp_path / "other", dtype="half")
    assert not (tmp_path / "other").exists()
