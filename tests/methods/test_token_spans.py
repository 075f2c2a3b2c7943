"""Answers whose tokens are several tokens of the old model: what comes after the first of these is not lost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from pico import pico_model, pico_tokenizer, save_backbone, unrelated_pair

from peft_lorasuite import Backbone, MapOptions, UpgradeMap, finetune, upgrade
from peft_lorasuite.methods.behavior.continuations import deciding_positions
from peft_lorasuite.methods.behavior.options import TransplantOptions
from peft_lorasuite.methods.behavior.positions import Tokens, align, covered_positions, pair_places, tokenize
from peft_lorasuite.methods.behavior.targets import Head, build_targets
from peft_lorasuite.methods.behavior.token_pairs import PlaceVocabularies, Vocabulary
from peft_lorasuite.model import attach
from peft_lorasuite.models.generation import Turn, answer

WORDS = ["red", "blue", "gray", "pink", "sun"]
ANSWERS = {"red": "suns", "blue": "sunk", "gray": "suns", "pink": "sunk"}
TEMPLATE = "{instruction} is"
PROMPTS = [f"{word} is" for word in ANSWERS]
OPTIONS: dict[str, dict[str, Any]] = {
    "distill": {"length": 8, "epochs": 40, "learning_rate": 1e-2, "anchor_text_tokens": 100},
    "transplant": {"length": 8, "rank": 16},
}
Pair = tuple[Backbone, Backbone, Path, UpgradeMap]


@pytest.fixture(scope="module", params=[("suns", "sunk"), ("suns",)], ids=["both words", "one word"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The old tokenizer spells what follows ``sun``; the new one knows both words, or has ``sun`` before ``k``."""
    home = tmp_path_factory.mktemp("spans")
    spelled, whole = pico_tokenizer(WORDS), pico_tokenizer([*WORDS, *request.param])
    old = save_backbone(home / "old", pico_model("llama", 1, vocab_size=len(spelled)), spelled)
    new = save_backbone(home / "new", pico_model("qwen2", 2, vocab_size=len(whole), hidden_size=48), whole)
    assert len(spelled(" suns")["input_ids"]) > len(whole(" suns")["input_ids"]) == 1
    torch.manual_seed(0)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(Backbone.open(old).load(dtype="float32"), config)
    examples = [{"instruction": word, "output": f" {answer}"} for word, answer in ANSWERS.items()]
    finetune(
        model, examples, tokenizer=spelled, template=TEMPLATE, epochs=60, batch_size=4, learning_rate=1e-2,
        output=home / "lora",
    )  # fmt: skip
    return (
        Backbone.open(old),
        Backbone.open(new),
        home / "lora",
        UpgradeMap.build(old, new, MapOptions(layer_map="first")),
    )


def right(model: Any, backbone: Backbone) -> float:
    """Return the share of right answers."""
    turns = answer(model.eval(), backbone, PROMPTS, length=8)
    return sum(turn.response.strip() == ANSWERS[word] for turn, word in zip(turns, ANSWERS, strict=True)) / len(turns)


@pytest.mark.parametrize("method", list(OPTIONS))
def test_answers_arrive_whole(method: str, pair: Pair) -> None:
    old, new, adapter, built = pair
    assert right(peft.PeftModel.from_pretrained(old.load(dtype="float32"), str(adapter)), old) == 1.0
    upgraded = upgrade(adapter, built, method=method, options=OPTIONS[method], old=old, new=new, prompts=PROMPTS)
    assert right(attach(new.load(dtype="float32"), upgraded), new) == 1.0


NAMES = ["red", "blue", "tree", "stone", "river", "cloud", "small", "big", "runs", "sleeps"]


@pytest.fixture(scope="module")
def unrelated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Backbone, Backbone]:
    """Two unrelated pico backbones with one vocabulary."""
    old, new = unrelated_pair(tmp_path_factory.mktemp("unrelated"), NAMES)
    return Backbone.open(old), Backbone.open(new)


@pytest.mark.parametrize("usual", [True, False])
def test_a_new_token_that_is_several_old_ones_has_the_probability_of_all_of_them(unrelated, usual):
    """What is left of the first old token's probability goes to the tokens that follow none."""
    old, new = unrelated
    heads = [Head(backbone.load(), backbone) for backbone in (old, new)]
    vocabulary = Vocabulary.pair(old, new)
    first, whole = int(vocabulary.old[5]), int(vocabulary.new[5 if usual else 7])
    sure = 20 * torch.nn.functional.normalize(heads[0].weight[first].float(), dim=0)[None]
    own = float(heads[0].logits(sure, normed=True).softmax(-1)[0, first])
    states = torch.randn(1, 48, generator=torch.Generator().manual_seed(1))

    def target(after, before):
        places = PlaceVocabularies.same(vocabulary, 1)
        further = torch.tensor([[after, before]]).log()
        places = replace(places, following=torch.tensor([[first, whole]]), further=further)
        found = build_targets(
            *heads, places, sure, sure / 4, states, TransplantOptions(teacher_weight=1.0, top=500, extra=0), seed=0
        )
        return found.log_probs.exp()[0][found.ids.argsort()], float(found.confidence[0])

    probabilities, confidence = target(0.9, 0.1)
    assert float(probabilities[whole]) == pytest.approx(0.9 * own, abs=0.01)
    follows = torch.isin(torch.arange(len(probabilities)), vocabulary.new)
    assert float(probabilities[~follows].sum()) == pytest.approx(0.1 * own, abs=0.02)
    alone, certain = target(1.0, 1.0)
    assert float(alone[whole]) == pytest.approx(own, abs=0.01)
    assert certain > confidence > 0


