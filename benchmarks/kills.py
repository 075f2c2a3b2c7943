"""Commands killed (SIGKILL) while they replace an output: what is in place afterwards, and whether a new run works.

    python benchmarks/kills.py --kills 20 --out benchmarks/results/kills

Every command runs on the demo pair of the package, in a process forked from this one, over an output that an earlier
run wrote with other settings. Half of the kills come at random moments of the run, half before a random operation on a
file or folder while it writes (`killing.py`). Each output must then be the old one or the new one, byte for byte, and
load; the cached maps must load; and the same command must work again and leave no temporary file.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import runpy
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

from common import RESULTS, machine, write_json
from killing import MARK, count_steps, finish, fork, kill_after, kill_at

SCRIPT = Path(__file__).parents[1] / "hub_scripts" / "upgrade_collection.py"
COLLECTION = "upgrade_collection.py"
ADAPTERS = 3
"""Adapters of the collection."""
COLUMNS = (
    "kills", "before writing", "while writing", "after writing", "outputs", "old in place", "new in place",
    "half-written", "second run ok",
)  # fmt: skip
PRELOADED = ("accelerate", "datasets", "peft", "peft_lorasuite.cli.main", "torch", "transformers.trainer")

State = dict[str, str]
"""Path -> SHA-256 of every file of an output."""


@dataclass(frozen=True)
class Place:
    """Folders: inputs, the outputs and the map cache, and temporary files; ``log`` is what the commands print."""

    root: Path
    inputs: Path = field(init=False)
    work: Path = field(init=False)
    temporary: Path = field(init=False)
    log: Path = field(init=False)

    def __post_init__(self) -> None:
        for name, value in {"inputs": "inputs", "work": "work", "temporary": "tmp", "log": "log"}.items():
            object.__setattr__(self, name, self.root / value)
        for folder in (self.inputs, self.work, self.temporary):
            folder.mkdir(parents=True)


def write_inputs(place: Place) -> None:
    """Copy the demo pair and its adapter, which then names its backbone by path; build a map."""
    with resources.as_file(resources.files("peft_lorasuite") / "data" / "demo") as demo:
        for name in ("old", "new"):
            shutil.copytree(demo / name, place.inputs / name)
        for name in ("adapter", *(f"adapter-{number}" for number in range(ADAPTERS))):
            shutil.copytree(demo / "adapter", place.inputs / name)
            config = place.inputs / name / "adapter_config.json"
            values = json.loads(config.read_text()) | {"base_model_name_or_path": str(place.inputs / "old")}
            config.write_text(json.dumps(values))
        items = json.loads((demo / "train.json").read_text())[:8]
    (place.inputs / "data.json").write_text(json.dumps(items))
    (place.inputs / "prompts.txt").write_text("\n".join(item["instruction"] for item in items))
    names = [str(place.inputs / f"adapter-{number}") for number in range(ADAPTERS)]
    (place.inputs / "list.txt").write_text("\n".join(names))
    required(place, ["map", "{}/old", "{}/new", "-o", "{}/map", "--tokens", "64", "-q"])


def calls() -> dict[str, tuple[list[str], list[str]]]:
    """Return the command lines that write the old output and the new one; ``{}`` is the folder of the inputs."""
    out = ["-o", "OUT", "--overwrite", "-q"]
    pair = ["{}/adapter", "--from", "{}/old", "--to", "{}/new"]
    distill = ["distill", *pair, "--map", "{}/map", "--prompts", "{}/prompts.txt", "--set", "epochs=1", *out]
    tune = ["finetune", "{}/adapter", "--base", "{}/old", "--data", "{}/data.json", "--epochs", "1", *out]
    many = [COLLECTION, "--list", "{}/list.txt", "--from", "{}/old", "--to", "{}/new", "--map", "{}/map", "-o", "OUT"]
    commands = {
        "upgrade": (["upgrade", *pair, "--method", "lorasuite", *out], ["--rank", "4"], ["--rank", "8"]),
        "map": (["map", "{}/old", "{}/new", *out], ["--tokens", "64"], ["--tokens", "128"]),
        "finetune": (tune, ["--samples", "2"], ["--samples", "4"]),
        "distill": (distill, ["--rank", "4"], ["--rank", "8"]),
        COLLECTION: (many, ["--method", "lorasuite"], ["--method", "cross-lora"]),
    }
    return {name: ([*words, *first], [*words, *second]) for name, (words, first, second) in commands.items()}


def run(place: Place, words: Sequence[str]) -> int:
    """Run a command in this process; return its exit code."""
    from huggingface_hub import constants

    from peft_lorasuite.cli.main import main

    constants.HF_HOME = str(place.work / "cache")
    tempfile.tempdir = str(place.temporary)
    given = [word.format(place.inputs).replace("OUT", str(place.work / "out")) for word in words]
    if given[0] == COLLECTION:
        return runpy.run_path(str(SCRIPT))["main"](given[1:])
    return main(given)


def required(place: Place, words: Sequence[str]) -> None:
    """Run a command in another process; it must succeed."""
    if finish(fork(partial(run, place, words), place.log)):
        raise SystemExit(place.log.read_text(errors="replace"))


def states(place: Place, name: str) -> list[State | None]:
    """Return what is in place: one output, or those of the collection; None for one that does not exist."""
    out = place.work / "out"
    folders = [out / f"adapter-{number}" for number in range(ADAPTERS)] if name == COLLECTION else [out]
    return [state_of(folder) if folder.is_dir() else None for folder in folders]


def state_of(folder: Path) -> State:
    """Return the hashes of the files of a folder, without the seconds that a map took."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(content(path)).hexdigest() for path in files}


