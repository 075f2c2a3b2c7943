"""What `auto` picks, and the prediction, on pairs whose outcome is known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from canon import read, write
from pico import pico_model, pico_tokenizer, save_backbone
from planted import CHANGES
from transformers import PreTrainedTokenizerFast

from peft_lorasuite import MapOptions, UpgradeMap
from peft_lorasuite.models.task import Task
from peft_lorasuite.text.conversations import Conversation
from peft_lorasuite.upgrading.auto import pick
from peft_lorasuite.upgrading.prediction import EXPECTED_GAP, Scores, agreement, judge, mean_cka, predict

WORDS = ["red", "blue", "tree", "stone", "river", "cloud", "small", "big", "runs", "sleeps"]
TEXT = ["the red tree sleeps. the big river runs by the small stone, and a cloud runs over it. " * 2] * 6


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return pico_tokenizer(WORDS)


METHODS = ("lorasuite", "transplant", "distill")
LOOKS = [{}, {"layer_map": "first"}, {"similarity": "cca"}, {"similarity": "procrustes"}, {"hidden_map": "polar"}]
"""Ways to build a map; not all of them use CKA."""


def mapped(tmp_path, tokenizer, new, **options):
    old = save_backbone(tmp_path / "old", pico_model("llama", seed=1), tokenizer)
    folder = save_backbone(tmp_path / "new", new, tokenizer)
    return UpgradeMap.build(old, folder, MapOptions(tokens=128, **options), calibration=TEXT)


def permuted(seed):
    """The same backbone with its key/value groups in another order: its function is the same."""
    model = pico_model("llama", seed=seed)
    with torch.no_grad():
        for layer in model.model.layers:
            attention = layer.self_attn
            for name, size in (("q_proj", 16), ("k_proj", 8), ("v_proj", 8)):
                weight = getattr(attention, name).weight
                weight.copy_(torch.cat([weight[size:], weight[:size]]))
            attention.o_proj.weight.copy_(attention.o_proj.weight.roll(-16, dims=1))
    return model


def test_the_same_backbone_is_rekeyed(tmp_path, tokenizer):
    upgrade_map = mapped(tmp_path, tokenizer, pico_model("llama", seed=1))
    assert pick(upgrade_map, can_run=True).method == "rekey"
    assert predict(upgrade_map, "lorasuite").verdict == "holds"


def test_copying_holds_where_everything_is_in_place_alone(tmp_path, tokenizer):
    assert predict(mapped(tmp_path / "same", tokenizer, pico_model("llama", seed=1)), "copy").gap == 1
    turned = predict(mapped(tmp_path / "turned", tokenizer, permuted(1)), "copy")
    assert (turned.verdict, turned.gap) == ("retrain", 0)


def test_a_planted_upgrade_holds_by_its_weights(tmp_path, tokenizer):
    upgrade_map = mapped(tmp_path, tokenizer, permuted(1))
    assert pick(upgrade_map, can_run=True).method == "lorasuite"
    found = predict(upgrade_map, "lorasuite")
    assert found.verdict == "holds"
    assert found.gap == pytest.approx(1, abs=1e-3)


PLANTED = ("permuted hidden", "rotated hidden", "widened hidden", "permuted heads", "turned heads", "units", "depth")


@pytest.mark.parametrize("change", PLANTED)
def test_every_planted_change_holds(change, tmp_path, tokenizer):
    canon = read("llama", 1)
    CHANGES[change](canon, torch.Generator().manual_seed(0))
    upgrade_map = mapped(tmp_path, tokenizer, write(canon))
    assert pick(upgrade_map, can_run=True).method == "lorasuite"
    assert [predict(upgrade_map, method).verdict for method in METHODS] == ["holds"] * 3
    assert predict(upgrade_map, "lorasuite").gap > 0.95


@pytest.mark.parametrize("options", LOOKS, ids=str)
@pytest.mark.parametrize("seed", [2, 3])
def test_a_random_new_backbone_means_retrain(seed, options, tmp_path, tokenizer):
    upgrade_map = mapped(tmp_path, tokenizer, pico_model("llama", seed=seed), **options)
    assert [predict(upgrade_map, method).verdict for method in METHODS] == ["retrain"] * 3


@pytest.mark.parametrize("options", LOOKS, ids=str)
def test_shuffled_embeddings_mean_retrain(options, tmp_path, tokenizer):
    new = pico_model("llama", seed=1)
    with torch.no_grad():
        weight = new.model.embed_tokens.weight
        weight.copy_(weight[torch.randperm(len(weight), generator=torch.Generator().manual_seed(0))])
    upgrade_map = mapped(tmp_path, tokenizer, new, **options)
    assert [predict(upgrade_map, method).verdict for method in METHODS] == ["retrain"] * 3


def test_agreement_on_held_out_tokens_is_below_that_on_the_tokens_of_the_fit(tmp_path, tokenizer):
    upgrade_map = mapped(tmp_path, tokenizer, pico_model("llama", seed=2))
    assert upgrade_map.facts["hidden"]["agreement"] > 0.3
    found, least = agreement(upgrade_map)
    assert found == upgrade_map.facts["hidden"]["held_out"] < least


def test_a_map_without_held_out_tokens_is_judged_by_those_of_the_fit(tmp_path, tokenizer):
    upgrade_map = mapped(tmp_path, tokenizer, pico_model("llama", seed=1))
    hidden = {name: value for name, value in upgrade_map.facts["hidden"].items() if name != "held_out"}
    older = replace(upgrade_map, facts={**upgrade_map.facts, "hidden": hidden})
    assert agreement(older) == (hidden["agreement"], 0.5)
    assert predict(older, "lorasuite").verdict == "holds"


def test_only_cka_is_compared_with_the_threshold_of_cka(tmp_path, tokenizer):
    new = pico_model("llama", seed=2)
    assert mean_cka(mapped(tmp_path / "cka", tokenizer, new)) < 0.3
    assert mean_cka(mapped(tmp_path / "cca", tokenizer, new, similarity="cca")) is None


@pytest.mark.parametrize(
    ("left", "confidence", "gap", "verdict"),
    [
        (0.1, 0.85, 0.975, "holds"),
        (0.8, 0.5, 0.8, "doubtful"),
        (2.2, 0.65, 0.45, "retrain"),
        (0.4, 0.05, 0.09, "retrain"),
        (5.0, 0.85, 0.0, "retrain"),
    ],
)
def test_the_fit_corrects_the_prediction_of_the_map(left, confidence, gap, verdict):
    scores = Scores(agreement=0.9, least=0.03, explained=0.02, alike=0.8)
    before = judge(scores, "transplant")
    assert (before.verdict, before.gap) == ("holds", EXPECTED_GAP["transplant"])
    fitted = {"transplant": {"divergence": 4.0, "divergence_left": left, "confidence": confidence}}
    after = judge(scores, "transplant", fitted)
    assert (after.verdict, after.gap) == (verdict, pytest.approx(gap))
    assert "target reached on the prompts" in after.because
    assert ("method='distill' can recover more" in after.because) == (verdict == "retrain")
    lost = judge(replace(scores, agreement=0.01), "transplant", fitted)
    assert (lost.verdict, lost.gap) == ("retrain", 0)


@pytest.mark.parametrize(("confidence", "gap", "verdict"), [(0.85, 0.9, "holds"), (0.05, 0.09, "retrain")])
def test_low_confidence_of_the_old_model_reduces_the_expected_gap(confidence, gap, verdict):
    scores = Scores(agreement=0.9, least=0.03, explained=0.02, alike=0.8)
    found = judge(scores, "distill", {"distill": {"confidence": confidence}})
    assert (found.verdict, found.gap) == (verdict, pytest.approx(gap))


def test_without_a_change_to_transfer_the_verdict_is_retrain():
    scores = Scores(agreement=0.9, least=0.03, explained=0.02, alike=0.8)
    fitted = {"transplant": {"divergence": 0.0, "divergence_left": 0.0, "confidence": 1.0}}
    assert judge(scores, "transplant", fitted).verdict == "retrain"


def test_conversations_are_distilled_and_other_prompts_are_not(tmp_path, tokenizer):
    upgrade_map = mapped(tmp_path, tokenizer, pico_model("llama", seed=2))
    talk = Conversation(({"role": "user", "content": "hello"},))
    for prompts, method in ((["hello"], "transplant"), (["hello", talk], "distill"), ("self", "transplant")):
        assert pick(upgrade_map, can_run=True, prompts=prompts).method == method
    classifier = pick(upgrade_map, can_run=True, prompts=[talk], task=Task("SEQ_CLS", ("no", "yes")))
    assert classifier.method == "transplant"


def test_without_the_old_backbone_auto_uses_the_map_and_mentions_the_better_method(tmp_path, tokenizer):
    upgrade_map = mapped(tmp_path, tokenizer, pico_model("llama", seed=2))
    assert pick(upgrade_map, can_run=True).method == "transplant"
    found = pick(upgrade_map, can_run=False)
    assert found.method == "lorasuite"
    assert "transplant" in found.reason
    assert "downloading the old backbone (0.1 MB), loading it and then the new one (0.1 MB)" in found.reason
