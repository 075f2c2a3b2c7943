"""`chat`: the answers are those of the models themselves, and a terminal can show them."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import command_fixtures
import peft
import pytest
import torch
from command_fixtures import Pair
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_lorasuite import LoraSuiteError
from peft_lorasuite.cli.chat_session import ask, format_columns, load_models
from peft_lorasuite.cli.main import main

pair = command_fixtures.pair
PROMPT = "the red cat"


def run(*words: Any) -> int:
    return main([str(word) for word in words])


@pytest.fixture(scope="module")
def upgraded(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("upgraded") / "new-lora"
    call = ["upgrade", pair.adapter, "--to", pair.new, "--map", pair.map, "--method", "lorasuite", "--quiet"]
    assert run(*call, "--set", "gain=3", "-o", folder) == 0
    return folder


def written(base: Path, adapter: Path | None, prompt: str, length: int) -> str:
    """What plain transformers and PEFT answer."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, str(adapter))
    ids = tokenizer(prompt, return_tensors="pt")
    reply = model.eval().generate(**ids, max_new_tokens=length, do_sample=False)[0, ids["input_ids"].shape[1] :]
    ended = reply.tolist().index(tokenizer.eos_token_id) if tokenizer.eos_token_id in reply else None
    return tokenizer.decode(reply[:ended]).strip()


def test_every_column_is_what_its_model_answers(pair: Pair, upgraded: Path) -> None:
    found = load_models(pair.new, str(upgraded), old_adapter=str(pair.adapter), dtype="float32")
    answers = ask(found, PROMPT, length=12)
    assert answers == {
        "base": written(pair.new, None, PROMPT, 12),
        "upgraded": written(pair.new, upgraded, PROMPT, 12),
        "old + adapter": written(pair.old, pair.adapter, PROMPT, 12),
    }
    assert answers["base"] != answers["upgraded"]
    assert found[0].model is found[1].model  # one copy of the new backbone answers for both
    assert ask(found, "cat", template="the red {instruction}", length=12) == answers


def test_one_question_on_the_command_line(pair: Pair, upgraded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = ["chat", "--base", pair.new, "--adapter", upgraded, "--prompt", PROMPT, "--length", 8]
    assert run(*call, "--json") == 0
    (turn,) = json.loads(capsys.readouterr().out)["turns"]
    assert turn["prompt"] == PROMPT
    assert list(turn["answers"]) == ["base", "upgraded"]
    assert run(*call) == 0
    head, rule, *lines = capsys.readouterr().out.splitlines()
    assert (head.split("|")[0].strip(), head.split("|")[1].strip()) == ("base", "upgraded")
    assert set(rule) == set("-| ")
    assert turn["answers"]["upgraded"].split()[0] in " ".join(lines)
    assert run(*call, "--quiet") == 0
    assert capsys.readouterr().out == ""


def test_the_base_is_that_of_the_adapter(pair: Pair, upgraded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rest = ["--adapter", upgraded, "--prompt", PROMPT, "--length", 8, "--json"]
    answers = []
    for base in (["--base", pair.new], []):
        assert run("chat", *base, *rest) == 0
        answers.append(json.loads(capsys.readouterr().out))
    assert answers[0] == answers[1]


def test_lines_of_the_standard_input_are_questions(
    pair: Pair, upgraded: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("the cat\n\n  the dog \n"))
    call = ["chat", "--base", pair.new, "--adapter", upgraded, "--length", 4, "--template", "{instruction}", "--json"]
    assert run(*call, "--old", pair.adapter, "--old-base", pair.old) == 0
    turns = json.loads(capsys.readouterr().out)["turns"]
    assert [turn["prompt"] for turn in turns] == ["the cat", "the dog"]
    assert list(turns[0]["answers"]) == ["base", "upgraded", "old + adapter"]


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_bytes_on_the_standard_input_that_are_no_text(
    errors: str, pair: Pair, upgraded: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\xff b\n"), "utf-8", errors))
    assert run("chat", "--base", pair.new, "--adapter", upgraded, "--quiet") == 1
    assert "wanted text in UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--template", "no place"], "{instruction}"),
        (["--old-base", "OLD"], "the old backbone is of no use without its adapter"),
        (["--adapter", "OLD"], "the adapter has no adapter_config.json"),
        (["--adapter", "ADAPTER"], "size mismatch for base_model"),
        (
            ["--adapter", "PICKLE"],
            "the weights are a pickle file, which can run code when it is loaded, and are not read",
        ),
        (["--adapter", "FOO"], "KeyError 'FOO'"),
        (["--prompt", "a\udcff"], "--prompt: the text has a lone surrogate"),
    ],
)
def test_invalid_inputs_are_refused(
    pair: Pair, upgraded: Path, words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"OLD": pair.old, "ADAPTER": pair.adapter, "PICKLE": tmp_path / "pickle", "FOO": tmp_path / "foo"}
    for kind in ("pickle", "foo"):
        shutil.copytree(upgraded, tmp_path / kind)
    (tmp_path / "pickle" / "adapter_model.safetensors").rename(tmp_path / "pickle" / "adapter_model.bin")
    config = json.loads((upgraded / "adapter_config.json").read_text())
    (tmp_path / "foo" / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "FOO"}))
    call = ["chat", "--base", pair.new, "--adapter", upgraded, "--prompt", "the", "--quiet"]
    assert run(*call, *[names.get(word, word) for word in words]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


def test_an_old_adapter_without_a_base_model_needs_old_base(pair: Pair, upgraded: Path, tmp_path: Path) -> None:
    for file in pair.adapter.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    with pytest.raises(LoraSuiteError, match=r"has no base_model_name_or_path.*--old-base"):
        load_models(pair.new, str(upgraded), old_adapter=str(tmp_path))


def cells(text: str) -> list[list[str]]:
    return [[cell.rstrip() for cell in line.split(" | ")] for line in text.splitlines()]


def test_columns_share_the_width_and_break_at_spaces() -> None:
    answers = {"base": "one two three four five six seven", "upgraded": "short", "old + adapter": "a\n\nb"}
    text = format_columns(answers, 81)
    assert all(len(line) <= 81 for line in text.splitlines())
    assert cells(text)[0] == ["base", "upgraded", "old + adapter"]
    assert cells(text)[2] == ["one two three four five", "short", "a"]
    assert cells(text)[3][0] == "six seven"
    assert cells(text)[4][-1] == "b"


def test_a_long_word_and_wide_letters_fit_their_column() -> None:
    text = format_columns({"base": "x" * 60, "upgraded": "模型" * 15}, 53)
    rows = cells(text)
    assert [row[0] for row in rows[2:5]] == ["x" * 25, "x" * 25, "x" * 10]
    assert [len(row[1]) for row in rows[2:5]] == [12, 12, 6]  # two cells each


def test_a_narrow_terminal_gets_one_under_the_other() -> None:
    text = format_columns({"base": "one two three", "upgraded": "four"}, 10)
    assert text == "[base]\none two\nthree\n\n[upgraded]\nfour"


def test_control_characters_are_shown_as_dots() -> None:
    text = format_columns({"base": "a\x1b[31mred\x07\tb\r", "upgraded": ""}, 80)
    assert "a·[31mred· b·" in text
    assert "\x1b" not in text