def two_that_share(unrelated: tuple[Backbone, Backbone]) -> tuple[list[Head], Vocabulary, tuple[int, int, int]]:
    """Return the heads, a vocabulary in which two new tokens follow one old token, and the three tokens."""
    heads, vocabulary = [Head(one.load(), one) for one in unrelated], Vocabulary.pair(*unrelated)
    first, right, longer = int(vocabulary.old[5]), int(vocabulary.new[5]), int(vocabulary.new[7])
    shared = vocabulary.old.clone().index_fill_(0, torch.tensor([7]), first)
    return heads, Vocabulary(shared, vocabulary.new), (first, right, longer)


@pytest.mark.parametrize("kept", [0.9, 0.0, None])
def test_longer_tokens_share_what_the_old_text_leaves_them(unrelated, kept):
    """``-`` and ``-w`` follow the old ``-``: where the old text goes on with another token, ``-w`` gets little."""
    heads, vocabulary, (first, right, longer) = two_that_share(unrelated)
    sure = 20 * torch.nn.functional.normalize(heads[0].weight[first].float(), dim=0)[None]
    own = float(heads[0].logits(sure, normed=True).softmax(-1)[0, first])
    states = torch.randn(1, 48, generator=torch.Generator().manual_seed(1))
    before = heads[1].logits(states).softmax(-1)[0]
    share = float(before[right] / (before[right] + before[longer]))
    afterwards = torch.full((1, 2), torch.nan) if kept is None else torch.tensor([[kept, 0.5]]).log()
    places = replace(
        PlaceVocabularies.same(vocabulary, 1), following=torch.tensor([[first, right]]), afterwards=afterwards
    )
    assert places.shared.tolist() == [True]
    settings = TransplantOptions(teacher_weight=1.0, top=500, extra=0)
    found = build_targets(*heads, places, sure, sure / 4, states, settings, seed=0)
    probabilities = found.log_probs.exp()[0][found.ids.argsort()]
    wanted = share if kept is None else kept + (1 - kept) * share
    assert float(probabilities[right]) == pytest.approx(own * wanted, abs=0.01)
    assert float(probabilities[longer]) == pytest.approx(own * (1 - wanted), abs=0.01)


@pytest.mark.parametrize(
    ("answer", "ended", "decide"),
    [
        (" sun red", True, ["red"]),
        (" sung red", False, ["g"]),
        (" sunkg", True, ["k", "g"]),
        (" sunk", True, ["k", "</s>"]),  # the end of the answer comes where `sunky` would go on
        (" sunk", False, []),  # cut: it may go on
    ],
)
def test_the_old_tokens_decide_as_far_as_a_longer_token_goes_on_with_them(answer, ended, decide, tmp_path):
    """The new ``sun``, ``sunk`` and ``sunky`` follow the old ``sun``; the old tokenizer spells what comes after it."""
    old, new = (
        Backbone.open(save_backbone(tmp_path / name, pico_model("llama", vocab_size=len(known)), known))
        for name, known in (("old", pico_tokenizer(WORDS)), ("new", pico_tokenizer([*WORDS, "sunky"])))
    )
    turns = [Turn(" the", answer, ended), Turn(" the", " red blue gray pink", True)]
    left, right = ([tokenize(one, turn) for turn in turns] for one in (old, new))
    places = align(left, right)
    pairs = PlaceVocabularies.pair(old, new, pair_places(left, right, places))
    found = deciding_positions(old, new, left, places, pairs)
    words = [old.tokenizer.decode([left[0].predicted(at)]).strip() for _, at in found[0]]
    assert words == decide


def test_a_longer_token_falls_although_the_old_model_was_sure_of_its_start_before(unrelated):
    """The adapter changes only what comes after the old token: the old base model went on as the longer token does."""
    heads, vocabulary, (first, right, longer) = two_that_share(unrelated)
    same = 20 * torch.nn.functional.normalize(heads[0].weight[first].float(), dim=0)[None]
    states = torch.randn(1, 48, generator=torch.Generator().manual_seed(1))
    before = heads[1].logits(states).softmax(-1)[0]
    for share in (0.0, 1.0):
        places = replace(
            PlaceVocabularies.same(vocabulary, 1), following=torch.tensor([[first, right]]),
            afterwards=torch.tensor([[0.999, 0.001]]).log(),
        )  # fmt: skip
        settings = TransplantOptions(teacher_weight=share, top=500, extra=0)
        found = build_targets(*heads, places, same, same, states, settings, seed=0)
        after = found.log_probs.exp()[0][found.ids.argsort()]
        assert after[right] / after[longer] > 100 * before[right] / before[longer]


