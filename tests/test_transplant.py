"""Transplant and distil on pico pairs: what the adapter does to the logits arrives, without labels."""

from __future__ import annotations

import gc
import weakref

import peft
import pytest
import torch
from pico import pico_model, pico_tokenizer, save_backbone

from peft_lorasuite import Backbone, LoraSuiteError, MapOptions, UpgradeMap, upgrade
from peft_lorasuite import adapter as adapter_files
from peft_lorasuite.answering import Turn, answer, answered
from peft_lorasuite.behaviour import Tokens, adapted, aligned, tokens
from peft_lorasuite.lowrank import reduced_rank_ridge
from peft_lorasuite.methods.base import Job
from peft_lorasuite.methods.distill import DistillOptions, distill
from peft_lorasuite.methods.reading import CUT, read
from peft_lorasuite.methods.transplant import TransplantOptions
from peft_lorasuite.model import attach
from peft_lorasuite.source import Source
from peft_lorasuite.teacher import Head, Teacher, Vocabulary, teach, wanted_shift

WORDS = ["red", "blue", "tree", "stone", "river", "cloud", "small", "big", "runs", "sleeps"]
PROMPTS = [f" the {a} {b} {c} ." for a in WORDS[:2] for b in WORDS[2:6] for c in WORDS[8:]]
SMALL = {"prompts": 16, "length": 6, "extra": 50, "quiet": 40}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two unrelated pico backbones with one vocabulary, an adapter of the old one, and their map."""
    root = tmp_path_factory.mktemp("pair")
    tokenizer = pico_tokenizer(WORDS)
    old = save_backbone(root / "old", pico_model("llama", seed=1), tokenizer)
    new = save_backbone(root / "new", pico_model("qwen2", seed=2, hidden_size=48, intermediate_size=64), tokenizer)
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
def divergence(pair, model):
    """Mean KL of a new model from ``new + (old adapted - old)`` where the old adapted model's answers are predicted."""
    root, _ = pair
    old = Backbone.open(root / "old")
    with adapted(old, adapter_files.read(Source(str(root / "adapter"), "adapter"), old.arch)) as carried:
        turns = answer(carried, old, PROMPTS, length=6)
        rows = [tokens(old, turn) for turn in turns]
        after = [carried(torch.tensor([row.ids])).logits[0] for row in rows]
    plain, new = old.load(), Backbone.open(root / "new").load()
    told = []
    for row, moved in zip(rows, after, strict=True):
        ids = torch.tensor([row.ids])
        teacher = (new(ids).logits[0] + moved - plain(ids).logits[0]).log_softmax(-1)
        got = model(ids).logits[0].log_softmax(-1)
        told.append((teacher.exp() * (teacher - got)).sum(-1)[list(row.predicting)])
    return float(torch.cat(told).mean())


def test_transplant_and_distil_bring_the_new_model_nearer_to_what_the_adapter_does(pair):
    root, _ = pair
    before = divergence(pair, Backbone.open(root / "new").load())
    moved = carry(pair, method="transplant", options=SMALL | {"gate": 0.0, "rank": 16})
    after = divergence(pair, attach(Backbone.open(root / "new").load(), moved))
    assert after < 0.8 * before
    training = {"prompts": 16, "length": 6, "extra": 50, "epochs": 20, "learning_rate": 1e-2}
    distilled = carry(pair, method="distill", options=training)
    assert divergence(pair, attach(Backbone.open(root / "new").load(), distilled)) < after


def test_factors_of_a_bfloat16_backbone_are_distilled_in_float32(pair):
    root, _ = pair
    old, new = (Backbone.open(root / side, dtype=torch.bfloat16) for side in ("old", "new"))
    adapter = adapter_files.read(Source(str(root / "adapter"), "adapter"), old.arch)
    job = Job(adapter, map=None, old=old, new=new, prompts=PROMPTS)  # pyright: ignore
    updates = distill(job, DistillOptions(prompts=8, length=6, extra=50, epochs=3)).updates
    assert len(updates) > 1
    assert not any(torch.equal(update.B.bfloat16().float(), update.B) for update in updates.values())


