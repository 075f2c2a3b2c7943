"""Where an output may lie, and names that the system cannot look up: refused in one sentence before any work."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import command_fixtures
import pytest
from command_fixtures import Pair, refused

from peft_lorasuite import LoraSuiteError, upgrade
from peft_lorasuite.io.output import atomic_folder, check_output
from peft_lorasuite.mapping.fingerprint import hash_tokenizer_files, read_identity
from peft_lorasuite.models.backbone import Backbone

pair = command_fixtures.pair
LONG = "n" * 300
HIT = "the output is or contains an input, which it would replace"


@pytest.fixture
def mine(pair: Pair, tmp_path: Path) -> Path:
    """The user's own copies, which a test may lose."""
    home = tmp_path / "place"
    for name in ("old", "new", "adapter", "map"):
        shutil.copytree(getattr(pair, name), home / name)
    shutil.copy(pair.data, home / "data.json")
    return home


UPGRADE = ["upgrade", "{}/adapter", "--from", "{}/old", "--to", "{}/new", "--map", "{}/map", "-o"]


@pytest.mark.parametrize(
    "words",
    [
        *([*UPGRADE, place] for place in ("{}/new", "{}/map", "{}/adapter", "{}/old", "{}")),
        ["map", "{}/old", "{}/new", "-o", "{}/old"],
        ["finetune", "{}/adapter", "--data", "{}/data.json", "-o", "{}/adapter"],
        ["evaluate", "{}/new", "--adapter", "{}/adapter", "-o", "{}/adapter"],
    ],
    ids=lambda words: f"{words[0]} {words[-1]}",
)
def test_an_output_is_no_input(words: list[str], mine: Path, tmp_path: Path, capsys) -> None:
    info = refused(tmp_path, capsys, *(word.format(mine) for word in words), "--overwrite")
    assert HIT in info


def test_the_backbone_that_the_adapter_names_is_an_input(mine: Path, pair: Pair, tmp_path: Path, capsys) -> None:
    config = mine / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace(str(pair.old), str(mine / "old")))
    call = ["upgrade", mine / "adapter", "--to", mine / "new", "--map", mine / "map", "-o", mine / "old", "--overwrite"]
    assert HIT in refused(tmp_path, capsys, *call)
    upgraded = upgrade(mine / "adapter", mine / "map", new=mine / "new")
    for place in (mine / "new", mine / "adapter"):
        with pytest.raises(LoraSuiteError, match=HIT):
            upgraded.save(place, overwrite=True)


def test_the_working_directory_and_what_holds_it_are_no_output(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    for place in (".", tmp_path / "a", "/proc"):  # the last is a mount point
        with pytest.raises(LoraSuiteError, match="is or contains the working directory, or is a mount point"):
            check_output(place, overwrite=True)
    assert check_output("below") == Path("below")


@pytest.mark.parametrize("there", [True, False], ids=["to a folder", "dangling"])
def test_a_link_stands_for_what_it_points_to(there: bool, tmp_path: Path) -> None:
    if there:
        (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with atomic_folder(tmp_path / "link") as part:
        (part / "new.txt").write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "new.txt").read_text() == "new"


def test_a_folder_below_a_file_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LoraSuiteError, match=r"a parent of the output is a file \(got .*/file\)"):
        check_output(tmp_path / "file" / "a" / "b")


@pytest.mark.parametrize(
    "words",
    [
        ["upgrade", LONG, "--to", "{}/new", "-o", "{}/out"],
        ["upgrade", "{}/adapter", "--to", LONG, "-o", "{}/out"],
        ["upgrade", "{}/adapter", "--to", "{}/new", "-o", f"{{}}/{LONG}"],
        ["upgrade", "{}/adapter", "--to", "{}/new", "-o", "{}/out", "--prompts", LONG],
        ["map", "{}/old", "{}/new", "-o", "{}/out", "--calibration", LONG],
        ["inspect", "{}/map", "-o", f"{{}}/{LONG}"],
        ["inspect", "{}/map", "-o", "{}/out.html", "--rows", LONG],
    ],
    ids=lambda words: " ".join("LONG" if LONG in word else word for word in words),
)
def test_a_name_that_is_too_long_is_reported(words: list[str], mine: Path, tmp_path: Path, capsys) -> None:
    info = refused(tmp_path, capsys, *(word.format(mine) for word in words))
    assert "the path cannot be accessed: File name too long; check the path" in info
    assert len(info) < 400


@contextmanager
def as_nobody() -> Iterator[None]:
    """Whoever runs the tests has no more rights than anybody inside; root may read everything."""
    root = os.geteuid() == 0
    if root:
        os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        if root:
            os.setresuid(0, 0, 0)


def test_what_there_is_no_right_to_read_says_so(pair: Pair) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        home.chmod(0o755)
        shutil.copytree(pair.new, home / "new")
        (home / "closed").mkdir(0o000)
        for name in ("model.safetensors", "tokenizer.json"):
            (home / "new" / name).chmod(0o000)
        backbone = Backbone.open(home / "new")
        with as_nobody():
            with pytest.raises(LoraSuiteError, match=r"model\.safetensors: permission denied"):
                list(backbone.weights)
            with pytest.raises(LoraSuiteError, match=r"tokenizer\.json: the file cannot be read: Permission denied"):
                hash_tokenizer_files(backbone)
            with pytest.raises(LoraSuiteError, match="the path cannot be accessed: Permission denied"):
                check_output(home / "closed" / "out")


@pytest.mark.parametrize("role", ["adapter", "new"])
def test_a_folder_has_no_revisions(role: str, mine: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(mine)
    names = {"adapter": "adapter", "new": "new"} | {role: f"{role}@main"}
    info = refused(tmp_path, capsys, "upgrade", names["adapter"], "--to", names["new"], "-o", mine / "out")
    assert "a folder has no revisions (got main); leave the revision out" in info


def test_a_revision_of_a_folder_is_not_written(pair: Pair, tmp_path: Path) -> None:
    new = Backbone.open(pair.new, revision="v9")
    upgrade(pair.adapter, pair.map, new=new, method="lorasuite").save(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["revision"] is None
    assert read_identity(new).revision is None


def test_a_base_of_a_config_that_is_no_name(mine: Path, tmp_path: Path, pair: Pair, capsys) -> None:
    config = mine / "adapter" / "adapter_config.json"
    for name in (LONG, "~nobody-of-that-name/x"):
        config.write_text((pair.adapter / "adapter_config.json").read_text().replace(str(pair.old), name))
        info = refused(tmp_path, capsys, "upgrade", mine / "adapter", "--to", mine / "new", "-o", mine / "out")
        assert "the path cannot be accessed" in info


def test_a_base_model_must_be_a_hub_id(mine: Path, tmp_path: Path, capsys) -> None:
    words = ["upgrade", f"{mine}/adapter", "--to", f"{mine}/new", "-o", f"{mine}/out", "--base-model", LONG]
    assert "not a valid Hub id" in refused(tmp_path, capsys, *words)
