"""Backbones whose model type has no converter, as the old one, the new one or both: what runs the models works."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from any_model import (
    OTHERS,
    PROMPTS,
    WORDS,
    divergence,
    load,
    log_probs,
    log_probs_of,
    other_backbone,
    save_trained,
    write_adapter,
)
from pico import pico_model, pico_tokenizer, save_backbone
from versions import needs_tiny

from peft_lorasuite import LoraSuiteError, MapOptions, PeftModel, UpgradeMap
from peft_lorasuite.adapters.peft_model import load_with_adapter
from peft_lorasuite.adapters.reading import read_adapter
from peft_lorasuite.arch.registry import without_converters
from peft_lorasuite.cli.main import main
from peft_lorasuite.io.source import Source
from peft_lorasuite.models.backbone import Backbone
from peft_lorasuite.upgrading.inputs import open_inputs
from peft_lorasuite.upgrading.upgrade import Upgraded, upgrade

FAST = {"length": 4, "anchor_tokens": 8}
DISTILL = FAST | {"epochs": 12, "batch_size": 4, "learning_rate": 5e-3, "anchor_text_tokens": 0}
MODULES = {
    "codegen": ["qkv_proj", "fc_in"],
    "glm4v": r".*language_model.*\.q_proj",
    "jamba": ["in_proj", "q_proj"],
    "mamba": ["in_proj"],
    "mpt": ["Wqkv", "out_proj"],
}
"""Targets of a LoRA, where they are not ``q_proj`` and ``v_proj``."""


LORA = {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
KINDS: dict[str, Any] = {
    "DoRA": peft.LoraConfig(use_dora=True, **LORA),
    "LoHa": peft.LoHaConfig(**LORA),
    "trained biases": peft.LoraConfig(bias="lora_only", **LORA),
    "embedding": peft.LoraConfig(modules_to_save=["embed_tokens"], **LORA),
}


@pytest.fixture(autouse=True)
def no_converters() -> Iterator[None]:
    with without_converters(*OTHERS):
        yield


def known_backbone(folder: Path, model_type: str = "llama") -> Path:
    return save_backbone(folder, pico_model(model_type, seed=1), pico_tokenizer(WORDS))


def transfer(adapter: Path, new: Path, method: str, options: dict[str, Any] | None = None, **settings: Any) -> Upgraded:
    inputs = open_inputs(adapter, str(new), method=method, prompts=PROMPTS, **settings)
    return upgrade(
        inputs.source, inputs.upgrade_map, method=method, options=options, old=inputs.old, new=inputs.new,
        prompts=PROMPTS,
    )  # fmt: skip


@pytest.mark.parametrize("model_type", OTHERS)
def test_the_behavior_of_an_adapter_comes_back_on_its_own_backbone(model_type: str, tmp_path: Path) -> None:
    needs_tiny(model_type)
    base = other_backbone(tmp_path / "base", model_type)
    adapter = write_adapter(tmp_path / "adapter", base, MODULES.get(model_type, ["q_proj", "v_proj"]))
    upgraded = transfer(adapter, base, "distill", DISTILL)
    upgraded.save(tmp_path / "result")
    wanted = log_probs(base, adapter)
    before, left = divergence(wanted, log_probs(base)), divergence(wanted, log_probs(base, tmp_path / "result"))
    assert left < 0.6 * before, (before, left)
    assert upgraded.report.facts["without_converter"] == [model_type]
    assert upgraded.report.by_behavior
    assert all(fate == "applied to the old model" for fate in upgraded.report.tensors.values())


def test_a_transplant_goes_through_the_norm_behind_the_last_projection(tmp_path: Path) -> None:
    """The old backbone has a converter; the new one has a norm after each block."""
    old, new = known_backbone(tmp_path / "old"), other_backbone(tmp_path / "new", "exaone4", seed=2)
    adapter = write_adapter(tmp_path / "adapter", old, ["q_proj", "down_proj"])
    upgraded = transfer(adapter, new, "transplant", FAST)
    upgraded.save(tmp_path / "result")
    facts = upgraded.report.facts["transplant"]
    assert facts["module"] == "model.layers.2.mlp.down_proj"
    assert facts["divergence_left"] < 0.9 * facts["divergence"]
    assert [module["module"] for module in upgraded.report.modules] == [facts["module"]]
    assert divergence(log_probs(new, tmp_path / "result"), log_probs(new)) > 0.005


@pytest.mark.parametrize("model_type", ["granite", "olmo2", "phi"])
def test_a_backbone_gets_the_same_transplant_with_and_without_its_converter(model_type: str, tmp_path: Path) -> None:
    """Multipliers of the residual stream and of the logits, and the gain of the norm behind a projection, are found."""
    old, new = known_backbone(tmp_path / "old"), known_backbone(tmp_path / "new", model_type)
    adapter = write_adapter(tmp_path / "adapter", old, ["q_proj", "down_proj"])
    known = UpgradeMap.build(str(old), str(new), MapOptions(layer_map="proportional"))
    options = FAST | {"edit_facts": False}
    wanted = transfer(adapter, new, "transplant", options, upgrade_map=known)
    with without_converters(model_type):
        found = transfer(adapter, new, "transplant", options)
    (left,), (right,) = wanted.adapter.updates.values(), found.adapter.updates.values()
    assert wanted.report.modules[0]["module"] == found.report.modules[0]["module"]
    torch.testing.assert_close(left.delta_weight(), right.delta_weight(), rtol=0.05, atol=0.05 * float(left.norm()))


def test_an_old_backbone_without_a_converter_is_enough_for_auto_to_take_transplant(tmp_path: Path) -> None:
    old, new = other_backbone(tmp_path / "old", "mamba"), known_backbone(tmp_path / "new", "qwen2")
    adapter = write_adapter(tmp_path / "adapter", old, ["in_proj"])
    upgraded = transfer(adapter, new, "auto")
    assert upgraded.report.method["name"] == "transplant"
    assert upgraded.report.facts["auto"].startswith("'mamba' has no converter, so weights cannot be mapped")


@pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied")  # PEFT, when it merges
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_of_every_kind_are_read_where_the_old_backbone_has_no_converter(kind: str, tmp_path: Path) -> None:
    old, new = other_backbone(tmp_path / "old", "xglm"), other_backbone(tmp_path / "new", "codegen", seed=2)
    adapter = save_trained(tmp_path / "adapter", old, KINDS[kind])
    upgraded = transfer(adapter, new, "transplant", FAST)
    assert set(upgraded.report.tensors.values()) == {"applied to the old model"}
    facts = upgraded.report.facts["transplant"]
    assert facts["divergence_left"] < 0.5 * facts["divergence"]


def test_an_adapter_of_experts_alone_is_transferred_by_its_effect(tmp_path: Path) -> None:
    """The old model runs with it, so that nothing of it is read; the report says that experts are not trained."""
    needs_tiny("mixtral")
    old, new = other_backbone(tmp_path / "old", "mixtral"), other_backbone(tmp_path / "new", "mixtral", seed=2)
    adapter = write_adapter(tmp_path / "adapter", old, [], target_parameters=["experts.down_proj"])
    upgraded = transfer(adapter, new, "distill", FAST | {"epochs": 1, "anchor_text_tokens": 0})
    report = upgraded.report
    assert set(report.tensors.values()) == {"applied to the old model"}
    assert len(report.tensors) == 6
    assert "down_proj" in report.facts["found"]["new"]["not_trained"]
    assert report.facts["found"]["new"]["last_projection"] is None
    assert any("training starts from zero" in hint for hint in report.facts["hints"])
    assert report.rank == 4
    backbone = Backbone.open(str(old))
    with load_with_adapter(backbone, read_adapter(Source(str(adapter), "adapter"), backbone.arch)) as model:
        torch.testing.assert_close(log_probs_of(model), log_probs(old, adapter), rtol=1e-4, atol=1e-4)


def test_methods_that_transfer_weights_name_the_types_without_a_converter(tmp_path: Path) -> None:
    old, new = known_backbone(tmp_path / "old"), other_backbone(tmp_path / "new", "mpt")
    adapter = write_adapter(tmp_path / "adapter", old, ["q_proj"])
    for method in ("lorasuite", "copy", "cross-lora"):
        with pytest.raises(LoraSuiteError, match=r"^'mpt': .* needs a converter .*docs/add-a-family.md"):
            transfer(adapter, new, method)


def test_the_map_of_such_a_pair_has_the_identities_alone_and_reads_back(tmp_path: Path) -> None:
    needs_tiny("jamba")
    old, new = other_backbone(tmp_path / "old", "jamba"), other_backbone(tmp_path / "new", "xglm")
    built = UpgradeMap.build(str(old), str(new))
    built.save(tmp_path / "map")
    read = UpgradeMap.load(tmp_path / "map")
    assert (read.key, read.pairs) == (built.key, [])
    assert read.old.arch == built.old.arch
    assert read.without_converter == ["jamba", "xglm"]
    other = other_backbone(tmp_path / "other", "xglm", seed=5)
    adapter = write_adapter(tmp_path / "adapter", old, MODULES["jamba"])
    with pytest.raises(LoraSuiteError, match="the upgrade map was built for another new backbone"):
        transfer(adapter, other, "transplant", FAST, upgrade_map=read)
    assert transfer(adapter, new, "transplant", FAST, upgrade_map=read).report.modules


def test_the_command_and_from_upgraded_give_the_same_adapter(tmp_path: Path) -> None:
    old, new = other_backbone(tmp_path / "old", "xglm"), other_backbone(tmp_path / "new", "codegen", seed=2)
    adapter = write_adapter(tmp_path / "adapter", old, ["q_proj", "fc2"])
    (tmp_path / "prompts.json").write_text(json.dumps(PROMPTS))
    options = [f"--set={name}={value}" for name, value in FAST.items()]
    options += ["--prompts", str(tmp_path / "prompts.json"), "-o", str(tmp_path / "result")]
    assert main(["upgrade", str(adapter), "--to", str(new), "--method", "transplant", *options]) == 0
    model = PeftModel.from_upgraded(str(new), str(adapter), method="transplant", prompts=PROMPTS, options=FAST)
    loaded = peft.PeftModel.from_pretrained(load(new), str(tmp_path / "result"))
    ids = torch.tensor([[20, 30, 40, 50]])
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(input_ids=ids).logits, loaded.eval()(input_ids=ids).logits)
