"""Code of a Hub repository: that of the pinned revision runs, with the token and the cache that were passed."""

from __future__ import annotations

import json
from pathlib import Path

import hub_fixtures
from hub_fixtures import ask_client
from hub_server import HubServer
from pico import pico_model, pico_tokenizer, save_backbone

hub = hub_fixtures.hub
CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwletConfig(LlamaConfig):
    model_type = "owlet"
    written = {written!r}


class OwletForCausalLM(LlamaForCausalLM):
    config_class = OwletConfig
    written = {written!r}
"""
ASK = """
import os, sys
from transformers import dynamic_module_utils
from peft_lorasuite import Backbone, LoraSuiteError
os.environ.pop("HF_TOKEN", None)
found = []
for options in ({"revision": PINNED}, {}):
    backbone = Backbone.open("me/owlet", token=TOKEN, cache_dir=CACHE, trust_remote_code=True, **options)
    layers = backbone.arch.layers
    found.append([backbone.config.written, layers, type(backbone.load()).written])
try:
    Backbone.open("me/owlet", cache_dir=CACHE + "2", trust_remote_code=True).arch
except LoraSuiteError as error:
    found.append(str(error))
print(json.dumps(found))
"""


def test_the_code_of_the_pinned_revision_runs(hub: HubServer, tmp_path: Path) -> None:
    folder = save_backbone(tmp_path / "base", pico_model("llama"), pico_tokenizer(["red", "cat"]))
    config = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "own.OwletConfig", "AutoModelForCausalLM": "own.OwletForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "owlet", "auto_map": auto}))
    commits = []
    for written in ("first", "second"):
        (folder / "own.py").write_text(CODE.format(written=written))
        commits.append(hub.add_repo("me/owlet", folder, private=True))
    names = {"PINNED": commits[0], "TOKEN": hub.token, "CACHE": str(tmp_path / "cache")}
    found = ask_client(hub, ASK, tmp_path / "home", names, token="")
    assert found[:2] == [["first", 3, "first"], ["second", 3, "second"]]
    assert "me/owlet" in found[2]
    assert hub.token not in found[2]
