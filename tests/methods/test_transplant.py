"""Transplant and distil on pico pairs: what the adapter does to the logits arrives, without labels."""

from __future__ import annotations

from dataclasses import replace

import peft
import pytest
import torch
from pico import pico_model, pico_tokenizer, save_backbone, unrelated_pair

from peft_lorasuite import Backbone, LoraSuiteError, MapOptions, UpgradeMap, upgrade
from peft_lorasuite.adapters.peft_model import load_with_adapter
from peft_lorasuite.adapters.reading import read_adapter
from peft_lorasuite.io.source import Source
from peft_lorasuite.linalg.lowrank import reduced_rank_ridge
from peft_lorasuite.methods.base import MethodInput
from peft_lorasuite.methods.behavior.hints import CUT_ANSWERS_HINT, UNUSED_PROMPTS_HINT
from peft_lorasuite.methods.behavior.positions import tokenize
from peft_lorasuite.methods.behavior.probe import probe
from peft_lorasuite.methods.behavior.token_pairs import Vocabulary
from peft_lorasuite.methods.distill import DistillOptions, distill
from peft_lorasuite.methods.transplant import TransplantOptions
from peft_lorasuite.model import attach
from peft_lorasuite.models.generation import answer, generate_answers
from peft_lorasuite.text.calibration import built_in_text
from peft_lorasuite.upgrading.prediction import judge