def test_states_kept_while_answering_are_those_of_reading_the_answers(pair):
    """Also where the text of an answer reads back as other tokens than the ones that were chosen."""
    root, _ = pair
    old, new = Backbone.open(root / "old"), Backbone.open(root / "new")
    adapter = adapter_files.read(Source(str(root / "adapter"), "adapter"), old.arch)
    job = Job(adapter, map=None, old=old, new=new, prompts=PROMPTS)  # pyright: ignore
    options = TransplantOptions(prompts=16, length=6)
    kept = read(job, options)
    torch.testing.assert_close(kept.adapted, read(job, options, kept.turns).adapted, rtol=1e-4, atol=1e-4)
    with adapted(old, adapter) as carried:
        found = answered(carried, old, PROMPTS, length=6)
    same = {tokens(old, turn).ids[tokens(old, turn).start :] == written.ids for turn, written in found}
    assert same == {True, False}


def test_the_same_seed_gives_the_same_adapter(pair):
    first, second = (carry(pair, method="transplant", options=SMALL).adapter for _ in range(2))
    for key, update in first.updates.items():
        torch.testing.assert_close(update.delta(), second.updates[key].delta(), rtol=0, atol=0)


def test_the_report_says_what_was_read(pair):
    report = carry(pair, method="transplant", options=SMALL).report
    assert report.coverage == 1
    assert report.facts["transplant"]["prompts"] == 16
    assert 0 <= report.facts["transplant"]["divergence_left"] < 5


@pytest.mark.parametrize(("length", "given", "gate"), [(6, {}, 0.5), (60, {}, 0.0), (60, {"gate": 0.2}, 0.2)])
def test_long_answers_have_settings_of_their_own(pair, length, given, gate):
    """The random old model never ends its answers."""
    facts = carry(pair, method="transplant", options=SMALL | {"length": length} | given).report.facts
    assert facts["transplant"]["gate"] == gate
    assert facts["hints"] == [CUT.format(length, 4 * length)]


def test_reduced_rank_ridge_is_the_best_of_its_rank():
    generator = torch.Generator().manual_seed(0)
    x, wanted, quiet = (torch.randn(n, d, generator=generator) for n, d in ((30, 12), (30, 8), (10, 12)))
    update, explained = reduced_rank_ridge(x, wanted, quiet, weight=8.0, ridge=0.05, rank=3)
    scale = torch.cat([torch.full((30,), 8.0), torch.ones(10)]).sqrt()[:, None]
    X, R = torch.cat([x, quiet]) * scale, torch.cat([wanted, torch.zeros(10, 8)]) * scale
    level = 0.05 * float((X @ X.T).diagonal().mean())

    def loss(W):
        return float(((X @ W.T - R) ** 2).sum() + level * (W**2).sum())

    free = torch.linalg.solve(X.T @ X + level * torch.eye(12), X.T @ R).T
    root = torch.linalg.cholesky(X.T @ X + level * torch.eye(12))
    U, s, Vt = torch.linalg.svd(free @ root, full_matrices=False)
    best = U[:, :3] * s[:3] @ Vt[:3] @ torch.linalg.inv(root)
    assert loss(update.delta()) == pytest.approx(loss(best), rel=1e-5)
    assert 0 < explained < 1


