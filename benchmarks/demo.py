"""Train the demo pair of the package from scratch: two backbones, the adapter of the old one, and its data.

    python benchmarks/demo.py [--stage old|new|texts|adapter|reference|all] [--out DIR]

About forty minutes on two cores. The result is the folder ``peft_lorasuite/data/demo``. Floating-point sums depend on
the machine, so a second run gives the same data and similar figures, not the same bits.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import demo_language as language
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SIDES = {
    "old": {
        "seed": 11, "people": language.PEOPLE[:22], "digits": False, "steps": 1400,
        "shape": {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4,
                  "num_key_value_heads": 4},
    },
    "new": {
        "seed": 23, "people": language.PEOPLE[8:], "digits": True, "steps": 1500,
        "shape": {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 6, "num_attention_heads": 6,
                  "num_key_value_heads": 2},
    },
}  # fmt: skip
ROWS, LENGTH = 40, 64
OLD_NAME = "peft-lorasuite/old"
FULL = {"rank": 16, "lr": 3e-3, "epochs": 5, "warmup": 0.05, "seed": 7}
"""Full training of an adapter: the old backbone's, and the reference on the new one."""


def make_tokenizer(side: dict, world: language.World) -> PreTrainedTokenizerFast:
    """Return a word-level tokenizer of the words of this side's texts, with ids in its own order.

    The new side splits numbers into digits, so that the two tokenizers split the same text differently.
    """
    splitters = [pre_tokenizers.Whitespace()]
    if side["digits"]:
        splitters.append(pre_tokenizers.Digits(individual_digits=True))
    splitter = pre_tokenizers.Sequence(splitters)
    sample = itertools.islice(language.texts(world, side["people"], side["seed"]), 40_000)
    words = sorted({word for text in sample for word, _ in splitter.pre_tokenize_str(text)})
    random.Random(side["seed"]).shuffle(words)
    ids = {word: number for number, word in enumerate(SPECIAL + words)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = splitter
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", ids["<s>"])]
    )
    joining = [
        decoders.WordPiece(prefix="##", cleanup=False),
        decoders.Fuse(),
        decoders.Replace(Regex(r" (?=[.,?:])"), ""),
    ]
    if side["digits"]:
        joining.append(decoders.Replace(Regex(r"(?<=\d) (?=\d)"), ""))
    tokenizer.decoder = decoders.Sequence(joining)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        model_max_length=256, padding_side="left", clean_up_tokenization_spaces=False,
    )  # fmt: skip


def blocks(tokenizer: PreTrainedTokenizerFast, stream: Iterator[str], rows: int, length: int) -> Tensor:
    """Return ``(rows, length)`` token ids: whole texts, and padding after the last whole one of a row."""
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    out = torch.full((rows, length), pad)
    for row in out:
        used = 0
        while True:
            ids = [*tokenizer(next(stream)).input_ids, eos]
            if used + len(ids) > length:
                break
            row[used : used + len(ids)] = torch.tensor(ids)
            used += len(ids)
    return out


def schedule(step: int, steps: int, warmup: float, kind: str) -> float:
    """Return the factor of the learning rate at ``step``: linear warm-up, then cosine or linear decay to zero."""
    first = warmup * steps
    if step < first:
        return (step + 1) / (first + 1)
    share = (step - first) / max(1.0, steps - first)
    return 0.5 * (1 + math.cos(math.pi * share)) if kind == "cosine" else 1 - share


