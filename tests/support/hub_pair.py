"""A pair of pico backbones and an adapter as repositories of the loopback Hub, for tests of pull and push."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hub_server import HubServer
from pico import pico_model, pico_tokenizer, save_backbone

from peft_lorasuite import UpgradeMap, upgrade

OLD, NEW, LORA, MAP = "org/old-backbone", "org/new-backbone", "me/old-lora", "me/old-to-new"
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "dog", "ran", "to", "red", "sun"]
CALIBRATION = ["the cat sat on a mat and the dog ran to the red sun " * 4] * 4
ORIGIN = "---\nlicense: cc-by-4.0\nlibrary_name: peft\nlanguage: en\n---\n# Old\n<script>alert(1)</script>\n"

TOOLS = """
import logging, warnings
warnings.simplefilter("ignore")
from peft_lorasuite import LoraSuiteError, PeftModel, UpgradeMap, push_upgraded, upgrade
def error_of(work):  # the sentence of the error, or "ok"
    try:
        work()
    except LoraSuiteError as error:
        return str(error)
    return "ok"
def stage(name):  # a line in the server's log
    attempt(lambda: api.model_info(f"stage/{name}"))
"""


def make_lora(folder: Path, model: Any, *, seed: int = 0, base: str = OLD) -> Path:
    """Write a random LoRA on the queries, values and feed-forward layers of a model, as PEFT does."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    model.config._name_or_path = model.name_or_path = base
    tuned = peft.get_peft_model(model, config)
    tuned.save_pretrained(folder, save_embedding_layers=False)
    tuned.unload()
    (folder / "README.md").write_text(ORIGIN)
    return folder


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``old``, ``new`` (two more layers, wider) and ``lora``."""
    folder = tmp_path_factory.mktemp("pair")
    old = pico_model("llama", seed=1)
    save_backbone(folder / "old", old, pico_tokenizer(WORDS))
    new = pico_model("llama", seed=2, num_hidden_layers=5, hidden_size=48, intermediate_size=80)
    save_backbone(folder / "new", new, pico_tokenizer(["fox", *WORDS]))
    make_lora(folder / "lora", old)
    return folder


@pytest.fixture(scope="session")
def made(pair: Path) -> Path:
    """The folder of the pair with ``map`` and with ``out``, the upgraded adapter, made from folders."""
    UpgradeMap.build(pair / "old", pair / "new", calibration=CALIBRATION).save(pair / "map")
    upgrade(pair / "lora", pair / "map").save(pair / "out")
    return pair


@pytest.fixture
def stocked(hub: HubServer, pair: Path) -> HubServer:
    """The Hub with both backbones and the adapter."""
    for name, part in ((OLD, "old"), (NEW, "new"), (LORA, "lora")):
        hub.add_repo(name, pair / part)
    return hub


def publish(hub: HubServer, folder: Path) -> None:
    """Plant a map that was made from folders as `push_to_hub` would: with the backbones' ids, commits and hashes."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    meta = json.loads(files["map.json"])
    for role, name in (("old", OLD), ("new", NEW)):
        commit = hub.api.repos[name].at("main")
        shards = {path: blob.sha256 for path, blob in commit.files.items() if path.endswith(".safetensors")}
        meta[role] |= {"name": name, "revision": commit.oid, "files": shards}
    hub.add_repo(MAP, files | {"map.json": json.dumps(meta).encode()})


def config_of(hub: HubServer, repo_id: str, revision: str = "main") -> dict[str, Any]:
    """The adapter config in a repository."""
    return json.loads(hub.files(repo_id, revision)["adapter_config.json"])
