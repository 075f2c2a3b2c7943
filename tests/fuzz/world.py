"""What is mutated: small real backbones, adapters of several types, maps, prompts, a report and a journal."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import peft
import torch
from pico import pico_model, pico_tokenizer, save_backbone
from safetensors.torch import load_file, save_file

from peft_lorasuite import UpgradeMap, upgrade, upgrade_many
from peft_lorasuite.mapping.options import MapOptions

WORDS = ["red", "blue", "green", "cat", "dog", "bird", "the", "and"]
TEXT = ["the red cat and the blue dog and the green bird. " * 6] * 8
WIDER = {"hidden_size": 40, "num_hidden_layers": 4, "intermediate_size": 64}
PROMPTS = [{"instruction": f"Name a {word}.", "output": f"the {word}"} for word in WORDS]
MODULES = ["q_proj", "v_proj", "down_proj"]
CONFIGS: dict[str, Callable[[], peft.PeftConfig]] = {
    "lora": lambda: peft.LoraConfig(r=4, lora_alpha=8, target_modules=MODULES),
    "patterns": lambda: peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=r".*\.(q_proj|up_proj)", alpha_pattern={r".*0\.self_attn\.q_proj": 3},
        rank_pattern={"up_proj": 2}, use_rslora=True,
    ),
    "dora": lambda: peft.LoraConfig(r=2, lora_alpha=4, target_modules=MODULES, use_dora=True),
    "tables": lambda: peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "embed_tokens", "lm_head"]),
    "tokens": lambda: peft.LoraConfig(r=2, target_modules=["v_proj"], trainable_token_indices=[3, 7]),
    "loha": lambda: peft.LoHaConfig(r=2, alpha=4, target_modules=["q_proj", "down_proj"]),
    "adalora": lambda: peft.AdaLoraConfig(init_r=3, target_r=2, lora_alpha=6, target_modules=MODULES, total_step=10),
}  # fmt: skip
"""Name -> config of an adapter on the old backbone."""
Effect = dict[str, torch.Tensor]
"""Name of a weight -> what an adapter adds to it."""


@dataclass
class World:
    """The inputs in a folder, as they are before a mutation.

    Attributes:
        home: The folder.
        results: Name of an adapter -> folder of its result for the new backbone.
        returned: Name of an adapter -> folder of its result for the old backbone itself.
    """

    home: Path
    results: dict[str, Path] = field(default_factory=dict)
    returned: dict[str, Path] = field(default_factory=dict)

    def __post_init__(self) -> None:
        tokenizer = pico_tokenizer(WORDS)
        save_backbone(self.old, pico_model("llama", seed=1), tokenizer)
        save_backbone(self.new, pico_model("llama", seed=2, **WIDER), tokenizer)
        _split(Path(shutil.copytree(self.new, self.home / "sharded")))
        for target, place in ((self.new, self.map), (self.old, self.identity)):
            UpgradeMap.build(self.old, target, MapOptions(tokens=256), calibration=TEXT).save(place)
        for name, config in CONFIGS.items():
            self._train(name, config())
        self.results |= self._upgrade(["lora"], self.map, self.new, "results")
        self.returned |= self._upgrade(CONFIGS, self.identity, self.old, "returned")
        (self.home / "text.txt").write_text("\n\n".join(TEXT))
        (self.home / "prompts.jsonl").write_text("\n".join(map(json.dumps, PROMPTS)))
        (self.home / "prompts.txt").write_text("\n".join(record["instruction"] for record in PROMPTS))
        upgrade_many([str(self.adapter("lora"))], self.map, self.home / "many", method="lorasuite")

    old = property(lambda self: self.home / "old")
    new = property(lambda self: self.home / "new")
    map = property(lambda self: self.home / "map")
    identity = property(lambda self: self.home / "identity", doc="Map of the old backbone to itself.")

    def adapter(self, name: str) -> Path:
        """The folder of an adapter on the old backbone."""
        return self.home / "adapters" / name

    @cached_property
    def models(self) -> dict[str, Any]:
        """Both models in memory."""
        return {"old": pico_model("llama", seed=1), "new": pico_model("llama", seed=2, **WIDER)}

    @cached_property
    def clean(self) -> dict[tuple[str, str], Effect]:
        """Name of an adapter, backbone -> what its result adds to the weights."""
        new = {(name, "new"): self.effect("new", folder)[0] for name, folder in self.results.items()}
        return new | {(name, "old"): self.effect("old", folder)[0] for name, folder in self.returned.items()}

    @cached_property
    def exact(self) -> dict[str, Effect]:
        """Name of an adapter -> 1 for every weight that its result for the old backbone changes exactly as it does.

        All but the rows of the token tables that no token of the tokenizer has.
        """
        found = {}
        for name in CONFIGS:
            truth, result = self.effect("old", self.adapter(name))[0], self.clean[name, "old"]
            found[name] = {key: ((truth[key] - result[key]).abs() < 1e-5).float() for key in truth}
            for key, mask in found[name].items():
                assert mask.mean() > (0.5 if "lm_head" in key or "embed" in key else 0.9999), (name, key)
        return found

    def effect(self, backbone: str, folder: Path) -> tuple[Effect, list[str]]:
        """Load an adapter with PEFT, and return what it adds to each weight, and the keys that do not match."""
        model = copy.deepcopy(self.models[backbone])
        before = {name: weight.clone() for name, weight in model.state_dict().items()}
        tuned = peft.PeftModel.from_pretrained(model, str(folder))
        loaded = tuned.load_adapter(str(folder), "default")
        after = tuned.merge_and_unload().state_dict()
        return {name: after[name] - before[name] for name in before}, [*loaded.missing_keys, *loaded.unexpected_keys]

    def _upgrade(self, names: Iterable[str], place: Path, target: Path, folder: str) -> dict[str, Path]:
        settings = {"method": "lorasuite", "old": self.old, "new": target}
        return {name: upgrade(self.adapter(name), place, **settings).save(self.home / folder / name) for name in names}

    def _train(self, name: str, config: peft.PeftConfig) -> None:
        config.task_type = "CAUSAL_LM"
        torch.manual_seed(len(name))
        model = peft.get_peft_model(pico_model("llama", seed=1), config)
        for key, weight in model.named_parameters():
            if weight.requires_grad and "magnitude" not in key and "trainable_tokens" not in key:
                torch.nn.init.normal_(weight, std=0.1)
        config.base_model_name_or_path = str(self.old)
        model.save_pretrained(self.adapter(name), save_embedding_layers=False)


def _split(folder: Path) -> None:
    """Split the weights of a backbone into two shards."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    shards = {name: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, name in enumerate(tensors)}
    for shard in set(shards.values()):
        save_file({name: tensors[name] for name in tensors if shards[name] == shard}, folder / shard, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
