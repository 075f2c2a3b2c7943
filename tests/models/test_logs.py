"""What the libraries log while models are loaded."""

import logging

import pytest
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from pico import pico_model, save_backbone
from transformers.utils import logging as transformers_logging

from peft_lorasuite import Backbone
from peft_lorasuite.models.logs import drop_messages
from peft_lorasuite.models.task import CAUSAL, DECODER


@pytest.mark.parametrize(("device_map", "task"), [(None, CAUSAL), ("disk", CAUSAL), (None, DECODER)])
def test_loading_is_silent(tmp_path, caplog, device_map, task):
    folder = save_backbone(tmp_path / "llama", pico_model("llama"))
    transformers_logging.enable_propagation()
    try:
        Backbone.open(folder).load(device_map=device_map, task=task)
    finally:
        transformers_logging.disable_propagation()
    assert not caplog.messages


def test_errors_are_not_dropped(caplog):
    logger = logging.getLogger("some.library")
    with drop_messages("some.library"):
        logger.warning("expected")
        logger.error("unexpected")
    logger.warning("afterwards")
    assert caplog.messages == ["unexpected", "afterwards"]


@pytest.mark.parametrize("hub_hidden", [False, True])
def test_bars_of_transformers_are_hidden_while_a_model_is_loaded(tmp_path, capsys, hub_hidden):
    folder = save_backbone(tmp_path / "llama", pico_model("llama"))
    capsys.readouterr()  # transformers has a bar for writing as well
    transformers_logging.enable_progress_bar()
    if hub_hidden:
        disable_progress_bars()
    try:
        Backbone.open(folder).load()
        assert capsys.readouterr().err == ""
        assert transformers_logging.is_progress_bar_enabled()
        assert are_progress_bars_disabled() is hub_hidden
    finally:
        enable_progress_bars()


def test_bars_that_are_hidden_stay_hidden(tmp_path):
    folder = save_backbone(tmp_path / "llama", pico_model("llama"))
    transformers_logging.disable_progress_bar()
    try:
        Backbone.open(folder).load()
        assert not transformers_logging.is_progress_bar_enabled()
    finally:
        transformers_logging.enable_progress_bar()
