"""A student from scratch: a preset's shapes, the teacher's vocabulary, random weights.

For tasks with millions of cheap records. At hours of CPU a student cut from its teacher is ahead; `python -m bench.crossover` measures
where that ends. The embedding is random too, so it has to be among the trained parameters.

Initial sizes: 0.02 for every matrix (Radford et al. 2019); a block's two additions to the stream, whose size the norms after attention and
feed-forward set, begin at 1 / sqrt(2 blocks), so that the stream stays near 1 however deep the model is.
"""

import numpy as np

from coordinator.forge.students.cut import Preset
from protocol.models.checkpoint import Checkpoint, Tensor, encode_tensor

DEVIATION = 0.02


def from_scratch(like: Checkpoint, wanted: Preset, *, seed: int) -> Checkpoint:
    """A random model of `wanted`'s shapes with the vocabulary, the head width and the remaining figures of `like`, in F32."""
    random = np.random.default_rng(seed)
    hidden, width = wanted.hidden, int(like.number("attention.key_length"))
    groups = int(like.number("attention.head_count_kv")) * width

    def matrix(outputs: int, inputs: int) -> Tensor:
        return encode_tensor(random.standard_normal((outputs, inputs), dtype=np.float32) * np.float32(DEVIATION), "F32")

    def norm(size: int, weight: float = 1.0) -> Tensor:
        return encode_tensor(np.full(size, weight, dtype=np.float32), "F32")

    added = (2 * wanted.blocks) ** -0.5
    tensors = {"token_embd.weight": matrix(len(like.vocabulary.tokens), hidden), "output_norm.weight": norm(hidden)}
    for block in range(wanted.blocks):
        parts = {
            "attn_norm": norm(hidden), "attn_q": matrix(wanted.heads * width, hidden), "attn_k": matrix(groups, hidden),
            "attn_v": matrix(groups, hidden), "attn_q_norm": norm(width), "attn_k_norm": norm(width),
            "attn_output": matrix(hidden, wanted.heads * width), "post_attention_norm": norm(hidden, added),
            "ffn_norm": norm(hidden), "ffn_gate": matrix(wanted.feed_forward, hidden), "ffn_up": matrix(wanted.feed_forward, hidden),
            "ffn_down": matrix(hidden, wanted.feed_forward), "post_ffw_norm": norm(hidden, added),
        }  # fmt: skip
        tensors |= {f"blk.{block}.{name}.weight": tensor for name, tensor in parts.items()}
    return like.with_tensors(
        tensors,
        **{
            "block_count": wanted.blocks,
            "embedding_length": hidden,
            "feed_forward_length": wanted.feed_forward,
            "attention.head_count": wanted.heads,
        },
    )
