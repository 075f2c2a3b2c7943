"""Configs as transformers writes them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from tiny_types import tiny_config
from versions import needs

from peft_lorasuite import Backbone, LoraSuiteError


def test_a_number_that_json_lacks_is_read_as_transformers_writes_it(tmp_path: Path) -> None:
    needs("transformers", "5.0", "a config with __float__")
    tiny_config("bamba").save_pretrained(tmp_path)
    assert "__float__" in (tmp_path / "config.json").read_text()
    assert Backbone.open(str(tmp_path)).config.time_step_limit == (0.0, math.inf)


def test_a_number_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    needs("transformers", "5.0", "a config with __float__")
    tiny_config("bamba").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace('"Infinity"', '"much"'))
    with pytest.raises(LoraSuiteError, match=r"config\.json: the config cannot be read.*time_step_limit"):
        _ = Backbone.open(str(tmp_path)).config


def test_a_context_of_minus_one_is_unbounded(tmp_path: Path) -> None:
    tiny_config("xlnet").save_pretrained(tmp_path)
    backbone = Backbone.open(str(tmp_path))
    assert backbone.config.max_position_embeddings == -1
    assert backbone.context == 1 << 30
