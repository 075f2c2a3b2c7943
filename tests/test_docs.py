"""Every block of the documentation runs, every link leads somewhere, and index, site and reference are complete."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import doc_blocks
import pytest
from chat_pair import CHATML, LLAMA2
from hub_fixtures import client_env
from hub_server import HubServer
from huggingface_hub import constants

import peft_lorasuite
from peft_lorasuite.arch import registry
from peft_lorasuite.methods import registry as methods

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
DEMO = ROOT / "peft_lorasuite" / "data" / "demo"
ELSEWHERE = ("existing-code.md",)
"""Pages whose blocks run in a test of their own, which checks their results."""
PAGES = [ROOT / "README.md", *(path for path in sorted(DOCS.glob("*.md")) if path.name not in ELSEWHERE)]
PAGES = [path for path in PAGES if doc_blocks.blocks(path)]
ON_THE_HUB = [
    path for path in PAGES if re.search(r'["\s](me|org)/[a-z]', "".join(b.code for b in doc_blocks.blocks(path)))
]
"""Pages with repositories run in a process of their own, with the loopback server as Hub."""
PLAIN_CHATML = CHATML.replace("<|im_end|>", "{{ eos_token }}")
"""ChatML for a vocabulary without its end of turn."""
LINKS = {"samples.json": "train.json", "text.txt": "calibration.txt"}
BACKBONES = {"old-backbone": ("old", LLAMA2), "new-backbone": ("new", PLAIN_CHATML)}
OLD, NEW, LORA = "org/old-backbone", "org/new-backbone", "me/my-lora"
REAL = "Qwen/Qwen3-1.7B"
"""The new backbone of the README."""


def lora(folder: Path, base: str) -> Path:
    """Copy the demo adapter, with another name for its backbone, and give it a card."""
    shutil.copytree(DEMO / "adapter", folder)
    (folder / "README.md").write_text(f"---\nlicense: mit\nlibrary_name: peft\nbase_model: {base}\n---\n")
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": base}))
    return folder


@pytest.fixture
def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder that the examples are written for; the families and methods that they register are removed again."""
    folder = tmp_path / "workshop"
    folder.mkdir()
    for name, target in LINKS.items():
        (folder / name).symlink_to(DEMO / target)
    for name, (target, template) in BACKBONES.items():
        shutil.copytree(DEMO / target, folder / name)
        (folder / name / "chat_template.jinja").write_text(template)
    (folder / "template.jinja").write_text(LLAMA2)
    lora(folder / "my-lora", "old-backbone")
    lora(folder / "my-other-lora", "old-backbone")
    (folder / "hub_scripts").symlink_to(ROOT / "hub_scripts")
    items = json.loads((DEMO / "prompts.json").read_text(encoding="utf-8"))[:8]
    prompts = [{"prompt": f"Question: {item['instruction']}\nAnswer: "} for item in items]
    (folder / "prompts.json").write_text(json.dumps(prompts))
    talks = [{"messages": [{"role": "user", "content": item["instruction"]}]} for item in items]
    (folder / "conversations.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks))
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
    for name, folder in ((OLD, "old-backbone"), (NEW, "new-backbone"), (REAL, "new-backbone")):
        hub.add_repo(name, workshop / folder)
    hub.add_repo(LORA, lora(tmp_path / "hub-lora", OLD))
    env = client_env(hub, tmp_path / "hub_home")
    call = [sys.executable, str(Path(doc_blocks.__file__)), str(page)]
    done = subprocess.run(call, env=env, cwd=workshop, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted(DOCS.glob("*.md"))], ids=lambda page: str(page.relative_to(ROOT))
)
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


def test_the_reference_has_every_public_name() -> None:
    text = (DOCS / "reference.md").read_text(encoding="utf-8")
    listed = re.findall(r"^::: (\S+)$", text, flags=re.MULTILINE)
    assert len(listed) == len(set(listed))
    assert {f"peft_lorasuite.{name}" for name in peft_lorasuite.__all__ if name != "__version__"} <= set(listed)
    for path in listed:
        module, _, name = path.rpartition(".")
        assert getattr(import_module(module), name).__doc__, path


def test_the_navigation_of_the_site_has_every_page() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = set(re.findall(r"^ +- [^:]+: (\S+\.(?:md|ipynb))$", text, flags=re.MULTILINE))
    assert pages == {path.name for path in DOCS.iterdir() if path.is_file()} | {"benchmarks/README.md"}
