"""Exported adapters in the programs' own loaders, where their packages are: `benchmarks/serving.py` fetches them."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from served import adapter, backbone, distance, logits

from peft_lorasuite import check, export

PACKAGES = os.environ.get("LORASUITE_ENGINE_PACKAGES", "")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PROGRAMS = ("vllm", "sglang", "mlx", "llama.cpp")
REFUSED = {"vllm": "adalora", "sglang": "ranks", "mlx": "lora", "llama.cpp": "adalora"}
"""Program -> an adapter that its loader ends with an error for, and `check` refuses."""

pytestmark = pytest.mark.skipif(
    not PACKAGES, reason="needs the packages of the programs, over 300 MB: benchmarks/serving.py --packages FOLDER"
    " fetches them, LORASUITE_ENGINE_PACKAGES names the folder",
)  # fmt: skip


@pytest.fixture(scope="module")
def program() -> Any:
    """Return the module benchmarks/serving.py."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import serving
    finally:
        sys.path.remove(str(BENCHMARKS))
    return serving


@pytest.mark.parametrize("engine", PROGRAMS)
def test_the_loader_agrees_with_the_check(engine, program, tmp_path) -> None:
    packages = Path(PACKAGES) / engine
    if not packages.exists():
        pytest.skip(f"no {packages}")
    base, kind = backbone(tmp_path / "base"), REFUSED[engine]
    source = adapter(tmp_path / "adapter", base, kind)
    assert not check(source, engine=engine).passed
    assert isinstance(program.load(engine, packages, base, source, tmp_path / "before"), str)
    export(source, tmp_path / "out", engine=engine)
    loaded = program.load(engine, packages, base, tmp_path / "out", tmp_path / "after")
    if engine == "llama.cpp":
        assert loaded == "converted"
    else:
        assert distance(logits(base, source), loaded, logits(base)) < 1e-4