def train_backbone(name: str, world: language.World, out: Path) -> float:
    """Train one backbone and its tokenizer from scratch, save both in bfloat16 and return the minutes it took."""
    side, start = SIDES[name], time.time()
    torch.manual_seed(side["seed"])
    tokenizer = make_tokenizer(side, world)
    config = LlamaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=256, tie_word_embeddings=False, rms_norm_eps=1e-5,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.04, **side["shape"],
    )  # fmt: skip
    model = LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.05)
    stream = language.texts(world, side["people"], side["seed"])
    for step in range(side["steps"]):
        optimizer.param_groups[0]["lr"] = 3e-3 * schedule(step, side["steps"], 0.05, "cosine")
        ids = blocks(tokenizer, stream, ROWS, LENGTH)
        labels = ids.masked_fill(ids == tokenizer.pad_token_id, -100)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == side["steps"] - 1:
            print(f"{name} step {step} loss {loss.item():.3f} {time.time() - start:.0f} s", flush=True)
    shutil.rmtree(out / name, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(out / name)
    tokenizer.save_pretrained(out / name)
    return (time.time() - start) / 60


def load(out: Path, name: str) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Load a saved backbone in float32."""
    model = AutoModelForCausalLM.from_pretrained(out / name, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(out / name)


def encode(tokenizer: PreTrainedTokenizerFast, items: list[dict]) -> tuple[Tensor, Tensor]:
    """Return token ids and labels ``(items, length)``, padded on the right; prompt and padding have the label -100."""
    pairs = []
    for item in items:
        prompt = tokenizer(language.TEMPLATE.format(instruction=item["instruction"])).input_ids
        pairs.append((prompt, [*tokenizer(item["output"], add_special_tokens=False).input_ids, tokenizer.eos_token_id]))
    width = max(len(prompt) + len(answer) for prompt, answer in pairs)
    ids = torch.full((len(pairs), width), tokenizer.pad_token_id)
    labels = torch.full((len(pairs), width), -100)
    for row, (prompt, answer) in enumerate(pairs):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : end] = torch.tensor(answer)
    return ids, labels


@torch.no_grad()
def measure(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, items: list[dict]) -> dict[str, float]:
    """Return the mean NLL per response token with EOS, and the share of items whose greedy answer is the reference.

    A greedy answer equals the reference exactly when each of its tokens is the most likely one after those before it,
    so no text has to be generated.
    """
    model.eval()
    ids, labels = encode(tokenizer, items)
    logits = model(input_ids=ids).logits[:, :-1].float()
    wanted = labels[:, 1:]
    inside = wanted >= 0
    nll = torch.nn.functional.cross_entropy(logits[inside], wanted[inside])
    right = ((logits.argmax(-1) == wanted) | ~inside).all(-1).float().mean()
    return {"nll": round(nll.item(), 4), "accuracy": round(right.item(), 4)}


def train_lora(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, items: list[dict], *,
    rank: int, lr: float, epochs: int, warmup: float, seed: int, batch: int = 16,
) -> PeftModel:  # fmt: skip
    """Train a LoRA with ``alpha = 2 rank`` on all seven linear modules; the loss is on the response tokens with EOS."""
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=MODULES, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config).train()
    ids, labels = encode(tokenizer, items)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    order = [part for _ in range(epochs) for part in torch.randperm(len(items)).split(batch)]
    for step, rows in enumerate(order):
        optimizer.param_groups[0]["lr"] = lr * schedule(step, len(order), warmup, "linear")
        adapted(input_ids=ids[rows], labels=labels[rows]).loss.backward()
        torch.nn.utils.clip_grad_norm_(adapted.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return adapted


def record(out: Path, **figures: object) -> None:
    """Add figures to ``reference.json``."""
    path = out / "reference.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**known, **figures}, indent=1) + "\n")


def write_texts(out: Path, world: language.World) -> list[list[dict]]:
    """Write the task's items, its description and 30 kB of calibration text; return training, test and prompt items."""
    parts = language.task_items(world)
    for name, items in zip(("train", "test", "prompts"), parts, strict=True):
        kept = items if name != "prompts" else [{"instruction": item["instruction"], "input": ""} for item in items]
        (out / f"{name}.json").write_text("[\n" + ",\n".join(json.dumps(item) for item in kept) + "\n]\n")
    task = {"name": "in code", "template": language.TEMPLATE, "metric": "greedy answer equals the reference answer"}
    (out / "task.json").write_text(json.dumps(task, indent=1) + "\n")
    stream = language.texts(world, language.PEOPLE[8:22], seed=99)
    text, paragraphs = "", []
    while len(text) < 30_000:
        paragraphs.append(" ".join(itertools.islice(stream, 8)).replace("\n", " "))
        text = "\n\n".join(paragraphs) + "\n"
    (out / "calibration.txt").write_text(text)
    return parts


def train_adapter(out: Path, parts: list[list[dict]]) -> None:
    """Train the adapter of the old backbone on all training items, save it and record the figures."""
    model, tokenizer = load(out, "old")
    before = measure(model, tokenizer, parts[1])
    start = time.time()
    adapted = train_lora(model, tokenizer, parts[0], **FULL)
    minutes = (time.time() - start) / 60
    adapted.peft_config["default"].base_model_name_or_path = OLD_NAME
    shutil.rmtree(out / "adapter", ignore_errors=True)
    # without the argument PEFT would look for the backbone's vocabulary on the Hub, which does not have it
    adapted.save_pretrained(out / "adapter", save_embedding_layers=False)
    (out / "adapter" / "README.md").unlink(missing_ok=True)
    after = measure(adapted, tokenizer, parts[1])
    record(out, old_base=before, old_adapter={**after, **FULL, "minutes": round(minutes, 2)})


def train_references(out: Path, parts: list[list[dict]]) -> None:
    """Record training on the new backbone: on all items, and vanilla LoRA on 100 (mean of three seeds)."""
    model, tokenizer = load(out, "new")
    base = measure(model, tokenizer, parts[1])
    start = time.time()
    full = measure(train_lora(model, tokenizer, parts[0], **FULL), tokenizer, parts[1])
    minutes = round((time.time() - start) / 60, 2)
    record(out, new_base=base, new_retrained={**full, **FULL, "samples": len(parts[0]), "minutes": minutes})
    rows = []
    for lr in (3e-4, 1e-3, 3e-3):
        runs = []
        for seed in (0, 1, 2):
            model, _ = load(out, "new")
            chosen = random.Random(seed).sample(parts[0], 100)
            adapted = train_lora(model, tokenizer, chosen, rank=32, lr=lr, epochs=3, warmup=0.1, seed=seed)
            runs.append(measure(adapted, tokenizer, parts[1]))
        mean = {key: round(sum(run[key] for run in runs) / len(runs), 4) for key in runs[0]}
        gap = (base["nll"] - mean["nll"]) / (base["nll"] - full["nll"])
        rows.append(
            {"lr": lr, **mean, "gap_recovered": round(gap, 3), "rank": 32, "epochs": 3, "warmup": 0.1, "seeds": 3}
        )
    record(out, new_vanilla_100=rows)


def main() -> None:
    """Read the arguments and run the stages in their order."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=["old", "new", "texts", "adapter", "reference", "all"], default="all")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "peft_lorasuite" / "data" / "demo")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    world = language.World.create()
    for name in SIDES:
        if options.stage in (name, "all"):
            minutes = train_backbone(name, world, options.out)
            figures = {key: SIDES[name][key] for key in ("seed", "steps")}
            record(options.out, **{f"{name}_training": {**figures, "minutes": round(minutes, 2)}})
    if options.stage in ("texts", "adapter", "reference", "all"):
        parts = write_texts(options.out, world)
        if options.stage in ("adapter", "all"):
            train_adapter(options.out, parts)
        if options.stage in ("reference", "all"):
            train_references(options.out, parts)


if __name__ == "__main__":
    main()