def test_a_change_that_is_in_a_further_old_token_is_taught(unrelated):
    """The adapter changes nothing at the first old token, and all at the next one."""
    old, new = unrelated
    heads = [Head(backbone.load(), backbone) for backbone in (old, new)]
    vocabulary = Vocabulary.pair(old, new)
    first, whole = int(vocabulary.old[5]), int(vocabulary.new[7])
    same = 20 * torch.nn.functional.normalize(heads[0].weight[first].float(), dim=0)[None]
    states = torch.randn(1, 48, generator=torch.Generator().manual_seed(1))
    for share in (0.0, 1.0):
        places = PlaceVocabularies.same(vocabulary, 1)
        further = torch.tensor([[0.99, 0.001]]).log()
        places = replace(places, following=torch.tensor([[first, whole]]), further=further)
        settings = TransplantOptions(teacher_weight=share, top=500, extra=0)
        found = build_targets(*heads, places, same, same, states, settings, seed=0)
        before = float(heads[1].logits(states).softmax(-1)[0, whole])
        after = float(found.log_probs.exp()[0][found.ids.argsort()][whole])
        assert after > (0.95 if share else 10 * before)


def test_targets_are_probabilities_where_a_token_follows_another_one_than_usual(unrelated):
    """The old token that it usually follows has none left there: its probability goes to the rest."""
    old, new = unrelated
    heads = [Head(backbone.load(), backbone) for backbone in (old, new)]
    vocabulary = Vocabulary.pair(old, new)
    first, usual, whole = int(vocabulary.old[5]), int(vocabulary.old[7]), int(vocabulary.new[7])
    rows = torch.stack([heads[0].weight[one].float() for one in (first, usual)])
    both = 20 * torch.linalg.pinv(rows).sum(dim=1)[None]  # the old model finds both equally likely
    probabilities = heads[0].logits(both, normed=True).softmax(-1)[0]
    assert min(float(probabilities[first]), float(probabilities[usual])) > 0.2
    states = torch.randn(1, 48, generator=torch.Generator().manual_seed(1))
    places = replace(PlaceVocabularies.same(vocabulary, 1), following=torch.tensor([[first, whole]]))
    settings = TransplantOptions(teacher_weight=1.0, change_threshold=1e-6, top=500, extra=0)
    found = build_targets(*heads, places, both, both / 9, states, settings, seed=0)
    got = float(found.log_probs.exp()[0][found.ids.argsort()][whole])
    assert got == pytest.approx(float(probabilities[first]), abs=0.02)


def row(*parts: tuple[int, int], length: int = 0) -> Tokens:
    """An answer of tokens and the characters at which they end, after one token of the prompt."""
    return Tokens((0, *(token for token, _ in parts)), (0, *(end for _, end in parts)), 1, True, length=length)


@pytest.mark.parametrize(
    ("old", "new", "wanted"),
    [
        (((5, 1), (6, 1), (7, 2)), ((9, 1), (8, 2)), [6]),  # two bytes of a character are one token
        (((5, 1), (6, 1), (7, 2), (8, 2)), ((9, 2),), [6, 7, 8]),  # so are two characters
        (((5, 1), (6, 1), (7, 2)), ((5, 1), (6, 1), (7, 2)), []),  # the same bytes on both sides
        (((5, 1), (6, 2)), ((9, 3),), [6]),  # and a line break of the template
        (((5, 1), (6, 3)), ((9, 2), (8, 3)), [6]),  # ends inside the old token
    ],
)
def test_old_tokens_in_a_new_one_are_covered(old, new, wanted):
    length = max(end for _, end in old)
    left, right = row(*old, length=length), row(*new, length=length)
    covered = covered_positions([left], [right], [(0, 0, 0)])
    assert [left.predicted(at) for _, at in covered[0]] == wanted


def test_positions_inside_a_new_token_are_covered_by_it(tmp_path):
    old = Backbone.open(save_backbone(tmp_path / "old", pico_model("llama"), pico_tokenizer(NAMES[:3])))
    new = Backbone.open(save_backbone(tmp_path / "new", pico_model("llama"), pico_tokenizer(NAMES)))
    turn = Turn(" the red tree", " stone runs .", True)
    left, right = [tokenize(old, turn)], [tokenize(new, turn)]
    assert len(left[0].ids) > len(right[0].ids)
    places = align(left, right)
    covered = covered_positions(left, right, places)
    for (_, p, q), several in zip(places, covered, strict=True):
        words = [left[0].predicted(at) for at in (p, *(at for _, at in several))]
        if right[0].predicted(q) != right[0].end:
            assert old.tokenizer.decode(words).strip() == new.tokenizer.decode([right[0].predicted(q)]).strip()
    assert sum(map(len, covered)) == len(left[0].ids) - left[0].start - len([q for _, _, q in places]) + 1
    assert covered_positions(left, left, align(left, left)) == [[]] * len(align(left, left))
