"""What the command line does with a node: through its API when it runs, on its folder when it does not."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import msgspec

from node.settings import NodeSettings, secret
from protocol.codec import UNREADABLE
from protocol.errors import BadInput, Unavailable
from protocol.ports import is_loopback
from protocol.tasks import Record, task_named

CONNECT_S = 2.0  # seconds; the daemon is on this machine
RELOAD_S = 10.0  # seconds for a node to read its settings again
PATIENCE_S = 5.0  # seconds beyond the node's own deadline


class RunFile(msgspec.Struct, frozen=True):
    """`run.json`: how to reach the daemon of this state folder."""

    pid: int
    url: str
    boot: str
    started: int  # seconds since 1970


def read_run_file(state_dir: Path) -> RunFile | None:
    """Where the daemon of `state_dir` is, if it runs."""
    try:
        found = msgspec.json.decode((state_dir / "run.json").read_bytes(), type=RunFile)
    except (OSError, *UNREADABLE):
        return None
    return found if Path(f"/proc/{found.pid}").exists() or not Path("/proc/self").exists() else None


def refuse_root(settings: NodeSettings, *, instead: str) -> None:
    """A service's folder belongs to its own user; what root leaves there is closed to the node for good.

    Raises:
        BadInput: this is root, and the state folder is another user's; `instead` says what to do.
    """
    state = settings.state_dir
    if os.geteuid() == 0 and state.exists() and (owner := state.stat().st_uid) != 0:
        raise BadInput(f"{state} belongs to user {owner}, and what root writes there the node could not use again; {instead}")


def address(settings: NodeSettings) -> str:
    """Where the node's API should be."""
    found = read_run_file(settings.state_dir)
    if found is not None:
        return found.url
    host = settings.api.host if is_loopback(settings.api.host) else "127.0.0.1"
    return f"http://{host}:{settings.api.port}"


def ask_daemon(settings: NodeSettings, text: str, *, lang: str, task: str) -> dict[str, Any] | None:
    """The running node's answer, `x_milpa` of it; None when no node runs.

    Raises:
        MilpaError: what the node says, in its words.
    """
    body = {"prompt": text, "x_milpa": {"lang": lang, "task": task}}
    answer = call(settings, "POST", "/v1/completions", body)
    return None if answer is None else dict(answer["x_milpa"])


def ask_here(settings: NodeSettings, text: str, *, lang: str) -> dict[str, Any]:
    """Load the active model, or the fixed one, and ask it once.

    Raises:
        Unavailable: there is no model on this machine.
        BadInput, NotEnough, DoesNotFit: see `Engine`.
    """
    from protocol.codec import checked_record
    from protocol.confidence import features, judge

    speaker = load_any(settings)
    try:
        task = task_named(speaker.task)
        record = checked_record(Record(id="ask", task=task.name, source=text, lang=lang, site=settings.site))
        generation = speaker.engine.generate(task.prompt(record), max_new_tokens=task.max_new_tokens, form=task.form)
        answer = task.parse(generation.text)
        judgement = judge(
            features(generation), calibration=speaker.calibration, threshold=None, budget=settings.model.budget,
            in_form=bool(answer.verdict) or not task.codes,
        )  # fmt: skip
        return {
            "text": answer.text, "verdict": answer.verdict, "sentence": answer.sentence, "confidence": judgement.confidence,
            "reason": judgement.reason, "provisional": False, "stored": False, "task": task.name, "release": speaker.release,
            "model_digest": speaker.model_digest, "adapter_digest": speaker.adapter_digest, "seconds": generation.seconds,
        }  # fmt: skip
    finally:
        speaker.engine.close()


def load_any(settings: NodeSettings) -> Any:
    """The fixed model of the settings, or the active release's, loaded.

    Raises:
        Unavailable: there is neither.
    """
    from node.engine.loading import load_fixed, load_release
    from node.update.slots import Slots

    model = settings.model
    if model.path:
        return load_fixed(model)
    active = Slots(settings.state_dir, role=settings.node.role).active() if settings.state_dir.is_dir() else None
    if active is None:
        raise Unavailable(f"no node runs here and {settings.state_dir} has no release yet; start `milpa-node run`, or name a --model")
    return load_release(active, threads=model.threads, context=model.context)


