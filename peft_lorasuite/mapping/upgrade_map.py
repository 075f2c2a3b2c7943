"""UpgradeMap: built once for a pair of backbones, applied to any number of adapters."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from .._version import __version__
from ..arch.spec import check_parts
from ..errors import LoraSuiteError, error_context
from ..io.checkpoint import read_tensors
from ..io.output import atomic_folder
from ..io.source import Source, split_revision
from ..linalg.basis import Basis, part_basis
from ..linalg.lowrank import decomposition_errors
from ..progress import Progress, no_progress, stage
from ..text.summary import Summarized
from .fingerprint import Identity
from .layer_pair import LayerPair
from .options import MapOptions
from .sections import Section, list_sections
from .storage import FORMAT, check_finite, flatten, read_description, rebuild

META, CORE = "map.json", "core.safetensors"


@dataclass(frozen=True, eq=False, repr=False)
class UpgradeMap(Summarized):
    """Matched layers, heads and units of a pair of backbones, and the changes of basis between them.

    Attributes:
        old: Identity of the old backbone.
        new: Identity of the new backbone.
        options: How the map was built.
        hidden: ``W_h``, (D_o, D_n).
        inverse: ``pinv(W_h)``, (D_n, D_o).
        similarity: Similarity of all pairs of layers, (L_o, L_n); zeros where the layer map does not use it.
        layers: The matched layers, ascending; none if a backbone has no converter (see `maps_weights`).
        facts: Measurements of the build: shared tokens, fit of the hidden map, seconds.
        source: The folder or Hub repository that it was loaded from.
        sections: Name -> additional tensors of a single method (see `add_section`).
    """

    old: Identity
    new: Identity
    options: MapOptions
    hidden: Tensor
    inverse: Tensor
    similarity: Tensor
    layers: tuple[LayerPair, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)
    source: Source | None = None
    sections: Mapping[str, Section] = field(default_factory=dict)

    def _summary(self) -> tuple[str, dict[str, str]]:
        def side(identity: Identity) -> str:
            arch = identity.arch
            return f"{identity.name} ({arch.family}, {arch.layers} layers, hidden size {arch.hidden})"

        rows = {
            "old": side(self.old), "new": side(self.new), "layers matched": str(len(self.layers)),
            "shared tokens": str(self.facts.get("shared_tokens", "unknown")),
            "sections": ", ".join(self.sections) or "none",
        }  # fmt: skip
        return "UpgradeMap", rows

    @classmethod
    def build(
        cls, old: Any, new: Any, options: MapOptions | None = None, *, progress: Progress = no_progress, **settings: Any
    ) -> UpgradeMap:  # fmt: skip
        """Build the map of a pair of backbones; the keywords are those of `mapping.build.build_map`."""
        from .build import build_map

        options = options or MapOptions()
        with stage(progress, "building the upgrade map"), decomposition_errors():
            parts = build_map(old, new, options, progress=progress, **settings)
        check_finite(parts.hidden, parts.similarity, parts.layers)
        return cls(options=options, **parts._asdict())

    @property
    def maps_weights(self) -> bool:
        """Whether both backbones have converters; otherwise the map has their identities alone."""
        return self.old.arch.has_converter and self.new.arch.has_converter

    @property
    def without_converter(self) -> list[str]:
        """The model types of the pair that have no converter."""
        sides = (self.old.arch, self.new.arch)
        return list(dict.fromkeys(arch.family for arch in sides if not arch.has_converter))

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """The layer map, as (old layer, new layer)."""
        return [(pair.old, pair.new) for pair in self.layers]

    @property
    def key(self) -> str:
        """Fingerprint of both backbones and the layer map, which sections depend on."""
        text = f"{self.old.key}{self.new.key}{[tuple(pair) for pair in self.pairs]}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @cached_property
    def basis(self) -> Callable[[LayerPair, str], Basis]:
        """``basis(pair, part)``: the change of basis of one part of one matched layer, computed once."""
        # locals rather than self, so that the cached function forms no reference cycle with the map
        old, new, hidden, inverse = self.old.arch, self.new.arch, self.hidden, self.inverse
        return cache(lambda pair, part: part_basis(old, new, part, hidden, inverse, pair.gains[part]))

    def common_parts(self, parts: Sequence[str] | None = None) -> tuple[str, ...]:
        """Return the parts that both backbones have, or those of them that are in ``parts``."""
        check_parts(parts or ())
        new = self.new.arch.parts
        return tuple(part for part in self.old.arch.parts if part in new and (parts is None or part in parts))

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write ``map.json``, ``core.safetensors`` and a file per section; on an error nothing is written."""
        from safetensors.torch import save_file

        with atomic_folder(folder, overwrite=overwrite) as part:
            save_file(flatten(self.hidden, self.similarity, self.layers), part / CORE)
            sections = {name: section.write(part, kept=Path(folder)) for name, section in self.sections.items()}
            meta = {**self.describe(), "sections": sections}
            (part / META).write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
        return Path(folder)

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
        """Load a map from a folder or the Hub (``owner/name@revision``); names, shapes and values are checked.

        Raises:
            LoraSuiteError: When a file is missing or malformed, or has an unsupported format.
        """
        if revision is None:
            name, revision = split_revision(name)
        source = Source(str(name), "upgrade map", revision, token, cache_dir, local_files_only)
        with error_context(source):
            path = source.require(META, do="pass the folder that `map` wrote")
            meta = read_description(path, where=f"{source.name}/{META}")
            tensors = read_tensors(source.require(CORE), where=f"{source.name}/{CORE}")
            try:
                parts = rebuild(meta, tensors)
                built = cls(options=MapOptions(**meta["options"]), source=source, **parts._asdict())
                return replace(built, sections=list_sections(meta, source, built.key))
            except (KeyError, RuntimeError) as error:  # a missing tensor, or one that has no pseudo-inverse
                raise LoraSuiteError(f"malformed upgrade map: {error}", do="build or fetch it again") from error

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
