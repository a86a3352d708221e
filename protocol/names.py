"""What may be called how. No I/O.

A name becomes a topic level, a folder and a row, so it is short, lower case and safe in all three.
"""

import difflib
import re
from collections.abc import Iterable

from protocol.errors import BadInput, UnknownName

NAME_LIMIT = 48  # characters; a topic of three names stays under 200 bytes
_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,46}[a-z0-9])?")
_DIGEST = re.compile(r"[0-9a-f]{64}")


def checked_name(value: str, *, what: str = "name") -> str:
    """Return `value` if it can name a site, node or peer.

    Raises:
        BadInput: anything but 1 to 48 of a-z, 0-9 and inner hyphens.
    """
    if not _NAME.fullmatch(value):
        raise BadInput(f"{what} {value!r} is not usable: 1 to {NAME_LIMIT} of a-z, 0-9 and '-', no '-' at the ends")
    return value


def checked_digest(value: str) -> str:
    """Return `value` if it is a SHA-256 in lower-case hexadecimal.

    Raises:
        BadInput: it is not.
    """
    if not _DIGEST.fullmatch(value):
        raise BadInput(f"{value!r} is not a SHA-256 digest (64 lower-case hexadecimal digits)")
    return value


def known(value: str, among: Iterable[str], *, what: str) -> str:
    """Return `value` if it is one of `among`.

    Raises:
        UnknownName: it is not; the message suggests the nearest known name and lists all.
    """
    names = sorted(among)
    if value in names:
        return value
    near = difflib.get_close_matches(value, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise UnknownName(f"unknown {what} {value!r}{hint} (known: {', '.join(names) or 'none'})")
