"""A GGUF checkpoint as a torch model and back: Gemma 3 text, built from its figures alone, nothing fetched.

Rules, each one the other end of what llama.cpp computes (parity is a test, on a tiny and on the packaged model):
 * GGUF norm weights are w + 1; transformers adds the 1 itself;   * the output matrix is the embedding;   * the input is scaled;
 * block n is global when (n + 1) % 6 == 0, with its own rope base, also after blocks were cut out.

`hidden_states` is our own forward pass over transformers' modules: rows are padded on the right and attention is causal, so there is no
mask to build or to apply, norms stay in the working type, and a last block is computed where a token is predicted and nowhere else.
Contexts are shorter than the sliding window (512), so local blocks differ by rope base only.
"""

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from protocol.digests import digest_value
from protocol.errors import TooLarge
from protocol.models.checkpoint import GLOBAL_EVERY, LOCAL_ROPE_BASE, Checkpoint, Tensor, encode_tensor

_PARTS = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm", "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip


def torch_name(tensor: str) -> str:
    """GGUF tensor name -> transformers parameter name: "blk.3.attn_q.weight" -> "model.layers.3.self_attn.q_proj.weight"."""
    if tensor == "token_embd.weight":
        return "model.embed_tokens.weight"
    if tensor == "output_norm.weight":
        return "model.norm.weight"
    _, block, part, kind = tensor.split(".")
    return f"model.layers.{block}.{_PARTS[part]}.{kind}"


def module_of(model: nn.Module, tensor: str) -> nn.Module:
    """The torch module that holds the GGUF tensor's weight."""
    return model.get_submodule(torch_name(tensor).removesuffix(".weight"))


def use_threads(count: int) -> None:
    """Processor threads for every torch operation of this process."""
    torch.set_num_threads(count)


def best_dtype() -> torch.dtype:
    """bfloat16 where the processor multiplies it natively (AVX512-BF16, AMX), float32 elsewhere."""
    return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() and torch.cpu._is_avx512_bf16_supported() else torch.float32


def to_torch(checkpoint: Checkpoint, *, dtype: torch.dtype = torch.float32) -> Gemma3ForCausalLM:
    """Build the model on the CPU, in evaluation mode, with no gradients asked for."""
    blocks = checkpoint.blocks
    figures = checkpoint.number
    config = Gemma3TextConfig(
        vocab_size=len(checkpoint.vocabulary.tokens),
        hidden_size=checkpoint.hidden,
        intermediate_size=int(figures("feed_forward_length")),
        num_hidden_layers=blocks,
        num_attention_heads=int(figures("attention.head_count")),
        num_key_value_heads=int(figures("attention.head_count_kv")),
        head_dim=int(figures("attention.key_length")),
        query_pre_attn_scalar=int(figures("attention.key_length")),
        rms_norm_eps=figures("attention.layer_norm_rms_epsilon"),
        max_position_embeddings=int(figures("context_length")),
        sliding_window=int(figures("attention.sliding_window")),
        layer_types=["full_attention" if (block + 1) % GLOBAL_EVERY == 0 else "sliding_attention" for block in range(blocks)],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": LOCAL_ROPE_BASE},
            "full_attention": {"rope_type": "default", "rope_theta": figures("rope.freq_base")},
        },
        tie_word_embeddings=True,
    )
    config._attn_implementation = "sdpa"
    with _no_random_weights():
        model = Gemma3ForCausalLM(config)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name in checkpoint.tensors:
            numbers = checkpoint.array(name)
            parameters[torch_name(name)].copy_(torch.from_numpy(numbers - 1.0 if "norm" in name else np.require(numbers, requirements="W")))
    return model.to(dtype).eval().requires_grad_(False)


def from_torch(model: Gemma3ForCausalLM, like: Checkpoint, *, kind: str = "F16", embedding: str | None = None) -> Checkpoint:
    """The model's weights under GGUF names, encoded as `kind`.

    The embedding keeps its stored bytes, as it is frozen in nearly all our training; `embedding` names the type to encode a trained one as.
    """
    parameters = dict(model.named_parameters())
    tensors: dict[str, Tensor] = {}
    for name, stored in like.tensors.items():
        weight = parameters[torch_name(name)].detach().float().numpy()
        numbers = np.asarray(weight + 1.0 if "norm" in name else weight, dtype=np.float32)
        if name == "token_embd.weight":
            tensors[name] = encode_tensor(numbers, embedding) if embedding else stored
        else:
            tensors[name] = encode_tensor(numbers, kind)
    return like.with_tensors(tensors)


