"""One MQTT 5 session with a broker that may be away. Who may say what is in `topics`; what must not get lost is in `outbox`.

Rules, each learned from a measured trap of paho 2.2 or mosquitto 2.0:
 * Starting never waits for the broker. The network thread connects, backs off with full jitter and connects again, for months.
 * A paho client lives for one connection only. Nothing waits in its memory, so nothing is sent twice behind the caller's back:
   when a connection ends, every publication still in flight fails with `ConnectionLost` and its owner decides.
 * The session is the broker's: clean start is off and a session expiry is set, so what arrived while we slept is still delivered.
 * A message is acknowledged to the broker after its handler has returned, not before; killed in between, it is delivered again.
   The broker sends at most RECEIVE_LIMIT unacknowledged ones, which bounds the queue between the two threads.
 * A handler that raises does not stop anything: the message is handed to `on_parked` with the reason, and acknowledged.
 * A packet larger than the broker's limit (told in CONNACK) is refused here: sent, it would cost the connection, again and again.
 * A connection on which a publication waits SILENCE_LIMIT_S and nothing at all is heard is dead, whatever TCP believes; we end it.
   What was in flight then fails with `Unavailable`: only an end by the other side (`ConnectionLost`) can be a message's own fault.
 * Bytes are counted at the TCP stream, TLS and retransmissions included, as the kernel counts them; where the day's bytes are spent
   (`meter`) the session says goodbye and stays away until there are new ones.

Threads: the network thread owns the socket and only moves packets; the dispatcher runs every handler, one at a time, in order.
Filters of one session should not overlap: the broker delivers once per matching filter. "$share/GROUP/FILTER" shares FILTER with the
group's other sessions; leave it (`unsubscribe`) before a planned absence, or the broker keeps a part of the group's messages for us.
"""

import logging
import queue
import random
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from pathlib import Path
from typing import NamedTuple, Protocol

import msgspec
from paho.mqtt.client import Client, ConnectFlags, DisconnectFlags, MQTTMessage, topic_matches_sub
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from protocol.codec import CONTENT_TYPE
from protocol.errors import BadInput, ConnectionLost, TooLarge, Unavailable
from protocol.links import CONNECT_BYTES, Verdict

PACKET_LIMIT = 256 * 1024  # bytes; what our broker takes, and the limit where a broker names none
IN_FLIGHT_LIMIT = 20  # publications without a PUBACK; paho's own limit, and mosquitto's default
RECEIVE_LIMIT = 40  # deliveries the broker may leave unacknowledged
SESSION_EXPIRY_S = 30 * 86_400  # the broker keeps our queue for a month of absence
CONNECT_DEADLINE_S = 5.0  # TCP and TLS
CONNACK_DEADLINE_S = 10.0  # a refused client certificate under TLS 1.3 looks like a broker that never answers
PUBACK_DEADLINE_S = 10.0
SILENCE_LIMIT_S = 30.0  # without one byte from the broker while a publication waits for its PUBACK
STEADY_S = 10.0  # a connection that lasted this long resets the backoff
LOOP_S = 1.0  # between two looks at deadlines; traffic wakes the loop at once
SPENT_LOOK_S = 30.0  # between two looks whether there are bytes again
EXPIRY_LIMIT_S = 0xFFFF_FFFE  # MQTT 5: 32 bits, the last value means "never"
TCP_SENT, TCP_HEARD, TCP_SEGMENTS = (200, "=Q"), (128, "=Q"), (136, "=II")  # offset and form in Linux's struct tcp_info (since 4.19)

log = logging.getLogger(__name__)


class Incoming(msgspec.Struct, frozen=True):
    """One message as it arrived."""

    topic: str
    payload: bytes
    retained: bool = False
    redelivered: bool = False
    response_topic: str = ""
    correlation: bytes = b""
    expiry: int | None = None  # seconds left when the broker sent it
    content_type: str = ""


Handler = Callable[[Incoming], None]


class _Delivery(msgspec.Struct, frozen=True):
    message: Incoming
    connection: int  # packet ids mean something within their own connection only
    packet: int
    qos: int


