"""Every causal language model type of transformers as the new backbone: what `distill` and `transplant` make of it.

    python benchmarks/any_type.py                    # the types that the results lack
    python benchmarks/any_type.py --only opt mamba   # these, again
    python benchmarks/any_type.py --refused          # again those that were refused, failed or did not learn
    python benchmarks/any_type.py --table            # the tables of the results, and the one in the package

A type is a tiny random model (`tests/support/tiny_types.py`), saved with a tokenizer; the old backbone is a smaller one
of the same type or a Llama, and PEFT writes its LoRA, on every linear module, with random factors. An upgrade learned
if it leaves less than 90 % of the divergence (KL) from the target, read from the written adapter as PEFT loads it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from common import RESULTS, machine, write_json

ROOT = Path(__file__).parents[1]
SUPPORT = ROOT / "tests" / "support"
FILE, TABLE = RESULTS / "any_type" / "types.json", RESULTS / "any_type" / "table.md"
SHIPPED = ROOT / "peft_lorasuite" / "data" / "methods_by_type.json"
SECONDS = 240
"""Time for one type."""
CHUNK = 40
"""Types of one process."""
ROWS = {
    ("same", "distill"): "type to type",
    ("same", "transplant"): "type to type",
    ("llama", "distill"): "Llama to type",
    ("llama", "transplant"): "Llama to type",
}
"""Pair and method -> title."""
METHODS = ("distill", "transplant")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def work(types: Sequence[str]) -> None:
    """Try types in this process; print one line of JSON for each."""
    import gc
    import logging
    import warnings

    sys.path.insert(0, str(SUPPORT))
    warnings.simplefilter("ignore")
    import torch
    import transformers
    import type_trials

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # collecting the imported libraries takes longer than an upgrade
    with tempfile.TemporaryDirectory() as scratch:
        llama = type_trials.save_old("llama", Path(scratch) / "llama", seed=9)
        for model_type in types:
            with contextlib.redirect_stdout(sys.stderr):  # some models print
                found = type_trials.run_type(model_type, Path(scratch) / "type" / model_type, llama)
            print(json.dumps({"type": model_type, **found}), flush=True)


def measure(types: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Try types in processes of their own; one that hangs or dies costs its type alone."""
    waiting = list(types)
    while waiting:
        chunk = waiting[:CHUNK]
        command = [sys.executable, "-W", "ignore", __file__, "--worker", *chunk]
        with tempfile.TemporaryDirectory() as home, tempfile.TemporaryFile("w+") as errors:
            environment = os.environ | ENVIRONMENT | {"HF_HOME": home, "TMPDIR": home}
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=environment, text=True)
            assert process.stdout is not None
            for model_type in chunk:
                ready, _, _ = select.select([process.stdout], [], [], SECONDS)
                line = process.stdout.readline() if ready else ""
                waiting.remove(model_type)
                if line:
                    yield json.loads(line)
                    continue
                process.kill()
                errors.seek(0)
                last = (errors.read().strip().splitlines() or [""])[-1]
                yield _failed(model_type, f"the process ended: {last}" if ready else f"no end within {SECONDS} s")
                break
            process.kill()
            process.wait()


def _failed(model_type: str, why: str) -> dict[str, Any]:
    found: dict[str, Any] = {"type": model_type, "built": True}
    for pair, method in ROWS:
        found.setdefault(pair, []).append({"method": method, "outcome": "fault", "why": why})
    return found


def outcomes(found: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """Return what each pair and method came to; nothing if the type was not built."""
    rows = {(pair, row["method"]): row for pair, _ in ROWS for row in found.get(pair, ())}
    return {key: rows[key] for key in ROWS if key in rows}


def gets(found: dict[str, Any]) -> str:
    """Return what a type gets without a converter: the last of its methods, or why it gets none."""
    if not found["built"]:
        return found["why"]
    rows = outcomes(found)
    learned = {key for key, row in rows.items() if row["outcome"] == "learned"}
    best = [method for method in METHODS if learned >= {key for key in ROWS if key[1] == method}]
    whys = [row["why"] for key, row in rows.items() if key[1] == "distill" and "why" in row]
    if best or not whys:
        return best[-1] if best else "distill runs, but did not learn on a tiny model"
    return whys[0].partition(";")[0].partition(" (")[0].removeprefix("backbone backbone: ")


def table(types: dict[str, Any]) -> str:
    """Return the counts as Markdown."""
    built = [outcomes(found) for found in types.values() if found["built"]]
    lines = ["| upgrade | method | types | learned | written only | refused | faults |", f"|---|---|{'---:|' * 5}"]
    for key, title in ROWS.items():
        counts = Counter(rows[key]["outcome"] for rows in built)
        kinds = " | ".join(str(counts[kind]) for kind in ("learned", "served", "refused", "fault"))
        lines.append(f"| {title} | `{key[1]}` | {len(built)} | {kinds} |")
    return "\n".join(lines) + "\n"


def read() -> dict[str, Any]:
    """Return the results by type."""
    return json.loads(FILE.read_text(encoding="utf-8"))["types"] if FILE.is_file() else {}


def write(types: dict[str, Any]) -> None:
    """Write the results."""
    write_json(FILE, {"machine": machine(), "types": dict(sorted(types.items()))})


def write_tables(types: dict[str, Any], names: Sequence[str]) -> None:
    """Write the counts, and the table that `peft-lorasuite families --all` shows, of all the named types."""
    import transformers

    TABLE.write_text(table(types), encoding="utf-8")
    shown = {name: gets(types[name]) if name in types else "not measured" for name in sorted(names)}
    write_json(SHIPPED, {"transformers": transformers.__version__, "types": shown})


def main() -> int:
    """Measure what is asked for, and print the counts; return 1 if an upgrade ended in a fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="TYPE", help="measure these types again")
    parser.add_argument("--refused", action="store_true", help="measure again what did not learn by both methods")
    parser.add_argument("--table", action="store_true", help="write the tables of the results")
    parser.add_argument("--worker", nargs="+", metavar="TYPE", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker)
        return 0
    sys.path.insert(0, str(SUPPORT))
    from tiny_types import TYPES

    types = read()
    again = [name for name, found in types.items() if gets(found) != METHODS[-1]] if args.refused else []
    wanted = args.only or again or ([] if args.table else [name for name in TYPES if name not in types])
    for row in measure(wanted):
        print(json.dumps(row), flush=True)
        types[row.pop("type")] = row
        write(types)
    if args.table:
        write_tables(types, TYPES)
    print(table(types))
    return int(any(row["outcome"] == "fault" for found in types.values() for row in outcomes(found).values()))


if __name__ == "__main__":
    raise SystemExit(main())
