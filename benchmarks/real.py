"""The main job on real input, through the command line: time and memory of `map` and `upgrade`.

    python benchmarks/real.py --old OLD --new NEW --adapter ADAPTER --out FILE.json [--map DIR] [--prompts FILE]

OLD, NEW and ADAPTER are folders or Hub ids.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from common import machine, watched


def measured(arguments: list[str]) -> dict[str, float]:
    """Run one command of ours; return its seconds and its peak anonymous memory in GB."""
    found = watched(["-m", "peft_lorasuite", *arguments, "--quiet"])
    return {"seconds": found["seconds"], "peak_anonymous_gb": round(found["peak"] / 2**30, 2)}


def told(folder: str) -> dict[str, Any]:
    """Read the report of an upgrade."""
    return json.loads((Path(folder) / "lorasuite_report.json").read_text(encoding="utf-8"))


def main() -> None:
    """Run map and upgrade, and write what they took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("old", "new", "adapter", "out"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--map", help="where to keep the map; by default it is thrown away")
    parser.add_argument("--prompts", help="unlabelled prompts: measure transplant with 128 of them too")
    parser.add_argument("--weights", help="what is to be said of the weights", default="as published")
    parser.add_argument("--dtype", default="auto", help="of the models in transplant: float32 is faster on some CPUs")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        place = args.map or f"{scratch}/map"
        found = {"map": measured(["map", args.old, args.new, "-o", place, "--overwrite"])}
        found["map_size_mb"] = round(sum(file.stat().st_size for file in Path(place).iterdir()) / 1e6, 1)
        facts = json.loads((Path(place) / "map.json").read_text(encoding="utf-8"))
        found |= {"facts": facts["facts"], "layer_map": facts["layers"]}
        command = ["upgrade", args.adapter, "--from", args.old, "--to", args.new, "--map", place]
        found["upgrade"] = measured([*command, "--method", "lorasuite", "-o", f"{scratch}/out"])
        report = told(f"{scratch}/out")
        found |= {"coverage": report["coverage"], "energy_kept": report["energy_kept"]}
        if args.prompts:
            how = ["--method", "transplant", "--prompts", args.prompts, "--dtype", args.dtype]
            found["transplant"] = measured([*command, *how, "-o", f"{scratch}/transplant"])
            found["transplant"] |= {"dtype": args.dtype, **told(f"{scratch}/transplant")["facts"]["transplant"]}
    found |= {"old": Path(args.old).name, "new": Path(args.new).name, "weights": args.weights}
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    Path(args.out).write_text(json.dumps({**found, "machine": machine()}, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
