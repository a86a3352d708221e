"""A whole daemon in this process whose clock is a file: the first 8 bytes are seconds since 1970, little-endian double. For benches.

python -m bench.virtual_daemon CLOCK CONFIG
"""

import mmap
import signal
import struct
import sys
from pathlib import Path

from node.app import Daemon
from node.settings import read


def main() -> None:
    """Until SIGTERM."""
    with Path(sys.argv[1]).open("rb") as file:
        told = mmap.mmap(file.fileno(), 8, prot=mmap.PROT_READ)
    settings, _ = read(Path(sys.argv[2]))
    daemon = Daemon(settings, clock=lambda: struct.unpack("<d", told[:8])[0])
    signal.signal(signal.SIGTERM, lambda *_: daemon.end())
    daemon.start()
    daemon.wait()
    daemon.stop()


if __name__ == "__main__":
    main()
