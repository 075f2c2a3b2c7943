"""Updates of embedding and head go by the shared tokens, whichever way PEFT stores them, or are refused by name."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from pico import pico_tokenizer
from planted import OLD_WORDS
from safetensors.torch import load_file, save_file
from variants import error, pair, trained, upgraded

from peft_lorasuite import LoraSuiteError, UpgradeMap, upgrade
from peft_lorasuite.mapping.upgrade_map import MapOptions

TOLERANCE = 1e-4
pytestmark = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")


def lora(**values: Any) -> peft.LoraConfig:
    return peft.LoraConfig(
        **({"r": 3, "lora_alpha": 5, "task_type": "CAUSAL_LM", "target_modules": "all-linear"} | values)
    )


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A Llama with another vocabulary, hidden basis, heads and units."""
    changes = ("vocabulary", "rotated hidden", "permuted heads", "permuted units")
    return pair(tmp_path_factory.mktemp("llama"), "llama", *changes, tie_word_embeddings=False)


def test_lora_of_embedding_and_head_goes_by_the_shared_tokens(llama, tmp_path):
    tuned = trained(tmp_path, llama, lora(target_modules=["q_proj", "embed_tokens", "lm_head"]))
    new = upgraded(tmp_path, llama)
    assert error(llama, tuned, new) < TOLERANCE
    report = new.upgrade_report
    shared, tokens = len(llama.ids[0]), len(pico_tokenizer(OLD_WORDS))
    assert report.facts["tables"]["head"]["rows"] == shared
    assert (
        report.tensors["base_model.model.lm_head.lora_B.weight"]
        == f"transferred in part: {shared} of {tokens} tokens are shared"
    )
    assert "a copy" in report.tensors["base_model.model.lm_head.base_layer.weight"]


def test_tables_trained_in_full_go_by_the_shared_tokens(llama, tmp_path):
    tuned = trained(tmp_path, llama, lora(target_modules=["v_proj"], modules_to_save=["embed_tokens", "lm_head"]))
    new = upgraded(tmp_path, llama)
    assert error(llama, tuned, new) < TOLERANCE
    assert set(new.peft_config["default"].modules_to_save) == {"embed_tokens", "lm_head"}


def test_trained_tokens_stay_trained_tokens(llama, tmp_path):
    ids = llama.ids[0][[5, 9, 20]].tolist()
    tuned = trained(tmp_path, llama, lora(target_modules=["v_proj"], trainable_token_indices=ids[::-1]))
    new = upgraded(tmp_path, llama)
    assert error(llama, tuned, new) < TOLERANCE
    assert new.upgrade_report.coverage == 1.0


def test_trained_tokens_of_a_tied_table_change_the_head_too(tmp_path):
    planted = pair(tmp_path, "qwen2", "vocabulary", "permuted hidden", tie_word_embeddings=True)
    ids = planted.ids[0][[5, 9, 20]].tolist()
    tuned = trained(tmp_path / "adapter", planted, lora(target_modules=["v_proj"], trainable_token_indices=ids))
    assert error(planted, tuned, upgraded(tmp_path / "adapter", planted)) < TOLERANCE


def test_multipliers_of_embedding_and_logits_are_met(tmp_path):
    planted = pair(tmp_path, "granite", "vocabulary", "widened hidden", tie_word_embeddings=False)
    tuned = trained(tmp_path / "adapter", planted, lora(target_modules=["embed_tokens", "lm_head"]))
    assert error(planted, tuned, upgraded(tmp_path / "adapter", planted)) < TOLERANCE


def test_a_table_behind_a_norm_is_refused_by_name(tmp_path):
    planted = pair(tmp_path, "bloom", "permuted hidden")
    trained(tmp_path / "adapter", planted, lora(target_modules=["query_key_value", "word_embeddings"]))
    info = upgraded(tmp_path / "adapter", planted).upgrade_report.tensors
    fate = info["base_model.model.transformer.word_embeddings.lora_embedding_A"]
    assert fate.startswith("not transferred: the embedding is followed by a norm")


def test_trained_tokens_are_refused_where_the_new_head_would_change_with_them(tmp_path):
    planted = pair(tmp_path, "qwen2", tie_word_embeddings=False)
    trained(tmp_path / "adapter", planted, lora(target_modules=["v_proj"], trainable_token_indices=[50, 60]))
    tied = pair(tmp_path / "tied", "qwen2", tie_word_embeddings=True)
    upgrade_map = UpgradeMap.build(planted.left, tied.right, MapOptions(layer_map="first"))
    result = upgrade(tmp_path / "adapter", upgrade_map, method="lorasuite", old=planted.left, new=tied.right)
    assert "train the embedding as LoRA" in " ".join(result.report.tensors.values())


def test_added_rows_without_a_tokenizer_beside_the_adapter_are_reported(llama, tmp_path):
    trained(tmp_path, llama, lora(target_modules=["v_proj"], modules_to_save=["embed_tokens"]))
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    name = "base_model.model.model.embed_tokens.weight"
    tensors[name] = torch.cat([tensors[name], torch.ones(3, 32)])
    save_file(tensors, path)
    report = upgraded(tmp_path, llama).upgrade_report
    tokens = len(pico_tokenizer(OLD_WORDS))
    assert report.tensors[name] == f"transferred in part: {len(llama.ids[0])} of {tokens} tokens are shared"
    assert report.facts["added_tokens"]["lost"] == {
        "rows 120 to 122": "the adapter's folder has no tokenizer that names their tokens"
    }


def test_a_head_under_its_name_on_disk_is_carried(tmp_path):
    planted = pair(tmp_path, "gpt_neox", "vocabulary", "permuted heads")
    tuned = trained(tmp_path / "adapter", planted, lora(target_modules=["dense", "lm_head"]))
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name.replace(".lm_head.", ".embed_out."): value for name, value in load_file(path).items()}, path)
    assert error(planted, tuned, upgraded(tmp_path / "adapter", planted)) < TOLERANCE


def test_a_result_with_tensors_of_its_backbone_is_upgraded_from_its_folder(llama, tmp_path):
    trained(tmp_path, llama, lora(target_modules=["v_proj"], modules_to_save=["lm_head"]))
    first = upgrade(tmp_path, llama.map, method="lorasuite", old=llama.left, new=llama.right)
    with pytest.raises(LoraSuiteError, match="save it and upgrade the folder"):
        upgrade(first.adapter, llama.map, method="lorasuite", old=llama.left, new=llama.right)


def test_both_backbones_are_asked_for(llama, tmp_path):
    trained(tmp_path, llama, lora(target_modules=["v_proj", "embed_tokens"]))
    with pytest.raises(LoraSuiteError, match="an adapter of the embedding or the head needs both backbones"):
        upgrade(tmp_path, llama.map, method="lorasuite")
