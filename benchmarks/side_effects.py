"""What an upgraded adapter does to text that has nothing to do with its task: likelihood of other text.

    python benchmarks/side_effects.py NAME=DIR [NAME=DIR ...] --new NEW --text FILE --out FILE.json

DIR are upgraded adapters (gap.py keeps its own), or adapters of an old backbone that is named as NEW. FILE
holds paragraphs of plain text, or instructions in the format of the LLM-Adapters collection, which are read without a
prompt template; the old adapted model was never asked about them, nor does any method read them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import peft
import torch
from common import machine

from peft_lorasuite import Backbone
from peft_lorasuite.models.activations import batches, calibration_texts
from peft_lorasuite.progress import bars
from peft_lorasuite.text.examples import read_examples


@torch.inference_mode()
def measured(model: Any, new: Backbone, texts: Sequence[str], names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Per adapter, and for the base: mean loss per token, and the mean divergence of its predictions from the base's.

    Both in nats. The first token of a text, which nothing predicts, is left out.
    """
    sums = {name: torch.zeros(2, dtype=torch.float64) for name in ("base", *names)}
    count = 0
    for _, inputs in bars("reading", list(batches(new, texts, range(len(texts))))):
        ids, inside = inputs["input_ids"][:, 1:], inputs["attention_mask"][:, 1:].bool()
        base = None
        for name, total in sums.items():
            with model.disable_adapter() if name == "base" else nullcontext():
                if name != "base":
                    model.set_adapter(name)
                got = model(**inputs, use_cache=False).logits[:, :-1][inside].float().log_softmax(-1)
            base = got if base is None else base
            divergence = (base.exp() * (base - got)).sum()
            total += torch.stack([-got.gather(1, ids[inside][:, None]).sum(), divergence]).double()
        count += int(inside.sum())
    return {
        name: {"nll": round(float(loss) / count, 4), "divergence_from_base": round(float(apart) / count, 4)}
        for name, (loss, apart) in sums.items()
    }


def main() -> None:
    """Read the arguments and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapters", nargs="+", metavar="NAME=DIR")
    parser.add_argument("--new", required=True, help="new backbone: folder or Hub id")
    parser.add_argument("--text", required=True, help="text file, or JSON with instructions")
    parser.add_argument(
        "--texts", type=int, default=100, help="paragraphs or instructions that are read (default: 100)"
    )
    parser.add_argument("--out", required=True, type=Path, help="JSON file")
    parser.add_argument("--dtype", default="auto", help="of the model: float32 is faster on some CPUs")
    args = parser.parse_args()
    named = dict(pair.split("=", 1) for pair in args.adapters)
    new, model = Backbone.open(args.new, dtype=args.dtype), None
    for name, folder in named.items():
        if model is None:
            model = peft.PeftModel.from_pretrained(new.load(), folder, adapter_name=name)
        else:
            model.load_adapter(folder, name)
    assert model is not None
    asked = args.text.endswith(".json")
    texts = [one.instruction for one in read_examples(args.text)] if asked else calibration_texts(args.text)
    texts = texts[: args.texts]
    found = {
        "text": Path(args.text).name,
        "texts": len(texts),
        "rows": measured(model.eval(), new, texts, list(named)),
        "machine": machine(),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found["rows"], indent=1))


if __name__ == "__main__":
    main()
