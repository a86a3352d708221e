"""What the node listens on and connects to: its port, the brokers, the SuperLink, the coordinator. Each look has a deadline of seconds.

A broker is asked for real: a CONNECT with the node's own name and secrets, under a client id of the doctor's, so that a running node keeps
its session. Why it refuses is in its CONNACK or in the TLS error, and each of the usual reasons has an advice.
"""

import email.utils
import http.client
import ssl
import time
import urllib.parse
from collections.abc import Mapping
from contextlib import closing
from typing import Any

from node.api.server import bind
from node.doctor.finding import Finding
from node.settings import Account, NodeSettings, named_file, secret
from protocol.errors import BadInput, PortInUse
from protocol.flower import FLEET_HEADER, authorities
from protocol.mqtt import Session

KNOCK_S = 6.0  # seconds until the broker must have said something
HTTP_S = 3.0
SKEW_S = 300.0  # seconds the coordinator's clock may differ
REFUSALS = (  # what the problem says -> whether it is ours to repair, and how
    ("Bad user name or password", "bad", "the password is wrong: fetch it from the coordinator again"),
    ("Not authorized", "bad", "the broker does not know this user or password: enrol the node, or fetch its password again"),
    ("Banned", "bad", "the broker has banned this client"),
    ("Hostname mismatch", "bad", "its certificate is for another name: use that name as the host, or issue it anew"),
    ("IP address mismatch", "bad", "its certificate is for another address: use its name as the host, or issue it anew"),
    ("certificate has expired", "bad", "its certificate expired, or this node's clock is wrong"),
    ("certificate is not yet valid", "bad", "this node's clock is behind: set it"),
    ("certificate verify failed", "bad", "ca_file is not of the authority that signed its certificate: bring the right one"),
    ("WRONG_VERSION_NUMBER", "bad", "it speaks without TLS on that port: take the TLS port, or leave out ca_file"),
    ("alert", "bad", "the broker does not take this node's certificate: is it of the authority the broker trusts, and not expired?"),
    ("sent no CONNACK", "bad", "the broker does not take this node's certificate, or it is no MQTT broker"),
    ("closed the connection", "bad", "the broker wants TLS or another certificate there; its log says which"),
    ("ended the connection", "bad", "the broker wants TLS or another certificate there; its log says which"),
    ("without response", "bad", "it may want TLS: bring the file of who signs its certificate"),
    ("Connection refused", "warn", "nothing listens there: start it, or correct host and port; answers go on"),
    ("Name or service not known", "warn", "no such host: correct the name; without a name server use an address"),
    ("name resolution", "warn", "no name server answers: check the link, or use an address"),
    ("unreachable", "warn", "no way there: check the link; answers go on, questions wait"),
    ("timed out", "warn", "nothing answers: check the link and the firewall; answers go on, questions wait"),
)


def port(settings: NodeSettings, *, running: bool) -> Finding:
    """Whether the API can listen."""
    host, number = settings.api.host, settings.api.port
    if running:
        return Finding("port", "good", "the node answers")
    try:
        bind(host, number, key=secret(settings.api.key_file, what="api.key_file")).close()
    except PortInUse as error:
        return Finding("port", "bad", str(error), "find it with: ss -ltnp")
    except BadInput as error:
        return Finding("port", "bad", str(error))
    return Finding("port", "good", f"{number} on {host} is free (no node runs)")


def broker(settings: NodeSettings, *, running: dict[str, Any]) -> Finding:
    """Whether the fleet's broker takes this node; a node works without."""
    if not settings.broker.host:
        return Finding("broker", "good", "none configured: this node lives alone")
    told = running.get("broker")
    waiting = f"{told.get('outbox')} messages wait; " if isinstance(told, dict) else ""
    problem = _told(told)
    return asked("broker", settings.broker, settings.node.name, problem=problem, waiting=waiting)


def link(running: dict[str, Any]) -> list[Finding]:
    """What today's bytes still reach for, where the running node's link limits them; and what no connection survives."""
    told, broker, found = running.get("link"), running.get("broker"), []
    if isinstance(told, dict) and told.get("bytes_a_day"):
        spent = f"{told['up_bytes'] + told['down_bytes']} of {told['bytes_a_day']} bytes of this day on a {told['class']} link"
        advice = "messages wait, the most important first; allow more with link.bytes_a_day, or look what talks so much"
        found.append(Finding("link", "warn" if told.get("problem") else "good", spent, advice if told.get("problem") else ""))
    if isinstance(broker, dict) and broker.get("set_aside"):
        what = f"{broker['set_aside']} messages ended connections and are tried once an hour"
        found.append(Finding("link", "warn", what, "a broker's limit, or a very bad link; what never leaves is parked with the reason"))
    return found


def topic(settings: NodeSettings, *, running: dict[str, Any]) -> list[Finding]:
    """Whether the site's own broker takes this node, where one is named."""
    if not settings.topic.host:
        return []
    return [asked("topic", settings.topic, settings.node.name, problem=_told(running.get("topic")))]


def asked(what: str, section: Account, name: str, *, problem: str | None, waiting: str = "") -> Finding:
    """What a broker says to this node.

    Args:
        problem: what the running node met; None: ask here.
    """
    where = f"{section.host}:{section.port}"
    try:
        problem = knock(what, section, name) if problem is None else problem
    except BadInput as error:
        return Finding(what, "bad", str(error))
    if not problem:
        return Finding(what, "good", f"{where} takes us as {section.username or name!r}")
    state, advice = diagnosed(problem)
    return Finding(what, state, problem, waiting + advice)


