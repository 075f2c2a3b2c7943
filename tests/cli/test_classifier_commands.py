"""The commands on classifiers: upgrade, finetune and evaluate, the report and the card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from pico_classifiers import right, rule, texts, trained_classifier
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from peft_lorasuite import LoraSuiteError, finetune
from peft_lorasuite.cli.main import main
from peft_lorasuite.evaluation.classification import evaluate_classifier, score_logits
from peft_lorasuite.hub.card import adapter_card
from peft_lorasuite.models.task import MULTI_LABEL, REGRESSION, Task

NAMES = ["color", "plant", "size"]
TEST = texts(100, seed=2000)


def labeled(batch: list[str]) -> list[dict[str, Any]]:
    return [{"text": text, "label": NAMES[rule(text.split()[-1])]} for text in batch]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained classifier, its backbones, unlabeled texts, and texts with labels."""
    root = tmp_path_factory.mktemp("classifier")
    trained_classifier(root)
    (root / "texts.txt").write_text("\n".join(texts(300, seed=1000)))
    (root / "train.json").write_text(json.dumps(labeled(texts(200, seed=3000))))
    (root / "test.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in labeled(TEST)))
    return root


def run(*words: Any) -> int:
    return main([str(word) for word in words])


@pytest.fixture(scope="module")
def upgraded(classifier: Path) -> Path:
    """The classifier on the new backbone, as `upgrade` writes it."""
    out = classifier / "upgraded"
    call = ["upgrade", classifier / "adapter", "--to", classifier / "new", "--from", classifier / "old", "-o", out]
    call += ["--prompts", classifier / "texts.txt", "--labels", ",".join(NAMES), "--method", "transplant", "--quiet"]
    assert run(*call) == 0
    return out


def test_b4_upgrade_writes_a_classifier_and_names_its_labels(
    classifier: Path, upgraded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = AutoModelForSequenceClassification.from_pretrained(classifier / "new", num_labels=3, pad_token_id=2)
    assert right(peft.PeftModel.from_pretrained(base, upgraded), TEST) > 0.7
    call = ["upgrade", classifier / "adapter", "--to", classifier / "new", "--from", classifier / "old"]
    assert run(*call, "--prompts", classifier / "texts.txt", "-o", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert "SEQ_CLS, no problem_type: LABEL_0, LABEL_1, LABEL_2; agreement with the old classifier" in printed


def test_b4_upgrade_without_texts_asks_for_them_before_the_map_is_built(
    classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = ["upgrade", classifier / "adapter", "--to", classifier / "new", "--from", classifier / "old"]
    assert run(*call, "--method", "distill", "-o", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert "needs unlabeled texts" in error
    assert "--prompts" in error
    assert "building" not in error
    assert not (tmp_path / "out").exists()


def test_b4_upgrade_with_labels_fine_tunes_and_evaluate_scores(
    classifier: Path, upgraded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned = tmp_path / "tuned"
    call = ["finetune", upgraded, "--data", classifier / "train.json", "-o", tuned, "--samples", 200, "--epochs", 8]
    assert run(*call, "--learning-rate", "1e-2", "--quiet") == 0
    capsys.readouterr()
    assert run("evaluate", upgraded, "--against", tuned, "--data", classifier / "test.jsonl", "--json") == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    before, after = (rows[str(folder)]["scores"]["accuracy"] for folder in (upgraded, tuned))
    assert 0.65 < before < after
    assert rows[str(tuned)]["labels"] == NAMES
    assert sum(row["count"] for row in rows[str(tuned)]["per_label"].values()) == len(TEST)
    assert run("evaluate", tuned, "--data", classifier / "test.jsonl", "-o", tmp_path / "scores") == 0
    assert "| color |" in (tmp_path / "scores" / "table.md").read_text()


def test_b4_upgrade_fine_tunes_a_classifier_in_one_call(
    classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    call = ["upgrade", classifier / "adapter", "--to", classifier / "new", "--from", classifier / "old", "-o", out]
    call += [
        "--prompts",
        classifier / "texts.txt",
        "--labels",
        ",".join(NAMES),
        "--finetune",
        classifier / "train.json",
    ]
    assert run(*call, "--epochs", 1, "--quiet") == 0
    assert json.loads((out / "lorasuite_finetune.json").read_text())["used"] == 100
    assert "base_model.model.score.weight" in peft.load_peft_weights(str(out))


def test_b4_the_card_loads_a_classifier(upgraded: Path) -> None:
    report = json.loads((upgraded / "lorasuite_report.json").read_text())
    card = adapter_card("me/classifier", "you/new", report)
    assert 'AutoPeftModelForSequenceClassification.from_pretrained("me/classifier", num_labels=3)' in card
    assert "pipeline_tag: text-classification" in card
    assert "| Labels | `color, plant, size` |" in card
    assert "| Agreement with the source classifier | " in card


def test_b4_what_asks_a_language_model_names_evaluate_for_classifiers(
    classifier: Path, upgraded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("chat", "--base", classifier / "new", "--adapter", upgraded, "--prompt", " red") == 1
    assert "the adapter is a classifier, and the model has no classification head" in capsys.readouterr().err
    assert run("evaluate", upgraded) == 1
    assert "a classifier is evaluated on texts with labels" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("record", "wanted"),
    [
        ({"text": " red", "label": 3}, "text 1: unknown label .got 3, wanted 0 to 2"),
        ({"text": " red", "label": "animal"}, "text 1: unknown label .got 'animal', wanted 0 to 2, or LABEL_0"),
        ({"text": " red"}, "record 1: a record has no label"),
        ({"label": 1}, "record 1: a record has no text"),
        ({"text": "", "label": 1}, "record 1, text: a text is empty"),
    ],
)
def test_b4_a_malformed_label_is_one_line(record: dict[str, Any], wanted: str, classifier: Path) -> None:
    for use in (evaluate_classifier, finetune):
        with pytest.raises(LoraSuiteError, match=wanted) as caught:
            use(str(classifier / "adapter"), [record], base=str(classifier / "old"))
        assert "\n" not in str(caught.value)


def test_b4_token_labels_are_aligned_by_words_and_need_tokens(tmp_path: Path) -> None:
    trained_classifier(tmp_path, "TOKEN_CLS")
    words = [text.split() for text in TEST[:40]]
    records = [{"tokens": ["red", *line], "ner_tags": [-100, *map(rule, line)]} for line in words]
    found = evaluate_classifier(str(tmp_path / "adapter"), records, base=str(tmp_path / "old"))
    assert found.n == 4 * 40  # the first word of a text has no leading space and no label
    assert found.scores["accuracy"] > 0.9
    model = AutoModelForTokenClassification.from_pretrained(tmp_path / "old", num_labels=3)
    tuned = peft.PeftModel.from_pretrained(model, tmp_path / "adapter", is_trainable=True)
    before = evaluate_classifier(tuned, records).scores["accuracy"]
    finetune(tuned, [{**one, "ner_tags": [0] * 5} for one in records], epochs=4, learning_rate=1e-2)
    assert evaluate_classifier(tuned, records).scores["accuracy"] < 0.6 < before
    with pytest.raises(LoraSuiteError, match="needs texts with tokens"):
        evaluate_classifier(tuned, [{"text": " red", "label": 1}])
    with pytest.raises(LoraSuiteError, match=r"every token must have a label \(got 1, wanted 2\)"):
        evaluate_classifier(tuned, [{"tokens": ["red", "tree"], "ner_tags": [1]}])


def test_scores_of_several_labels_and_of_a_regression() -> None:
    logits = torch.tensor([[1.0, -1.0], [1.0, 1.0], [-1.0, 1.0], [-1.0, -1.0]])
    truth = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    found = score_logits(logits, truth, Task("SEQ_CLS", ("a", "b"), MULTI_LABEL))
    assert found.scores["accuracy"] == pytest.approx(0.75)
    assert found.scores["f1_micro"] == pytest.approx(6 / 7)
    assert found.per_label["b"] == pytest.approx({"precision": 0.5, "recall": 1, "f1": 2 / 3, "count": 1})
    values = torch.tensor([[0.0], [1.0], [2.0]])
    scores = score_logits(2 * values + 1, values, Task("SEQ_CLS", ("a",), REGRESSION)).scores
    assert scores == pytest.approx({"pearson": 1.0, "mse": (1 + 4 + 9) / 3})
