"""The rules of each program that serves adapters, as data, with the version that they were read from and tried on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import unknown_name_error

REFUSED, DROPPED, UNPROVEN = "refused", "dropped", "unproven"
"""What a program does with a part of an adapter: it ends with an error; it serves without that part and says nothing;
it was not tried."""

FEATURES = {
    "other layout": "files in the layout of another program",
    "adalora": "an AdaLoRA, whose factors have other names",
    "other type": "a PEFT type other than LoRA",
    "other formula": "an option with which a LoRA computes something else",
    "dora": "DoRA magnitudes",
    "lora_bias": "a bias of a LoRA (lora_bias)",
    "trained bias": "a trained bias of the backbone",
    "full weights": "weights saved in full (modules_to_save)",
    "class head": "a classification head (modules_to_save)",
    "token rows": "new rows of single tokens (trainable_token_indices)",
    "table copy": "a copy of a token table, as for added tokens",
    "embedding": "a LoRA of the embedding",
    "head": "a LoRA of the head",
    "tied embedding": "a LoRA of an embedding whose weight is the head's too",
    "tied head": "a LoRA of a head whose weight is the embedding's too",
    "experts": "a LoRA of experts",
    "some layers": "modules that not every layer has a pair for",
    "lone part": "modules without those that the program fuses them with",
    "ranks": "modules of other ranks than r (rank_pattern)",
    "scalings": "a scaling per module (alpha_pattern)",
    "rslora": "the scaling of rsLoRA",
    "rank": "a rank above the largest allowed",
    "new entries": "entries of the config that PEFT 0.10 to 0.13 do not know",
    "family": "a backbone of a family that is not supported",
    "other module": "tensors of modules that the backbone does not have, or not in this shape",
}
"""Part of an adapter -> its name in words. `features` finds each of them in the files."""


@dataclass(frozen=True)
class Engine:
    """A program that serves adapters.

    Attributes:
        title: Its name.
        version: Version that the rules hold for.
        effects: Feature -> what happens to it, where it is not simply loaded.
        fused: Names of modules that it fuses: where one has a pair, the others need one.
        every_layer: Whether a module needs a pair in every layer.
        ranks: Allowed values of its largest rank; empty if any.
        families: Families whose adapters it loads; empty if all.
        layout: ``peft`` or ``mlx``.
        start: Command that loads the adapter.
        note: What else there is to say, for the documentation.
    """

    title: str
    version: str
    effects: Mapping[str, str]
    fused: tuple[tuple[str, ...], ...] = ()
    every_layer: bool = False
    ranks: tuple[int, ...] = ()
    families: tuple[str, ...] = ()
    layout: str = "peft"
    start: str = ""
    note: str = ""


_PLAIN_ONLY: dict[str, str] = dict.fromkeys(
    ("other layout", "adalora", "other type", "other formula", "dora", "lora_bias", "trained bias", "full weights",
     "class head", "token rows", "other module"), REFUSED,
)  # fmt: skip
_PUNICA: dict[str, str] = {
    "other layout": REFUSED,
    **dict.fromkeys(
        ("adalora", "other type", "other formula", "dora", "lora_bias", "trained bias", "full weights", "class head",
         "token rows", "table copy", "embedding", "some layers", "scalings", "other module"), DROPPED,
    ),
    **dict.fromkeys(("ranks", "new entries"), REFUSED),
    **dict.fromkeys(("experts", "tied head"), UNPROVEN),
}  # fmt: skip
_LLAMA_CPP: dict[str, str] = _PLAIN_ONLY | {
    **dict.fromkeys(("tied head", "tied embedding"), REFUSED),
    **dict.fromkeys(("ranks", "scalings", "rslora"), DROPPED),
    "table copy": DROPPED,
    "experts": UNPROVEN,
}
_FAMILIES_OF_MLX = (
    "gemma2", "gemma3_text", "gpt2", "gpt_neox", "granite", "llama", "mistral", "olmo2", "phi", "phi3", "qwen2",
    "qwen3", "stablelm",
)  # fmt: skip

ENGINES: dict[str, Engine] = {
    "vllm": Engine(
        "vLLM", "0.33.0",
        _PLAIN_ONLY | {"class head": UNPROVEN, "table copy": DROPPED, "rank": REFUSED,
                       **dict.fromkeys(("experts", "tied head", "tied embedding"), UNPROVEN)},
        ranks=(1, 8, 16, 32, 64, 128, 256, 320, 512),
        start="vllm serve {base} --enable-lora --max-lora-rank {max_rank} --lora-modules {name}={path}",
        note="reads rank_pattern, alpha_pattern and rsLoRA",
    ),
    "sglang": Engine(
        "SGLang", "0.5.23",
        _PLAIN_ONLY | {
            **dict.fromkeys(("full weights", "class head", "token rows", "table copy", "scalings", "rslora"), DROPPED),
            **dict.fromkeys(("lone part", "ranks"), REFUSED),
            "experts": UNPROVEN,
        },
        fused=(("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")),
        start="python -m sglang.launch_server --model-path {base} --enable-lora --max-lora-rank {max_rank} "
              "--lora-paths {name}={path}",
        note="reads one r and one lora_alpha; q_proj needs v_proj beside it",
    ),
    "lorax": Engine(
        "LoRAX", "as of 2025", _PUNICA | {"new entries": UNPROVEN}, every_layer=True,
        start="lorax-launcher --model-id {base}  # requests: adapter_id={path}, adapter_source=local",
        note="serves a module only if every layer has a pair for it",
    ),
    "tgi": Engine(
        "TGI", "as of 2025", _PUNICA, every_layer=True,
        start="text-generation-launcher --model-id {base} --lora-adapters {name}={path}",
        note="serves a module only if every layer has a pair for it",
    ),
    "llama.cpp": Engine(
        "llama.cpp", "of llama-cpp-python 0.3.36", _LLAMA_CPP,
        start="python convert_lora_to_gguf.py {path} {base_option} --outfile {path}/{name}.gguf",
        note="its converter reads lora_alpha and the rank of each pair",
    ),
    "ollama": Engine(
        "Ollama", "as of 2026", _LLAMA_CPP | {"family": REFUSED}, families=("llama", "gemma2"),
        start="ollama create {name} -f {path}/Modelfile",
        note="reads safetensors of Llama and Gemma 2 alone; for others convert with llama.cpp, ADAPTER ./NAME.gguf",
    ),
    "mlx": Engine(
        "mlx-lm", "0.32.2",
        _PLAIN_ONLY | dict.fromkeys(("family", "tied head", "tied embedding", "ranks", "experts"), REFUSED),
        families=_FAMILIES_OF_MLX, layout="mlx",
        start="mlx_lm.generate --model {base} --adapter-path {path}",
        note="reads files of its own: adapters.safetensors with its names, factors transposed",
    ),
}  # fmt: skip
"""Name (``--for``) -> rules."""


def find_engine(name: str) -> Engine:
    """Return the rules of a program; raise `LoraSuiteError` for an unknown name."""
    if name not in ENGINES:
        raise unknown_name_error("engine", name, ENGINES)
    return ENGINES[name]