WORDS = ["red", "blue", "tree", "stone", "river", "cloud", "small", "big", "runs", "sleeps"]
PROMPTS = [f" the {a} {b} {c} ." for a in WORDS[:2] for b in WORDS[2:6] for c in WORDS[8:]]
SMALL = {"prompts": 16, "length": 6, "extra": 50, "anchor_tokens": 40}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two unrelated pico backbones with one vocabulary, an adapter of the old one, and their map."""
    root = tmp_path_factory.mktemp("pair")
    old, new = unrelated_pair(root, WORDS)
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        peft.get_peft_model(pico_model("llama", seed=1), config).save_pretrained(root / "adapter")
    upgrade_map = UpgradeMap.build(old, new, MapOptions(layer_map="first"))
    return root, upgrade_map


def carry(pair, **settings):
    root, upgrade_map = pair
    names = {"old": root / "old", "new": root / "new", "prompts": PROMPTS} | settings
    return upgrade(root / "adapter", upgrade_map, **names)


@torch.no_grad()
def divergence(pair, model, *, shared=False):
    """Mean KL of a new model from ``new + (old adapted - old)`` where the old adapted model's answers are predicted.

    With ``shared`` the tokens that only one side has, special ones too, share the change of their probability.
    """
    root, _ = pair
    old = Backbone.open(root / "old")
    with load_with_adapter(old, read_adapter(Source(str(root / "adapter"), "adapter"), old.arch)) as upgraded:
        turns = answer(upgraded, old, PROMPTS, length=6)
        rows = [tokenize(old, turn) for turn in turns]
        after = [upgraded(torch.tensor([row.ids])).logits[0] for row in rows]
    plain, new = old.load(), Backbone.open(root / "new").load()
    info, both = [], Vocabulary.pair(old, Backbone.open(root / "new")).new
    for row, moved in zip(rows, after, strict=True):
        ids = torch.tensor([row.ids])
        sides = [one.log_softmax(-1) for one in (moved, plain(ids).logits[0])]
        change = sides[0] - sides[1]
        if shared:
            rest = [torch.log1p(-one.exp()[:, both].sum(-1)) for one in sides]
            apart = torch.ones(change.shape[1], dtype=torch.bool).index_fill(0, both, False)
            change[:, apart] = (rest[0] - rest[1])[:, None]
        teacher = (new(ids).logits[0] + change).log_softmax(-1)
        got = model(ids).logits[0].log_softmax(-1)
        info.append((teacher.exp() * (teacher - got)).sum(-1)[list(row.predicting)])
    return float(torch.cat(info).mean())


def test_transplant_and_distil_bring_the_new_model_nearer_to_what_the_adapter_does(pair):
    root, _ = pair
    before = divergence(pair, Backbone.open(root / "new").load())
    moved = carry(pair, method="transplant", options=SMALL | {"rank": 16, "teacher_weight": 0.0})
    after = divergence(pair, attach(Backbone.open(root / "new").load(), moved))
    assert after < 0.8 * before
    training = {"prompts": 16, "length": 6, "extra": 50, "epochs": 20, "learning_rate": 1e-2, "teacher_weight": 0.0}
    distilled = carry(pair, method="distill", options=training)
    assert divergence(pair, attach(Backbone.open(root / "new").load(), distilled)) < after


def test_what_distillation_reached_is_measured_with_the_model(pair):
    """With a learning rate of nearly zero that is what `transplant` computes from the last layer alone."""
    options = {"prompts": 16, "length": 6, "extra": 50, "epochs": 1}
    still = carry(pair, method="distill", options=options | {"learning_rate": 1e-9}).report.facts["distill"]
    for name in ("divergence", "divergence_left"):
        assert still[name] == pytest.approx(still["transplant"][name], rel=1e-3)
    trained = carry(pair, method="distill", options=options | {"learning_rate": 1e-2, "epochs": 20}).report.facts
    left = trained["distill"]["divergence_left"]
    assert left < 0.8 * still["divergence_left"]
    assert (
        f"target reached on the prompts {1 - left / still['divergence']:.0%}" in judge(None, "distill", trained).because
    )


@torch.no_grad()
def moved(pair, upgraded, texts):
    """Mean KL of the upgraded model from the new one where it reads some texts."""
    root, _ = pair
    new = Backbone.open(root / "new")
    plain, model, found = new.load(), attach(new.load(), upgraded), []
    for text in texts:
        ids = torch.tensor([new.tokenizer(text)["input_ids"][:-1]])
        before, after = (one(ids).logits[0].log_softmax(-1) for one in (plain, model))
        found.append((before.exp() * (before - after)).sum(-1))
    return float(torch.cat(found).mean())


@pytest.mark.parametrize(
    ("held", "texts"), [({"anchor_tokens": 1000}, PROMPTS), ({"anchor_text_tokens": 1000}, built_in_text()[:20])]
)
def test_distillation_holds_the_new_model_where_nothing_is_to_change(held, texts, pair):
    options = {"prompts": 16, "length": 6, "extra": 50, "epochs": 5, "learning_rate": 1e-2, "teacher_weight": 0.0}
    loose, firm = (
        carry(pair, method="distill", options=options | {"anchor_tokens": 0, "anchor_text_tokens": 0} | more)
        for more in ({}, held)
    )
    assert loose.report.facts["distill"]["anchors"] == 0 < firm.report.facts["distill"]["anchors"]
    assert moved(pair, firm, texts) < 0.5 * moved(pair, loose, texts)


def test_factors_of_a_bfloat16_backbone_are_distilled_in_float32(pair):
    root, _ = pair
    old, new = (Backbone.open(root / side, dtype=torch.bfloat16) for side in ("old", "new"))
    adapter = read_adapter(Source(str(root / "adapter"), "adapter"), old.arch)
    job = MethodInput(adapter, map=None, old=old, new=new, prompts=PROMPTS)  # pyright: ignore
    updates = distill(job, DistillOptions(prompts=8, length=6, extra=50, epochs=3)).updates
    assert len(updates) > 1
    assert not any(torch.equal(update.B.bfloat16().float(), update.B) for update in updates.values())


def test_distillation_in_small_pieces_takes_the_same_steps(pair):
    """Answers differ in length, so that a mean over the pieces' own means would be another one."""
    options = {"prompts": 12, "length": 6, "extra": 50, "anchor_text_tokens": 100}
    whole, pieces = (carry(pair, method="distill", options=options | {"micro_batch_size": size}) for size in (None, 2))
    assert whole.report.facts["distill"]["loss"] == pytest.approx(pieces.report.facts["distill"]["loss"], rel=1e-3)
    for key, update in whole.adapter.updates.items():
        torch.testing.assert_close(
            update.delta_weight(), pieces.adapter.updates[key].delta_weight(), rtol=1e-2, atol=1e-5
        )


