"""Building an upgrade map: hidden map, layer map, then the heads and units of one pair of layers at a time."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from ..errors import LoraSuiteError
from ..linalg.assignment import fixed_path, layer_path
from ..linalg.similarity import layer_similarity
from ..models.activations import Sampling, paired_activations
from ..models.backbone import Backbone
from ..models.distributed import gather_items, split_between_processes
from ..models.offload import resolve_device_map
from ..models.quantized import layers_quantization, quantized_error
from ..progress import Progress, no_progress
from ..text.calibration import calibration_texts
from .fingerprint import read_identity
from .hidden import count_shared_tokens, fit_hidden_map
from .layer_pair import MapParts
from .layers import LayerMatcher
from .options import MapOptions


def build_map(
    old: Any,
    new: Any,
    options: MapOptions,
    *,
    calibration: Any = None,
    device_map: Any = None,
    low_memory: bool = False,
    dtype: torch.dtype | str = "auto",
    progress: Progress = no_progress,
) -> MapParts:
    """Build the parts of an upgrade map; several processes share the work, and each gets the whole map.

    Args:
        old: Old backbone: folder, Hub id, loaded model or `Backbone`.
        new: New backbone, likewise.
        options: How to build the map.
        calibration: Text for the layer similarity: None (built in), a text file, strings, or a `datasets.Dataset`.
        device_map: As in transformers, for the calibration runs.
        low_memory: Keep the layers on disk while a model runs; the map is the same.
        dtype: Dtype of the calibration runs; ``"auto"`` is the checkpoint's own.
        progress: Called with a title and an iterable, returns the iterable; `progress.bars` shows bars.

    Raises:
        LoraSuiteError: For a backbone or text that cannot be read, and for backbones that share no token.
    """
    calibration = None if calibration is None else calibration_texts(calibration)  # checked before the long work
    old, new = Backbone.open(old), Backbone.open(new)
    if not (old.arch.has_converter and new.arch.has_converter):
        return _without_layers(old, new)
    for backbone in (old, new):
        method = (
            None if backbone.in_memory else layers_quantization(backbone.config, experts=bool(backbone.arch.experts))
        )
        if method is not None:  # before its weights are downloaded
            raise quantized_error(backbone.name, repr(backbone), method)
        resolve_device_map(backbone.device_map, low_memory)  # it may have been opened with a device map of its own
    device_map = resolve_device_map(device_map, low_memory)
    start = time.perf_counter()
    identities = read_identity(old), read_identity(new)
    hidden, facts = fit_hidden_map(old, new, options)
    matcher = LayerMatcher(old, new, hidden, options)
    similarity = torch.zeros(old.arch.layers, new.arch.layers)
    if options.layer_map == "cka":
        similarity = _similarity(old, new, options, calibration, device_map, dtype, progress)
        path = layer_path(similarity, matcher.weight_similarity)
    else:
        path = fixed_path(options.layer_map, old.arch.layers, new.arch.layers)
    calibrated = time.perf_counter()
    own = progress("matching layers", split_between_processes(path))
    layers = tuple(gather_items([(number, matcher.match(i, j)) for number, (i, j) in own]))
    facts["seconds"] = {
        "calibration": round(calibrated - start, 3),
        "weights": round(time.perf_counter() - calibrated, 3),
    }
    return MapParts(*identities, hidden, matcher.inverse, similarity, layers, facts)


def _without_layers(old: Backbone, new: Backbone) -> MapParts:
    """Return the map of a pair of which a backbone has no converter: identities, and the number of shared tokens."""
    empty = torch.zeros(0, 0)
    facts = {"shared_tokens": count_shared_tokens(old, new)}
    return MapParts(read_identity(old), read_identity(new), empty, empty, empty, (), facts)


def _similarity(
    old: Backbone, new: Backbone, options: MapOptions, calibration: Any, device_map: Any, dtype: Any, progress: Progress
) -> Tensor:
    texts = calibration_texts(calibration)
    sampling = Sampling(options.tokens, options.block, options.seed)
    for _ in progress("calibrating", [None]):
        pair = paired_activations(old, new, texts, sampling, device_map=device_map, dtype=dtype)
        return layer_similarity(options.similarity, pair.old, pair.new, block=options.block)
    raise LoraSuiteError("the calibration did not run")