def daemon_status(settings: NodeSettings) -> dict[str, Any] | None:
    """GET /v1/status of the running node, or None."""
    return call(settings, "GET", "/v1/status", None)


def status_on_disk(settings: NodeSettings) -> dict[str, Any]:
    """What can be told without the daemon."""
    from node.store import Store, counts
    from node.update.slots import Slots

    state = settings.state_dir
    found: dict[str, Any] = {"node": settings.node.name, "running": False, "state_dir": str(state), "release": 0, "states": {}}
    if (state / "node.db").is_file():
        store = Store(state / "node.db")
        with store.transaction() as session:
            found["states"] = counts(session)
        store.close()
        active = Slots(state, role=settings.node.role).active()
        found["release"] = active.number if active else 0
    return found


def reload_daemon(settings: NodeSettings) -> dict[str, Any]:
    """SIGHUP to the running node; what became of it: {"reloads", "restart"}.

    Raises:
        Unavailable: no node runs here, it belongs to another user, or it says nothing.
        BadInput: it did not take the settings; the reason is its own.
    """
    found, before = read_run_file(settings.state_dir), daemon_status(settings)
    if before is not None and found is None and not os.access(settings.state_dir, os.X_OK):
        raise Unavailable(f"{settings.state_dir} is closed to this user; use sudo, or: systemctl reload milpa-node")
    if found is None or before is None:
        raise Unavailable(f"no node runs on {settings.state_dir}; start it with `milpa-node run`")
    try:
        os.kill(found.pid, signal.SIGHUP)
    except PermissionError as error:
        raise Unavailable(f"the node (process {found.pid}) belongs to another user; use sudo, or: systemctl reload milpa-node") from error
    end = time.monotonic() + RELOAD_S
    while time.monotonic() < end:
        told = (daemon_status(settings) or {}).get("settings", {})
        if told.get("reloads", 0) > before["settings"]["reloads"]:
            if told["problem"]:
                raise BadInput(f"nothing was changed: {told['problem']}")
            return {"reloads": told["reloads"], "restart": told["restart"]}
        time.sleep(0.1)
    raise Unavailable(f"the node did not read its settings within {RELOAD_S:g} s; see its log")


def send_feedback(settings: NodeSettings, answer: str, *, verdict: str, text: str) -> dict[str, Any]:
    """POST /v1/feedback.

    Raises:
        Unavailable: no node runs here.
        MilpaError: what the node says.
    """
    changed = call(settings, "POST", "/v1/feedback", {"id": answer, "verdict": verdict, "text": text})
    if changed is None:
        raise Unavailable(f"no node answers on {address(settings)}; start it with `milpa-node run`")
    return changed


def call(settings: NodeSettings, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any] | None:
    """The API's answer, or None when nothing listens.

    Raises:
        BadInput, NotEnough, Unavailable: the API's error, in its words.
    """
    key = secret(settings.api.key_file, what="api.key_file")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    import httpx  # the daemon reads run.json with this file, and needs no HTTP client

    timeout = httpx.Timeout(settings.api.deadline_s + PATIENCE_S, connect=CONNECT_S)
    try:
        answer = httpx.request(method, address(settings) + path, json=body, headers=headers, timeout=timeout, trust_env=False)
    except (httpx.ConnectError, httpx.ConnectTimeout):
        return None
    except httpx.HTTPError as error:
        raise Unavailable(f"the node on {address(settings)} did not answer: {type(error).__name__}") from error
    try:
        told = answer.json()
    except ValueError as error:
        raise Unavailable(f"{address(settings)} is not a Milpa node; see api.port") from error
    if answer.status_code == 200:
        return dict(told)
    message = told.get("error", {}).get("message", f"status {answer.status_code}") if isinstance(told, dict) else str(told)
    raise (BadInput(message) if answer.status_code in (400, 404, 413) else Unavailable(message))
