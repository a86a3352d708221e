"""Block-wise speculative sampling: answers that the student writes and the teacher keeps on its own ground.

Speculative knowledge distillation (Xu et al., ICLR 2025) asks the teacher after every token; here the student proposes a block, and one
teacher forward pass judges all of it. Rules:
 * A proposed token stands when it is among the teacher's `top` most likely ones at its place, and all before it in the block stand.
 * The first refused one is replaced by the teacher's own choice, drawn from the teacher; what was proposed after it is forgotten.
 * The teacher's view of every kept token falls out of the same pass: the example is ready for the target cache and never scored again.
Both models keep keys and values, and forget the refused columns. They share one vocabulary.
"""

from collections.abc import Sequence

import msgspec
import numpy as np
import torch
from transformers import Gemma3ForCausalLM

from coordinator.forge.targets.cache import Targets
from coordinator.forge.training.losses import top_k
from protocol.models.tokenizer import Example
from protocol.models.torch_model import KeyValues, begin, drawn, draws, logits_of, read_on


class Block(msgspec.Struct, frozen=True):
    """How proposals are made and judged."""

    size: int = 5  # tokens the student proposes at a time
    top: int = 25  # a token stands among this many; Xu et al. use 25
    temperature: float = 1.0  # of the student's proposals
    teacher_temperature: float = 1.0  # of the token that replaces a refused one


class Speculated(msgspec.Struct, frozen=True):
    """Answers in the order of their prompts, and what they took."""

    examples: list[Example]
    targets: list[Targets]
    judged: int  # proposals that the teacher's verdict decided: up to the first refused one of a block
    accepted: int  # of them
    teacher_tokens: int  # read by the teacher, without padding
    student_tokens: int


@torch.no_grad()
def speculate(
    student: Gemma3ForCausalLM,
    teacher: Gemma3ForCausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    block: Block,
    k: int,
    max_new_tokens: int,
    eos: int,
    seed: int,
) -> Speculated:
    """Write one answer a prompt; an answer that is not finished at `max_new_tokens` ends without the end token."""
    texts = [list(prompt) for prompt in prompts]
    views: list[list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]] = [[] for _ in texts]
    answers: list[list[int]] = [[] for _ in texts]
    room = max_new_tokens + block.size
    chances = draws(texts, 2, room * block.size, seed).view(len(texts), 2, -1)  # the student's and the teacher's
    _, _, students = begin(student, texts, room=room)
    ids, positions, teachers = begin(teacher, texts, room=room)
    if ids.shape[1] > 1:  # all but the last token: that one is read with the first block
        read_on(student, ids[:, :-1], positions[:, :-1], students)
        read_on(teacher, ids[:, :-1], positions[:, :-1], teachers)
    reading = sum(len(text) - 1 for text in texts)
    judged, accepted, teacher_tokens, student_tokens = 0, 0, reading, reading
    alive, last, position = torch.arange(len(texts)), ids[:, -1:], positions[:, -1:]  # (rows,), (rows, 1), (rows, 1)
    for number in range(room):
        offset = number * block.size
        chance = chances[alive, :, offset : offset + block.size]  # (rows, 2, size)
        proposed = _propose(student, last, position, students, block, chance[:, 0])  # (rows, size)
        read = torch.cat((last, proposed[:, :-1]), dim=1)
        logits = logits_of(teacher, read_on(teacher, read, position + torch.arange(block.size), teachers)).float()  # (rows, size, V)
        teacher_tokens += read.numel()
        student_tokens += read.numel()
        stands = (logits.topk(min(block.top, logits.shape[-1]), dim=-1).indices == proposed[..., None]).any(-1)  # (rows, size)
        ended = torch.zeros(len(alive), dtype=torch.bool)
        kept = torch.zeros(len(alive), dtype=torch.long)
        for at, row in enumerate(alive.tolist()):
            good = int(stands[at].long().cumprod(0).sum())  # length of the accepted prefix
            tokens = proposed[at, :good].tolist()
            if good < block.size:
                tokens.append(int(drawn(logits[at, good : good + 1] / block.teacher_temperature, chance[at, 1, good : good + 1])))
            kept[at] = len(tokens)
            if eos in tokens:
                tokens = tokens[: tokens.index(eos) + 1]
            tokens = tokens[: max_new_tokens - len(answers[row])]
            judged += min(len(tokens), good + 1)
            accepted += min(len(tokens), good)
            answers[row] += tokens
            views[row].append(top_k(logits[at, : len(tokens)], k))
            ended[at] = tokens[-1] == eos or len(answers[row]) >= max_new_tokens
            last[at, 0] = tokens[-1]
        going = (~ended).nonzero().squeeze(1)
        if not len(going):
            break
        for cache in (*students, *teachers):
            cache.rewind(block.size - kept)
            cache.keep(going)
        alive, last, position = alive[going], last[going], position[going] + kept[going][:, None]
    examples = [Example(list(prompt), answer) for prompt, answer in zip(prompts, answers, strict=True)]
    return Speculated(examples, [_targets(view) for view in views], judged, accepted, teacher_tokens, student_tokens)


def _propose(
    student: Gemma3ForCausalLM,
    last: torch.Tensor,
    position: torch.Tensor,
    caches: Sequence[KeyValues],
    block: Block,
    chance: torch.Tensor,
) -> torch.Tensor:
    """Draw a block token by token: (rows, size). The caches have read all but the block's last token."""
    found = []
    for step in range(block.size):
        logits = logits_of(student, read_on(student, last, position + step, caches)[:, -1])
        last = drawn(logits / block.temperature, chance[:, step])[:, None]
        found.append(last)
    return torch.cat(found, dim=1)


def _targets(view: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> Targets:
    ids, log_probs, tail = (torch.cat(part).numpy() for part in zip(*view, strict=True))
    return Targets(ids, np.asarray(log_probs, dtype=np.float32), np.asarray(tail, dtype=np.float32))
