"""An older PEFT on adapters, in a process of its own: ``peft_loader.py PACKAGES OUT BACKBONE ADAPTER [ADAPTER ...]``.

For each adapter, and first for the bare backbone, the logits for a fixed text or the loader's error are written to OUT.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch
from engine_code import text


def backbone(folder: str) -> Any:
    """Load the backbone with a transformers of any version."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).float().eval()


@torch.no_grad()
def logits(base: str, adapter: str) -> torch.Tensor | str:
    """Return the logits with an adapter, or the error."""
    from peft import PeftModel

    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = PeftModel.from_pretrained(backbone(base), adapter).eval()
        missing = [str(one.message) for one in caught if "missing adapter keys" in str(one.message)]
        return f"loads without: {missing[0][:150]}" if missing else model(text()).logits
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"


def main() -> None:
    """Load the adapters."""
    packages, out, base, *adapters = sys.argv[1:]
    sys.path.insert(0, packages)
    import peft
    import transformers

    warnings.simplefilter("ignore")
    with torch.no_grad():
        bare = backbone(base)(text()).logits
    found = [logits(base, adapter) for adapter in adapters]
    versions = {"peft": peft.__version__, "transformers": transformers.__version__}
    torch.save({"versions": versions, "bare": bare, "adapters": found}, out)


if __name__ == "__main__":
    main()
