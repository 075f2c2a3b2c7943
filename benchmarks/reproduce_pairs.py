"""The pairs of backbones of the two papers, by their Hub ids, and the addresses of their training data."""

from __future__ import annotations

from dataclasses import dataclass

DATA = "https://raw.githubusercontent.com/AGI-Edgerunners/LLM-Adapters/main/ft-training_set"
TRAIN = {"math": f"{DATA}/math_10k.json", "commonsense": f"{DATA}/commonsense_170k.json"}
"""Suite -> the LLM-Adapters training set; the first 10,000 of a seeded shuffle are used."""


@dataclass(frozen=True)
class Pair:
    """Two backbones.

    Attributes:
        old: Hub id of the old backbone.
        new: Hub id of the new backbone.
        names: Their names in the paper's tables, by which the published rows are found.
        samples: Suite and samples of the light fine-tuning in the paper's table, if not 100.
    """

    old: str
    new: str
    names: tuple[str, str]
    samples: tuple[tuple[str, int], ...] = ()

    @property
    def title(self) -> str:
        """Title of the pair as in `published_pairs`."""
        return " -> ".join(self.names)


PAIRS = {
    # LoRASuite
    "minicpm": Pair("openbmb/MiniCPM-S-1B-sft", "openbmb/MiniCPM-2B-sft-bf16", ("MiniCPM-S-1B", "MiniCPM-2B")),
    "yi": Pair("01-ai/Yi-6B", "01-ai/Yi-1.5-9B", ("Yi-6B", "Yi-1.5-9B")),
    "pythia": Pair(
        "EleutherAI/pythia-1b", "EleutherAI/pythia-1.4b", ("Pythia-1B", "Pythia-1.4B"), (("math", 1000),)
    ),
    "bloom": Pair("bigscience/bloom-560m", "bigscience/bloomz-1b1", ("Bloom-560m", "Bloomz-1B1"), (("math", 1000),)),
    "llama": Pair("meta-llama/Llama-2-7b-hf", "meta-llama/Meta-Llama-3-8B", ("Llama-2-7B", "Llama-3-8B")),
    "qwen": Pair("Qwen/Qwen1.5-1.8B", "Qwen/Qwen2.5-3B", ("Qwen-1.5-1.8B", "Qwen-2.5-3B")),
    # Cross-LoRA: each adapter goes to another family; the paper prints gains, no rows
    "qwen-llama": Pair("Qwen/Qwen2.5-1.5B", "meta-llama/Llama-3.2-3B", ("Qwen2.5-1.5B", "Llama-3.2-3B")),
    "llama-qwen": Pair("meta-llama/Llama-3.2-3B", "Qwen/Qwen2.5-1.5B", ("Llama-3.2-3B", "Qwen2.5-1.5B")),
    "gemma-qwen": Pair("google/gemma-2-2b", "Qwen/Qwen2.5-1.5B", ("Gemma-2-2B", "Qwen2.5-1.5B")),
    "phi-qwen": Pair("microsoft/phi-1_5", "Qwen/Qwen2.5-1.5B", ("Phi-1.5", "Qwen2.5-1.5B")),
    # a pair that fits a small machine
    "qwen-coder": Pair(
        "Qwen/Qwen2.5-Coder-0.5B-Instruct", "Qwen/Qwen2.5-Coder-1.5B-Instruct",
        ("Qwen2.5-Coder-0.5B", "Qwen2.5-Coder-1.5B"),
    ),
}  # fmt: skip
"""Name -> pair."""
