"""Config entries without an effect are no reason to refuse an adapter (B7 of the real inputs); those with one are."""

from __future__ import annotations

import json
import shutil

import command_fixtures
import pytest
import torch
from command_fixtures import Pair

from peft_lorasuite import LoraSuiteError, upgrade

pair = command_fixtures.pair
CONFIG = "adapter_config.json"
SMALL = {"extra": 50, "length": 4}
PROMPTS = [f"the {word} cat" for word in ("red", "blue", "old", "new")] * 4
WITHOUT_EFFECT = {
    "ensure_weight_tying": True, "target_parameters": [], "layer_replication": [], "alora_invocation_tokens": [],
    "arrow_config": None, "use_bdlora": False, "use_qalora": False, "trainable_token_indices": [],
    "modules_to_save": [], "exclude_modules": [], "layers_to_transform": [], "layers_pattern": [], "rank_pattern": {},
    "alpha_pattern": {}, "bias": "all", "loftq_config": {}, "megatron_config": None, "lora_bias": False,
}  # fmt: skip
WITH_EFFECT = {
    "alora_invocation_tokens": [5], "kasa_config": {}, "arrow_config": {}, "layer_replication": [[0, 2], [1, 3]],
}  # fmt: skip


def changed(pair: Pair, folder, **entries):
    shutil.copytree(pair.adapter, folder)
    config = json.loads((folder / CONFIG).read_text()) | entries
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


def weights(folder, pair: Pair, **settings):
    return upgrade(folder, pair.map, old=pair.old, new=pair.new, **settings).adapter.updates


@pytest.mark.parametrize("option", WITHOUT_EFFECT)
def test_b7_an_entry_without_effect_is_not_refused(option, pair, tmp_path):
    folder = changed(pair, tmp_path / "adapter", **{option: WITHOUT_EFFECT[option]})
    wanted, got = (weights(one, pair, method="lorasuite") for one in (pair.adapter, folder))
    assert all(torch.equal(wanted[key].B @ wanted[key].A, got[key].B @ got[key].A) for key in wanted)


def test_b7_entries_without_effect_do_not_stop_methods_of_behavior(pair, tmp_path):
    folder = changed(pair, tmp_path / "adapter", **WITHOUT_EFFECT)
    settings = {"method": "transplant", "options": SMALL, "prompts": PROMPTS}
    wanted, got = (weights(one, pair, **settings) for one in (pair.adapter, folder))
    assert all(torch.equal(wanted[key].B @ wanted[key].A, got[key].B @ got[key].A) for key in wanted)


def test_b7_layers_that_are_listed_once_are_not_replicated(pair, tmp_path):
    folder = changed(pair, tmp_path / "adapter", layer_replication=[[0, 1], [1, 3]])
    assert upgrade(folder, pair.map, method="lorasuite").report.coverage == 1


@pytest.mark.parametrize("value", [[["a", "b"]], [[0.5, 3]], [[0]], [[0, 10**9]], [0, 1], [[-1, 2]]])
def test_e_a_malformed_layer_replication_is_one_line(value, pair, tmp_path):
    folder = changed(pair, tmp_path / "adapter", layer_replication=value)
    with pytest.raises(LoraSuiteError, match=r"adapter_config.json, layer_replication") as caught:
        upgrade(folder, pair.map, method="lorasuite")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("option", WITH_EFFECT)
def test_an_entry_with_an_effect_is_refused(option, pair, tmp_path):
    folder = changed(pair, tmp_path / "adapter", **{option: WITH_EFFECT[option]})
    with pytest.raises(LoraSuiteError, match=f"adapters with {option} are not transferred"):
        upgrade(folder, pair.map, method="lorasuite")
