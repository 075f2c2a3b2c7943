"""Run adapters in llama.cpp, and compare its greedy tokens and logits with those of PEFT.

llama.cpp is built from the sources in llama-cpp-python, which has no wheel: 10 to 25 minutes, once; with the extra
``serving`` the installed one is used. Its own converters make the GGUF files, in float32. Each adapter is run as PEFT
saves it (or as `upgrade` writes it) and as `export --for llama.cpp` writes it. ``of`` is the number of tokens that each
generates; those of the bare backbone are counted beside them, which shows that the comparison can fail.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import peft
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from common import RESULTS, hide_loading_bars, load_task, machine, write_json
from pico import randomize
from served import adapter, load
from serving import CONVERTER, fetch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from peft_lorasuite import LoraSuiteError, MapOptions, UpgradeMap, check, export, upgrade
from peft_lorasuite.compat import cache_argument, output_cache

RUNNER = Path(__file__).parent / "llama_runner.py"
BUILD = ("-DLLAVA_BUILD=OFF", "-DGGML_NATIVE=ON", "-DGGML_OPENMP=OFF", "-DGGML_LLAMAFILE=OFF", "-DLLAMA_CURL=OFF")
BESIDE = ("diskcache", "sentencepiece")
"""Packages that llama-cpp-python and the converter import, beside those that are installed."""
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS: dict[str, tuple[Any, float]] = {
    "LoRA of all linear layers": (peft.LoraConfig(r=8, lora_alpha=16, target_modules=LINEAR), 0.03),
    "ranks and scalings per module": (
        peft.LoraConfig(r=8, lora_alpha=16, target_modules=LINEAR, rank_pattern={"q_proj": 16, "down_proj": 3},
                        alpha_pattern={"v_proj": 2, "down_proj": 12}), 0.03,
    ),
    "rsLoRA": (peft.LoraConfig(r=8, lora_alpha=8, target_modules=LINEAR, use_rslora=True), 0.03),
    "AdaLoRA": (peft.AdaLoraConfig(init_r=8, target_r=4, total_step=10, target_modules=LINEAR), 0.15),
    "LoHa": (peft.LoHaConfig(r=2, alpha=2, target_modules=["q_proj", "v_proj"]), 0.15),
}  # fmt: skip
"""Name -> config of an adapter with random weights, and their scale."""
TABLES: dict[str, tuple[Any, float]] = {
    "LoRA of the embedding": (peft.LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"]), 0.2),
    "LoRA of the head": (peft.LoraConfig(r=4, target_modules=["v_proj", "lm_head"]), 0.2),
    "new rows of two tokens": (
        peft.LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [253, 260]}), 0.2,
    ),
}  # fmt: skip
METHODS = ("transplant", "lorasuite")
TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 16,
        "num_key_value_heads": 2, "tie_word_embeddings": False}  # fmt: skip
TEXTS = (
    "The capital of France is",
    "Once upon a time there was a little girl who",
    "Water boils when",
    "def add(a, b):\n",
    "Please choose the correct answer to the question: Which of these is a mammal?\n\nAnswer1: the trout Answer2: the "
    "whale Answer3: the lizard\n\nAnswer format: answer1/answer2/answer3\n\n",
)
NEW = 24
"""Greedy tokens per prompt."""
Outputs: TypeAlias = "tuple[list[list[int]], list[torch.Tensor]]"
"""The tokens after each prompt, and the logits at each position of prompt and tokens."""

ERRORS = {"converter": "error in the converter", "llama.cpp": "llama.cpp ends", "refused": "refused", "": ""}
"""How an error begins -> cell of the table."""


def runtime(folder: Path, *, build: bool = True) -> dict[str, str]:
    """Return the variables of a process that runs llama.cpp, which is built first if it has to be and may be."""
    target = folder / "llama.cpp-runtime"
    if not target.exists() and find_spec("llama_cpp") is None:
        if not build:
            return {}
        source = next((folder / "files").glob("llama_cpp_python-*"))
        call = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target), str(source)]
        subprocess.run([*call, *BESIDE], check=True, env={**os.environ, "CMAKE_ARGS": " ".join(BUILD)})
    paths = os.pathsep.join([str(target), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "GGML_NO_BACKTRACE": "1", "PYTHONPATH": paths}


class Llama:
    """llama.cpp with one backbone, and PEFT beside it."""

    def __init__(
        self, base: Path, prompts: Sequence[list[int]], packages: Path, work: Path, variables: dict[str, str]
    ) -> None:
        self.base, self.prompts, self.packages, self.work, self.variables = base, prompts, packages, work, variables
        self.gguf = work / "backbone.gguf"
        if not self.gguf.exists():
            work.mkdir(parents=True, exist_ok=True)
            self._python([packages / "convert_hf_to_gguf.py", base, "--outtype", "f32", "--outfile", self.gguf])
        self.bare = self.greedy(None)

    def _python(self, call: list[Any]) -> None:
        names = [sys.executable, "-W", "ignore", *map(str, call)]
        result = subprocess.run(names, capture_output=True, text=True, check=False, env=self.variables)
        if result.returncode:
            lines = result.stderr.strip().splitlines() or [f"exit code {result.returncode}"]
            failed = (line[line.index("GGML_ASSERT") :] for line in lines if "GGML_ASSERT" in line)
            raise RuntimeError(next(failed, lines[-1])[:200])

    @torch.no_grad()
    def greedy(self, folder: Path | None) -> Outputs:
        """Return PEFT's greedy tokens and logits, with an adapter or without one."""
        model: Any = load(self.base)
        if folder is not None:
            model = peft.PeftModel.from_pretrained(model, str(folder)).eval()
        tokens, rows = [], []
        for prompt in self.prompts:
            answer: list[int] = []
            given, ids = {}, prompt
            while len(answer) < NEW:
                out = model(input_ids=torch.tensor([ids]), use_cache=True, **given)
                given, ids = cache_argument(output_cache(out)), [int(out.logits[0, -1].argmax())]
                answer += ids
            tokens.append(answer)
            rows.append(model(input_ids=torch.tensor([prompt + answer])).logits[0])
        return tokens, rows

    def compare(self, folder: Path | None, wanted: Outputs) -> dict[str, Any] | str:
        """Return how far llama.cpp is from PEFT with an adapter (without one: None), or the converter's error."""
        lora, source, out = self.work / "lora.gguf", self.work / "input.json", self.work / "output.npz"
        lora.unlink(missing_ok=True)
        tokens, rows = wanted
        forced = [prompt + answer for prompt, answer in zip(self.prompts, tokens, strict=True)]
        source.write_text(json.dumps({"prompts": self.prompts, "forced": forced, "new": NEW}), encoding="utf-8")
        if folder is not None:
            try:
                self._python([self.packages / CONVERTER, folder, "--base", self.base, "--outtype", "f32", "--outfile",
                              lora])  # fmt: skip
            except RuntimeError as error:
                return f"converter: {error}"
        try:
            self._python([RUNNER, self.gguf, "-" if folder is None else lora, source, out])
        except RuntimeError as error:
            return f"llama.cpp: {error}"
        found = np.load(out)
        errors = [torch.from_numpy(found[f"logits{n}"]) - row for n, row in enumerate(rows)]
        return {
            "equal tokens": _equal(found["tokens"].tolist(), tokens),
            "of": sum(map(len, tokens)),
            "tokens of the bare backbone": _equal(self.bare[0], tokens),
            "largest error of a logit": round(max(float(error.abs().max()) for error in errors), 5),
            "spread of the logits": round(float(torch.cat(rows).std()), 3),
        }

    def row(self, folder: Path | None) -> dict[str, Any]:
        """Return what llama.cpp makes of an adapter as it is and exported; of the bare backbone without one."""
        if folder is None:
            return {"as saved": self.compare(None, self.bare)}
        out, wanted = self.work / "exported" / folder.name, self.greedy(folder)
        row: dict[str, Any] = {"check": check(folder, engine="llama.cpp", base=str(self.base)).passed}
        row["as saved"] = self.compare(folder, wanted)
        try:
            export(folder, out, engine="llama.cpp", base=str(self.base), overwrite=True)
            row["exported"] = self.compare(out, wanted)
        except LoraSuiteError as error:
            row["exported"] = f"refused: {error.what}"
        return row


