"""What the libraries log while models are loaded."""

import logging

import pytest
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
