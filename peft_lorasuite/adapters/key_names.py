"""Normalization of tensor names to those that PEFT uses for the backbone.

Saved names differ by wrappers (``torch.compile``, FSDP, DDP, activation checkpointing), by the class that the adapter
was trained on (a causal language model, its base model, the text tower of a multimodal model), and by adapter names
that some tools do not remove.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import dropwhile
from typing import NamedTuple

from ..arch.spec import Architecture
from ..errors import LoraSuiteError
from ..models.derived import OTHER_TOWERS
from .peft_format import COPY, PREFIX, split_ending

WRAPPERS = {
    "_orig_mod", "_orig_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module", "_flat_param",
    "module",
}  # fmt: skip
"""Path components that wrappers insert anywhere."""
CONTAINERS = {"model", "base_model", "pretrained_model", "auto_model", "0"}
"""Path components that can come before those of the backbone, such as in wrappers of TRL and sentence-transformers."""
TEXT_TOWERS = {"language_model", "text_model", "llm", "thinker"}
"""Path components between a multimodal model and its text model."""
ENDINGS = (
    (re.compile(r"\.(lora_[AB])\.(?!weight$|bias$)[^.]+\.(weight|bias)$"), r".\1.\2"),
    (re.compile(r"\.(lora_[ABE]|lora_embedding_[AB]|lora_magnitude_vector)\.(?!weight$|bias$)[^.]+$"), r".\1"),
    (re.compile(r"\.lora_magnitude_vector(?:\.(?!weight$)[^.]+)?\.weight$"), ".lora_magnitude_vector"),
    (re.compile(r"\.modules_to_save(?:\.(?!weight$|bias$)[^.]+)?\.(weight|bias)$"), r".\1"),
    (re.compile(r"\.trainable_tokens_delta\.[^.]+$"), ".trainable_tokens_delta"),
)
"""Endings with adapter names or containers -> replacement without them."""
START = re.compile(rf"(?:(?:{'|'.join(sorted(WRAPPERS))})\.)*{re.escape(PREFIX)}")
"""PEFT's prefix, with wrappers of the whole PEFT model before it."""
ADAPTER_NAME = re.compile(
    r"\.(?:lora_[ABE]|lora_embedding_[AB]|lora_magnitude_vector|modules_to_save|trainable_tokens_delta)"
    r"\.(?!(?:weight|bias)$)([^.]+)(?=$|\.(?:weight|bias)$)"
)
"""Where tools that keep adapter names in a tensor's name have them."""
FINAL_NORM = re.compile(r"ln_f|norm_f|\w*norm\w*")
"""Names of the norm after the layers, which is beside them."""
COPIES = re.compile(r"\.((?:original_module|token_adapter\.base_layer)\.(?:weight|bias))$")
SHARED = "base_model."
"""Start of the path of what all modules share: VeRA's matrices, VB-LoRA's vector bank."""
FOREIGN = "it belongs to "
"""Beginning of the reason for tensors of other parts of a multimodal model."""
OTHER_ADAPTER = "the file has several adapters, and it is of "
"""Beginning of the reason for tensors of another adapter in the same file."""


