"""Config values of a tiny model of every type: sizes by the names that configs use for them, then what a type needs."""

from __future__ import annotations

from typing import Any


def _named(sizes: dict[str, str]) -> dict[str, str]:
    return {name: size for size, names in sizes.items() for name in names.split()}


def _each(names: str, values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return dict.fromkeys(names.split(), values)


SIZE_OF = _named(
    {
        "hidden": """hidden_size d_model n_embd dim emb_dim embedding_size embedding_dim word_embed_proj_dim lru_width
            conv_dim adapter_in_dim adapter_input_size adapter_out_dim encoder_hidden_size decoder_hidden_size
            backbone_hidden_size text_hidden_size hidden_size_global base_channels mm_embed_dim embed_dim
            out_hidden_size projection_hidden_dim pronunciation_embed_dim shape_embed_dim""",
        "intermediate": """intermediate_size ffn_dim n_inner decoder_ffn_dim encoder_ffn_dim ffn_hidden_size d_ff
            dim_ff dim_feedforward ffn_intermediate_size intermediate_size_mlp dff dense_intermediate_size
            downsample_hidden_size""",
        "expert": """moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size moe_latent_size
            shared_intermediate_size moe_shared_expert_intermediate_size shared_experts_intermediate_size""",
        "layers": """num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_blocks
            num_encoder_layers num_decoder_layers depth""",
        "heads": """num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads
            attention_heads swa_num_attention_heads num_encoder_attention_heads num_decoder_attention_heads
            linear_num_heads""",
        "groups": """num_key_value_heads num_kv_heads n_head_kv swa_num_key_value_heads linear_num_key_heads
            o_groups""",
        "head": """head_dim attention_head_dim global_head_dim swa_head_dim kv_channels d_kv v_head_dim
            swa_v_head_dim qk_nope_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim index_head_dim
            query_pre_attn_scalar dim_head""",
        "window": "sliding_window attention_window_size attention_chunk_size sliding_window_size",
        "positions": """max_position_embeddings n_positions n_ctx max_sequence_length max_seq_len context_length
            max_target_positions max_source_positions original_max_position_embeddings""",
        "inner": "mamba_d_ssm",
        "inner head": "mamba_d_head mamba_head_dim",
        "0": "num_kv_shared_layers num_mtp_layers num_nextn_predict_layers mtp_num_hidden_layers unk_token_id",
        "1": """bos_token_id num_global_key_value_heads n_shared_experts num_shared_experts n_group num_expert_group
            topk_group first_k_dense_replace num_dense_layers moe_layer_start_index zero_expert_num mamba_n_groups
            n_groups mamba_ngroups cls_token_id block_ffn_dim_multiplier""",
        "2": """pad_token_id eos_token_id decoder_start_token_id sep_token_id pad_token num_experts_per_tok
            num_experts_per_token moe_topk moe_k top_k_experts index_n_heads altup_num_inputs n_mamba_heads
            dense_attention_every_n_layers type_vocab_size""",
        "4": """num_experts num_local_experts n_routed_experts moe_num_experts expert_num linear_num_value_heads
            linear_conv_kernel_dim mamba_n_heads mamba_num_heads mamba_d_conv conv_kernel rotary_dim laurel_rank
            adapter_rank""",
        "8": """qk_rope_head_dim index_topk mamba_d_state ssm_state_size state_size mamba_dt_rank time_step_rank
            block_multiple_of hidden_size_per_layer_input rank""",
        "16": "mamba_chunk_size chunk_size kv_lora_rank o_lora_rank",
        "24": "q_lora_rank",
        "211": "vocab_size vocab_size_per_layer_input unpadded_vocab_size",
        "210": "image_token_id image_token_index",
        "209": "video_token_id",
        "208": "audio_token_id",
        "207": "boi_token_id vision_start_token_id",
        "206": "eoi_token_id vision_end_token_id",
    }
)
"""Config value -> size, or number."""
OPTIONAL = _named(
    {
        "": """q_lora_rank num_local_experts num_experts sliding_window qk_rope_head_dim attention_chunk_size n_inner
            num_kv_heads unk_token_id sep_token_id cls_token_id num_global_key_value_heads n_shared_experts
            moe_latent_size"""
    }
)
"""Values that stay None where a type has None by default: they turn something on."""
PER_LAYER = _named(
    {
        "": """layer_types layers_block_type mlp_layer_types no_rope_layers moe_layers layers_types attention_layers
            hybrid_layer_pattern intermediate_size activation_sparsity_pattern hybrid_override_pattern"""
    }
)
"""Lists with one value for each layer."""
ATTENTION = ("full_attention", "attention", "hybrid")
"""Kinds of layers that come last, so that a cut list keeps every other kind."""
LATENT = {"num_key_value_heads": "heads"}
"""Latent attention has as many key as query heads, whatever the config says."""
LINEAR = {"layer_types": ("linear_attention", "full_attention")}
SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
"""Multimodal rotary embeddings: positions of time, height and width for a head of 8 dimensions."""
INDEXED = {
    "layer_types": ("linear_attention", "indexed_attention"), "hc_lowrank": 8, "indexer_n_heads": 2,
    "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 64, "indexer_compress_ratio": 4,
}  # fmt: skip
SLIDING = {
    "swa_num_attention_heads": "heads", "swa_num_key_value_heads": "heads", "swa_q_lora_rank": 24,
    "swa_kv_lora_rank": 16, "swa_head_dim": "head", "swa_qk_nope_head_dim": "head", "swa_v_head_dim": "head",
}  # fmt: skip
EMU3_TOKENS = {"<|extra_200|>": 200, "<image>": 210, "<|visual token 000000|>": 201}
FIXES: dict[str, dict[str, Any]] = {
    **_each("deepseek_v2 glm4_moe_lite minicpm3", LATENT),
    **_each("axk1 axk2 deepseek_v3 deepseek_v32 glm_moe_dsa longcat_flash sarvam_mla youtu", LATENT | {"head_dim": 8}),
    **_each("olmo_hybrid qwen3_5_moe_text qwen3_5_text qwen3_next", LINEAR),
    **_each("glm4v_text qwen2_5_vl_text qwen2_vl_text qwen3_vl_text", {"rope_parameters": SECTIONS}),
    "bailing_hybrid": LATENT | LINEAR,
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"use_cache": False, "encoder_hash_byte_group_vocab": 97},
    "cohere_compass_text": {"rope_parameters": {"full_attention": SECTIONS}},
    "dbrx": {"attn_config": {"kv_n_heads": "groups", "rope_theta": 1e4, "clip_qkv": 8.0}},
    "dory": {"n_input_layers": 1, "n_output_layers": 1, "layer_types": ("sliding_attention", "full_attention")},
    "dots1": {"n_shared_experts": 1},
    "dots3_note_text": LATENT | SLIDING,
    "emu3": {"vocabulary_map": EMU3_TOKENS},
    "emu3_vqgan": {"codebook_size": 64},
    "granitemoehybrid": {"layer_types": ("mamba", "attention")},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "kimi_linear": LATENT | LINEAR,
    "lfm2_moe": {"layer_types": ("conv", "full_attention")},
    "mamba2": {"num_heads": 4, "head_dim": "inner head", "n_groups": 1},
    "qwen4_exp_text": INDEXED,
    "reformer": {"axial_pos_embds": False},
    "xlstm": {"qk_dim_factor": 2.0, "v_dim_factor": 2.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ("hybrid", "linear_attention", "hybrid")},
    "zaya": {"num_experts_per_tok": 1},
}
"""What a model type, or a nested one, needs beside its sizes: names of sizes are replaced by them, and tuples are kinds
of layers, of which the last is that of the last layer."""
NOT_BUILT = {
    "gemma3n": "its vision tower needs the package timm (gemma3n_text is the text model)",
    **dict.fromkeys(
        ("gemma4_assistant", "gemma4_unified_assistant"), "a draft model, which reads another one's states"
    ),
    **dict.fromkeys(("musicgen", "musicgen_melody"), "predicts audio codes, not text"),
}
"""Type -> why no model of it runs on text alone."""
