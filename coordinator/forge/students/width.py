"""Cutting width: which residual channels, feed-forward neurons and attention heads stay, and the smaller checkpoint they make.

After Minitron (Muralidharan et al. 2024, arXiv 2408.11796): importance is what a part does on a calibration set, from forward passes alone:
 * channel: mean |normed value| that the block's matrices and the output matrix read, each norm weighted alike;
 * neuron: mean |activation| times the norm of its column in the down projection: what it adds (Minitron takes the activation alone);
 * head: mean norm of what it adds through the output projection (heads share one value, so their own norms say little).
A channel is one for the whole model (the stream is one), neurons and heads are each block's own.

Two corrections keep the activations' size, so that the cut model starts near its teacher:
 * an RMSNorm over fewer channels sees another mean square: its weights are multiplied by the calibration set's rms(kept) / rms(all);
 * the input is scaled by sqrt(hidden) and the output matrix is the embedding: the embedding is multiplied by c = sqrt(before / after),
   the output norm divided by it.

Limits: one key and value head, which stays whole, as does the width of a head. Embedding and matrices become F16.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from transformers import Gemma3ForCausalLM

from protocol.errors import BadInput
from protocol.models.checkpoint import Checkpoint, Tensor, encode_tensor
from protocol.models.feed import collate, plan
from protocol.models.tokenizer import Example
from protocol.models.torch_model import embed, hidden_states

BATCH_TOKENS = 2048
Order = Literal["importance", "random", "first"]  # the last two are what importance is measured against
Ids = NDArray[np.int64]
NORMS = ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")  # those over residual channels


class Widths(msgspec.Struct, frozen=True):
    """How wide a model is."""

    hidden: int
    feed_forward: int
    heads: int

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "Widths":
        """A checkpoint's own."""
        return cls(checkpoint.hidden, int(checkpoint.number("feed_forward_length")), int(checkpoint.number("attention.head_count")))


@dataclass(frozen=True)
class Calibration:
    """What each part does on the calibration set."""

    channels: NDArray[np.float64]  # (hidden,) importance
    neurons: NDArray[np.float64]  # (blocks, feed_forward)
    heads: NDArray[np.float64]  # (blocks, heads)
    squares: dict[str, NDArray[np.float64]]  # norm's tensor name -> (hidden,) mean square of each channel it reads, its row's being 1
    tokens: int


@dataclass(frozen=True)
class Kept:
    """What stays, ascending."""

    channels: Ids
    neurons: tuple[Ids, ...]  # a block's each
    heads: tuple[Ids, ...]


@torch.no_grad()
def calibrate(model: Gemma3ForCausalLM, examples: Sequence[Example]) -> Calibration:
    """Run `examples` through the model and measure every part, at every token but the first (all attend to it, and its state is huge).

    Raises:
        BadInput: no examples, or none of two tokens.
    """
    found = _Sums(model)
    lengths = [len(one.prompt) + len(one.target) - 1 for one in examples]
    for index in plan(lengths, batch_tokens=BATCH_TOKENS, generator=None) if examples else []:
        batch = collate(examples, index)
        places = torch.arange(batch.ids.shape[1])[None]
        real = (places > 0) & (places < torch.tensor([lengths[i] for i in index])[:, None])  # (B, T)
        found.tokens += int(real.sum())
        x = embed(model, batch.ids)  # (B, T, hidden)
        for number, layer in enumerate(model.model.layers):
            with _listening(layer) as heard:
                y = hidden_states(model, x, first=number, last=number + 1)
            found.block(number, layer, x, heard, real)
            x = y
        found.norm("output_norm.weight", x[real], gain=model.model.norm.weight)
    if not found.tokens:
        raise BadInput("calibration needs examples of two tokens and more; it was given none")
    return found.result()


@dataclass
class _Heard:
    """What one block's two output matrices read and made."""

    heads: torch.Tensor  # (B, T, heads * head)
    mixed: torch.Tensor  # (B, T, hidden)
    neurons: torch.Tensor  # (B, T, feed_forward)
    fed: torch.Tensor  # (B, T, hidden)


@contextlib.contextmanager
def _listening(layer: Any) -> Iterator[_Heard]:
    """Hooks on the block's output matrices, for one forward pass."""
    nothing = torch.empty(0)
    heard = _Heard(nothing, nothing, nothing, nothing)

    def attention(_module: Any, read: tuple[torch.Tensor, ...], made: torch.Tensor) -> None:
        heard.heads, heard.mixed = read[0], made

    def feed_forward(_module: Any, read: tuple[torch.Tensor, ...], made: torch.Tensor) -> None:
        heard.neurons, heard.fed = read[0], made

    hooks = [layer.self_attn.o_proj.register_forward_hook(attention), layer.mlp.down_proj.register_forward_hook(feed_forward)]
    try:
        yield heard
    finally:
        for hook in hooks:
            hook.remove()


