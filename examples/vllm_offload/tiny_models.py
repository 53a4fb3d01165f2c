#!/usr/bin/env python3
"""Makes tiny random models that vLLM loads like any other: no download, a few megabytes, seconds to start.

python tiny_models.py llama-bf16 /path/to/folder
"""

import argparse

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3NextConfig,
)

VOCABULARY = 512
# Wide enough that attention, and so the KV cache, decides which token comes next.
COMMON = {"vocab_size": VOCABULARY, "initializer_range": 0.15, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
ATTENTION = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 8192}


def llama(dtype: str) -> PretrainedConfig:
    """Four layers of full attention."""
    return LlamaConfig(**COMMON, **ATTENTION, dtype=dtype, head_dim=32, intermediate_size=256, num_hidden_layers=4)


def gemma3() -> PretrainedConfig:
    """Five layers of sliding-window attention and one of full attention: six groups, whose layers share one tensor."""
    return Gemma3TextConfig(
        **COMMON,
        **ATTENTION,
        dtype="bfloat16",
        head_dim=32,
        intermediate_size=256,
        num_hidden_layers=6,
        query_pre_attn_scalar=32,
        sliding_window=64,
        # With the input embedding for output, the last token would always be the likeliest next one.
        tie_word_embeddings=False,
    )


def qwen3_next() -> PretrainedConfig:
    """Three layers of linear attention, whose block is one state of the recurrence, and one of full attention."""
    return Qwen3NextConfig(
        **COMMON,
        **ATTENTION,
        dtype="bfloat16",
        head_dim=64,
        intermediate_size=256,
        num_hidden_layers=4,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        linear_num_key_heads=1,
        linear_num_value_heads=1,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
    )


def gpt_oss() -> PretrainedConfig:
    """Sliding-window and full attention in turn, with sinks: two groups."""
    return GptOssConfig(
        **COMMON,
        **ATTENTION,
        dtype="bfloat16",
        head_dim=64,
        intermediate_size=128,
        num_hidden_layers=4,
        sliding_window=64,
        num_local_experts=4,
        num_experts_per_tok=2,
        tie_word_embeddings=False,
    )


def deepseek() -> PretrainedConfig:
    """Latent attention: one vector a token instead of K and V."""
    return DeepseekV2Config(
        **COMMON,
        hidden_size=128,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=8192,
        dtype="bfloat16",
        intermediate_size=256,
        num_hidden_layers=3,
        first_k_dense_replace=3,
        q_lora_rank=None,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
    )


MODELS = {
    "llama-fp32": lambda: llama("float32"),
    "llama-bf16": lambda: llama("bfloat16"),
    "gemma3": gemma3,
    "qwen3-next": qwen3_next,
    "gpt-oss": gpt_oss,
    "deepseek": deepseek,
}


def save_tokenizer(folder: str) -> None:
    """A word a token: ``w3 w4 ...`` up to the vocabulary's end."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, VOCABULARY)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<pad>", pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def make(name: str, folder: str, seed: int = 0) -> None:
    """Writes the model and its tokenizer into a folder."""
    torch.manual_seed(seed)
    config = MODELS[name]()
    AutoModelForCausalLM.from_config(config, dtype=config.dtype).save_pretrained(folder)
    save_tokenizer(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("folder")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    make(arguments.model, arguments.folder, arguments.seed)


if __name__ == "__main__":
    main()