class KeyName(NamedTuple):
    """The components of a tensor's name.

    Attributes:
        module: Path of its module in the backbone, as the backbone spells it if it has such a module.
        ending: The rest of the name, such as ``lora_A.weight``; empty if unknown.
        saved_module: The module's path as it was saved, without PEFT's prefix.
        reason: Why it cannot be transferred, if the name alone determines that.
    """

    module: str
    ending: str
    saved_module: str
    reason: str = ""

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths that patterns in the config can match: as it was saved, without wrappers, and in the backbone.

        Wrappers can come after PEFT, and classes around the backbone before it.
        """
        inner = ".".join(part for part in self.saved_module.split(".") if part not in WRAPPERS)
        return tuple(dict.fromkeys((self.saved_module, inner, self.module)))

    @property
    def peft_name(self) -> str:
        """The name under which PEFT loads the tensor; vectors that all modules share are above the backbone."""
        if self.module.startswith(SHARED):
            return self.module
        return f"{PREFIX}{self.module}.{self.ending}" if self.ending else f"{PREFIX}{self.module}"


def parse_name(name: str, arch: Architecture) -> KeyName:
    """Parse the name of a saved tensor; see `KeyName`."""
    while start := START.match(name):
        name = name[start.end() :]
    path = ".".join(part for part in name.split(".") if part not in WRAPPERS)
    copy = COPIES.search(path)
    for pattern, short in ENDINGS:
        path = pattern.sub(short, path)
    own, ending = (path[: copy.start()], copy[1]) if copy else split_ending(path)
    parts = own.split(".")
    module, other = _backbone_path(parts, arch)
    reason = f"{FOREIGN}{other}, not to the text model" if other else COPY if copy else ""
    return KeyName(own if other else module, ending, _saved_path(name.split("."), parts), reason)


def _saved_path(saved: list[str], parts: list[str]) -> str:
    """Return the beginning of a saved name up to its module, whose components are ``parts`` without wrappers."""
    found = 0
    for index, part in enumerate(saved):
        found += part == parts[found]
        if found == len(parts):
            return ".".join(saved[: index + 1])
    return ".".join(parts)


def parse_names(names: Iterable[str], arch: Architecture) -> dict[str, KeyName]:
    """Parse the names of all tensors of an adapter.

    Returns:
        Saved name -> `KeyName`.

    Raises:
        LoraSuiteError: If they are of several adapters, and none of these is PEFT's ``default`` or has no name.
    """
    names = list(names)
    own, others = _common_adapter_name(names, arch), _other_adapters(names)
    parsed = {name: parse_name(own.sub("", name) if own else name, arch) for name in names}
    return parsed | {name: parsed[name]._replace(reason=f"{OTHER_ADAPTER}{other!r}") for name, other in others.items()}


def _other_adapters(names: Iterable[str]) -> dict[str, str]:
    """Return the tensors of all adapters but one, with the name of theirs: PEFT loads the one named ``default``."""
    found = {name: match[1] for name in names if (match := ADAPTER_NAME.search(name))}
    unnamed = {ADAPTER_NAME.sub(lambda match: match[0].removesuffix(f".{match[1]}"), name)
               for name in found if ".lora_" in name}  # fmt: skip
    several, kept = sorted(set(found.values())), "default"
    if unnamed.intersection(names):  # one adapter has no name
        kept = ""
    elif len(several) < 2:
        return {}
    elif kept not in several:
        raise LoraSuiteError(
            "the file has several adapters", got=", ".join(several), wanted="one, or one named default",
            do="save the one to upgrade alone: save_pretrained(FOLDER, selected_adapters=[NAME])",
        )  # fmt: skip
    return {name: other for name, other in found.items() if other != kept}


def _common_adapter_name(names: list[str], arch: Architecture) -> re.Pattern[str] | None:
    """Return a pattern of the adapter name that all tensors in layers and all shared ones have, if there is one.

    It is the last component, except for ``weight`` or ``bias``, unless that is the parameter's own name: the one after
    the module's. LoRA's names are in `ENDINGS`.
    """
    owners = [path for site in arch.sites for path in (site.path, site.norm, site.post_norm) if path]
    modules = {path.rpartition(".")[2] for path in owners} | {SHARED.rstrip(".")}
    stems = [re.sub(r"\.(?:weight|bias)$", "", name) for name in names]
    own = {*modules, "base_layer"}  # a state dict that was saved as a whole has their parameters
    paths = [stem.split(".") for stem, name in zip(stems, names, strict=True)
             if stem == name or stem.rpartition(".")[2] not in own]  # fmt: skip
    paths = [path for path in paths if any(part.isdigit() for part in path)
             or (path[-3:-2] == [SHARED.rstrip(".")] and path[-2] != "model")]  # fmt: skip
    last = {path[-1] for path in paths}
    if len(last) != 1 or any(path[-2:-1] == [] or path[-2] in modules for path in paths):
        return None
    return re.compile(rf"\.{re.escape(last.pop())}(?=$|\.(?:weight|bias)$)")


def group_by_module(parsed: Mapping[str, KeyName]) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Group tensors by module.

    Returns:
        Module -> {ending: saved name}, and saved name -> reason for tensors that are not used. Of two tensors with the
        same module and ending, the one that was saved under the backbone's own path is used.
    """
    groups: dict[str, dict[str, str]] = {}
    unused: dict[str, str] = {}
    for name, key in sorted(parsed.items(), key=lambda item: item[1].saved_module != item[1].module):
        owned = groups.setdefault(key.module, {}) if not key.reason else {}
        if key.reason or key.ending in owned:
            unused[name] = key.reason or f"it is for the same module as {owned[key.ending]}"
        else:
            owned[key.ending] = name
    return groups, unused


def _backbone_path(parts: list[str], arch: Architecture) -> tuple[str, str]:
    """Return the path as the backbone spells it, for modules of decoder layers, the embedding and the head.

    A path belongs to the text model only if every component before the layers is known: many multimodal models have
    other stacks of layers, some of them with names and sizes of the text model's.

    Returns:
        The path, and the component that shows that it belongs to another part of the model; empty if there is none.
    """
    if not arch.has_converter and arch.find(".".join(parts)):
        return ".".join(parts), ""
    stack = arch.layer_path.split(".")
    for end in range(1, len(parts)):
        if parts[end - 1] == stack[-1] and parts[end].isdigit():
            return ".".join([arch.layer_path, *parts[end:]]), _foreign(parts[: end - 1], stack[:-1])
    tables = [(path, path) for path in (arch.embedding, arch.head)]
    tables += [(disk, memory) for memory, disk in arch.disk if memory in (arch.embedding, arch.head)]
    for spelling, path in tables:
        own = spelling.split(".")
        if parts[-1:] == own[-1:]:
            return path, _foreign(parts[:-1], own[:-1])
    rest = list(dropwhile(lambda part: part in {*stack[:-1], *CONTAINERS, *TEXT_TOWERS}, parts))
    if arch.has_converter and len(rest) == 1 and FINAL_NORM.fullmatch(rest[0]):
        return ".".join([*stack[:-1], *rest]), ""
    return ".".join(parts), next((part for part in parts if OTHER_TOWERS.fullmatch(part)), "")


def _foreign(before: list[str], own: list[str]) -> str:
    """Return the first component that cannot come before the text model's modules; empty if there is none."""
    return next((part for part in before if part not in {*own, *CONTAINERS, *TEXT_TOWERS}), "")