def _equal(one: list[list[int]], other: list[list[int]]) -> int:
    """Return how many tokens are equal, each sequence up to its first difference."""
    count = 0
    for left, right in zip(one, other, strict=True):
        same = [a == b for a, b in zip(left, right, strict=True)]
        count += same.index(False) if False in same else len(same)
    return count


def tiny(folder: Path, base: Path) -> Path:
    """Write a tiny random Llama with a head of its own and the tokenizer of a backbone."""
    if not folder.exists():
        config = AutoConfig.from_pretrained(base, **TINY)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        randomize(model, 1)
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def upgrades(args: argparse.Namespace, work: Path) -> dict[str, Path]:
    """Upgrade the adapter of the old backbone to the backbone by each method."""
    folders = {method: work / method for method in METHODS}
    todo = [method for method in METHODS if not folders[method].exists()]
    if todo:
        upgrade_map = UpgradeMap.build(args.old, args.base, MapOptions(layer_map="proportional"))
        prompts = load_task("arc", args.data, 8).prompts[: args.prompts]
        for method in todo:
            given = prompts if method == "transplant" else None
            upgraded = upgrade(args.adapter, upgrade_map, method=method, prompts=given, old=args.old, new=args.base)
            upgraded.save(folders[method])
    return {f"upgraded by {method}": folder for method, folder in folders.items()}


