"""PeftModel.from_upgraded: an old adapter on a new backbone in one line."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import peft
import torch

from .errors import LoraSuiteError, check_seed, short_message
from .io.output import write_errors
from .io.source import LoadOptions
from .progress import Progress, progress_bars
from .text.examples import PromptsLike, check_prompt_count, read_prompts
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
    rank: int | None = None,
    output_type: str = "same",
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
        adapter_name: Name that the adapter gets in the model; where the folder holds several adapters in sub-folders,
            the one of that name is taken.
        is_trainable: Whether the adapter can be trained further.
        source_model: The old backbone; by default the one that the adapter's config has.
        upgrade_map: The map of the pair, or its folder or Hub id; by default the cached one, built if need be.
        method: How the adapter is converted (``peft-lorasuite upgrade --help`` lists the methods).
        options: The method's options, as its dataclass or a mapping.
        prompts: Unlabeled prompts, for methods that run the models.
        rank: Rank of the result; the source's largest by default.
        output_type: ``"same"``: a DoRA becomes a DoRA again, an AdaLoRA an AdaLoRA; ``"lora"``: a plain LoRA.
        seed: Of whatever is drawn at random.
        revision: The adapter's revision on the Hub.
        model_revision: The new backbone's.
        source_revision: The old backbone's.
        token: Hub token.
        cache_dir: Hub cache.
        local_files_only: Use the Hub cache alone.
        trust_remote_code: Whether transformers may run code of the repositories.
        device_map: As in ``AutoModelForCausalLM.from_pretrained``.
        low_memory: If the map has to be built: with the backbones' layers on disk.
        dtype: Of the loaded new backbone, and of both backbones where the method runs them.
        progress: How progress is shown.

    Returns:
        PEFT's own model class, in evaluation mode unless trainable, with the report as ``upgrade_report``.

    Raises:
        LoraSuiteError: For whatever the user can fix, in one sentence.
    """
    if prompts is not None:
        prompts = check_prompt_count(read_prompts(prompts))
    check_seed(seed)
    _check_name(adapter_name)
    load = LoadOptions(token, cache_dir, local_files_only, trust_remote_code, dtype, device_map)
    inputs = open_inputs(
        model_id, model, old=source_model, upgrade_map=upgrade_map, method=method, prompts=prompts is not None,
        rank=rank, adapter_name=adapter_name, names_result=True, revision=revision, new_revision=model_revision,
        old_revision=source_revision, load=load, low_memory=low_memory, progress=progress,
    )  # fmt: skip
    upgraded = upgrade(
        inputs.source, inputs.upgrade_map, method=method, options=options, old=inputs.old, new=inputs.new,
        prompts=prompts, rank=rank, output_type=output_type, seed=seed, token=token, cache_dir=cache_dir,
        progress=progress,
    )  # fmt: skip
    return attach(inputs.new.load(), upgraded, adapter_name=adapter_name, is_trainable=is_trainable)


def _check_name(adapter_name: str) -> None:
    """Refuse, before the long work, a name that PEFT cannot give to an adapter: it becomes a key of modules."""
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
    """Put an upgraded adapter on a loaded backbone, through PEFT's own loader."""
    with tempfile.TemporaryDirectory() as folder:
        with write_errors(folder):
            upgraded.write(Path(folder))
        loaded = peft.PeftModel.from_pretrained(model, folder, adapter_name=adapter_name, is_trainable=is_trainable)
    loaded.upgrade_report = upgraded.report  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    return loaded


class PeftModel(peft.PeftModel):
    """`peft.PeftModel` with `from_upgraded`; what it returns is PEFT's own class for the task."""

    from_upgraded = staticmethod(from_upgraded)


def install() -> None:
    """Put ``from_upgraded`` on `peft.PeftModel` itself, for existing code; a second call changes nothing."""
    present = getattr(peft.PeftModel, "from_upgraded", None)
    if present is not None and present is not from_upgraded:
        raise LoraSuiteError("peft.PeftModel has another from_upgraded already", got=repr(present))
    peft.PeftModel.from_upgraded = staticmethod(from_upgraded)  # pyright: ignore[reportAttributeAccessIssue]
