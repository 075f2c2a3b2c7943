"""The files of mlx-lm: names of its own models, factors transposed, and one rank and scale for all modules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapters.peft_format import CONFIG, PREFIX, split_ending
from ..adapters.plain import module_type
from ..arch.spec import Architecture
from ..errors import LoraSuiteError
from ..io.checkpoint import open_safetensors
from ..io.source import Source
from .features import Contents

WEIGHTS = "adapters.safetensors"
LAYERS = {"gpt2": "model.h", "gpt_neox": "model.h"}
"""Family -> path of the layers in mlx-lm, where it is not that of transformers."""
TABLES = {"gpt2": "model.wte", "gpt_neox": "model.embed_in"}
"""Family -> path of the embedding in mlx-lm, where it is not that of transformers."""
HEADS = {"gpt_neox": "model.embed_out"}
"""Family -> path of the head in mlx-lm, where it is not that of transformers."""
FACTORS = {"lora_A.weight": "lora_a", "lora_B.weight": "lora_b", "lora_embedding_A": "lora_a",
           "lora_embedding_B": "lora_b"}  # fmt: skip
"""Ending of a PEFT name -> name of the transposed factor."""


def is_layout(source: Source) -> bool:
    """Whether a folder or repository has the files of mlx-lm."""
    return source.fetch(WEIGHTS) is not None


def to_mlx(tensors: dict[str, Tensor], rank: int, arch: Architecture) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the config of a plain LoRA with a scaling of 1 as mlx-lm has them.

    Args:
        tensors: PEFT name -> tensor.
        rank: The rank of all modules.
        arch: Architecture of the backbone.
    """
    renamed, keys = {}, set()
    for name, tensor in tensors.items():
        module, ending = split_ending(name.removeprefix(PREFIX))
        if ending not in FACTORS:
            raise LoraSuiteError("mlx-lm has no such tensor", where=name, wanted=" or ".join(FACTORS))
        path = _module(module, arch)
        keys.add(module_type(path))
        renamed[f"{path}.{FACTORS[ending]}"] = tensor.T.contiguous()
    parameters = {"rank": rank, "scale": 1.0, "dropout": 0.0, "keys": sorted(keys)}
    return renamed, {"fine_tune_type": "lora", "num_layers": arch.layers, "lora_parameters": parameters}


def _module(module: str, arch: Architecture) -> str:
    """Return the path of a module in mlx-lm's model of the family."""
    outside = {arch.embedding: TABLES.get(arch.family, arch.embedding), arch.head: HEADS.get(arch.family, arch.head)}
    if module in outside:
        return outside[module]
    rest = module.removeprefix(f"{arch.layer_path}.")
    return f"{LAYERS.get(arch.family, arch.layer_path)}.{rest}"


def write(folder: Path, tensors: dict[str, Tensor], rank: int, arch: Architecture, base: str) -> None:
    """Write the files of mlx-lm to an existing, empty folder; ``model`` in the config names the backbone."""
    from safetensors.torch import save_file

    renamed, config = to_mlx(tensors, rank, arch)
    save_file(renamed, folder / WEIGHTS, metadata={"format": "mlx"})
    text = json.dumps({"model": base, **config}, indent=2, sort_keys=True) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")


def read_contents(source: Source) -> Contents:
    """Read the config, and the names and shapes of the tensors as PEFT has them: one pair per module.

    Raises:
        LoraSuiteError: If a factor lacks the other one, or is not of the rank in the config.
    """
    config = source.read_json(CONFIG)
    file = open_safetensors(source.require(WEIGHTS), where=source.full_name(WEIGHTS))
    shapes = {name: torch.Size(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    parameters = config.get("lora_parameters")
    rank = parameters.get("rank") if isinstance(parameters, dict) else None
    for name, shape in shapes.items():
        module, _, factor = name.rpartition(".")
        other = {"lora_a": "lora_b", "lora_b": "lora_a"}.get(factor)
        if other is None or f"{module}.{other}" not in shapes or shape[factor == "lora_a"] != rank:
            raise LoraSuiteError(
                "a tensor is no factor of a pair of this rank", where=f"{source.full_name(WEIGHTS)}, {name}",
                got=tuple(shape), wanted=f"lora_a and lora_b of rank {rank}", do="export it again",
            )  # fmt: skip
    pairs = {f"{name.removesuffix('.lora_a')}.lora_A.weight": tuple(reversed(shape))
             for name, shape in shapes.items() if name.endswith(".lora_a")}  # fmt: skip
    return Contents({**config, "peft_type": "LORA", "r": rank, "base_model_name_or_path": config.get("model")}, pairs)