def rows(
    llama: Llama, title: str, kinds: dict[str, tuple[Any, float]], others: dict[str, Path]
) -> list[dict[str, Any]]:
    """Run the bare backbone, adapters with random weights, and other ones."""
    folders = {name: llama.work / "adapters" / name.replace(" ", "-") for name in kinds}
    for name, folder in folders.items():
        if not folder.exists():
            config, scale = kinds[name]
            adapter(folder, llama.base, config, scale=scale)
    found = []
    for name, folder in {"none": None, **folders, **others}.items():
        file = llama.work / "rows" / f"{name}.json"  # an interrupted run continues where it stopped
        if not file.exists():
            write_json(file, {"backbone": title, "adapter": name} | llama.row(folder))
        found.append(json.loads(file.read_text(encoding="utf-8")))
        print(json.dumps(found[-1]), flush=True)
    return found


def table(found: Sequence[dict[str, Any]]) -> str:
    """Return the equal tokens and the errors of the logits."""
    lines = ["| backbone | adapter | `check` | as saved | exported | tokens of the bare backbone | error of a logit |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for row in found:
        results = [row["as saved"], row.get("exported", "")]
        whole = next((one for one in reversed(results) if isinstance(one, dict)), None)
        cells = [_cell(one) for one in results]
        cells += [f"{whole['tokens of the bare backbone']} of {whole['of']}", f"{whole['largest error of a logit']:.0e}"
                  ] if whole else ["", ""]  # fmt: skip
        passed = {True: "passes", False: "fails", None: ""}[row.get("check")]
        lines.append(f"| {row['backbone']} | {row['adapter']} | {passed} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(result: dict[str, Any] | str) -> str:
    return (
        f"{result['equal tokens']} of {result['of']}" if isinstance(result, dict) else ERRORS[result.partition(":")[0]]
    )


def main() -> None:
    """Run the adapters."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--packages", type=Path, required=True, help="folder for the packages, kept between runs")
    parser.add_argument("--work", type=Path, required=True, help="folder for all files that are made")
    parser.add_argument("--base", type=Path, required=True, help="folder of a Llama with tied tables: SmolLM2-135M")
    parser.add_argument("--old", type=Path, help="folder of an old backbone, whose adapter is upgraded")
    parser.add_argument("--adapter", type=Path, help="folder of this adapter")
    parser.add_argument("--data", type=Path, help="folder of the LLM-Adapters collection, for the prompts")
    parser.add_argument("--prompts", type=int, default=32, help="prompts of the upgrade")
    parser.add_argument("--out", type=Path, default=RESULTS / "serving" / "llama_cpp.json")
    args = parser.parse_args()
    hide_loading_bars()
    packages = fetch("llama.cpp", args.packages)
    variables = runtime(args.packages)
    others = upgrades(args, args.work / "upgraded") if args.old else {}
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
    llama = Llama(args.base, prompts, packages, args.work / "real", variables)
    found = rows(llama, f"{args.base.name}, tied tables", KINDS | TABLES, others)
    small = tiny(args.work / "tiny-backbone", args.base)
    llama = Llama(small, prompts, packages, args.work / "tiny", variables)
    found += rows(llama, "tiny random Llama, a head of its own", TABLES, {})
    write_json(args.out, {"machine": machine(), "rows": found})
    args.out.with_suffix(".md").write_text(table(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
