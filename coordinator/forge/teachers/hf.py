"""transformers models as teachers: our Gemma checkpoints, and any folder with a causal language model saved in it.

Rules:
 * Nothing is fetched: a folder is on this machine or it is refused; code that comes with a model is never run; weights are safetensors.
 * `CheckpointTeacher` computes with our own forward pass (`torch_model`), the one that the student is trained and captured with.
 * `FolderTeacher` knows a model only by what every causal model of transformers has: `model(input_ids, attention_mask, position_ids,
   past_key_values)`. Its graphics card is used if there is one. Told a student's vocabulary, it is compared piece by piece: where both have
   an id it must mean the same, and what either pads its table with is left out (models have more rows than pieces, some GGUFs too).
Limits: rows are padded to the longest of their batch; a model without a key-value cache (state space models) is refused.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from coordinator.forge.targets.cache import Targets
from coordinator.forge.targets.score import Predictions, likelihood_of, predictions, top_of
from coordinator.forge.teachers import OTHER_VOCABULARY, Said, check_request
from coordinator.forge.teachers.sampling import check_examples, chosen_log_probs, to_said
from protocol.digests import digest_file, digest_value
from protocol.errors import BadInput, TooLarge, Unavailable
from protocol.models.checkpoint import Checkpoint
from protocol.models.tokenizer import Example, Tokenizer
from protocol.models.torch_model import best_dtype, drawn, draws, generate, to_torch, use_threads

ROWS = 64  # answers generated together
BATCH_TOKENS = 2048  # tokens scored together, padding included
LOGITS_BYTES = 256 << 20  # of one batch's logits: at 262k tokens of vocabulary, 256 positions
PADDING = 1024  # pieces that one table may have more than the other; the largest seen is 905 (Phi: 51,200 rows, 50,295 pieces)
DECIDING = (".safetensors", ".json", ".model", ".txt", ".jinja")  # files of a folder that decide its answers


class _TorchTeacher:
    """What both have in common: batches of rows in, answers and scores out."""

    open = True
    reads: Literal["prompt", "source"] = "prompt"
    name: str
    digest: str
    tokenizer: str
    vocabulary: int
    room: int  # tokens of prompt and answer
    ends: frozenset[int]  # tokens that end an answer

    def generate(self, prompts: Sequence[str], *, n: int, temperature: float, seed: int, max_new_tokens: int) -> list[list[Said]]:
        """See `Teacher`."""
        check_request(n=n, temperature=temperature, max_new_tokens=max_new_tokens)
        self._need_open()
        read = [self._encode(prompt) for prompt in prompts]
        for ids in read:
            if not ids:
                raise BadInput("the prompt is empty")
            if len(ids) + max_new_tokens > self.room:
                raise TooLarge(
                    f"a prompt of {len(ids)} tokens and {max_new_tokens} new ones are over the {self.room} that {self.name} reads"
                )
        answers: list[list[Said]] = [[] for _ in read]
        order = sorted(range(len(read)), key=lambda at: len(read[at]))
        step = max(1, ROWS // n)
        for first in range(0, len(order), step):
            places = order[first : first + step]
            rows, totals = self._continue([read[at] for at in places], n, temperature, seed, max_new_tokens)
            for row, (tokens, total) in enumerate(zip(rows, totals, strict=True)):
                answers[places[row // n]].append(to_said(tokens, total, self._decode, self.ends))
        return answers

    def score(self, examples: Sequence[Example], *, k: int) -> list[Targets]:
        """See `Teacher`."""
        return top_of(self._checked(examples), k=k)

    def log_probs(self, examples: Sequence[Example]) -> list[NDArray[np.float32]]:
        """See `Teacher`."""
        return [one.numpy() for one in likelihood_of(self._checked(examples), examples)]

    def _checked(self, examples: Sequence[Example]) -> Predictions:
        self._need_open()
        check_examples(examples, vocabulary=self.vocabulary, room=self.room)
        return self._predictions(examples)

    @property
    def _positions(self) -> int:
        """How many positions' logits fit in LOGITS_BYTES."""
        return max(1, LOGITS_BYTES // (4 * self.vocabulary))

    def _need_open(self) -> None:
        raise NotImplementedError

    def _encode(self, prompt: str) -> list[int]:
        raise NotImplementedError

    def _decode(self, tokens: Sequence[int]) -> str:
        raise NotImplementedError

    def _continue(
        self, prompts: list[list[int]], n: int, temperature: float, seed: int, max_new_tokens: int
    ) -> tuple[list[list[int]], list[float]]:
        """Tokens and summed log-probability of n answers a prompt, side by side."""
        raise NotImplementedError

    def _predictions(self, examples: Sequence[Example]) -> Predictions:
        raise NotImplementedError


class CheckpointTeacher(_TorchTeacher):
    """A Gemma 3 GGUF, computed in torch.

    Raises:
        BadInput: no such file, or not one we can compute.
    """

    def __init__(self, path: Path, *, threads: int = 1, dtype: torch.dtype | None = None) -> None:
        use_threads(threads)
        checkpoint = Checkpoint.read(path)
        self._model: Any = to_torch(checkpoint, dtype=dtype or best_dtype())
        self._text = Tokenizer(path)
        self.name, self.digest = f"{path.name} in torch", checkpoint.digest
        self.tokenizer, self.vocabulary = self._text.digest, self._text.size
        self.room = int(self._model.config.sliding_window)
        breaks = {token for token in range(self._text.size) if b"\n" in self._text.piece(token)}
        self.ends = frozenset({token for token in range(self._text.size) if self._text.is_end(token)} | breaks)

    def close(self) -> None:
        """Free the memory. A second call does nothing."""
        self._model = None
        self._text.close()

    def _need_open(self) -> None:
        if self._model is None:
            raise Unavailable(f"the teacher {self.name} is closed; open it again")

    def _encode(self, prompt: str) -> list[int]:
        return self._text.encode(prompt, bos=True) if prompt else []

    def _decode(self, tokens: Sequence[int]) -> str:
        return self._text.decode(tokens)

    def _continue(
        self, prompts: list[list[int]], n: int, temperature: float, seed: int, max_new_tokens: int
    ) -> tuple[list[list[int]], list[float]]:
        totals = torch.zeros(len(prompts) * n, dtype=torch.float64)

        def watch(rows: list[int], _: torch.Tensor, logits: torch.Tensor, chosen: torch.Tensor) -> None:
            totals[rows] += chosen_log_probs(logits, chosen).double()

        answers = generate(
            self._model, prompts, max_new_tokens=max_new_tokens, eos=self._text.eos, stop=self.ends, samples=n, temperature=temperature,
            seed=seed, watch=watch,
        )  # fmt: skip
        return answers, totals.tolist()

    def _predictions(self, examples: Sequence[Example]) -> Predictions:
        return predictions(self._model, examples, batch_tokens=min(BATCH_TOKENS, self._positions))


class FolderTeacher(_TorchTeacher):
    """Any causal language model with its tokenizer, as `save_pretrained` leaves them in a folder.

    Raises:
        BadInput: no such folder, no such model in it, or another vocabulary than the one given.
    """

    def __init__(
        self, folder: Path, *, threads: int = 1, dtype: torch.dtype | None = None, vocabulary: Path | None = None
    ) -> None:  # fmt: skip
        from transformers import AutoModelForCausalLM, AutoTokenizer

        if not (folder / "config.json").is_file():
            raise BadInput(
                f"{folder} holds no transformers model (no config.json), and Milpa downloads none: "
                "get it where there is a network (hf download NAME --local-dir FOLDER) and say hf:FOLDER"
            )
        use_threads(threads)
        try:
            self._tokens: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            model = AutoModelForCausalLM.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype=dtype or best_dtype()
            )
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
            raise BadInput(f"{folder} is no causal model that transformers can load: {' '.join(str(error).split())[:300]}") from error
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model: Any = model.to(self._device).eval().requires_grad_(False)
        self.name, self.digest = folder.name, digest_folder(folder)
        self.vocabulary = int(self._model.get_output_embeddings().weight.shape[0])
        pieces = self._tokens.convert_ids_to_tokens(list(range(len(self._tokens))))
        self.tokenizer = digest_value(pieces)
        if vocabulary is not None:
            self._speak(vocabulary, pieces)
        self.room = int(getattr(self._model.config, "max_position_embeddings", None) or 4096)
        told = self._model.generation_config.eos_token_id
        ends = {self._tokens.eos_token_id, *(told if isinstance(told, list) else [told])} - {None}
        breaks = {token for token in range(len(pieces)) if "\n" in self._tokens.decode([token])}
        self.ends = frozenset(ends | breaks)

    def _speak(self, vocabulary: Path, pieces: Sequence[str | None]) -> None:
        """Take the ids of the GGUF `vocabulary` for ours, if they are."""
        with Tokenizer(vocabulary) as text:
            if abs(text.size - len(pieces)) > PADDING:
                raise BadInput(f"{self.name} has {len(pieces)} pieces, {vocabulary.name} {text.size}: {OTHER_VOCABULARY}")
            for token, (ours, theirs) in enumerate(zip(pieces, text.pieces, strict=False)):
                if ours is not None and ours.replace("▁", " ") != theirs.replace("▁", " "):  # GGUFs spell some spaces out
                    raise BadInput(f"{self.name} means {ours!r} by id {token}, {vocabulary.name} {theirs!r}: {OTHER_VOCABULARY}")
            self.tokenizer, self.vocabulary = text.digest, text.size

    def close(self) -> None:
        """Free the memory. A second call does nothing."""
        self._model = None

    def _need_open(self) -> None:
        if self._model is None:
            raise Unavailable(f"the teacher {self.name} is closed; open it again")

    def _encode(self, prompt: str) -> list[int]:
        ids: list[int] = self._tokens(prompt)["input_ids"] if prompt else []
        return ids

    def _decode(self, tokens: Sequence[int]) -> str:
        text: str = self._tokens.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    @torch.inference_mode()
    def _continue(
        self, prompts: list[list[int]], n: int, temperature: float, seed: int, max_new_tokens: int
    ) -> tuple[list[list[int]], list[float]]:
        ids, seen, positions = self._padded(prompts)
        uniform = draws(prompts, n, max_new_tokens, seed) if temperature > 0 else None
        answers: list[list[int]] = [[] for _ in range(len(prompts) * n)]
        totals = torch.zeros(len(answers), dtype=torch.float64)
        ends = torch.tensor(sorted(self.ends))
        alive = torch.arange(len(answers))
        past: Any = None
        for step in range(max_new_tokens):
            out = self._model(
                input_ids=ids, attention_mask=seen, position_ids=positions, past_key_values=past, use_cache=True, logits_to_keep=1
            )
            logits, past = out.logits[:, -1].float().cpu(), out.past_key_values
            if past is None:
                raise BadInput(f"{self.name} has no key-value cache; such models are not supported as teachers")
            if step == 0 and n > 1:
                past.batch_repeat_interleave(n)
                logits, seen, positions = (part.repeat_interleave(n, dim=0) for part in (logits, seen, positions))
            chosen = logits.argmax(-1) if uniform is None else drawn(logits / temperature, uniform[alive, step])
            totals[alive] += chosen_log_probs(logits, chosen).double()
            for row, token in zip(alive.tolist(), chosen.tolist(), strict=True):
                answers[row].append(token)
            kept = (~torch.isin(chosen, ends)).nonzero().squeeze(1)
            if not len(kept):
                break
            if len(kept) < len(alive):
                past.batch_select_indices(kept.to(self._device))
            alive, ids, seen = alive[kept], chosen[kept][:, None].to(self._device), seen[kept.to(self._device)]
            seen = torch.cat((seen, seen.new_ones(len(kept), 1)), dim=1)
            positions = positions[kept.to(self._device), -1:] + 1
        return answers, totals.tolist()

    @torch.inference_mode()
    def _predictions(self, examples: Sequence[Example]) -> Predictions:
        """The whole model, head and all (some scale or cap their logits there): rows end together, logits at the ends only."""
        order = sorted(range(len(examples)), key=lambda at: len(examples[at].prompt) + len(examples[at].target))
        longest_target = max((len(one.target) for one in examples), default=1)
        step = max(1, min(ROWS, self._positions // longest_target))
        for first in range(0, len(order), step):
            places = order[first : first + step]
            ids, seen, positions = self._padded([[*examples[at].prompt, *examples[at].target[:-1]] for at in places])
            keep = max(len(examples[at].target) for at in places)
            out = self._model(input_ids=ids, attention_mask=seen, position_ids=positions, use_cache=False, logits_to_keep=keep)
            for at, logits in zip(places, out.logits.float().cpu(), strict=True):
                yield at, logits[keep - len(examples[at].target) :, : self.vocabulary]

    def _padded(self, rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows padded on the left: ids, attention mask and positions, (rows, T) each."""
        longest = max(len(row) for row in rows)
        ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows], device=self._device)
        seen = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=self._device)
        return ids, seen, (seen.cumsum(-1) - 1).clamp(min=0)


def digest_folder(folder: Path) -> str:
    """SHA-256 over the names and digests of the files that decide a saved model's answers."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix in DECIDING)
    return digest_value([[path.name, digest_file(path)] for path in files])
