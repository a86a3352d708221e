"""Damaged inputs from good ones: what a bad link, a bad disk, a bug or a bad neighbour sends. No I/O.

Input number i of a seed depends on nothing but (seed, name, i): any of them can be made again alone, and a run can go on where it ended.
"""

import random
import struct
from collections.abc import Sequence

SIZE_LIMIT = 80_000  # bytes of one input: above the limit of a message, below that of a body
INTERESTING = (0, 1, 2, 3, 7, 8, 16, 31, 32, 64, 100, 127, 128, 255, 256, 1024, 32767, 32768, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1,
               2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1)  # fmt: skip
WORDS = (
    b"null", b"true", b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-0", b"0.1e-400", b"9" * 400, b'"', b"'", b"{", b"}", b"[", b"]", b",",
    b":", b"\\ud800", b"\\u0000", b"\\", b"\x00", b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\r\n", b"\n",
    b"%00", b"%ff", b"&", b"=", b";", b"..", b"/", b"[" * 2_000, b'{"a":' * 500, b"A" * 5_000, "ñ¿…𝔛".encode(), b"\xe2\x80\xae", b"\x1b[2J",
    b"0x10", b"1_000", b"inf",
)  # fmt: skip


def mutated(seed: int, name: str, number: int, corpus: Sequence[bytes]) -> bytes:
    """Input `number`: one of the corpus with one to eight damages."""
    rng = random.Random(f"{seed} {name} {number}")
    data = bytearray(rng.choice(corpus))
    for _ in range(rng.choice((1, 1, 1, 2, 2, 4, 8))):
        rng.choice(DAMAGES)(rng, data, corpus)
    return bytes(data[:SIZE_LIMIT])


def _at(rng: random.Random, data: bytearray) -> int:
    return rng.randrange(len(data)) if data else 0


def _slice(rng: random.Random, data: Sequence[int], longest: int = 64) -> slice:
    start = rng.randrange(len(data) + 1)
    return slice(start, start + rng.randrange(1, longest))


def _flip(rng: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    if data:
        data[_at(rng, data)] ^= 1 << rng.randrange(8)


def _byte(rng: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    if data:
        data[_at(rng, data)] = rng.randrange(256)


def _number(rng: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    form = rng.choice(("<B", "<H", "<I", "<Q", ">H", ">I", ">Q"))
    size = struct.calcsize(form)
    at = _at(rng, data)
    data[at : at + size] = struct.pack(form, rng.choice(INTERESTING) & ((1 << 8 * size) - 1))


def _float(rng: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    at = _at(rng, data)
    data[at : at + 4] = struct.pack("<f", rng.choice((float("nan"), float("inf"), -float("inf"), -0.0, 1e-40, 3e38)))


def _decimal(rng: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    """Another number where one is written in digits."""
    digits = [at for at, sign in enumerate(data) if 48 <= sign <= 57]
    if digits:
        at = rng.choice(digits)
        told = str(rng.choice(INTERESTING) * rng.choice((1, 1, -1))) + rng.choice(("", "", ".5", "e9", "e400"))
        data[at : at + 1] = told.encode()


def _word(rng: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    at = _at(rng, data)
    data[at : at + rng.choice((0, 0, 1, 4))] = rng.choice(WORDS)


def _delete(rng: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    del data[_slice(rng, data)]


def _repeat(rng: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    piece = bytes(data[_slice(rng, data)])
    at = _at(rng, data)
    data[at:at] = piece * rng.choice((1, 1, 2, 16, 200))


def _cut(rng: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    del data[_at(rng, data) :]


def _splice(rng: random.Random, data: bytearray, corpus: Sequence[bytes]) -> None:
    """The front of this one, the end of another."""
    other = rng.choice(corpus)
    data[_at(rng, data) :] = other[rng.randrange(len(other) + 1) :]


def _borrow(rng: random.Random, data: bytearray, corpus: Sequence[bytes]) -> None:
    """A piece of another one in the middle."""
    other = rng.choice(corpus)
    at = _at(rng, data)
    data[at : at + rng.choice((0, 8))] = other[_slice(rng, other)]


def _noise(rng: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    at = _at(rng, data)
    data[at:at] = rng.randbytes(rng.choice((1, 2, 8, 64)))


DAMAGES = (
    _flip, _byte, _byte, _number, _number, _float, _decimal, _decimal, _word, _word, _delete, _repeat, _cut, _splice, _borrow, _noise,
)  # fmt: skip
