"""Schemas of the files of PEFT and transformers that are read: file name -> schema.

Fields that are not listed can have any plain value. The files of this package have the schemas of their dataclasses.
"""

from __future__ import annotations

from .schema import (
    FLAG,
    LOOSE,
    NAME,
    PLAIN,
    TEXT,
    Kind,
    ListOf,
    Pattern,
    Record,
    either,
    integer,
    number,
    one_of,
    optional,
    table_of,
)

INDEX = "model.safetensors.index.json"
MAX_RANK = 2**16
_names = optional(ListOf(item=NAME))
_modules = optional(either(Pattern(), ListOf(item=NAME)))
_inner = Pattern(inside=r"(^|.*\.){}($|\..*)")
_layers = optional(either(_inner, ListOf(item=_inner, most=100)))
_flag, _name = optional(FLAG), optional(NAME)
_by_module = optional(table_of(number(), patterns=True))

ADAPTER_CONFIG = Record(
    fields={
        "peft_type": _name, "task_type": _name, "base_model_name_or_path": _name, "revision": _name, "bias": _name,
        "r": optional(integer(0, MAX_RANK)), "lora_alpha": number(), "alpha": optional(number()),
        **dict.fromkeys(("init_r", "target_r"), optional(integer(1, MAX_RANK))),
        **dict.fromkeys(("tinit", "tfinal", "deltaT", "total_step"), optional(integer(0))),
        **dict.fromkeys(("beta1", "beta2", "orth_reg_weight"), number()),
        "lora_dropout": optional(number(0.0, high=1.0)),
        "rank_pattern": optional(
            table_of(either(integer(1, MAX_RANK), ListOf(item=FLAG)), patterns=True)
        ),
        "alpha_pattern": _by_module, "lambda_pattern": _by_module, "n_frequency_pattern": _by_module,
        "block_size_pattern": _by_module,
        "target_modules": _modules, "exclude_modules": _modules, "feedforward_modules": _modules,
        "target_parameters": _names, "token_indices": optional(ListOf(item=integer(0))),
        "modules_to_save": _layers, "layers_pattern": _layers,
        "layers_to_transform": optional(either(integer(0), ListOf(item=integer(0)))),
        "trainable_token_indices": optional(either(ListOf(item=integer(0)), table_of(ListOf(item=integer(0))))),
        **dict.fromkeys(("use_dora", "use_rslora", "lora_bias", "fan_in_fan_out", "inference_mode"), _flag),
        "layer_replication": optional(ListOf(item=ListOf(item=integer(0, 10**5), fewest=2, most=2))),
        "alora_invocation_tokens": optional(ListOf(item=integer(0))),
        **dict.fromkeys(("module_dropout", "rank_dropout"), optional(either(FLAG, number(0.0, high=1.0)))),
        "megatron_core": optional(one_of("megatron.core")),  # PEFT imports the module of this name
    },
    others=PLAIN,
)  # fmt: skip

_size = integer(1, 2**31 - 1)
_sizes = optional(either(_size, ListOf(item=_size)))
_backbone: dict[str, Kind] = {
    **dict.fromkeys(("num_hidden_layers", "n_layer"), optional(integer(1, 10**5))),
    **dict.fromkeys(
        ("hidden_size", "n_embd", "num_attention_heads", "n_head", "num_key_value_heads", "num_kv_heads", "head_dim",
         "intermediate_size", "n_inner", "ffn_hidden_size", "vocab_size", "max_position_embeddings", "n_positions"),
        _sizes,
    ),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"),
                    optional(number(0.0, high=1.0))),
    **dict.fromkeys(("tie_word_embeddings", "attention_bias", "mlp_bias"), _flag),
    "rope_theta": optional(number(above=0.0)),
    "model_type": _name, "architectures": _names, "hidden_act": _name,
    "rope_scaling": optional(Record(others=PLAIN)), "rope_parameters": optional(Record(others=PLAIN)),
    "quantization_config": optional(Record(others=LOOSE)), "auto_map": optional(table_of(LOOSE)),
}  # fmt: skip
BACKBONE_CONFIG = Record(
    fields={**_backbone, "text_config": optional(Record(fields=_backbone, others=LOOSE))}, others=LOOSE
)

_token = optional(either(TEXT, Record(fields={"content": TEXT}, others=LOOSE)))
TOKENIZER_CONFIG = Record(
    fields={
        "model_max_length": optional(number(1.0)), "tokenizer_class": _name,
        "chat_template": optional(either(TEXT, ListOf(item=table_of(TEXT)), table_of(TEXT))),
        "model_input_names": _names, "added_tokens_decoder": optional(table_of(Record(others=LOOSE))),
        **dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), _token),
        **dict.fromkeys(("padding_side", "truncation_side"), optional(one_of("left", "right"))),
        **dict.fromkeys(("add_bos_token", "add_eos_token", "add_prefix_space", "clean_up_tokenization_spaces"), _flag),
    },
    others=LOOSE,
)  # fmt: skip

SCHEMAS: dict[str, Kind] = {
    "adapter_config.json": ADAPTER_CONFIG,
    "config.json": BACKBONE_CONFIG,
    "tokenizer_config.json": TOKENIZER_CONFIG,
    "special_tokens_map.json": table_of(LOOSE),
    INDEX: Record(fields={"weight_map": table_of(NAME)}, required=["weight_map"], others=LOOSE),
    "lorasuite_finetune.json": table_of(PLAIN),
}
"""File name -> schema."""