def test_pieces_that_do_not_fill_a_step_are_refused_before_anything_is_read(pair):
    with pytest.raises(LoraSuiteError, match="micro_batch_size"):
        carry(pair, method="distill", options={"micro_batch_size": 3})


def test_states_kept_while_answering_are_those_of_reading_the_answers(pair):
    """Also where the text of an answer reads back as other tokens than the ones that were chosen."""
    root, _ = pair
    old, new = Backbone.open(root / "old"), Backbone.open(root / "new")
    adapter = read_adapter(Source(str(root / "adapter"), "adapter"), old.arch)
    job = MethodInput(adapter, map=None, old=old, new=new, prompts=PROMPTS)  # pyright: ignore
    options = TransplantOptions(prompts=16, length=6)
    kept = probe(job, options)
    torch.testing.assert_close(
        kept.adapted_states, probe(job, options, kept.turns).adapted_states, rtol=1e-4, atol=1e-4
    )
    with load_with_adapter(old, adapter) as upgraded:
        found = generate_answers(upgraded, old, PROMPTS, length=6)
    same = {tokenize(old, turn).ids[tokenize(old, turn).start :] == written.ids for turn, written in found}
    assert same == {True, False}


def test_the_same_seed_gives_the_same_adapter(pair):
    first, second = (carry(pair, method="transplant", options=SMALL).adapter for _ in range(2))
    for key, update in first.updates.items():
        torch.testing.assert_close(update.delta_weight(), second.updates[key].delta_weight(), rtol=0, atol=0)


def test_the_report_says_what_was_read(pair):
    report = carry(pair, method="transplant", options=SMALL).report
    assert report.coverage is None
    assert report.facts["transplant"]["prompts"] == 16
    assert "differences" not in report.facts, "they say what happens to weights"
    assert 0 < report.facts["transplant"]["divergence_left"] < 0.9 * report.facts["transplant"]["divergence"]


def test_prompts_that_were_not_used_are_mentioned(pair):
    report = carry(pair, method="transplant", options=SMALL | {"prompts": 8}).report
    assert UNUSED_PROMPTS_HINT.format(8, len(PROMPTS)) in report.facts["hints"]


def test_the_report_tells_what_the_upgraded_model_gives(pair):
    """With neither gate nor trust, and all tokens as candidates, its divergence is the models' own."""
    root, _ = pair
    plain = Backbone.open(root / "new").load()
    options = SMALL | {"prompts": 100, "teacher_weight": 0.0, "extra": 5000, "rank": 4}
    found = {steps: carry(pair, method="transplant", options=options | {"refine_steps": steps}) for steps in (0, 60)}
    info = {steps: one.report.facts["transplant"] for steps, one in found.items()}
    assert info[60]["divergence_left"] < 0.97 * info[0]["divergence_left"]
    assert info[60]["divergence"] == pytest.approx(divergence(pair, plain, shared=True), rel=1e-3)
    for steps, one in found.items():
        real = divergence(pair, attach(Backbone.open(root / "new").load(), one), shared=True)
        assert info[steps]["divergence_left"] == pytest.approx(real, rel=1e-3)


@pytest.mark.parametrize(("length", "rank"), [(6, 16), (60, 64)])
def test_long_answers_have_settings_of_their_own(pair, length, rank):
    """The random old model never ends its answers."""
    report = carry(pair, method="transplant", options=SMALL | {"length": length}).report
    assert report.rank == min(rank, 48)
    facts = report.facts
    assert facts["hints"] == [CUT_ANSWERS_HINT.format(length, 4 * length)]


