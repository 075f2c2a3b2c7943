"""The architecture of a backbone without a converter, read from a model without weights: its modules and their shapes.

What the modules are for is not known, so that no weights can be mapped. Methods that run the models need only the
names of the linear modules, the token tables, and what `head_probe` reads from a forward pass.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from difflib import get_close_matches
from typing import Any

import torch
from torch import nn

from ..arch.registry import UndescribedLayoutError, architecture, has_converter
from ..arch.spec import Architecture, Heads, Site
from ..compat import model_type
from ..errors import LoraSuiteError, short_message
from ..io.source import Source
from .loading import empty_model
from .peft_names import modules_for_lora

OTHER_TOWERS = re.compile(
    r"vision\w*|visual\w*|image_\w+|audio\w*|speech\w*|\w*(?:vision|audio)_(?:tower|model|encoder|embed\w*)"
    r"|(?:multi_?modal|mm)_projector|embed_(?:vision|audio)|aligner"
)
"""Path components of towers and projectors that are not part of the text model."""
NOT_TRAINED = re.compile(r"(?:\w+_)?(?:router|gating)|gate|\w*expert_gate|classifier|pooler|mtp\w*")
"""Path components of the routers of a mixture of experts, and of modules that predict no next token."""
READ_DIRECTLY = ("out_proj", "x_proj", "dt_proj")
"""Modules of a state-space block, beside its parameter ``A_log``, whose weights fused kernels read without calling the
module: a LoRA there has no effect, and PEFT refuses some of them."""
PLAIN_SUBCLASSES = ("FalconLinear", "NonDynamicallyQuantizableLinear")
"""Subclasses of `torch.nn.Linear` with a forward function of their own that computes the same."""


def read_architecture(
    config: Any, model: Any = None, source: Source | None = None, *, access: Mapping[str, Any] | None = None
) -> Architecture:
    """Return the architecture of a backbone: from its converter or, without one, from its model.

    Args:
        config: The backbone's config.
        model: The loaded model; by default one without weights is built.
        source: Files of the backbone, for error messages and for code in its repository.
        access: Options of loading, where that code is trusted.

    Raises:
        LoraSuiteError: If the converter cannot read the config, or transformers cannot build the model.
    """
    if has_converter(model_type(config)):
        with suppress(UndescribedLayoutError):
            return architecture(config)
    return derive_architecture(_empty_model(config, source, access) if model is None else model)


def derive_architecture(model: Any) -> Architecture:
    """Return the architecture of a model without a converter, with or without weights.

    Raises:
        LoraSuiteError: If it has no language-model head or no linear modules.
    """
    config = model.config
    names = {id(module): name for name, module in model.named_modules()}
    embedding = model.get_input_embeddings()
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    if getattr(head, "weight", None) is None or id(embedding) not in names or id(head) not in names:
        raise LoraSuiteError(
            "the model has no token embedding or no language-model head", where=config.model_type,
            wanted="a causal language model", do="choose another backbone",
        )  # fmt: skip
    sites = tuple(_sites(model, head, names[id(embedding)]))
    if not sites:
        raise LoraSuiteError("the model has no linear modules", where=config.model_type, do="choose another backbone")
    hidden, layer_path = head.weight.shape[1], _layer_path(sites)
    return Architecture(
        family=config.model_type,
        layers=len(model.get_submodule(layer_path)) if layer_path else 1,  # a config may count each loop over them
        hidden=hidden,
        heads=Heads(1, 1, hidden),
        intermediate=max(max(site.shape) for site in sites if site.shape),
        vocabulary=min(embedding.weight.shape[0], head.weight.shape[0]),
        sites=sites,
        layer_path=layer_path,
        embedding=names[id(embedding)],
        head=names[id(head)],
        final_norm="",
        tied=head.weight is embedding.weight,
    )


def _is_trained(model: nn.Module, name: str, module: nn.Module, tower: str) -> bool:
    """Whether a LoRA can train a module: one of the text tower, and no router."""
    parent, _, last = name.rpartition(".")
    if not name.startswith(tower) or any(NOT_TRAINED.fullmatch(part) for part in name.split(".")):
        return False
    return _is_plain(module) and not (last in READ_DIRECTLY and hasattr(model.get_submodule(parent), "A_log"))


def _is_plain(module: nn.Module) -> bool:
    """Whether a linear module computes what `torch.nn.Linear` or ``Conv1D`` does; some routers return a tuple."""
    kind = type(module)
    own = isinstance(module, nn.Linear) and kind.forward is not nn.Linear.forward
    return not own or kind.__name__ in PLAIN_SUBCLASSES


def _linear_modules(model: nn.Module, head: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the linear modules by name, without the head and without those of other towers."""
    from transformers.pytorch_utils import Conv1D

    for name, module in model.named_modules():
        foreign = any(OTHER_TOWERS.fullmatch(part) for part in name.split("."))
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head and not foreign:
            yield name, module


