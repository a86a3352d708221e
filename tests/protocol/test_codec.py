"""What came over a wire is checked once, here."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import codec
from protocol.errors import BadInput, MalformedMessage, MilpaError, TooLarge
from protocol.messages import Event, Question, Reply, Status
from protocol.tasks import Record

QUESTION = Question(id="q1", asker="esteli", task="ranch", prompt="soil 777\nes:", confidence=0.4, expires=100)
RECORD = b'{"id": "r1", "task": "ranch", "source": "soil 777", "lang": "es"}'


def test_a_message_comes_back_as_it_was_sent() -> None:
    assert codec.decode_message(codec.encode(QUESTION)) == QUESTION


def test_equal_messages_are_equal_bytes() -> None:
    one = Event(id="e", node="n", kind="answers", figures={"b": 1.0, "a": 2.0})
    other = Event(id="e", node="n", kind="answers", figures={"a": 2.0, "b": 1.0})

    assert codec.encode(one) == codec.encode(other)


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{", b"\xff\xfe", b"[]", b'{"type": "unheard-of"}', b'{"type": "question", "id": "q"}',
        codec.encode(QUESTION).replace(b'"expires":100', b'"expires":"soon"'), codec.encode(QUESTION).replace(b'"task"', b'"tusk"'),
    ],
)  # fmt: skip
def test_bytes_that_are_no_message_are_refused(data: bytes) -> None:
    with pytest.raises(MalformedMessage):
        codec.decode_message(data)


def test_an_oversized_message_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(TooLarge, match="limit"):
        codec.decode_message(b"[" * (codec.MESSAGE_LIMIT + 1))


def test_an_oversized_message_is_refused_before_it_is_sent() -> None:
    with pytest.raises(TooLarge):
        codec.encode(msgspec.structs.replace(QUESTION, prompt="x" * codec.MESSAGE_LIMIT))


@given(st.binary(max_size=400))
def test_no_bytes_crash_the_decoder(data: bytes) -> None:
    for decode in (codec.decode_message, codec.decode_record):
        try:
            decode(data)
        except MilpaError:
            continue


@given(
    st.builds(Reply, id=st.text(max_size=9), question=st.text(max_size=9), question_digest=st.just("d"), peer=st.just("p"),
              model_digest=st.just("m"), text=st.text(max_size=99), confidence=st.floats(0, 1), seconds=st.floats(0, 9))
)  # fmt: skip
def test_any_reply_survives_the_wire(reply: Reply) -> None:
    assert codec.decode_message(codec.encode(reply)) == reply


def test_a_status_keeps_its_boot_and_sequence() -> None:
    status = Status(node="esteli", boot="b", sequence=7, state="answering")

    assert codec.decode_message(codec.encode(status)) == status


def test_a_record_is_read_with_its_defaults() -> None:
    assert codec.decode_record(RECORD) == Record(id="r1", task="ranch", source="soil 777", lang="es")


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (RECORD.replace(b'"source"', b'"sauce"'), "sauce|source"),
        (RECORD.replace(b'"id": "r1", ', b""), "id"),
        (RECORD.replace(b"soil 777", b"  "), "empty source"),
        (RECORD.replace(b'"es"', b'"tlh"'), "language"),
        (RECORD.replace(b"soil 777", b"x" * 5000), "limit"),
    ],
)
def test_a_record_that_cannot_be_used_is_refused_with_the_reason(data: bytes, why: str) -> None:
    with pytest.raises(BadInput, match=why):
        codec.decode_record(data)