def test_the_wanted_shift_gives_the_teachers_probabilities(pair):
    new = Backbone.open(pair[0] / "new")
    states, moves = (torch.randn(6, 48, generator=torch.Generator().manual_seed(n)) for n in (1, 2))
    head, ids = Head(new.load(), new), torch.arange(0, 120, 2)
    target = head.on(ids).logits(states + 0.5 * moves).log_softmax(-1)
    shift, left = wanted_shift(head, states, Teacher(ids, target, torch.ones(6)), ridge=1e-6, steps=200)
    assert left < 1e-3
    got = head.on(ids).logits(states + shift).log_softmax(-1)
    torch.testing.assert_close(got.exp(), target.exp(), atol=0.01, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gemma2", "bloom", "phi", "minicpm"])
def test_a_head_that_made_room_gives_the_same_logits(family, tmp_path):
    """Tied or not, with a bias, a cap or a scaling."""
    backbone = Backbone.open(save_backbone(tmp_path, pico_model(family), pico_tokenizer(WORDS)), dtype="float32")
    head, states = Head(backbone.load(), backbone), torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    before = head.logits(states)
    weight = weakref.ref(head.weight)
    head.let_go(backbone)
    gc.collect()
    assert weight() is None
    assert torch.equal(head.logits(states), before)


def test_a_model_in_memory_keeps_its_head():
    model = pico_model("llama")
    backbone = Backbone.open(model)
    head = Head(model, backbone)
    head.let_go(backbone)
    assert head.weight.data_ptr() == model.get_output_embeddings().weight.data_ptr()


def test_the_gate_asks_for_no_change_where_the_old_model_does_not_know(pair):
    root, _ = pair
    old, new = Backbone.open(root / "old"), Backbone.open(root / "new")
    heads = [Head(backbone.load(), backbone) for backbone in (old, new)]
    states = torch.randn(3, 48, generator=torch.Generator().manual_seed(1))
    unsure, plain = torch.zeros(3, 32), torch.randn(3, 32, generator=torch.Generator().manual_seed(2))
    teacher = teach(
        *heads, Vocabulary.of(old, new), unsure, plain, states, gate=0.5, trust=0.0, top=64, extra=60, seed=0
    )
    assert float(teacher.confidence.max()) == 0
    expected = heads[1].on(teacher.ids).logits(states).log_softmax(-1)
    torch.testing.assert_close(teacher.target, expected, atol=1e-4, rtol=1e-4)


def test_the_gate_falls_between_half_its_bound_and_the_bound(pair):
    root, _ = pair
    old, new = Backbone.open(root / "old"), Backbone.open(root / "new")
    heads = [Head(backbone.load(), backbone) for backbone in (old, new)]
    aim = torch.nn.functional.normalize(heads[0].weight[50].float(), dim=0)
    states = torch.linspace(1, 20, 60)[:, None] * aim
    after = heads[0].logits(states, normed=True).log_softmax(-1)
    entropy = -(after.exp() * after).sum(-1)
    found = teach(
        *heads,
        Vocabulary.of(old, new),
        states,
        states,
        torch.zeros(60, 48),
        gate=2.0,
        trust=0.0,
        top=9,
        extra=9,
        seed=0,
    ).confidence
    assert (found[entropy >= 2] == 0).all()
    assert (found[entropy <= 1] == 1).all()
    between = (entropy > 1) & (entropy < 2)
    assert min((entropy >= 2).sum(), (entropy <= 1).sum(), between.sum()) > 3
    torch.testing.assert_close(found[between], 2 - entropy[between])


def test_a_token_of_the_new_side_alone_moves_with_the_one_it_begins_with(tmp_path):
    """Else all the words that the old model has fall behind those that it lacks."""
    old = Backbone.open(save_backbone(tmp_path / "old", pico_model("llama"), pico_tokenizer(["the", "tree"])))
    new = Backbone.open(save_backbone(tmp_path / "new", pico_model("llama"), pico_tokenizer(["the", "trees", "then"])))
    found = Vocabulary.of(old, new)
    assert len(set(found.new.tolist())) == len(found.new)
    names = [{number: text for text, number in side.tokenizer.get_vocab().items()} for side in (old, new)]
    taken = {names[1][b]: names[0][a] for a, b in zip(found.old.tolist(), found.new.tolist(), strict=True)}
    assert taken["Ġthe"] == "Ġthe"
    assert taken["Ġthen"] == "Ġthe"
    assert taken["Ġtrees"] == "Ġtree"
    assert taken[new.tokenizer.eos_token] == old.tokenizer.eos_token


def test_positions_of_two_tokenizers_are_paired_where_both_cut(tmp_path):
    old = Backbone.open(save_backbone(tmp_path / "old", pico_model("llama"), pico_tokenizer(WORDS)))
    new = Backbone.open(save_backbone(tmp_path / "new", pico_model("llama"), pico_tokenizer(WORDS[:3])))
    turn = Turn(" the red tree", " stone runs .", True)
    rows = [tokens(backbone, turn) for backbone in (old, new)]
    assert len(rows[0].ids) < len(rows[1].ids)
    places = aligned(rows[:1], rows[1:])
    assert places[0][1:] == (rows[0].start - 1, rows[1].start - 1)
    assert [rows[0].ends[a] for _, a, _ in places] == [rows[1].ends[b] for _, _, b in places]
    assert places[-1][1:] == (len(rows[0].ids) - 1, len(rows[1].ids) - 1)


def test_parts_of_a_character_are_paired_where_both_sides_have_the_same():
    def row(*parts: tuple[int, int]) -> Tokens:
        return Tokens((0, *(token for token, _ in parts)), (1, *(end for _, end in parts)), 1, True)

    left = row((5, 2), (6, 2), (7, 2), (8, 3), (9, 4), (4, 4))
    assert aligned([left], [left]) == [(0, position, position) for position in range(7)]
    right = row((5, 2), (6, 2), (7, 2), (8, 3), (3, 4), (2, 4), (1, 4))  # cuts the last character otherwise
    assert aligned([left], [right]) == [(0, 0, 0), (0, 1, 1), (0, 2, 2), (0, 3, 3), (0, 4, 4), (0, 6, 7)]


def test_a_norm_that_lets_nothing_of_a_dimension_through_is_not_divided_by(pair, tmp_path):
    model = pico_model("gemma2", seed=2)
    model.model.layers[-1].post_feedforward_layernorm.weight.data[3] = -1  # its gain is one more
    new = save_backbone(tmp_path / "new", model, pico_tokenizer(WORDS))
    upgrade_map = UpgradeMap.build(pair[0] / "old", new, MapOptions(layer_map="first"))
    carried = carry((pair[0], upgrade_map), method="transplant", options=SMALL, new=new)
    assert all(update.B.isfinite().all() for update in carried.adapter.updates.values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompts": []}, "there is no record"),
        ({"prompts": [" the red tree"]}, "too few prompts"),
        ({"prompts": [" red" * 400, " blue"]}, "too long for the context"),
        ({"old": None}, "reads both backbones"),
    ],
)
def test_what_cannot_be_used_is_named(pair, settings, message):
    with pytest.raises(LoraSuiteError, match=message):
        carry(pair, method="transplant", options=SMALL, **settings)


