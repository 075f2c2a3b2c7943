"""How good the target is that `transplant` fits and `distill` trains towards: what no fit to it can improve on.

    python benchmarks/targets.py --old OLD --new NEW --adapter ADAPTER --task arc --data DIR --items 40 --out FILE.json

Development items are read with their reference answers; the target's likelihood of these is set beside the new
backbone's and the old adapted model's. Options: `teacher.teach` says what trust and gate are.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from common import load_task, stage

from peft_lorasuite import Backbone
from peft_lorasuite.adapter import read
from peft_lorasuite.behaviour import Turn, adapted, aligned, forward, tokens
from peft_lorasuite.prompts import fill
from peft_lorasuite.source import Source
from peft_lorasuite.teacher import Head, Vocabulary, teach

CHOICES = {"difference alone": (0.0, 0.0), "trust": (0.5, 0.0), "difference, gated": (0.0, 0.5), "both": (0.5, 0.5)}
"""Name -> trust and gate."""
EVERY = 10**9
"""As many candidate tokens as there are."""


@torch.inference_mode()
def states(model: Any, rows: list[Any], wanted: list[tuple[int, int]], layer: Any = None) -> torch.Tensor:
    """States after the final norm, or the output of a layer, at some (turn, position)."""
    seen: dict[str, torch.Tensor] = {}
    hook = layer and layer.register_forward_hook(
        lambda module, args, output: seen.update(h=output[0] if isinstance(output, tuple) else output)
    )
    kept = {}
    for numbers, normed, taken in forward(model, rows):
        values = seen["h"] if layer else normed
        line = {number: at for at, number in enumerate(numbers)}
        kept |= {(turn, at): values[line[turn], at - taken].clone() for turn, at in wanted if turn in line}
    if hook:
        hook.remove()
    return torch.stack([kept[place] for place in wanted])


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return the likelihood and the share of likeliest tokens of every target."""
    old, new = (Backbone.open(name, dtype=args.dtype) for name in (args.old, args.new))
    items = load_task(args.task, args.data, 1).dev[: args.items]
    turns = [Turn(fill(one), one.output, True) for one in items]
    sides = [[tokens(side, turn) for turn in turns] for side in (old, new)]
    places = aligned(*sides)
    at = [[(turn, position) for turn, position, _ in places], [(turn, position) for turn, _, position in places]]
    ended = [(*row.ids, new.tokenizer.eos_token_id) for row in sides[1]]
    labels = torch.tensor([ended[turn][position + 1] for turn, position in at[1]])
    with adapted(old, read(Source(args.adapter, "adapter"), old.arch)) as model:
        after = states(model, sides[0], at[0])
    model = old.load()
    before, old_head = states(model, sides[0], at[0]), Head(model, old)
    model = new.load()
    h = states(model, sides[1], at[1], model.get_submodule(new.arch.layer_path)[-1])
    heads, vocabulary = (old_head, Head(model, new)), Vocabulary.of(old, new)

    def told(trust: float, gate: float, adapter: torch.Tensor) -> dict[str, float]:
        found = teach(*heads, vocabulary, adapter, before, h, gate=gate, trust=trust, top=EVERY, extra=0, seed=0)
        hit = (found.target.argmax(-1) == labels).float().mean()
        return {
            "nll": round(float(-found.target.gather(1, labels[:, None]).mean()), 4),
            "likeliest": round(float(hit), 4),
        }

    rows = {"new backbone": told(0.0, 0.0, before)} | {name: told(*how, after) for name, how in CHOICES.items()}
    return {"items": len(items), "positions": len(places), "targets": rows}


def main() -> None:
    """Read the arguments and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("old", "new", "adapter"):
        parser.add_argument(f"--{name}", required=True, help="folder or Hub id")
    parser.add_argument("--task", required=True, choices=("arc", "facts", "math"))
    parser.add_argument("--data", required=True, type=Path, help="folder with the LLM-Adapters files")
    parser.add_argument("--items", type=int, default=40, help="development items")
    parser.add_argument("--dtype", default="auto", help="of the models")
    parser.add_argument("--out", required=True, type=Path, help="JSON file")
    args = parser.parse_args()
    stage(args.out.parent, args.out.stem, lambda: measure(args))


if __name__ == "__main__":
    main()
