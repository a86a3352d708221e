"""Flower's client side, all of it: the stock SuperNode and our resident executor, together in one process that lives for one window.

Run as `python -m node.learn.flower`, its job as one JSON line on stdin. No torch: the executor only hands over what is stored.

Semi-internal API of flwr 1.41 (pinned); `tests/federation/test_flower_contract.py` says what we count on:
 * the SuperNode in process isolation gives its messages to whoever acquires the task on its loopback port, so that port is signed with
   a secret made for this window;
 * it sleeps 3 s between polls with no setting for it; `_hurry` shortens that for this process;
 * it looks up its HTTP client by module name; `_carry_fleet_token` puts ours there, which adds the fleet token's header;
 * an exception's text would be sent to the coordinator by the stock executor. Ours sends a code.

The bundle ("FAB") that comes with a run is never unpacked and never run.
"""

import os
import signal
import sys
import threading
import time
import types
from collections.abc import Callable
from logging import WARNING
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.app.error import Error
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, RuntimeVersionHttpInterceptor, SuperExecAuthHttpInterceptor
from flwr.supercore.logger import console_handler
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode import fleet_http_connection, start_client_internal
from flwr.supernode.cli.flower_supernode import flower_supernode
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

from node.learn import stored
from protocol import codec
from protocol.adapters import AdapterQuestion, AdapterReceipt, AdapterReply, Flat
from protocol.flower import FLEET_HEADER
from protocol.lines import first_line

POLL_S = 0.5  # both of the SuperNode at the SuperLink and of the executor at the SuperNode
RAISED = 2  # Flower's code for "the client app raised"; our own codes travel inside the reply
ACQUIRE_METHOD = "/flwr.proto.Runtime/AcquireTask"
QUESTION_LIMIT = 16 * 1024  # bytes
ASKED: Any = AdapterQuestion | AdapterReceipt

Answer = Callable[[bytes], tuple[bytes, Flat | None]]


class Job(msgspec.Struct, frozen=True):
    """What the process is to do."""

    node: str
    state_dir: str
    superlink: str  # HOST:PORT
    port: int  # of the SuperNode's own API, on loopback
    secret_file: str
    fleet_token: str = ""
    ca: str = ""  # who signed the SuperLink's certificate; empty: plain HTTP


class Said(msgspec.Struct, frozen=True):
    """A line to the parent."""

    kind: str  # "answered" (handed to the SuperNode), "sent" (tried to send it to the SuperLink)
    code: str = ""


def answerer(state_dir: Path, node: str) -> Answer:
    """The node's side of the conversation: question bytes in, reply bytes and perhaps an array out. Raises nothing."""

    def reply_to(data: bytes) -> tuple[bytes, Flat | None]:
        try:
            asked: AdapterQuestion | AdapterReceipt = codec.decode_as(data, ASKED, limit=QUESTION_LIMIT, what="question")
            if isinstance(asked, AdapterReceipt):
                return codec.encode(AdapterReply(node, "noted", asked.digest)), None
            reply, flat = stored.answer(state_dir, node, asked)
        except Exception:
            reply, flat = AdapterReply(node, "failed"), None
        return codec.encode(reply), flat

    return reply_to


def respond(message: Message, answer: Answer) -> Message:
    """Flower message in, Flower message out. Whatever fails becomes code RAISED with an empty text."""
    try:
        record = message.content["question"]
        data, flat = answer(bytes(record["milpa"]))
        content: dict[str, Any] = {"reply": ConfigRecord({"milpa": data})}
        if flat is not None:
            content["adapter"] = ArrayRecord({"flat": Array(np.ascontiguousarray(flat, dtype=np.float32))})
        return Message(RecordDict(content), reply_to=message)
    except Exception:
        return Message(Error(code=RAISED, reason=""), reply_to=message)


