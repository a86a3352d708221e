"""The official OpenAI client drives the API, on a real socket."""

import base64
import struct
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import msgspec
import openai
import pytest

from tests.node.conftest import NodeInMemory, Notes, eventually
from tests.node.fake_engine import FakeEngine

SOURCE = "soil 21 C, tank 2.1 m"
MESSAGES: Any = [{"role": "system", "content": "be brief"}, {"role": "user", "content": SOURCE}]


def client(node: NodeInMemory) -> openai.OpenAI:
    return openai.OpenAI(base_url=node.serve() + "/v1", api_key="none", max_retries=0, timeout=30)


@pytest.fixture
def slow(make_node: Callable[..., NodeInMemory]) -> NodeInMemory:
    """A node whose model takes its time over a long answer."""
    node = make_node(FakeEngine(default=" leak:" + " water" * 60, probability=0.3), asking=Notes())
    node.engine.pace_s = 0.05
    return node


def test_a_completion_has_its_text_and_usage(sure: Any) -> None:
    answer = client(sure).completions.create(model="any", prompt=SOURCE, extra_body={"x_milpa": {"lang": "es"}})

    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("normal: all is well", "stop")
    assert answer.usage is not None and answer.usage.completion_tokens == 6
    assert sure.engine.prompts == [f"{SOURCE}\nes:"]


def test_a_list_of_prompts_gets_an_answer_each_in_order(make_node: Callable[..., Any]) -> None:
    node = make_node(FakeEngine({"tank": " leak: at the tank", "sun": " normal: all is well"}, probability=0.99))

    answer = client(node).completions.create(model="any", prompt=["the tank", "the sun", "the tank again"])

    assert [choice.text for choice in answer.choices] == ["leak: at the tank", "normal: all is well", "leak: at the tank"]
    assert [one["record_id"][-2:] for one in answer.model_extra["x_milpa"]] == ["-0", "-1", "-2"]
    assert answer.usage.completion_tokens == 3 * 6  # type: ignore[union-attr]


def test_a_chat_has_its_message(sure: Any) -> None:
    answer = client(sure).chat.completions.create(model="any", messages=MESSAGES)

    assert (answer.choices[0].message.role, answer.choices[0].message.content) == ("assistant", "normal: all is well")


def test_a_streamed_completion_comes_in_pieces_that_make_the_text(sure: Any) -> None:
    chunks = list(client(sure).completions.create(model="any", prompt=SOURCE, stream=True, stream_options={"include_usage": True}))

    texts = [choice.text for chunk in chunks for choice in chunk.choices]
    assert "".join(texts) == "normal: all is well"
    assert len([text for text in texts if text]) > 2
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert (chunks[-1].choices, chunks[-1].usage.total_tokens) == ([], chunks[-1].usage.prompt_tokens + 6)  # type: ignore[union-attr]


def test_a_streamed_chat_begins_with_a_role_and_ends_with_a_reason(sure: Any) -> None:
    chunks = list(client(sure).chat.completions.create(model="any", messages=MESSAGES, stream=True))

    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "normal: all is well"
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert {chunk.id for chunk in chunks} == {chunks[0].id} and chunks[0].object == "chat.completion.chunk"


def test_a_streamed_answer_is_stored_judged_and_asked_of_a_peer_like_any_other(unsure: Any) -> None:
    chunks = list(client(unsure).chat.completions.create(model="any", messages=MESSAGES, stream=True))

    ours = chunks[-1].model_extra["x_milpa"]  # type: ignore[index]
    assert (ours["provisional"], ours["escalation"]) == (True, unsure.asking.questions[0].id)
    assert unsure.row(ours["id"]).text == "leak: the pipe lost pressure"


def test_several_prompts_stream_one_after_the_other(sure: Any) -> None:
    chunks = list(client(sure).completions.create(model="any", prompt=["a", "b"], stream=True))

    indices = [chunk.choices[0].index for chunk in chunks]
    assert indices == sorted(indices) and set(indices) == {0, 1}
    assert [chunk.choices[0].index for chunk in chunks if chunk.choices[0].finish_reason] == [0, 1]


@pytest.mark.parametrize("stream", [False, True])
def test_stop_cuts_what_is_sent_and_max_tokens_what_is_said_but_never_inside_a_verdict(sure: Any, stream: bool) -> None:
    def told(**wanted: Any) -> tuple[str, str | None]:
        answer: Any = client(sure).completions.create(model="any", prompt=SOURCE, stream=stream, **wanted)
        choices = [choice for one in (answer if stream else [answer]) for choice in one.choices]
        return "".join(choice.text for choice in choices), choices[-1].finish_reason

    cut = [told(stop=[" is w"]), told(stop="never"), told(max_tokens=1), told(max_tokens=3, stop=["zz"]), told(stop=["normal"])]

    assert cut == [("normal: all", "stop"), ("normal: all is well", "stop"), ("normal", "length"), ("normal: all", "length"), ("", "stop")]
    rows = httpx.get(sure.serve() + "/v1/answers").json()["data"]
    assert [row["text"] for row in rows] == ["normal: all is well"] * 2 + ["normal:", "normal: all", "normal: all is well"]


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_a_completion(sure: Any, stream: bool) -> None:
    answer: Any = client(sure).completions.create(model="any", prompt=SOURCE, logprobs=2, stream=stream)
    found = [choice.logprobs for one in (answer if stream else [answer]) for choice in one.choices if choice.logprobs]

    assert [token for one in found for token in one.tokens] == [" normal", ":", " all", " is", " well", ""]
    assert [offset for one in found for offset in one.text_offset] == [0, 7, 8, 12, 15, 20]
    assert all(value < 0 for one in found for value in one.token_logprobs)
    assert all(len(best) == 2 for one in found for best in one.top_logprobs)


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_a_chat(sure: Any, stream: bool) -> None:
    answer: Any = client(sure).chat.completions.create(model="any", messages=MESSAGES, logprobs=True, top_logprobs=2, stream=stream)
    tokens = [
        token for one in (answer if stream else [answer]) for choice in one.choices if choice.logprobs for token in choice.logprobs.content
    ]

    assert [token.token for token in tokens] == [" normal", ":", " all", " is", " well", ""]
    assert bytes(tokens[0].bytes).decode() == " normal"
    assert [len(token.top_logprobs) for token in tokens] == [2] * 6


