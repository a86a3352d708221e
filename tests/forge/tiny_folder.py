"""The tiny model as `save_pretrained` leaves one: config, safetensors and a fast tokenizer with the same pieces and ids."""

from pathlib import Path

from tokenizers import Tokenizer as Pieces
from tokenizers import decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from protocol.models.checkpoint import Checkpoint
from protocol.models.torch_model import to_torch


def tiny_folder(model: Path, folder: Path) -> Path:
    """Save the GGUF `model` into `folder`."""
    checkpoint = Checkpoint.read(model)
    to_torch(checkpoint).save_pretrained(folder)
    tokens = checkpoint.vocabulary.tokens
    ids = {piece: at for at, piece in enumerate(tokens)}
    merged = [piece for piece in tokens if len(piece) > 1 and not piece.startswith("<")]
    ranked = sorted(merged, key=lambda piece: -checkpoint.vocabulary.scores[ids[piece]])
    merges = [
        (piece[:cut], piece[cut:])
        for piece in ranked
        for cut in range(1, len(piece))
        if piece[:cut] in ids and piece[cut:] in ids
    ]  # fmt: skip
    pieces = Pieces(models.BPE(vocab=ids, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    pieces.normalizer = normalizers.Replace(" ", "▁")
    pieces.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    pieces.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", ids["<bos>"])])
    PreTrainedTokenizerFast(
        tokenizer_object=pieces, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", pad_token="<pad>"
    ).save_pretrained(folder)  # fmt: skip
    return folder
