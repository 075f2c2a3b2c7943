"""Bad input of methods that run the models: prompts, calibration, ranks, tokenizers; nothing half-written is left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import command_fixtures
import peft
import pytest
from command_fixtures import WORDS, Pair, refused
from pico import pico_model, pico_tokenizer, save_backbone

from peft_lorasuite import LoraSuiteError, MapOptions, PeftModel, UpgradeMap, upgrade
from peft_lorasuite.models.backbone import Backbone

pair = command_fixtures.pair


def no_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where a map is built."""
    monkeypatch.setattr(
        "peft_lorasuite.upgrading.inputs.load_or_build_map", lambda *args, **settings: pytest.fail("the map was built")
    )


READING = ("transplant", "distill")
"""Methods that let the old adapted model answer prompts."""
FILES = {
    "empty": ("", "prompts.txt: has no records (wanted at least one)"),
    "blank": ("\n  \n\n", "prompts.txt: has no records (wanted at least one)"),
    "one line": ("the red cat\n", "too few prompts (got 1, wanted at least 2, better 64 or more); give more prompts"),
    "too long": (
        f"the red cat\n{'the ' * 300}\nthe blue dog\n",
        "prompt 2 is too long for the context (got 303 tokens and 48 for the answer, wanted at most 256); shorten it",
    ),
}
"""File of prompts -> its text and what is said of it."""


def call(pair: Pair, tmp_path: Path, *words: object) -> list[object]:
    return ["upgrade", pair.adapter, "--to", pair.new, "--map", pair.map, "-o", tmp_path / "place" / "out", *words]


