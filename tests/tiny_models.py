"""Small random models of many architectures, and a tiny tokenizer: nothing is downloaded, nothing is trained.

Every parameter is drawn anew after the model is built, biases and norms included, so that no part of a layer is the
identity and the top choices are not tied. Sliding windows are 8 positions, shorter than the texts of the tests.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

WINDOW = 8
VOCABULARY = 320
CORPUS = (
    "The quick brown fox jumps over the lazy dog. I want you to act as a logistician. "
    "Tweet: my order never came and nobody answers! Complaint? complaint. "
    "Tweet: thank you for the quick help. Complaint? no complaint. "
    "Classify the text as one of the following labels and answer with the label alone. "
) * 4


@cache
def tiny_tokenizer(*, bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 320 entries: <pad> 0, </s> 1, <s> 2. With `bos`, <s> stands before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "</s>", "<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([CORPUS], trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        bos_token="<s>",
        clean_up_tokenization_spaces=False,
    )


COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
LLAMA_LIKE = {**COMMON, "num_key_value_heads": 2, "intermediate_size": 48}
HEADS_OF_8 = {**LLAMA_LIKE, "head_dim": 8}
SLIDING_AND_FULL = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
GPT = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
# kv_lora and the split head widths make keys and values of one layer differ in width.
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "num_key_value_heads": 4,
}

# name -> (transformers' model type, its settings). The name is what docs/exactness.md shows.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "BLOOM (ALiBi)": ("bloom", {**GPT, "hidden_size": 32}),
    "GPT-2": ("gpt2", GPT),
    "GPT-NeoX": ("gpt_neox", {**COMMON, "intermediate_size": 48, "rotary_pct": 0.5}),
    "OPT": ("opt", {**COMMON, "ffn_dim": 48}),
    "OPT (projected embeddings)": (
        "opt",
        {**COMMON, "ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    ),
    "Llama": ("llama", LLAMA_LIKE),
    "Mistral (sliding window)": ("mistral", {**HEADS_OF_8, "sliding_window": WINDOW}),
    "Qwen2": ("qwen2", LLAMA_LIKE),
    "Qwen2 (sliding window)": (
        "qwen2",
        {**LLAMA_LIKE, "use_sliding_window": True, "max_window_layers": 0, "sliding_window": WINDOW},
    ),
    "Qwen3": ("qwen3", HEADS_OF_8),
    "Gemma": ("gemma", HEADS_OF_8),
    "Gemma 2 (sliding window)": ("gemma2", {**HEADS_OF_8, **SLIDING_AND_FULL, "query_pre_attn_scalar": 8}),
    "Gemma 3 (sliding window)": (
        "gemma3_text",
        {**HEADS_OF_8, **SLIDING_AND_FULL, "query_pre_attn_scalar": 8},
    ),
    "Phi": ("phi", {**LLAMA_LIKE, "partial_rotary_factor": 0.5}),
    "Phi-3 (sliding window)": ("phi3", {**LLAMA_LIKE, "sliding_window": WINDOW}),
    "Falcon (rotary, grouped heads)": (
        "falcon",
        {**COMMON, "new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False},
    ),
    "Falcon (rotary, one key/value head)": (
        "falcon",
        {**COMMON, "new_decoder_architecture": False, "multi_query": True, "alibi": False},
    ),
    "Falcon (ALiBi)": (
        "falcon",
        {**COMMON, "new_decoder_architecture": False, "multi_query": False, "alibi": True, "bias": True},
    ),
    "StarCoder2 (sliding window)": ("starcoder2", {**LLAMA_LIKE, "sliding_window": WINDOW}),
    "MPT (ALiBi)": (
        "mpt",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 128,
            "expansion_ratio": 2,
        },
    ),
    "GPT-J": ("gptj", {**GPT, "rotary_dim": 4}),
    "GPT-Neo (local attention)": (
        "gpt_neo",
        {
            **COMMON,
            "num_layers": 2,
            "num_heads": 4,
            "intermediate_size": 48,
            "window_size": WINDOW,
            "attention_types": [[["global", "local"], 1]],
        },
    ),
    "GPTBigCode": ("gpt_bigcode", {**GPT, "multi_query": True}),
    "CodeGen": ("codegen", {**GPT, "rotary_dim": 4}),
    "BioGPT": ("biogpt", {**COMMON, "intermediate_size": 48}),
    "XGLM": (
        "xglm",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "ffn_dim": 48,
            "num_layers": 2,
            "attention_heads": 4,
            "max_position_embeddings": 128,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "bos_token_id": 2,
        },
    ),
    "Cohere": ("cohere", {**LLAMA_LIKE, "logit_scale": 0.5}),
    "Cohere 2 (sliding window)": ("cohere2", {**HEADS_OF_8, **SLIDING_AND_FULL, "logit_scale": 0.5}),
    "OLMo": ("olmo", LLAMA_LIKE),
    "OLMo 2": ("olmo2", LLAMA_LIKE),
    "OLMo 3 (sliding window)": ("olmo3", {**LLAMA_LIKE, **SLIDING_AND_FULL}),
    "Granite": (
        "granite",
        {**LLAMA_LIKE, "embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5},
    ),
    "StableLM": ("stablelm", {**LLAMA_LIKE, "partial_rotary_factor": 0.5, "use_qkv_bias": True}),
    "SmolLM3": ("smollm3", {**LLAMA_LIKE, "no_rope_layers": [1, 0]}),
    "Nemotron": ("nemotron", HEADS_OF_8),
    "Persimmon": ("persimmon", {**COMMON, "intermediate_size": 48}),
    "GLM": ("glm", HEADS_OF_8),
    "GLM-4": ("glm4", HEADS_OF_8),
    "Helium": ("helium", HEADS_OF_8),
    "EXAONE 4 (sliding window)": ("exaone4", {**HEADS_OF_8, **SLIDING_AND_FULL}),
    "ERNIE 4.5": ("ernie4_5", HEADS_OF_8),
    "Seed-OSS": ("seed_oss", HEADS_OF_8),
    "Arcee": ("arcee", HEADS_OF_8),
    "Apertus": ("apertus", LLAMA_LIKE),
    "Ministral (sliding window)": ("ministral", {**HEADS_OF_8, **SLIDING_AND_FULL}),
    "DiffLlama": ("diffllama", LLAMA_LIKE),
    "Mixtral (experts)": ("mixtral", {**LLAMA_LIKE, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "Qwen2-MoE (experts)": (
        "qwen2_moe",
        {**LLAMA_LIKE, **EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 16},
    ),
    "Qwen3-MoE (experts)": ("qwen3_moe", {**HEADS_OF_8, **EXPERTS, "num_experts": 4}),
    "OLMoE (experts)": ("olmoe", {**LLAMA_LIKE, "num_experts": 4, "num_experts_per_tok": 2}),
    "GraniteMoE (experts)": ("granitemoe", {**LLAMA_LIKE, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt-oss (experts, sliding window)": (
        "gpt_oss",
        {**HEADS_OF_8, **SLIDING_AND_FULL, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "DeepSeek-V3 (latent heads, experts)": (
        "deepseek_v3",
        {
            **LLAMA_LIKE,
            **LATENT,
            **EXPERTS,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
    ),
    "Llama 4 (chunked attention, experts)": (
        "llama4_text",
        {
            **HEADS_OF_8,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 48,
            "attention_chunk_size": WINDOW,
            "layer_types": ["chunked_attention", "full_attention"],
            "no_rope_layers": [1, 0],
        },
    ),
    "nanochat": ("nanochat", LLAMA_LIKE),
    "CTRL": ("ctrl", {**GPT, "dff": 48}),
    "GPT-NeoX Japanese": ("gpt_neox_japanese", {**COMMON, "intermediate_multiple_size": 2}),
    "VaultGemma (sliding window)": (
        "vaultgemma",
        {**HEADS_OF_8, **SLIDING_AND_FULL, "query_pre_attn_scalar": 8},
    ),
    "Ministral 3": ("ministral3", HEADS_OF_8),
    "HunYuan": ("hunyuan_v1_dense", HEADS_OF_8),
    "PhiMoE (experts)": ("phimoe", {**LLAMA_LIKE, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "Jais 2": ("jais2", HEADS_OF_8),
    "GLM-4 MoE (experts)": (
        "glm4_moe",
        {
            **HEADS_OF_8,
            **EXPERTS,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
    ),
    "MiniCPM3 (latent heads)": ("minicpm3", {**LLAMA_LIKE, **LATENT}),
    "MiniMax-M2 (experts)": (
        "minimax_m2",
        {**HEADS_OF_8, "num_local_experts": 4, "num_experts_per_tok": 2, "rotary_dim": 4},
    ),
    "HyperCLOVA X": ("hyperclovax", HEADS_OF_8),
    "DBRX (experts)": (
        "dbrx",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 128,
            "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
            "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
        },
    ),
    "Gemma 4 (sliding window, heads of two widths)": (
        "gemma4_text",
        {**HEADS_OF_8, **SLIDING_AND_FULL, "hidden_size_per_layer_input": 0, "global_head_dim": 16},
    ),
}

# What has no key/value state of its text positions, or more than that: refused by name.
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "Mamba": (
        "mamba",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    ),
    "Mamba 2": (
        "mamba2",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "state_size": 8,
            "head_dim": 8,
            "num_heads": 8,
            "n_groups": 1,
        },
    ),
    "RWKV": (
        "rwkv",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "context_length": 64},
    ),
    "RecurrentGemma": ("recurrent_gemma", {**LLAMA_LIKE, "num_hidden_layers": 3, "lru_width": 32}),
    "Qwen3-Next (linear attention)": (
        "qwen3_next",
        {
            **HEADS_OF_8,
            **EXPERTS,
            "num_experts": 4,
            "shared_expert_intermediate_size": 16,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
    ),
    "LFM2 (convolutions)": (
        "lfm2",
        {**LLAMA_LIKE, "layer_types": ["conv", "full_attention"], "block_ff_dim": 48},
    ),
    "Jamba (Mamba layers)": (
        "jamba",
        {
            **LLAMA_LIKE,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 4,
            "expert_layer_offset": 3,
            "use_mamba_kernels": False,
        },
    ),
    "Bamba (Mamba layers)": (
        "bamba",
        {**LLAMA_LIKE, "attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8},
    ),
    "Gemma 3n (vectors for each token in every layer)": (
        "gemma3n_text",
        {
            **HEADS_OF_8,
            **SLIDING_AND_FULL,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 8,
            "num_kv_shared_layers": 0,
            "laurel_rank": 4,
        },
    ),
    "Gemma 4 (vectors for each token in every layer)": (
        "gemma4_text",
        {
            **HEADS_OF_8,
            **SLIDING_AND_FULL,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 8,
        },
    ),
    "BERT as a decoder": ("bert", {**COMMON, "intermediate_size": 48, "is_decoder": True}),
    "XLNet": ("xlnet", {"vocab_size": VOCABULARY, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}),
    "OpenAI GPT": ("openai-gpt", GPT),
}


def tiny_model(architecture: str = "Llama", *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """The named architecture with every parameter drawn from `seed`, in fp32 and eval mode."""
    model_type, settings = {**ARCHITECTURES, **REFUSED}[architecture]
    config = AutoConfig.for_model(model_type, **{**settings, **changes})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise * (1.2 / parameter.shape[-1] ** 0.5))
            else:
                parameter.add_(0.2 * noise)
    return model
