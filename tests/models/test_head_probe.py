"""What a forward pass shows of models without a converter: head, final norm and last projection."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from any_model import OTHERS, WORDS, other_backbone
from pico import GEMMA4_SHARED, pico_model, pico_tokenizer, save_backbone
from versions import needs_tiny

from peft_lorasuite import LoraSuiteError
from peft_lorasuite.arch.registry import without_converters
from peft_lorasuite.methods.behavior.states import LastProjection, last_projection
from peft_lorasuite.methods.behavior.targets import Head
from peft_lorasuite.models.backbone import Backbone
from peft_lorasuite.models.forward import final_states

IDS = torch.tensor([[5, 17, 40, 3, 99, 58, 7, 110]])
LAST = {
    "codegen": "transformer.h.2.mlp.fc_out",
    "exaone4": "model.layers.2.mlp.down_proj",
    "glm4v": "model.language_model.layers.2.mlp.down_proj",
    "jamba": "model.layers.2.feed_forward.down_proj",
    "mamba": None,
    "mixtral": None,
    "mpt": "transformer.blocks.2.ffn.down_proj",
    "xglm": "model.layers.2.fc2",
}
"""Last projections; Mamba's is one that PEFT refuses, and Mixtral's last layer ends with experts."""


BEHIND_A_NORM = ("exaone4", "glm4v")
"""Types whose layers have norms between the projections and the residual stream."""


def found_in(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Head, LastProjection | None]:
    """Return the loaded model, its head and its last projection."""
    backbone = Backbone.open(str(folder), dtype=dtype)
    model = backbone.load()
    head = Head(model, backbone)
    return model, head, last_projection(model, backbone, head)


@torch.no_grad()
def check_head(model: Any, head: Head) -> None:
    """Check that the head gives the model's logits, from the final states and from what the final norm reads."""
    seen: list[torch.Tensor] = []

    def keep(module: Any, args: Any, kwargs: Any) -> None:
        seen.append((*args, *kwargs.values())[0])

    hook = model.get_submodule(head.norm_path).register_forward_pre_hook(keep, with_kwargs=True)
    logits = model(input_ids=IDS).logits[0]
    hook.remove()
    states = final_states(model, {"input_ids": IDS})[0]
    torch.testing.assert_close(head.logits(states, normed=True), logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(head.logits(seen[-1][0]), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", OTHERS)
def test_head_final_norm_and_last_projection_of_every_kind(model_type: str, tmp_path: Path) -> None:
    needs_tiny(model_type)
    with without_converters(model_type):
        model, head, place = found_in(other_backbone(tmp_path, model_type))
    check_head(model, head)
    assert (place and place.module) == LAST[model_type]
    if place is not None:
        assert (place.gain is not None) == (model_type in BEHIND_A_NORM)
        assert place.factor == pytest.approx(1.0, abs=1e-3)


DESCRIBED = ["cohere2", "falcon", "gemma2", "glm4", "gpt2", "gpt_neox", "gptj", "granite", "olmo2", "opt", "phi"]


GEMMA4 = [{}, {"attention_k_eq_v": True}, GEMMA4_SHARED]
CASES = [(name, {}) for name in (*DESCRIBED, "qwen3_5_text", "gemma4")] + [("gemma4_text", one) for one in GEMMA4]


@pytest.mark.parametrize(("model_type", "values"), CASES, ids=[f"{name}-{'-'.join(own)}" for name, own in CASES])
def test_what_is_found_is_what_the_converter_says(model_type: str, values: dict[str, Any], tmp_path: Path) -> None:
    """Multipliers of logits, of layers and of the residual stream, soft caps, gains minus one, and heads with biases.

    Gemma 4 ends with its per-layer embeddings, if it has any.
    """
    folder = save_backbone(tmp_path, pico_model(model_type, **values), pico_tokenizer(WORDS))
    model, head, known = found_in(folder)
    check_head(model, head)
    with without_converters(model_type):
        model, head, found = found_in(folder)
    check_head(model, head)
    assert found is not None
    assert known is not None
    assert (found.module, found.target) == (known.module, known.target)
    assert found.factor == pytest.approx(known.factor, rel=1e-3)
    assert (found.gain is None) == (known.gain is None)
    if found.gain is not None and known.gain is not None:
        torch.testing.assert_close(found.gain, known.gain, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_type", ["codegen", "exaone4", "mixtral"])
def test_rounding_to_16_bits_hides_nothing(model_type: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Experts after the last linear module change what it adds by a few per cent, which must not pass for rounding."""
    needs_tiny(model_type)
    with without_converters(model_type):
        _, _, place = found_in(other_backbone(tmp_path, model_type), dtype)
    assert (place and place.module) == LAST[model_type]


def test_logits_that_are_not_those_of_the_head_are_an_error(tmp_path: Path) -> None:
    backbone = Backbone.open(str(other_backbone(tmp_path, "xglm")))
    with without_converters("xglm"):
        model = backbone.load()
        model.register_forward_hook(lambda _, args, output: setattr(output, "logits", output.logits**3))
        with pytest.raises(LoraSuiteError, match="logits are no multiple of its head's output"):
            Head(model, backbone)