def knock(what: str, section: Account, name: str) -> str:
    """Connect once; "" when the broker takes us, else its first word against it.

    Raises:
        BadInput: a secret that cannot be read.
    """
    session = Session(f"{name}-doctor", **section.login(name, what=what), session_expiry=0)
    session.start()
    try:
        end = time.monotonic() + KNOCK_S
        while time.monotonic() < end:
            if session.wait_connected(0.1):
                return ""
            if session.problem not in ("connecting", "not started", ""):
                return session.problem
        return f"{section.host}:{section.port} took the connection and sent no CONNACK within {KNOCK_S:g} s"
    finally:
        session.stop()


def diagnosed(problem: str) -> tuple[Any, str]:
    """State and advice for a session's problem."""
    return next(
        ((state, advice) for words, state, advice in REFUSALS if words.lower() in problem.lower()),
        ("warn", "check the link; answers go on, questions wait"),
    )


def superlink(settings: NodeSettings) -> list[Finding]:
    """Whether the SuperLink is the one we trust and takes the fleet's token, where rounds are configured."""
    learn = settings.learn
    if not learn.superlink:
        return []
    host, _, number = learn.superlink.rpartition(":")
    try:
        token = secret(learn.fleet_token_file, what="learn.fleet_token_file")
        trusted = authorities(named_file(learn.superlink_ca_file))
        tls = ssl.create_default_context(cadata=trusted.decode("ascii")) if trusted else None
        headers = {FLEET_HEADER: token} if token else {}
        status = _answer(host, int(number), "GET", "/v1/fleet/doctor", tls=tls, headers=headers).status
    except BadInput as error:
        return [Finding("SuperLink", "bad", str(error))]
    except (OSError, http.client.HTTPException, ValueError) as error:
        state, advice = diagnosed(str(error))
        return [Finding("SuperLink", state, f"{learn.superlink}: {error}", advice)]
    if status == http.client.FORBIDDEN:
        return [Finding("SuperLink", "bad", f"{learn.superlink} refuses the fleet's token", "bring its fleet.token again")]
    return [Finding("SuperLink", "good", f"{learn.superlink} answers{' over TLS' if tls else ''}")]


def spool(running: dict[str, Any]) -> list[Finding]:
    """Whether the spool folder goes on, where there is one."""
    told = running.get("spool")
    if not isinstance(told, dict):
        return []
    if told.get("problem"):
        return [Finding("spool", "warn", str(told["problem"]), f"{told.get('in')} files wait in {told.get('folder')}/in")]
    return [Finding("spool", "good", f"{told.get('in')} files wait, {told.get('out')} answers to collect")]


def coordinator(settings: NodeSettings, now: float) -> list[Finding]:
    """Whether releases can be fetched, and whether both clocks agree."""
    if not settings.update.url:
        return []
    address = urllib.parse.urlsplit(settings.update.url)
    tls = ssl.create_default_context() if address.scheme == "https" else None
    try:
        path = address.path.rstrip("/") + "/metadata/timestamp.json"
        told = _answer(address.hostname or "", address.port, "HEAD", path, tls=tls).getheader("Date", "")
    except (OSError, http.client.HTTPException, ValueError) as error:
        return [Finding("coordinator", "warn", f"{settings.update.url} does not answer: {error}", "updates wait; answers go on")]
    try:
        skew = now - email.utils.parsedate_to_datetime(told or "").timestamp()
    except (ValueError, TypeError):
        return [Finding("coordinator", "good", f"{settings.update.url} answers")]
    if abs(skew) > SKEW_S:
        side = "ahead of" if skew > 0 else "behind"
        return [Finding("coordinator", "warn", f"this clock is {_span(abs(skew))} {side} the coordinator's", "set the one that is wrong")]
    return [Finding("coordinator", "good", f"{settings.update.url} answers; the clocks agree")]


def updates(running: dict[str, Any]) -> list[Finding]:
    """How the running node's last look for a release ended."""
    told = running.get("update")
    if not isinstance(told, dict) or not told.get("url"):
        return []
    state, reason = told.get("state"), str(told.get("reason") or "")
    if state == "refused":
        return [Finding("coordinator", "bad", reason, "look at the coordinator's rollout and at this node's clock; answers go on")]
    if state == "waiting":
        return [Finding("coordinator", "warn", reason, "updates wait; answers go on")]
    return [Finding("coordinator", "good", f"the last look for a release ended well ({state})")]


def _answer(
    host: str, port: int | None, method: str, path: str, *, tls: ssl.SSLContext | None, headers: Mapping[str, str] | None = None
) -> http.client.HTTPResponse:
    """The head of one answer, over TLS where there is a context; its body is not read.

    Raises:
        OSError, http.client.HTTPException, ValueError: none came.
    """
    if tls:
        connection: http.client.HTTPConnection = http.client.HTTPSConnection(host, port, timeout=HTTP_S, context=tls)
    else:
        connection = http.client.HTTPConnection(host, port, timeout=HTTP_S)
    with closing(connection):
        connection.request(method, path, headers=headers or {})
        return connection.getresponse()


def _told(told: object) -> str | None:
    """What a running node says of its session: "" connected, the problem, or None when it runs without."""
    if not isinstance(told, dict):
        return None
    return "" if told.get("connected") else str(told.get("problem"))


def _span(seconds: float) -> str:
    return f"{seconds / 86_400:.1f} days" if seconds > 2 * 86_400 else f"{seconds / 60:.0f} minutes"
