"""A base model, read lazily: config, tokenizer, embedding, and one projection of one layer at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..arch.layout import split
from ..arch.spec import OUTPUT_PROJECTIONS, Architecture
from ..errors import LoraSuiteError
from ..io.checkpoint import DTYPES, Checkpoint, ModelWeights
from ..io.source import Source, split_revision
from ..linalg.lowrank import MAX_VALUE
from ..text.vocabulary import pad_token_id
from .config import load_config, running_config
from .derived import read_architecture
from .dtype import RunningDtype, choose_dtype
from .layer_scales import LayerScales
from .loading import check_depth, check_model, load_errors, load_model, set_activation_floor
from .offload import DISK, disk_options, offload_folder
from .quantized import loading_advice, quantization, quantized_error
from .restore import restore_model
from .stored_names import find_stored
from .task import CAUSAL, Task, adapt_model
from .tokenizer import open_tokenizer
from .upcast import compute_in_float32

NAMELESS = "a model in memory"
"""Name of a loaded model without a ``_name_or_path``; not a Hub id."""


class Backbone:
    """A base model in a folder, on the Hub, or in memory.

    Args:
        source: Where its files are; for a model in memory, where it was loaded from.
        model: The loaded model, if there is one.
        trust_remote_code: Whether transformers may run code of the repository; off unless the user asks for it.
        dtype: Dtype in which `load` loads the model; ``"auto"`` is the checkpoint's own where the device computes in
            it (see `choose_dtype`).
        device_map: Device map with which `load` loads the model, as in transformers.
    """

    def __init__(
        self, source: Source, *, model: Any = None, trust_remote_code: bool = False, dtype: torch.dtype | str = "auto",
        device_map: Any = None,
    ) -> None:  # fmt: skip
        self.source, self._model = source, model
        self.dtype, self.device_map, self.trust_remote_code = dtype, device_map, trust_remote_code

    @classmethod
    def open(
        cls,
        name_or_model: Any,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | None = None,
        local_files_only: bool = False,
        trust_remote_code: bool = False,
        hub_only: bool = False,
        dtype: torch.dtype | str = "auto",
        device_map: Any = None,
    ) -> Backbone:
        """Open a folder, a Hub id (``owner/name`` or ``owner/name@revision``), a loaded model, or a `Backbone`.

        The keywords are those of the class and of transformers; ``hub_only`` ignores a folder of that name.
        """
        if isinstance(name_or_model, Backbone):
            return name_or_model
        model = None if isinstance(name_or_model, str) or hasattr(name_or_model, "__fspath__") else name_or_model
        if model is not None:
            check_model(model)
        name = str(name_or_model) if model is None else str(getattr(model.config, "_name_or_path", "") or NAMELESS)
        if model is None and not revision:
            name, revision = split_revision(name)
        source = Source(name, "backbone", revision, token, cache_dir, local_files_only, hub_only, model is not None)
        return cls(source, model=model, trust_remote_code=trust_remote_code, dtype=dtype, device_map=device_map)

    def __repr__(self) -> str:
        return repr(self.source)

    @property
    def name(self) -> str:
        """Folder or Hub id."""
        return self.source.name

    @property
    def in_memory(self) -> bool:
        """Whether the model belongs to the caller, so that it must not be changed."""
        return self._model is not None

    @cached_property
    def config(self) -> Any:
        """The transformers config; for an unknown model type, one of trusted code or with the plain values."""
        return load_config(self.source, self._trusted()) if self._model is None else self._model.config

    @cached_property
    def arch(self) -> Architecture:
        """Shape and layout, from the converter registered for the model type; without one, from an empty model."""
        return read_architecture(self.config, self._model, self.source, access=self._trusted())

    @property
    def context(self) -> int:
        """Length of the context in tokens; unbounded where the config has no limit, or -1."""
        return max(getattr(self.config.get_text_config(), "max_position_embeddings", None) or 0, 0) or 1 << 30

    @cached_property
    def tokenizer(self) -> Any:
        """The fast tokenizer.

        Raises:
            LoraSuiteError: When it cannot be loaded or is not a fast tokenizer.
        """
        if self.in_memory and self.name == NAMELESS:
            raise LoraSuiteError(
                "the model does not say where its tokenizer is", where=repr(self), wanted="a folder or Hub id",
                do="set model.config._name_or_path to where it was loaded from",
            )  # fmt: skip
        config = self.config if self.arch.runs_as else None  # otherwise transformers looks for the unknown type's code
        do = "fetch its tokenizer files again"
        tokenizer = open_tokenizer(self.source, self.source.location, do=do, config=config, **self._access())
        if not tokenizer.is_fast:
            raise LoraSuiteError(
                "the tokenizer returns no character offsets", where=repr(self),
                wanted="a fast tokenizer (tokenizer.json)",
            )  # fmt: skip
        return tokenizer

    @cached_property
    def weights(self) -> Checkpoint | ModelWeights:
        """The stored tensors by name."""
        return Checkpoint(self.source) if self._model is None else ModelWeights(self._model)

    def locate(self, path: str) -> str:
        """Return the stored name of a tensor whose name in the loaded model is ``path``, or raise `LoraSuiteError`."""
        name = find_stored(path, self.weights, self.arch)
        if name is None:
            if method := quantization(self.config):
                raise quantized_error(self.name, repr(self), method)
            raise LoraSuiteError("the checkpoint lacks a tensor", where=repr(self), wanted=path, do="fetch it again")
        return name

    def check_depth(self) -> None:
        """Raise `LoraSuiteError` if the checkpoint has fewer layers than its config, before one of them is read."""
        check_depth(self.weights, self.arch.layers, where=repr(self))

    def tensor(self, path: str, dtype: torch.dtype | None = torch.float32) -> Tensor:
        """Read one tensor, with the dtype None in its own.

        Raises:
            LoraSuiteError: When it is missing, quantized or not finite.
        """
        return self._check_finite(self.weights[self.locate(path)], path).to(dtype=dtype)

    def _check_finite(self, tensor: Tensor, path: str) -> Tensor:
        """Return a tensor of plain numbers, whose products do not overflow."""
        if tensor.dtype not in DTYPES.values():  # integers, and fp8, which means nothing without its scales
            raise quantized_error(self.name, f"{self!r}, {path}", tensor.dtype)
        largest = max(map(abs, torch.stack(torch.aminmax(tensor)).tolist())) if tensor.numel() else 0.0
        if not largest <= MAX_VALUE:
            what = "values are out of range" if math.isfinite(largest) else "values are not finite"
            raise LoraSuiteError(what, where=f"{self!r}, {path}", got=f"{largest:.3g}", do="train or fetch it again")
        return tensor

    def part(self, layer: int, part: str, dtype: torch.dtype | None = torch.float32) -> Float[Tensor, "out in_"]:
        """Read the weight of one part (see `tensor`), in PyTorch's orientation and with its rows in head order."""
        site = self.arch.site(part)
        path = f"{self.arch.module(layer, site)}.weight"
        weight = self.tensor(path, dtype)
        weight = weight.mT if site.conv1d and weight.ndim == 2 else weight
        self._check_shape(weight, self.arch.module_shape(layer, site), path)
        return split(weight, site, self.arch.in_layer(layer))[part]

    def _check_shape(self, tensor: Tensor, wanted: tuple[int, ...], path: str) -> None:
        if (got := tuple(tensor.shape)) != wanted:
            raise LoraSuiteError("a weight does not fit the config", where=f"{self!r}, {path}", got=got, wanted=wanted)

    def gain(self, layer: int, part: str) -> Float[Tensor, " hidden"]:
        """Read the effective gain of the norm before an input projection or after an output projection.

        Returns:
            The gain, (D,), ones where there is no norm; layer scales are folded in.
        """
        site, output, scale = self.arch.site(part), part in OUTPUT_PROJECTIONS, self.layer_scales.before(layer)
        path = site.post_norm if output else site.norm
        if path is None:
            return torch.full((self.arch.hidden,), 1 / scale if output else scale)
        gain = self.tensor(path := f"{self.arch.layer_path}.{layer}.{path}.weight")
        self._check_shape(gain, (self.arch.hidden,), path)
        return (gain + self.arch.gain_offset) / (scale if output else 1.0)

    @cached_property
    def layer_scales(self) -> LayerScales:
        """Scalars of the layers' outputs."""
        return LayerScales(self.arch, self.tensor, repr(self))

    def embedding(self, ids: Tensor | None = None) -> Float[Tensor, "tokens hidden"]:
        """Read rows of the token embedding as the first layer sees them: scaled and, in Bloom, normalized."""
        table = self._table(self.arch.embedding)
        rows = (table if ids is None else table[ids]).float() * self.arch.embedding_scale
        if self.arch.embedding_norm is None:
            return rows
        gain, bias = (self.tensor(f"{self.arch.embedding_norm}.{name}") for name in ("weight", "bias"))
        return torch.nn.functional.layer_norm(rows, rows.shape[-1:], gain, bias)

    def unembedding(self) -> Float[Tensor, "tokens hidden"]:
        """Read the weight of the language-model head, in its own dtype."""
        return self._table(self.arch.embedding if self.arch.tied else self.arch.head)

    def _table(self, name: str) -> Tensor:
        """Read a token table in its own dtype."""
        path = f"{name}.weight"
        table = self.weights[self.locate(path)]
        self._check_shape(table, (self.arch.vocabulary, self.arch.hidden), path)
        return self._check_finite(table, path)

    def load(self, *, task: Task = CAUSAL, dtype: torch.dtype | str = "auto", device_map: Any = None) -> Any:
        """Load the whole model in evaluation mode; the weights of a model in memory are used unchanged.

        Args:
            task: What the model is used for; by default a causal language model.
            dtype: Dtype of the weights; ``"auto"`` is what the backbone was opened with.
            device_map: As in transformers; None is what the backbone was opened with. ``"disk"`` leaves the decoder
                layers on disk, where each is read when it runs: slower, in little more memory than the embeddings.
        """
        if self._model is not None:
            return adapt_model(self._model, task, self._padding(task))
        self.check_depth()
        if self.source.folder is None and isinstance(self.weights, Checkpoint):
            self.weights.fetch()
        device_map = self.device_map if device_map is None else device_map
        running = self.running_dtype(dtype, device_map)
        running.log(repr(self))
        with load_errors(repr(self), do=loading_advice(self.name, self.config)):
            model = self._load_weights({"dtype": running.dtype, "device_map": device_map}, task)
        if running.upcast:
            compute_in_float32(model)
        return set_activation_floor(model, self.arch).eval()

    def running_dtype(self, dtype: torch.dtype | str = "auto", device_map: Any = None) -> RunningDtype:
        """Return the dtype in which `load` runs the model."""
        stored, parameters = self.stored_dtype, self.arch.parameter_count()
        if self._model is not None:
            return RunningDtype(stored)
        if not self.arch.has_converter and isinstance(self.weights, Checkpoint):
            parameters = self.weights.num_bytes // stored.itemsize  # not those of linear modules alone
        dtype, device_map = self.dtype if dtype == "auto" else dtype, device_map or self.device_map
        return choose_dtype(dtype, stored, parameters=parameters, device_map=device_map)

    @property
    def stored_dtype(self) -> torch.dtype:
        """The dtype of the checkpoint, or of the loaded model."""
        if self._model is not None:
            return self._model.dtype
        if not self.arch.has_converter and isinstance(self.weights, Checkpoint):
            return self.weights.dtype
        stored = getattr(self.config.get_text_config(), "dtype", None)
        if isinstance(stored, torch.dtype):
            return stored
        return self.weights.sample_rows(self.locate(f"{self.arch.embedding}.weight"), 1).dtype

    @contextmanager
    def running(self, **options: Any) -> Iterator[Any]:
        """Load the model as `load` does; a model in memory is restored when the context ends."""
        model = self.load(**options)
        with restore_model(model) if self.in_memory else nullcontext():
            yield model.eval()

    def _padding(self, task: Task) -> int | None:
        return pad_token_id(self.tokenizer, self.arch.vocabulary) if task.classifies else None  # configs may lack it

    def _load_weights(self, options: dict[str, Any], task: Task) -> Any:
        config, place, where = running_config(self.source, self.arch), self.source.location, repr(self)
        if task.classifies:
            config = task.config(config or self.config, self._padding(task))
        options |= {"config": config, "use_safetensors": True, **self._access()}
        if options["device_map"] != DISK:
            return load_model(place, options, where=where, task=task)
        options |= disk_options(config or self.config, self.arch, place, self._trusted())
        with offload_folder() as (folder, keep):
            options |= {"offload_folder": folder}
            return keep(load_model(place, options, where=where, task=task))

    def _trusted(self) -> dict[str, Any] | None:
        return self._access() if self.trust_remote_code else None

    def _access(self) -> dict[str, Any]:
        """Return the keyword arguments that all loaders of transformers share."""
        if self.source.folder is not None:
            return {"trust_remote_code": self.trust_remote_code, "local_files_only": True}
        own = {name: getattr(self.source, name) for name in ("token", "cache_dir", "local_files_only")}
        return own | {"revision": self.source.commit, "trust_remote_code": self.trust_remote_code}
