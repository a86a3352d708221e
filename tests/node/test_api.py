from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from node.api import routes
from node.api.server import Server, bind
from protocol.codec import encode
from protocol.errors import BadInput, PortInUse
from protocol.tasks import Record
from tests.node.conftest import eventually, reply_to
from tests.node.fake_engine import FakeEngine

SOURCE = "soil 21 C, tank 2.1 m"


def test_a_completion_is_openai_s_with_ours_under_x_milpa(sure: Any) -> None:
    body = {"model": "gpt-x", "prompt": SOURCE, "temperature": 0, "max_tokens": 50, "x_milpa": {"lang": "es", "record_id": "w-17"}}

    answer = sure.client().post("/v1/completions", json=body)

    told = answer.json()
    assert answer.status_code == 200
    assert (told["object"], told["model"]) == ("text_completion", "gpt-x")
    assert told["choices"][0] == {"index": 0, "finish_reason": "stop", "logprobs": None, "text": "normal: all is well"}
    assert told["usage"]["total_tokens"] == told["usage"]["prompt_tokens"] + told["usage"]["completion_tokens"] > 0
    ours = told["x_milpa"]
    assert (ours["verdict"], ours["sentence"], ours["provisional"], ours["record_id"]) == ("normal", "all is well", False, "w-17")
    assert (ours["release"], ours["model_digest"]) == (1, sure.engine.model_digest)
    assert 0 <= ours["confidence"] <= 1 and ours["reason"]
    assert sure.engine.prompts == [f"{SOURCE}\nes:"]


def test_the_last_user_message_is_the_record(sure: Any) -> None:
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "old"},
        {"role": "assistant", "content": "normal: x"},
        {"role": "user", "content": [{"type": "text", "text": SOURCE}]},
    ]

    told = sure.client().post("/v1/chat/completions", json={"model": "m", "messages": messages}).json()

    assert told["choices"][0]["message"] == {"role": "assistant", "content": "normal: all is well", "refusal": None}
    assert sure.engine.prompts == [f"{SOURCE}\nen:"]


def test_a_record_goes_in_as_it_is(sure: Any) -> None:
    record = Record(id="w1", task="ranch", source=SOURCE, lang="es", site="malacatoya", target="leak: x", verdict="leak", numbers=(1.0,))

    told = sure.client().post("/v1/records", content=encode(record), headers={"content-type": "application/json"}).json()

    assert (told["record_id"], told["verdict"]) == ("w1", "normal")
    assert sure.row(told["id"]).site == "malacatoya"


def test_an_upgrade_shows_in_the_stored_answer_and_in_the_changes(unsure: Any) -> None:
    client = unsure.client()
    given = client.post("/v1/completions", json={"prompt": SOURCE}).json()["x_milpa"]
    seen = client.get("/v1/answers").json()["next"]
    unsure.answering.apply(reply_to(unsure.asking.questions[0], "dry-run: no water"))

    stored, changes = client.get(f"/v1/answers/{given['id']}").json(), client.get("/v1/answers", params={"since": seen}).json()

    assert given["provisional"] and given["escalation"] == unsure.asking.questions[0].id
    assert (stored["state"], stored["by"], stored["text"], stored["local"]) == (
        "upgraded", "peer:base-station", "dry-run: no water", "leak: the pipe lost pressure",
    )  # fmt: skip
    assert [row["id"] for row in changes["data"]] == [given["id"]]


