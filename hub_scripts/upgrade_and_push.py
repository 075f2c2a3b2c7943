"""Upgrade an adapter and push it to the Hub with a model card.

    python hub_scripts/upgrade_and_push.py me/old-lora --to org/new-backbone --push me/new-lora
    python hub_scripts/upgrade_and_push.py me/old-lora --to org/new-backbone --map me/old-to-new --push me/new-lora

Without --map the map is built from both backbones and cached; with it the old backbone is opened only if the method or
the type of adapter needs it. A repository with other content is left as it is unless you pass --overwrite.
`peft-lorasuite upgrade --push` does the same with all options of an upgrade, and keeps the adapter on this machine.
Log in first (hf auth login), or set HF_TOKEN.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence

from peft_lorasuite import push_upgraded, upgrade
from peft_lorasuite.cli.common import chat_options
from peft_lorasuite.cli.scripts import add_pair, run_script, script_parser
from peft_lorasuite.hub.push import check_push
from peft_lorasuite.io.source import split_revision
from peft_lorasuite.io.temporary import temporary_folder
from peft_lorasuite.progress import progress_bars
from peft_lorasuite.reporting.inspect import card_pictures
from peft_lorasuite.reporting.style import require_matplotlib
from peft_lorasuite.text.examples import given_prompts
from peft_lorasuite.upgrading.inputs import open_inputs


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return the exit code."""
    parser = script_parser("upgrade_and_push", __doc__)
    parser.add_argument("adapter", metavar="ADAPTER", help="the old adapter: Hub id, ID@REVISION or folder")
    add_pair(parser, old="old backbone (default: the adapter's base model)")
    parser.add_argument("--push", required=True, metavar="REPO_ID", help="repository to push to, owner/name")
    parser.add_argument("--base-model", metavar="ID", help="Hub id of the new backbone, where --to is a folder")
    parser.add_argument("--picture", action="store_true", help="add figures to the card (needs matplotlib)")
    parser.add_argument("--rows", metavar="DIR", help="with --picture: measured results, for the figure of the gap")
    return run_script("upgrade_and_push", run, parser.parse_args(argv))


def run(args: Namespace) -> int:
    """Upgrade the adapter and push it."""
    check_push(args.push, args.base_model or split_revision(args.to)[0])
    if args.picture:
        require_matplotlib()
    adapter, revision = split_revision(args.adapter)
    chosen = {"method": args.method, "progress": progress_bars}
    chat = chat_options(args)
    prompts = given_prompts(args.prompts, form=chat.prompt_format)
    inputs = open_inputs(
        adapter, args.to, old=args.old, upgrade_map=args.map, prompts=prompts, chat=chat, revision=revision, **chosen
    )
    upgraded = upgrade(
        inputs.source, inputs.upgrade_map, old=inputs.old, new=inputs.new, prompts=prompts, chat=chat, **chosen
    )
    with temporary_folder() as folder:
        picture = None
        if args.picture:  # the norms are read from the saved adapter
            picture = card_pictures(
                folder, inputs.upgrade_map, upgraded.save(folder / "adapter"), before=inputs.source,
                bases=(args.old, None), rows=args.rows,
            )  # fmt: skip
        pushed = push_upgraded(
            upgraded, args.push, private=args.private or None, overwrite=args.overwrite, base_model=args.base_model,
            picture=picture,
        )  # fmt: skip
    print(f"{pushed.url}: {upgraded.report.verdict}, by {upgraded.report.method['name']}, commit {pushed.commit}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
