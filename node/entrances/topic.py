"""Records and answers on the site's own broker, MQTT 5: for controllers that speak MQTT and not HTTP.

    topic.records   a record as JSON, in the form of POST /v1/records
    topic.answers   what became of it; or the request's response topic, with its correlation data, where it names one

Rules:
 * The request is acknowledged after its answer is with the broker. Killed in between, it is delivered again and told the same answer
   (see `taking`), so a sender with a response topic may hear it twice and never misses it.
 * A record that waits for a model or a place in the queue longer than the API's deadline gets an error with the code "unavailable".
   While the disk fails nothing is acknowledged: the broker keeps the queue.
 * An answer never goes where records come from.
"""

import logging
import threading
import time
from typing import Any

import msgspec
from sqlalchemy.exc import DBAPIError

from node.answering import Answering
from node.engine.worker import Busy, NoModel
from node.entrances.taking import refusal, take
from node.parts import Figure, Part
from node.settings import NodeSettings
from protocol.errors import BadInput, Unavailable
from protocol.mqtt import Incoming, Session
from protocol.topics import covers

PAUSE_S = 0.5  # seconds between tries
TROUBLE_S = 10.0  # seconds between tries while the disk fails
GOODBYE_S = 4.0  # seconds for the session to end before a request under way is let go

log = logging.getLogger("milpa.node")


class SiteTopic(Part):
    """One session on the site's broker, beside whatever session the fleet's broker has."""

    name = "topic"

    def __init__(self, settings: NodeSettings, answering: Answering) -> None:
        topic, name = settings.topic, settings.node.name
        self._topic, self._answering, self._deadline_s = topic, answering, settings.api.deadline_s
        self._stop = threading.Event()
        self._taken = 0  # since this process began
        self.session = Session(f"{name}-site", **topic.login(name, what="topic"), on_parked=self._keep)
        self.session.subscribe(topic.records, self._heard)

    def start(self) -> None:
        """Connect when it can."""
        self.session.start()

    def stop(self) -> None:
        """Say goodbye; what was not answered was not acknowledged either, and comes again."""
        self._stop.set()
        self.session.stop()

    def status(self) -> dict[str, Any]:
        """The connection, and how much came through it."""
        return {
            "host": self._topic.host, "port": self._topic.port, "connected": self.session.connected, "problem": self.session.problem,
            "taken": self._taken,
        }  # fmt: skip

    def figures(self) -> tuple[Figure, ...]:
        """The connection."""
        return (("topic_connected", "1 while the site's broker has us", lambda: float(self.session.connected)),)

    def trouble(self) -> str:
        """A dead thread."""
        return "a thread is dead" if not self._stop.is_set() and self.session.broken else ""

    # ---- the session's dispatcher thread

    def _heard(self, message: Incoming) -> None:
        target = message.response_topic or self._topic.answers
        if covers(self._topic.records, target):
            raise BadInput("the answer would go to the topic of the records; name another response topic")
        said = self._said(message.payload)
        if said is not None and self._publish(target, msgspec.json.encode(said), message.correlation):
            self._taken += 1
            return
        end = time.monotonic() + GOODBYE_S
        while self.session.connected and self._stop.is_set() and time.monotonic() < end:
            time.sleep(0.02)  # to return while connected would acknowledge

    def _said(self, data: bytes) -> dict[str, Any] | None:
        """What to say about the record; None when the node stops first."""
        end = time.monotonic() + self._deadline_s
        while not self._stop.is_set():
            try:
                return take(self._answering, data, origin="topic", deadline_s=self._deadline_s)
            except (Busy, NoModel) as error:
                if time.monotonic() > end:
                    return refusal(error, record=_record_id(data))
                self._stop.wait(PAUSE_S)
            except Unavailable as error:
                return refusal(error, record=_record_id(data))
            except DBAPIError as error:
                log.error("the site's topic waits: the database cannot be used: %s", error.orig)
                self._stop.wait(TROUBLE_S)
        return None

    def _publish(self, topic: str, payload: bytes, correlation: bytes) -> bool:
        """Until the broker has it, or (False) the connection under which the request came is gone: then it comes again."""
        connection = self.session.connects
        while not self._stop.is_set() and self.session.connects == connection:
            try:
                self.session.publish(topic, payload, correlation=correlation or None)
            except Unavailable as error:
                log.info("an answer waits for the site's broker: %s", error)
                self._stop.wait(PAUSE_S)
            else:
                return True
        return False

    def _keep(self, message: Incoming, reason: str) -> None:
        """A message that could not be handled is kept with the reason."""
        self._answering.refuse(message.payload.decode("utf-8", "replace"), reason=reason, origin="topic")


def _record_id(data: bytes) -> str:
    return str(msgspec.json.decode(data)["id"])  # it decoded as a record before
