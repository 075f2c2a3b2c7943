"""What an upgraded adapter does to text that has nothing to do with its task: likelihood and KL divergence.

    python benchmarks/side_effects.py NAME=DIR [NAME=DIR ...] --new NEW --text FILE --out FILE.json

DIR are upgraded adapters (gap.py keeps them under its --stages), or adapters of an old backbone that is given as NEW.
FILE has paragraphs of plain text, or instructions in the format of the LLM-Adapters collection, which are read without
a prompt template; no method may have read them.
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
from common import machine, pairs_of, write_json

from peft_lorasuite import Backbone
from peft_lorasuite.models.activations import batches
from peft_lorasuite.progress import progress_bars
from peft_lorasuite.text.calibration import calibration_texts
from peft_lorasuite.text.examples import read_examples


@torch.inference_mode()
def measure(model: Any, new: Backbone, texts: Sequence[str], names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return the mean NLL per token and the mean KL divergence from the base, in nats, by adapter.

    The first token of a text, which nothing predicts, is left out.
    """
    sums = {name: torch.zeros(2, dtype=torch.float64) for name in ("base", *names)}
    count = 0
    for _, inputs in progress_bars("reading", list(batches(new, texts, range(len(texts))))):
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
    parser.add_argument("--texts", type=int, default=100, help="paragraphs or instructions to read (default: 100)")
    parser.add_argument("--out", required=True, type=Path, help="JSON file")
    parser.add_argument("--dtype", default="auto", help="of the model: float32 is faster on some CPUs")
    args = parser.parse_args()
    named = pairs_of(args.adapters)
    new, model = Backbone.open(args.new, dtype=args.dtype), None
    for name, folder in named.items():
        if model is None:
            model = peft.PeftModel.from_pretrained(new.load(), folder, adapter_name=name)
        else:
            model.load_adapter(folder, name)
    assert model is not None
    questions = args.text.endswith(".json")
    texts = [one.instruction for one in read_examples(args.text)] if questions else calibration_texts(args.text)
    texts = texts[: args.texts]
    rows = measure(model.eval(), new, texts, list(named))
    found = {"text": Path(args.text).name, "texts": len(texts), "rows": rows, "machine": machine()}
    write_json(args.out, found)
    print(json.dumps(found["rows"], indent=1))


if __name__ == "__main__":
    main()
