"""The config values that a converter reads: stored in a map, they give its architecture again."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from pico import MULTIMODAL, PICO, pico_config

from peft_lorasuite import LoraSuiteError
from peft_lorasuite.arch.config_values import check_architecture, first_difference, read_config_values
from peft_lorasuite.arch.registry import architecture


@pytest.mark.parametrize("family", PICO | MULTIMODAL)
def test_the_values_of_every_family_give_its_architecture(family: str) -> None:
    config = pico_config(family)
    values = json.loads(json.dumps(read_config_values(config)))
    assert values["model_type"] == family
    check_architecture(architecture(config), values)


@pytest.mark.parametrize("family", PICO | MULTIMODAL)
def test_another_architecture_is_named_by_its_first_field(family: str) -> None:
    config = pico_config(family)
    arch = architecture(config)
    forged = replace(arch, residual_scale=0.0, layer_path="other.layers")
    message = rf"converter of '{family}' gives \(got layer_path 'other.layers', wanted '{arch.layer_path}'\)"
    with pytest.raises(LoraSuiteError, match=message):
        check_architecture(forged, read_config_values(config))


def test_the_multiplier_of_an_embedding_may_be_rounded_to_another_dtype() -> None:
    """Gemma's architecture depends on the dtype; the backbone does not."""
    wide, narrow = (architecture(pico_config("gemma2", dtype=dtype)) for dtype in ("float32", "bfloat16"))
    assert wide.embedding_scale != narrow.embedding_scale
    assert first_difference(wide, narrow) is None
    assert first_difference(wide, replace(narrow, embedding_scale=1.02 * wide.embedding_scale)) is not None
