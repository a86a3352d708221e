"""What we count on in flwr 1.41 beyond its public API. If an update breaks one of these, the two adapter modules need work."""

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("flwr", reason="pip install -e '.[sync]'")

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode import fleet_http_connection, start_client_internal

from coordinator.federation import flower as server
from node.learn import flower as client
from protocol import codec
from protocol.adapters import AdapterReply

pytestmark = pytest.mark.flower
SITE_TEXT = "the pump of Don Julio is broken"


def question(payload: bytes = b"{}") -> Any:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 7  # as `Run` sets them
    message = Message(RecordDict({"question": ConfigRecord({"milpa": payload})}), 7, "query", ttl=60.0, group_id="1")
    message.metadata.__dict__["_message_id"] = message.object_id
    return message


def test_the_version_is_the_one_these_modules_were_written_for() -> None:
    from importlib.metadata import version

    assert version("flwr").startswith("1.41.")


def test_the_supernode_sleeps_by_a_name_we_can_replace() -> None:
    assert "time.sleep(3)" in inspect.getsource(start_client_internal.start_client_internal)
    assert start_client_internal.time.sleep


def test_the_supernode_sends_replies_by_a_name_we_can_wrap() -> None:
    assert "_push_messages(" in inspect.getsource(start_client_internal.start_client_internal)


def test_the_supernode_makes_its_http_client_by_a_name_we_can_replace() -> None:
    source = inspect.getsource(fleet_http_connection.http_request_response)

    assert "FleetHttpClient.from_server_address(" in source
    assert issubclass(fleet_http_connection.FleetHttpClient, object)


def test_the_grid_connects_in_one_place_and_keeps_its_client_there() -> None:
    assert "_client is not None" in inspect.getsource(server.HttpGrid._is_connected.fget)  # type: ignore[attr-defined]
    assert set(inspect.signature(server.HttpGrid.__init__).parameters) >= {"runtime_api_address", "insecure", "token"}


def test_the_bundle_of_a_run_holds_no_program() -> None:
    content, _ = server.build_fab_from_files(server.APP)

    assert len(content) < 4096
    assert "def " not in server.APP["empty.py"].decode()


def test_an_adapter_travels_as_one_array_and_comes_out_the_same() -> None:
    flat = np.arange(5, dtype=np.float32)

    message = client.respond(question(), lambda data: (b"reply", flat))

    assert list(message.content) == ["reply", "adapter"]
    assert isinstance(message.content["adapter"], ArrayRecord)
    arrival = server._read(message)
    assert arrival.payload == b"reply"
    assert np.array_equal(arrival.flat, flat)  # type: ignore[arg-type]


def test_an_exception_becomes_a_code_without_its_text() -> None:
    def fail(data: bytes) -> Any:
        raise RuntimeError(SITE_TEXT)

    message = client.respond(question(), fail)

    assert message.has_error()
    assert (message.error.code, message.error.reason) == (client.RAISED, "")
    assert server._read(message).error == client.RAISED


@pytest.mark.parametrize("data", [b"", b"not json", b'{"release": 1}', b'{"type": "question", "release": "one"}', b"\xff" * 100_000])
def test_a_question_that_is_none_gets_a_code(data: bytes, tmp_path: Path) -> None:
    reply, flat = client.answerer(tmp_path, "esteli")(data)

    assert codec.decode_as(reply, AdapterReply).code == "failed"
    assert flat is None


@pytest.mark.parametrize(
    "array",
    [np.zeros((2, 2), dtype=np.float32), np.zeros(4, dtype=np.float64), np.zeros(4, dtype=np.int32)],
    ids=["two-dimensional", "float64", "int32"],
)
def test_an_array_of_another_form_is_no_adapter(array: Any) -> None:
    from flwr.app import Array

    content = RecordDict({"reply": ConfigRecord({"milpa": b"x"}), "adapter": ArrayRecord({"flat": Array(array)})})

    assert server._read(Message(content, reply_to=question())).flat is None


def test_bytes_that_are_no_array_are_no_adapter() -> None:
    from flwr.app import Array

    broken = Array(dtype="float32", shape=(4,), stype="numpy.ndarray", data=b"not an array")
    content = RecordDict({"reply": ConfigRecord({"milpa": b"x"}), "adapter": ArrayRecord({"flat": broken})})

    assert server._read(Message(content, reply_to=question())).flat is None


def test_a_reply_without_our_record_is_an_empty_payload() -> None:
    assert server._read(Message(RecordDict({"other": ConfigRecord({"milpa": b"x"})}), reply_to=question())).payload == b""
