"""Every block of the documentation runs, every link leads somewhere, the API reference is what the docstrings say."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import doc_blocks
import pytest
from hub_fixtures import client_env
from hub_server import HubServer
from huggingface_hub import constants

from peft_lorasuite.arch import registry
from peft_lorasuite.methods import registry as methods

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
DEMO = ROOT / "peft_lorasuite" / "data" / "demo"
ELSEWHERE = ("existing-code.md",)
"""Pages whose blocks run in a test of their own, which looks at what they make."""
PAGES = [ROOT / "README.md", *(path for path in sorted(DOCS.glob("*.md")) if path.name not in ELSEWHERE)]
PAGES = [path for path in PAGES if doc_blocks.blocks(path)]
ON_THE_HUB = [
    path for path in PAGES if re.search(r'["\s](me|org)/[a-z]', "".join(b.code for b in doc_blocks.blocks(path)))
]
"""Pages that name repositories run in a process of their own, which takes the loopback server for the Hub."""
LINKS = {"old-backbone": "old", "new-backbone": "new", "samples.json": "train.json", "text.txt": "calibration.txt"}
OLD, NEW, LORA = "org/old-backbone", "org/new-backbone", "me/my-lora"


def lora(folder: Path, base: str) -> Path:
    """Copy the demo adapter, with another name for its backbone, and give it a card."""
    shutil.copytree(DEMO / "adapter", folder)
    (folder / "README.md").write_text(f"---\nlicense: mit\nlibrary_name: peft\nbase_model: {base}\n---\n")
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": base}))
    return folder


@pytest.fixture
def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder that the examples are written for; what they register is forgotten afterwards."""
    folder = tmp_path / "workshop"
    folder.mkdir()
    for name, target in LINKS.items():
        (folder / name).symlink_to(DEMO / target)
    lora(folder / "my-lora", "old-backbone")
    lora(folder / "my-other-lora", "old-backbone")
    (folder / "hub_scripts").symlink_to(ROOT / "hub_scripts")
    items = json.loads((DEMO / "prompts.json").read_text(encoding="utf-8"))[:8]
    prompts = [{"prompt": f"Question: {item['instruction']}\nAnswer: "} for item in items]
    (folder / "prompts.json").write_text(json.dumps(prompts))
    monkeypatch.chdir(folder)
    known = set(registry._registered) | set(registry.BUILT_IN), set(methods._methods) | set(methods.BUILT_IN)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf_home"))
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hf_home"))
    for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, "1")
    yield folder
    for table, kept in zip((registry._registered, methods._methods), known, strict=True):
        for name in set(table) - kept:
            del table[name]


@pytest.mark.parametrize("page", [page for page in PAGES if page not in ON_THE_HUB], ids=lambda page: page.stem)
def test_the_blocks_of_a_page_run(page: Path, workshop: Path) -> None:
    doc_blocks.run(page)


@pytest.mark.parametrize("page", ON_THE_HUB, ids=lambda page: page.stem)
def test_the_blocks_of_a_page_about_the_hub_run(page: Path, workshop: Path, hub: HubServer, tmp_path: Path) -> None:
    hub.add_repo(OLD, DEMO / "old")
    hub.add_repo(NEW, DEMO / "new")
    hub.add_repo(LORA, lora(tmp_path / "hub-lora", OLD))
    env = client_env(hub, tmp_path / "hub_home")
    call = [sys.executable, str(Path(doc_blocks.__file__)), str(page)]
    done = subprocess.run(call, env=env, cwd=workshop, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.stem)
def test_every_link_leads_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("http://", "https://", "#")):
            name, _, anchor = target.partition("#")
            assert (page.parent / name).exists(), target
            assert not anchor or anchor in anchors(page.parent / name), target


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def test_the_index_names_every_page() -> None:
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    assert all(f"({page.name})" in index for page in DOCS.glob("*.md") if page.name != "README.md")


def test_the_api_reference_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("make_api", DOCS / "make_api.py")
    assert spec is not None
    assert spec.loader is not None
    make_api: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_api)
    assert (DOCS / "api.md").read_text(encoding="utf-8") == make_api.render(), (
        f"run python {os.path.relpath(DOCS)}/make_api.py"
    )
