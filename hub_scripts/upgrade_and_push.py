"""Upgrade an adapter and push it to the Hub with a model card.

    python hub_scripts/upgrade_and_push.py me/old-lora --to org/new-backbone --push me/new-lora
    python hub_scripts/upgrade_and_push.py me/old-lora --to org/new-backbone --map me/old-to-new --push me/new-lora

Without --map the map is built from both backbones and cached; with it the old backbone is opened only if the method or
the type of adapter needs it. A repository with other content is left as it is unless you pass --overwrite.
`peft-lorasuite upgrade --push` does the same with all options of an upgrade, and keeps the adapter on this machine.
Log in first (hf auth login), or set HF_TOKEN.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from peft_lorasuite import LoraSuiteError, push_upgraded, upgrade
from peft_lorasuite.cli.common import non_empty
from peft_lorasuite.hub.push import check_push
from peft_lorasuite.io.source import split_revision
from peft_lorasuite.progress import progress_bars
from peft_lorasuite.reporting.inspect import card_pictures
from peft_lorasuite.reporting.style import require_matplotlib
from peft_lorasuite.upgrading.inputs import UpgradeInputs, open_inputs
from peft_lorasuite.upgrading.upgrade import Upgraded


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="upgrade_and_push.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.register("type", None, non_empty)
    parser.add_argument("adapter", metavar="ADAPTER", help="the old adapter: Hub id, ID@REVISION or folder")
    parser.add_argument("--to", required=True, metavar="NEW", help="new backbone")
    parser.add_argument("--from", dest="old", metavar="OLD", help="old backbone (default: the adapter's base model)")
    parser.add_argument("--map", metavar="MAP", help="upgrade map: Hub id or folder (default: cached or built)")
    parser.add_argument("--method", default="auto", help="see `peft-lorasuite upgrade --help` (default: auto)")
    parser.add_argument("--push", required=True, metavar="REPO_ID", help="repository to push to, owner/name")
    parser.add_argument("--base-model", metavar="ID", help="Hub id of the new backbone, where --to is a folder")
    parser.add_argument("--picture", action="store_true", help="add figures to the card (needs matplotlib)")
    parser.add_argument("--rows", metavar="DIR", help="with --picture: measured results, for the figure of the gap")
    parser.add_argument("--private", action="store_true", help="create a private repository; refuse a public one")
    parser.add_argument("--overwrite", action="store_true", help="replace other content of the repository")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("peft_lorasuite").setLevel(logging.INFO)
    try:
        run(args)
    except LoraSuiteError as error:
        print(f"upgrade_and_push: {error}", file=sys.stderr)
        return 1
    return 0


def run(args: argparse.Namespace) -> None:
    """Upgrade the adapter and push it."""
    check_push(args.push, args.base_model or split_revision(args.to)[0])
    if args.picture:
        require_matplotlib()
    adapter, revision = split_revision(args.adapter)
    inputs = open_inputs(
        adapter,
        args.to,
        old=args.old,
        upgrade_map=args.map,
        method=args.method,
        revision=revision,
        progress=progress_bars,
    )
    upgraded = upgrade(
        inputs.source, inputs.upgrade_map, method=args.method, old=inputs.old, new=inputs.new, progress=progress_bars
    )
    with tempfile.TemporaryDirectory() as scratch:
        picture = draw(upgraded, inputs, args, Path(scratch)) if args.picture else None
        pushed = push_upgraded(
            upgraded, args.push, private=args.private or None, overwrite=args.overwrite, base_model=args.base_model,
            picture=picture,
        )  # fmt: skip
    report = upgraded.report
    print(f"{pushed.url}: {report.verdict}, by {report.method['name']}, commit {pushed.commit}")


def draw(upgraded: Upgraded, inputs: UpgradeInputs, args: argparse.Namespace, folder: Path) -> Path:
    """Draw the figures of the card; the sizes of the updates are read from the saved adapter."""
    saved, bases = upgraded.save(folder / "adapter"), (args.old, None)
    return card_pictures(folder, inputs.upgrade_map, saved, before=inputs.source, bases=bases, rows=args.rows)


if __name__ == "__main__":
    sys.exit(main())
