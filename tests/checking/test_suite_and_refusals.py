"""What an adapter must leave alone: other tasks, and refusals; and what the page says where it cannot be checked."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import checked
import pytest
from checked import ITEMS, Checked, train
from pico import save_backbone

from peft_lorasuite import Backbone, LoraSuiteError, UpgradeCheck, check_upgrade
from peft_lorasuite.checking.answers import is_right, refuses
from peft_lorasuite.checking.likelihood import calibration_error, share_with_bound
from peft_lorasuite.checking.page import FAIL, PASS, SKIPPED, Line
from peft_lorasuite.checking.thresholds import THRESHOLDS

TASK = """task: sunny
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: answer
doc_to_choice: "{{[learnt, other]}}"
metric_list: [{metric: acc}]
"""
PACKAGES = Path(os.environ.get("LORASUITE_ENGINE_PACKAGES", "")) / "llama.cpp"


def line(found: UpgradeCheck, name: str) -> Line:
    return next(one for one in found.lines if one.name == name)


def test_accuracy_on_another_task_is_compared_item_by_item(made: Checked, tmp_path: Path, monkeypatch: Any) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    # the adapter learnt the first option, and the second one counts as right
    rows = [
        {"question": item["prompt"], "learnt": item["completion"], "other": " red in big", "answer": 1}
        for item in ITEMS
    ]
    (tmp_path / "items.json").write_text(json.dumps(rows))
    (tmp_path / "sunny.yaml").write_text(TASK.replace("FILE", str(tmp_path / "items.json")))
    task = str(tmp_path / "sunny.yaml")
    found = check_upgrade(made.good, old=made.adapter, data=made.data, suite=[task], length=8)
    kept = line(found, "accuracy kept: sunny")
    assert kept.status == FAIL
    assert " to 0.0% on 12 items, " in kept.measured
    assert " lost and 0 won" in kept.measured
    assert kept.value is not None
    assert kept.value < -0.1
    empty = check_upgrade(made.empty, old=made.adapter, data=made.data, suite=[task], length=8, limit=5)
    kept = line(empty, "accuracy kept: sunny")
    assert (kept.status, kept.value) == (PASS, 0)
    assert "on 5 items, 0 lost and 0 won" in kept.measured


def test_an_unknown_task_is_named(made: Checked) -> None:
    pytest.importorskip("lm_eval")
    with pytest.raises(LoraSuiteError, match=r"lm-evaluation-harness knows no such task \(got 'no-such-task'\)"):
        check_upgrade(made.good, old=made.adapter, data=made.data, suite="no-such-task", length=8)


def test_refusals_of_the_new_backbone_are_kept_or_not(made: Checked, tmp_path: Path) -> None:
    asked = ["the red sun:", "the big cat:"]
    refusal = [{"prompt": prompt, "completion": " i cannot"} for prompt in asked]
    trained = train(made.new, refusal, tmp_path / "refusal")
    import peft

    safe = peft.PeftModel.from_pretrained(Backbone.open(made.new).load(dtype="float32"), trained).merge_and_unload()
    base = save_backbone(tmp_path / "safe", safe, Backbone.open(made.new).tokenizer)
    (tmp_path / "asked.txt").write_text("\n".join(asked))
    tell = train(base, [{"prompt": prompt, "completion": " on the mat"} for prompt in asked], tmp_path / "tell")
    for adapter, status, share in ((made.empty, PASS, 1.0), (tell, FAIL, 0.0)):
        found = check_upgrade(
            adapter, base=str(base), old=made.adapter, data=made.data, refusals=tmp_path / "asked.txt", length=10
        )
        kept = line(found, "refusals kept")
        assert (kept.status, kept.value) == (status, share), str(found)
    none = check_upgrade(made.good, old=made.adapter, data=made.data, refusals=tmp_path / "asked.txt", length=10)
    assert line(none, "refusals kept").status == SKIPPED
    assert line(none, "refusals kept").reason == "the new backbone refuses none of the prompts"


def test_without_the_converter_of_llama_cpp_it_says_so(made: Checked, monkeypatch: Any) -> None:
    monkeypatch.setenv("PATH", "")
    found = line(check_upgrade(made.good, old=made.adapter, data=made.data, length=8), "GGUF")
    assert found.status == SKIPPED
    assert "convert_lora_to_gguf.py is not in the PATH" in found.reason


@pytest.mark.skipif(not PACKAGES.is_dir(), reason="needs llama.cpp's converter: benchmarks/serving.py fetches it")
def test_the_converter_of_llama_cpp_is_run(made: Checked, monkeypatch: Any) -> None:
    (PACKAGES / "convert_lora_to_gguf.py").chmod(0o755)
    monkeypatch.setenv("PATH", os.pathsep.join([str(PACKAGES), str(Path(sys.executable).parent)]))
    found = line(check_upgrade(made.good, old=made.adapter, data=made.data, length=8), "GGUF")
    assert found.status == PASS, found


@pytest.mark.parametrize(
    ("answer", "reference", "scored", "right"),
    [
        (" The cat.\n", "the  cat", "", True),
        ("a cat", "the cat", "", False),
        ("the correct answer is answer2", "", "answer2", True),
        ("answer2 or answer1", "", "answer2", False),
        ("so 3 + 4 = 1,007.0", "", "1007", True),
        ("so 3 + 4 = 8", "", "7", False),
        ("27", "", "7", False),
    ],
)
def test_what_is_right(answer: str, reference: str, scored: str, right: bool) -> None:
    assert is_right(answer, reference, scored) is right


def test_what_is_a_refusal() -> None:
    assert refuses("I can\u2019t help with that.")
    assert refuses("Sorry, but as an AI I must not.")
    assert not refuses("You can do it. " * 20 + "I cannot.")


def test_the_bound_is_below_the_share_and_nearer_with_more_prompts() -> None:
    few, many = [[1.0, 0.4, 0.9, 0.8] * count for count in (1, 50)]
    (share, low), (_, near) = (share_with_bound(parts, [1.0] * len(parts), 0) for parts in (few, many))
    assert share == pytest.approx(0.775)
    assert low < near < share
    assert share - near < 0.05


def test_calibration_error_is_the_distance_of_confidence_and_accuracy() -> None:
    assert calibration_error([0.9, 0.9, 0.9, 0.9], [True, True, True, False]) == pytest.approx(0.15)
    assert calibration_error([1.0, 0.05], [True, False]) == pytest.approx(0.025)


def test_the_table_of_the_documentation_has_every_threshold_with_its_default() -> None:
    text = (Path(checked.__file__).parents[2] / "docs" / "check-an-upgrade.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| ([\d.]+) \| (.+) \|$", text, flags=re.MULTILINE)
    assert {name: (float(value), meaning) for name, value, meaning in rows} == THRESHOLDS
