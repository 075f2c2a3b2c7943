"""Configs and model types read the same in every version of transformers, and what one cannot read is an error."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pico import pico_config, pico_model, save_backbone
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from versions import installed_spelling

from peft_lorasuite import Backbone, LoraSuiteError
from peft_lorasuite.arch.registry import architecture
from peft_lorasuite.compat import first_version, has, needs_version, require, version_numbers
from peft_lorasuite.compat.configs import new_model_types

TYPES = [(version, one) for version, types in new_model_types().items() for one in types]
BASE = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}


def test_numbers_of_a_version() -> None:
    assert version_numbers("2.13.0+cpu") == (2, 13, 0)
    assert version_numbers("5.0.0rc1") == (5, 0, 0)
    assert version_numbers("5.9") < version_numbers("5.10.1")


def test_the_error_names_the_version_that_is_needed() -> None:
    require("torch", "2.8", "nothing")
    with pytest.raises(LoraSuiteError, match=r"a wish needs a newer torch .*wanted >=99\).* pip install 'torch>=99'"):
        require("torch", "99", "a wish")
    assert "got 0" not in str(needs_version("torch", "99", "a wish"))


@pytest.mark.parametrize(("version", "model_type"), TYPES)
def test_a_model_type_is_there_from_its_first_version_on(version: str, model_type: str) -> None:
    assert (model_type in CONFIG_MAPPING) == has("transformers", version)
    assert first_version(model_type) == version
    assert first_version("llama") is None


def test_a_backbone_of_a_newer_type_names_the_version(tmp_path: Any) -> None:
    model_type = next((one for version, one in TYPES if not has("transformers", version)), None)
    if model_type is None:
        pytest.skip("the installed transformers has every known type")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(LoraSuiteError, match=rf"'{model_type}' needs a newer transformers"):
        _ = Backbone.open(tmp_path).config


@pytest.mark.parametrize("model_type", ["llama", "gpt_neox", "qwen2", "qwen2_vl"])
def test_the_rotary_base_is_that_of_the_model_in_memory_and_on_disk(model_type: str, tmp_path: Any) -> None:
    sections = {"mrope_section": [2, 1, 1]} if model_type == "qwen2_vl" else {}
    config = pico_config(model_type, rope_parameters=BASE["rope_parameters"] | sections)
    assert architecture(config).theta(0) == 5e5
    config.save_pretrained(tmp_path)
    assert Backbone.open(tmp_path).arch.theta(0) == 5e5


def test_the_two_rotary_bases_of_gemma_3() -> None:
    assert [architecture(pico_config("gemma3_text")).theta(layer) for layer in range(3)] == [1e4, 1e6, 1e4]


def test_a_config_of_transformers_5_is_read_or_refused(tmp_path: Any) -> None:
    """Before 5.0, its classes ignore ``rope_parameters`` and run with a base of 10,000."""
    save_backbone(tmp_path, pico_model("llama"))
    values = json.loads((tmp_path / "config.json").read_text())
    older = {name: value for name, value in values.items() if not name.startswith("rope_")}
    (tmp_path / "config.json").write_text(json.dumps(older | BASE))
    if has("transformers", "5.0"):
        assert Backbone.open(tmp_path).arch.theta(0) == 5e5
        return
    with pytest.raises(LoraSuiteError, match=r"rope_theta 500000.* needs a newer transformers .*wanted >=5\.0"):
        _ = Backbone.open(tmp_path).arch
    with pytest.raises(LoraSuiteError, match=r"wanted >=5\.0"):
        architecture(AutoConfig.from_pretrained(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(older | installed_spelling(BASE)))
    assert Backbone.open(tmp_path).arch.theta(0) == 5e5
