"""`milpa-node run` as a service: signals, systemd's notifications, and the watchdog that says "alive" only after a look.

Protocol (sd_notify(3)): datagrams of KEY=VALUE lines to the AF_UNIX socket in NOTIFY_SOCKET; WATCHDOG_USEC is how often a kick must come.
Rules:
 * READY=1 once the API answers and the model, if there is one, is loaded. A node without a model is ready too: it waits for a release.
 * A kick follows a whole round of real checks (`node.watchdog`); a failed check is told as STATUS and no kick follows. systemd then
   ends the process and starts it again, which is what helps against a dead thread or a deadlock.
 * SIGHUP reads the settings again: what may change does, what may not is named, a broken file changes nothing.
 * Without NOTIFY_SOCKET nothing is sent; without WATCHDOG_USEC no thread runs.
"""

import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping

from node.app import Daemon
from node.settings import NodeSettings
from node.watchdog import Watchdog
from protocol.errors import MilpaError, Unavailable

LOOK_S = 1.0  # seconds between looks for a SIGHUP
TELL_S = 1.0  # seconds for a word to leave
KICKS = 3  # in each period systemd grants: two may be missed

log = logging.getLogger("milpa.node")


class Supervisor:
    """Who started this process, if it wants to be told how it goes."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        address = environment.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        ours = environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        period = environment.get("WATCHDOG_USEC", "0") if ours and address else "0"
        self.period_s = int(period) / 1e6 if period.isdigit() else 0.0  # 0: nobody watches

    def tell(self, **words: object) -> None:
        """Send `KEY=VALUE` lines. A supervisor that has gone is not an error of ours."""
        if not self._address:
            return
        text = "\n".join(f"{key}={str(value).splitlines()[0] if str(value) else ''}" for key, value in words.items())
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as end:
            end.settimeout(TELL_S)  # a supervisor that does not read must not hold the node up
            end.connect(self._address)
            end.sendall(text.encode())


def run(settings: NodeSettings, *, read_again: Callable[[], NodeSettings], supervisor: Supervisor | None = None) -> None:
    """Until SIGTERM or SIGINT.

    Args:
        read_again: the settings as they are now in file and environment, with the flags of this start; called on SIGHUP.

    Raises:
        as `Daemon.start`.
        Unavailable: a part of the node died.
    """
    supervisor = supervisor or Supervisor()
    daemon, hangup = Daemon(settings), threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: daemon.end())
    signal.signal(signal.SIGHUP, lambda *_: hangup.set())
    daemon.start()
    supervisor.tell(READY=1, STATUS=_state(daemon))
    watching = _watch(daemon, supervisor)
    try:
        while not daemon.wait(LOOK_S):
            if hangup.is_set():
                hangup.clear()
                _reload(daemon, read_again, supervisor)
    finally:
        supervisor.tell(STOPPING=1, STATUS="stopping")
        daemon.stop()
        if watching:
            watching.join(LOOK_S)
    if daemon.failed:
        raise Unavailable("a part of the node died; see the log above, and start it again")


def _reload(daemon: Daemon, read_again: Callable[[], NodeSettings], supervisor: Supervisor) -> None:
    supervisor.tell(RELOADING=1, MONOTONIC_USEC=time.monotonic_ns() // 1000)
    try:
        daemon.reload(read_again())
    except MilpaError as error:  # an unusable file: told in the log and the status, and everything stays as it was
        daemon.reload_failed(str(error))
    supervisor.tell(READY=1, STATUS=_state(daemon))


def _watch(daemon: Daemon, supervisor: Supervisor) -> threading.Thread | None:
    """The thread that kicks, if somebody counts."""
    if not supervisor.period_s:
        return None
    watchdog = Watchdog(daemon)

    def round_after_round() -> None:
        told = ""
        while not daemon.ended:
            trouble = watchdog.trouble()
            if trouble:
                log.error("no sign of life to the supervisor: %s", trouble)
                supervisor.tell(STATUS=trouble)
            else:
                supervisor.tell(WATCHDOG=1)
                if (state := _state(daemon)) != told:
                    told = state
                    supervisor.tell(STATUS=state)
            daemon.wait(supervisor.period_s / KICKS)

    thread = threading.Thread(target=round_after_round, name="milpa-watchdog", daemon=True)
    thread.start()
    return thread


def _state(daemon: Daemon) -> str:
    return daemon.model.why or (f"release {daemon.model.release} answers" if daemon.model.release else "a fixed model answers")
