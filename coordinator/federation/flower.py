"""Flower's server side, all of it: the SuperLink as an application of ours, and one run whose messages we push and pull ourselves.

Most of this is semi-internal API of flwr 1.41 (pinned), so it lives here and nowhere else; `tests/federation/test_flower_contract.py`
says what we count on. What we learned about it:
 * Transport is protobuf over HTTP on one port: /v1/fleet (nodes), /v1/control and /v1/runtime (us), /health.
 * The open-source Control API has no login. The bearer token is ours; `superlink.Guard` asks for it, `_Bearer` here carries it.
 * On a 401, and when a run was stopped, flwr sends SIGINT to its own process: call this from a child process (`collect.py`).
 * A run needs a bundle ("FAB") of an app. Ours is empty: nodes run only the code that is installed on them.
 * The reply of a lost node comes from the SuperLink's id, so it is mapped through `reply_to_message_id`.

Import it only where FLWR_* variables are set already (`superlink.environment`): flwr reads them at import.
"""

import hashlib
import time
from collections.abc import Iterable
from typing import Any

import msgspec
import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.cli.build import build_fab_from_files
from flwr.common.serde import fab_to_proto, run_from_proto
from flwr.proto.control_pb2 import StartRunRequest
from flwr.proto.runtime_pb2 import AcquireTaskRequest, PullTaskInputRequest, PushTaskOutputRequest
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, RuntimeVersionHttpInterceptor, SuperExecAuthHttpInterceptor
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
from flwr.superlink.config_loader import SuperLinkLifespanConfig, load_control_authn_plugin
from flwr.superlink.grid import HttpGrid
from flwr.superlink.main import create_app
from httpx import HTTPError, HTTPStatusError

from protocol.adapters import Flat
from protocol.errors import BadInput, Unavailable
from protocol.flower import authorities

ADAPTER_LIMIT = 256 << 20  # bytes of one flat array; rank 16 on every matrix of a 270M model is 15 MB
ACQUIRE_DEADLINE_S = 30.0  # from StartRun to a task in hand; 40 to 180 ms measured
ACQUIRE_POLL_S = 0.05
ACQUIRE_METHOD = "/flwr.proto.Runtime/AcquireTask"
APP = {
    "pyproject.toml": b"""[project]
name = "milpa-round"
version = "1.0.0"
description = "Empty on purpose: nodes run only the code installed on them"
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "milpa"
fab-include = ["empty.py"]
[tool.flwr.app.components]
serverapp = "empty:app"
clientapp = "empty:app"
[tool.flwr.app.config]
""",
    "empty.py": b'"""Nothing to run: see the project file."""\n\napp = None\n',
}


def superlink_app(*, database: str, host: str, port: int, secret: bytes) -> Any:
    """The SuperLink as an ASGI application, unguarded; process isolation, no dependency installation, state in an SQLite file."""
    config = SuperLinkLifespanConfig(
        control_address=f"{host}:{port}", health_server_address=None, host=host, port=port, insecure=True, certificates=None,
        superexec_auth_secret=secret, authn_plugin=load_control_authn_plugin(), event_log_plugin=None, fleet_event_log_plugin=None,
        enable_event_log=False, artifact_provider=None, enable_supernode_auth=False, fleet_api_type="grpc-rere", fleet_api_address=None,
        simulation=False, ssl_ca_certfile=None, ssl_certfile=None, ssl_keyfile=None, database=database, isolation="process",
        runtime_dependency_install=False,
    )  # fmt: skip
    return create_app(config, SuperLinkLifespan)


class Arrival(msgspec.Struct, frozen=True):
    """What came back for one question."""

    question: str  # the id of the message it answers
    payload: bytes | None  # the node's AdapterReply as JSON; None: Flower reports an error instead
    flat: Flat | None
    error: int = 0  # Flower's error code; its text is thrown away unread


class _Bearer:
    """Carries the control token on every request of a Flower client."""

    def __init__(self, token: str) -> None:
        self.value = f"Bearer {token}"

    def intercept(self, context: Any, call_next: Any) -> Any:
        context.request.headers["authorization"] = self.value
        return call_next(context)


class _GuardedGrid(HttpGrid):
    """Flower's grid, with the token."""

    def __init__(self, address: str, *, task_token: str, bearer: _Bearer, tls: dict[str, Any]) -> None:
        super().__init__(address, token=task_token, **tls)
        self._bearer, self._tls = bearer, tls

    def _connect(self) -> None:
        self._client = RuntimeHttpClient.from_server_address(
            server_address=self._addr,
            **self._tls,
            interceptors=[
                RuntimeVersionHttpInterceptor(component_name="flwr-serverapp"),
                RuntimeTokenHttpInterceptor(self._token),
                self._bearer,
            ],
            retry_invoker=self._retry_invoker,
        )


