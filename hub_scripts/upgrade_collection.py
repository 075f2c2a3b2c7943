"""Upgrade all adapters of a user, or of a list, that sit on one old backbone: one map, many upgrades.

    python hub_scripts/upgrade_collection.py --user me --from org/old-backbone --to org/new-backbone -o out --dry-run
    python hub_scripts/upgrade_collection.py --user me --from org/old-backbone --to org/new-backbone -o out
    python hub_scripts/upgrade_collection.py --list ids.txt --from OLD --to NEW -o out --push-to me --suffix=-new

--dry-run lists what would be done and reads nothing but configs. The map is loaded (--map) or built once, so that each
backbone is read at most once however many adapters there are. out/journal.jsonl gets a line for every adapter as it is
finished: run the same command again to go on where it stopped and to try again what failed. Failures are listed at the
end, and the exit code is then 1. Log in first (hf auth login), or set HF_TOKEN.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft_lorasuite import LoraSuiteError, UpgradeMap, push_upgraded
from peft_lorasuite.adapters.adapter import reads_backbones
from peft_lorasuite.hub.push import check_push
from peft_lorasuite.hub.repository import check_id
from peft_lorasuite.io.paths import is_file
from peft_lorasuite.io.source import Source, name_and_revision
from peft_lorasuite.mapping.fingerprint import check_same
from peft_lorasuite.methods.base import reads_old
from peft_lorasuite.models.backbone import Backbone
from peft_lorasuite.progress import bars
from peft_lorasuite.upgrading.collection import Planned, find_adapters, plan_many, upgrade_many
from peft_lorasuite.upgrading.map_cache import map_for


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return the exit code."""
    args = parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("peft_lorasuite").setLevel(logging.INFO)
    try:
        return run(args)
    except LoraSuiteError as error:
        print(f"upgrade_collection: {error}", file=sys.stderr)
        return 1


def parser() -> argparse.ArgumentParser:
    """Describe the arguments."""
    made = argparse.ArgumentParser(
        prog="upgrade_collection.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = made.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--user", metavar="NAME", help="user or organisation: its adapters whose card names the backbone"
    )
    which.add_argument("--list", metavar="FILE", help="text file: a Hub id, ID@REVISION or folder a line, # comments")
    made.add_argument("--from", dest="old", required=True, metavar="OLD", help="old backbone that all of them sit on")
    made.add_argument("--to", required=True, metavar="NEW", help="new backbone")
    made.add_argument("-o", "--output", required=True, metavar="DIR", help="folder for the results and the journal")
    made.add_argument("--map", metavar="MAP", help="upgrade map: Hub id or folder (default: built once and kept)")
    made.add_argument("--method", default="auto", help="how to carry them over (see peft-lorasuite upgrade --help)")
    made.add_argument("--rank", type=int, metavar="R", help="rank of the results (default: each adapter's)")
    made.add_argument("--push-to", metavar="OWNER", help="push each result to OWNER/<its name><suffix>")
    made.add_argument("--suffix", default="-upgraded", help="end of the new repositories' names (default: -upgraded)")
    made.add_argument("--private", action="store_true", help="make new repositories private; refuse public ones")
    made.add_argument("--overwrite", action="store_true", help="replace repositories that hold something else")
    made.add_argument("--dry-run", action="store_true", help="list what would be done, and do nothing")
    return made


def run(args: argparse.Namespace) -> int:
    """List, upgrade, report; return the exit code."""
    old, old_revision = name_and_revision(args.old)
    names = read_list(Path(args.list)) if args.list else find_adapters(args.user, old)
    planned = plan_many(names, args.output, base=old)
    for plan in planned:
        print(line(plan, args))
    chosen = [plan.adapter for plan in planned if not plan.problem]
    print(f"{len(chosen)} of {len(planned)} adapters sit on {old}")
    if args.push_to:
        check_repos(chosen, args)
    if args.dry_run:
        return 0
    if args.push_to and chosen:
        check_push(repo(chosen[0], args), name_and_revision(args.to)[0])
    new, before = Backbone.open(args.to), Backbone.open(old, revision=old_revision)
    upgrade_map = UpgradeMap.load(args.map) if args.map else map_for(before, new, progress=bars)
    check_same(upgrade_map.new, new, "new")
    runs = reads_old(args.method, upgrade_map) or any(reads_backbones_of(name) for name in chosen)
    outcomes = upgrade_many(
        chosen, upgrade_map, args.output, method=args.method, rank=args.rank, old=before if runs else None,
        new=new, then=pusher(args) if args.push_to else None, progress=bars,
    )  # fmt: skip
    failed = [(outcome.adapter, outcome.error) for outcome in outcomes if outcome.status == "failed"]
    failed += [(plan.adapter, plan.problem) for plan in planned if plan.problem]
    kept = sum(outcome.status == "kept" for outcome in outcomes)
    print(f"{len(outcomes) - kept - sum(o.status == 'failed' for o in outcomes)} upgraded, {kept} kept from before")
    for name, why in failed:
        print(f"failed: {name}: {why}", file=sys.stderr)
    return 1 if failed else 0


def read_list(path: Path) -> list[str]:
    """Read the names of a list."""
    if not is_file(path):
        raise LoraSuiteError("there is no such list", where=path, wanted="a text file with a name a line")
    try:
        whole = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise LoraSuiteError(f"the list cannot be read: {error}", where=path, wanted="text in UTF-8") from error
    lines = (text.partition("#")[0].strip() for text in whole.splitlines())
    return [text for text in lines if text]


def line(plan: Planned, args: argparse.Namespace) -> str:
    """Tell what would be done with one adapter."""
    if plan.problem:
        return f"skip     {plan.adapter}: {plan.problem}"
    action = "done     " if plan.done else "upgrade  "
    place = f" and {repo(plan.adapter, args)}" if args.push_to else ""
    return f"{action}{plan.adapter} (rank {plan.rank}, {plan.size / 1e6:.2f} MB) -> {args.output}/{plan.folder}{place}"


def repo(adapter: str, args: argparse.Namespace) -> str:
    """Name the repository of a result."""
    name = name_and_revision(adapter)[0].rstrip("/").rsplit("/", 1)[-1]
    return f"{args.push_to}/{name}{args.suffix}"


def check_repos(chosen: Sequence[str], args: argparse.Namespace) -> None:
    """Refuse names that are none, and two results under one name, before anything is done."""
    taken: dict[str, str] = {}
    for name in chosen:
        other = taken.setdefault(check_id(repo(name, args)), name)
        if other != name:
            raise LoraSuiteError(
                "two adapters would be pushed to one repository", where=repo(name, args), got=f"{other} and {name}",
                do="upgrade them in two runs, each with a --suffix of its own",
            )  # fmt: skip


def reads_backbones_of(name: str) -> bool:
    """Whether an adapter is of a kind that needs both backbones; what is wrong with it is told when its turn comes."""
    place, revision = name_and_revision(name)
    try:
        return reads_backbones(Source(place, "adapter", revision))
    except LoraSuiteError:
        return False


def pusher(args: argparse.Namespace) -> Any:
    """Return what pushes one result and notes where."""

    def push(adapter: str, carried: Any) -> dict[str, str]:
        done = push_upgraded(
            carried, repo(adapter, args), private=args.private or None, overwrite=args.overwrite,
        )  # fmt: skip
        return {"repo": done.repo_id, "commit": done.commit}

    return push


if __name__ == "__main__":
    sys.exit(main())
