"""LoRA (Hu et al. 2021) on the torch model, and as a GGUF file that llama.cpp loads beside the base.

delta W = (alpha / rank) * B @ A;  A (rank, in) starts Kaiming-uniform from a seed, B (out, rank) starts at zero.
Modules are named by their GGUF tensor, so the header, the merge, the file and the node speak of the same thing. Gemma needs no
permutation of q and k.
Every site starts from the same shipped A: factors trained from different starts cannot be merged.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import gguf
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from protocol.adapters import AdapterHeader, Flat, Module, pack, unpack
from protocol.digests import digest_bytes
from protocol.errors import BadInput, DoesNotFit, MalformedMessage
from protocol.models.checkpoint import ARCHITECTURE, Checkpoint, _finish
from protocol.models.torch_model import module_of, torch_name

DEFAULT_MODULES = ("attn_q", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
ALL_MODULES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")

Factors = dict[str, tuple[Flat, Flat]]  # tensor name -> A (rank, in), B (out, rank)


class LoraLinear(nn.Module):
    """A frozen linear layer and its low-rank correction; `rank` may differ from layer to layer."""

    def __init__(self, base: nn.Linear, a: torch.Tensor, b: torch.Tensor, scale: float) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter(a)  # (rank, in), float32
        self.b = nn.Parameter(b)  # (out, rank), float32
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in) -> (..., out)."""
        low = F.linear(x, self.a.to(x.dtype))  # (..., rank)
        return self.base(x) + F.linear(low, (self.b * self.scale).to(x.dtype))

    def merged(self) -> nn.Linear:
        """The base with the correction added in float32 and rounded once."""
        with torch.no_grad():
            delta = self.scale * (self.b @ self.a)
            self.base.weight.copy_((self.base.weight.float() + delta).to(self.base.weight.dtype))
        return self.base


def initial_adapter(
    checkpoint: Checkpoint,
    *,
    rank: int,
    alpha: float,
    seed: int,
    site: str = "",
    release: int = 0,
    base_digest: str = "",
    modules: Sequence[str] = DEFAULT_MODULES,
) -> tuple[Flat, AdapterHeader]:
    """The adapter every site starts from: B = 0, A Kaiming-uniform from (digest of the base, seed) and nothing else.

    Args:
        base_digest: SHA-256 of the model file the adapter is for; by default that of `checkpoint`'s file.
        modules: which matrices of each block.

    Raises:
        BadInput: rank below 1, or modules the model does not have.
    """
    if rank < 1 or alpha <= 0:
        raise BadInput(f"an adapter needs rank >= 1 and alpha > 0, not {rank} and {alpha}")
    base = base_digest or checkpoint.digest
    chosen = tuple(
        Module(tensor=name, outputs=shape[0], inputs=shape[1]) for name, shape in checkpoint.matrices() if name.split(".")[2] in modules
    )
    if len(chosen) != len(modules) * checkpoint.blocks:
        raise BadInput(f"modules {', '.join(modules)} are not all in this model; known: {', '.join(ALL_MODULES)}")
    random = np.random.default_rng(int(digest_bytes(f"{base}:{seed}".encode())[:16], 16))
    factors: Factors = {}
    for module in chosen:
        bound = 1.0 / math.sqrt(module.inputs)  # kaiming_uniform with a = sqrt(5), as in the paper's code and in peft
        a = random.uniform(-bound, bound, (rank, module.inputs)).astype(np.float32)
        factors[module.tensor] = (a, np.zeros((module.outputs, rank), dtype=np.float32))
    flat = pack(factors, chosen)
    header = AdapterHeader(
        site=site, release=release, base_digest=base, initial_digest=digest_bytes(flat.tobytes()), rank=rank, alpha=alpha, modules=chosen,
        examples=0,
    )  # fmt: skip
    return flat, header


def attach(model: nn.Module, flat: Flat, header: AdapterHeader) -> list[nn.Parameter]:
    """Put the adapter's factors on the model; returns the parameters to train.

    Raises:
        DoesNotFit: another layout than the model's; the model is unchanged.
    """
    return attach_factors(model, unpack(flat, header), {module.tensor: header.alpha / header.rank for module in header.modules})


def attach_factors(model: nn.Module, factors: Factors, scales: Mapping[str, float]) -> list[nn.Parameter]:
    """As `attach`, with a rank and a scale (alpha / rank) for each module."""
    places = []
    for tensor, (a, b) in factors.items():
        try:
            base = module_of(model, tensor)
        except (AttributeError, KeyError, ValueError) as error:
            raise DoesNotFit(f"the model has no {tensor}") from error
        if not isinstance(base, nn.Linear) or base.weight.shape != (b.shape[0], a.shape[1]):
            raise DoesNotFit(f"{tensor} is not a free matrix of {b.shape[0]} x {a.shape[1]} in this model")
        places.append((tensor, base, a, b))
    parameters: list[nn.Parameter] = []
    for tensor, base, a, b in places:
        layer = LoraLinear(base, torch.from_numpy(a.copy()), torch.from_numpy(b.copy()), scales[tensor])
        _replace(model, tensor, layer)
        parameters += [layer.a, layer.b]
    return parameters


