"""PeftModel.from_upgraded: an old adapter on a new backbone in one line."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch

from .adapters.adapter import old_backbone, reads_backbones
from .adapters.peft_format import select
from .checks import check_seed
from .errors import LoraSuiteError, brief
from .io.output import writing
from .io.source import Source
from .mapping.upgrade_map import UpgradeMap
from .methods.base import reads_old
from .models.backbone import Backbone
from .progress import Progress, bars
from .text.examples import check_enough, read_prompts
from .upgrading.map_cache import map_for
from .upgrading.upgrade import Upgraded, check_rank, upgrade

log = logging.getLogger(__name__)


def from_upgraded(
    model: Any,
    model_id: str | Path,
    adapter_name: str = "default",
    is_trainable: bool = False,
    *,
    source_model: Any = None,
    upgrade_map: UpgradeMap | str | Path | None = None,
    method: str = "auto",
    options: Any = None,
    prompts: Sequence[str] | None = None,
    rank: int | None = None,
    as_: str = "same",
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
    dtype: Any = "auto",
    progress: Progress = bars,
) -> peft.PeftModel:
    """Load an adapter of an older backbone onto a new one.

    Args:
        model: The new backbone: Hub id, folder, or a loaded model.
        model_id: The old adapter: Hub id or folder.
        adapter_name: Name that the adapter gets in the model; where the folder holds several adapters in sub-folders,
            the one of that name is taken.
        is_trainable: Whether its factors can be trained further.
        source_model: The old backbone; by default the one that the adapter's config names.
        upgrade_map: The map of the pair, or its folder or Hub id; by default the cached one, built if need be.
        method: How the adapter is carried over (``peft-lorasuite upgrade --help`` lists the methods).
        options: The method's options, as its dataclass or a mapping.
        prompts: Unlabelled prompts, for methods that run the models.
        rank: Rank of the result; the source's largest by default.
        as_: ``"same"``: a DoRA becomes a DoRA again, an AdaLoRA an AdaLoRA; ``"lora"``: a plain LoRA.
        seed: Of whatever is drawn at random.
        revision: The adapter's revision on the Hub.
        model_revision: The new backbone's.
        source_revision: The old backbone's.
        token: Hub token.
        cache_dir: Hub cache.
        local_files_only: Use the Hub cache alone.
        trust_remote_code: Whether repositories may run code of their own.
        device_map: As in ``AutoModelForCausalLM.from_pretrained``.
        low_memory: If the map has to be built: with the backbones' layers on disk.
        dtype: Of the loaded new backbone, and of both backbones where the method runs them.
        progress: How progress is shown.

    Returns:
        PEFT's own model class, in evaluation mode unless trainable, with the report as ``upgrade_report``.

    Raises:
        LoraSuiteError: For whatever the user can mend, in one sentence.
    """
    access = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only, "dtype": dtype}
    access["trust_remote_code"] = trust_remote_code
    if prompts is not None:
        prompts = check_enough(read_prompts(prompts))
    check_seed(seed)
    _check_name(adapter_name)
    new = Backbone.open(model, revision=model_revision, **access)
    check_rank(rank, new.arch)
    place = Source(str(model_id), "adapter", revision, token, cache_dir, local_files_only)
    adapter = select(place, adapter_name, names_result=True)
    reads = reads_backbones(adapter)
    old = old_backbone(adapter, source_model, source_revision, access)
    # Without a map the old backbone is fetched anyway, and `auto` may run it; with one it is left alone unless the
    # method, the caller's prompts or the caller himself, who names it, ask for it.
    if isinstance(upgrade_map, (str, Path)):
        upgrade_map = UpgradeMap.load(upgrade_map, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
    at_hand = upgrade_map is None or source_model is not None or prompts is not None or reads_old(method, upgrade_map)
    if upgrade_map is None:
        kept = () if method == "auto" else [method]
        upgrade_map = map_for(old(), new, methods=kept, low_memory=low_memory, progress=progress)
    needed = old() if at_hand or reads else None
    carried = upgrade(
        adapter, upgrade_map, method=method, options=options, old=needed, new=new, prompts=prompts, rank=rank,
        as_=as_, seed=seed, token=token, cache_dir=cache_dir, progress=progress,
    )  # fmt: skip
    loaded = new.load(device_map=device_map)
    return attach(loaded, carried, adapter_name=adapter_name, is_trainable=is_trainable)


def _check_name(adapter_name: str) -> None:
    """Refuse, before the long work, a name that PEFT cannot give to an adapter: it becomes a key of modules."""
    try:
        torch.nn.ModuleDict({adapter_name: torch.nn.Identity()})
    except (KeyError, TypeError) as error:
        got = repr(adapter_name)
        raise LoraSuiteError(f"no name for an adapter: {brief(error)}", where="adapter_name", got=got) from error


def attach(
    model: Any, upgraded: Upgraded, *, adapter_name: str = "default", is_trainable: bool = False
) -> peft.PeftModel:
    """Put an upgraded adapter on a loaded backbone, through PEFT's own loader."""
    with tempfile.TemporaryDirectory() as folder:
        with writing(folder):
            upgraded.write(Path(folder))
        carried = peft.PeftModel.from_pretrained(model, folder, adapter_name=adapter_name, is_trainable=is_trainable)
    carried.upgrade_report = upgraded.report  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    return carried


class PeftModel(peft.PeftModel):
    """`peft.PeftModel` with `from_upgraded`; what it returns is PEFT's own class for the task."""

    from_upgraded = staticmethod(from_upgraded)


def install() -> None:
    """Put ``from_upgraded`` on `peft.PeftModel` itself, for existing code; a second call changes nothing."""
    present = getattr(peft.PeftModel, "from_upgraded", None)
    if present is not None and present is not from_upgraded:
        raise LoraSuiteError("peft.PeftModel has another from_upgraded already", got=repr(present))
    peft.PeftModel.from_upgraded = staticmethod(from_upgraded)  # pyright: ignore[reportAttributeAccessIssue]