class _Sums:
    """Running sums over tokens."""

    def __init__(self, model: Gemma3ForCausalLM) -> None:
        self.tokens = 0
        blocks, config = len(model.model.layers), model.config
        self.channels = torch.zeros(config.hidden_size, dtype=torch.float64)
        self.squares: dict[str, torch.Tensor] = {}
        self.neurons = torch.zeros(blocks, config.intermediate_size, dtype=torch.float64)
        self.heads = torch.zeros(blocks, config.num_attention_heads, dtype=torch.float64)

    def block(self, number: int, layer: Any, x: torch.Tensor, heard: _Heard, real: torch.Tensor) -> None:
        """Everything of one block; x (B, T, hidden) is its input."""
        between = x + layer.post_attention_layernorm(heard.mixed)
        self.norm(f"blk.{number}.attn_norm.weight", x[real], gain=layer.input_layernorm.weight)
        self.norm(f"blk.{number}.post_attention_norm.weight", heard.mixed[real])
        self.norm(f"blk.{number}.ffn_norm.weight", between[real], gain=layer.pre_feedforward_layernorm.weight)
        self.norm(f"blk.{number}.post_ffw_norm.weight", heard.fed[real])
        columns = layer.mlp.down_proj.weight.norm(dim=0)  # (feed_forward,)
        self.neurons[number] += (heard.neurons[real].abs() * columns).sum(0, dtype=torch.float64)
        output = layer.self_attn.o_proj.weight.unflatten(1, (self.heads.shape[1], -1))  # (hidden, heads, head)
        for head in range(output.shape[1]):
            added = heard.heads[real].unflatten(-1, output.shape[1:])[:, head] @ output[:, head].T  # (n, hidden)
            self.heads[number, head] += added.norm(dim=-1).sum(dtype=torch.float64)

    def norm(self, name: str, x: torch.Tensor, *, gain: torch.Tensor | None = None) -> None:
        """x (n, hidden): what the norm reads. `gain` (weight - 1), where matrices read its output: it counts for importance."""
        unit = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-12)
        self.squares[name] = self.squares.get(name, torch.zeros(())) + unit.square().sum(0, dtype=torch.float64)
        if gain is not None:
            read = (unit * (1.0 + gain)).abs().sum(0, dtype=torch.float64)
            self.channels += read / read.sum() * len(x)

    def result(self) -> Calibration:
        """Means over tokens."""
        squares = {name: (total / self.tokens).numpy() for name, total in self.squares.items()}
        channels, neurons, heads = ((total / self.tokens).numpy() for total in (self.channels, self.neurons, self.heads))
        return Calibration(channels, neurons, heads, squares, self.tokens)


def choose(found: Calibration, widths: Widths, *, order: Order = "importance", seed: int = 0) -> Kept:
    """The most important channels, neurons and heads; "random" and "first" ignore importance.

    Raises:
        BadInput: more than there are, or none; or heads that do not divide the hidden width, which transformers refuses.
    """
    if widths.heads > 0 and widths.hidden % widths.heads:
        raise BadInput(f"{widths.heads} heads do not divide a hidden width of {widths.hidden}; keep a number of heads that does")
    random = np.random.default_rng(seed)

    def best(scores: NDArray[np.float64], count: int, what: str) -> Ids:
        if not 1 <= count <= len(scores):
            raise BadInput(f"a student keeps 1 to {len(scores)} {what}, not {count}")
        ranked = {
            "importance": np.argsort(-scores, kind="stable"),
            "random": random.permutation(len(scores)),
            "first": np.arange(len(scores)),
        }
        return np.sort(ranked[order][:count]).astype(np.int64)

    return Kept(
        best(found.channels, widths.hidden, "residual channels"),
        tuple(best(block, widths.feed_forward, "feed-forward neurons") for block in found.neurons),
        tuple(best(block, widths.heads, "attention heads") for block in found.heads),
    )


def narrowed(checkpoint: Checkpoint, found: Calibration, kept: Kept) -> Checkpoint:
    """The checkpoint with only what is kept, norms and embedding corrected as described above; matrices and embedding in F16.

    Raises:
        BadInput: more than one key and value head.
    """
    if int(checkpoint.number("attention.head_count_kv")) != 1:
        raise BadInput("only models with one key and value head can be cut in width; keep the teacher's widths")
    width = int(checkpoint.number("attention.key_length"))
    channels, before, after = kept.channels, checkpoint.hidden, len(kept.channels)
    scale = (before / after) ** 0.5

    def norm(name: str) -> Tensor:
        mean = found.squares[name]  # (hidden,), 1 on average
        ratio = (mean[channels].mean() / mean.mean()) ** 0.5
        return encode_tensor(np.asarray(checkpoint.array(name)[channels] * ratio, dtype=np.float32), "F32")

    def cut(name: str, rows: Ids | None, columns: Ids | None) -> Tensor:
        weight = checkpoint.array(name)  # (outputs, inputs)
        weight = weight if rows is None else weight[rows]
        return encode_tensor(weight if columns is None else weight[:, columns], "F16")

    tensors = dict(checkpoint.tensors)
    tensors["token_embd.weight"] = encode_tensor(checkpoint.array("token_embd.weight")[:, channels] * np.float32(scale), "F16")
    final = norm("output_norm.weight")
    tensors["output_norm.weight"] = encode_tensor(final.numbers() / np.float32(scale), "F32")
    for block in range(checkpoint.blocks):
        neurons = kept.neurons[block]
        heads = (kept.heads[block][:, None] * width + np.arange(width)).ravel()  # rows of q, columns of o
        parts: dict[str, tuple[Ids | None, Ids | None]] = {
            "attn_q": (heads, channels), "attn_k": (None, channels), "attn_v": (None, channels), "attn_output": (channels, heads),
            "ffn_gate": (neurons, channels), "ffn_up": (neurons, channels), "ffn_down": (channels, neurons),
        }  # fmt: skip
        tensors |= {f"blk.{block}.{name}.weight": cut(f"blk.{block}.{name}.weight", *which) for name, which in parts.items()}
        tensors |= {f"blk.{block}.{name}.weight": norm(f"blk.{block}.{name}.weight") for name in NORMS}
    return checkpoint.with_tensors(
        tensors,
        **{"embedding_length": after, "feed_forward_length": len(kept.neurons[0]), "attention.head_count": len(kept.heads[0])},
    )