def serve(port: int, secret: bytes, answer: Answer, *, on_answer: Callable[[], None], stop: threading.Event) -> None:
    """The resident executor: take each message from the SuperNode on `port`, answer it, until `stop`."""
    version = RuntimeVersionHttpInterceptor(component_name="flwr-clientapp")
    signed = SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=[ACQUIRE_METHOD])

    def client(*more: Any) -> RuntimeHttpClient:
        return RuntimeHttpClient.from_server_address(
            server_address=f"127.0.0.1:{port}", insecure=True, root_certificates=None, interceptors=[version, *more]
        )

    with client(signed) as tasks:
        while not stop.wait(POLL_S):
            try:
                got = tasks.AcquireTask(AcquireTaskRequest(supported_task_types=["flwr-clientapp"]))
                if got.HasField("task") and got.token:
                    with client(RuntimeTokenHttpInterceptor(got.token)) as task:
                        _answer_one(task, answer)
                    on_answer()
            except httpx.HTTPError:
                continue  # the SuperNode is starting, or ending; the window has its own deadline


def _answer_one(client: RuntimeHttpClient, answer: Answer) -> None:
    heartbeat = HeartbeatSender(make_task_heartbeat_fn_http(client))
    heartbeat.start()
    try:
        message, context, _, _ = pull_task_input(client)
        push_message(client, respond(message, answer), context)
        push_task_output(client=client, context=context, sub_status="completed", details="")
    finally:
        heartbeat.stop()


def _hurry(seconds: float) -> None:
    """Shorten the SuperNode's fixed sleeps in this process."""
    quick = types.SimpleNamespace(**{name: getattr(time, name) for name in dir(time) if not name.startswith("_")})
    quick.sleep = lambda asked: time.sleep(min(asked, seconds))
    start_client_internal.time = quick


def _tell_deliveries(told: Callable[[], None]) -> None:
    """Call `told` after the SuperNode has pushed a reply to the SuperLink."""
    push = start_client_internal._push_messages

    def push_and_tell(*args: Any, **kwargs: Any) -> None:
        push(*args, **kwargs)
        told()

    start_client_internal._push_messages = push_and_tell


def _carry_fleet_token(token: str) -> None:
    """Every request of the SuperNode to the SuperLink carries the fleet token."""

    class Header:
        def intercept(self, context: Any, call_next: Any) -> Any:
            context.request.headers[FLEET_HEADER] = token
            return call_next(context)

    class Client(fleet_http_connection.FleetHttpClient):
        def __init__(self, *args: Any, interceptors: Any = (), **kwargs: Any) -> None:
            super().__init__(*args, interceptors=[*interceptors, Header()], **kwargs)

    fleet_http_connection.FleetHttpClient = Client


def _main() -> None:
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # flwr prints where it likes; the real stdout is ours
    job = msgspec.json.decode(first_line(), type=Job)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    last_code = ""

    def tell(kind: str) -> None:
        out.write(msgspec.json.encode(Said(kind, last_code)) + b"\n")
        out.flush()

    answer = answerer(Path(job.state_dir), job.node)

    def answer_and_note(data: bytes) -> tuple[bytes, Flat | None]:
        nonlocal last_code
        reply, flat = answer(data)
        last_code = codec.decode_as(reply, AdapterReply, limit=1 << 20, what="reply").code
        return reply, flat

    _hurry(POLL_S)
    _tell_deliveries(lambda: tell("sent"))
    if job.fleet_token:
        _carry_fleet_token(job.fleet_token)
    console_handler.setLevel(WARNING)
    stop = threading.Event()
    secret = Path(job.secret_file).read_text(encoding="ascii").strip().encode()
    threading.Thread(
        target=serve, args=(job.port, secret, answer_and_note), kwargs={"on_answer": lambda: tell("answered"), "stop": stop}, daemon=True
    ).start()
    trust = ["--root-certificates", job.ca] if job.ca else ["--insecure"]
    sys.argv = [
        "flower-supernode", *trust, "--superlink", job.superlink, "--host", "127.0.0.1", "--port", str(job.port),
        "--isolation", "process", "--superexec-auth-secret-file", job.secret_file, "--node-config", f'node="{job.node}"',
    ]  # fmt: skip
    flower_supernode()


def _end_with_parent() -> None:
    while os.read(0, 4096):  # nothing comes; it ends when the parent closed its side or died
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    _main()
