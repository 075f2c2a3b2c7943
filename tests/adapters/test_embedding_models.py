"""Embedding models (B8): adapters of AutoModel, and backbones that were saved without a language-model head."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from canon import read, write
from pico import pico_model, pico_tokenizer, save_backbone
from pico_classifiers import WORDS, encode, random_classifier, texts
from planted import CHANGES
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from peft_lorasuite import Backbone, LoraSuiteError, MapOptions, PeftModel, UpgradeMap, upgrade
from peft_lorasuite.arch.registry import architecture

TEXTS = texts(12)
FAMILIES = ["llama", "qwen3", "gpt_neox", "bloom", "gpt2"]


def planted_pair(root, name, *, headless=False):
    """Write a backbone, and one with permuted hidden units and more layers, as causal models or without a head."""
    old = read(name, 0)
    new, generator = old.copy(), torch.Generator().manual_seed(0)
    for change in ("permuted hidden", "depth"):
        CHANGES[change](new, generator)
    models = [write(one).base_model if headless else write(one) for one in (old, new)]
    return [
        save_backbone(root / side, model, pico_tokenizer(WORDS))
        for side, model in zip(("old", "new"), models, strict=True)
    ]


def embedding_adapter(folder, backbone, task_type="FEATURE_EXTRACTION"):
    """Save an adapter with random updates of an AutoModel, and return the model with it."""
    torch.manual_seed(0)
    model = AutoModel.from_pretrained(backbone)
    arch = architecture(model.config)
    path = arch.layer_path.partition(".")[2]
    modules = [f"{path}.{n}.{site.path}" for n in range(arch.layers) for site in arch.sites]
    conv1d = any(site.conv1d for site in arch.sites)
    config = peft.LoraConfig(r=3, target_modules=modules, task_type=task_type, fan_in_fan_out=conv1d)
    tuned = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "lora_B" in name:
                weight.copy_(torch.randn(weight.shape) / 2)
    tuned.save_pretrained(folder)
    return tuned.eval()


@torch.no_grad()
def similarities(model):
    """Return the cosine similarities between the texts' last states."""
    states = model(**encode(TEXTS)).last_hidden_state[:, -1]
    states = torch.nn.functional.normalize(states, dim=-1)
    return states @ states.T


@pytest.mark.parametrize("name", FAMILIES)
def test_b8_the_result_loads_on_automodel_and_has_the_old_similarities(name, tmp_path):
    old, new = planted_pair(tmp_path, name)
    tuned = embedding_adapter(tmp_path / "adapter", old)
    upgrade_map = UpgradeMap.build(old, new, calibration=texts(6, length=40))
    out = upgrade(tmp_path / "adapter", upgrade_map, old=old, new=new).save(tmp_path / "out")
    config = json.loads((out / "adapter_config.json").read_text())
    prefix = architecture(tuned.config).layer_path.partition(".")[2]
    assert config["task_type"] == "FEATURE_EXTRACTION"
    assert all(module.startswith(f"{prefix}.") for module in config["target_modules"])
    plain = AutoModel.from_pretrained(new).eval()
    before, wanted = similarities(plain), similarities(tuned)
    loaded = peft.PeftModel.from_pretrained(AutoModel.from_pretrained(new), out).eval()
    torch.testing.assert_close(similarities(loaded), wanted, rtol=1e-4, atol=1e-4)
    assert (before - wanted).abs().max() > 0.05
    model = PeftModel.from_upgraded(new, tmp_path / "adapter", source_model=old, upgrade_map=upgrade_map)
    assert isinstance(model, peft.PeftModelForFeatureExtraction)
    torch.testing.assert_close(similarities(model), wanted, rtol=1e-4, atol=1e-4)


def test_b8_without_a_task_type_the_class_that_peft_names_decides(tmp_path):
    old, new = planted_pair(tmp_path, "llama")
    embedding_adapter(tmp_path / "adapter", old, task_type=None)
    upgrade_map = UpgradeMap.build(old, new, MapOptions(layer_map="first"))
    out = upgrade(tmp_path / "adapter", upgrade_map, old=old, new=new).save(tmp_path / "out")
    loaded = peft.PeftModel.from_pretrained(AutoModel.from_pretrained(new), out)
    assert any("lora_B" in name and bool(weight.any()) for name, weight in loaded.named_parameters())


@pytest.mark.parametrize("method", ["transplant", "distill"])
def test_b8_methods_of_behavior_name_those_that_transfer_weights(method, tmp_path):
    old, new = planted_pair(tmp_path, "llama")
    embedding_adapter(tmp_path / "adapter", old)
    upgrade_map = UpgradeMap.build(old, new, MapOptions(layer_map="first"))
    with pytest.raises(LoraSuiteError, match=r"does not transfer embedding models .*\(lorasuite"):
        upgrade(tmp_path / "adapter", upgrade_map, old=old, new=new, method=method, prompts=TEXTS)
    chosen = upgrade(tmp_path / "adapter", upgrade_map, old=old, new=new, prompts=TEXTS).report.method["name"]
    assert chosen == "lorasuite"


@pytest.mark.parametrize("name", FAMILIES)
def test_b8_checkpoints_saved_from_automodel_open_as_backbones(name, tmp_path):
    old, new = planted_pair(tmp_path, name, headless=True)
    tuned = embedding_adapter(tmp_path / "adapter", old)
    model = PeftModel.from_upgraded(new, tmp_path / "adapter", source_model=old, method="lorasuite")
    torch.testing.assert_close(similarities(model), similarities(tuned), rtol=1e-3, atol=1e-3)


def test_b8_a_model_in_memory_without_a_head_is_a_backbone(tmp_path):
    old, new = planted_pair(tmp_path, "llama")
    tuned = embedding_adapter(tmp_path / "adapter", old)
    loaded = [AutoModel.from_pretrained(folder) for folder in (new, old)]
    model = PeftModel.from_upgraded(loaded[0], tmp_path / "adapter", source_model=loaded[1], method="lorasuite")
    torch.testing.assert_close(similarities(model), similarities(tuned), rtol=1e-3, atol=1e-3)


def test_b8_a_classifier_is_a_backbone_whose_head_is_not_read(tmp_path):
    tokenizer, models = pico_tokenizer(WORDS), []
    for side, seed, count in (("old", 1, 3), ("new", 2, 7)):
        plain = save_backbone(tmp_path / f"plain-{side}", pico_model("llama", seed=seed), tokenizer)
        classifier = AutoModelForSequenceClassification.from_pretrained(plain, num_labels=count)
        models.append(save_backbone(tmp_path / side, classifier, tokenizer))
    random_classifier(tmp_path / "adapter", models[0], "SEQ_CLS", labels=3)
    for method in ("lorasuite", "transplant"):
        model = PeftModel.from_upgraded(
            models[1], tmp_path / "adapter", source_model=models[0], method=method, prompts=TEXTS
        )
        assert model(**encode(TEXTS)).logits.shape == (len(TEXTS), 3)


def test_b8_a_causal_adapter_on_a_backbone_without_a_head_is_refused(tmp_path):
    headless = save_backbone(tmp_path / "headless", pico_model("llama").model, pico_tokenizer(WORDS))
    with pytest.raises(LoraSuiteError, match=r"the checkpoint lacks a tensor \(wanted lm_head.weight"):
        Backbone.open(headless).load()
    AutoModelForCausalLM.from_pretrained(headless)  # transformers draws a random head
