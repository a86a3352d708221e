"""Lines between a process and its child: how a job goes in and words come out. Both sides of a round talk to their Flower child so."""

import os
from collections.abc import Iterable
from queue import SimpleQueue


def read_lines(stream: Iterable[bytes], lines: "SimpleQueue[bytes]") -> None:
    """Put every line of a child's output into `lines`, and b"" at its end. For a thread of its own."""
    for line in stream:
        lines.put(line)
    lines.put(b"")


def first_line() -> bytes:
    """The first line on standard input, read unbuffered: the lock of a buffered reader cannot be left at exit."""
    line = b""
    while not line.endswith(b"\n") and (more := os.read(0, 1)):
        line += more
    return line
