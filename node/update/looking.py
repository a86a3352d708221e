"""The thread that looks for releases: at start, when one is announced, and by poll with jitter. Answers never wait for it.

The TUF client and the downloader are loaded in that thread, so that a node without a coordinator never pays for them.
"""

import logging
import math
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from node.parts import Part, dead
from node.settings import NodeSettings
from protocol.errors import BadInput, MilpaError

if TYPE_CHECKING:
    from node.energy.power import Power
    from node.engine.live import LiveModel
    from node.update.download import Account
    from node.update.slots import Slots
    from node.update.updater import Emit, Updater

POLL_JITTER = 0.2  # polls come up to this share early, so that a fleet does not ask at once

log = logging.getLogger("milpa.node")


class Releases(Part):
    """Brings releases to the model, or does nothing at all without update.url.

    Raises:
        BadInput: update.url without a root that can be read.
    """

    name = "update"

    def __init__(
        self,
        settings: NodeSettings,
        slots: "Slots",
        model: "LiveModel",
        *,
        emit: "Emit",
        clock: Callable[[], float],
        power: "Power | None" = None,
        link: "Account | None" = None,
    ) -> None:
        self._link = link  # None: nothing limits it
        self._power = power  # None: nothing waits for it
        self._settings, self._slots, self._model, self._emit, self._clock = settings, slots, model, emit, clock
        self._root = read_root(settings)
        self._poll_s = settings.poll_s
        self._announced, self._stop = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self.updater: Updater | None = None  # made by the thread
        self.state: Literal["current", "activated", "refused", "waiting", "busy"] = "current"  # how the last look ended
        self.reason = ""

    def start(self) -> None:
        """Look now and then, if there is an address and the link carries releases."""
        if self._settings.update.url and math.isfinite(self._poll_s):
            self._thread = threading.Thread(target=self._run, name="milpa-update", daemon=True)
            self._thread.start()

    def announce(self) -> None:
        """Look soon: a release was announced."""
        self._announced.set()

    def reload(self, settings: NodeSettings) -> None:
        """The next pause is as long as it says now."""
        self._poll_s = settings.poll_s

    def stop(self) -> None:
        """End the thread; a download goes on at the next start."""
        self._stop.set()
        self._announced.set()
        if self._thread is not None:
            self._thread.join(10)
        if self.updater is not None:
            self.updater.close()

    def status(self) -> dict[str, Any]:
        """How the last look ended."""
        return {"url": self._settings.update.url, "state": self.state, "reason": self.reason}

    def trouble(self) -> str:
        """A dead thread."""
        return dead(self._thread, self._stop)

    def _run(self) -> None:
        while not self._stop.is_set():
            self._announced.clear()
            try:
                outcome = self._updater().check(self._clock())
                self._model.follow()
            except MilpaError as error:
                log.error("the live release does not load: %s", error)
            except Exception:  # a defect or a failing disk must not end updates for ever; the node answers meanwhile
                log.exception("the look for a release failed")
            else:
                if (outcome.state, outcome.reason) != (self.state, self.reason):
                    log.info("releases: %s %s", outcome.state, outcome.reason)
                self.state, self.reason = outcome.state, outcome.reason
            self._announced.wait(min(self._poll_s, threading.TIMEOUT_MAX) * (1.0 - POLL_JITTER * random.random()))

    def _why_wait(self) -> str:
        """Why files are not to be fetched now; "" when they may."""
        verdict = self._power.may("download") if self._power else None
        return "" if verdict is None or verdict.ok else verdict.reason

    def _received(self, seconds: float) -> None:
        if self._power:
            self._power.spent("download", seconds)

    def _updater(self) -> "Updater":
        if self.updater is None:
            from node.update.updater import Updater

            self.updater = Updater(
                self._settings.state_dir, url=self._settings.update.url, root=self._root, self_test=self._model.self_test,
                activate=self._model.activate, emit=self._emit, role=self._settings.node.role,
                daily_bytes=self._settings.update.max_bytes_a_day, slots=self._slots, wait_for=self._why_wait, link=self._link,
                received=self._received,
            )  # fmt: skip
        return self.updater


def read_root(settings: NodeSettings) -> bytes:
    """The first trusted root metadata; b"" on a node without updates.

    Raises:
        BadInput: none was given, or it cannot be read.
    """
    update = settings.update
    if not update.url:
        return b""
    if not update.root_file:
        raise BadInput("update.url is set but update.root_file is not: bring the coordinator's root.json by hand, once")
    try:
        return Path(update.root_file).expanduser().read_bytes()
    except OSError as error:
        raise BadInput(f"cannot read update.root_file {update.root_file}: {error.strerror}") from error
