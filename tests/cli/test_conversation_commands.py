"""Conversations on the command line: as prompts, as training data, and in `chat`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
from chat_pair import ANSWERS, CHATML, LLAMA2, conversations, share_right, write_pair
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_lorasuite.cli.chat_session import ask, load_models
from peft_lorasuite.cli.main import main
from peft_lorasuite.models.backbone import Backbone
from peft_lorasuite.upgrading.map_cache import cache_folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    return write_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def result(pair: tuple[Path, Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The upgraded adapter, made by a call with a file of conversations."""
    _, new, adapter = pair
    folder = tmp_path_factory.mktemp("result")
    save(folder / "talks.jsonl", labeled=False)
    options = [f"--set={text}" for text in ("length=6", "rank=32")]
    call = ["upgrade", adapter, "--to", new, "--method", "transplant", "--prompts", folder / "talks.jsonl", *options]
    assert run(*call, "-o", folder / "out") == 0
    return folder / "out"


def run(*words: Any) -> int:
    return main([str(word) for word in words] + ["--quiet"])


def save(path: Path, *, labeled: bool) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in conversations(labeled=labeled)))
    return path


def test_prompts_are_a_file_of_conversations(pair: Any, result: Path) -> None:
    new = Backbone.open(pair[1])
    assert share_right(peft.PeftModel.from_pretrained(new.load(), result).eval(), new) > 0.3
    report = json.loads((result / "lorasuite_report.json").read_text())
    assert report["facts"]["chat"] == {"conversations": 8, "new_template": "new backbone", "system": None}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--new-template", "missing.jinja"], "new_template: the chat template is not a file"),
        (["--template-kwargs", "tools=1"], "template_kwargs: not a variable of a template (got 'tools')"),
        (["--system", "a\udcff"], "system: the text has a lone surrogate"),
        (["--system", "red"], "talks.jsonl, record 1: the chat template does not render: no such role here"),
        (["--new-template", "{{ messages.no.role }}"], "record 1: the chat template does not render"),
    ],
)
def test_options_of_rendering_are_checked_before_a_map_is_built(
    pair: Any, tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = save(tmp_path / "talks.jsonl", labeled=False)
    call = ["upgrade", pair[2], "--to", pair[1], "--method", "transplant", "--prompts", prompts, "-o", tmp_path / "out"]
    assert run(*call, *words) == 1
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
    assert not cache_folder().exists()


def test_an_adapter_is_finetuned_on_conversations(pair: Any, result: Path, tmp_path: Path) -> None:
    new = Backbone.open(pair[1])
    before = share_right(peft.PeftModel.from_pretrained(new.load(), result).eval(), new)
    data = save(tmp_path / "talks.jsonl", labeled=True)
    call = ["finetune", result, "--data", data, "--epochs", 30, "--batch-size", 4, "--learning-rate", "1e-2"]
    assert run(*call, "-o", tmp_path / "out") == 0
    after = share_right(peft.PeftModel.from_pretrained(new.load(), tmp_path / "out").eval(), new)
    assert after > before


def written(folder: Path, adapter: Path, template: str, end: str, messages: list[dict[str, str]]) -> str:
    """What plain transformers and PEFT answer through a chat template."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), str(adapter)).eval()
    ids = tokenizer.apply_chat_template(
        messages, chat_template=template, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    stops = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(end)]
    found = model.generate(**ids, max_new_tokens=6, do_sample=False, eos_token_id=stops)[0, ids["input_ids"].shape[1] :]
    kept = [token for token in found.tolist() if token not in stops]
    return tokenizer.decode(kept).strip()


def test_chat_asks_every_model_through_its_own_template_and_remembers(pair: Any, result: Path) -> None:
    old, new, adapter = pair
    models = load_models(new, str(result), old_base=str(old), old_adapter=str(adapter), dtype="float32")
    sides = {"upgraded": (new, result, CHATML, "<|im_end|>"), "old + adapter": (old, adapter, LLAMA2, "</s>")}
    history: dict[str, list[dict[str, str]]] = {name: [] for name in sides}
    for question in list(ANSWERS)[:2]:
        answers = ask(models, question, length=6)
        for name, side in sides.items():
            history[name].append({"role": "user", "content": question})
            assert answers[name] == written(*side, history[name])
            history[name].append({"role": "assistant", "content": answers[name]})
    for question in list(ANSWERS) * 3:  # the context of 256 tokens is full before that
        ask(models, question, length=6)
    assert 2 <= len(models[1].history) < 2 * 3 * len(ANSWERS)
