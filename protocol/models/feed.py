"""What a step learns from: batches of rows, and the feeds that say which examples share one.

A feed is asked for batches for as long as training goes on. `Epochs` shuffles a fixed set; others may grow theirs while training runs
(a student's own answers, scored by the teacher). Everything random comes from a seed, so a resumed training sees what it would have seen.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from protocol.digests import digest_value
from protocol.errors import NotEnough
from protocol.models.tokenizer import Example

CHUNK_BATCHES = 32  # rows are sorted by length inside chunks of this many batches: little padding, still shuffled


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right. Positions are those that predict a target token."""

    index: list[int]  # which examples, in row order
    ids: torch.Tensor  # (B, T)
    rows: torch.Tensor  # (n,) row of each predicting position
    columns: torch.Tensor  # (n,)
    targets: torch.Tensor  # (n,) the token to predict there

    @property
    def tokens(self) -> int:
        """Tokens in the batch, with padding: what it costs."""
        return self.ids.numel()

    def to(self, device: torch.device) -> "Batch":
        """The same rows where the model is."""
        return Batch(self.index, *(part.to(device) for part in (self.ids, self.rows, self.columns, self.targets)))


class Feed(Protocol):
    """Which examples share a batch, and in which order."""

    @property
    def examples(self) -> Sequence[Example]:
        """All that a batch may name; may grow at its end while training runs."""
        ...

    @property
    def key(self) -> str:
        """Names this feed's plan: a saved training state of another key is not gone on with."""
        ...

    @property
    def batches_an_epoch(self) -> int:
        """For limits in epochs."""
        ...

    def batches(self, skip: int) -> Iterator[list[int]]:
        """Endless lists of places in `examples`, the first `skip` of them left out."""
        ...


class Epochs:
    """A fixed set: every example once an epoch, shuffled, rows of like length together.

    Raises:
        NotEnough: no examples.
    """

    def __init__(self, examples: Sequence[Example], *, batch_tokens: int = 2048, seed: int = 0) -> None:
        if not examples:
            raise NotEnough("there are 0 examples to train on; at least 1 is needed")
        self.examples, self.batch_tokens, self.seed = examples, batch_tokens, seed
        self._lengths = [len(one.prompt) + len(one.target) - 1 for one in examples]

    @property
    def key(self) -> str:
        """Of the examples themselves, the size of a batch and the seed."""
        return digest_value([list(self.examples), self.batch_tokens, self.seed])

    @property
    def batches_an_epoch(self) -> int:
        """As the first epoch has them."""
        return len(plan(self._lengths, batch_tokens=self.batch_tokens, generator=torch.Generator().manual_seed(self.seed)))

    def batches(self, skip: int) -> Iterator[list[int]]:
        """Epoch after epoch, each in an order of its own."""
        epoch = 0
        while True:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            found = plan(self._lengths, batch_tokens=self.batch_tokens, generator=generator)
            yield from found[skip:]
            skip = max(0, skip - len(found))
            epoch += 1


def collate(examples: Sequence[Example], index: Sequence[int]) -> Batch:
    """Rows of prompt + target without the last token (nothing follows it)."""
    chosen = [examples[i] for i in index]
    longest = max(len(one.prompt) + len(one.target) - 1 for one in chosen)
    ids = torch.zeros(len(chosen), longest, dtype=torch.long)
    rows: list[int] = []
    columns: list[int] = []
    targets: list[int] = []
    for row, one in enumerate(chosen):
        text = [*one.prompt, *one.target[:-1]]
        ids[row, : len(text)] = torch.tensor(text)
        rows += [row] * len(one.target)
        columns += range(len(one.prompt) - 1, len(text))
        targets += one.target
    return Batch(list(index), ids, torch.tensor(rows), torch.tensor(columns), torch.tensor(targets))


def plan(lengths: Sequence[int], *, batch_tokens: int, generator: torch.Generator | None) -> list[list[int]]:
    """Which examples share a batch: shuffled (with a generator), sorted by length inside chunks, at most `batch_tokens` with padding."""
    order = torch.randperm(len(lengths), generator=generator).tolist() if generator else list(range(len(lengths)))
    mean = max(1, sum(lengths) // max(1, len(lengths)))
    chunk = max(1, CHUNK_BATCHES * batch_tokens // mean)
    batches: list[list[int]] = []
    for begin in range(0, len(order), chunk):
        current: list[int] = []
        for i in sorted(order[begin : begin + chunk], key=lambda i: lengths[i]):
            if current and (len(current) + 1) * lengths[i] > batch_tokens:
                batches.append(current)
                current = []
            current.append(i)
        batches.append(current)
    if generator:
        batches = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
    return batches
