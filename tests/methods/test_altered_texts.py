"""Altered texts for the distillation of a classifier."""

from __future__ import annotations

import pytest

from peft_lorasuite.methods.behavior.altered_texts import altered
from peft_lorasuite.text.texts import Text, parse_text

TEXTS = [Text("red cat sits on the old mat"), Text("blue dogs run to big trees today"), Text("why not")]


def test_words_are_left_out_or_joined_from_two_texts() -> None:
    known = [set(text.text.split(" ")) for text in TEXTS]
    joined = 0
    for seed in range(40):
        found = altered(TEXTS, seed)
        assert len(found) == len(TEXTS)
        for own, one in zip(known, found, strict=True):
            words = set(one.text.split(" "))
            assert words
            assert any(words <= own | other for other in known)
            joined += not words <= own
    assert 15 < joined < 60  # of 120: half are joined, some of them with themselves
    assert altered(TEXTS, 3) == altered(TEXTS, 3) != altered(TEXTS, 4)


def test_pairs_and_lists_of_words_stay_what_they_are() -> None:
    pairs = [Text("red cat", "blue bird"), Text("old dog runs", "new tree")]
    assert all(one.pair for seed in range(20) for one in altered(pairs, seed))
    assert {word for seed in range(20) for one in altered(pairs, seed) for word in one.text.split()} == {
        "red", "cat", "old", "dog", "runs"
    }  # fmt: skip
    lists = [parse_text({"tokens": ["New", "York", "is", "big"]}, "1"), parse_text({"tokens": ["a b", "c"]}, "2")]
    for seed in range(20):
        for one in altered(lists, seed):
            words = [one.text[start:end] for start, end in one.words]
            assert words
            assert set(words) <= {"New", "York", "is", "big", "a b", "c"}
            assert one.text == " ".join(words)


@pytest.mark.parametrize("text", ["x", " ", "今日はいい天気です", "a\nb c"])
def test_no_text_becomes_empty(text: str) -> None:
    found = [one.text for seed in range(30) for one in altered([Text(text)], seed)]
    assert all(found)
    assert all(one.strip() or not text.strip() for one in found)
    assert len(set(found)) > 1 or len(text) < 2
