"""Which worker does which record, when several processes share a job: by hash, so that nobody has to ask anybody.

Rules: the same record goes to the same worker of N wherever it runs; every record goes to exactly one of them. No I/O.
"""

import hashlib
from collections.abc import Sequence

import msgspec

from protocol.errors import BadInput
from protocol.tasks import Record


class Worker(msgspec.Struct, frozen=True):
    """Process `number` of `of` that share a job."""

    number: int = 0
    of: int = 1

    @classmethod
    def named(cls, text: str) -> "Worker":
        """ "0/4" to "3/4".

        Raises:
            BadInput: anything else.
        """
        number, slash, of = text.partition("/")
        if not (slash and number.isdecimal() and of.isdecimal() and int(number) < int(of) <= 9999):
            raise BadInput(f"shard {text!r} is not usable: say I/N with I from 0 to N - 1, such as 0/4")
        return cls(int(number), int(of))

    def share(self, records: Sequence[Record]) -> list[Record]:
        """Those of `records` that are this worker's, in order."""
        return [record for record in records if self.does(record.id)] if self.of > 1 else list(records)

    def does(self, name: str) -> bool:
        """Whether the thing of that name is this worker's."""
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) % self.of == self.number
