"""The verdict comes first: on the terminal, in `repr`, in the report and on the card; nothing is silently empty."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import command_fixtures
import pytest
import torch
from command_fixtures import Pair
from safetensors.torch import load_file, save_file

import peft_lorasuite
from peft_lorasuite import UpgradeMap, upgrade
from peft_lorasuite.cli.main import main
from peft_lorasuite.upgrading.prediction import Prediction, Scores, judge, with_coverage

pair = command_fixtures.pair
WEIGHTS = "adapter_model.safetensors"
SMALL = {"transplant": {"extra": 50, "length": 4}, "distill": {"extra": 50, "length": 4, "epochs": 1}}
PROMPTS = [f"the {word} cat" for word in ("red", "blue", "old", "new")] * 4


def changed(pair: Pair, folder, factor: float, names: tuple[str, ...] = ("lora_B",)):
    """Copy the adapter with some of its factors scaled."""
    shutil.copytree(pair.adapter, folder)
    tensors = load_file(folder / WEIGHTS)
    scaled = {name: tensor * factor if any(n in name for n in names) else tensor for name, tensor in tensors.items()}
    save_file(scaled, folder / WEIGHTS)
    return folder


def run(*words):
    return main([str(word) for word in words])


@pytest.mark.parametrize("method", ["copy", "lorasuite"])
def test_the_first_line_is_the_verdict(method, pair, tmp_path, capsys):
    call = ["upgrade", pair.adapter, "--to", pair.new, "--map", pair.map, "--method", method, "-o", tmp_path / "out"]
    assert run(*call) == 0
    first = capsys.readouterr().out.splitlines()[0]
    report = json.loads((tmp_path / "out" / "lorasuite_report.json").read_text())
    assert next(iter(report)) == "verdict"
    assert report["verdict"] == first
    assert "of the adapter's gain expected" in first
    found = upgrade(pair.adapter, pair.map, method=method).report
    assert repr(found).splitlines()[0] == f"Report: {first}"
    assert len(repr(found)) < 600


@pytest.mark.parametrize("method", ["lorasuite", "transplant", "distill"])
@pytest.mark.parametrize("factor", [0.0, 1e-25])
def test_an_adapter_that_changes_nothing_is_reported(factor, method, pair, tmp_path):
    folder = changed(pair, tmp_path / "adapter", factor)
    report = upgrade(
        folder, pair.map, method=method, options=SMALL.get(method), old=pair.old, new=pair.new, prompts=PROMPTS
    ).report
    assert "the adapter changes nothing: was it trained?" in report.verdict
    assert report.verdict.startswith("unlikely to hold")
    assert report.facts["prediction"]["expected_gap_recovered"] == 0


def test_an_adapter_that_changes_little_is_not(pair, tmp_path):
    folder = changed(pair, tmp_path / "adapter", 1e-3)
    assert "changes nothing" not in upgrade(folder, pair.map, method="lorasuite").report.verdict


def test_coverage_means_nothing_for_methods_that_transfer_behavior(pair, capsys, tmp_path):
    upgraded = upgrade(
        pair.adapter, pair.map, method="transplant", options=SMALL["transplant"], old=pair.old, new=pair.new,
        prompts=PROMPTS,
    )  # fmt: skip
    assert upgraded.report.coverage is None
    assert set(upgraded.report.tensors.values()) == {"applied to the old model"}
    assert upgraded.report.facts["dtype"] == {"old": "float32", "new": "float32"}
    by_weights = upgrade(pair.adapter, pair.map, method="lorasuite").report
    assert by_weights.coverage == 1.0
    assert set(by_weights.tensors.values()) == {"transferred"}


def test_a_verdict_counts_what_was_left_out():
    """On the same weights, where nothing else is lost."""
    found = {"verdict": "holds", "because": "the map", "expected_gap_recovered": 1.0}
    assert with_coverage(found, 0.99) == with_coverage(found, None) == found
    partly = with_coverage(found, 0.75)
    assert (partly["verdict"], partly["because"]) == ("doubtful", "the map, tensors transferred 75%")
    assert with_coverage({**found, "verdict": "retrain"}, 0.75)["verdict"] == "retrain"


def test_answers_of_an_uncertain_adapter_make_the_verdict_doubtful():
    scores = Scores(1.0, 0.03, 0.0, 0.9)
    fitted = {"transplant": {"divergence": 1.0, "divergence_left": 0.1, "confidence": 0.5}}
    assert judge(scores, "transplant", fitted).verdict == "doubtful"
    fitted["transplant"]["confidence"] = 0.9
    assert judge(scores, "transplant", fitted).verdict == "holds"
    fitted["transplant"]["divergence_left"] = 0.9
    assert judge(scores, "transplant", fitted).verdict == "retrain"


def test_a2_distillation_from_uncertain_answers_is_doubtful_whatever_its_own_gate():
    scores = Scores(1.0, 0.03, 0.0, 0.9)
    measured = {"distill": {"confidence": 0.9, "transplant": {"confidence": 0.5}}}
    assert judge(scores, "distill", measured).verdict == "doubtful"
    measured["distill"]["transplant"]["confidence"] = 0.9
    assert judge(scores, "distill", measured).verdict == "holds"


def judged(*answers: tuple[str, str, str], kept: float = 1.0) -> Prediction:
    """The prediction after a good fit with these answers of the new base, the result and the old adapted model."""
    samples = [dict(zip(("base", "upgraded", "old"), one, strict=True)) for one in answers]
    measured = {"divergence": 1.0, "divergence_left": 0.1, "confidence": 0.9, "answers_kept": kept}
    fitted = {"transplant": measured, "samples": samples}
    return judge(Scores(1.0, 0.03, 0.0, 0.9), "transplant", fitted)


def test_other_answers_than_the_old_ones_make_the_verdict_doubtful():
    other, same = ("white fish", "wall book", "wall bucket"), ("white fish", "wall bucket", "wall bucket")
    found = judged(*[other] * 9, same)
    assert (found.verdict, found.gap) == ("doubtful", 0.9)
    assert "1 of 10 changed sample answers as the old adapted model's" in found.because
    assert found.because.endswith("method='distill' can recover more from the same prompts")
    assert judged(*[other] * 5, *[same] * 5).verdict == "doubtful"
    found = judged(*[other] * 4, *[same] * 6)
    assert (found.verdict, found.answers) == ("holds", (6, 10))
    assert judged(*[("white fish", "wall", "wall bucket")] * 10).verdict == "holds"  # cut
    assert judged(*[("white fish", "", "wall bucket")] * 10).verdict == "doubtful"


def test_other_answers_are_wanted_where_the_adapter_leaves_them_to_the_new_model():
    other = ("white fish", "wall book", "wall bucket")
    assert judged(*[other] * 10, kept=0.8).verdict == "doubtful"
    found = judged(*[other] * 10, kept=0.3)
    assert (found.verdict, found.answers) == ("holds", None)
    assert found.because.endswith("answers that the adapter decides in full 30%")


def test_sample_answers_count_only_where_the_same_are_expected():
    other = ("white fish", "wall book", "wall bucket")
    assert judged(*[other] * 4).verdict == "holds"  # too few
    assert judged(*[("yes", "no", "yes")] * 9, other).verdict == "holds"  # the adapter changed one alone
    assert judged(*[("no", "a " * 9, "the " * 9)] * 10).verdict == "holds"  # long answers differ in their wording


def test_the_verdict_has_the_sample_answers(pair):
    report = upgrade(pair.adapter, pair.map, method="copy").report
    prediction = report.facts["prediction"] | {"verdict": "doubtful", "equal_answers": [4, 10]}
    shown = replace(report, facts={**report.facts, "prediction": prediction}).verdict
    assert shown.startswith("doubtful (about ")
    assert "expected, 4 of 10 changed sample answers as the old adapted model's)" in shown


def test_the_names_of_methods_include_auto(pair, capsys):
    assert run("upgrade", pair.adapter, "--to", pair.new, "--method", "transplnt", "-o", "never") == 1
    assert "did you mean 'transplant'? known: auto, copy" in capsys.readouterr().err


def test_the_whole_update_is_there_after_writing(pair, tmp_path):
    """What was written, not what was read, has the update."""
    upgraded = upgrade(pair.adapter, pair.map, method="lorasuite")
    upgraded.save(tmp_path / "out")
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    assert sum(float(torch.linalg.norm(t)) for name, t in tensors.items() if "lora_B" in name) > 0


def test_results_show_themselves_in_one_screen(pair):
    upgrade_map = UpgradeMap.load(pair.map)
    upgraded = upgrade(pair.adapter, upgrade_map, method="copy")
    for shown in (upgrade_map, upgraded, upgraded.report, upgraded.adapter):
        lines = repr(shown).splitlines()
        assert 3 < len(lines) < 12
        assert all(len(line) < 200 for line in lines)
        page = shown._repr_html_()
        assert page.count("<tr>") == len(lines) - 1
        assert "<th>" in page
    assert repr(upgraded).startswith(f"Upgraded: {upgraded.report.verdict}")


def test_a_notebook_shows_names_as_text(pair):
    shown = replace(UpgradeMap.load(pair.map), facts={"shared_tokens": "<script>"})
    assert "&lt;script&gt;" in shown._repr_html_()


def test_the_package_lists_its_public_names_alone():
    assert dir(peft_lorasuite) == sorted(peft_lorasuite.__all__)
