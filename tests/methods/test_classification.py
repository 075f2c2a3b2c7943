"""Classifiers, reward models and token classifiers (B4): by weights exact, by behavior to the same labels."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from canon import read, write
from pico import pico_model, pico_tokenizer, save_backbone
from pico_classifiers import WORDS, encode, random_classifier, right, texts, trained_classifier
from planted import CHANGES
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from peft_lorasuite import Backbone, LoraSuiteError, MapOptions, PeftModel, UpgradeMap, upgrade, upgrade_many
from peft_lorasuite.adapters.reading import read_adapter
from peft_lorasuite.io.source import Source
from peft_lorasuite.methods.base import MethodInput
from peft_lorasuite.methods.behavior.classification import choose_texts
from peft_lorasuite.methods.behavior.options import DistillOptions

FAMILIES = ["llama", "qwen2", "qwen3", "gpt_neox", "bloom", "phi", "phi3", "mistral", "gemma2", "gpt2"]
TEXTS = texts(300, seed=1000)
TEST = texts(100, seed=2000)
MAPPED = MapOptions(layer_map="first")


def planted_pair(root, name):
    """Write a backbone, and one that computes the same with other layers, units and hidden size."""
    old = read(name, 0)
    new, generator = old.copy(), torch.Generator().manual_seed(0)
    for change in ("permuted hidden", "widened hidden", "depth"):
        CHANGES[change](new, generator)
    tokenizer = pico_tokenizer(WORDS)
    return [save_backbone(root / side, write(one), tokenizer) for side, one in (("old", old), ("new", new))]


@pytest.mark.parametrize(("name", "kind"), [("llama", "SEQ_CLS"), ("gpt_neox", "TOKEN_CLS")])
def test_b4_by_weights_the_upgrade_of_a_planted_backbone_gives_the_old_logits(name, kind, tmp_path):
    check_planted(name, kind, tmp_path)


@pytest.mark.parametrize("kind", ["SEQ_CLS", "TOKEN_CLS"])
@pytest.mark.parametrize("name", FAMILIES)
def test_b4_by_weights_every_family_gives_the_old_logits(name, kind, tmp_path):
    check_planted(name, kind, tmp_path)


def check_planted(name, kind, tmp_path):
    """Check that the upgraded classifier of a planted pair puts out the logits of the old one."""
    old, new = planted_pair(tmp_path, name)
    tuned = random_classifier(tmp_path / "adapter", old, kind)
    upgrade_map = UpgradeMap.build(old, new, calibration=texts(6, length=40))
    model = PeftModel.from_upgraded(new, tmp_path / "adapter", upgrade_map=upgrade_map, method="lorasuite")
    wanted, got = (one(**encode(TEST[:16])).logits for one in (tuned, model))
    assert (got - wanted).norm() < 1e-4 * wanted.norm()
    assert model.upgrade_report.facts["task"]["labels"] == [f"LABEL_{number}" for number in range(5)]
    assert all(fate == "transferred" for fate in model.upgrade_report.tensors.values())


CASES = {
    "classes": ("SEQ_CLS", None, 0.6),
    "several labels": ("SEQ_CLS", "multi_label_classification", 0.75),
    "values": ("SEQ_CLS", "regression", 0.46),
    "tokens": ("TOKEN_CLS", None, 0.7),
}
"""Kind of head, problem type, and what `transplant` reaches at least; a constant has .40, .67, .40 and .40."""


@pytest.mark.parametrize("case", CASES)
def test_b4_transplant_and_distill_reach_the_labels_of_the_old_classifier(case, tmp_path):
    kind, problem, least = CASES[case]
    tuned = trained_classifier(tmp_path, kind, problem)
    assert right(tuned, TEST, kind, problem) > 0.95
    settings = {"source_model": tmp_path / "old", "prompts": TEXTS, "problem_type": problem}
    settings["upgrade_map"] = UpgradeMap.build(tmp_path / "old", tmp_path / "new", MAPPED)
    for method, options, bound in (
        ("transplant", {}, least),
        ("distill", {"learning_rate": 1e-2, "epochs": 5}, max(least, 0.85)),
    ):
        model = PeftModel.from_upgraded(
            tmp_path / "new", tmp_path / "adapter", method=method, options=options, **settings
        )
        assert right(model, TEST, kind, problem) > bound, method
        facts = model.upgrade_report.facts[method]
        assert facts["divergence_left"] < 0.75 * facts["divergence"]
    assert facts["agreement"] > 0.75
    assert facts["learning_rate"] == 1e-2
    assert model.upgrade_report.verdict.startswith("likely to hold")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A trained classifier, its map, and its folder."""
    root = tmp_path_factory.mktemp("classifier")
    tuned = trained_classifier(root)
    return root, tuned, UpgradeMap.build(root / "old", root / "new", MAPPED)


