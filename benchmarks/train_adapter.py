"""Train a source adapter of the gap benchmark: a LoRA of an old backbone on one of the tasks.

    python benchmarks/train_adapter.py --base OLD --task arc --data DIR -o ADAPTER

The defaults are those of the tables: arc on 1,600 items in one epoch (q, k, v, o), facts on both wordings of 240 facts
in five (all linear modules), math on 1,600 chains of thought in one (all linear modules).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import peft
import torch
from common import RECIPES, load_task, modules_of

from peft_lorasuite import Backbone
from peft_lorasuite.progress import progress_bars
from peft_lorasuite.training.finetune import finetune


def main() -> None:
    """Read the arguments and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="backbone to train on: folder or Hub id")
    parser.add_argument("--task", required=True, choices=sorted(RECIPES))
    parser.add_argument("--data", required=True, type=Path, help="folder with the LLM-Adapters files")
    parser.add_argument("-o", "--output", required=True, help="folder for the adapter")
    parser.add_argument("--samples", type=int, help="training items (default: the recipe's)")
    parser.add_argument("--epochs", type=int, help="passes over them (default: the recipe's)")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--micro-batch-size", type=int, help="samples read at once (default: all of a step)")
    parser.add_argument("--dtype", default="auto", help="of the model: float32 is faster on some CPUs")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    recipe, base = RECIPES[args.task], Backbone.open(args.base, dtype=args.dtype)
    start = time.perf_counter()
    config = peft.LoraConfig(
        r=args.rank, lora_alpha=2 * args.rank, task_type="CAUSAL_LM",
        target_modules=modules_of(base.arch, recipe.parts),
    )  # fmt: skip
    torch.manual_seed(args.seed)
    model = peft.get_peft_model(base.load(), config)
    finetune(
        model, load_task(args.task, args.data, 1).train, samples=args.samples or recipe.samples,
        epochs=args.epochs or recipe.epochs, batch_size=args.batch_size, micro_batch_size=args.micro_batch_size,
        learning_rate=args.learning_rate, warmup=0.05,
        seed=args.seed, tokenizer=base.tokenizer, output=args.output, progress=progress_bars,
    )  # fmt: skip
    loss = model.finetune_record["loss"]
    print(f"wrote {args.output}: mean training loss {loss:.3f}, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
