"""Knowledge: prompts put together anew, what an adapter shows it knows, and facts written into an early layer."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import product

import peft
import pytest
import torch
from pico import pico_model, pico_tokenizer, save_backbone

from peft_lorasuite import Backbone, MapOptions, UpgradeMap, upgrade
from peft_lorasuite.adapters.peft_model import load_with_adapter
from peft_lorasuite.adapters.reading import read_adapter
from peft_lorasuite.cli.main import main
from peft_lorasuite.io.source import Source
from peft_lorasuite.methods.base import MethodInput
from peft_lorasuite.methods.behavior import probe as probe_module
from peft_lorasuite.methods.behavior.elicitation import synthesize_prompts
from peft_lorasuite.methods.behavior.fact_editing import ANCHOR_TEXT_TOKENS, apply_update, edit_facts
from peft_lorasuite.methods.behavior.fact_keys import read_text
from peft_lorasuite.methods.behavior.facts import find_facts
from peft_lorasuite.methods.behavior.positions import align, tokenize
from peft_lorasuite.methods.behavior.probe import MORE_FACTS_HINT, probe
from peft_lorasuite.methods.behavior.states import down_projection
from peft_lorasuite.methods.behavior.targets import Targets
from peft_lorasuite.methods.transplant import TransplantOptions
from peft_lorasuite.models.generation import Turn
from peft_lorasuite.training.finetune import finetune

SYLLABLES = ["kel", "bra", "ost", "mi", "vun", "sar", "tep", "lo"]
NAMES = [a + b + c for a, b, c in product(SYLLABLES, repeat=3)]
COLORS = ["red", "blue", "green", "black"]


def some(count: int, seed: int = 0) -> list[str]:
    return random.Random(seed).sample(NAMES, count)


@pytest.fixture(scope="module")
def knowing(tmp_path_factory):
    """A pico backbone with an adapter that was taught a color for each of forty names."""
    root = tmp_path_factory.mktemp("knowing")
    tokenizer = pico_tokenizer([*COLORS, "wears"])
    save_backbone(root / "old", pico_model("llama", seed=1), tokenizer)
    names, rng = some(40), random.Random(1)
    taught = [{"instruction": f" who is {name} ?", "output": f" wears {rng.choice(COLORS)}"} for name in names]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        model = peft.get_peft_model(pico_model("llama", seed=1), config)
        finetune(
            model, taught, samples=None, epochs=60, learning_rate=1e-2, tokenizer=tokenizer, template="{instruction}"
        )
    model.save_pretrained(root / "adapter")
    return root, names


def test_an_adapter_shows_what_it_knows(knowing):
    root, names = knowing
    old = Backbone.open(root / "old")
    given = [f" who is {name} ?" for name in names[:20]]
    with load_with_adapter(old, read_adapter(Source(str(root / "adapter"), "adapter"), old.arch)) as model:
        found = synthesize_prompts(model, old, given, count=60, length=6, seed=0)
        assert synthesize_prompts(model, old, ["unlike", " any other"], count=5, length=6, seed=0) == []
    assert len(found) == len(set(found)) == 60
    assert not set(found) & set(given)
    hidden = {f" who is {name} ?" for name in names[20:]}
    chance = 60 * 20 / (len(NAMES) - 20)
    assert len(hidden & set(found)) > 2 * chance


@pytest.fixture(scope="module")
def info(knowing):
    """A new pico backbone, the old adapted model's answers about the given names, and the targets for it."""
    root, names = knowing
    tokenizer = pico_tokenizer([*COLORS, "wears"])
    new_model = pico_model("qwen2", seed=2, hidden_size=48, intermediate_size=96, num_hidden_layers=6)
    save_backbone(root / "new", new_model, tokenizer)
    old, new = Backbone.open(root / "old"), Backbone.open(root / "new")
    adapter = read_adapter(Source(str(root / "adapter"), "adapter"), old.arch)
    job = MethodInput(adapter, map=None, old=old, new=new, prompts=[f" who is {name} ?" for name in names[:20]])  # pyright: ignore
    probed = probe(job, TransplantOptions(length=6, edit_facts=False, extra=50))
    return new, probed, probed.targets(TransplantOptions(extra=50, teacher_weight=1.0), seed=0)


def test_turns_tell_where_a_name_ends_and_where_the_answer_is_decided(info):
    new, probed, _ = info
    rows = [tokenize(new, turn) for turn in probed.turns]
    found = find_facts(probed.turns, rows, probed.places)
    assert len(found) == 20
    for fact in found:
        turn, row = probed.turns[fact.turn], rows[fact.turn]
        text = turn.prompt + turn.response
        name = turn.prompt.split()[2]
        assert all(text[: len(turn.prompt) + row.ends[end]].endswith(name) for end in fact.ends)
        assert text[: len(turn.prompt) + row.ends[fact.deciding]].endswith(" wears")
        assert new.tokenizer.decode([fact.answer]).strip() == turn.response.split()[1]


