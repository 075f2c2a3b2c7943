"""Upgrade one adapter and push it to the Hub with a card that says what it is made of.

    python hub_scripts/upgrade_and_push.py me/old-lora --to org/new-backbone --push me/new-lora

With --map the upgrade reads only adapter and map; without it the map is built from both backbones and kept on this
machine. Nothing is pushed over something else unless you say --overwrite; --create-pr proposes the change instead.
Log in first (hf auth login), or set HF_TOKEN; a token is no argument, so that it stays out of the shell's history.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from peft_lorasuite import LoraSuiteError, UpgradeMap, push_upgraded, upgrade
from peft_lorasuite.adapters.adapter import old_backbone, reads_backbones
from peft_lorasuite.hub.push import check_push
from peft_lorasuite.io.source import Source, name_and_revision
from peft_lorasuite.methods.base import reads_old
from peft_lorasuite.models.backbone import Backbone
from peft_lorasuite.progress import bars
from peft_lorasuite.reporting.inspect import card_pictures
from peft_lorasuite.upgrading.map_cache import map_for
from peft_lorasuite.upgrading.upgrade import Upgraded


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return the exit code."""
    args = parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("peft_lorasuite").setLevel(logging.INFO)
    try:
        run(args)
    except LoraSuiteError as error:
        print(f"upgrade_and_push: {error}", file=sys.stderr)
        return 1
    return 0


def parser() -> argparse.ArgumentParser:
    """Describe the arguments."""
    made = argparse.ArgumentParser(
        prog="upgrade_and_push.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("adapter", metavar="ADAPTER", help="the old adapter: Hub id, ID@REVISION, or folder")
    made.add_argument("--to", required=True, metavar="NEW", help="new backbone: Hub id, ID@REVISION, or folder")
    made.add_argument("--push", required=True, metavar="REPO", help="owner/name of the repository to push to")
    made.add_argument("--from", dest="old", metavar="OLD", help="old backbone (default: the adapter's config names it)")
    made.add_argument("--map", metavar="MAP", help="upgrade map: Hub id or folder (default: built once and kept)")
    made.add_argument("--method", default="auto", help="how to carry it over (see peft-lorasuite upgrade --help)")
    made.add_argument("--rank", type=int, metavar="R", help="rank of the result (default: the adapter's)")
    made.add_argument("--base-model", metavar="ID", help="Hub id of the new backbone, if --to is a folder")
    made.add_argument("--license", metavar="ID", help="licence for the card (default: the old adapter's)")
    made.add_argument("--evaluation", metavar="JSON", help="scores of the result, as peft-lorasuite evaluate wrote")
    made.add_argument("--picture", action="store_true", help="pictures for the card (needs matplotlib)")
    made.add_argument("--rows", metavar="DIR", help="with --picture: measured rows, for the bars of the gap")
    made.add_argument("--private", action="store_true", help="make the repository private; refuse a public one")
    made.add_argument("--create-pr", action="store_true", help="open a pull request instead of a commit")
    made.add_argument("--message", metavar="TEXT", help="title of the commit")
    made.add_argument("--overwrite", action="store_true", help="replace what the repository holds, if something else")
    return made


def run(args: argparse.Namespace) -> None:
    """Upgrade and push."""
    name, revision = name_and_revision(args.adapter)
    check_push(args.push, args.base_model or name_and_revision(args.to)[0])
    new = Backbone.open(args.to)
    source = Source(name, "adapter", revision)
    old = old_backbone(source, args.old, None, {})
    upgrade_map = UpgradeMap.load(args.map) if args.map else map_for(old(), new, progress=bars)
    at_hand = not args.map or args.old or reads_old(args.method, upgrade_map) or reads_backbones(source)
    carried = upgrade(
        name, upgrade_map, method=args.method, rank=args.rank, old=old() if at_hand else None, new=new,
        revision=revision, progress=bars,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        pushed = push_upgraded(
            carried, args.push, private=args.private or None, create_pr=args.create_pr, commit_message=args.message,
            overwrite=args.overwrite, base_model=args.base_model, license=args.license, evaluation=args.evaluation,
            picture=pictures(carried, upgrade_map, source, args, Path(scratch)) if args.picture else None,
        )  # fmt: skip
    report = carried.report
    print(
        f"{pushed.url}: {report.coverage:.0%} of the tensors carried by {report.method['name']}, commit {pushed.commit}"
    )


def pictures(carried: Upgraded, upgrade_map: UpgradeMap, source: Source, args: argparse.Namespace, place: Path) -> Path:
    """Draw the pictures of the card; for the size of the updates, what was made is written first."""
    upgraded = carried.save(place / "adapter")
    (place / "pictures").mkdir()
    return card_pictures(
        place / "pictures", upgrade_map, upgraded, before=source, bases=(args.old, None), rows=args.rows
    )


if __name__ == "__main__":
    sys.exit(main())
