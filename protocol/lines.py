"""Lines between a process and its child: how a job goes in and words come out. Both sides of a round talk to their Flower child so.

Rules:
 * The child's standard input stays open for as long as we live: its end tells the child that we are gone.
 * However the reading ends, the child is gone: asked to stop, then killed after STOP_S.
 * A line that is not of the agreed type is a library's print, and is passed over.
"""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from queue import Empty, Full, Queue
from typing import Any, TypeVar

import msgspec

SLICE_S = 0.2  # seconds between two looks at whether it is over
STOP_S = 5.0  # seconds a child gets to end
WAITING_LINES = 1_000  # a child that says more than is read waits

T = TypeVar("T")


def child_lines(module: str, job: Any, said: type[T], *, environment: Mapping[str, str], over: Callable[[], bool]) -> Iterator[T]:
    """Run `python -m MODULE`, hand it `job` as one line of JSON, and give its lines, until it ends or `over()`."""
    lines: Queue[bytes] = Queue(maxsize=WAITING_LINES)
    decoder = msgspec.json.Decoder(said)
    with subprocess.Popen(
        [sys.executable, "-m", module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=None if os.environ.get("MILPA_FLOWER_LOG") else subprocess.DEVNULL,
        env={**os.environ, **environment},
        cwd=Path(__file__).parents[1],  # `-m` finds us there, installed or not
        start_new_session=True,
    ) as child:
        assert child.stdin is not None and child.stdout is not None
        gone = threading.Event()
        threading.Thread(target=_read, args=(child.stdout, lines, gone), daemon=True).start()
        try:
            child.stdin.write(msgspec.json.encode(job) + b"\n")
            child.stdin.flush()
            while not over():
                try:
                    line = lines.get(timeout=SLICE_S)
                except Empty:
                    continue
                if not line:
                    return
                try:
                    found = decoder.decode(line)
                except msgspec.DecodeError:
                    continue
                yield found
        except BrokenPipeError:
            return
        finally:
            gone.set()
            child.terminate()
            try:
                child.wait(STOP_S)
            except subprocess.TimeoutExpired:
                child.kill()


def first_line() -> bytes:
    """The first line on standard input, read unbuffered: the lock of a buffered reader cannot be left at exit."""
    line = b""
    while not line.endswith(b"\n") and (more := os.read(0, 1)):
        line += more
    return line


def _read(stream: Iterable[bytes], lines: "Queue[bytes]", gone: threading.Event) -> None:
    """Every line of the child's output, and b"" at its end; once nobody reads any more, lines are let go."""
    for line in stream:
        _put(lines, line, gone)
    _put(lines, b"", gone)


def _put(lines: "Queue[bytes]", line: bytes, gone: threading.Event) -> None:
    while not gone.is_set():
        try:
            lines.put(line, timeout=SLICE_S)
        except Full:
            continue
        return