def factors_of(model: nn.Module) -> Factors:
    """The factors that are on the model now, by torch module name."""
    return {
        name: (layer.a.detach().numpy().copy(), layer.b.detach().numpy().copy())
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLinear)
    }


def detach(model: nn.Module, header: AdapterHeader) -> Flat:
    """Take the factors off again and return them; the base is as it was."""
    factors: Factors = {}
    for module in header.modules:
        layer = module_of(model, module.tensor)
        if not isinstance(layer, LoraLinear):
            raise DoesNotFit(f"{module.tensor} carries no adapter")
        factors[module.tensor] = (layer.a.detach().numpy(), layer.b.detach().numpy())
        _replace(model, module.tensor, layer.base)
    return pack(factors, header.modules)


def fold(model: nn.Module) -> None:
    """Add every adapter on the model to its base weights and remove it."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoraLinear):
            _set(model, name, layer.merged())


def _replace(model: nn.Module, tensor: str, layer: nn.Module) -> None:
    _set(model, torch_name(tensor).removesuffix(".weight"), layer)


def _set(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer)


def write_adapter_gguf(path: Path, flat: Flat, header: AdapterHeader) -> None:
    """Write the adapter for llama.cpp."""
    write_factors_gguf(path, unpack(flat, header), alpha=header.alpha)


def write_factors_gguf(path: Path, factors: Mapping[str, tuple[Flat, Flat]], *, alpha: float = 0.0) -> None:
    """Write factors of any rank, each module its own, in float16.

    llama.cpp applies alpha / rank of each module; alpha = 0 means "as they are": for factors whose scale is folded in (a merge).
    The file appears whole or not at all.

    Raises:
        BadInput: no factors, or numbers that float16 cannot hold.
    """
    if not factors:
        raise BadInput("an adapter without a module cannot be written")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    writer = gguf.GGUFWriter(part, ARCHITECTURE)
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    for tensor, (a, b) in factors.items():
        for suffix, numbers in ((".lora_a", a), (".lora_b", b)):
            with np.errstate(over="ignore"):
                half = np.ascontiguousarray(numbers, dtype=np.float16)
            if not np.isfinite(half).all():
                writer.close()
                part.unlink(missing_ok=True)
                raise BadInput(f"{tensor}{suffix} has numbers that are not finite in float16; the adapter was not written")
            writer.add_tensor(tensor + suffix, half)
    _finish(writer, part, path)


def read_factors_gguf(path: Path) -> tuple[Factors, float]:
    """Factors and alpha of an adapter file.

    Raises:
        BadInput: there is no such file.
        MalformedMessage: it is not a LoRA adapter.
    """
    if not path.is_file():
        raise BadInput(f"adapter file {path} does not exist")
    try:
        reader = gguf.GGUFReader(path)
        if reader.fields["general.type"].contents() != "adapter" or reader.fields["adapter.type"].contents() != "lora":
            raise ValueError("general.type is not 'adapter'")
        alpha = float(reader.fields["adapter.lora.alpha"].contents())
        found = {tensor.name: np.array(tensor.data, dtype=np.float32) for tensor in reader.tensors}
        names = [name.removesuffix(".lora_a") for name in found if name.endswith(".lora_a")]
        return {name: (found[name + ".lora_a"], found[name + ".lora_b"]) for name in names}, alpha
    except (ValueError, KeyError, IndexError) as error:
        raise MalformedMessage(f"{path} is not a LoRA adapter: {error}") from error


def read_adapter_gguf(path: Path, *, base_digest: str = "", initial_digest: str = "", site: str = "") -> tuple[Flat, AdapterHeader]:
    """An adapter file of one rank as flat array and header (what a GGUF does not say is left empty or given).

    Raises:
        DoesNotFit: its modules have different ranks; use `read_factors_gguf`.
    """
    factors, alpha = read_factors_gguf(path)
    ranks = {a.shape[0] for a, _ in factors.values()}
    if len(ranks) != 1:
        raise DoesNotFit(f"{path} has modules of ranks {sorted(ranks)}, one was expected")
    rank = ranks.pop()
    modules = tuple(Module(tensor=name, outputs=b.shape[0], inputs=a.shape[1]) for name, (a, b) in factors.items())
    header = AdapterHeader(
        site=site, release=0, base_digest=base_digest, initial_digest=initial_digest, rank=rank, alpha=alpha or float(rank),
        modules=modules, examples=0,
    )  # fmt: skip
    return pack(factors, modules), header
