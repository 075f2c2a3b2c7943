"""The teacher: which probabilities are wanted where, and positions of two tokenizers that stand at one place."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from pico import pico_model, pico_tokenizer, save_backbone, unrelated_pair

from peft_lorasuite import Backbone
from peft_lorasuite.methods.behavior.options import TransplantOptions
from peft_lorasuite.methods.behavior.positions import Tokens, align, pair_places, tokenize
from peft_lorasuite.methods.behavior.targets import Head, build_targets
from peft_lorasuite.methods.behavior.token_pairs import Vocabulary
from peft_lorasuite.models.generation import Turn


def options(**chosen):
    """Options with the difference of logits alone, unless chosen otherwise."""
    return TransplantOptions(**{"teacher_weight": 0.0} | chosen)


WORDS = ["red", "blue", "tree", "stone", "river", "cloud", "small", "big", "runs", "sleeps"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two unrelated pico backbones with one vocabulary."""
    old, new = unrelated_pair(tmp_path_factory.mktemp("pair"), WORDS)
    return Backbone.open(old), Backbone.open(new)


@pytest.mark.parametrize("family", ["llama", "gemma2", "bloom", "phi", "minicpm"])
def test_a_head_that_was_released_gives_the_same_logits(family, tmp_path):
    """Tied or not, with a bias, a cap or a scaling."""
    backbone = Backbone.open(save_backbone(tmp_path, pico_model(family), pico_tokenizer(WORDS)), dtype="float32")
    head, states = Head(backbone.load(), backbone), torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    before = head.logits(states)
    weight = weakref.ref(head.weight)
    head.release(backbone)
    gc.collect()
    assert weight() is None
    assert torch.equal(head.logits(states), before)


def test_a_model_in_memory_keeps_its_head():
    model = pico_model("llama")
    backbone = Backbone.open(model)
    head = Head(model, backbone)
    head.release(backbone)
    assert head.weight.data_ptr() == model.get_output_embeddings().weight.data_ptr()


def test_what_the_adapter_leaves_alone_stays_as_the_new_model_has_it(pair):
    """Also where the old model knows nothing, as of a choice that the adapter did not teach."""
    old, new = pair
    heads = [Head(backbone.load(), backbone) for backbone in (old, new)]
    states = torch.randn(3, 48, generator=torch.Generator().manual_seed(1))
    unsure = torch.zeros(3, 32)
    teacher = build_targets(
        *heads, Vocabulary.pair(old, new), unsure, unsure, states, options(teacher_weight=1.0, top=64, extra=60), seed=0
    )
    assert float(teacher.confidence.max()) == 0
    expected = heads[1].restrict(teacher.ids).logits(states).log_softmax(-1)
    torch.testing.assert_close(teacher.log_probs, expected, atol=1e-4, rtol=1e-4)


