"""Exported adapters in the programs themselves, where their packages are: `benchmarks/serving*.py` fetch them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from benchmark_modules import benchmark_modules
from pico import VOCABULARY
from served import adapter, backbone, distance, logits

from peft_lorasuite import check, export

PACKAGES = os.environ.get("LORASUITE_ENGINE_PACKAGES", "")
PROGRAMS = ("vllm", "sglang", "mlx", "llama.cpp")
REFUSED = {"vllm": "adalora", "sglang": "ranks", "mlx": "lora", "llama.cpp": "adalora"}
"""Program -> an adapter that its loader ends with an error for, and `check` refuses."""

pytestmark = pytest.mark.skipif(
    not PACKAGES, reason="needs the packages of the programs, over 300 MB: benchmarks/serving.py --packages FOLDER"
    " fetches them, LORASUITE_ENGINE_PACKAGES names the folder",
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def programs() -> Iterator[None]:
    """Let the modules of benchmarks be imported."""
    with benchmark_modules():
        yield


@pytest.mark.parametrize("engine", PROGRAMS)
def test_the_loader_agrees_with_the_check(engine, tmp_path) -> None:
    import serving

    packages = Path(PACKAGES) / engine
    if not packages.exists():
        pytest.skip(f"no {packages}")
    base, kind = backbone(tmp_path / "base"), REFUSED[engine]
    source = adapter(tmp_path / "adapter", base, kind)
    assert not check(source, engine=engine).passed
    assert isinstance(serving.load(engine, packages, base, source, tmp_path / "before"), str)
    export(source, tmp_path / "out", engine=engine)
    loaded = serving.load(engine, packages, base, tmp_path / "out", tmp_path / "after")
    if engine == "llama.cpp":
        assert loaded == "converted"
    else:
        assert distance(logits(base, source), loaded, logits(base)) < 1e-4


@pytest.mark.parametrize("version", ["0.10.0", "0.13.2", "0.14.0", "0.17.1"])
def test_an_older_peft_computes_the_same_with_what_is_written(version, tmp_path) -> None:
    import serving_peft

    packages = Path(PACKAGES) / f"peft-{version}"
    if not packages.exists():
        pytest.skip(f"no {packages}")
    written = {kind: serving_peft.write(tmp_path, kind) for kind in ("lora", "ranks", "dora", "adalora", "tokens")}
    for row in serving_peft.rows(version, packages, tmp_path, written):
        assert row["exported"] < 1e-4, row
        if row["adapter"] != "tokens":  # since PEFT 0.15
            assert row["as upgrade writes it"] < 1e-4, row


@pytest.mark.parametrize("kind", ["ranks", "adalora", "tokens"])
def test_llama_cpp_generates_what_peft_generates(kind, tmp_path) -> None:
    import serving_llama

    packages, variables = Path(PACKAGES) / "llama.cpp", serving_llama.runtime(Path(PACKAGES), build=False)
    if not packages.exists() or not variables:
        pytest.skip("llama.cpp was not built")
    base = backbone(tmp_path / "base")
    words = f"'w{' w'.join(map(str, range(40)))}'"
    train = f"import sentencepiece; sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter([{words}]), " \
            f"model_prefix={str(base / 'tokenizer')!r}, vocab_size=30, hard_vocab_limit=False)"  # fmt: skip
    subprocess.run([sys.executable, "-c", train], check=True, env=variables, capture_output=True)
    prompts = torch.randint(3, VOCABULARY, (3, 8), generator=torch.Generator().manual_seed(1)).tolist()
    prompts[0][3:5] = [22, 35]  # the tokens of KINDS
    llama = serving_llama.Llama(base, prompts, packages, tmp_path / "work", variables)
    row = llama.row(adapter(tmp_path / kind, base, kind))
    assert row["check"] is False
    assert row["exported"]["equal tokens"] == row["exported"]["of"] > row["exported"]["tokens of the bare backbone"]
    assert row["exported"]["largest error of a logit"] < 1e-3
    assert isinstance(row["as saved"], str) or row["as saved"]["equal tokens"] < row["as saved"]["of"]
