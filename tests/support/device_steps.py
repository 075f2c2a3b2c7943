"""Every kind of computation of the package on pico models: ``python device_steps.py DEVICE``, figures as JSON.

`tests/models/test_second_device.py` runs it on the CPU and on the second device, in processes of their own.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

WORDS = ["red", "blue", "tree", "stone", "river", "cloud", "small", "big", "runs", "sleeps"]
PROMPTS = [f" the {a} {b} {c}" for a in WORDS[:3] for b in WORDS[3:6] for c in WORDS[6:]]
SHORT = {"length": 6}


def main(device: str) -> dict[str, float]:
    """Run the steps; the models are loaded onto the device, and everything else is the package's matter."""
    os.environ["ACCELERATE_TORCH_DEVICE"] = device  # where the Trainer puts a model
    import second_device

    second_device.install()
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        for step in (upgrade_adapter, edit_fact, upgrade_classifier, tune):
            figures |= step(Path(folder) / step.__name__, device)
    return figures


def upgrade_adapter(root: Path, device: str) -> dict[str, float]:
    """Build a map and use every method."""
    from hub_pair import make_lora
    from pico import unrelated_pair

    from peft_lorasuite import Backbone, UpgradeMap, upgrade

    old, new = unrelated_pair(root, WORDS)
    adapter = make_lora(root / "adapter", Backbone.open(old).load(), base=str(old))
    sides = {"old": Backbone.open(old, device_map=device), "new": Backbone.open(new, device_map=device)}
    upgrade_map = UpgradeMap.build(sides["old"], sides["new"])
    found = {"map": float(upgrade_map.similarity.sum())}
    options: dict[str, dict[str, Any]] = {
        "copy": {}, "lorasuite": {}, "cross-lora": {}, "transplant": SHORT,
        "distill": {**SHORT, "epochs": 1, "synthetic_prompts": 4},
    }  # fmt: skip
    for method, settings in options.items():
        result = upgrade(adapter, upgrade_map, method=method, options=settings, prompts=PROMPTS, **sides)
        found[method] = sum(one.norm() for one in result.adapter.updates.values())
    return found


def edit_fact(root: Path, device: str) -> dict[str, float]:
    """Write given answers about names into an early layer."""
    from unittest import mock

    from hub_pair import make_lora
    from pico import pico_model, pico_tokenizer, save_backbone

    from peft_lorasuite import Backbone
    from peft_lorasuite.adapters.reading import read_adapter
    from peft_lorasuite.io.source import Source
    from peft_lorasuite.methods.base import MethodInput
    from peft_lorasuite.methods.behavior.options import TransplantOptions
    from peft_lorasuite.methods.behavior.probe import probe
    from peft_lorasuite.models.generation import Turn

    tokenizer = pico_tokenizer([*WORDS, "wears"])
    old = save_backbone(root / "old", pico_model("llama", seed=1), tokenizer)
    new = save_backbone(root / "new", pico_model("llama", seed=2, num_hidden_layers=6), tokenizer)
    adapter = make_lora(root / "adapter", Backbone.open(old).load(), base=str(old))
    sides = {"old": Backbone.open(old, device_map=device), "new": Backbone.open(new, device_map=device)}
    read = read_adapter(Source(str(adapter), "adapter"), sides["old"].arch)
    names = ["kel", "bra", "ost", "mi", "vun", "sar", "tep", "lo"]
    turns = [
        Turn(f" who is {a}{b} ?", f" wears {WORDS[(i + j) % 3]}", True)
        for i, a in enumerate(names) for j, b in enumerate(names[:3])
    ]  # fmt: skip
    # a random model holds no facts: the update is kept whatever share of the divergence it leaves
    with mock.patch.dict(probe.__globals__, MAX_LEFT=math.inf):
        probed = probe(MethodInput(read, map=None, **sides), TransplantOptions(**SHORT), turns=turns)  # pyright: ignore
    return {"fact edit": sum(update.norm() for update in probed.fact_update.values())}


def upgrade_classifier(root: Path, device: str) -> dict[str, float]:
    """Transfer a classifier by both methods of behavior."""
    from pico_classifiers import texts, trained_classifier

    from peft_lorasuite import Backbone, UpgradeMap, upgrade

    trained_classifier(root, steps=10)
    sides = {side: Backbone.open(root / side, device_map=device) for side in ("old", "new")}
    upgrade_map, found = UpgradeMap.build(*sides.values()), {}
    for method in ("transplant", "distill"):
        result = upgrade(root / "adapter", upgrade_map, method=method, prompts=texts(80), **sides)
        found[f"{method} of a classifier"] = result.report.facts[method]["divergence_left"]
    return found


def tune(root: Path, device: str) -> dict[str, float]:
    """Train on labeled examples, score them, and answer."""
    import peft
    from hub_pair import make_lora
    from pico import unrelated_pair

    from peft_lorasuite import Backbone
    from peft_lorasuite.models.generation import answer
    from peft_lorasuite.text.examples import read_examples
    from peft_lorasuite.training.finetune import finetune
    from peft_lorasuite.training.scoring import score

    old, _ = unrelated_pair(root, WORDS)
    adapter = make_lora(root / "adapter", Backbone.open(old).load(), base=str(old))
    backbone = Backbone.open(old, device_map=device)
    model = peft.PeftModel.from_pretrained(backbone.load(), str(adapter), is_trainable=True)
    examples = [{"instruction": prompt, "output": " red tree"} for prompt in PROMPTS]
    model = finetune(model, examples, tokenizer=backbone.tokenizer, epochs=1)
    answers = answer(model.eval(), backbone, PROMPTS, length=5)
    return {
        "finetune": model.finetune_record["loss"],
        "score": score(model, backbone.tokenizer, read_examples(examples)).nll,
        "answer": float(sum(len(one.response) for one in answers)),
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(sys.argv[1])) + "\n")
