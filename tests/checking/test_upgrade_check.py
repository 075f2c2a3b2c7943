"""`check --old`: a good upgrade passes; an empty one, a copy and one in another format fail, each for its reasons."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import checked
import pytest
from checked import ITEMS, Checked
from safetensors.torch import load_file, save_file

from peft_lorasuite import LoraSuiteError, UpgradeCheck, check_upgrade, upgrade
from peft_lorasuite.checking.judging import MORE
from peft_lorasuite.checking.page import DATA, FAIL, PAGE, PASS, SKIPPED, Line
from peft_lorasuite.cli.main import main
from peft_lorasuite.text.examples import format_example, read_examples

DEMO = Path(checked.__file__).parents[2] / "peft_lorasuite" / "data" / "demo"
LENGTH = 16
ALWAYS = {
    "divergence on the task", "divergence on other text", "answers that stop", "length of answers", "refusals kept",
    "keys that PEFT loads", "merged logits", "GGUF", "gap recovered",
}  # fmt: skip


def lines(found: UpgradeCheck) -> dict[str, Line]:
    return {line.name: line for line in found.lines}


def failed(found: UpgradeCheck) -> set[str]:
    return {line.name for line in found.lines if line.status == FAIL}


def run(*words: Any) -> int:
    return main([str(word) for word in words])


def test_a_good_upgrade_passes_with_labels(made: Checked) -> None:
    found = check_upgrade(made.good, old=made.adapter, data=made.data, length=LENGTH)
    assert found.passed, str(found)
    by_name = lines(found)
    assert set(by_name) == {*ALWAYS, "negative flips", "calibration"}
    assert by_name["gap recovered"].value == pytest.approx(1, abs=0.01)
    assert by_name["negative flips"].value == 0
    assert "(12 to 12 right)" in by_name["negative flips"].measured
    assert {name for name, line in by_name.items() if line.status == SKIPPED} == {"refusals kept", "GGUF"}
    assert found.verdict == "pass: 9 checked, 2 not checked"
    assert found.settings["source"] == "given"


def test_a_good_upgrade_passes_without_labels(made: Checked) -> None:
    prompts = [item["prompt"] for item in ITEMS]
    found = check_upgrade(made.good, old=made.adapter, data=prompts, length=LENGTH, require={"confidence": 0})
    assert found.passed, str(found)
    assert set(lines(found)) == {*ALWAYS, "changed answers", "confidence of the old one"}
    assert lines(found)["changed answers"].value == 0
    sure = check_upgrade(made.good, old=made.adapter, data=prompts, length=LENGTH)
    assert failed(sure) == {"confidence of the old one"}
    assert "pass prompts of its task, or labels" in sure.verdict


@pytest.mark.parametrize(
    ("name", "reasons"),
    [
        ("empty", {"gap recovered", "negative flips", "answers that stop"}),
        ("copied", {"gap recovered", "negative flips"}),
        ("other_format", {"gap recovered", "negative flips", "length of answers"}),
    ],
)
def test_upgrades_that_are_none_fail_each_for_its_reasons(name: str, reasons: set[str], made: Checked) -> None:
    found = check_upgrade(getattr(made, name), old=made.adapter, data=made.data, length=LENGTH)
    assert reasons <= failed(found), str(found)
    assert found.verdict.startswith("fail: gap recovered ")
    assert "(lower bound at least 80%; upgrade with --method distill" in found.verdict
    assert "(12 to 0 right)" in lines(found)["negative flips"].measured
    if name == "empty":
        assert lines(found)["gap recovered"].value == pytest.approx(0, abs=1e-6)
        assert lines(found)["divergence on other text"].value == pytest.approx(0, abs=1e-6)


def test_the_command_writes_a_page_beside_the_adapter(made: Checked, tmp_path: Path, capsys: Any) -> None:
    copy = Path(shutil.copytree(made.good, tmp_path / "good"))
    call = ["check", copy, "--old", made.adapter, "--data", made.data, "--length", LENGTH]
    assert run(*call, "--for", "vllm", "--json") == 0
    values = json.loads(capsys.readouterr().out)
    assert values["passed"]
    assert values["output"] == str(copy)
    assert {"name": "vllm loads it", "status": PASS}.items() <= values["lines"][-1].items()
    assert json.loads((copy / DATA).read_text())["verdict"] == values["verdict"]
    page = (copy / PAGE).read_text()
    assert page.startswith(f"# {values['verdict']}\n")
    assert str(tmp_path) not in page
    assert (
        run(*call[:-4], "--require", "gap=1.5", "--data", made.data, "--length", LENGTH, "-o", tmp_path / "page") == 1
    )
    first, *rest = capsys.readouterr().out.splitlines()
    assert first.startswith("fail: gap recovered 100.0%, lower bound 100.0%")
    assert first.endswith(f"(lower bound at least 150%; {MORE})")
    assert any(line.startswith("  negative flips ") for line in rest)
    assert (tmp_path / "page" / PAGE).is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "one of the arguments --for --old is required"),
        (["--for", "vllm", "--data", "x.json"], "--data needs --old"),
        (["--old", "x", "--require", "gab=1"], "did you mean 'gap'?"),
        (["--old", "x", "--require", "gap"], "expected KEY=VALUE"),
        (["--old", "x", "--require", "gap=nan"], "must be a finite number"),
    ],
)
def test_a_wrong_call_ends_with_2(words: list[str], message: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        run("check", "adapter", *words)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_retrained_adapter_is_the_floor_and_the_ceiling(made: Checked) -> None:
    found = check_upgrade(
        made.other_format, old=made.adapter, data=made.data, retrained=made.other_format, length=LENGTH
    )
    flips = lines(found)["negative flips"]
    assert (flips.status, flips.threshold) == (PASS, "at most 100.0%, a retraining has 100.0%")
    good = check_upgrade(made.good, old=made.adapter, data=made.data, retrained=made.good, length=LENGTH)
    assert lines(good)["gap recovered"].measured.startswith("100.0%, lower bound 100.0%, of the way to the retrained")


def test_missing_and_unused_tensors_fail(made: Checked, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(made.good, tmp_path / "good"))
    tensors = load_file(copy / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    tensors[name.replace("q_proj", "x_proj")] = tensors.pop(name)
    save_file(tensors, copy / "adapter_model.safetensors")
    line = lines(check_upgrade(copy, old=made.adapter, data=made.data, length=LENGTH))["keys that PEFT loads"]
    assert line.status == FAIL
    assert line.measured.startswith("1 missing, such as ")
    assert "; 1 unused, such as " in line.measured
    assert "x_proj.lora_A" in line.measured


def test_a_truncated_file_is_found_before_a_model_runs(made: Checked, tmp_path: Path) -> None:
    broken, stages = tmp_path / "broken", []
    shutil.copytree(made.good, broken)
    file = broken / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])

    def progress(label: str, items: Any = ()) -> Any:
        stages.append(label)
        return items

    with pytest.raises(LoraSuiteError, match=r"adapter_model\.safetensors"):
        check_upgrade(broken, old=made.adapter, data=made.data, progress=progress)
    with pytest.raises(LoraSuiteError, match=r"adapter_model\.safetensors"):
        check_upgrade(made.good, old=made.adapter, data=made.data, retrained=broken, progress=progress)
    assert not stages


def test_prompts_that_the_old_adapter_has_nothing_to_do_with_fail(made: Checked) -> None:
    items = [{"prompt": f"sun {word}", "completion": " to of a"} for word in ("ran", "big", "in", "sat")]
    found = check_upgrade(made.good, old=made.adapter, data=items, length=LENGTH)
    assert "gap recovered" in failed(found)
    assert "pass prompts of its task in its format" in lines(found)["gap recovered"].reason


def test_labels_for_a_part_of_the_prompts_are_refused(made: Checked) -> None:
    with pytest.raises(LoraSuiteError, match="only some records have a reference answer"):
        check_upgrade(made.good, old=made.adapter, data=[*ITEMS, {"prompt": "the sun:"}])


def test_a_distilled_upgrade_of_the_demo_pair_passes(tmp_path: Path) -> None:
    items = read_examples(DEMO / "train.json")[:600]
    prompts = [format_example(item, "Question: {instruction}\nAnswer: ") for item in items]
    options = {"prompts": 600, "length": 8, "epochs": 5, "learning_rate": 3e-3}
    upgrade(
        DEMO / "adapter", checked.build_map(DEMO / "old", DEMO / "new", DEMO / "calibration.txt"), method="distill",
        options=options, old=str(DEMO / "old"), new=str(DEMO / "new"), prompts=prompts,
    ).save(tmp_path / "new")  # fmt: skip
    sides = {"old": DEMO / "adapter", "old_base": str(DEMO / "old"), "length": LENGTH}
    labeled = check_upgrade(tmp_path / "new", data=DEMO / "test.json", chat={"format": "question"}, **sides)
    assert labeled.passed, str(labeled)
    plain = check_upgrade(tmp_path / "new", **sides)
    assert plain.passed, str(plain)
