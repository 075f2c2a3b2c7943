"""The loaders of serving programs on an adapter, in a process of their own: ``engine_code.py PROGRAM PACKAGES ...``.

What a loader returns is merged into the backbone; the logits for a fixed text are written, or the loader's error is the
exit message. vLLM and SGLang run without their GPU code: what their loaders import beside is replaced by empty modules.
"""

from __future__ import annotations

import ast
import json
import sys
import types
import typing
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def text() -> torch.Tensor:
    """Return ids of a fixed text."""
    return torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(3))


def stub(names: dict[str, dict[str, Any]]) -> None:
    """Put modules with these attributes in the place of those that a loader imports and does not need here."""
    for name, values in names.items():
        module = types.ModuleType(name)
        vars(module).update(values)
        sys.modules[name] = module


def functions(file: Path, names: tuple[str, ...]) -> dict[str, Any]:
    """Return functions of a file without running its imports."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    chosen = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names]
    space: dict[str, Any] = {**vars(typing)}  # for the annotations
    exec(compile(ast.Module(chosen, []), str(file), "exec"), space)
    return {name: space[name] for name in names}


def backbone(base: str) -> Any:
    """Load the backbone."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


def merged(base: str, updates: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return logits of the backbone with updates of its modules, by their names."""
    model = backbone(base)
    with torch.no_grad():
        for name, update in updates.items():
            weight = model.get_submodule(name).weight
            weight += update if update.shape == weight.shape else update.T  # of an embedding
        return model(text()).logits


def vllm(packages: Path, base: str, adapter: str) -> torch.Tensor:
    """Load it with vLLM's PEFTHelper and LoRAModel."""
    import logging

    logger = logging.getLogger("vllm")
    logger.info_once = logger.info  # type: ignore[attr-defined]
    stub(
        {
            "vllm.logger": {"init_logger": lambda name: logger},
            "vllm.config": {},
            "vllm.config.lora": {"LoRAConfig": object},
            "vllm.utils": {},
            "vllm.utils.torch_utils": {"PIN_MEMORY": False},
            "vllm.model_executor": {},
            "vllm.model_executor.model_loader": {},
            "vllm.model_executor.model_loader.tensorizer": {"TensorizerConfig": object},
            "vllm.model_executor.models": {},
            "vllm.model_executor.models.utils": {"WeightsMapper": object},
            "vllm.lora.utils": {
                "get_lora_id": lambda: 1,
                **functions(
                    packages / "vllm/lora/utils.py", ("parse_fine_tuned_lora_name", "is_base_embedding_weights")
                ),
            },
        }
    )
    from vllm.lora.lora_model import LoRAModel  # pyright: ignore[reportMissingImports]
    from vllm.lora.peft_helper import PEFTHelper  # pyright: ignore[reportMissingImports]

    helper = PEFTHelper.from_local_dir(adapter, 128)
    helper.validate_legal(types.SimpleNamespace(max_lora_rank=16, bias_enabled=False))
    known = {name.rpartition(".")[2] for name, _ in backbone(base).named_modules()}
    loaded = LoRAModel.from_local_checkpoint(adapter, known, helper, lora_model_id=1, device="cpu", dtype=torch.float32)
    return merged(base, {name: lora.scaling * lora.lora_b @ lora.lora_a for name, lora in loaded.loras.items()})


def sglang(packages: Path, base: str, adapter: str) -> torch.Tensor:
    """Load it with SGLang's LoRAConfig and LoRAAdapter."""
    import re

    from safetensors.torch import load_file

    def layer_id(name: str) -> int | None:
        found = re.search(r"\.(?:layers|h)\.(\d+)\.", name)
        return int(found[1]) if found else None

    model = backbone(base)
    stub(
        {
            "sglang.srt.configs": {},
            "sglang.srt.configs.load_config": {"LoadConfig": object},
            "sglang.srt.layers": {},
            "sglang.srt.layers.utils": {"get_layer_id": layer_id},
            "sglang.srt.lora.backend": {},
            "sglang.srt.lora.backend.base_backend": {"BaseLoRABackend": object},
            "sglang.srt.model_loader": {},
            "sglang.srt.model_loader.loader": {"DefaultModelLoader": object},
            "sglang.srt.utils": {},
            "sglang.srt.utils.hf_transformers_utils": {"AutoConfig": object},
            "sglang.srt.lora.utils": functions(
                packages / "sglang/srt/lora/utils.py", ("get_normalized_target_modules",)
            ),
        }
    )
    from sglang.srt.lora.lora import LoRAAdapter  # pyright: ignore[reportMissingImports]
    from sglang.srt.lora.lora_config import LoRAConfig  # pyright: ignore[reportMissingImports]

    config = LoRAConfig(path=adapter)
    if config.use_dora:
        raise ValueError("SGLang refuses DoRA (lora_manager.py)")
    loaded = LoRAAdapter("one", config, model.config, None, None)
    loaded.initialize_weights_from_tensors(load_file(Path(adapter) / "adapter_model.safetensors"))
    updates: dict[str, torch.Tensor] = {}
    stacks = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    tensors = {name: tensor for layer in loaded.layers for name, tensor in layer.weights.items()}
    tensors |= loaded.embedding_layers
    tensors = {name.replace("lora_embedding_", "lora_"): tensor for name, tensor in tensors.items()}  # as its pool
    for name in [name for name in tensors if ".lora_A" in name]:
        A, B = tensors[name], tensors[name.replace("lora_A", "lora_B")]
        if A.shape[0] % config.r or any(rank != config.r for rank in (B.shape[1],)):
            raise ValueError(f"{name}: rank {B.shape[1]}, buffer of rank {config.r}")
        module = name.removeprefix("base_model.model.").partition(".lora_A")[0]
        parent, _, own = module.rpartition(".")
        paths = [f"{parent}.{part}" for part in stacks[own]] if own in stacks else [module]
        rows = [model.get_submodule(path).weight.shape[0] for path in paths] if own in stacks else len(B)
        for path, a, b in zip(paths, A.split(config.r), B.split(rows), strict=True):
            updates[path] = loaded.scaling * b @ a
    return merged(base, updates)


def mlx(packages: Path, base: str, adapter: str) -> torch.Tensor:
    """Run it in mlx-lm itself."""
    import mlx.core as mx  # pyright: ignore[reportMissingImports]
    from mlx_lm.tuner.utils import load_adapters  # pyright: ignore[reportMissingImports]
    from mlx_lm.utils import load_model  # pyright: ignore[reportMissingImports]

    model, _ = load_model(Path(base))
    model = load_adapters(model, adapter)
    logits = model(mx.array(text().tolist()))
    return torch.tensor(logits.astype(mx.float32).tolist())


PROGRAMS: dict[str, Callable[[Path, str, str], torch.Tensor]] = {"vllm": vllm, "sglang": sglang, "mlx": mlx}


def main() -> None:
    """Write the logits of ``PROGRAM PACKAGES BASE ADAPTER OUT``."""
    warnings.simplefilter("ignore")
    program, packages, base, adapter, out = sys.argv[1:]
    sys.path.insert(0, packages)
    try:
        torch.save(PROGRAMS[program](Path(packages), base, adapter), out)
    except Exception as error:
        print(json.dumps({"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}))


if __name__ == "__main__":
    main()
