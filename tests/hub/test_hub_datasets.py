"""Prompts from a dataset of the Hub, streamed by the real `datasets` client."""

from __future__ import annotations

import json
from pathlib import Path

import hub_fixtures
from hub_fixtures import run_client
from hub_server import HubServer

hub = hub_fixtures.hub

READ = """
from peft_lorasuite.errors import LoraSuiteError
from peft_lorasuite.text.examples import read_prompts
print(len(read_prompts("me/talks")), read_prompts("me/talks:test")[0].question, len(read_prompts("me/talks", limit=7)))
for name in ("me/talks:missing", "me/nothing"):
    try:
        read_prompts(name)
    except LoraSuiteError as error:
        print(str(error).count("\\n"), str(error)[:60])
"""


def test_a_hub_dataset_is_streamed_by_its_split(hub: HubServer, tmp_path: Path) -> None:
    def lines(split: str, count: int) -> bytes:
        turns = [[{"role": "user", "content": f"{split} {number}"}] for number in range(count)]
        return "".join(json.dumps({"messages": one}) + "\n" for one in turns).encode()

    hub.add_repo("me/talks", {"data/train.jsonl": lines("train", 40), "data/test.jsonl": lines("test", 1)})
    done = run_client(hub, READ, home=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    first, missing, nothing = done.stdout.splitlines()
    assert first == "40 test 0 7"
    assert missing.startswith("0 me/talks:missing: the dataset cannot be read:")
    assert nothing.startswith("0 me/nothing: the dataset cannot be read:")