@contextlib.contextmanager
def _no_random_weights() -> Iterator[None]:
    """Skip random initialisation: every weight is overwritten a moment later."""
    names = ("normal_", "uniform_", "kaiming_uniform_", "trunc_normal_")
    saved = {name: getattr(torch.nn.init, name) for name in names}
    try:
        for name in names:
            setattr(torch.nn.init, name, lambda tensor, *_a, **_k: tensor)
        yield
    finally:
        for name, function in saved.items():
            setattr(torch.nn.init, name, function)


def _norm(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """RMSNorm with Gemma's (1 + w), in x's type, the mean square in float32. A third faster on a CPU than F.rms_norm, backward included."""
    norm: Any = module
    square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square()  # (..., 1)
    scale = torch.rsqrt(square / x.shape[-1] + norm.eps).to(x.dtype)
    return x * scale * (1.0 + norm.weight.float()).to(x.dtype)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, scale: float) -> torch.Tensor:
    """Softmax attention in plain products: q (B, heads, T, head), k and v (B, groups, S, head) -> (B, heads, T, head).

    `bias` (T, S) or (B, 1, T, S) is -inf where a key must not be seen, 0 elsewhere. At our lengths, forward and backward together cost a
    third of `scaled_dot_product_attention` on a CPU (docs/log.md), and shared keys are not copied for each head.
    """
    batch, heads, length, width = q.shape
    groups, keys = k.shape[1], k.shape[2]
    scores = torch.matmul(q.reshape(batch, groups, -1, width), k.transpose(2, 3)).view(batch, heads, length, keys).float()
    weights = torch.add(bias, scores, alpha=scale).softmax(-1).to(q.dtype)
    return torch.matmul(weights.view(batch, groups, -1, keys), v).view(batch, heads, length, width)


def rope(model: Gemma3ForCausalLM, positions: torch.Tensor, dtype: torch.dtype) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Layer type -> (cos, sin), each (1, 1, T, head) or (B, 1, T, head)."""
    rotary: Any = model.model.rotary_emb
    positions = positions if positions.ndim == 2 else positions[None]
    probe = torch.empty(0, dtype=dtype, device=positions.device)
    found = {}
    for kind in set(model.config.layer_types):
        cos, sin = rotary(probe, positions, kind)
        found[kind] = (cos[:, None], sin[:, None])
    return found


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    left, right = x[..., :half], x[..., half:]
    return torch.cat((left * cos[..., :half] - right * sin[..., :half], right * cos[..., half:] + left * sin[..., half:]), dim=-1)


Positions = tuple[torch.Tensor, torch.Tensor]  # rows and columns, (n,) each


def block_forward(
    layer: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, cache: "KeyValues | None" = None, at: Positions | None = None
) -> torch.Tensor:
    """One transformer block: x (B, T, hidden) -> (B, T, hidden), or (n, hidden) at chosen positions, which is all a last block is for."""
    batch, length, _ = x.shape
    attention = layer.self_attn
    h = _norm(layer.input_layernorm, x)
    shape = (batch, length, -1, attention.head_dim)
    q = _norm(attention.q_norm, attention.q_proj(h).view(shape)).transpose(1, 2)  # (B, heads, T, head)
    k = _norm(attention.k_norm, attention.k_proj(h).view(shape)).transpose(1, 2)  # (B, 1, T, head)
    v = attention.v_proj(h).view(shape).transpose(1, 2)
    q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
    if cache is not None:
        k, v, bias = cache.extend(k, v)
    else:
        bias = torch.full((length, length), -torch.inf, device=x.device).triu(1)
    mixed = _attend(q, k, v, bias, attention.scaling)
    mixed = mixed.transpose(1, 2).reshape(batch, length, -1)  # (B, T, heads * head)
    if at is not None:
        mixed, x = mixed[at], x[at]  # (n, ...)
    x = x + _norm(layer.post_attention_layernorm, attention.o_proj(mixed))
    h = _norm(layer.pre_feedforward_layernorm, x)
    mlp = layer.mlp
    h = mlp.down_proj(F.gelu(mlp.gate_proj(h), approximate="tanh") * mlp.up_proj(h))
    return x + _norm(layer.post_feedforward_layernorm, h)


def body(model: Gemma3ForCausalLM, *, first: int = 0) -> list[nn.Parameter]:
    """What training leaves free by default: blocks from `first` on and the final norm, all but the embedding."""
    blocks = [parameter for layer in list(model.model.layers)[first:] for parameter in layer.parameters()]
    return [*blocks, *model.model.norm.parameters()]


def embed(model: Gemma3ForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Scaled embeddings: ids (B, T) -> (B, T, hidden)."""
    return model.model.embed_tokens(ids)