def test_feedback_corrects_and_teaches(sure: Any) -> None:
    client = sure.client()
    given = client.post("/v1/completions", json={"prompt": SOURCE}).json()["x_milpa"]

    told = client.post("/v1/feedback", json={"id": given["id"], "verdict": "leak", "text": "the pipe broke"}).json()

    assert (told["state"], told["by"], told["text"]) == ("corrected", "operator", "leak: the pipe broke")
    assert [example.record.target for example in sure.store.examples("ranch")] == ["leak: the pipe broke"]


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        ("/v1/completions", {"prompt": ""}, 400, "empty source"),
        ("/v1/completions", {"prompt": "x" * 5000}, 413, "limit is 4000"),
        ("/v1/completions", {"prompt": []}, 400, "prompt"),
        ("/v1/completions", {"prompt": ["a"] * 65}, 400, "prompt"),
        ("/v1/completions", {"prompt": ["a", ""]}, 400, "empty source"),
        ("/v1/completions", {"prompt": "x", "stream": True, "max_tokens": 0}, 400, "max_tokens"),
        ("/v1/completions", {"prompt": "", "stream": True}, 400, "empty source"),
        ("/v1/completions", {"prompt": "x", "n": 2}, 400, "greedy"),
        ("/v1/completions", {"prompt": "x", "temperature": 0.7}, 400, "greedy"),
        ("/v1/completions", {"prompt": "x", "echo": True}, 400, "not repeated"),
        ("/v1/completions", {"prompt": "x", "suffix": "y"}, 400, "suffix"),
        ("/v1/completions", {"prompt": "x", "logprobs": 6}, 400, "logprobs"),
        ("/v1/completions", {"prompt": "x", "stop": ""}, 400, "empty stop"),
        ("/v1/completions", {"prompt": "x", "stream_options": {"include_usage": True}}, 400, "only with stream"),
        ("/v1/completions", {"prompt": "x", "x_milpa": {"deadline_s": -1}}, 400, "seconds above 0"),
        ("/v1/completions", {"prompt": "x", "x_milpa": {"task": "cook"}}, 400, "unknown task 'cook'"),
        ("/v1/completions", {"prompt": "x", "x_milpa": {"task": "translate-english-spanish"}}, 400, "this node answers 'ranch'"),
        ("/v1/completions", {"prompt": "x", "x_milpa": {"lang": "de"}}, 400, "language 'de'"),
        ("/v1/completions", {"prompt": "x", "x_milpa": {"sight": "a"}}, 400, "sight"),
        ("/v1/completions", {}, 400, "prompt"),
        ("/v1/chat/completions", {"messages": []}, 400, "messages"),
        ("/v1/chat/completions", {"messages": [{"role": "system", "content": "x"}]}, 400, "role 'user'"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "reads text only"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "tools": [{}]}, 400, "form"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "json_object"}}, 400, "form"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "top_logprobs": 2}, 400, "only with logprobs"),
        ("/v1/embeddings", {"input": [[1, 2]]}, 400, "input"),
        ("/v1/embeddings", {"input": "x", "dimensions": 7}, 400, "dimensions"),
        ("/v1/embeddings", {"input": "x" * 5000}, 400, "limit is 4000"),
        ("/v1/records", {"id": "a", "task": "ranch"}, 400, "source"),
        ("/v1/records", [], 400, "1 to 256"),
        ("/v1/feedback", {"id": "nope", "verdict": "leak"}, 404, "no answer"),
        ("/v1/nothing", {}, 404, "Not Found"),
    ],
)
def test_bad_input_gets_openai_s_error_body(sure: Any, path: str, body: dict[str, Any], status: int, says: str) -> None:
    answer = sure.client().post(path, json=body)

    assert answer.status_code == status
    error = answer.json()["error"]
    assert says in error["message"]
    assert set(error) == {"message", "type", "code", "param"}


def test_a_body_says_that_it_is_json(sure: Any) -> None:
    """A web page elsewhere can send text without asking the browser's leave, JSON it cannot."""
    client = sure.client()

    codes = [client.post(path, content=b'{"prompt": "x"}').status_code for path in ("/v1/completions", "/api/generate", "/v1/records")]

    assert codes == [400, 400, 400]
    assert sure.engine.prompts == []


def test_records_in_a_list_are_answered_or_refused_each_on_its_own(sure: Any) -> None:
    good, bad = {"id": "w1", "task": "ranch", "source": SOURCE}, {"id": "w2", "task": "ranch", "source": ""}

    told = sure.client().post("/v1/records", json=[good, bad, {**good, "id": "w3"}]).json()["data"]

    assert [one.get("record_id") for one in told] == ["w1", None, "w3"]
    assert (told[1]["status"], told[1]["error"]["message"]) == (400, "record 'w2' has an empty source")
    assert len(sure.refused()) == 1


