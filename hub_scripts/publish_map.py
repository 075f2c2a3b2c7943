"""Push the upgrade map of two backbones to the Hub.

    python hub_scripts/publish_map.py org/old-backbone org/new-backbone --push me/old-to-new
    python hub_scripts/publish_map.py --map DIR --push me/old-to-new

The first command builds the map, or takes it from the cache; the second pushes one that `peft-lorasuite map` wrote.
Build the map from Hub ids, not from folders: it then records the hashes of the weight files, and its users can verify
that it fits without downloading weights. A map is derived from the weights of both backbones: check their licenses.
Log in first (hf auth login), or set HF_TOKEN.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence

from peft_lorasuite import UpgradeMap
from peft_lorasuite.cli.scripts import run_script, script_parser
from peft_lorasuite.hub.push import push_map
from peft_lorasuite.hub.repository import check_id
from peft_lorasuite.io.temporary import temporary_folder
from peft_lorasuite.models.backbone import Backbone
from peft_lorasuite.progress import progress_bars
from peft_lorasuite.reporting.inspect import card_pictures
from peft_lorasuite.reporting.style import require_matplotlib
from peft_lorasuite.upgrading.map_cache import load_or_build_map


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return the exit code."""
    parser = script_parser("publish_map", __doc__)
    parser.add_argument("pair", nargs="*", metavar="BACKBONE", help="old and new backbone: Hub ids or ID@REVISION")
    parser.add_argument("--map", metavar="DIR", help="push this map instead of building one")
    parser.add_argument("--push", required=True, metavar="REPO_ID", help="repository to push to, owner/name")
    parser.add_argument("--picture", action="store_true", help="add figures of the map to the card (needs matplotlib)")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing")
    args = parser.parse_args(argv)
    if len(args.pair) != (0 if args.map else 2):
        parser.error("pass the old and the new backbone, or a map with --map")
    return run_script("publish_map", run, args)


def run(args: Namespace) -> int:
    """Build or load the map, and push it."""
    check_id(args.push)
    if args.picture:
        require_matplotlib()
    if args.map:
        upgrade_map = UpgradeMap.load(args.map)
    else:
        old, new = (Backbone.open(name) for name in args.pair)
        upgrade_map = load_or_build_map(old, new, progress=progress_bars)
    with temporary_folder() as folder:
        pushed = push_map(
            upgrade_map, args.push, private=args.private or None, create_pr=args.create_pr, overwrite=args.overwrite,
            picture=card_pictures(folder, upgrade_map) if args.picture else None,
        )  # fmt: skip
    print(f"{pushed.url}: {len(upgrade_map.layers)} layers matched, commit {pushed.commit}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