def carry(classifier, **settings):
    root, _, upgrade_map = classifier
    given = {"old": root / "old", "new": root / "new", "prompts": TEXTS, "method": "transplant"} | settings
    return upgrade(given.pop("adapter", root / "adapter"), upgrade_map, **given)


def test_the_learning_rate_of_a_classifier_is_lower_and_in_the_report(classifier):
    facts = carry(classifier, method="distill", options={"epochs": 1}).report.facts["distill"]
    assert facts["learning_rate"] == 3e-4 < DistillOptions().training(seed=0).learning_rate


def test_b4_a_collection_gets_the_names_of_the_labels(classifier, tmp_path):
    root, _, upgrade_map = classifier
    labels = ["color", "plant", "size"]
    sides = {"old": root / "old", "new": root / "new", "prompts": TEXTS}
    statuses = []
    for names in (labels, labels, labels[::-1]):
        done = upgrade_many([root / "adapter"], upgrade_map, tmp_path, method="transplant", labels=names, **sides)
        statuses += [one.status for one in done]
        report = json.loads((tmp_path / "adapter" / "lorasuite_report.json").read_text())
        assert report["facts"]["task"]["labels"] == names
    assert statuses == ["done", "kept", "done"]


def test_b4_the_result_loads_with_peft_alone_and_keeps_its_labels(classifier, tmp_path):
    root, _, _ = classifier
    labels = ["color", "plant", "size"]
    out = carry(classifier, labels=labels).save(tmp_path / "out")
    model = peft.AutoPeftModelForSequenceClassification.from_pretrained(
        out, num_labels=3, pad_token_id=2, id2label=dict(enumerate(labels))
    )
    assert right(model, TEST) > 0.65
    base = AutoModelForSequenceClassification.from_pretrained(root / "new", num_labels=3, pad_token_id=2)
    assert right(peft.PeftModel.from_pretrained(base, out), TEST) > 0.65
    assert json.loads((out / "lorasuite_report.json").read_text())["facts"]["task"]["labels"] == labels
    back = UpgradeMap.build(root / "new", root / "old", MAPPED)
    again = PeftModel.from_upgraded(root / "old", out, upgrade_map=back, prompts=TEXTS, method="transplant")
    assert again.config.id2label == dict(enumerate(labels))


def test_b4_from_upgraded_returns_a_classifier_for_a_name_a_causal_model_and_a_classifier(classifier):
    root, _, upgrade_map = classifier
    settings = {"upgrade_map": upgrade_map, "source_model": root / "old", "prompts": TEXTS, "method": "transplant"}
    loaded = AutoModelForCausalLM.from_pretrained(root / "new")
    other = AutoModelForSequenceClassification.from_pretrained(root / "new", num_labels=2)
    for new in (root / "new", loaded, other):
        model = PeftModel.from_upgraded(new, root / "adapter", **settings)
        assert isinstance(model, peft.PeftModelForSequenceClassification)
        assert type(model.get_base_model()).__name__ == "Qwen2ForSequenceClassification"
        assert right(model, TEST) > 0.65


def test_b4_padding_does_not_change_the_class(classifier):
    root, _, upgrade_map = classifier
    model = PeftModel.from_upgraded(
        root / "new", root / "adapter", source_model=root / "old", upgrade_map=upgrade_map, prompts=TEXTS,
        method="transplant",
    )  # fmt: skip
    short, long = texts(1, seed=7, length=3)[0], texts(1, seed=8, length=12)[0]
    batch = pico_tokenizer(WORDS)([short, long], return_tensors="pt", padding=True)
    together = model(**batch).logits
    torch.testing.assert_close(together[0], model(**encode([short])).logits[0], rtol=1e-4, atol=1e-5)


