"""An adapter on the Hub with its tokenizer: read from there, and pushed with its tokens (B5 of real_inputs)."""

from __future__ import annotations

import json

import added
import hub_fixtures
import pytest
from added import TOKENS, grown, identity_map
from hub_fixtures import ask_client
from hub_server import HubServer
from transformers import AutoTokenizer

hub = hub_fixtures.hub
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
CODE = """
from peft_lorasuite import push_upgraded, upgrade
done = upgrade("me/tool-lora", MAP, method="lorasuite", old=OLD, new=NEW)
done.save(OUT)
push_upgraded(OUT, "me/new-lora", base_model="org/x")
print(json.dumps(done.report.facts["added_tokens"]))
"""


def test_b5_the_tokenizer_is_pulled_and_pushed_with_the_adapter(hub: HubServer, tmp_path):
    old, new = (added.base(tmp_path / side) for side in ("old", "new"))
    added.train(tmp_path / "adapter", old, "trainable_token_indices")
    identity_map(old, new).save(tmp_path / "map")
    hub.add_repo("org/x", {"config.json": b"{}"})
    hub.add_repo("me/tool-lora", {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()})
    names = {"MAP": "map", "OLD": "old", "NEW": "new", "OUT": "out"}
    facts = ask_client(hub, CODE, tmp_path / "home", {name: str(tmp_path / path) for name, path in names.items()})
    assert facts["added"] == TOKENS
    files = hub.files("me/new-lora")
    (tmp_path / "pushed").mkdir()
    for name, content in files.items():
        (tmp_path / "pushed" / name).write_bytes(content)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "pushed")
    assert tokenizer.convert_tokens_to_ids(TOKENS) == grown(new.tokenizer)[1]
    card = files["README.md"].decode()
    assert "were added to the tokenizer of this repository: `<tool>`, `<end_tool>`." in card
    assert "call `model.resize_token_embeddings(83)`" in card
    assert 'AutoTokenizer.from_pretrained("me/new-lora")' in card
    assert json.loads(files["lorasuite_report.json"])["facts"]["added_tokens"]["rows"] == 83
