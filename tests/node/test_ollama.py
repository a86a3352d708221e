"""Tools that speak Ollama."""

import json
from typing import Any

import pytest

SOURCE = "soil 21 C, tank 2.1 m"


def lines(answer: Any) -> list[dict[str, Any]]:
    assert answer.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in answer.text.splitlines()]


def test_generate_streams_lines_of_json_unless_told_otherwise(sure: Any) -> None:
    told = lines(sure.client().post("/api/generate", json={"model": "m", "prompt": SOURCE}))

    assert "".join(line["response"] for line in told) == "normal: all is well"
    assert [line["done"] for line in told] == [False] * (len(told) - 1) + [True]
    assert (told[-1]["done_reason"], told[-1]["eval_count"], told[-1]["x_milpa"]["verdict"]) == ("stop", 6, "normal")
    assert sure.engine.prompts == [f"{SOURCE}\nen:"]


def test_generate_at_once(sure: Any) -> None:
    told = sure.client().post("/api/generate", json={"model": "m", "prompt": SOURCE, "stream": False, "x_milpa": {"lang": "es"}}).json()

    assert (told["model"], told["response"], told["done"]) == ("m", "normal: all is well", True)
    assert sure.engine.prompts == [f"{SOURCE}\nes:"]


def test_chat_answers_the_last_user_message(sure: Any) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "old"}, {"role": "user", "content": SOURCE}]}

    streamed = lines(sure.client().post("/api/chat", json=body))
    whole = sure.client().post("/api/chat", json=body | {"stream": False}).json()

    assert "".join(line["message"]["content"] for line in streamed) == whole["message"]["content"] == "normal: all is well"


def test_options_cut_what_is_sent(sure: Any) -> None:
    def told(**options: Any) -> tuple[str, str]:
        body = {"prompt": SOURCE, "stream": False, "options": options}
        answer = sure.client().post("/api/generate", json=body).json()
        return answer["response"], answer["done_reason"]

    assert told(num_predict=3) == ("normal: all", "length")
    assert told(num_predict=-1, stop=[" is"]) == ("normal: all", "stop")
    assert told(temperature=0, seed=5, num_ctx=2048) == ("normal: all is well", "stop")


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        ("/api/generate", {"prompt": "x", "options": {"temperature": 0.8}}, "greedy"),
        ("/api/generate", {"prompt": "x", "format": "json"}, "form"),
        ("/api/generate", {"prompt": "x", "images": ["aGk="]}, "text only"),
        ("/api/generate", {"prompt": "x", "raw": True}, "template"),
        ("/api/generate", {"prompt": 5}, "prompt"),
        ("/api/chat", {"messages": [{"role": "system", "content": "x"}]}, "role 'user'"),
        ("/api/embed", {"input": []}, "input"),
    ],
)
def test_errors_are_in_ollama_s_form(sure: Any, path: str, body: dict[str, Any], says: str) -> None:
    answer = sure.client().post(path, json=body)

    assert answer.status_code == 400
    assert says in answer.json()["error"]


def test_a_request_that_asks_nothing_finds_the_model_loaded(sure: Any) -> None:
    client = sure.client()

    asked = [client.post("/api/generate", json={"model": "m"}).json(), client.post("/api/chat", json={"model": "m"}).json()]

    assert [(one["done"], one["done_reason"]) for one in asked] == [(True, "load")] * 2
    assert sure.engine.prompts == []


def test_the_active_model_is_tagged_and_shown(sure: Any) -> None:
    client = sure.client()

    tags, show = client.get("/api/tags").json(), client.post("/api/show", json={"model": "milpa-ranch-1"}).json()

    assert [(model["name"], model["digest"]) for model in tags["models"]] == [("milpa-ranch-1", sure.engine.model_digest)]
    assert (show["model_info"]["milpa.task"], show["capabilities"]) == ("ranch", ["completion", "embedding"])
    assert client.get("/api/version").json()["version"]


def test_without_a_model_there_is_nothing_to_tag(sure: Any) -> None:
    sure.worker.swap_after_current_record(None)
    client = sure.client()

    assert client.get("/api/tags").json() == {"models": []}
    assert client.post("/api/generate", json={"prompt": "x"}).status_code == 503


def test_texts_become_vectors(sure: Any) -> None:
    told = sure.client().post("/api/embed", json={"input": ["a b", "c"]}).json()

    assert ([len(vector) for vector in told["embeddings"]], told["prompt_eval_count"]) == ([16, 16], 3)
