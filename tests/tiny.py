"""A model file for tests, made from nothing in a moment: Gemma 3 architecture, random weights, a small real SentencePiece vocabulary.

It loads in llama.cpp, tokenises any text (bytes as fall-back) and answers nonsense. The same arguments make the same bytes.
"""

import itertools
from collections import Counter
from pathlib import Path

import gguf
import numpy as np

from protocol.models.checkpoint import (
    TOKEN_BYTE,
    TOKEN_CONTROL,
    TOKEN_NORMAL,
    TOKEN_UNKNOWN,
    Checkpoint,
    Tensor,
    Value,
    Vocabulary,
    encode_tensor,
)

WORDS = (
    "normal irrigation due saturated soil crop stress leak dry run clogged filter valve stuck tank low overflow sensor "
    "offset rain blocked panel soiled battery cold aged gateway loss radio weak the is and water pump flow "
    "level moisture since hours note night sun power el la de agua bomba tanque suelo seco riego hoja "
    "nota noche sin fuga nivel del que en es y por con the cat sat on a mat "
    "English Spanish"
)

CHARACTERS = "▁\nabcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789áéíóúñüÁÉÍÓÚÑ¿¡.,:;!?'\"()%/+-=_*&"


def tiny_vocabulary(words: list[str] | None = None) -> Vocabulary:
    """Control tokens, 256 bytes, single characters, and every merge that builds the words (byte-pair encoding, most frequent first)."""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [TOKEN_CONTROL] * 3 + [TOKEN_UNKNOWN] + [TOKEN_BYTE] * 256
    scores = [-1000.0] * len(tokens)
    merged: list[str] = []
    spelled = Counter(tuple("▁" + word) for word in (words or WORDS.split()))
    while True:
        pairs: Counter[tuple[str, str]] = Counter()
        for pieces, count in spelled.items():
            for pair in itertools.pairwise(pieces):
                pairs[pair] += count
        if not pairs:
            break
        left, right = max(pairs, key=lambda pair: (pairs[pair], pair))
        merged.append(left + right)
        respelled: Counter[tuple[str, ...]] = Counter()
        for pieces, count in spelled.items():
            joined: list[str] = []
            for piece in pieces:
                if joined and joined[-1] == left and piece == right:
                    joined[-1] = left + right
                else:
                    joined.append(piece)
            respelled[tuple(joined)] += count
        spelled = respelled
    unique = list(dict.fromkeys([*merged, *CHARACTERS]))
    tokens += unique
    scores += [-float(rank) for rank in range(len(unique))]
    types += [TOKEN_NORMAL] * len(unique)
    return Vocabulary(tokens, np.array(scores, dtype=np.float32), np.array(types, dtype=np.int32))


def tiny_checkpoint(
    *, layers: int = 2, hidden: int = 64, heads: int = 2, feed_forward: int = 128, seed: int = 0, kind: str = "F32"
) -> Checkpoint:
    """The tiny model in memory. `hidden` is a multiple of 32 (so Q8_0 fits); each head is `hidden // heads` wide."""
    random = np.random.default_rng(seed)
    vocabulary = tiny_vocabulary()
    size, head = len(vocabulary.tokens), hidden // heads
    integer, real, text, flag = gguf.GGUFValueType.UINT32, gguf.GGUFValueType.FLOAT32, gguf.GGUFValueType.STRING, gguf.GGUFValueType.BOOL
    metadata = {
        "general.type": Value("model", text),
        "general.name": Value("tiny", text),
        "gemma3.context_length": Value(1024, integer),
        "gemma3.embedding_length": Value(hidden, integer),
        "gemma3.block_count": Value(layers, integer),
        "gemma3.feed_forward_length": Value(feed_forward, integer),
        "gemma3.attention.head_count": Value(heads, integer),
        "gemma3.attention.head_count_kv": Value(1, integer),
        "gemma3.attention.key_length": Value(head, integer),
        "gemma3.attention.value_length": Value(head, integer),
        "gemma3.attention.layer_norm_rms_epsilon": Value(1e-6, real),
        "gemma3.attention.sliding_window": Value(512, integer),
        "gemma3.rope.freq_base": Value(1_000_000.0, real),
        "tokenizer.ggml.model": Value("llama", text),
        "tokenizer.ggml.pre": Value("default", text),
        "tokenizer.ggml.bos_token_id": Value(2, integer),
        "tokenizer.ggml.eos_token_id": Value(1, integer),
        "tokenizer.ggml.unknown_token_id": Value(3, integer),
        "tokenizer.ggml.padding_token_id": Value(0, integer),
        "tokenizer.ggml.add_bos_token": Value(True, flag),
        "tokenizer.ggml.add_eos_token": Value(False, flag),
        "tokenizer.ggml.add_space_prefix": Value(False, flag),
    }

    def matrix(outputs: int, inputs: int) -> Tensor:
        return encode_tensor(random.standard_normal((outputs, inputs), dtype=np.float32) * inputs**-0.5, kind)

    def norm(size: int) -> Tensor:
        return encode_tensor(1.0 + 0.1 * random.standard_normal(size, dtype=np.float32), "F32")

    tensors = {"token_embd.weight": matrix(size, hidden), "output_norm.weight": norm(hidden)}
    for block in range(layers):
        shapes = {
            "attn_q": (heads * head, hidden), "attn_k": (head, hidden), "attn_v": (head, hidden), "attn_output": (hidden, heads * head),
            "ffn_gate": (feed_forward, hidden), "ffn_up": (feed_forward, hidden), "ffn_down": (hidden, feed_forward),
        }  # fmt: skip
        norms = {"attn_norm": hidden, "attn_q_norm": head, "attn_k_norm": head, "post_attention_norm": hidden, "ffn_norm": hidden}
        tensors |= {f"blk.{block}.{name}.weight": matrix(*shape) for name, shape in shapes.items()}
        tensors |= {f"blk.{block}.{name}.weight": norm(size) for name, size in {**norms, "post_ffw_norm": hidden}.items()}
    return Checkpoint(metadata, vocabulary, tensors)


def tiny_gguf(path: Path, *, layers: int = 2, hidden: int = 64, seed: int = 0, kind: str = "F16") -> Path:
    """Write the tiny model to `path` and return it. Other `seed`, other weights and digest; the vocabulary is always the same."""
    tiny_checkpoint(layers=layers, hidden=hidden, seed=seed, kind=kind).write(path)
    return path