def test_of_prompts_without_a_task_only_sure_answers_are_taught(pair):
    old, new = pair
    heads = [Head(backbone.load(), backbone) for backbone in (old, new)]
    states = torch.randn(2, 48, generator=torch.Generator().manual_seed(1))
    sure = 20 * torch.nn.functional.normalize(heads[0].weight[50].float(), dim=0)
    adapted = torch.stack([sure, torch.zeros(32)])
    plain = torch.randn(2, 32, generator=torch.Generator().manual_seed(2))
    settings = options(teacher_weight=1.0, top=500, extra=0)
    every, certain = (
        build_targets(*heads, Vocabulary.pair(old, new), adapted, plain, states, settings, seed=0, sure_only=only)
        for only in (False, True)
    )
    unchanged = heads[1].restrict(certain.ids).logits(states).log_softmax(-1)
    torch.testing.assert_close(certain.log_probs[1], unchanged[1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(certain.log_probs[0], every.log_probs[0])
    assert (every.log_probs[1] - unchanged[1]).abs().max() > 0.1


def test_the_confidence_judges_the_answers_and_changes_no_target(pair):
    old, new = pair
    heads = [Head(backbone.load(), backbone) for backbone in (old, new)]
    sure = 20 * torch.nn.functional.normalize(heads[0].weight[50].float(), dim=0)
    adapted, plain = torch.stack([sure, torch.zeros(32)]), torch.zeros(2, 32)
    found = build_targets(
        *heads, Vocabulary.pair(old, new), adapted, plain, torch.zeros(2, 48), options(top=9, extra=9), seed=0
    )
    assert found.confidence.tolist() == [1.0, 0.0]
    changed = heads[1].restrict(found.ids).logits(torch.zeros(2, 48)).log_softmax(-1) - found.log_probs
    assert float(changed[0].abs().max()) > 1


def test_the_confidence_falls_between_half_its_bound_and_the_bound(pair):
    old, new = pair
    heads = [Head(backbone.load(), backbone) for backbone in (old, new)]
    aim = torch.nn.functional.normalize(heads[0].weight[50].float(), dim=0)
    states = torch.linspace(1, 20, 60)[:, None] * aim
    after = heads[0].logits(states, normed=True).log_softmax(-1)
    entropy = -(after.exp() * after).sum(-1)
    found = build_targets(
        *heads,
        Vocabulary.pair(old, new),
        states,
        states,
        torch.zeros(60, 48),
        options(top=9, extra=9),
        seed=0,
    ).confidence
    assert (found[entropy >= 0.5] == 0).all()
    assert (found[entropy <= 0.25] == 1).all()
    between = (entropy > 0.25) & (entropy < 0.5)
    assert min((entropy >= 0.5).sum(), (entropy <= 0.25).sum(), between.sum()) > 3
    torch.testing.assert_close(found[between], 2 - 4 * entropy[between])


def test_a_token_of_the_new_side_alone_moves_with_the_one_it_begins_with(tmp_path):
    """Else all the words that the old model has fall behind those that it lacks."""
    old = Backbone.open(save_backbone(tmp_path / "old", pico_model("llama"), pico_tokenizer(["the", "tree"])))
    new = Backbone.open(save_backbone(tmp_path / "new", pico_model("llama"), pico_tokenizer(["the", "trees", "then"])))
    found = Vocabulary.pair(old, new)
    assert len(set(found.new.tolist())) == len(found.new)
    names = [{number: text for text, number in side.tokenizer.get_vocab().items()} for side in (old, new)]
    taken = {names[1][b]: names[0][a] for a, b in zip(found.old.tolist(), found.new.tolist(), strict=True)}
    assert taken["Ġthe"] == "Ġthe"
    assert taken["Ġthen"] == "Ġthe"
    assert taken["Ġtrees"] == "Ġtree"
    assert taken[new.tokenizer.eos_token] == old.tokenizer.eos_token


def test_where_the_adapter_changed_the_prediction_the_target_is_that_of_the_old_adapted_model(pair):
    """The difference alone leaves a token behind that the new backbone found unlikelier than the old one did."""
    old, new = pair
    heads = [Head(backbone.load(), backbone) for backbone in (old, new)]
    vocabulary = Vocabulary.pair(old, new)
    said, meant = int(vocabulary.old[5]), int(vocabulary.new[5])
    sure = 20 * torch.nn.functional.normalize(heads[0].weight[said].float(), dim=0)[None]
    plain = sure / 4
    against = -torch.nn.functional.normalize(heads[1].weight[meant].float(), dim=0)[None]
    own = heads[0].logits(sure, normed=True).log_softmax(-1)[0, said]
    assert own > -0.05

    def target(adapted, before, share):
        found = build_targets(
            *heads,
            vocabulary,
            adapted,
            before,
            against,
            options(teacher_weight=share, top=500, extra=0),
            seed=0,
        )
        kept = torch.isin(found.ids, vocabulary.new)  # of others the old model says nothing
        return float(found.log_probs[0, kept].log_softmax(-1)[found.ids[kept].tolist().index(meant)])

    assert target(sure, plain, 1.0) == pytest.approx(float(own), abs=0.02)
    assert target(sure, plain, 0.0) < float(own) - 0.2
    left = heads[1].logits(against)[0, vocabulary.new].log_softmax(-1)[vocabulary.new.tolist().index(meant)]
    assert target(sure, sure, 1.0) == pytest.approx(float(left), abs=0.05)


def test_a_share_of_a_half_lies_between_the_difference_and_the_old_models_own_word(pair):
    """However unsure the old adapted model is."""
    old, new = pair
    heads = [Head(backbone.load(), backbone) for backbone in (old, new)]
    states, doubts = (torch.randn(6, 48, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    adapted, plain = 3 * torch.nn.functional.normalize(
        torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(3)), dim=-1
    )

    def target(share):
        found = build_targets(
            *heads, Vocabulary.pair(old, new), adapted, plain, states + doubts,
            options(teacher_weight=share, top=500, extra=0), seed=0,
        )  # fmt: skip
        return found.log_probs

    difference, half, whole = (target(share) for share in (0.0, 0.5, 1.0))
    middle = ((difference + whole) / 2).log_softmax(-1)
    torch.testing.assert_close(half, middle, atol=1e-4, rtol=1e-4)
    assert (difference - whole).abs().max() > 0.5


def test_positions_of_two_tokenizers_are_paired_where_both_cut(tmp_path):
    old = Backbone.open(save_backbone(tmp_path / "old", pico_model("llama"), pico_tokenizer(WORDS)))
    new = Backbone.open(save_backbone(tmp_path / "new", pico_model("llama"), pico_tokenizer(WORDS[:3])))
    turn = Turn(" the red tree", " stone runs .", True)
    rows = [tokenize(backbone, turn) for backbone in (old, new)]
    assert len(rows[0].ids) < len(rows[1].ids)
    places = align(rows[:1], rows[1:])
    assert places[0][1:] == (rows[0].start - 1, rows[1].start - 1)
    inside = [place.inside for place in pair_places(rows[:1], rows[1:], places)]
    matched, within = (
        [one for one, off in zip(places, inside, strict=True) if off is value] for value in (False, True)
    )
    assert [rows[0].ends[a] for _, a, _ in matched] == [rows[1].ends[b] for _, _, b in matched]
    assert within
    for _, a, b in within:  # inside a token that the old model predicts as a whole
        assert rows[0].ends[a] < rows[1].ends[b] < rows[0].ends[a + 1]
    assert matched[-1][1:] == (len(rows[0].ids) - 1, len(rows[1].ids) - 1)


def test_parts_of_a_character_are_paired_where_both_sides_have_the_same():
    def row(*parts: tuple[int, int]) -> Tokens:
        return Tokens((0, *(token for token, _ in parts)), (1, *(end for _, end in parts)), 1, True)

    left = row((5, 2), (6, 2), (7, 2), (8, 3), (9, 4), (4, 4))
    assert align([left], [left]) == [(0, position, position) for position in range(7)]
    right = row((5, 2), (6, 2), (7, 2), (8, 3), (3, 4), (2, 4), (1, 4))  # cuts the last character otherwise
    assert align([left], [right]) == [(0, 0, 0), (0, 1, 1), (0, 2, 2), (0, 3, 3), (0, 4, 4), (0, 6, 7)]


def test_a_turn_without_an_answer_of_the_old_model_is_left_out():
    """The end of a turn can be longer in the new template than in the old one."""
    answered = Tokens((0, 5, 6, 7, 8), (1, 2, 3, 4, 5), 1, True)
    empty = Tokens((0,), (1,), 1, False, length=1)
    ended = Tokens((0, 5, 6), (1, 2, 3), 1, True, length=1)
    assert align([answered, empty], [answered, ended]) == align([answered], [answered])