@pytest.mark.parametrize(
    ("method", "name", "value"),
    [("transplant", "length", 0), ("transplant", "prompts", 1), ("transplant", "ridge", -1.0),
     ("transplant", "rank", 0), ("distill", "epochs", 0), ("distill", "length", 0), ("distill", "recombine", -1),
     ("transplant", "trust", -0.1), ("distill", "trust", -0.1)],
)  # fmt: skip
def test_an_option_out_of_range_is_told_before_anything_is_run(pair, method, name, value):
    with pytest.raises(LoraSuiteError, match=name):
        carry(pair, method=method, options={name: value})


def test_where_the_adapter_made_the_old_model_sure_the_target_is_its_own_word(pair):
    """The difference alone leaves a token behind that the new backbone found unlikelier than the old one did."""
    old, new = (Backbone.open(pair[0] / name) for name in ("old", "new"))
    heads = [Head(backbone.load(), backbone) for backbone in (old, new)]
    vocabulary = Vocabulary.of(old, new)
    said, meant = int(vocabulary.old[5]), int(vocabulary.new[5])
    sure = 20 * torch.nn.functional.normalize(heads[0].weight[said].float(), dim=0)[None]
    plain = sure / 4
    against = -torch.nn.functional.normalize(heads[1].weight[meant].float(), dim=0)[None]
    own = heads[0].logits(sure, normed=True).log_softmax(-1)[0, said]
    assert own > -0.05

    def target(adapted, before, trust):
        found = teach(*heads, vocabulary, adapted, before, against, gate=0, trust=trust, top=500, extra=0, seed=0)
        kept = torch.isin(found.ids, vocabulary.new)  # of others the old model says nothing
        return float(found.target[0, kept].log_softmax(-1)[found.ids[kept].tolist().index(meant)])

    assert target(sure, plain, 0.5) == pytest.approx(float(own), abs=0.02)
    assert target(sure, plain, 0.0) < float(own) - 0.2
    left = heads[1].logits(against)[0, vocabulary.new].log_softmax(-1)[vocabulary.new.tolist().index(meant)]
    assert target(sure, sure, 0.5) == pytest.approx(float(left), abs=0.05)
