"""`PeftModel.from_upgraded`: load an old adapter onto a new backbone in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch

from .adapters.fit_vocabulary import fit_vocabulary
from .errors import LoraSuiteError, check_seed, short_message
from .io.source import LoadOptions
from .io.temporary import temporary_folder
from .models.task import LabelsLike
from .progress import Progress, progress_bars
from .text.chat_options import ChatLike, ChatOptions
from .text.examples import PromptsLike, given_prompts
from .upgrading.inputs import BackboneLike, MapLike, open_inputs
from .upgrading.upgrade import Upgraded, upgrade


def from_upgraded(
    model: BackboneLike,
    model_id: str | Path,
    adapter_name: str = "default",
    is_trainable: bool = False,
    *,
    source_model: BackboneLike | None = None,
    upgrade_map: MapLike | None = None,
    method: str = "auto",
    options: Any = None,
    prompts: PromptsLike | None = None,
    chat: ChatLike = None,
    rank: int | None = None,
    output_type: str = "same",
    labels: LabelsLike | None = None,
    problem_type: str | None = None,
    seed: int = 0,
    revision: str | None = None,
    model_revision: str | None = None,
    source_revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | None = None,
    local_files_only: bool = False,
    trust_remote_code: bool = False,
    device_map: Any = None,
    low_memory: bool = False,
    dtype: torch.dtype | str = "auto",
    progress: Progress = progress_bars,
) -> peft.PeftModel:
    """Load an adapter of an older backbone onto a new one.

    Args:
        model: The new backbone: Hub id, folder, or a loaded model.
        model_id: The old adapter: Hub id or folder.
        adapter_name: Name of the adapter in the model. If the folder has several adapters in subfolders, the one of
            this name is loaded.
        is_trainable: Whether the adapter can be trained further.
        source_model: The old backbone; by default the base model of the adapter's config.
        upgrade_map: The map of the pair, or its folder or Hub id; by default the cached one, which is built if
            necessary.
        method: Name of a method (``peft-lorasuite upgrade --help`` lists them), or ``"auto"``.
        options: Options of the method: its dataclass, or a mapping of names to values.
        prompts: Unlabeled prompts, for methods that run the models: a file, the Hub id of a dataset, a dataset or a
            list; ``"self"`` lets the old models write them. Conversations are rendered by the chat template of each
            side.
        chat: How conversations are rendered: `ChatOptions`, or a mapping of their names to values.
        rank: Rank of the result; by default the largest of the adapter, or what the method chooses.
        output_type: ``"same"`` keeps the type of a DoRA or an AdaLoRA, ``"lora"`` makes it a plain LoRA.
        labels: Names of a classifier's labels by index, or ``id2label``; by default those of files beside the adapter.
        problem_type: transformers' ``problem_type`` of a classifier; by default that of these files.
        seed: Random seed.
        revision: Revision of the adapter on the Hub.
        model_revision: Revision of the new backbone on the Hub.
        source_revision: Revision of the old backbone on the Hub.
        token: Hub token.
        cache_dir: Hub cache.
        local_files_only: Use only files in the Hub cache.
        trust_remote_code: Whether transformers may run code of the repositories.
        device_map: As in ``AutoModelForCausalLM.from_pretrained``.
        low_memory: Build the map, if necessary, with the layers of the backbones on disk.
        dtype: Dtype of the new backbone, and of both backbones if the method runs them.
        progress: Shows the progress.

    Returns:
        PEFT's own model class, in evaluation mode unless ``is_trainable``, with the report as ``upgrade_report`` and,
        if tokens were added for the adapter or it has another chat template than the backbone, the tokenizer for it as
        ``adapter_tokenizer``.

    Raises:
        LoraSuiteError: If an input is missing, malformed or unsupported.
    """
    check_seed(seed)
    chat = ChatOptions.of(chat)
    prompts = given_prompts(prompts, options=options, seed=seed, form=chat.prompt_format, token=token)
    _check_name(adapter_name)
    load = LoadOptions(token, cache_dir, local_files_only, trust_remote_code, dtype, device_map)
    inputs = open_inputs(
        model_id, model, old=source_model, upgrade_map=upgrade_map, method=method, options=options,
        prompts=prompts, chat=chat, rank=rank, adapter_name=adapter_name, names_result=True, revision=revision,
        new_revision=model_revision, old_revision=source_revision, load=load, low_memory=low_memory, progress=progress,
    )  # fmt: skip
    upgraded = upgrade(
        inputs.source, inputs.upgrade_map, method=method, options=options, old=inputs.old, new=inputs.new,
        prompts=prompts, chat=chat, rank=rank, output_type=output_type, labels=labels, problem_type=problem_type,
        seed=seed, token=token, cache_dir=cache_dir, progress=progress,
    )  # fmt: skip
    loaded = inputs.new.load(task=upgraded.adapter.task)
    return attach(loaded, upgraded, adapter_name=adapter_name, is_trainable=is_trainable)


def _check_name(adapter_name: str) -> None:
    """Check the adapter name before any long work: it becomes a key of torch modules."""
    try:
        torch.nn.ModuleDict({adapter_name: torch.nn.Identity()})
    except (KeyError, TypeError) as error:
        got = repr(adapter_name)
        raise LoraSuiteError(
            f"malformed adapter name: {short_message(error)}", where="adapter_name", got=got
        ) from error


def attach(
    model: Any, upgraded: Upgraded, *, adapter_name: str = "default", is_trainable: bool = False
) -> peft.PeftModel:
    """Load an upgraded adapter onto a loaded backbone, through PEFT's own loader.

    If tokens were added for the adapter, the backbone is resized first.

    Args:
        model: The new backbone, a loaded transformers model.
        upgraded: The upgraded adapter.
        adapter_name: Name of the adapter in the model.
        is_trainable: Whether the adapter can be trained further.
    """
    with temporary_folder() as folder:
        upgraded.write(folder)
        fit_vocabulary(model, folder)
        loaded: Any = peft.PeftModel.from_pretrained(
            model, str(folder), adapter_name=adapter_name, is_trainable=is_trainable
        )
    loaded.upgrade_report, loaded.adapter_tokenizer = upgraded.report, upgraded.tokenizer
    return loaded


class PeftModel(peft.PeftModel):
    """`peft.PeftModel` with `from_upgraded`, which returns PEFT's own class for the task."""

    from_upgraded = staticmethod(from_upgraded)


def install() -> None:
    """Add ``from_upgraded`` to `peft.PeftModel` itself, for existing code. A second call changes nothing.

    Raises:
        LoraSuiteError: If `peft.PeftModel` already has another ``from_upgraded``.
    """
    present = getattr(peft.PeftModel, "from_upgraded", None)
    if present is not None and present is not from_upgraded:
        raise LoraSuiteError("peft.PeftModel already has another from_upgraded", got=repr(present))
    peft.PeftModel.from_upgraded = staticmethod(from_upgraded)  # pyright: ignore[reportAttributeAccessIssue]
