"""Upgrade all adapters of a user, or of a list, from one old backbone to one new backbone.

    python hub_scripts/upgrade_collection.py --user me --from org/old-backbone --to org/new-backbone -o out --dry-run
    python hub_scripts/upgrade_collection.py --user me --from org/old-backbone --to org/new-backbone -o out
    python hub_scripts/upgrade_collection.py --list ids.txt --from OLD --to NEW -o out --push-to me --suffix=-new

--dry-run lists what would be done and reads only configs. The map is loaded (--map), or built from both backbones and
cached; with --map the old backbone is opened only if the method or the type of an adapter needs it.
Each finished adapter is recorded in out/journal.jsonl: run the same command again to continue after an interruption
and to retry what failed. Failures are listed at the end, and the exit code is then 1.
Log in first (hf auth login), or set HF_TOKEN.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections import Counter
from collections.abc import Sequence

from peft_lorasuite import LoraSuiteError, push_upgraded, upgrade_many
from peft_lorasuite.cli.common import non_empty
from peft_lorasuite.hub.push import check_push
from peft_lorasuite.hub.repository import check_id
from peft_lorasuite.io.source import split_revision
from peft_lorasuite.models.backbone import Backbone
from peft_lorasuite.progress import progress_bars
from peft_lorasuite.upgrading.adapter_list import AdapterPlan, find_adapters, plan_many, read_names
from peft_lorasuite.upgrading.collection import open_collection
from peft_lorasuite.upgrading.journal import Outcome
from peft_lorasuite.upgrading.upgrade import Upgraded


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="upgrade_collection.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.register("type", None, non_empty)
    names = parser.add_mutually_exclusive_group(required=True)
    names.add_argument("--user", metavar="NAME", help="user or organization: its adapters with OLD as base model")
    names.add_argument("--list", metavar="FILE", help="text file: a Hub id, ID@REVISION or folder per line, # comments")
    parser.add_argument("--from", dest="old", required=True, metavar="OLD", help="old backbone of all the adapters")
    parser.add_argument("--to", required=True, metavar="NEW", help="new backbone")
    parser.add_argument("-o", "--output", required=True, metavar="DIR", help="folder for the results and the journal")
    parser.add_argument("--map", metavar="MAP", help="upgrade map: Hub id or folder (default: cached or built)")
    parser.add_argument("--method", default="auto", help="see `peft-lorasuite upgrade --help` (default: auto)")
    parser.add_argument("--push-to", metavar="OWNER", help="push each result to OWNER/<its name><suffix>")
    parser.add_argument("--suffix", default="-upgraded", help="end of the repositories' names (default: -upgraded)")
    parser.add_argument("--private", action="store_true", help="create private repositories; refuse public ones")
    parser.add_argument("--overwrite", action="store_true", help="replace other content of the repositories")
    parser.add_argument("--dry-run", action="store_true", help="list what would be done, and stop")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("peft_lorasuite").setLevel(logging.INFO)
    try:
        return run(args)
    except LoraSuiteError as error:
        print(f"upgrade_collection: {error}", file=sys.stderr)
        return 1


def run(args: argparse.Namespace) -> int:
    """List, upgrade and report; return the exit code."""
    old = split_revision(args.old)[0]
    names = read_names(args.list) if args.list else find_adapters(args.user, old)
    planned = plan_many(names, args.output, base=old)
    for plan in planned:
        print(summary(plan, args))
    failed = {plan.adapter: plan.problem for plan in planned if plan.problem}
    chosen = [plan.adapter for plan in planned if not plan.problem]
    print(f"{len(chosen)} of {len(planned)} adapters sit on {old}")
    if args.push_to:
        check_repos(chosen, args)
    if args.dry_run:
        return 0
    outcomes = upgrade_all(chosen, args) if chosen else []
    failed |= {outcome.adapter: outcome.error for outcome in outcomes if outcome.status == "failed"}
    counts = Counter(outcome.status for outcome in outcomes)
    print(f"{counts['done']} upgraded, {counts['kept']} kept from before")
    for name, reason in failed.items():
        print(f"failed: {name}: {reason}", file=sys.stderr)
    return 1 if failed else 0


def upgrade_all(chosen: Sequence[str], args: argparse.Namespace) -> list[Outcome]:
    """Upgrade the adapters with one map, and push each result when it is finished."""

    def push(adapter: str, upgraded: Upgraded) -> dict[str, str]:
        target, private = repo(adapter, args), args.private or None
        pushed = push_upgraded(upgraded, target, private=private, overwrite=args.overwrite)
        return {"repo": pushed.repo_id, "commit": pushed.commit}

    if args.push_to:
        check_push(repo(chosen[0], args), split_revision(args.to)[0])
    new = Backbone.open(args.to)
    upgrade_map, old = open_collection(
        chosen, args.old, new, upgrade_map=args.map, method=args.method, progress=progress_bars
    )
    return upgrade_many(
        chosen, upgrade_map, args.output, method=args.method, old=old, new=new,
        then=push if args.push_to else None, progress=progress_bars,
    )  # fmt: skip


def summary(plan: AdapterPlan, args: argparse.Namespace) -> str:
    """Return what would be done with one adapter."""
    if plan.problem:
        return f"skip     {plan.adapter}: {plan.problem}"
    action = "done   " if plan.done else "upgrade"
    line = f"{action}  {plan.adapter} (rank {plan.rank}, {plan.size / 1e6:.2f} MB) -> {args.output}/{plan.folder}"
    return f"{line} and {repo(plan.adapter, args)}" if args.push_to else line


def repo(adapter: str, args: argparse.Namespace) -> str:
    """Return the repository of a result."""
    name = split_revision(adapter)[0].rstrip("/").rpartition("/")[2]
    return f"{args.push_to}/{name}{args.suffix}"


def check_repos(chosen: Sequence[str], args: argparse.Namespace) -> None:
    """Check before the work that every result can be pushed to a repository of its own."""
    taken: dict[str, str] = {}
    for name in chosen:
        other = taken.setdefault(check_id(repo(name, args)), name)
        if other != name:
            raise LoraSuiteError(
                "two adapters would be pushed to one repository", where=repo(name, args), got=f"{other} and {name}",
                do="upgrade them in two runs with different values of --suffix",
            )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
