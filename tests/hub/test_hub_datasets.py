"""Prompts from a dataset of the Hub, streamed by the real `datasets` client."""

from __future__ import annotations

import json
from pathlib import Path

import hub_fixtures
import peft
from hub_fixtures import run_client
from hub_server import HubServer
from pico import pico_model, pico_tokenizer, save_backbone

from peft_lorasuite import Backbone, MapOptions, UpgradeMap

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


PRIVATE = """
from peft_lorasuite import upgrade
from peft_lorasuite.errors import LoraSuiteError
from peft_lorasuite.text.examples import given_prompts
for token in (None, TOKEN):
    try:
        print(len(given_prompts("me/private", token=token)))
    except LoraSuiteError as error:
        print(str(error)[:60])
try:  # the prompts are read before the adapter runs
    upgrade(ADAPTER, MAP, method="copy", prompts="me/private:missing", token=TOKEN)
except LoraSuiteError as error:
    print(error)
"""


def test_the_token_of_a_call_reaches_a_private_dataset(hub: HubServer, tmp_path: Path) -> None:
    hub.add_repo("me/private", {"data/train.jsonl": b'{"text": "a cat"}\n{"text": "a dog"}\n'}, private=True)
    adapter, built = write_same_pair(tmp_path)
    names = {"TOKEN": hub.token, "ADAPTER": str(adapter), "MAP": str(built)}
    code = "".join(f"{name} = {value!r}\n" for name, value in names.items()) + PRIVATE
    done = run_client(hub, code, home=tmp_path / "home", token="")
    assert done.returncode == 0, done.stderr[-3000:]
    refused, allowed, missing = done.stdout.splitlines()
    assert refused.startswith("me/private: the dataset cannot be read")
    assert allowed == "2"
    assert 'split "missing"' in missing or "Bad split: missing" in missing


def write_same_pair(folder: Path) -> tuple[Path, Path]:
    """Write an adapter, and the map of its backbone to itself."""
    old = save_backbone(folder / "old", pico_model("llama"), pico_tokenizer(["cat", "dog"]))
    config = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    peft.get_peft_model(Backbone.open(old).load(), config).save_pretrained(folder / "adapter")
    UpgradeMap.build(old, old, MapOptions(layer_map="first")).save(folder / "map")
    return folder / "adapter", folder / "map"
