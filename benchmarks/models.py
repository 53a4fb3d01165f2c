"""The KV-cache geometry of the models that benchmarks/swap.py knows.

Every figure is from the ``config.json`` that the model's authors publish with its weights; the comment beside each
model names the fields. What a config does not say is an assumption of this file and is marked as one.
"""

from dataclasses import dataclass

# Assumption: how long a sequence is when a group keeps a bounded state for it (a sliding window, a recurrent state)
# instead of a page for every block. It only decides how many such pages there are for each page of full attention.
SEQUENCE_TOKENS = 1024

BF16_BYTES = 2
FP32_BYTES = 4


@dataclass(frozen=True)
class Group:
    """The layers that share one block table.

    ``pools`` tensors of pages. A page has ``token_bytes`` for each token slot of a block, or, where a group keeps one
    page a sequence, ``state_bytes``. ``share`` is the part of a sequence's blocks that the group keeps.
    """

    name: str
    pools: int
    token_bytes: int = 0
    state_bytes: int = 0
    share: float = 1.0

    def page_bytes(self, block_tokens: int) -> int:
        return self.state_bytes or self.token_bytes * block_tokens

    def blocks(self, full_blocks: float, block_tokens: int) -> float:
        """How many of its blocks there are for ``full_blocks`` blocks of full attention."""
        return full_blocks * (block_tokens / SEQUENCE_TOKENS if self.state_bytes else self.share)


def attention(layers: int, kv_heads: int, head_dim: int, *, name: str = "full attention", share: float = 1.0) -> Group:
    """Layers that keep K and V in pools of their own, in bfloat16."""
    return Group(name, pools=2 * layers, token_bytes=kv_heads * head_dim * BF16_BYTES, share=share)


def gated_delta_net(layers: int, key_heads: int, value_heads: int, head_dim: int, kernel: int) -> Group:
    """Layers that keep one state a sequence: a float32 matrix for each value head, and the convolution's last inputs.

    Assumption: the matrices are float32 and the convolution's inputs bfloat16. The page is opaque to every op.
    """
    matrices = value_heads * head_dim * head_dim * FP32_BYTES
    channels = (2 * key_heads + value_heads) * head_dim
    convolution = channels * (kernel - 1) * BF16_BYTES
    return Group("gated delta net", pools=layers, state_bytes=matrices + convolution)


MODELS: dict[str, tuple[Group, ...]] = {
    # meta-llama/Llama-3.1-8B: num_hidden_layers 32, num_key_value_heads 8, hidden_size 4096 / num_attention_heads 32.
    "llama-3.1-8b": (attention(32, 8, 128),),
    # meta-llama/Llama-3.1-70B: num_hidden_layers 80, num_key_value_heads 8 (one a rank at TP 8), 8192 / 64.
    "llama-3.1-70b-tp8": (attention(80, 1, 128),),
    # Qwen/Qwen3-32B: num_hidden_layers 64, num_key_value_heads 8, head_dim 128.
    "qwen3-32b": (attention(64, 8, 128),),
    # deepseek-ai/DeepSeek-V3: num_hidden_layers 61; latent attention keeps kv_lora_rank 512 + qk_rope_head_dim 64
    # elements a token and layer, and no V.
    "deepseek-v3-mla": (Group("latent attention", pools=61, token_bytes=(512 + 64) * BF16_BYTES),),
    # openai/gpt-oss-20b: num_hidden_layers 24, layer_types alternating between sliding (sliding_window 128) and full
    # attention, num_key_value_heads 8, head_dim 64.
    "gpt-oss-20b": (
        attention(12, 8, 64),
        attention(12, 8, 64, name="sliding window", share=128 / SEQUENCE_TOKENS),
    ),
    # Qwen/Qwen3-Next-80B-A3B-Instruct: num_hidden_layers 48, full_attention_interval 4, num_key_value_heads 2,
    # head_dim 256; linear_num_key_heads 16, linear_num_value_heads 32, linear_key_head_dim and linear_value_head_dim
    # 128, linear_conv_kernel_dim 4.
    "qwen3-next": (attention(12, 2, 256), gated_delta_net(36, 16, 32, 128, 4)),
}


def blocks_for(groups: tuple[Group, ...], block_tokens: int, side_bytes: int) -> int:
    """The number of full-attention blocks at which one side's pages of all groups come to about ``side_bytes``."""
    block_bytes = sum(group.pools * group.page_bytes(block_tokens) * group.blocks(1, block_tokens) for group in groups)
    return max(1, round(side_bytes / block_bytes))
