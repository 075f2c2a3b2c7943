"""What serving programs make of adapters as PEFT saves them and as `export` writes them, by the programs' own loaders.

Their packages are fetched with pip and unpacked, not installed: vLLM (336 MB, of which only its loader is kept),
SGLang, mlx-lm with mlx for CPUs, and llama.cpp's converter of llama-cpp-python's sources. `serving_llama.py` runs
llama.cpp, `serving_peft.py` older versions of PEFT.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from common import RESULTS
from served import KINDS, adapter, backbone, distance, logits

from peft_lorasuite import LoraSuiteError, check, export

LOADERS = Path(__file__).parent / "engine_code.py"
PACKAGES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "vllm": (("vllm==0.33.0",), ("vllm/lora/",)),
    "sglang": (("sglang==0.5.23",), ("sglang/srt/lora/",)),
    "mlx": (("mlx==0.32.4", "mlx-cpu==0.32.4", "mlx-lm==0.32.2"), ("",)),
    "llama.cpp": (("llama-cpp-python==0.3.36",), ("convert_", "gguf-py/", "conversion/")),
}
"""Program -> its packages, and the beginnings of the paths that are kept."""
CONVERTER = "convert_lora_to_gguf.py"


def fetch(program: str, folder: Path) -> Path:
    """Download the packages of a program and unpack them; return their folder."""
    names, kept = PACKAGES[program]
    target = folder / program
    if target.exists():
        return target
    source = ["--no-binary", ":all:"] if program == "llama.cpp" else []
    for name in names:
        call = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", *source, "-d", str(folder / "files"), name]
        subprocess.run(call, check=True)
    for name in names:
        stem = name.partition("==")[0].replace("-", "_")
        file = next((folder / "files").glob(f"{stem}-{name.partition('==')[2]}*"))
        _unpack(file, target, kept)
    return target


def _unpack(file: Path, target: Path, kept: Iterable[str]) -> None:
    target.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".whl":
        with zipfile.ZipFile(file) as archive:
            archive.extractall(target, [name for name in archive.namelist() if name.startswith(tuple(kept))])
        return
    with tarfile.open(file) as archive:
        for member in archive.getmembers():
            _, found, path = member.name.partition("/vendor/llama.cpp/")
            if found and path.startswith(tuple(kept)):
                archive.extract(member.replace(name=path), target, filter="data")


def load(program: str, packages: Path, base: Path, folder: Path, out: Path) -> torch.Tensor | str:
    """Return the logits of a backbone with an adapter as a program loads it, or its error."""
    out.unlink(missing_ok=True)
    if program == "llama.cpp":
        call = [str(packages / CONVERTER), str(folder), "--base", str(base), "--outfile", str(out)]
        result = subprocess.run([sys.executable, *call], capture_output=True, text=True, check=False)
        return "converted" if out.exists() else result.stderr.strip().splitlines()[-1][:200]
    call = [str(LOADERS), program, str(packages), str(base), str(folder), str(out)]
    result = subprocess.run([sys.executable, *call], capture_output=True, text=True, check=False)
    if out.exists():
        return torch.load(out, weights_only=True)
    lines = [line for line in result.stdout.splitlines() if line.startswith("{")] or ['{"error": "no answer"}']
    return str(json.loads(lines[-1])["error"])


def rows(program: str, packages: Path, work: Path, kinds: Iterable[str]) -> list[dict[str, Any]]:
    """Return for each adapter what the program makes of it, saved by PEFT and exported."""
    base = backbone(work / "base")
    bare, found = logits(base), []
    for kind in kinds:
        folder, out = work / "adapters" / kind, work / "out" / program / kind
        if not folder.exists():
            adapter(folder, base, kind)
        wanted = logits(base, folder)
        row: dict[str, Any] = {"program": program, "adapter": kind, "check": check(folder, engine=program).passed}
        row["as saved"] = _result(load(program, packages, base, folder, work / "logits"), wanted, bare)
        try:
            export(folder, out, engine=program, overwrite=True)
            row["exported"] = _result(load(program, packages, base, out, work / "logits"), wanted, bare)
        except LoraSuiteError as error:
            row["exported"] = f"refused: {error.what}"
        found.append(row)
        print(json.dumps(row), flush=True)
    return found


def _result(loaded: torch.Tensor | str, wanted: torch.Tensor, bare: torch.Tensor) -> float | str:
    return loaded if isinstance(loaded, str) else round(distance(wanted, loaded, bare), 6)


def main() -> None:
    """Run the programs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--packages", type=Path, required=True, help="folder for the packages, kept between runs")
    parser.add_argument("--work", type=Path, required=True, help="folder for backbone and adapters")
    parser.add_argument("--programs", default=",".join(PACKAGES), help="default: all")
    parser.add_argument("--adapters", default=",".join(KINDS), help="default: all")
    parser.add_argument("--out", type=Path, default=RESULTS / "serving" / "loaders.json")
    args = parser.parse_args()
    found = []
    for program in args.programs.split(","):
        packages = fetch(program, args.packages)
        found += rows(program, packages, args.work, args.adapters.split(","))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