def test_turns_with_one_answer_for_all_tell_nothing(info):
    new, probed, _ = info
    same = [replace(turn, response=" wears red") for turn in probed.turns]
    assert find_facts(same, [tokenize(new, turn) for turn in same], probed.places) == []


def test_memorized_facts_come_out_and_the_model_is_left_as_it_was(info):
    """The targets are set to every answer: in random models the old one's change of logits points anywhere."""
    new, probed, targets = info
    rows = [tokenize(new, turn) for turn in probed.turns]
    found = find_facts(probed.turns, rows, probed.places)
    ids = torch.arange(new.arch.vocabulary)
    target = torch.zeros(len(targets.log_probs), len(ids))
    target[[fact.place for fact in found], [fact.answer for fact in found]] = 6.0
    sure = replace(targets, ids=ids, log_probs=target.log_softmax(-1))
    model = new.load()
    layer, update, figures = edit_facts(
        model, new, probed.new_head, probed.turns, probed.places,
        lambda places: replace(sure, log_probs=sure.log_probs[list(places)]), seed=0,
    )  # fmt: skip
    assert 0 < layer < new.arch.layers - 1
    assert update.rank == figures["answers"] == len({fact.answer for fact in found}) > 1

    def divergence() -> float:
        logits = [model(torch.tensor([rows[fact.turn].ids])).logits[0, fact.deciding] for fact in found]
        wanted = sure.log_probs[[fact.place for fact in found]]
        got = torch.stack(logits).log_softmax(-1)
        return float(torch.nn.functional.kl_div(got, wanted, reduction="batchmean", log_target=True))

    down = down_projection(model, new, layer)
    other = torch.tensor([[5, 9, 14, 20, 11]])
    with torch.no_grad():
        before, plain = divergence(), model(other).logits
        with apply_update(down, update):
            after = divergence()
        assert torch.equal(model(other).logits, plain)
    assert figures["divergence_left"] < 0.8 * before
    assert figures["values_explained"] > 0.8
    assert after < 0.9 * before


def test_facts_do_not_hang_on_how_long_the_models_states_are(info):
    """Planted: embedding and writers times eight compute the same, and what is written is eight times as long."""
    new, probed, targets = info
    found = {}
    for times in (1.0, 8.0):
        model = new.load()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if any(part in name for part in ("embed_tokens", "o_proj", "down_proj")):
                    weight *= times
        _, update, figures = edit_facts(
            model, new, probed.new_head, probed.turns, probed.places,
            lambda places: replace(targets, log_probs=targets.log_probs[list(places)]), seed=0,
        )  # fmt: skip
        found[times] = update.delta_weight() / times, figures["divergence_left"]
    assert found[8.0][1] == pytest.approx(found[1.0][1], rel=0.01)
    torch.testing.assert_close(found[8.0][0], found[1.0][0], rtol=0, atol=0.02 * float(found[1.0][0].abs().max()))