@pytest.mark.parametrize(
    ("length", "same"), [(6, {"teacher_weight": 1.0, "top": 64}), (60, {"teacher_weight": 0.5, "top": 32})]
)
def test_the_target_of_long_answers_is_shared_by_both_models(pair, length, same):
    root, _ = pair
    old, new = Backbone.open(root / "old"), Backbone.open(root / "new")
    adapter = read_adapter(Source(str(root / "adapter"), "adapter"), old.arch)
    job = MethodInput(adapter, map=None, old=old, new=new, prompts=PROMPTS)  # pyright: ignore
    options = TransplantOptions(prompts=16, length=length, extra=10)
    probed = probe(job, options)

    def target(**given):
        found = probed.targets(replace(options, **given), seed=0)
        return torch.zeros(len(probed.places), new.arch.vocabulary).index_add(1, found.ids, found.log_probs.exp())

    torch.testing.assert_close(target(), target(**same), rtol=0, atol=0)
    assert (target() - target(**same | {"teacher_weight": 0.2})).abs().max() > 1e-3


@pytest.mark.parametrize("width", [12, 60])
def test_reduced_rank_ridge_is_the_best_of_its_rank_whichever_way_it_is_solved(width):
    generator = torch.Generator().manual_seed(0)
    x, wanted, quiet = (torch.randn(n, d, generator=generator) for n, d in ((30, width), (30, 8), (10, width)))
    update, explained = reduced_rank_ridge(x, wanted, quiet, weight=8.0, ridge=0.05, rank=3)
    scale = torch.cat([torch.full((30,), 8.0), torch.ones(10)]).sqrt()[:, None]
    X, R = torch.cat([x, quiet]) * scale, torch.cat([wanted, torch.zeros(10, 8)]) * scale
    level = 0.05 * float((X @ X.T).diagonal().mean())

    def loss(W):
        return float(((X @ W.T - R) ** 2).sum() + level * (W**2).sum())

    free = torch.linalg.solve(X.T @ X + level * torch.eye(width), X.T @ R).T
    root = torch.linalg.cholesky(X.T @ X + level * torch.eye(width))
    U, s, Vt = torch.linalg.svd(free @ root, full_matrices=False)
    best = U[:, :3] * s[:3] @ Vt[:3] @ torch.linalg.inv(root)
    assert loss(update.delta_weight()) == pytest.approx(loss(best), rel=1e-5)
    assert 0 < explained < 1


def test_a_norm_that_lets_nothing_of_a_dimension_through_is_not_divided_by(pair, tmp_path):
    model = pico_model("gemma2", seed=2)
    model.model.layers[-1].post_feedforward_layernorm.weight.data[3] = -1  # its gain is one more
    new = save_backbone(tmp_path / "new", model, pico_tokenizer(WORDS))
    upgrade_map = UpgradeMap.build(pair[0] / "old", new, MapOptions(layer_map="first"))
    upgraded = carry((pair[0], upgrade_map), method="transplant", options=SMALL, new=new)
    assert all(update.B.isfinite().all() for update in upgraded.adapter.updates.values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompts": []}, "has no records"),
        ({"prompts": [" the red tree"]}, "too few prompts"),
        ({"prompts": [" red" * 400, " blue"]}, "too long for the context"),
        ({"old": None}, "the method 'transplant' needs both backbones"),
    ],
)
def test_what_cannot_be_used_is_named(pair, settings, message):
    with pytest.raises(LoraSuiteError, match=message):
        carry(pair, method="transplant", options=SMALL, **settings)


@pytest.mark.parametrize(
    ("method", "name", "value"),
    [("transplant", "length", 0), ("transplant", "prompts", 1), ("transplant", "ridge", -1.0),
     ("transplant", "rank", 0), ("distill", "epochs", 0), ("distill", "length", 0),
     ("distill", "synthetic_prompts", -1),
     ("transplant", "teacher_weight", -0.1), ("distill", "teacher_weight", 1.5), ("distill", "learning_rate", 2.0)],
)  # fmt: skip
def test_an_option_out_of_range_is_reported_before_anything_is_run(pair, method, name, value):
    with pytest.raises(LoraSuiteError, match=name):
        carry(pair, method=method, options={name: value})