def _sites(model: nn.Module, head: nn.Module, embedding: str) -> Iterator[Site]:
    from transformers.pytorch_utils import Conv1D

    tower, found = _text_tower(model, embedding), list(_linear_modules(model, head))
    trained = modules_for_lora(
        _without_weights(model), [name for name, module in found if _is_trained(model, name, module, tower)]
    )
    for name, module in found:
        conv1d, bias = isinstance(module, Conv1D), module.bias is not None
        rows, columns = module.weight.shape[::-1] if conv1d else module.weight.shape
        yield Site(name, (name,), bias=bias, conv1d=conv1d, shape=(rows, columns), trained=name in trained)


def _without_weights(model: nn.Module) -> nn.Module:
    """Return a copy of a model that has no memory for its weights."""
    tensors = [*model.parameters(), *model.buffers()]
    memo: dict[int, Any] = {id(one): torch.empty_like(one, device="meta") for one in tensors}
    memo |= {id(one): nn.Parameter(memo[id(one)], requires_grad=False) for one in model.parameters()}
    return copy.deepcopy(model, memo)


def _layer_path(sites: tuple[Site, ...]) -> str:
    """Return the path of the list with the most linear modules, which is that of the decoder layers."""
    starts = [re.match(r"(.+?)\.\d+\.", site.path) for site in sites]
    counts = Counter(start[1] for start in starts if start)
    return counts.most_common(1)[0][0] if counts else ""


def _text_tower(model: nn.Module, embedding: str) -> str:
    """Return the start of the names in the text tower: the innermost module with the embedding and a list of layers."""
    path = embedding.rpartition(".")[0]
    while path and not any(isinstance(part, nn.ModuleList) for part in model.get_submodule(path).modules()):
        path = path.rpartition(".")[0]
    return f"{path}." if path else ""


def _empty_model(config: Any, source: Source | None, access: Mapping[str, Any] | None) -> Any:
    where = None if source is None else repr(source)
    if access is None and getattr(config, "auto_map", None) and config.model_type not in _known_types():
        raise LoraSuiteError(
            "the model is code of its repository, which runs only if you trust it", where=where,
            got=f"model type {config.model_type!r}",
            do="read the code, then pass trust_remote_code=True (--trust-remote-code)",
        )  # fmt: skip
    try:
        return empty_model(config, "" if source is None else source.location, access)
    except Exception as error:  # families raise exceptions of any type
        raise LoraSuiteError(
            f"no converter for model type {config.model_type!r}, and transformers cannot build its model:"
            f" {short_message(error)}",
            where=where,
            do=f"{_nearest_type(config.model_type)}check the model_type in config.json, or add a converter with"
            " peft_lorasuite.register, see docs/add-a-family.md",
        ) from error  # fmt: skip


def _nearest_type(model_type: str) -> str:
    """Return a question about the nearest model type of transformers, if the given one is not among them."""
    known = _known_types()
    near = get_close_matches(model_type, known, n=1)
    return f"did you mean {near[0]!r}? " if near and model_type not in known else ""


def _known_types() -> list[str]:
    from transformers import CONFIG_MAPPING

    return list(CONFIG_MAPPING.keys())