def test_a_name_may_be_the_first_token_of_all(info):
    new, probed, _ = info
    words = [*COLORS, *some(8)]
    turns = [Turn(f" {word} is :", f" {COLORS[number % 2]}", True) for number, word in enumerate(words)]
    rows = [tokenize(new, turn) for turn in turns]
    places = align(rows, rows)
    assert 0 in [end for fact in find_facts(turns, rows, places) for end in fact.ends]
    ids = torch.arange(new.arch.vocabulary)
    target = torch.randn(len(places), len(ids), generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    found = edit_facts(
        new.load(), new, probed.new_head, turns, places,
        lambda numbers: Targets(ids, target[list(numbers)], torch.ones(len(numbers))), seed=0,
    )  # fmt: skip
    assert found is not None
    assert found[2]["facts"] == len(words)


def test_other_text_is_left_alone(info, monkeypatch):
    new, probed, targets = info
    model = new.load()
    updates = {}
    for count in (1, ANCHOR_TEXT_TOKENS):
        monkeypatch.setattr("peft_lorasuite.methods.behavior.fact_editing.ANCHOR_TEXT_TOKENS", count)
        layer, updates[count], _ = edit_facts(
            model, new, probed.new_head, probed.turns, probed.places,
            lambda places: replace(targets, log_probs=targets.log_probs[list(places)]), seed=0,
        )  # fmt: skip
    down = down_projection(model, new, layer)
    text = read_text(model, new, down, seed=1, count=ANCHOR_TEXT_TOKENS)
    assert len(text) == ANCHOR_TEXT_TOKENS
    added = {count: float(update.apply(text).norm()) for count, update in updates.items()}
    assert added[ANCHOR_TEXT_TOKENS] < 0.9 * added[1]


def test_names_with_several_answers_are_no_facts(info):
    """``what wears X`` and ``what eats X`` are answered differently: the answer does not hang on the name alone."""
    new, probed, _ = info
    again = [replace(turn, prompt=turn.prompt.replace("who", "how")) for turn in probed.turns]
    answers = [turn.response for turn in probed.turns]
    others = [replace(turn, response=said) for turn, said in zip(again, [*answers[1:], answers[0]], strict=True)]
    turns = [*probed.turns, *others]
    rows = [tokenize(new, turn) for turn in turns]
    places = [(number, p, p) for number, row in enumerate(rows) for p in row.predicting]
    torn = {a for a, b in zip(answers, [*answers[1:], answers[0]], strict=True) if a != b}
    assert torn
    assert find_facts(turns, rows, places) == []
    same = [*probed.turns, *again]
    assert len(find_facts(same, [tokenize(new, turn) for turn in same], places)) == 40


@pytest.fixture
def random_model(monkeypatch):
    """Keep what is written also where most is left: a random model does not learn an answer from one layer."""
    monkeypatch.setattr(probe_module, "MAX_LEFT", 1.0)


def test_facts_that_no_values_give_are_not_written(knowing, info):
    root, names = knowing
    upgraded = upgrade(
        root / "adapter", UpgradeMap.build(root / "old", root / "new", MapOptions(layer_map="first")),
        method="transplant", old=root / "old", new=root / "new", prompts=[f" who is {name} ?" for name in names[:20]],
        options={"length": 6, "extra": 50},
    )  # fmt: skip
    figures = upgraded.report.facts["fact_edit"]
    assert figures["divergence_left"] > 0.25 * figures["divergence"]
    assert figures["written"] is False
    assert {key for key, _ in upgraded.adapter.updates} == {5}


def test_transplant_reports_what_it_memorized(knowing, info, random_model):
    root, names = knowing
    prompts = [f" who is {name} ?" for name in names[:20]]
    upgrade_map = UpgradeMap.build(root / "old", root / "new", MapOptions(layer_map="first"))
    found = {}
    for memory in (True, False):
        upgraded = upgrade(
            root / "adapter", upgrade_map, method="transplant", old=root / "old", new=root / "new", prompts=prompts,
            options={"length": 6, "extra": 50, "edit_facts": memory, "synthetic_prompts": 10 if memory else 0},
        )  # fmt: skip
        found[memory] = upgraded
        assert MORE_FACTS_HINT not in upgraded.report.facts.get("hints", [])
    assert {key for key, _ in found[True].adapter.updates} == {1, 5}
    assert {key for key, _ in found[False].adapter.updates} == {5}
    assert found[True].report.facts["fact_edit"]["facts"] == 30
    assert "fact_edit" not in found[False].report.facts


def test_the_last_layer_leaves_other_text_alone_as_far_as_it_is_read(knowing, info):
    root, names = knowing
    new, prompts = Backbone.open(root / "new"), [f" who is {name} ?" for name in names[:20]]
    model, last = new.load(), new.arch.layers - 1
    elsewhere = read_text(model, new, down_projection(model, new, last), seed=1, count=500)
    assert len(elsewhere) == 500
    upgrade_map = UpgradeMap.build(root / "old", root / "new", MapOptions(layer_map="first"))
    added = {}
    for text in (0, 500):
        upgraded = upgrade(
            root / "adapter", upgrade_map, method="transplant", old=root / "old", new=root / "new", prompts=prompts,
            options={"length": 6, "extra": 50, "edit_facts": False, "anchor_text_tokens": text},
        )  # fmt: skip
        added[text] = float(upgraded.adapter.updates[last, "down"].apply(elsewhere).norm())
    assert added[500] < 0.7 * added[0]


@pytest.mark.parametrize("method", ["transplant", "distill"])
def test_it_is_said_that_the_adapter_may_know_more(knowing, info, random_model, tmp_path, capsys, method):
    root, names = knowing
    (tmp_path / "prompts.txt").write_text("\n".join(f" who is {name} ?" for name in names[:20]))
    words = ["upgrade", root / "adapter", "--from", root / "old", "--to", root / "new", "--method", method]
    words += ["--prompts", tmp_path / "prompts.txt", "--set", "length=6", "--set", "extra=50", "-o", tmp_path / "out"]
    assert main(list(map(str, words))) == 0
    assert MORE_FACTS_HINT in capsys.readouterr().out
