"""UpgradeMap: the one-off artefact of a backbone pair, built once and applied to any number of adapters."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache, cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._version import __version__
from ..arch.spec import ATTENTION, Architecture
from ..errors import LoraSuiteError, context
from ..io.checkpoint import read_all
from ..io.output import whole_folder
from ..io.source import Source, name_and_revision, read_json
from ..linalg.basis import Basis, HeadFit, UnitFit, part_basis, pseudo_inverse
from .fingerprint import Identity
from .options import MapOptions
from .sections import Section, add_section, checked_methods, map_key, stored_sections

if TYPE_CHECKING:
    from ..hub.push import Pushed

FORMAT = 1
META, CORE = "map.json", "core.safetensors"


@dataclass(frozen=True, eq=False)
class LayerPair:
    """How one old layer becomes one new layer.

    Attributes:
        old: Old layer.
        new: New layer.
        heads: Matched query heads, old and new, (pairs, 2).
        head_scores: Cosine of each matched pair.
        head_fits: Part -> fit, for q, k, v, o; k and v on the key/value heads of the matched query heads.
        units: Matched feed-forward units, old and new, (pairs, 2).
        unit_fits: Part -> fit, for the feed-forward parts that both families have.
        gains: Part -> (old gain, new gain).
    """

    old: int
    new: int
    heads: Tensor
    head_scores: Tensor
    head_fits: Mapping[str, HeadFit]
    units: Tensor
    unit_fits: Mapping[str, UnitFit]
    gains: Mapping[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class UpgradeMap:
    """Everything that a weight-based method needs to know about a pair of backbones.

    Attributes:
        old: Identity of the old backbone.
        new: Identity of the new backbone.
        options: How the map was built.
        hidden: ``W_h (D_o, D_n)``.
        inverse: ``pinv(W_h) (D_n, D_o)``.
        similarity: ``(L_o, L_n)`` scores of the layers, zeros where the layer map looks at nothing.
        layers: The matched layers, ascending.
        facts: What the build measured: shared tokens, fit of the hidden map, seconds, versions.
        home: The folder or Hub repository that it was loaded from.
        sections: Name -> what a single method needs beyond the rest (`with_section` adds one).
    """

    old: Identity
    new: Identity
    options: MapOptions
    hidden: Tensor
    inverse: Tensor
    similarity: Tensor
    layers: tuple[LayerPair, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)
    home: Source | None = None
    sections: Mapping[str, Section] = field(default_factory=dict)

    @classmethod
    def build(
        cls, old: Any, new: Any, options: MapOptions | None = None, *, methods: Iterable[str] = (), **settings: Any
    ) -> UpgradeMap:
        """Build the map of a pair of backbones, with the sections of some methods (a mapping names their options).

        The other settings are those of `build.build_map`.
        """
        from .build import build_map

        wanted = checked_methods(methods)
        built = build_map(old, new, options or MapOptions(), **settings)
        for name, (_, chosen) in wanted.items():
            built = built.with_section(name, old, new, options=chosen, **settings)
        return built

    def with_section(self, method: str, old: Any, new: Any, **settings: Any) -> UpgradeMap:
        """Return the map with a method's section as well; nothing else is built again.

        Settings: ``options`` of the method, ``parts`` to build for (all by default), ``calibration``, ``device_map``,
        ``low_memory``, ``dtype`` and ``progress`` as for the map. Saving the result over the map's folder adds a file.
        """
        return add_section(self, method, old, new, **settings)

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """The layer map: (old, new)."""
        return [(pair.old, pair.new) for pair in self.layers]

    @cached_property
    def basis(self) -> Callable[[LayerPair, str], Basis]:
        """``basis(pair, part)``: the change of basis of one part of one matched layer, the same for every adapter."""
        old, new, hidden, inverse = self.old.arch, self.new.arch, self.hidden, self.inverse  # not self: no circle
        return cache(lambda pair, part: part_basis(old, new, part, hidden, inverse, pair.gains[part]))

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write ``map.json``, ``core.safetensors`` and a file a section, whole or not at all."""
        from safetensors.torch import save_file

        with whole_folder(folder, overwrite=overwrite) as part:
            save_file(_tensors(self), part / CORE)
            sections = {name: section.write(part, kept=Path(folder)) for name, section in self.sections.items()}
            meta = {**self.describe(), "sections": sections}
            (part / META).write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
        return Path(folder)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        create_pr: bool = False,
        commit_message: str | None = None,
        overwrite: bool = False,
        token: str | bool | None = None,
    ) -> Pushed:
        """Publish the map on the Hub with a card, in one commit, and read it back; see `hub.push_map`."""
        from ..hub.push import push_map

        return push_map(
            self, repo_id, private=private, create_pr=create_pr, commit_message=commit_message, overwrite=overwrite,
            token=token,
        )  # fmt: skip

    @classmethod
    def load(
        cls,
        name: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | None = None,
        local_files_only: bool = False,
    ) -> UpgradeMap:
        """Read a map from a folder or the Hub (``owner/name@revision``); its names, shapes and values are checked."""
        if revision is None:
            name, revision = name_and_revision(name)
        source = Source(str(name), "upgrade map", revision, token, cache_dir, local_files_only)
        with context(source):
            meta = read_json(source.need(META, do="name the folder that `map` wrote"), where=f"{source.name}/{META}")
            if meta.get("format") != FORMAT:
                raise LoraSuiteError(
                    "the map has another format",
                    got=meta.get("format"),
                    wanted=FORMAT,
                    do="build it again with this version",
                )
            tensors = read_all(source.need(CORE), where=f"{source.name}/{CORE}")
            try:
                read = _rebuild(meta, tensors, source)
                return replace(read, sections=stored_sections(meta, source, map_key(read)))
            except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
                raise LoraSuiteError(f"the map is incomplete: {error}", do="build or fetch it again") from error

    def describe(self) -> dict[str, Any]:
        """Return everything but the tensors, as JSON values."""
        return {
            "format": FORMAT,
            "version": __version__,
            "old": self.old.to_dict(),
            "new": self.new.to_dict(),
            "options": asdict(self.options),
            "layers": self.pairs,
            "facts": dict(self.facts),
            "sections": {name: section.describe() for name, section in self.sections.items()},
        }


