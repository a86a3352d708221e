"""What a teacher thinks of an example's target tokens, as arrays and as bytes, in three modes. No I/O.

mode      what is kept of each token                          bytes a token
topk      the k likeliest ids, their log p, the rest's mass   k (2 + bits / 8) + 2: 184 with k 50 and V 8,192
sampled   ids drawn from it, how often, their log p           1 + m (3 + bits / 8), where m ids differ
hidden8   its final normed hidden state                       width (1 + 2 / 32)

topk holds the distribution's top exactly and the rest as one number, sampled is unbiased in expectation, hidden8 is whole, through the
teacher's output matrix.
An id takes ceil(log2 V) bits, highest first; numbers are little-endian float16 except for counts and states (int8, a scale a block of 32,
as GGUF's Q8_0). float16 keeps a log-probability to 1 part in 2,000, which moves a KL by less than 1e-3 nat.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

BLOCK = 32  # numbers of a hidden state that share a scale; one outlier then spoils 32 numbers and not 640
MOST_DRAWS = 255  # a count is a byte

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]


class Targets(NamedTuple):
    """Mode topk: n target tokens, the k likeliest ids of each."""

    ids: Ids  # (n, k)
    log_probs: Floats  # (n, k), nats
    tail: Floats  # (n,), log of the mass outside the top k


class Samples(NamedTuple):
    """Mode sampled: the ids drawn for each of n target tokens; the mean over draws of f(id) is an unbiased estimate of sum p f."""

    ids: Ids  # (n, m), 0 where there is no more
    weights: Floats  # (n, m), share of the draws, rows add up to 1; 0 where there is no more
    log_probs: Floats  # (n, m), the teacher's; 0 where there is no more


class States(NamedTuple):
    """Mode hidden8: what the teacher's output matrix is multiplied with."""

    states: Floats  # (n, width)


Cached = Targets | Samples | States


def pack_targets(targets: Targets, bits: int) -> bytes:
    """Ids, log-probabilities, tails."""
    return pack_ids(targets.ids, bits) + targets.log_probs.astype("<f2").tobytes() + targets.tail.astype("<f2").tobytes()


def unpack_targets(data: memoryview, n: int, k: int, bits: int) -> Targets:
    """Of n tokens with k ids each."""
    packed = (n * k * bits + 7) // 8
    numbers = np.frombuffer(data, dtype="<f2", offset=packed).astype(np.float32)
    return Targets(unpack_ids(data[:packed], n * k, bits).reshape(n, k), numbers[: n * k].reshape(n, k), numbers[n * k :])


def pack_samples(samples: Samples, draws: int, bits: int) -> bytes:
    """How many ids each token has, then ids, counts and log-probabilities without the padding."""
    there = samples.weights > 0
    counts = np.rint(samples.weights[there] * draws).astype(np.uint8)
    sizes = there.sum(1).astype(np.uint8)
    return sizes.tobytes() + pack_ids(samples.ids[there], bits) + counts.tobytes() + samples.log_probs[there].astype("<f2").tobytes()


def unpack_samples(data: memoryview, n: int, draws: int, bits: int) -> Samples:
    """Of n tokens; padded to the longest of them."""
    sizes = np.frombuffer(data[:n], dtype=np.uint8)
    total = int(sizes.sum())
    packed = n + (total * bits + 7) // 8
    there = np.arange(int(sizes.max(initial=0))) < sizes[:, None]  # (n, m)
    ids, weights, log_probs = np.zeros(there.shape, np.int64), np.zeros(there.shape, np.float32), np.zeros(there.shape, np.float32)
    ids[there] = unpack_ids(data[n:packed], total, bits)
    weights[there] = np.frombuffer(data[packed : packed + total], dtype=np.uint8) / np.float32(draws)
    log_probs[there] = np.frombuffer(data[packed + total :], dtype="<f2")
    return Samples(ids, weights, log_probs)


def pack_states(states: States) -> bytes:
    """A scale a block, then a signed byte a number."""
    n, width = states.states.shape
    blocks = states.states.reshape(n, width // BLOCK, BLOCK)
    scales = (np.abs(blocks).max(-1) / 127).astype("<f2")  # (n, blocks)
    steps = np.maximum(scales.astype(np.float32), np.float32(6e-8))[..., None]
    return scales.tobytes() + np.clip(np.rint(blocks / steps), -127, 127).astype(np.int8).tobytes()


def unpack_states(data: memoryview, n: int, width: int) -> States:
    """Of n tokens."""
    count = n * (width // BLOCK)
    scales = np.frombuffer(data, dtype="<f2", count=count).astype(np.float32)
    numbers = np.frombuffer(data, dtype=np.int8, offset=2 * count).reshape(count, BLOCK)
    return States((numbers * scales[:, None]).reshape(n, width))


def pack_ids(ids: Ids, bits: int) -> bytes:
    """Each id in `bits` bits, highest first, no gaps."""
    big = np.ascontiguousarray(ids.ravel(), dtype=">u4").view(np.uint8).reshape(-1, 4)
    return np.packbits(np.unpackbits(big, axis=1)[:, 32 - bits :].ravel()).tobytes()


def unpack_ids(data: memoryview, count: int, bits: int) -> Ids:
    """`count` ids; bits + 7 <= 32, so that an id lies inside the four bytes from its first one."""
    padded = np.frombuffer(bytes(data) + b"\0\0\0", dtype=np.uint8).astype(np.uint32)
    at = np.arange(count, dtype=np.int64) * bits
    first = at >> 3
    window = padded[first] << 24 | padded[first + 1] << 16 | padded[first + 2] << 8 | padded[first + 3]
    return ((window >> (32 - bits - (at & 7)).astype(np.uint32)) & np.uint32((1 << bits) - 1)).astype(np.int64)