def content(path: Path) -> bytes:
    """Return what a file has in it; of a map the seconds are left out, in which equal runs differ."""
    data = path.read_bytes()
    if path.name != "map.json":
        return data
    try:
        values = json.loads(data)
        del values["facts"]["seconds"]
    except (ValueError, KeyError):  # half-written
        return data
    return json.dumps(values).encode()


def load_everything(place: Place) -> int:
    """Load every adapter and map that is in place, as their users do; any error ends the process."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from peft_lorasuite import UpgradeMap

    for path in place.work.rglob("*.json"):
        if MARK in str(path.relative_to(place.work)):
            continue
        if path.name == "map.json":
            UpgradeMap.load(path.parent)
        elif path.name == "adapter_config.json":
            base = json.loads(path.read_text())["base_model_name_or_path"]
            PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(path.parent))
    return 0


def leftovers(*folders: Path) -> list[Path]:
    """Return the temporary folders of the package."""
    return [path for folder in folders for path in folder.rglob("*") if MARK in path.name]


class Trial:
    """The kills of one command.

    Args:
        place: The folders.
        name: The command.
        old: Its call that writes the old output.
        new: Its call that replaces it.
    """

    def __init__(self, place: Place, name: str, old: Sequence[str], new: Sequence[str]) -> None:
        self.place, self.name, self.work = place, name, partial(run, place, new)
        self.kept = place.root / f"kept-{name}"
        shutil.rmtree(place.work, ignore_errors=True)
        place.work.mkdir()
        required(place, old)
        shutil.rmtree(place.work / "cache", ignore_errors=True)
        shutil.copytree(place.work, self.kept)
        self.old = states(place, name)
        self.steps, self.seconds = count_steps(self.work, place.work, place.log)
        self.new = states(place, name)
        if self.old == self.new or finish(fork(partial(load_everything, place), place.log)):
            raise SystemExit(f"{name}: the two outputs are the same, or do not load")
        self.counts: Counter[str] = Counter()

    def kill(self, kill: Callable[[Callable[[], int]], bool]) -> None:
        """Kill the command once, look, and run it again."""
        shutil.rmtree(self.place.work)
        shutil.copytree(self.kept, self.place.work)
        killed = kill(self.work)
        found = states(self.place, self.name)
        writing = bool(leftovers(self.place.work))
        whole = finish(fork(partial(load_everything, self.place), self.place.log)) == 0
        kinds = [
            "half-written" if not whole else "old in place" if one == old else "new in place" if one == new
            else "half-written" for one, old, new in zip(found, self.old, self.new, strict=True)
        ]  # fmt: skip
        done = not killed or (not writing and found == self.new)
        phase = "after" if done else "before" if not writing and found == self.old else "while"
        again = finish(fork(self.work, self.place.log)) == 0
        again = again and states(self.place, self.name) == self.new
        again = again and not leftovers(self.place.work, self.place.temporary)
        again = again and finish(fork(partial(load_everything, self.place), self.place.log)) == 0
        self.counts.update(["kills", f"{phase} writing", *["outputs"] * len(kinds), *kinds])
        self.counts["second run ok"] += again

    def row(self) -> dict[str, Any]:
        """Return the counts."""
        head = {"command": self.name, "seconds": round(self.seconds, 2), "steps": self.steps}
        return head | {column: self.counts[column] for column in COLUMNS}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the counts as Markdown."""
    lines = [f"| command | {' | '.join(COLUMNS)} |", f"|---|{'---:|' * len(COLUMNS)}"]
    total = {"command": "all"} | {column: sum(row[column] for row in rows) for column in COLUMNS}
    for row in (*rows, total):
        lines.append(f"| `{row['command']}` | {' | '.join(str(row[column]) for column in COLUMNS)} |")
    return "\n".join(lines).replace("`all`", "all")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the kills, print and write the table; return 1 if an output was half-written or a second run failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="per command (default: 20)")
    parser.add_argument("--commands", default=",".join(calls()), help="separated by commas (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the moments (default: 0)")
    parser.add_argument("--out", type=Path, default=RESULTS / "kills", help="folder for kills.json and table.md")
    args = parser.parse_args(argv)
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for module in PRELOADED:
        __import__(module)
    rng, rows = random.Random(args.seed), []
    with tempfile.TemporaryDirectory() as scratch:
        place = Place(Path(scratch).resolve())
        write_inputs(place)
        for name in args.commands.split(","):
            trial = Trial(place, name, *calls()[name])
            for number in range(args.kills):
                if number % 2:
                    seconds = rng.uniform(0, trial.seconds)
                    trial.kill(lambda work, at=seconds: kill_after(at, work, place.log))
                else:
                    step = rng.randrange(trial.steps)
                    trial.kill(lambda work, at=step: kill_at(at, work, place.work, place.log))
            rows.append(trial.row())
            print(table(rows), flush=True)
    write_json(args.out / "kills.json", {"seed": args.seed, "rows": rows, "machine": machine()})
    (args.out / "table.md").write_text(table(rows) + "\n", encoding="utf-8")
    return int(any(row["half-written"] or row["second run ok"] < row["kills"] for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