def test_b4_auto_takes_texts_where_they_are_given_and_weights_otherwise(classifier):
    chosen = [carry(classifier, method="auto", prompts=given).report.method["name"] for given in (TEXTS, None)]
    assert chosen == ["transplant", "lorasuite"]


def test_b4_a_classifier_of_another_type_is_converted_with_its_head(classifier, tmp_path):
    root, _, _ = classifier
    model = AutoModelForSequenceClassification.from_pretrained(root / "old", num_labels=3)
    config = peft.LoHaConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS", init_weights=False)
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "loha")
    moved = carry(classifier, adapter=tmp_path / "loha", method="lorasuite", prompts=None)
    assert moved.report.facts["converted"]["from"] == "LOHA"
    assert "base_model.model.score.weight" in moved.adapter.extras


def test_b4_without_a_task_type_the_head_decides(classifier, tmp_path):
    root, _, _ = classifier
    folder = copied(root, tmp_path / "untyped", task_type=None)
    assert carry(classifier, adapter=folder).adapter.task.kind == "SEQ_CLS"


def copied(root, folder, **changes):
    """Copy an adapter, with other values in its config."""
    folder.mkdir()
    for file in (root / "adapter").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    return folder


def test_b4_labels_come_from_the_config_beside_the_adapter(classifier, tmp_path):
    folder = copied(classifier[0], tmp_path / "labeled")
    values = {"id2label": {"0": "color", "1": "plant", "2": "size"}, "problem_type": "single_label_classification"}
    (folder / "config.json").write_text(json.dumps(values))
    moved = carry(classifier, adapter=folder)
    assert moved.report.facts["task"] == {
        "type": "SEQ_CLS", "labels": ["color", "plant", "size"], "problem_type": "single_label_classification"
    }  # fmt: skip
    assert "SEQ_CLS, single_label_classification: color, plant, size; agreement" in repr(moved.report)
    (folder / "config.json").write_text(json.dumps({"id2label": {"0": "color", "1": "plant"}}))
    with pytest.raises(LoraSuiteError, match=r"config.json: the number of labels differs .*got 2 labels, wanted 3"):
        carry(classifier, adapter=folder)
    (folder / "config.json").write_text(json.dumps({"id2label": {"0": "color", "1": "plant", "x": "size"}}))
    with pytest.raises(LoraSuiteError, match=r"malformed labels .*; pass them .--labels"):
        carry(classifier, adapter=folder)
    moved = carry(classifier, adapter=folder, labels=["color", "plant", "size"])
    assert moved.report.facts["task"]["labels"] == ["color", "plant", "size"]


def test_b4_heads_of_other_tasks_are_refused(classifier, tmp_path):
    for kind, wanted in (("QUESTION_ANS", "mark answers in a text"), ("CAUSAL_LM", "for CAUSAL_LM and has a class")):
        with pytest.raises(LoraSuiteError, match=wanted):
            carry(classifier, adapter=copied(classifier[0], tmp_path / kind, task_type=kind))


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"prompts": None}, "needs unlabeled texts .* --prompts"),
        ({"labels": ["a", "b"]}, "labels differs from the rows .*got 2 labels, wanted 3"),
        ({"labels": ["a", "a", "b"]}, "malformed labels"),
        ({"labels": ["a", "b\nFAKE", "c"]}, "malformed labels"),
        ({"problem_type": "ranking"}, "unknown problem type"),
        ({"prompts": [{"text": ""}, {"text": "a"}]}, "record 1, text: a text is empty"),
        ({"prompts": [{"sentence1": " red", "sentence2": " "}, {"text": "a"}]}, "record 1, sentence2: a text is empty"),
        ({"prompts": [{"tokens": []}, {"text": "a"}]}, "record 1, tokens: a text has no tokens"),
    ],
)
def test_b4_bad_input_of_a_classifier_is_one_clear_line(settings, wanted, classifier):
    with pytest.raises(LoraSuiteError, match=wanted) as caught:
        carry(classifier, **settings)
    assert "\n" not in str(caught.value)