class Run:
    """One Flower run, opened and driven from this process: ask nodes, take what arrives, close."""

    def __init__(self, address: str, *, token: str, secret: bytes, ca: str = "") -> None:
        """Start a run at the SuperLink and become its executor.

        Args:
            address: HOST:PORT.
            token: the control token.
            secret: what signs the request for the run's task.
            ca: who signed its certificate (`protocol.flower.authorities`).

        Raises:
            Unavailable: nobody answers at `address`, or the run does not start in time.
            BadInput: the SuperLink refused the token, or `ca` is of no use.
        """
        bearer = _Bearer(token)
        tls = {"insecure": not ca, "root_certificates": authorities(ca)}
        version = RuntimeVersionHttpInterceptor(component_name="SuperExec")
        content, _ = build_fab_from_files(APP)
        fab = Fab(hashlib.sha256(content).hexdigest(), content, {})
        try:
            with ControlHttpClient.from_server_address(server_address=address, **tls, interceptors=[version, bearer]) as control:
                self.id = control.StartRun(StartRunRequest(fab=fab_to_proto(fab), federation="", app_spec="")).run_id
            task_token = _acquire(address, self.id, secret, [version, bearer], tls)
            self._grid = _GuardedGrid(address, task_token=task_token, bearer=bearer, tls=tls)
            client = self._grid._runtime_client
            self._heartbeat = HeartbeatSender(make_task_heartbeat_fn_http(client))
            self._heartbeat.start()
            given = client.PullTaskInput(PullTaskInputRequest())  # the run is RUNNING from here on
        except HTTPStatusError as error:
            if error.response.status_code in (401, 403):
                raise BadInput(f"the SuperLink at {address} refused the token; give the control.token file of that SuperLink") from error
            raise Unavailable(f"the SuperLink at {address} answered {error.response.status_code} when the round opened") from error
        except HTTPError as error:
            raise Unavailable(f"no SuperLink answers at {address} ({error}); start one with `milpa-coordinator superlink`") from error
        self._grid.set_run(run_from_proto(given.run))
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = given.task_id, given.run.run_id, given.context.node_id

    def nodes(self) -> set[int]:
        """Flower's ids of the nodes connected now. They change at every start of a node: never a name."""
        return {int(node.node_id) for node in self._grid.get_nodes()}

    def ask(self, nodes: Iterable[int], payload: bytes, *, ttl_s: float) -> dict[str, int]:
        """Send the question to each node; message id -> node id. `ttl_s`: after that Flower itself answers with an error."""
        messages = [
            Message(RecordDict({"question": ConfigRecord({"milpa": payload})}), node, "query", ttl=ttl_s, group_id="1") for node in nodes
        ]
        sent = self._grid.push_messages(messages) if messages else []
        return {message: asked.metadata.dst_node_id for message, asked in zip(sent, messages, strict=True) if message}

    def arrivals(self, questions: Iterable[str]) -> list[Arrival]:
        """What has come back for these questions; each comes once."""
        waiting = list(questions)
        return [_read(message) for message in self._grid.pull_messages(waiting)] if waiting else []

    def close(self) -> None:
        """End the run: late answers to it are dropped by the SuperLink, the nodes keep what they have."""
        self._grid._runtime_client.PushTaskOutput(PushTaskOutputRequest(sub_status="completed", details=""))
        self._heartbeat.stop()
        self._grid.close()


def _acquire(address: str, run: int, secret: bytes, interceptors: list[Any], tls: dict[str, Any]) -> str:
    signed = SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=[ACQUIRE_METHOD])
    end = time.monotonic() + ACQUIRE_DEADLINE_S
    with RuntimeHttpClient.from_server_address(server_address=address, **tls, interceptors=[*interceptors, signed]) as client:
        while time.monotonic() < end:
            got = client.AcquireTask(AcquireTaskRequest(supported_task_types=["flwr-serverapp"]))
            if got.HasField("task") and got.token and got.task.run_id == run:
                return str(got.token)
            time.sleep(ACQUIRE_POLL_S)  # the task of an earlier, dead round may come first; its lease lapses by itself
    raise Unavailable(f"the SuperLink at {address} gave no task for the round within {ACQUIRE_DEADLINE_S:g} s; try again")


def _read(message: Any) -> Arrival:
    """Flower's message -> ours. Whatever is not exactly one byte string and at most one float32 array is an empty payload."""
    question = str(message.metadata.reply_to_message_id)
    if message.has_error():
        return Arrival(question, None, None, int(message.error.code))
    content = message.content
    record = content.get("reply")
    payload = record.get("milpa") if isinstance(record, ConfigRecord) else None
    return Arrival(question, payload if isinstance(payload, bytes) else b"", _flat(content.get("adapter")))


def _flat(record: Any) -> Flat | None:
    if not isinstance(record, ArrayRecord) or list(record) != ["flat"]:
        return None
    array = record["flat"]
    if len(array.data) > ADAPTER_LIMIT:
        return None
    try:
        found = array.numpy()
    except (ValueError, TypeError, OSError, EOFError):  # what numpy.load raises on bytes that are no array
        return None
    return np.ascontiguousarray(found) if found.ndim == 1 and found.dtype == np.float32 else None
