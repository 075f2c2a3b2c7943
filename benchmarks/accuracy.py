"""Score adapters that sit in the last layer's down projection alone, and the base, in one pass over many items.

    python benchmarks/accuracy.py transplant=DIR1 transplant-built-in-prompts=DIR2 --new NEW --task arc --data DIR
        --out benchmarks/results/arc1000

The network below that projection gives the same states for all of them, so it runs once; claims about accuracy rest on
enough items that way. DIR1, DIR2 are upgraded adapters (gap.py keeps its own under --stages).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from common import load_task, stage, wilson
from transformers.modeling_outputs import CausalLMOutput

from peft_lorasuite import Backbone
from peft_lorasuite.adapters.adapter import read
from peft_lorasuite.io.source import Source
from peft_lorasuite.linalg.lowrank import LowRank
from peft_lorasuite.methods.behavior.states import down_of
from peft_lorasuite.methods.behavior.targets import Head
from peft_lorasuite.progress import bars
from peft_lorasuite.training.scoring import score

Memo = dict[bytes, tuple[torch.Tensor, torch.Tensor]]


class LastLayer(torch.nn.Module):
    """A model with an update of its last down projection, which reads every batch once for all updates."""

    def __init__(self, model: Any, backbone: Backbone, memo: Memo, update: LowRank | None = None) -> None:
        super().__init__()
        self.inner, self.memo, self.update, self.head = model, memo, update, Head(model, backbone)
        self.last = model.get_submodule(backbone.arch.layer_path)[-1]
        self.down = down_of(model, backbone, -1)
        self.device = model.device

    @property
    def base_model(self) -> Any:
        """The decoder, for the beginning that a batch shares."""
        return self.inner.base_model

    def forward(self, input_ids: torch.Tensor, logits_to_keep: torch.Tensor, **rest: Any) -> CausalLMOutput:
        """Logits at the positions to keep."""
        key = input_ids.numpy().tobytes()
        if key not in self.memo:
            self.memo[key] = self.read(input_ids, logits_to_keep, rest)
        x, h = self.memo[key]
        states = h if self.update is None else h + self.update.applied(x)
        return CausalLMOutput(logits=self.head.logits(states))

    def read(self, ids: torch.Tensor, keep: torch.Tensor, rest: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Input of the last down projection, and output of the last layer, at the positions to keep."""
        seen: dict[str, torch.Tensor] = {}
        hooks = [
            self.down.register_forward_hook(lambda module, args, output: seen.update(x=args[0])),
            self.last.register_forward_hook(
                lambda module, args, output: seen.update(h=output[0] if isinstance(output, tuple) else output)
            ),
        ]
        try:
            self.inner.base_model(input_ids=ids, **rest)
        finally:
            for hook in hooks:
                hook.remove()
        return seen["x"].reshape(*ids.shape, -1)[:, keep].float(), seen["h"][:, keep].float()


def update_of(folder: str, backbone: Backbone) -> LowRank:
    """Read the one update of an upgraded adapter."""
    updates = read(Source(folder, "adapter"), backbone.arch).updates
    (place, update), *others = updates.items()
    if others or place != (backbone.arch.layers - 1, "down"):
        raise SystemExit(f"{folder}: more than the last layer's down projection is changed: use gap.py")
    return update


def main() -> None:
    """Read the arguments and score."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapters", nargs="*", metavar="NAME=DIR")
    parser.add_argument("--new", required=True, help="new backbone: folder or Hub id")
    parser.add_argument("--task", required=True, choices=("arc", "facts"))
    parser.add_argument("--data", required=True, type=Path, help="folder with the LLM-Adapters files")
    parser.add_argument("--limit", type=int, default=1000, help="test items")
    parser.add_argument("--out", required=True, type=Path, help="folder for the rows' JSON")
    parser.add_argument("--dtype", default="auto", help="of the model: float32 is faster on some CPUs")
    args = parser.parse_args()
    new, task = Backbone.open(args.new, dtype=args.dtype), load_task(args.task, args.data, args.limit)
    named = dict(pair.split("=", 1) for pair in args.adapters)
    updates = {"base": None, **{name: update_of(folder, new) for name, folder in named.items()}}
    model, memo = new.load(), Memo()

    def measure(name: str) -> dict[str, Any]:
        one = LastLayer(model, new, memo, updates[name]).eval()
        found = score(one, new.tokenizer, task.test, options=task.options, progress=bars)
        return {
            "nll": round(found.nll, 4), "accuracy": round(found.accuracy, 4),
            "interval": wilson(sum(found.right), found.n), "exact": round(found.exact, 4), "items": found.n,
            "right": "".join(str(int(value)) for value in found.right),
        }  # fmt: skip

    for name in updates:
        stage(args.out, name, lambda name=name: measure(name))


if __name__ == "__main__":
    main()