@pytest.mark.parametrize("method", READING)
@pytest.mark.parametrize("kind", FILES)
def test_a_file_of_prompts_that_cannot_be_used(
    kind: str, method: str, pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, message = FILES[kind]
    (tmp_path / "prompts.txt").write_text(text)
    words = ("--method", method, "--prompts", tmp_path / "prompts.txt")
    assert message in refused(tmp_path, capsys, *call(pair, tmp_path, *words))


def test_a_prompt_is_named_by_its_number_in_the_file(
    pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not by its number among those that were drawn."""
    lines = ["the red cat"] * 9 + ["the " * 300]
    (tmp_path / "prompts.txt").write_text("\n".join(lines))
    words = ("--method", "transplant", "--set", "prompts=2", "--prompts", tmp_path / "prompts.txt")
    assert "prompt 10 is too long" in refused(tmp_path, capsys, *call(pair, tmp_path, *words))


def test_one_prompt_is_refused_before_the_map_is_built(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_map(monkeypatch)
    with pytest.raises(LoraSuiteError, match=r"too few prompts .got 1"):
        PeftModel.from_upgraded(pair.new, pair.adapter, source_model=pair.old, prompts=["the red cat"])


def test_an_old_backbone_that_is_named_counts_with_a_map_as_well(pair: Pair) -> None:
    """As ``--from`` does: it is opened, checked, and at hand for what `auto` picks."""
    with pytest.raises(LoraSuiteError, match="backbone not found"):
        PeftModel.from_upgraded(pair.new, pair.adapter, source_model="/nonexistent", upgrade_map=pair.map)
    upgraded = PeftModel.from_upgraded(pair.new, pair.adapter, source_model=pair.old, upgrade_map=pair.map)
    report: Any = upgraded.upgrade_report
    assert "not at hand" not in report.facts["auto"]


def test_a_rank_option_above_the_module(pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.txt").write_text("the red cat\nthe blue dog\n")
    words = ("--method", "transplant", "--set", "rank=1000", "--prompts", tmp_path / "prompts.txt")
    error = refused(tmp_path, capsys, *call(pair, tmp_path, *words))
    assert "option rank: the rank is above the module's dimensions (got 1000, wanted 1 to" in error


def test_a_file_of_prompts_that_is_none(pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--method", "transplant", "--prompts", tmp_path / "missing.txt")
    assert "missing.txt: file not found" in refused(tmp_path, capsys, *call(pair, tmp_path, *words))


def test_distil_asks_for_prompts(pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        refused(tmp_path, capsys, "distill", *call(pair, tmp_path)[1:])
    assert "the following arguments are required: --prompts" in capsys.readouterr().err
    assert list((tmp_path / "place").iterdir()) == []


@pytest.mark.parametrize("side", ["old", "new"])
@pytest.mark.parametrize("method", READING)
def test_built_in_prompts_that_no_context_holds(method: str, side: str, pair: Pair, tmp_path: Path) -> None:
    """No prompt is given, and the context of one backbone fits none of ours."""
    short = pico_model("llama", max_position_embeddings=48)
    sides = {"old": Backbone.open(pair.old), "new": Backbone.open(pair.new)}
    sides[side] = Backbone.open(save_backbone(tmp_path / "short", short, pico_tokenizer(WORDS)))
    built = UpgradeMap.build(sides["old"], sides["new"], MapOptions(layer_map="first"))
    with pytest.raises(LoraSuiteError, match=r"too few prompts .got 0.*; pass prompts that fit"):
        upgrade(pair.adapter, built, method=method, **sides)


@pytest.mark.parametrize("method", [*READING, "copy", "lorasuite", "cross-lora"])
def test_a_rank_above_the_modules_dimensions(
    method: str, pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = refused(tmp_path, capsys, *call(pair, tmp_path, "--method", method, "--rank", 41))
    assert "rank: the rank exceeds the dimensions of the modules (got 41, wanted 1 to 40)" in error


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank: must be at least 1"),
        ({"rank": 1.5}, "rank: must be an integer .got 1.5"),
        ({"rank": "4"}, "rank: must be an integer .got '4'"),
        ({"seed": None}, "seed: must be an integer"),
        ({"seed": -1}, "seed: must be at least 0"),
        ({"seed": 2**32}, "seed: must be at most 4294967295"),
    ],
)
def test_a_number_that_is_none_is_refused_before_the_map_is_read(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(LoraSuiteError, match=message):
        upgrade(pair.adapter, pair.map, method="copy", **settings)
    no_map(monkeypatch)
    with pytest.raises(LoraSuiteError, match=message):
        PeftModel.from_upgraded(pair.new, pair.adapter, source_model=pair.old, **settings)


@pytest.mark.parametrize("name", ["", "a.b", "keys", None])
def test_a_name_that_no_adapter_can_have_is_refused_before_the_map_is_built(
    name: Any, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_map(monkeypatch)
    with pytest.raises(LoraSuiteError, match="adapter_name: malformed adapter name"):
        PeftModel.from_upgraded(pair.new, pair.adapter, name, source_model=pair.old)


def test_a_map_without_calibration_still_reads_the_text(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "peft_lorasuite.mapping.build.read_identity", lambda backbone: pytest.fail("a backbone was read")
    )
    with pytest.raises(LoraSuiteError, match="file not found"):
        UpgradeMap.build(pair.old, pair.new, MapOptions(layer_map="first"), calibration="no-such-file")


def test_a_rank_above_some_modules_dimensions_names_the_module(tmp_path: Path) -> None:
    """Grouped keys and values are narrower than the other modules."""
    narrow = {"num_attention_heads": 4, "num_key_value_heads": 1}
    folder = save_backbone(tmp_path / "b", pico_model("llama", **narrow), pico_tokenizer(WORDS))
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(pico_model("llama", **narrow), config).save_pretrained(tmp_path / "a")
    built = UpgradeMap.build(folder, folder, MapOptions(layer_map="first"))
    with pytest.raises(
        LoraSuiteError, match=r"v_proj: the rank exceeds the dimensions of the module .got 9, wanted at most"
    ):
        upgrade(tmp_path / "a", built, method="copy", rank=9)


@pytest.mark.parametrize("method", READING)
def test_tokenizers_that_share_too_few_tokens(
    method: str, pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Letters alone are shared: enough for the hidden map, too few to speak of the new model's logits."""
    words = ["xylophone", "zeppelin", "quixotic", "jukebox", "vortex"]
    strange = save_backbone(tmp_path / "strange", pico_model("llama", 1, vocab_size=400), pico_tokenizer(words))
    (tmp_path / "prompts.txt").write_text("the red cat\nthe blue dog\n")
    words = ("--method", method, "--prompts", tmp_path / "prompts.txt")
    error = refused(tmp_path, capsys, "upgrade", pair.adapter, "--to", strange, *call(pair, tmp_path, *words)[6:])
    assert "the tokenizers share too few tokens" in error
    assert "wanted at least 100); use a weight-based method, or retrain" in error


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "text.txt: the calibration text is empty"),
        ("\n \n", "text.txt: the calibration text is empty"),
        ("the red cat", "in both tokenizers (got 1, wanted at least 4); pass a longer text"),
    ],
    ids=["empty", "blank", "too short"],
)
def test_a_calibration_text_that_cannot_be_used(
    text: str, message: str, pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text(text)
    words = ("--calibration", tmp_path / "text.txt", "-o", tmp_path / "place" / "out")
    assert message in refused(tmp_path, capsys, "map", pair.old, pair.new, *words)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_a_calibration_text_in_another_encoding(
    encoding: str, pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("the red café " * 9, encoding=encoding)
    words = ("--calibration", tmp_path / "text.txt", "-o", tmp_path / "place" / "out")
    error = refused(tmp_path, capsys, "map", pair.old, pair.new, *words)
    assert "text.txt: the file cannot be read: 'utf-8' codec" in error
