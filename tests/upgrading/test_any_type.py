"""Model types without a converter, from the saved old backbone to the adapter that PEFT loads on the new one."""

from __future__ import annotations

from pathlib import Path

import pytest
import type_trials
from type_trials import Side
from versions import needs_tiny

from peft_lorasuite.arch.registry import has_converter

FAST = {
    "biogpt": "transplant",  # biases, learned positions
    "deepseek_v3": "distill",  # experts, one of them shared
    "exaone4": "transplant",  # a norm behind the last projection
    "mamba": "distill",  # no attention
    "qwen3_vl": "distill",  # a vision tower
}
SLOW = """
bamba bart dbrx deepseek_v4 falcon_mamba gemma3n_text lfm2 llama4_text mllama mpt openai-gpt rwkv xlnet
"""
"""One of each kind; benchmarks/any_type.py runs all."""


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Side:
    return type_trials.save_old("llama", tmp_path_factory.mktemp("llama"), seed=9)


@pytest.mark.parametrize("model_type", FAST)
def test_a_type_without_converter_learns_what_a_llama_does(model_type: str, llama: Side, tmp_path: Path) -> None:
    needs_tiny(model_type)
    assert not has_converter(model_type), "choose another type"
    new = type_trials.save_new(model_type, tmp_path / "new")
    (found,) = type_trials.trials(llama, new, tmp_path / "out", [FAST[model_type]])
    assert found["outcome"] == "learned", found


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")  # PEFT sets it for Conv1D
@pytest.mark.parametrize("model_type", SLOW.split())
def test_more_types_from_the_same_type_and_from_a_llama(model_type: str, llama: Side, tmp_path: Path) -> None:
    needs_tiny(model_type)
    found = type_trials.run_type(model_type, tmp_path, llama)
    assert found["built"], found
    distilled, transplanted = zip(found["same"], found["llama"], strict=True)
    assert [one["outcome"] for one in distilled] == ["learned", "learned"], found
    assert all(one["outcome"] in ("learned", "refused") for one in transplanted), transplanted


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "qwen3_moe"])
def test_a_family_of_experts_with_a_converter_learns(model_type: str, llama: Side, tmp_path: Path) -> None:
    needs_tiny(model_type)
    assert has_converter(model_type)
    new = type_trials.save_new(model_type, tmp_path / "new")
    (found,) = type_trials.trials(llama, new, tmp_path / "out", ["distill"])
    assert found["outcome"] == "learned", found


def test_what_a_model_itself_raises_is_one_line(llama: Side, tmp_path: Path) -> None:
    """A Reformer computes its gradients by itself, and only if those of the embedding are wanted."""
    new = type_trials.save_new("reformer", tmp_path / "new")
    (found,) = type_trials.trials(llama, new, tmp_path / "out", ["distill"])
    assert found["outcome"] == "refused", found
    assert found["why"].startswith("reformer: the model cannot be run or trained on text alone: element 0"), found
    assert not (tmp_path / "out").exists()


def test_a_head_of_several_tokens_is_refused(llama: Side, tmp_path: Path) -> None:
    """A ProphetNet predicts two tokens at once."""
    old, new = type_trials.save_old("prophetnet", tmp_path / "old"), Side("llama", llama.backbone, llama.adapter)
    (found,) = type_trials.trials(old, new, tmp_path / "out", ["transplant"])
    assert found["outcome"] == "refused", found
    assert "reads more than one state for a token" in found["why"]
