"""`milpa-node run` that notes which thread connects where: `python -m bench.guarded NOTES run --config FILE`. For node_offline_answered.

One line a connection attempt or name lookup through Python: the kernel's number of the thread, its name, where to.
"""

import os
import sys
import threading
from typing import Any

from node.cli import main


def note(file: int) -> None:
    """From now on, every attempt is noted; an audit hook cannot be taken away again."""

    def hook(event: str, given: tuple[Any, ...]) -> None:
        if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
            where = given[1] if event != "socket.getaddrinfo" else given[0]
            os.write(file, f"{threading.get_native_id()}\t{threading.current_thread().name}\t{where}\n".encode())

    sys.addaudithook(hook)


if __name__ == "__main__":
    note(os.open(sys.argv.pop(1), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
    main()
