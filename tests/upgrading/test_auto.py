"""`auto` from the shell, with a published map: it fetches no backbone, and names what the better method costs."""

from __future__ import annotations

import json
from pathlib import Path

import hub_fixtures
import hub_pair
import pytest
from hub_fixtures import run_client
from hub_pair import LORA, MAP, NEW, OLD, publish
from hub_server import HubServer

hub, pair, made, stocked = hub_fixtures.hub, hub_pair.pair, hub_pair.made, hub_pair.stocked

COMMAND = """
from peft_lorasuite.cli.main import main
raise SystemExit(main(CALL))
"""


def weights_of(hub: HubServer, repo: str) -> list[str]:
    """Requests for a repository's weight files."""
    return [one.path for one in hub.log if repo in one.path and one.method == "GET" and "safetensors" in one.path]


def run(hub: HubServer, home: Path, *words: str) -> None:
    done = run_client(hub, f"CALL = {[*words, '-q']!r}\n{COMMAND}", home=home, token="")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("prompts", [False, True], ids=["by the map alone", "with prompts"])
def test_auto_fetches_backbones_only_for_what_a_map_cannot_do(
    prompts: bool, stocked: HubServer, made: Path, tmp_path: Path
) -> None:
    publish(stocked, made / "map")
    call = ["upgrade", LORA, "--to", NEW, "--map", MAP, "-o", str(tmp_path / "out")]
    if prompts:
        (tmp_path / "prompts.txt").write_text("the cat sat on a mat\nthe dog ran to the sun\na red cat\n")
        call += ["--prompts", str(tmp_path / "prompts.txt")]
    run(stocked, tmp_path / "home", *call)
    report = json.loads((tmp_path / "out" / "lorasuite_report.json").read_text())
    assert report["method"]["name"] == ("transplant" if prompts else "lorasuite")
    assert bool(weights_of(stocked, OLD)) == bool(weights_of(stocked, NEW)) == prompts
    if not prompts:
        assert not [one for one in stocked.log if OLD in one.path]
        assert (
            "method='transplant' would recover more, at the cost of downloading the old backbone"
            in (report["facts"]["auto"])
        )