def _tensors(upgrade_map: UpgradeMap) -> dict[str, Tensor]:
    """Flatten the tensors under names that `_rebuild` reads; the inverse is computed again on loading."""
    tensors = {"hidden": upgrade_map.hidden, "similarity": upgrade_map.similarity}
    for pair in upgrade_map.layers:
        here = f"layers.{pair.new}"
        tensors |= {f"{here}.heads": pair.heads, f"{here}.head_scores": pair.head_scores, f"{here}.units": pair.units}
        for part, fit in pair.head_fits.items():
            tensors |= {f"{here}.{part}.{name}": getattr(fit, name) for name in ("T", "residual", "norms")}
        for part, fit in pair.unit_fits.items():
            tensors |= {f"{here}.{part}.{name}": getattr(fit, name) for name in ("scale", "residual", "norms")}
        for part, (old, new) in pair.gains.items():
            tensors |= {f"{here}.{part}.old_gain": old, f"{here}.{part}.new_gain": new}
    return {name: tensor.contiguous().clone() for name, tensor in tensors.items()}


def _rebuild(meta: dict[str, Any], tensors: dict[str, Tensor], home: Source) -> UpgradeMap:
    old, new = Identity.from_dict(meta["old"]), Identity.from_dict(meta["new"])
    _check_pairs(torch.tensor(meta["layers"]), (old.arch.layers, new.arch.layers), "layers")
    if any(i > k or j >= m for (i, j), (k, m) in pairwise(meta["layers"])) or not isinstance(meta["facts"], dict):
        raise LoraSuiteError("the layer map or the facts of the map are no such thing", do="build or fetch it again")
    read = _Reader(tensors)
    hidden = read("hidden", old.arch.hidden, new.arch.hidden)
    similarity = read("similarity", old.arch.layers, new.arch.layers)
    layers = tuple(_rebuild_pair(i, j, old.arch, new.arch, read) for i, j in meta["layers"])
    read.close()
    options = MapOptions(**meta["options"])
    return UpgradeMap(old, new, options, hidden, pseudo_inverse(hidden), similarity, layers, meta["facts"], home)


def _rebuild_pair(i: int, j: int, old: Architecture, new: Architecture, read: _Reader) -> LayerPair:
    here = f"layers.{j}"
    heads = read.pairs(f"{here}.heads", (old.heads.query, new.heads.query))
    units = read.pairs(f"{here}.units", (old.intermediate, new.intermediate))
    head_fits, unit_fits, gains = {}, {}, {}
    for part in [part for part in old.parts if part in new.parts and f"{here}.{part}.old_gain" in read]:
        name = f"{here}.{part}"
        gains[part] = read(f"{name}.old_gain", old.hidden), read(f"{name}.new_gain", new.hidden)
        if part in ATTENTION:
            T = read(f"{name}.T", len(heads), old.heads.size, new.heads.size)
            head_fits[part] = HeadFit(T, read(f"{name}.residual", len(heads)), read(f"{name}.norms", len(heads), 2))
        else:
            scale = read(f"{name}.scale", len(units))
            unit_fits[part] = UnitFit(scale, read(f"{name}.residual"), read(f"{name}.norms", 2))
    return LayerPair(i, j, heads, read(f"{here}.head_scores", len(heads)), head_fits, units, unit_fits, gains)


class _Reader:
    """Hands out the tensors of a map, which may be a stranger's: each by name, of the shape that it must have."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = dict(tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __call__(self, name: str, *shape: int) -> Tensor:
        """Take a tensor of real numbers."""
        tensor = self._tensors.pop(name)
        if tuple(tensor.shape) != shape or not tensor.is_floating_point():
            raise LoraSuiteError(
                f"a tensor of the map has a wrong shape: {name}",
                got=f"{tuple(tensor.shape)} of {tensor.dtype}", wanted=shape,
            )  # fmt: skip
        return tensor

    def pairs(self, name: str, limits: tuple[int, int]) -> Tensor:
        """Take a list of matched numbers, old and new."""
        return _check_pairs(self._tensors.pop(name), limits, name)

    def close(self) -> None:
        """Refuse what nobody has asked for."""
        if self._tensors:
            raise LoraSuiteError(
                "the map holds tensors that belong to nothing", got=", ".join(sorted(self._tensors)[:3])
            )


def _check_pairs(pairs: Tensor, limits: tuple[int, int], name: str) -> Tensor:
    whole = pairs.ndim == 2 and pairs.shape[1] == 2 and pairs.dtype == torch.int64
    if not whole or bool((pairs < 0).any()) or bool((pairs >= torch.tensor(limits)).any()):
        raise LoraSuiteError(f"the map matches what does not exist: {name}", wanted=f"pairs below {limits}")
    return pairs