class Counts(Protocol):
    """What a session needs of `protocol.meter.Meter`."""

    def spend(self, up: int, down: int, packets: int = 0) -> None:
        """Account for bytes of the stream."""

    def may_connect(self) -> Verdict:
        """Whether a connection is worth opening, or keeping."""


class _Moved(NamedTuple):
    """What a connection has moved so far."""

    up: int = 0
    down: int = 0
    packets: int = 0


class Session:
    """A durable session under one client id.

    Args:
        client_id: one process at a time; the broker ends the older of two.
        will: makes topic and payload that the broker publishes, retained, when we vanish without a word; told the connection's number.
        will_delay: seconds the broker waits before it does, so that a short gap does not look like a death.
        ca_file, cert_file, key_file: TLS when the first is given; the other two for a client certificate.
        session_expiry: seconds the broker keeps our subscriptions and queue while we are away.
        backoff_base, backoff_cap: seconds; the wait before attempt n is uniform in [0, min(cap, base * 2^n)].
        keepalive: seconds without a packet until a ping; the broker calls us dead after one and a half times that.
        meter: told of every byte; says whether there are more to spend. Needs Linux to count.
        on_parked: told of every message no handler could take, with the reason. Called in the dispatcher.
    """

    def __init__(
        self,
        client_id: str,
        host: str,
        port: int,
        *,
        username: str = "",
        password: str = "",
        will: Callable[[int], tuple[str, bytes]] | None = None,
        will_delay: int = 0,
        ca_file: Path | None = None,
        cert_file: Path | None = None,
        key_file: Path | None = None,
        session_expiry: int = SESSION_EXPIRY_S,
        keepalive: int = 60,
        backoff_base: float = 0.5,
        backoff_cap: float = 60.0,
        meter: Counts | None = None,
        on_parked: Callable[[Incoming, str], None] | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self.client_id, self.host, self.port = client_id, host, port
        self._username, self._password = username, password
        self._will, self._will_delay = will, will_delay
        self._ca, self._cert, self._key = ca_file, cert_file, key_file
        self._session_expiry, self._keepalive = session_expiry, keepalive
        self._backoff_base, self._backoff_cap = backoff_base, backoff_cap
        self._on_parked, self._meter = on_parked, meter
        self._moved = _Moved()  # by this connection, as far as the meter knows
        self._heard = 0.0  # monotonic seconds; when the broker last said anything
        self._rng = rng or random.Random()
        self._handlers: list[tuple[str, Handler]] = []
        self._listeners: list[Callable[[bool], None]] = []
        self._granted: dict[str, bool] = {}  # what the broker said to each filter of this process' session, where it has
        self._asked: dict[int, str] = {}  # packet id of a SUBSCRIBE -> filter
        self._waiting: dict[int, tuple[Future[None], float]] = {}  # packet id of a PUBLISH -> its end; when it left, monotonic seconds
        self._early: dict[int, ReasonCode] = {}  # PUBACKs and SUBACKs that overtook the bookkeeping
        self._lock = threading.Lock()  # guards the four above, the client and the listeners; never held while calling into paho
        self._ready = threading.Condition(self._lock)  # connected, or a filter answered
        self._in_flight = threading.BoundedSemaphore(IN_FLIGHT_LIMIT)
        # a delivery may still wait here when the next connection repeats it, hence twice the limit
        self._inbox: queue.Queue[_Delivery | bool | None] = queue.Queue(maxsize=2 * RECEIVE_LIMIT + 16)
        self._client: Client | None = None
        self._connection = 0
        self._up = threading.Event()
        self._stopping = threading.Event()
        self._network: threading.Thread | None = None
        self._dispatcher: threading.Thread | None = None
        self._end = ""  # why the current connection ended, in the broker's words
        self._missed = False  # a delivery of this connection found no room
        self._ended_here = False  # by us, not by the broker
        self.problem = "not started"  # for the operator; empty while connected
        self.maximum_packet = PACKET_LIMIT  # bytes; smaller when the last CONNACK said so
        self.connects = 0
        self.parked = 0

    def subscribe(self, topic_filter: str, handler: Handler) -> None:
        """Have `handler` called, in the dispatcher thread, for what matches. Best before `start`: queued messages come at once."""
        with self._lock:
            self._handlers.append((topic_filter, handler))
            up = self._up.is_set()
        if up:
            self._ask_for(topic_filter)

    def unsubscribe(self, topic_filter: str) -> None:
        """Ask for no more of what matches, for as long as this connection lasts; what is under way is still handled."""
        with self._lock:
            self._granted[topic_filter] = False
        client = self._client
        if client is not None and self._up.is_set():
            client.unsubscribe(topic_filter)

    def on_connected(self, listener: Callable[[bool], None]) -> None:
        """Have `listener(session_present)` called in the dispatcher after every CONNACK: the place for a birth."""
        with self._lock:
            self._listeners.append(listener)

    def start(self) -> None:
        """Start both threads and return at once, broker or no broker."""
        if self._network is not None:
            raise BadInput("this MQTT session was started before; make a new one")
        self.problem = "connecting"
        self._dispatcher = threading.Thread(target=self._dispatch, name=f"mqtt-handlers-{self.client_id}", daemon=True)
        self._network = threading.Thread(target=self._run, name=f"mqtt-{self.client_id}", daemon=True)
        self._dispatcher.start()
        self._network.start()

    def stop(self, timeout: float = 5.0) -> None:
        """Say goodbye (the will is not published) and end both threads, within `timeout` seconds each."""
        self._stopping.set()
        client = self._client
        if client is not None and self._up.is_set():
            client.disconnect()
        if self._network is not None and self._network is not threading.current_thread():
            self._network.join(timeout)
        try:
            self._inbox.put_nowait(None)
        except queue.Full:
            log.warning("%s: %d messages wait for their handlers; the broker will deliver them again", self.client_id, self._inbox.qsize())
        if self._dispatcher is not None and self._dispatcher is not threading.current_thread():
            self._dispatcher.join(timeout)
        self.problem = "stopped"

    @property
    def connected(self) -> bool:
        """Whether the broker accepted us and both threads are alive (paho's own flag stays up when its thread dies)."""
        return self._up.is_set() and not self.broken

    @property
    def connection(self) -> int:
        """Number of the connection, from 1; it counts attempts as well."""
        return self._connection

    @property
    def broken(self) -> bool:
        """Whether a thread that should run does not; for a watchdog. Being offline is not broken."""
        threads = (self._network, self._dispatcher)
        return any(thread is None or not thread.is_alive() for thread in threads)

    def wait_connected(self, timeout: float) -> bool:
        """Wait until connected and every subscription made so far is granted or refused, at most `timeout` seconds.

        What others publish from then on comes; before it, a broker that does not know us yet drops it.
        """
        with self._ready:
            return self._ready.wait_for(
                lambda: self._up.is_set() and all(topic_filter in self._granted for topic_filter, _ in self._handlers), timeout
            )

    def publish(
        self,
        topic: str,
        payload: bytes,
        *,
        retain: bool = False,
        response_topic: str | None = None,
        correlation: bytes | None = None,
        expiry: int | None = None,
        timeout: float = PUBACK_DEADLINE_S,
        content_type: str = CONTENT_TYPE,
    ) -> None:
        """Hand a message to the broker, QoS 1, and wait for its PUBACK: the broker has it, nobody else need have.

        Args:
            expiry: seconds after which the broker throws the message away undelivered.
            content_type: "" says none, which saves its bytes.
            timeout: seconds, for a free place in flight and for the PUBACK.

        Raises:
            TooLarge: over the broker's limit; nothing was sent.
            BadInput: the broker does not let us publish there.
            Unavailable: not connected, or no PUBACK in time (then the broker may have it or not).
        """
        deadline = time.monotonic() + timeout
        handed = self.send(
            topic, payload, retain=retain, response_topic=response_topic, correlation=correlation, expiry=expiry, timeout=timeout,
            content_type=content_type,
        )  # fmt: skip
        try:
            handed.result(max(0.0, deadline - time.monotonic()))
        except FutureTimeout as error:
            raise Unavailable(f"the broker did not acknowledge {topic} within {timeout:g} s") from error

    def send(
        self,
        topic: str,
        payload: bytes,
        *,
        retain: bool = False,
        response_topic: str | None = None,
        correlation: bytes | None = None,
        expiry: int | None = None,
        timeout: float = PUBACK_DEADLINE_S,
        content_type: str = CONTENT_TYPE,
    ) -> "Future[None]":
        """As `publish`, without the wait for the PUBACK: the future ends with None or with one of `publish`'s errors.

        Raises:
            TooLarge, Unavailable: as `publish`; nothing was sent.
        """
        properties, length = _properties(
            PacketTypes.PUBLISH,
            ContentType=content_type or None,
            ResponseTopic=response_topic or None,
            CorrelationData=correlation or None,
            MessageExpiryInterval=None if expiry is None else max(1, min(EXPIRY_LIMIT_S, expiry)),
        )
        size = len(payload) + len(topic.encode()) + length + 9  # bytes; fixed header 5, topic length 2, packet id 2
        if size > self.maximum_packet:
            raise TooLarge(f"a message to {topic} is {size} bytes, the broker takes {self.maximum_packet}")
        if not self._in_flight.acquire(timeout=timeout):
            raise Unavailable(f"{IN_FLIGHT_LIMIT} messages wait for the broker's acknowledgement already")
        handed: Future[None] = Future()
        handed.add_done_callback(lambda _: self._in_flight.release())
        client = self._client
        if client is None or not self._up.is_set():
            handed.set_exception(Unavailable(f"not connected to {self.host}:{self.port}: {self.problem}"))
            return handed
        try:
            info = client.publish(topic, payload, qos=1, retain=retain, properties=properties)
        except ValueError as error:
            handed.set_exception(BadInput(f"cannot publish to {topic!r}: {error}"))
            return handed
        if info.rc != MQTTErrorCode.MQTT_ERR_SUCCESS:  # nothing left; what paho keeps of it dies with this connection's client
            handed.set_exception(Unavailable(f"not connected to {self.host}:{self.port}"))
            return handed
        with self._lock:
            lost = self._client is not client  # it ended meanwhile and its futures were failed without this one
            early = self._early.pop(info.mid, None) if not lost else None
            if early is None and not lost:
                self._waiting[info.mid] = handed, time.monotonic()
        if lost:
            handed.set_exception(ConnectionLost(f"the connection to {self.host}:{self.port} ended"))
        elif early is not None:
            self._end_handing(handed, early)
        return handed

    # ---- network thread

    def _run(self) -> None:
        failed = short = 0  # attempts in a row that brought no connection; connections in a row that did not last
        while not self._stopping.is_set():
            if not self._may_connect():
                self._stopping.wait(SPENT_LOOK_S)
                continue
            began, connects = time.monotonic(), self.connects
            try:
                self._connect_and_serve()
            except (OSError, ValueError) as error:
                if isinstance(error, ssl.SSLError) and self._meter is not None:
                    self._meter.spend(0, CONNECT_BYTES)  # the socket is gone with its count, and a handshake that fails costs as well
                self.problem = f"cannot reach {self.host}:{self.port}: {error}"
            except Exception as error:
                self.problem = f"the connection failed: {error!r}"
                log.exception("%s: the connection failed", self.client_id)
            finally:
                self._fail_all_in_flight()
            if self.connects == connects:
                failed += 1
            else:  # however long it was away, the broker is back: what ends this connection at once is not its absence
                failed, short = 0, 0 if self._missed or time.monotonic() - began > STEADY_S else short + 1
            wait = self._rng.uniform(0.0, min(self._backoff_cap, self._backoff_base * 2.0 ** min(failed or short, 30)))
            if not self._stopping.is_set():
                log.info("%s: %s; next attempt in %.1f s", self.client_id, self.problem, wait)
            self._stopping.wait(wait)

    def _may_connect(self) -> bool:
        verdict = self._meter.may_connect() if self._meter is not None else Verdict(True)
        if not verdict.ok:
            self.problem = f"away until there are bytes again: {verdict.reason}"
        return verdict.ok

    def _connect_and_serve(self) -> None:
        client = self._new_client(self._connection + 1)
        properties, _ = _properties(
            PacketTypes.CONNECT, SessionExpiryInterval=self._session_expiry, ReceiveMaximum=RECEIVE_LIMIT, MaximumPacketSize=PACKET_LIMIT,
        )  # fmt: skip
        with self._lock:
            self._connection += 1
            self._client = client
            self._end, self._ended_here, self._missed = "", False, False
        self._moved, self._heard = _Moved(), time.monotonic()
        try:
            client.connect(self.host, self.port, keepalive=self._keepalive, clean_start=False, properties=properties)
            deadline = time.monotonic() + CONNACK_DEADLINE_S
            while True:
                if client.loop(timeout=LOOP_S) != MQTTErrorCode.MQTT_ERR_SUCCESS or client.socket() is None:
                    self.problem = self._end or f"{self.host}:{self.port} closed the connection"
                    return
                self._count(client.socket())
                if self._stopping.is_set():
                    if not self._up.is_set() or time.monotonic() > deadline:
                        return
                    deadline = min(deadline, time.monotonic() + 1.0)  # for the DISCONNECT to leave
                elif self._end:  # we want out: the queue of deliveries is full
                    self.problem, self._ended_here = self._end, True
                    return
                elif self._missed and self._inbox.empty():  # not sooner: what is handled must be acknowledged on this connection
                    self.problem, self._ended_here = "the broker sent more than fits; connecting again for the rest", True
                    return
                elif not self._up.is_set() and time.monotonic() > deadline:
                    self.problem = f"{self.host}:{self.port} took the connection but sent no CONNACK within {CONNACK_DEADLINE_S:g} s"
                    return
                elif self._silent():
                    self.problem = f"{self.host}:{self.port} said nothing for {SILENCE_LIMIT_S:g} s while publications waited"
                    self._ended_here = True
                    return
                elif self._up.is_set() and not self._may_connect():
                    self._ended_here = True
                    client.disconnect()
                    client.loop(timeout=LOOP_S)
                    return
        finally:
            self._up.clear()
            sock = client.socket()
            if sock is not None:
                self._count(sock)
                sock.close()

    def _silent(self) -> bool:
        """Whether the connection is dead although TCP does not know it."""
        with self._lock:
            oldest = min((left for _, left in self._waiting.values()), default=None)
        return oldest is not None and time.monotonic() - max(oldest, self._heard) > SILENCE_LIMIT_S

    def _count(self, sock: object) -> None:
        """Tell the meter what this connection has moved since the last time, as the kernel counts it."""
        if not isinstance(sock, socket.socket) or not hasattr(socket, "TCP_INFO"):
            return
        try:
            info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        except OSError:
            return  # closed already; it was counted a moment ago
        (sent,), (heard,), (out, back) = (struct.unpack_from(form, info, at) for at, form in (TCP_SENT, TCP_HEARD, TCP_SEGMENTS))
        now, before = _Moved(sent, heard, out + back), self._moved
        self._moved = now
        if now.down > before.down:
            self._heard = time.monotonic()
        if self._meter is not None and now != before:
            self._meter.spend(now.up - before.up, now.down - before.down, now.packets - before.packets)

    def _new_client(self, connection: int) -> Client:
        client = Client(
            CallbackAPIVersion.VERSION2,
            client_id=self.client_id,
            protocol=MQTTProtocolVersion.MQTTv5,
            manual_ack=True,
            reconnect_on_failure=False,
        )
        client.connect_timeout = CONNECT_DEADLINE_S
        client.max_inflight_messages_set(IN_FLIGHT_LIMIT)
        client.max_queued_messages_set(2 * IN_FLIGHT_LIMIT)
        if self._username:
            client.username_pw_set(self._username, self._password)
        if self._ca is not None:
            client.tls_set(
                ca_certs=str(self._ca),
                certfile=str(self._cert) if self._cert else None,
                keyfile=str(self._key) if self._key else None,
            )
        if self._will is not None:
            topic, payload = self._will(connection)
            properties, _ = _properties(PacketTypes.WILLMESSAGE, WillDelayInterval=self._will_delay)
            client.will_set(topic, payload, qos=1, retain=True, properties=properties)
        client.on_connect = self._connacked
        client.on_disconnect = self._disconnected
        client.on_publish = self._pubacked
        client.on_subscribe = self._subacked
        client.on_message = self._delivered
        client.on_socket_register_write = _leave_writing_to_the_loop
        client.on_socket_close = lambda client, userdata, sock: self._count(sock)
        return client

    # Callbacks of paho, all in the network thread. An exception in one would end the loop, so they only move values.

    def _connacked(self, client: Client, userdata: object, flags: ConnectFlags, reason: ReasonCode, properties: Properties | None) -> None:
        if reason.is_failure:
            self._end = f"{self.host}:{self.port} refuses {self.client_id!r}: {reason}"
            return
        self.maximum_packet = min(PACKET_LIMIT, getattr(properties, "MaximumPacketSize", PACKET_LIMIT))
        with self._lock:
            if not flags.session_present or self.connects == 0:  # an older process' filters may be others than ours
                self._granted.clear()
            missing = [topic_filter for topic_filter, _ in self._handlers if not self._granted.get(topic_filter)]
            self.connects += 1
            self.problem = ""
            self._up.set()
            self._ready.notify_all()
        for topic_filter in missing:
            self._ask_for(topic_filter)
        try:
            self._inbox.put_nowait(bool(flags.session_present))
        except queue.Full:
            self._end = "the handlers do not keep up"

    def _disconnected(
        self, client: Client, userdata: object, flags: DisconnectFlags, reason: ReasonCode, properties: Properties | None
    ) -> None:
        self._up.clear()
        if flags.is_disconnect_packet_from_server or not self._end:
            self._end = f"{self.host}:{self.port} ended the connection: {reason}"

    def _pubacked(self, client: Client, userdata: object, packet: int, reason: ReasonCode, properties: Properties | None) -> None:
        with self._lock:
            handed, _ = self._waiting.pop(packet, (None, 0.0))
            if handed is None:
                self._early[packet] = reason
        if handed is not None:
            self._end_handing(handed, reason)

    def _subacked(self, client: Client, userdata: object, packet: int, reasons: list[ReasonCode], properties: Properties | None) -> None:
        with self._lock:
            topic_filter = self._asked.pop(packet, None)
            if topic_filter is None:
                self._early[packet] = reasons[0]
        if topic_filter is not None:
            self._answered(topic_filter, reasons[0])

    def _delivered(self, client: Client, userdata: object, message: MQTTMessage) -> None:
        properties = message.properties
        incoming = Incoming(
            topic=message.topic,
            payload=bytes(message.payload),
            retained=message.retain,
            redelivered=message.dup,
            response_topic=getattr(properties, "ResponseTopic", ""),
            correlation=getattr(properties, "CorrelationData", b""),
            expiry=getattr(properties, "MessageExpiryInterval", None),
            content_type=getattr(properties, "ContentType", ""),
        )
        try:
            self._inbox.put_nowait(_Delivery(incoming, self._connection, message.mid, message.qos))
        except queue.Full:  # a broker that was killed sends more than RECEIVE_LIMIT; never acknowledged, it comes again when we ask anew
            self._missed = True

    def _ask_for(self, topic_filter: str) -> None:
        client = self._client
        if client is None:
            return
        _, packet = client.subscribe(topic_filter, qos=1)
        if packet is not None:
            with self._lock:
                reason = self._early.pop(packet, None)
                if reason is None:
                    self._asked[packet] = topic_filter
            if reason is not None:
                self._answered(topic_filter, reason)

    def _answered(self, topic_filter: str, reason: ReasonCode) -> None:
        with self._ready:
            self._granted[topic_filter] = not reason.is_failure
            self._ready.notify_all()
        if reason.is_failure:
            log.error("%s: the broker refuses the subscription %s: %s", self.client_id, topic_filter, reason)

    def _end_handing(self, handed: "Future[None]", reason: ReasonCode) -> None:
        if not reason.is_failure:
            handed.set_result(None)
        elif reason.getName() == "Packet too large":
            handed.set_exception(TooLarge(f"the broker refuses the message: {reason}"))
        elif reason.getName() == "Not authorized":
            handed.set_exception(BadInput(f"the broker does not let {self.client_id!r} publish there; see its access list"))
        else:
            handed.set_exception(Unavailable(f"the broker refuses the message: {reason}"))

    def _fail_all_in_flight(self) -> None:
        with self._lock:
            lost = [handed for handed, _ in self._waiting.values()]
            self._waiting.clear()
            self._early.clear()
            self._asked.clear()
            self._client = None
        kind = Unavailable if self._ended_here or self._stopping.is_set() else ConnectionLost
        for handed in lost:
            handed.set_exception(kind(f"the connection ended before the acknowledgement: {self.problem}"))

    # ---- dispatcher thread

    def _dispatch(self) -> None:
        while True:
            item = self._inbox.get()
            if item is None or self._stopping.is_set():
                return
            if isinstance(item, bool):
                self._announce(item)
                continue
            self._handle(item.message)
            self._acknowledge(item)

    def _acknowledge(self, item: _Delivery) -> None:
        client = self._client
        if item.qos > 0 and client is not None and item.connection == self._connection:
            try:
                client.ack(item.packet, item.qos)
            except OSError as error:  # the connection went just now: the broker repeats the message, and handlers bear that
                log.info("%s: an acknowledgement did not leave: %s", self.client_id, error)

    def _announce(self, session_present: bool) -> None:
        with self._lock:
            listeners = list(self._listeners)
        for listener in listeners:
            try:
                listener(session_present)
            except Unavailable as error:
                log.info("%s: after connecting: %s", self.client_id, error)
            except Exception:
                log.exception("%s: a listener for new connections failed", self.client_id)

    def _handle(self, message: Incoming) -> None:
        with self._lock:
            handlers = [handler for topic_filter, handler in self._handlers if topic_matches_sub(_unshared(topic_filter), message.topic)]
        if not handlers:  # a filter an earlier process subscribed to under this client id
            self._park(message, "nobody here listens to this topic")
        for handler in handlers:
            try:
                handler(message)
            except Exception as error:
                told = type(error).__name__  # the reason may quote the message; it is kept with it, and not logged
                log.warning("%s: message on %s parked: %s", self.client_id, message.topic, told, exc_info=not isinstance(error, BadInput))
                self._park(message, str(error) or type(error).__name__)

    def _park(self, message: Incoming, reason: str) -> None:
        self.parked += 1
        if self._on_parked is not None:
            try:
                self._on_parked(message, reason)
            except Exception:
                log.exception("%s: could not keep a parked message of %s", self.client_id, message.topic)


def _properties(packet: int, **values: object) -> tuple[Properties, int]:
    """MQTT 5 properties of those values that are not None, and their length in bytes."""
    properties = Properties(packet)  # type: ignore[no-untyped-call]
    for name, value in values.items():
        if value is not None:
            setattr(properties, name, value)
    return properties, len(properties.pack())  # type: ignore[no-untyped-call]


def _unshared(topic_filter: str) -> str:
    """The filter itself, without "$share/GROUP/"."""
    return topic_filter.split("/", 2)[2] if topic_filter.startswith("$share/") else topic_filter


def _leave_writing_to_the_loop(client: Client, userdata: object, sock: object) -> None:
    """With this callback set, paho never writes to the socket in the publisher's thread; its wake-up pair reaches our loop."""
