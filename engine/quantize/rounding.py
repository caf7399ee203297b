"""What rounders hold in memory."""

from ..model.config import ModelConfig


def matrix_bytes(config: ModelConfig, squares: int, weights: int) -> int:
    """fp32 bytes of ``squares`` [K, K] of the widest input and ``weights`` of the largest slot's weight."""
    hidden, ffn = config.hidden_size, config.intermediate_size
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    widest = max(hidden, heads, ffn)
    largest = hidden * max(2 * ffn, heads + 2 * kv_heads)
    return 4 * (squares * widest * widest + weights * largest)
