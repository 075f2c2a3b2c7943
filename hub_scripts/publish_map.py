"""Publish the upgrade map of two backbones on the Hub, so that nobody else has to read their weights.

    python hub_scripts/publish_map.py org/old-backbone org/new-backbone --push me/old-to-new
    python hub_scripts/publish_map.py --map DIR --push me/old-to-new

Afterwards peft_lorasuite.upgrade("me/old-lora", "me/old-to-new") moves only the adapter and the map over the wire.
Build the map from Hub ids, not from folders: it then knows the hashes of the weight files, and users need no weights
to check that it fits. A map is derived from the weights of both backbones: mind their licences.
Repository names on the Hub hold no "--".
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from collections.abc import Sequence

from peft_lorasuite import LoraSuiteError, UpgradeMap
from peft_lorasuite.hub.push import push_map
from peft_lorasuite.hub.repository import check_id
from peft_lorasuite.models.backbone import Backbone
from peft_lorasuite.progress import bars
from peft_lorasuite.reporting.inspect import card_pictures
from peft_lorasuite.upgrading.map_cache import map_for


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return the exit code."""
    made = parser()
    args = made.parse_args(argv)
    if (args.map is None) == (args.old is None or args.new is None) or args.map == "" or (args.map and args.old):
        made.error("name OLD and NEW, or a map with --map")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("peft_lorasuite").setLevel(logging.INFO)
    try:
        run(args)
    except LoraSuiteError as error:
        print(f"publish_map: {error}", file=sys.stderr)
        return 1
    return 0


def parser() -> argparse.ArgumentParser:
    """Describe the arguments."""
    made = argparse.ArgumentParser(
        prog="publish_map.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("old", metavar="OLD", nargs="?", help="old backbone: Hub id or ID@REVISION")
    made.add_argument("new", metavar="NEW", nargs="?", help="new backbone: Hub id or ID@REVISION")
    made.add_argument("--map", metavar="DIR", help="a map that peft-lorasuite map wrote")
    made.add_argument("--push", required=True, metavar="REPO", help="owner/name of the repository to push to")
    made.add_argument("--picture", action="store_true", help="pictures of the map for the card (needs matplotlib)")
    made.add_argument("--private", action="store_true", help="make the repository private; refuse a public one")
    made.add_argument("--create-pr", action="store_true", help="open a pull request instead of a commit")
    made.add_argument("--message", metavar="TEXT", help="title of the commit")
    made.add_argument("--overwrite", action="store_true", help="replace what the repository holds, if something else")
    return made


def run(args: argparse.Namespace) -> None:
    """Build or load the map, and push it."""
    check_id(args.push)
    if args.map:
        upgrade_map = UpgradeMap.load(args.map)
    else:
        upgrade_map = map_for(Backbone.open(args.old), Backbone.open(args.new), progress=bars)
    with tempfile.TemporaryDirectory() as scratch:
        pushed = push_map(
            upgrade_map, args.push, private=args.private or None, create_pr=args.create_pr,
            commit_message=args.message, overwrite=args.overwrite,
            picture=card_pictures(scratch, upgrade_map) if args.picture else None,
        )  # fmt: skip
    print(f"{pushed.url}: {len(upgrade_map.layers)} layers matched, commit {pushed.commit}")


if __name__ == "__main__":
    sys.exit(main())
