"""What a student minimises: its targets' cross-entropy, mixed with the teacher's cached view where there is one."""

from collections.abc import Sequence

import numpy as np
import torch

from coordinator.forge.targets.cache import TargetCache, Targets
from coordinator.forge.training.losses import sparse_kl
from protocol.models.feed import Batch
from protocol.models.tokenizer import Example, Tokenizer
from protocol.models.training import Loss, View
from protocol.tasks import Task


def token_weights(tokenizer: Tokenizer, task: Task, examples: Sequence[Example], *, verdict: float) -> list[torch.Tensor]:
    """How much each target token counts: `verdict` up to the code's colon, 1 after it; 1 everywhere for free text.

    The code is one or two tokens of seventeen, and what is hard about them all.
    """
    (colon,) = tokenizer.encode(":", bos=False)
    found = []
    for example in examples:
        weights = torch.ones(len(example.target))
        if task.codes and colon in example.target:
            weights[: example.target.index(colon) + 1] = verdict
        found.append(weights)
    return found


def distillation_loss(
    examples: Sequence[Example], *, weights: Sequence[torch.Tensor] | None = None, cache: TargetCache | None = None, alpha: float = 0.0
) -> Loss:
    """(1 - alpha) * cross-entropy + alpha * sparse KL on positions the teacher spoke for; cross-entropy alone on the others.

    A weighted mean over positions when `weights` has one number a target token of each example. Without a cache it is cross-entropy.
    """

    def loss(view: View, batch: Batch) -> torch.Tensor:
        logits = view.logits
        each = torch.nn.functional.cross_entropy(logits, batch.targets, reduction="none")  # (n,)
        where: list[int] = []
        views: list[Targets] = []
        at = 0
        for i in batch.index:
            n = len(examples[i].target)
            found = cache.get(examples[i]) if cache is not None else None
            if found is not None:
                views.append(found)
                where += range(at, at + n)
            at += n
        if views:
            ids, log_probs, tail = (torch.from_numpy(np.concatenate(part)) for part in zip(*views, strict=True))
            spoken = torch.tensor(where)
            mixed = (1.0 - alpha) * each[spoken] + alpha * sparse_kl(logits[spoken], ids, log_probs, tail)
            each = each.index_copy(0, spoken, mixed)
        if weights is None:
            return each.mean()
        weight = torch.cat([weights[i] for i in batch.index])
        return (each * weight).sum() / weight.sum()

    return loss
