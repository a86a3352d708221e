"""A node whose clock a test moves: `python -m tests.history.node CONFIG CLOCK`. Everything else is the shipped daemon.

CLOCK is a file with one number, seconds to add to the machine's clock; it is read at every look. What waits in the outbox is sent again
after RESEND_S, not after a minute, and a broker that is away is looked for as often: an hour of history would else be an hour of waiting.
"""

import functools
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from node import messaging
from node.app import Daemon
from node.settings import read
from protocol.mqtt import Session
from protocol.outbox import Outbox

RESEND_S = 3.0


def shifted(file: Path) -> Callable[[], float]:
    """The machine's clock and what the file says."""

    def now() -> float:
        text = file.read_text(encoding="ascii").strip()
        return max(0.0, time.time() + float(text or 0.0))

    return now


def _soon_back(*given: Any, **options: Any) -> Session:
    return Session(*given, **{**options, "backoff_cap": RESEND_S})


def main() -> None:
    """Until SIGTERM."""
    messaging.Outbox = functools.partial(Outbox, resend=RESEND_S, aside=RESEND_S)  # type: ignore[misc,assignment]
    messaging.Session = _soon_back  # type: ignore[misc,assignment]
    daemon = Daemon(read(Path(sys.argv[1]), environment={})[0], clock=shifted(Path(sys.argv[2])))
    signal.signal(signal.SIGTERM, lambda *_: daemon.end())
    daemon.start()
    try:
        daemon.wait()
    finally:
        daemon.stop()


if __name__ == "__main__":
    main()
