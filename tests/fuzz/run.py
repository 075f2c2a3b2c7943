"""Run the fuzzer by itself: ``python tests/fuzz/run.py --cases 5000 -o benchmarks/results/fuzz``."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
ROOT = Path(__file__).parent.parent.parent
sys.path += [str(ROOT / "tests" / "support"), str(ROOT)]


def main() -> int:
    """Run the cases, print and write the counts; return 1 if there is a fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, help="folder for the counts")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        os.environ["HF_HOME"] = str(Path(home) / "hf")
        import warnings

        import fuzzer
        from world import World

        warnings.simplefilter("ignore")
        world, start, outcomes = World(Path(home) / "world"), time.perf_counter(), []
        for outcome in fuzzer.run_cases(
            world, range(args.first, args.first + args.cases), args.seed, Path(home) / "cases"
        ):
            outcomes.append(outcome)
            if outcome.verdict in fuzzer.FAULTS:
                print(f"case {outcome.number}, {outcome.kind}: {outcome.verdict}: {outcome.detail}", flush=True)  # noqa: T201
        seconds = time.perf_counter() - start
    found = fuzzer.faults(outcomes)
    counts = {fault: sum(one.verdict == fault for one in found) for fault in fuzzer.FAULTS}
    values = {
        "cases": len(outcomes), "seed": args.seed, "seconds": round(seconds, 1),
        "slowest": round(max(one.seconds for one in outcomes), 2), "faults": counts,
        "outcomes": fuzzer.summarize(outcomes),
    }  # fmt: skip
    print(json.dumps(values, indent=1))  # noqa: T201
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "fuzz.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
