"""Progress of a command: one line per stage when it is piped, a bar that ends as that line on a terminal."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import command_fixtures
import pytest
from command_fixtures import Pair

from peft_lorasuite.cli import stages
from peft_lorasuite.cli.main import main
from peft_lorasuite.progress import stage

pair = command_fixtures.pair
SMALL = ["--set", "prompts=4", "--set", "length=6", "--set", "epochs=1", "--set", "anchor_text_tokens=50"]
TIME = r" +(\d+(\.\d)? s|\d+:\d\d min)"
LINES = [
    "building the upgrade map", "1/4 reading the old adapter's answers", "2/4 reading the new model",
    "3/4 fitting to the answers", "4/4 distilling",
]  # fmt: skip


def distill(pair: Pair, folder: Path) -> list[str]:
    (folder / "prompts.txt").write_text("\n".join(f"what is {word}?" for word in ("one", "two", "six", "ten")))
    call = ["distill", pair.adapter, "--from", pair.old, "--to", pair.new, "--prompts", folder / "prompts.txt"]
    return [str(word) for word in [*call, *SMALL, "-o", folder / "out"]]


def test_a_pipe_gets_one_line_per_stage(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    assert main(distill(pair, tmp_path)) == 0
    printed, shown = capsys.readouterr()
    assert "\r" not in shown
    blocks = [block.splitlines() for block in printed.rstrip().split("\n\n")]
    assert [block[0] for block in blocks if block[0] not in ("left out", "hints")][1:] == ["sample answers", "next"]
    assert blocks[0][1].startswith(f"wrote {tmp_path / 'out'}: ")
    (samples,) = (block for block in blocks if block[0] == "sample answers")
    assert [line[2:12].rstrip() for line in samples[1:]] == ["prompt", "new base", "upgraded", "old"] * 2
    assert [line.split()[0] for line in blocks[-1][1:]] == ["load", "check", "evaluate", "report", "push"]
    lines = [line for line in shown.splitlines() if re.search(f"{TIME}$", line)]
    assert [re.sub(f"{TIME}$", "", line) for line in lines] == LINES
    assert len({line.rindex(" ", 0, -2) for line in lines}) <= 2  # the times are in one column, but for their digits


@pytest.mark.skipif(sys.platform == "win32", reason="a pseudo-terminal")
@pytest.mark.parametrize("color", [True, False])
def test_a_terminal_gets_a_bar_that_ends_as_a_line(pair: Pair, tmp_path: Path, color: bool) -> None:
    import pty

    pytest.importorskip("rich")
    settings = {"TERM": "xterm", "COLUMNS": "100", "HF_HOME": str(tmp_path / "home")} | (
        {} if color else {"NO_COLOR": "1"}
    )
    main_side, terminal = pty.openpty()
    call = [sys.executable, "-m", "peft_lorasuite", *distill(pair, tmp_path)]
    with subprocess.Popen(call, stdout=terminal, stderr=terminal, env={**os.environ, **settings}) as running:
        os.close(terminal)
        shown = b""
        try:
            while part := os.read(main_side, 65536):
                shown += part
        except OSError:  # how Linux says that the other side has closed
            pass
    os.close(main_side)
    assert running.returncode == 0, shown
    text = shown.decode()
    assert "━" in text
    assert ("\x1b[3" in text) == color
    seen = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "\n").splitlines()
    done = [re.sub(f"{TIME}$", "", line) for line in seen if re.search(rf"^(\d/\d|building).*{TIME}$", line)]
    assert done == LINES
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l"), "the cursor is shown again"


def test_a_long_stage_is_reported_once_a_minute(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stages, "REPORTED", 0.0)
    progress = stages.show_stages()
    with stage(progress, "1/2 reading\x1b[2J"):
        assert list(progress("states", range(3))) == [0, 1, 2]
    first, second, last = capsys.readouterr().err.splitlines()
    assert first == r"1/2 reading\u001b[2J (states): 33%, 0.0 s left"
    assert second.startswith(r"1/2 reading\u001b[2J (states): 67%, ")
    assert re.fullmatch(rf"1/2 reading\\u001b\[2J{TIME}", last)


def test_a_stage_that_fails_is_no_line_and_the_next_one_is(capsys: pytest.CaptureFixture[str]) -> None:
    progress = stages.show_stages()
    with pytest.raises(ValueError, match="no"), stage(progress, "first"):
        raise ValueError("no")
    with stage(progress, "second"):
        pass
    assert capsys.readouterr().err.split()[0] == "second"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (9.94, "9.9 s"), (59.4, "59 s"), (59.6, "1:00 min"), (3599.4, "59:59 min"),
                          (3720, "1:02 h")]
)  # fmt: skip
def test_times_are_short(seconds: float, text: str) -> None:
    assert stages.duration(seconds) == text