def hidden_states(
    model: Gemma3ForCausalLM,
    x: torch.Tensor,
    *,
    first: int = 0,
    last: int | None = None,
    at: Positions | None = None,
    taps: dict[int, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Run blocks `first` to `last` over embeddings or hidden states x (B, T, hidden); no final norm.

    Returns (B, T, hidden), or (n, hidden) at the positions `at`. Blocks named in `taps`, all but the last, leave their output there.

    Raises:
        TooLarge: rows longer than the sliding window, which this pass does not apply.
    """
    if x.shape[1] > model.config.sliding_window:
        raise TooLarge(f"{x.shape[1]} tokens in one row; training rows are limited to the sliding window of {model.config.sliding_window}")
    rotations = rope(model, torch.arange(x.shape[1], device=x.device), x.dtype)
    end = len(model.model.layers) if last is None else last
    for number in range(first, end):
        cos, sin = rotations[model.config.layer_types[number]]
        x = block_forward(model.model.layers[number], x, cos, sin, at=at if number == end - 1 else None)
        if taps and number in taps:
            taps[number] = x
    return x if at is None or first < end else x[at]


def logits_of(model: Gemma3ForCausalLM, x: torch.Tensor) -> torch.Tensor:
    """Final norm and output matrix: x (..., hidden) -> (..., V)."""
    return model.lm_head(_norm(model.model.norm, x))


class KeyValues:
    """Keys and values of one block while a batch is generated; rows are padded on the left, `start` is each row's first real column."""

    def __init__(self, batch: int, heads: int, room: int, width: int, dtype: torch.dtype, start: torch.Tensor) -> None:
        self.k = torch.zeros(batch, heads, room, width, dtype=dtype, device=start.device)
        self.v = torch.zeros_like(self.k)
        self.start, self.used = start, 0

    def extend(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Append (B, heads, t, width); return all keys and values so far and the bias (B, 1, t, used)."""
        length = k.shape[2]
        begin, end = self.used, self.used + length
        self.k[:, :, begin:end], self.v[:, :, begin:end], self.used = k, v, end
        column = torch.arange(end, device=k.device)
        seen = (column[None] <= column[begin:, None])[None] & (column[None, None] >= self.start[:, None, None])
        seen |= column[None, None] == column[None, begin:, None]  # padding sees itself, or its softmax would be 0/0
        return self.k[:, :, :end], self.v[:, :, :end], torch.zeros(seen.shape, device=k.device).masked_fill(~seen, -torch.inf)[:, None]

    def keep(self, rows: torch.Tensor) -> None:
        """Drop the rows that are finished."""
        self.k, self.v, self.start = self.k[rows], self.v[rows], self.start[rows]

    def rewind(self, drop: torch.Tensor) -> None:
        """Forget the last drop[row] columns of each row; the ends of the rows are aligned again."""
        lengths = self.used - self.start - drop  # (rows,) real columns left
        used = int(lengths.max())
        start = used - lengths
        column = (torch.arange(used, device=start.device)[None] - start[:, None] + self.start[:, None]).clamp(min=0)[
            :, None, :, None
        ]  # (rows, 1, used, 1)
        for held in (self.k, self.v):
            held[:, :, :used] = held.gather(2, column.expand(-1, held.shape[1], -1, held.shape[3]))
        self.start, self.used = start, used


# Rows still going, the last block's output behind their next token (rows, hidden), its logits (rows, V), the tokens chosen (rows,).
Watch = Callable[[list[int], torch.Tensor, torch.Tensor, torch.Tensor], None]


@torch.inference_mode()
def generate(
    model: Gemma3ForCausalLM,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    eos: int,
    samples: int = 1,
    temperature: float = 0.0,
    seed: int = 0,
    stop: Collection[int] = (),
    watch: Watch | None = None,
) -> list[list[int]]:
    """Continuations of a batch of prompts, the end token included where the model said it; finished rows leave the batch.

    Tokens in `stop` end an answer as `eos` does (line breaks, for a teacher that was never corrected).

    `samples` answers a prompt lie side by side: row r is sample r % samples of prompt r // samples; a prompt is read once for all of them.
    Temperature 0 is greedy. Above it a token is drawn from softmax(logits / temperature); a prompt's draws come from `seed` and the prompt
    itself, so they do not depend on what else is in the batch.
    """
    ids, positions, caches = begin(model, prompts, room=max_new_tokens)
    answers: list[list[int]] = [[] for _ in range(len(prompts) * samples)]
    uniform = draws(prompts, samples, max_new_tokens, seed) if temperature > 0 else None  # (rows, tokens)
    alive = torch.arange(len(answers), device=ids.device)
    ends = torch.tensor([eos, *stop], device=ids.device)
    for step in range(max_new_tokens):
        x = read_on(model, ids, positions, caches)[:, -1]  # (rows, hidden)
        logits = logits_of(model, x)  # (rows, V)
        if step == 0 and samples > 1:
            rows = torch.arange(len(prompts), device=ids.device).repeat_interleave(samples)
            x, logits, positions = x[rows], logits[rows], positions[rows]
            for cache in caches:
                cache.keep(rows)
        chosen = logits.argmax(-1) if uniform is None else drawn(logits / temperature, uniform[alive.cpu(), step].to(logits.device))
        if watch:
            watch(alive.tolist(), x, logits, chosen)
        for row, token in zip(alive.tolist(), chosen.tolist(), strict=True):
            answers[row].append(token)
        kept = (~torch.isin(chosen, ends)).nonzero().squeeze(1)
        if not len(kept):
            break
        if len(kept) < len(alive):
            for cache in caches:
                cache.keep(kept)
        alive, ids, positions = alive[kept], chosen[kept][:, None], positions[kept, -1:] + 1
    return answers


def begin(model: Gemma3ForCausalLM, prompts: Sequence[Sequence[int]], *, room: int) -> tuple[torch.Tensor, torch.Tensor, list[KeyValues]]:
    """Prompts padded on the left: ids and positions (rows, T), and empty caches of their length and `room` more columns."""
    longest = max(len(prompt) for prompt in prompts)
    config, dtype, device = model.config, model.model.embed_tokens.weight.dtype, model.model.embed_tokens.weight.device
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    start = torch.tensor([longest - len(prompt) for prompt in prompts], device=device)
    caches = [
        KeyValues(len(prompts), config.num_key_value_heads, longest + room, config.head_dim, dtype, start) for _ in model.model.layers
    ]
    return ids, (torch.arange(longest, device=device)[None] - start[:, None]).clamp(min=0), caches


def read_on(model: Gemma3ForCausalLM, ids: torch.Tensor, positions: torch.Tensor, caches: Sequence[KeyValues]) -> torch.Tensor:
    """Read ids (rows, T) on top of what the caches hold: (rows, T, hidden), no final norm."""
    x = embed(model, ids)
    rotations = rope(model, positions, x.dtype)
    for number, layer in enumerate(model.model.layers):
        cos, sin = rotations[model.config.layer_types[number]]
        x = block_forward(layer, x, cos, sin, cache=caches[number])
    return x


def draws(prompts: list[list[int]], samples: int, tokens: int, seed: int) -> torch.Tensor:
    """Uniform numbers in [0, 1), (prompts * samples, tokens), each prompt's from the seed and its own ids."""
    found = []
    for prompt in prompts:
        generator = torch.Generator().manual_seed(int(digest_value([seed, prompt])[:15], 16))
        found.append(torch.rand(samples, tokens, generator=generator, dtype=torch.float64))
    return torch.cat(found)


def drawn(logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Inverse of the cumulative distribution: logits (rows, V), uniform (rows,) -> tokens (rows,)."""
    mass = logits.float().softmax(-1).double().cumsum(-1)  # (rows, V)
    return torch.searchsorted(mass, (uniform * mass[:, -1])[:, None], right=True).squeeze(1).clamp(max=logits.shape[-1] - 1)