def test_the_records_of_a_list_share_one_deadline_and_those_it_does_not_reach_are_late(sure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    now, generate, given = [50.0], sure.engine.generate, []

    def slowly(*args: Any, **more: Any) -> Any:
        now[0] += 4.0
        return generate(*args, **more)

    def answer(record: Record, *, deadline_s: float) -> Any:
        given.append(deadline_s)
        return answer_now(record, deadline_s=deadline_s)

    answer_now = sure.answering.answer
    monkeypatch.setattr(sure.engine, "generate", slowly)
    monkeypatch.setattr(sure.answering, "answer", answer)
    monkeypatch.setattr("node.api.routes.time", SimpleNamespace(monotonic=lambda: now[0]))
    records = [{"id": f"w{index}", "task": "ranch", "source": f"soil {index} C"} for index in range(5)]

    answered = sure.client().post("/v1/records", json=records, headers={"x-milpa-deadline-s": "9"})

    told = answered.json()["data"]
    assert answered.status_code == 200
    assert [one.get("status") for one in told] == [None, None, None, 504, 504]
    assert [one["state"] for one in told[:3]] == ["final"] * 3
    assert told[4]["error"]["code"] == "deadline" and "send it again" in told[4]["error"]["message"]
    assert given == [9.0, 5.0, 1.0]
    assert sure.refused() == []  # late is not bad


def test_a_batch_with_a_prompt_that_cannot_be_read_answers_none(sure: Any) -> None:
    answer = sure.client().post("/v1/completions", json={"prompt": ["good", ""]})

    assert (answer.status_code, sure.engine.prompts) == (400, [])


def test_the_suggested_wait_grows_with_what_waits(make_node: Callable[..., Any]) -> None:
    node = make_node(FakeEngine(), capacity=8)
    node.worker._seconds = 2.0  # what a record takes here
    node.engine.gate.clear()
    with ThreadPoolExecutor(8) as pool:
        before = node.worker.retry_after_s
        asked = [pool.submit(node.answer, f"record {index}") for index in range(6)]
        eventually(lambda: node.worker.waiting == 5)
        after = node.worker.retry_after_s
        node.engine.gate.set()
        for future in asked:
            future.result(20)

    assert (before, after) == (2, 12)


@pytest.mark.parametrize(
    ("body", "header"), [({"deadline_s": 0.1}, {}), ({}, {"x-milpa-deadline-s": "0.1"}), ({"deadline_s": 5}, {"x-milpa-deadline-s": "0.1"})]
)
def test_a_request_may_have_a_shorter_deadline(make_node: Callable[..., Any], body: dict[str, Any], header: dict[str, str]) -> None:
    node = make_node(FakeEngine(), deadline_s=20.0)
    node.engine.pace_s = 0.2  # the model speaks, but too slowly

    answer = node.client().post("/v1/completions", json={"prompt": "x", "x_milpa": body}, headers=header)

    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline")


def test_no_request_has_a_longer_deadline_than_the_settings(make_node: Callable[..., Any]) -> None:
    node = make_node(FakeEngine(), deadline_s=0.1)
    node.engine.pace_s = 0.2

    answer = node.client().post("/v1/completions", json={"prompt": "x", "x_milpa": {"deadline_s": 60}})

    assert answer.status_code == 504


def test_a_deadline_stops_the_model_in_the_middle_of_its_answer(make_node: Callable[..., Any]) -> None:
    node = make_node(FakeEngine(default=" normal:" + " word" * 40), deadline_s=0.3)
    node.engine.pace_s = 0.1

    node.client().post("/v1/completions", json={"prompt": "x"})
    eventually(lambda: node.worker._swap.acquire(blocking=False))
    node.worker._swap.release()

    assert 0 < len(node.engine.said) < 20
    assert node.client().get("/v1/answers").json()["data"] == []


def test_what_does_not_decode_is_kept_with_the_reason(sure: Any) -> None:
    client = sure.client()

    client.post("/v1/records", content=b'{"id": "a"', headers={"content-type": "application/json"})
    client.post("/v1/completions", json={"prompt": 17})

    assert [origin for origin, _ in sure.refused()] == ["api", "api"]


def test_a_full_queue_is_429_with_retry_after(make_node: Callable[..., Any]) -> None:
    node = make_node(FakeEngine(), capacity=1, deadline_s=20.0)
    node.engine.gate.clear()
    server = Server(node.app, bind("127.0.0.1", 0, key=""))
    server.start()
    try:
        with ThreadPoolExecutor(4) as pool, httpx.Client(base_url=server.url, timeout=30) as client:
            first = pool.submit(client.post, "/v1/completions", json={"prompt": "first"})
            assert node.engine.started.wait(10)
            rest = [pool.submit(client.post, "/v1/completions", json={"prompt": name}) for name in ("second", "third")]
            refused = next(future for future in _as_completed(rest))
            node.engine.gate.set()
            codes = sorted(future.result(30).status_code for future in (first, *rest))
    finally:
        server.stop()

    assert codes == [200, 200, 429]
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["type"] == "rate_limit_error"


def _as_completed(futures: list[Any]) -> Any:
    from concurrent.futures import as_completed

    for future in as_completed(futures, timeout=20):
        yield future.result()


def test_past_the_deadline_a_request_is_504(make_node: Callable[..., Any]) -> None:
    node = make_node(FakeEngine(), deadline_s=0.1)
    node.engine.gate.clear()

    answer = node.client().post("/v1/completions", json={"prompt": "x"})

    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline")


def test_a_node_without_a_model_is_alive_and_not_ready(sure: Any) -> None:
    sure.worker.swap_after_current_record(None)
    client = sure.client()

    codes = [client.get("/healthz").status_code, client.get("/readyz").status_code]
    answer = client.post("/v1/completions", json={"prompt": "x"})

    assert codes == [200, 503]
    assert client.get("/readyz").json()["reason"] == "no model yet"
    assert (answer.status_code, client.get("/v1/models").json()["data"]) == (503, [])


def test_the_active_model_is_listed(sure: Any) -> None:
    client = sure.client()

    listed = client.get("/v1/models").json()

    assert client.get("/readyz").status_code == 200
    assert [(model["id"], model["object"], model["x_milpa"]["release"]) for model in listed["data"]] == [("milpa-ranch-1", "model", 1)]


def test_metrics_count_and_name_no_record(unsure: Any) -> None:
    client = unsure.client()
    client.post("/v1/completions", json={"prompt": "a very secret window"})
    unsure.answering.apply(reply_to(unsure.asking.questions[0], "dry-run: no water"))

    told = client.get("/metrics").text

    assert 'milpa_node_answers_total{state="provisional"} 1.0' in told
    assert 'milpa_node_answer_changes_total{state="upgraded"} 1.0' in told
    assert 'milpa_node_requests_total{path="/v1/completions",status="200"} 1.0' in told
    assert "secret" not in told
    assert all(line.startswith("milpa_node_") for line in told.splitlines() if line and not line.startswith("#"))


def test_a_body_over_the_limit_is_413_with_or_without_its_length(sure: Any) -> None:
    client = sure.client()
    headers = {"content-type": "application/json"}

    told = client.post("/v1/records", content=b"x" * 300_000, headers=headers)
    untold = client.post("/v1/records", content=iter([b"x" * 100_000] * 3), headers=headers)

    assert (told.status_code, untold.status_code) == (413, 413)


def test_without_a_key_only_this_machine_s_names_are_answered(sure: Any) -> None:
    client = sure.client()

    codes = [
        client.get("/healthz", headers={"host": host}).status_code for host in ("evil.example", "127.0.0.1:8642", "localhost", "[::1]:1")
    ]

    assert codes == [421, 200, 200, 200]


def test_with_a_key_everything_but_health_wants_it(sure: Any) -> None:
    app = routes.build(
        sure.answering, sure.metrics, default_task="ranch", deadline_s=5, status=dict, why_not_ready=lambda: "", key="sesame"
    )  # fmt: skip
    client = TestClient(app, base_url="http://10.0.0.5")

    codes = [client.get(path).status_code for path in ("/healthz", "/readyz", "/metrics", "/v1/models")]
    wrong = client.get("/v1/models", headers={"authorization": "Bearer open"})
    right = client.get("/v1/models", headers={"authorization": "Bearer sesame"})

    assert codes == [200, 200, 401, 401]
    assert (wrong.status_code, wrong.json()["error"]["type"], right.status_code) == (401, "authentication_error", 200)


def test_an_address_others_can_reach_needs_a_key() -> None:
    with pytest.raises(BadInput, match=r"api\.key_file"):
        bind("0.0.0.0", 0, key="")

    bind("0.0.0.0", 0, key="sesame").close()


def test_a_port_in_use_is_one_clear_line() -> None:
    with bind("127.0.0.1", 0, key="") as taken, pytest.raises(PortInUse, match="in use by another program"):
        bind("127.0.0.1", taken.getsockname()[1], key="")


def test_stopping_frees_the_port(sure: Any) -> None:
    server = Server(sure.app, bind("127.0.0.1", 0, key=""))
    server.start()
    port = int(server.url.rpartition(":")[2])
    assert httpx.get(server.url + "/healthz").status_code == 200

    server.stop()

    bind("127.0.0.1", port, key="").close()
    assert not server.alive
