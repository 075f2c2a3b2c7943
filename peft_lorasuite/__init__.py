"""peft_lorasuite: transfer a LoRA adapter to an upgraded backbone.

Public names are imported on first use, so that ``import peft_lorasuite`` does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .arch.registry import architecture, register
    from .arch.spec import Architecture, Heads, Site
    from .checking.page import UpgradeCheck
    from .checking.upgrade_check import check_upgrade
    from .errors import LoraSuiteError
    from .evaluation.harness import evaluate
    from .hub.push import push_upgraded
    from .hub.repository import Pushed
    from .mapping.options import MapOptions
    from .mapping.upgrade_map import UpgradeMap
    from .methods.registry import method
    from .model import PeftModel, from_upgraded, install
    from .models.backbone import Backbone
    from .serving.checking import Checked, check
    from .serving.exporting import export
    from .text.chat_options import ChatOptions
    from .training.finetune import finetune
    from .upgrading.collection import upgrade_many
    from .upgrading.report import Report
    from .upgrading.upgrade import Upgraded, upgrade

_MODULES = {
    "Architecture": "arch.spec",
    "Backbone": "models.backbone",
    "ChatOptions": "text.chat_options",
    "Checked": "serving.checking",
    "Heads": "arch.spec",
    "LoraSuiteError": "errors",
    "MapOptions": "mapping.options",
    "PeftModel": "model",
    "Pushed": "hub.repository",
    "Report": "upgrading.report",
    "Site": "arch.spec",
    "UpgradeCheck": "checking.page",
    "UpgradeMap": "mapping.upgrade_map",
    "Upgraded": "upgrading.upgrade",
    "architecture": "arch.registry",
    "check": "serving.checking",
    "check_upgrade": "checking.upgrade_check",
    "evaluate": "evaluation.harness",
    "export": "serving.exporting",
    "finetune": "training.finetune",
    "from_upgraded": "model",
    "install": "model",
    "method": "methods.registry",
    "push_upgraded": "hub.push",
    "register": "arch.registry",
    "upgrade": "upgrading.upgrade",
    "upgrade_many": "upgrading.collection",
}

__all__ = [
    "Architecture",
    "Backbone",
    "ChatOptions",
    "Checked",
    "Heads",
    "LoraSuiteError",
    "MapOptions",
    "PeftModel",
    "Pushed",
    "Report",
    "Site",
    "UpgradeCheck",
    "UpgradeMap",
    "Upgraded",
    "__version__",
    "architecture",
    "check",
    "check_upgrade",
    "evaluate",
    "export",
    "finetune",
    "from_upgraded",
    "install",
    "method",
    "push_upgraded",
    "register",
    "upgrade",
    "upgrade_many",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    """Return the public names alone."""
    return list(__all__)