def test_b4_pairs_are_read_as_the_tokenizer_joins_them_but_not_by_a_reward_model(tmp_path):
    trained_classifier(tmp_path, problem="regression", steps=1)
    pairs = [{"premise": one, "hypothesis": other} for one, other in zip(TEXTS[:20], TEXTS[20:40], strict=True)]
    upgrade_map = UpgradeMap.build(tmp_path / "old", tmp_path / "new", MAPPED)
    settings = {"old": tmp_path / "old", "new": tmp_path / "new", "prompts": pairs, "method": "transplant"}
    with pytest.raises(LoraSuiteError, match=r"a reward model .* reads single texts"):
        upgrade(tmp_path / "adapter", upgrade_map, **settings)
    moved = upgrade(tmp_path / "adapter", upgrade_map, problem_type="regression", **settings)
    assert moved.report.facts["transplant"]["texts"] == 20


def test_b4_a_reward_model_reads_conversations_through_the_template_of_each_side(tmp_path):
    trained_classifier(tmp_path, problem="regression", steps=1)
    for side, mark in (("old", "a"), ("new", "b")):
        tokenizer = pico_tokenizer(WORDS)
        tokenizer.chat_template = "{% for m in messages %}{{ m.content }} " + mark + "{% endfor %}"
        tokenizer.save_pretrained(tmp_path / side)
    rated = [
        {"prompt": [{"role": "user", "content": one}], "chosen": [{"role": "assistant", "content": other}]}
        for one, other in zip(TEXTS[:20], TEXTS[20:40], strict=True)
    ]
    upgrade_map = UpgradeMap.build(tmp_path / "old", tmp_path / "new", MAPPED)
    settings = {"old": tmp_path / "old", "new": tmp_path / "new", "method": "transplant"}
    moved = upgrade(tmp_path / "adapter", upgrade_map, prompts=rated, **settings)
    assert moved.report.facts["chat"]["conversations"] == 20
    both = [f"{one} {{0}}{other} {{0}}" for one, other in zip(TEXTS[:20], TEXTS[20:40], strict=True)]
    adapter = read_adapter(Source(str(tmp_path / "adapter"), "adapter"), upgrade_map.old.arch)
    backbones = [Backbone.open(tmp_path / side) for side in ("old", "new")]
    texts = choose_texts(MethodInput(adapter, upgrade_map, *backbones, rated), "transplant", 20)
    assert [text.text for text in texts.old] == [text.format("a") for text in both]
    assert [text.text for text in texts.new] == [text.format("b") for text in both]


def test_b4_a_head_that_does_not_fit_is_refused(classifier, tmp_path):
    from safetensors.torch import load_file, save_file

    root, _, _ = classifier
    folder = copied(root, tmp_path / "cut")
    tensors = load_file(folder / "adapter_model.safetensors")
    name = "base_model.model.score.weight"
    save_file(tensors | {name: tensors[name][:, :-1].contiguous()}, folder / "adapter_model.safetensors")
    with pytest.raises(LoraSuiteError, match="the classification head does not fit the old backbone"):
        carry(classifier, adapter=folder)
    save_file({key: value for key, value in tensors.items() if key != name}, folder / "adapter_model.safetensors")
    with pytest.raises(LoraSuiteError, match="for SEQ_CLS and has no classification head"):
        carry(classifier, adapter=folder)


def test_b4_a_family_without_a_classifier_is_refused(classifier, tmp_path):
    root, _, _ = classifier
    new = save_backbone(tmp_path / "granite", pico_model("granite"), pico_tokenizer(WORDS))
    upgrade_map = UpgradeMap.build(root / "old", new, MAPPED)
    with pytest.raises(LoraSuiteError, match="no AutoModelForSequenceClassification for 'granite'"):
        upgrade(root / "adapter", upgrade_map, old=root / "old", new=new, method="lorasuite")
