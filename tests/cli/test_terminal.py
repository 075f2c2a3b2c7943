"""Names from untrusted files never reach the terminal with characters that it obeys."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import command_fixtures
import pytest
from command_fixtures import Pair, refused
from safetensors.torch import load_file, save_file

from peft_lorasuite import LoraSuiteError
from peft_lorasuite.cli.main import main
from peft_lorasuite.errors import CONTROL, printable

pair = command_fixtures.pair
CLEAR = "\x1b[2J\x1b[31m"


def test_control_characters_are_written_as_escapes() -> None:
    assert printable("a\x1b[2J\n\u202e\x9b\ud800b") == r"a\u001b[2J\u000a\u202e\u009b\ud800b"
    assert printable("two\nlines", keep="\n") == "two\nlines"
    assert printable("名前 🦙 é") == "名前 🦙 é"
    assert str(LoraSuiteError("wrong", where=f"a\n{CLEAR}", got="b\r", do="c\x00")) == (
        r"a\u000a\u001b[2J\u001b[31m: wrong (got b\u000d); c\u0000"
    )


@pytest.mark.parametrize("mode", ["-q", "--json", None])
def test_e_control_characters_in_the_names_of_folders(
    mode: str | None, pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(pair.adapter, tmp_path / f"adapter{CLEAR}\u202e\nname"))
    call = ["upgrade", folder, "--to", pair.new, "--map", pair.map, "-o", tmp_path / f"out{CLEAR}"]
    assert main([str(word) for word in [*call, *([mode] if mode else [])]]) == 0
    shown = capsys.readouterr()
    assert not CONTROL.search(shown.out.replace("\n", "") + shown.err.replace("\n", "").replace("\r", ""))
    if mode == "--json":
        assert json.loads(shown.out)["output"] == str(call[-1])
    again = refused(tmp_path, capsys, *call)  # the output is there now
    assert r"out\u001b[2J" in again


SAID: dict[str, Any] = {
    "adapter_config.json": {"base_model_name_or_path": f"a{CLEAR}", "revision": "a\nb", "peft_type": "LORA\u202e"},
    "config.json": {"model_type": f"llama{CLEAR}", "architectures": ["a\nb"]},
    "tokenizer_config.json": {"tokenizer_class": f"a{CLEAR}", "padding_side": "left\n"},
}


@pytest.mark.parametrize(("file", "field"), [(file, field) for file in SAID for field in SAID[file]])
def test_e_control_characters_in_a_field(
    file: str, field: str, pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, new = (Path(shutil.copytree(one, tmp_path / one.name)) for one in (pair.adapter, pair.new))
    path = (adapter if file.startswith("adapter") else new) / file
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: SAID[file][field]}))
    info = refused(tmp_path, capsys, "upgrade", adapter, "--to", new, "-o", tmp_path / "place" / "out")
    assert f"{file}, {field}" in info
    assert not CONTROL.search(info.rstrip("\n"))


@pytest.mark.parametrize("file", ["tokenizer_config.json", "tokenizer.json"])
def test_e_control_characters_in_the_options_of_a_token(
    file: str, pair: Pair, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The tokenizers library prints the names of options that it does not know."""
    new = Path(shutil.copytree(pair.new, tmp_path / "new"))
    config = json.loads((new / file).read_text())
    if file == "tokenizer.json":
        config["added_tokens"][0][CLEAR] = True
    else:
        config["mask_token"] = {"__type": "AddedToken", "content": "<m>", CLEAR: True}
    (new / file).write_text(json.dumps(config))
    call = ["upgrade", pair.adapter, "--to", new, "--map", pair.map, "-o", tmp_path / "out", "-q"]
    assert main([str(word) for word in call]) == 1
    shown = capfd.readouterr()
    assert f"{file}, " in shown.err
    assert ": control characters" in shown.err
    assert not CONTROL.search((shown.out + shown.err).replace("\n", ""))


def test_e_control_characters_in_the_names_of_tensors(
    pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(pair.adapter, tmp_path / "adapter"))
    tensors = load_file(folder / "adapter_model.safetensors")
    name = next(iter(tensors))
    save_file(tensors | {f"{name}{CLEAR}": tensors[name].clone()}, folder / "adapter_model.safetensors")
    info = refused(tmp_path, capsys, "upgrade", folder, "--to", pair.new, "-o", tmp_path / "place" / "out")
    assert "malformed name of a tensor" in info
    assert not CONTROL.search(info.rstrip("\n"))
