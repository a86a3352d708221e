"""What one look of the doctor says."""

from typing import Literal

import msgspec


class Finding(msgspec.Struct, frozen=True):
    """One thing looked at."""

    what: str
    state: Literal["good", "warn", "bad"]
    found: str
    advice: str = ""