def test_who_does_not_ask_for_logprobs_gets_none(sure: Any) -> None:
    assert client(sure).chat.completions.create(model="any", messages=MESSAGES).choices[0].logprobs is None


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_stops_the_model_and_leaves_nothing(slow: NodeInMemory, stream: bool) -> None:
    url = slow.serve() + "/v1/completions"

    with pytest.raises(httpx.ReadTimeout), httpx.Client(timeout=0.4) as hasty:
        if stream:
            with hasty.stream("POST", url, json={"prompt": SOURCE, "stream": True}) as answer:
                lines = answer.iter_lines()
                assert next(lines).startswith("data: ")
                slow.engine.pace_s = 1.0  # longer than this client waits
                list(lines)
        else:
            hasty.post(url, json={"prompt": SOURCE})
    slow.engine.pace_s = 0.05
    eventually(lambda: not slow.worker._swap.locked())
    said = len(slow.engine.said)
    time.sleep(0.2)

    assert 0 < len(slow.engine.said) == said < 40  # of 63
    assert (httpx.get(slow.serve() + "/v1/answers").json()["data"], slow.asking.questions) == ([], [])  # type: ignore[union-attr]


def test_a_deadline_in_the_middle_of_a_stream_is_told_in_it(slow: NodeInMemory) -> None:
    stream = client(slow).completions.create(model="any", prompt=SOURCE, stream=True, extra_headers={"x-milpa-deadline-s": "0.4"})

    with pytest.raises(openai.APIError, match=r"no answer within|deadline"):
        list(stream)


def test_a_full_queue_refuses_a_stream_with_a_status_of_its_own(make_node: Callable[..., Any]) -> None:
    node = make_node(FakeEngine(), capacity=1)
    node.engine.gate.clear()
    mine = client(node)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(mine.completions.create, model="any", prompt="first")
        assert node.engine.started.wait(10)
        second = pool.submit(mine.completions.create, model="any", prompt="second")
        eventually(lambda: node.worker.waiting == 1)

        with pytest.raises(openai.RateLimitError) as refused:
            mine.completions.create(model="any", prompt="third", stream=True)
        node.engine.gate.set()
        assert [future.result(20).choices[0].text for future in (first, second)] == ["normal: todo bien"] * 2

    assert int(refused.value.response.headers["retry-after"]) >= 1


def test_what_is_not_offered_is_a_bad_request_that_says_what_to_do(sure: Any) -> None:
    for wanted in ({"n": 2}, {"temperature": 1.0}, {"frequency_penalty": 0.5}, {"logit_bias": {"5": 1}}):
        with pytest.raises(openai.BadRequestError) as refused:
            client(sure).completions.create(model="any", prompt=SOURCE, **wanted)  # type: ignore[call-overload]

        assert refused.value.param == next(iter(wanted))


def test_the_active_model_is_listed_and_found_by_its_name(sure: Any) -> None:
    mine = client(sure)

    listed = mine.models.list().data

    assert [model.id for model in listed] == ["milpa-ranch-1"]
    assert mine.models.retrieve("milpa-ranch-1").id == "milpa-ranch-1"
    with pytest.raises(openai.NotFoundError):
        mine.models.retrieve("another")


def test_texts_become_vectors_in_both_encodings(sure: Any) -> None:
    mine = client(sure)

    packed = mine.embeddings.create(model="any", input=["the pump is dry", "la bomba"])  # the client asks for base64 by itself
    plain = mine.embeddings.create(model="any", input="the pump is dry", encoding_format="float")
    raw = httpx.post(sure.serve() + "/v1/embeddings", json={"input": "la bomba", "encoding_format": "base64"}).json()

    assert packed.data[0].embedding == pytest.approx(plain.data[0].embedding)
    assert struct.unpack("<16f", base64.b64decode(raw["data"][0]["embedding"])) == pytest.approx(packed.data[1].embedding)
    assert (packed.usage.prompt_tokens, packed.data[1].index) == (6, 1)


def test_an_answer_from_memory_streams_like_any_other(sure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = client(sure)
    first = mine.completions.create(model="any", prompt=SOURCE)
    given = sure.answering.answer

    def remembered(record: Any, **others: Any) -> Any:
        return msgspec.structs.replace(given(record, **{**others, "listening": None}), spoken=None)

    monkeypatch.setattr(sure.answering, "answer", remembered)
    chunks = list(mine.completions.create(model="any", prompt=SOURCE, stream=True, stream_options={"include_usage": True}))

    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == first.choices[0].text
    assert chunks[-1].usage.total_tokens == 0  # type: ignore[union-attr]
