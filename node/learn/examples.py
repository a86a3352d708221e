"""Which confirmed answers a site trains on, and which it keeps apart to see whether training helped. No I/O.

General records that came with the release are learned among the site's own (rehearsal, Robins 1995), or a site would forget what it has not
seen for a while; they are never held out, so "did it help" is about the site alone.

The part a record belongs to is decided by a hash of the record (`node.store.is_held_out`), so it never moves from one training to the next
and no example is ever both. The general records are parted the same way: what is held out of them tells whether learning did harm.
"""

from collections.abc import Sequence

import msgspec

from node.store import LearningExample, is_held_out
from protocol.digests import digest_bytes
from protocol.errors import NotEnough
from protocol.tasks import Record

MINIMUM = 32  # confirmed examples to train on; fewer teach a site's accidents
RELEASE = "release"  # origin of rehearsed examples
REHEARSED = 0.3  # of what is trained on, as far as the release brought records
MINIMUM_HELD_OUT = 4  # fewer say nothing about whether it helped; one example in five is held out
HELD_OUT_LIMIT = 256  # the newest; more cost time and say nothing new


class Parts(msgspec.Struct, frozen=True):
    """Examples to learn from and examples to be judged by."""

    training: tuple[LearningExample, ...]
    held_out: tuple[LearningExample, ...]


def split(examples: Sequence[LearningExample], *, minimum: int = MINIMUM, minimum_held_out: int = MINIMUM_HELD_OUT) -> Parts:
    """Both parts, in the order given.

    Raises:
        NotEnough: fewer than `minimum` to train on, or than `minimum_held_out` to be judged by.
    """
    parts = Parts(tuple(one for one in examples if not one.held_out), tuple(one for one in examples if one.held_out))
    if len(parts.training) < minimum:
        raise NotEnough(f"{len(parts.training)} confirmed examples to train on, {minimum} are needed; peers and operators confirm answers")
    if len(parts.held_out) < minimum_held_out:
        raise NotEnough(f"{len(parts.held_out)} held-out examples, {minimum_held_out} are needed; more confirmed answers bring more")
    return parts


def with_rehearsal(parts: Parts, general: Sequence[Record], *, share: float = REHEARSED) -> Parts:
    """`share` of the training part are general records then, the first ones of those given that are not held out."""
    count = round(len(parts.training) * share / (1.0 - share))
    known = [LearningExample(record, RELEASE, 1.0, False, False) for record in general if record.target and not _is_held_out(record)]
    return Parts((*parts.training, *known[:count]), parts.held_out)


def general_held_out(general: Sequence[Record]) -> list[Record]:
    """The general records that no site trains on."""
    return [record for record in general if record.target and _is_held_out(record)]


def _is_held_out(record: Record) -> bool:
    return is_held_out(digest_bytes("\0".join((record.task, record.lang, record.source)).encode()))
