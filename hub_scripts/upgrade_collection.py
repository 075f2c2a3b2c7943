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

import sys
from argparse import Namespace
from collections.abc import Sequence

from peft_lorasuite.cli.common import chat_options
from peft_lorasuite.cli.scripts import add_pair, run_script, script_parser
from peft_lorasuite.hub.collection import assign_repositories, push_each
from peft_lorasuite.hub.push import check_push
from peft_lorasuite.io.source import split_revision
from peft_lorasuite.progress import progress_bars
from peft_lorasuite.upgrading.adapter_list import find_adapters, plan_many, read_names
from peft_lorasuite.upgrading.collection import upgrade_collection


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return the exit code."""
    parser = script_parser("upgrade_collection", __doc__)
    names = parser.add_mutually_exclusive_group(required=True)
    names.add_argument("--user", metavar="NAME", help="user or organization: its adapters with OLD as base model")
    names.add_argument("--list", metavar="FILE", help="text file: a Hub id, ID@REVISION or folder per line, # comments")
    add_pair(parser, old="old backbone of all the adapters", required=True)
    parser.add_argument("-o", "--output", required=True, metavar="DIR", help="folder for the results and the journal")
    parser.add_argument("--push-to", metavar="OWNER", help="push each result to OWNER/<its name><suffix>")
    parser.add_argument("--suffix", default="-upgraded", help="end of the repositories' names (default: -upgraded)")
    parser.add_argument("--dry-run", action="store_true", help="list what would be done, and stop")
    return run_script("upgrade_collection", run, parser.parse_args(argv))


def run(args: Namespace) -> int:
    """List, upgrade, push and report; return the exit code."""
    old = split_revision(args.old)[0]
    planned = plan_many(read_names(args.list) if args.list else find_adapters(args.user, old), args.output, base=old)
    chosen = [plan.adapter for plan in planned if not plan.problem]
    repos = assign_repositories(chosen, args.push_to, args.suffix) if args.push_to else {}
    for plan in planned:
        print(plan.describe(args.output, repos.get(plan.adapter)))
    print(f"{len(chosen)} of {len(planned)} adapters sit on {old}")
    if args.dry_run:
        return 0
    if repos:
        check_push(repos[chosen[0]], split_revision(args.to)[0])
    outcomes = upgrade_collection(
        chosen, args.old, args.to, args.output, upgrade_map=args.map, method=args.method, prompts=args.prompts,
        chat=chat_options(args), progress=progress_bars,
        then=push_each(repos, private=args.private or None, overwrite=args.overwrite) if repos else None,
    )  # fmt: skip
    count = [outcome.status for outcome in outcomes].count
    print(f"{count('done')} upgraded, {count('kept')} kept from before")
    failed = [(plan.adapter, plan.problem) for plan in planned if plan.problem]
    failed += [(outcome.adapter, outcome.error) for outcome in outcomes if outcome.status == "failed"]
    for name, reason in failed:
        print(f"failed: {name}: {reason}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
