"""The upgrade map of two backbones with the same weights: every layer, head and unit is matched with itself."""

from __future__ import annotations

import torch

from ..arch.spec import ATTENTION
from ..linalg.basis import HeadFit, UnitFit
from ..models.backbone import Backbone
from .fingerprint import read_identity
from .layer_pair import LayerPair
from .options import MapOptions
from .same_base import Comparison
from .upgrade_map import UpgradeMap


def identity_map(old: Backbone, new: Backbone, found: Comparison) -> UpgradeMap:
    """Return the map of two backbones with the same weights; neither is run, and only samples of the weights are read.

    Args:
        old: The old backbone.
        new: The new backbone.
        found: Their comparison, whose result is kept in the facts of the map.
    """
    arch = old.arch
    eye = torch.eye(arch.hidden)
    layers = tuple(_pair(old, new, layer) for layer in range(arch.layers))
    facts = {
        "same_base": {"equal": list(found.equal), "unread": list(found.unread)},
        "shared_tokens": min(arch.vocabulary, new.arch.vocabulary),
        "hidden": {"error": 0.0, "agreement": 1.0, "held_out": 1.0, "distance": 0.0},
    }
    return UpgradeMap(
        read_identity(old), read_identity(new), MapOptions(layer_map="proportional", hidden_map="identity"), eye, eye,
        torch.zeros(arch.layers, arch.layers), layers, facts,
    )  # fmt: skip


def _pair(old: Backbone, new: Backbone, layer: int) -> LayerPair:
    arch = old.arch.in_layer(layer)
    parts = [part for part in arch.parts if arch.has(layer, part)]
    counts = arch.heads.query, arch.intermediate, arch.ple_size
    heads, units, ple_units = (torch.arange(count)[:, None].expand(-1, 2) for count in counts)
    zeros, ones = torch.zeros(len(heads)), torch.ones(len(heads))
    T = torch.eye(arch.heads.size).expand(len(heads), -1, -1)
    head_fits = {part: HeadFit(T, zeros, torch.ones(len(heads), 2)) for part in parts if part in ATTENTION}
    unit_fits = {
        part: UnitFit(torch.ones(arch.units(part)), torch.zeros(()), torch.ones(2))
        for part in parts if part not in ATTENTION
    }  # fmt: skip
    gains = {part: (old.gain(layer, part), new.gain(layer, part)) for part in parts}
    return LayerPair(layer, layer, heads, ones, head_fits, units, unit_fits, gains, ple_units)
