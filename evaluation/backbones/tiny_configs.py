"""A tiny configuration for any causal LM of Transformers: its default one, shrunk by the names of its fields."""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

VOCABULARY, FIRST_TOKEN, LAST_TOKEN = 64, 3, 48
"""Texts use token ids from the first to before the last: ids outside are left to pads, ends and image placeholders."""

SIZES = {
    64: """mamba_d_ssm vocab_size vocab_size_per_layer_input decoder_vocab_size unpadded_vocab_size
        audio_vocab_size pronunciation_vocab_size shape_vocab_size encoder_hash_byte_group_vocab
        ngram_vocab_size_base""",
    96: """max_position_embeddings n_positions n_ctx max_seq_len max_seq_length max_target_positions
        context_length model_max_length""",
    48: """intermediate_size moe_intermediate_size shared_expert_intermediate_size
        shared_experts_intermediate_size shared_intermediate_size moe_shared_expert_intermediate_size
        intermediate_size_mlp dense_intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim ffn_hidden_size
        expert_ffn_hidden_size dim_ff dff d_inner feed_forward_size mlp_dim""",
    32: """hidden_size d_model n_embd emb_dim embedding_dim embedding_size input_embedding_size
        output_embedding_size word_embed_proj_dim lru_width attention_hidden_size backbone_hidden_size
        hidden_size_global pronunciation_embed_dim shape_embed_dim ple_embed_dim adapter_in_dim adapter_out_dim
        adapter_input_size""",
    16: "qk_head_dim mamba_d_head mamba_head_dim mamba_headdim attention_head_dim",
    8: """head_dim d_head kv_channels attention_head_size dim_head linear_key_head_dim linear_value_head_dim
        linear_head_dim v_head_dim qk_nope_head_dim qk_rope_head_dim index_head_dim swa_head_dim q_lora_rank
        kv_lora_rank hc_lowrank sliding_window sliding_window_size window_size local_attention
        attention_window_size index_topk chunk_size mamba_chunk_size block_size hidden_size_per_layer_input""",
    4: """num_attention_heads n_head num_heads n_heads attention_heads decoder_attention_heads
        encoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads
        index_n_heads mamba_n_heads mamba_num_heads n_mamba_heads num_experts n_routed_experts num_local_experts
        moe_num_experts linear_num_value_heads linear_num_heads ssm_state_size state_size mamba_d_state
        time_step_rank mamba_dt_rank adapter_rank router_hidden_size gated_norm_rank rotary_dim zero_expert_num
        laurel_rank""",
    2: """num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads num_hidden_layers
        n_layer n_layers num_layers num_blocks decoder_layers encoder_layers num_encoder_layers
        num_decoder_layers depth num_experts_per_tok num_experts_per_token moe_k moe_topk index_topk_blocks""",
    1: "n_group topk_group num_expert_group n_groups mamba_n_groups first_k_dense_replace",
}  # fmt: skip
SIZE_OF = {name: size for size, names in SIZES.items() for name in names.split()}
DEPTH = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks")
FILLED = ("head_dim", "num_key_value_heads", "num_experts_per_tok", "n_routed_experts")
"""Also where they are not given."""
ENDS = ("pad_token_id", "bos_token_id", "eos_token_id")

MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
ZAMBA = {
    "attention_hidden_size": 64, "layers_block_type": ["linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 3,
}  # fmt: skip
SPECIAL: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": MROPE, "sliding_attention": MROPE}},
    "bamba": {"attn_layer_indices": [1]},
    "dbrx": {"attn_config": {"model_type": "", "kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "dots1": {"n_shared_experts": 1},
    "dots3_note_text": {"head_dim": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hrm_text": {"num_hidden_layers": 2, "num_layers_per_stack": None},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"head_dim": 16},
    "qwen4_exp_text": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_embds": False},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "xmod": {"default_language": "en_XX"},
    "zamba": ZAMBA,
    "zamba2": ZAMBA | {"hybrid_layer_ids": [1, 2]},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
"""Other fields that a type needs, by the type of the configuration or of one inside it."""


def shrunk(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a configuration, and of those inside it, with small sizes and one layer of each kind."""
    depth = next((fields[name] for name in DEPTH if isinstance(fields.get(name), int)), 0)
    lists = {name: value for name, value in fields.items() if isinstance(value, list) and len(value) == depth}
    per_layer = {name: value for name, value in lists.items() if value != list(range(depth))}
    differing = {int(index): value for index, value in fields.get("per_layer_config", {}).items()}
    kinds: dict[str, int] = {}
    for index in range(depth):
        kinds.setdefault(str([value[index] for value in per_layer.values()] + [differing.get(index)]), index)
    shared = fields.get("num_kv_shared_layers")  # as many layers of each kind share keys as have their own
    chosen = (list(kinds.values()) * 2)[: 2 * len(kinds) if shared else max(2, len(kinds))]
    small: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, dict) and "model_type" in value:
            small[name] = shrunk(value)
        elif name == "per_layer_config":
            small[name] = {i: shrunk(differing[index]) for i, index in enumerate(chosen) if index in differing}
        elif name in lists and name not in per_layer:  # indices of layers
            small[name] = list(range(len(chosen)))
        elif name in per_layer:
            small[name] = [SIZE_OF.get(name, value[index]) for index in chosen]
        elif name in DEPTH and value is not None:
            small[name] = max(2, len(chosen))
        elif name == "num_kv_shared_layers" and value:
            small[name] = len(kinds)
        elif name in SIZE_OF and (value if type(value) is int else name in FILLED):
            small[name] = SIZE_OF[name]
        elif name.endswith(("_token_id", "_token_index")) and isinstance(value, int | list):
            small[name] = ENDS.index(name) if name in ENDS else LAST_TOKEN + len(small) % (VOCABULARY - LAST_TOKEN)
        else:
            small[name] = value
    if small.get("kv_lora_rank") is not None:  # latent attention shares no heads
        small["num_key_value_heads"] = small["num_attention_heads"]
    return small | ({"is_decoder": True} if "is_decoder" in small else {})


def tiny_config(model_type: str) -> PretrainedConfig:
    """A configuration of a few thousand weights."""
    kind: Any = CONFIG_MAPPING[model_type]
    return kind(**_with_special(shrunk(kind().to_dict())))


def _with_special(fields: dict[str, Any]) -> dict[str, Any]:
    parts = {name: value for name, value in fields.items() if isinstance(value, dict) and "model_type" in value}
    inner = {name: _with_special(value) for name, value in parts.items()}
    return fields | inner | SPECIAL.get(fields.get("model_type", ""), {})
