"""What the commands take from their words: names with revisions, the device map, help; and what an interrupt says."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import hub_fixtures
import hub_pair
import pytest
from hub_fixtures import ask_client, client_env
from hub_pair import LORA, NEW, OLD, TOOLS
from hub_server import HubServer
from patience import limit

from peft_lorasuite.cli.main import COMMANDS, main
from peft_lorasuite.errors import LoraSuiteError
from peft_lorasuite.models.backbone import Backbone
from peft_lorasuite.models.offload import is_on_disk

hub, pair, made, stocked = hub_fixtures.hub, hub_pair.pair, hub_pair.made, hub_pair.stocked


def test_help_lists_the_methods_for_whoever_calls_main(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["upgrade", "--help"])
    output = capsys.readouterr().out
    assert "methods:\n  auto " in output
    assert "\n  transplant " in output


def test_a_backbone_is_loaded_where_it_was_opened_for(pair: Path) -> None:
    opened = Backbone.open(pair / "new", device_map="disk")
    assert is_on_disk(opened.load())
    assert not is_on_disk(opened.load(device_map="cpu"))
    assert not is_on_disk(Backbone.open(pair / "new").load())


def test_the_device_map_reaches_a_method_that_runs_the_models(made: Path, tmp_path: Path, capsys) -> None:
    words = ["upgrade", made / "lora", "--from", made / "old", "--to", made / "new", "--map", made / "map", "-q"]
    words += ["--method", "transplant", "--device-map", "nowhere", "-o", tmp_path / "out"]
    assert main([str(word) for word in words]) == 1
    error = capsys.readouterr().err
    assert "the model cannot be loaded: " in error
    assert "nowhere" in error


NAMED = (
    TOOLS
    + """
from peft_lorasuite.cli.main import main
from peft_lorasuite.evaluation.harness import _load
from peft_lorasuite.reporting.inspect import inspect
network, tokens = _load(f"{NEW}@main", None, None)
found = [type(network).__name__, len(tokens)]
network, _ = _load(f"{OLD}@main", f"{LORA}@main", None)
found += [type(network).__name__, "q_proj" in network.peft_config["default"].target_modules]
network, _ = _load(f"{LORA}@main", None, None)
found += [type(network).__name__]
contents = inspect(OUT, PAGE, old_adapter=f"{LORA}@main", overwrite=True)
found += [contents.missing.get("the old adapter"), attempt(lambda: _load(f"{NEW}@v9", None, None))]
print(json.dumps(found))
"""
)


def test_what_is_measured_or_shown_may_be_pinned(stocked: HubServer, made: Path, tmp_path: Path) -> None:
    names = {"OLD": OLD, "NEW": NEW, "LORA": LORA, "OUT": str(made / "out"), "PAGE": str(tmp_path / "page.html")}
    results = ask_client(stocked, NAMED, tmp_path / "home", names)
    assert results[0] == "LlamaForCausalLM"
    assert results[1] > 50
    assert results[2:5] == ["PeftModelForCausalLM", True, "PeftModelForCausalLM"]
    assert results[5:] == [None, "LoraSuiteError"]


def test_a_model_that_is_nowhere_is_one_sentence(tmp_path: Path) -> None:
    from peft_lorasuite.evaluation.harness import _load

    (tmp_path / "empty").mkdir()
    with pytest.raises(LoraSuiteError, match=r"empty: the model has no config\.json; check the name"):
        _load(str(tmp_path / "empty"), None, None)


def test_an_interrupted_push_says_where_the_adapter_is(stocked: HubServer, made: Path, tmp_path: Path) -> None:
    stocked.fault("slow", "^POST .*/(preupload|commit)/", times=None, delay=3.0)
    words = ["upgrade", LORA, "--from", OLD, "--to", NEW, "--map", str(made / "map"), "--method", "lorasuite", "-q"]
    out = tmp_path / "out"
    call = [sys.executable, "-m", "peft_lorasuite", *words, "-o", str(out), "--push", "me/pushed"]
    environment = client_env(stocked, tmp_path / "home")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it, and so would this
    worker = subprocess.Popen(call, env=environment, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    deadline = time.monotonic() + limit(100)
    while not stocked.requests("^POST .*me/pushed/preupload") and worker.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    worker.send_signal(signal.SIGINT)
    _, error = worker.communicate(timeout=limit(60))
    assert worker.returncode == 130, error
    assert error.endswith(f"peft-lorasuite: interrupted, the adapter itself was written to {out}\n")
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == NEW


def test_no_arguments_print_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 0
    assert "examples:" in capsys.readouterr().out


def test_a_mistyped_command_gets_the_nearest_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["upgrad", "my-lora"])
    assert ended.value.code == 2
    assert "did you mean 'upgrade'?" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], *([name, "--help"] for name in COMMANDS), ["upgrade", "--help-all"]])
def test_help_fits_a_terminal_of_80_columns(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main(words)
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_help_shows_eight_options_and_help_all_every_one(capsys: pytest.CaptureFixture[str]) -> None:
    pages = {}
    for option in ("--help", "--help-all"):
        with pytest.raises(SystemExit):
            main(["upgrade", option])
        pages[option] = set(re.findall(r"^  (?:-\w(?: \w+)?, )?(--[a-z-]+)", capsys.readouterr().out, re.MULTILINE))
    usual = {"--method", "--prompts", "--to", "--from", "--map", "--finetune", "--output", "--push"}
    assert pages["--help"] == {*usual, "--help", "--help-all"}
    assert {*pages["--help"], "--device-map", "--rank", "--epochs"} < pages["--help-all"]
    assert main(["upgrade", "none", "--to", "none", "-o", "out", "--rank", "2"]) == 1  # left out, not removed


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("map old new -o out --tok 3", "peft-lorasuite map: unknown option --tok: did you mean --tokens? See"),
        (  # no short form of --tokens
            "map --to new -o out",
            "peft-lorasuite map: unknown option --to (the call is `peft-lorasuite map OLD NEW [options]`); see",
        ),
        ("upgrade lora --promts=a", "peft-lorasuite upgrade: unknown option --promts: did you mean --prompts? See"),
        ("upgrade lora", "peft-lorasuite upgrade: the following arguments are required: --to, -o/--output;"),
    ],
)
def test_a_wrong_call_gets_one_line(call: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(call.split())
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert said.startswith(message)
    assert said.count("\n") == 1
