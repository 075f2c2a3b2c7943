"""Names of places: a folder, or ID@REVISION; the same split everywhere."""

from __future__ import annotations

import runpy
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from pico import pico_config, pico_model, pico_tokenizer

from peft_lorasuite.cli.common import load_options
from peft_lorasuite.errors import LoraSuiteError
from peft_lorasuite.hub.collection import assign_repositories
from peft_lorasuite.hub.repository import check_id
from peft_lorasuite.io.source import split_revision
from peft_lorasuite.models.backbone import NAMELESS, Backbone

SCRIPTS = Path(__file__).parents[2] / "hub_scripts"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("org/model", ("org/model", None)),
        ("org/model@main", ("org/model", "main")),
        ("org/model@refs/pr/1", ("org/model", "refs/pr/1")),
        ("org/model@me@work", ("org/model", "me@work")),
        ("/tmp/me@work/absent", ("/tmp/me@work/absent", None)),
        ("~/me@work/absent", ("~/me@work/absent", None)),
    ],
)
def test_a_hub_id_is_split_at_its_revision_and_a_path_is_not(text: str, parts: tuple[str, str | None]) -> None:
    assert split_revision(text) == parts


@pytest.mark.parametrize("text", ["@main", "org/model@"])
def test_half_a_name_is_refused(text: str) -> None:
    with pytest.raises(LoraSuiteError, match=r"the id or the revision is missing \(wanted ID@REVISION"):
        split_revision(text)


@pytest.mark.parametrize("relative", [False, True])
def test_a_folder_with_an_at_in_its_path_is_opened(
    relative: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    place = Path("me@work/old") if relative else tmp_path / "me@work" / "old"
    pico_config("llama").save_pretrained(place)
    args = Namespace(trust_remote_code=False, dtype="auto", device_map=None)
    for backbone in (Backbone.open(place), Backbone.open(str(place), **load_options(args).model_kwargs())):
        assert backbone.source.revision is None
        assert backbone.arch.layers == 3


def test_a_result_is_named_after_the_folder_with_an_at_in_its_path(tmp_path: Path) -> None:
    folder = tmp_path / "me@work" / "lora"
    folder.mkdir(parents=True)
    for name in (str(folder), "alice/lora@v2"):
        assert assign_repositories([name], "me", "-new") == {name: "me/lora-new"}


@pytest.mark.parametrize("name", [None, 5, "no owner", ""])
def test_a_repository_that_is_no_hub_id_is_refused(name: Any) -> None:
    with pytest.raises(LoraSuiteError, match="not a valid Hub id"):
        check_id(name)


@pytest.mark.parametrize(("words", "code"), [(["--map", "", "--push", "me/x"], 2), (["a", "b", "--push", "x"], 1)])
def test_publish_map_checks_its_words_first(words: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    program = runpy.run_path(str(SCRIPTS / "publish_map.py"))["main"]
    if code == 2:
        with pytest.raises(SystemExit, match="2"):
            program(words)
    else:
        assert program(words) == code
        assert "not a valid Hub id" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["model", NAMELESS])
def test_a_loaded_model_without_a_name_takes_no_folder_for_its_own(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pico_tokenizer(["red"]).save_pretrained(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    opened = Backbone.open(pico_model("llama"))
    assert opened.name == NAMELESS
    with pytest.raises(LoraSuiteError, match="the model does not say where its tokenizer is"):
        _ = opened.tokenizer
