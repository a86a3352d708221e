"""protocol/frames.py: every frame fits, comes back as it was, and no other bytes are taken for one."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import frames
from protocol.codec import encode as encode_json
from protocol.digests import digest_bytes
from protocol.errors import BadInput, MalformedMessage
from protocol.frames import FRAME_LIMIT, KINDS, NO_CODE, REFUSALS, STATES, Alive, Reference, Release, Verdict, decode, encode, mark
from protocol.messages import Question, Reply, Status
from protocol.tasks import RANCH, RANCH_CODES

U8, U16, U32 = st.integers(0, 0xFF), st.integers(0, 0xFFFF), st.integers(0, 0xFFFF_FFFF)
HEX = "0123456789abcdef"


def hexadecimal(digits: int) -> st.SearchStrategy[str]:
    return st.text(HEX, min_size=digits, max_size=digits)


DIGESTS = st.one_of(st.just(""), hexadecimal(12).filter(lambda digest: set(digest) != {"0"}))
SHARES = st.integers(0, 0xFFFF).map(lambda share: share / 0xFFFF)
FRAMES = {
    "alive": st.builds(
        Alive, st.binary(min_size=4, max_size=4), sequence=U32, answered=U32, escalated=U32, waiting=U16, queue=U8
    ),
    "state": st.builds(
        Status, node=st.just("esteli"), boot=hexadecimal(16), sequence=U32, state=st.sampled_from(STATES), connection=U16,
        role=st.sampled_from(frames.ROLES), release=U32, model_digest=DIGESTS, adapter_digest=DIGESTS, at=U32, sleeping_until=U32,
        answered=U32, escalated=U32, waiting=U16, serves=st.booleans(), queue=U8, link=st.just("lora"),
    ),
    "question": st.builds(
        Reference, hexadecimal(32), st.binary(min_size=4, max_size=4), st.binary(min_size=8, max_size=8), SHARES, U32,
        st.binary(min_size=4, max_size=4),
    ),
    "verdict": st.builds(
        Verdict, hexadecimal(32), st.binary(min_size=8, max_size=8), U8, SHARES, st.binary(min_size=6, max_size=6),
        st.binary(min_size=4, max_size=4), st.integers(0, 0xFFFF).map(lambda tenths: tenths / 10), st.sampled_from(REFUSALS),
    ),
    "release": st.builds(Release, U32),
}  # fmt: skip
SIZES = {"alive": 20, "state": 51, "question": 39, "verdict": 41, "release": 5}  # bytes, as in docs/adr/0024


@pytest.mark.parametrize("kind", FRAMES)
@given(data=st.data())
def test_every_frame_comes_back_as_it_was_in_its_one_size(kind: str, data: st.DataObject):
    frame = data.draw(FRAMES[kind])

    sent = encode(frame)

    assert len(sent) == SIZES[kind] <= FRAME_LIMIT
    assert decode(sent, node="esteli") == frame


@pytest.mark.parametrize("value", [-1, 0, 1 << 40, 10**30])
def test_a_count_of_any_size_fits_and_stays_at_the_largest(value: int):
    status = Status(
        node="esteli", boot="0123456789abcdef", sequence=value, state="answering", connection=value, release=value, at=value,
        sleeping_until=value, answered=value, escalated=value, waiting=value, queue=value,
    )  # fmt: skip

    back = decode(encode(status), node="esteli")

    assert isinstance(back, Status)
    assert (back.sequence, back.waiting, back.queue) == ((0, 0, 0) if value <= 0 else (0xFFFF_FFFF, 0xFFFF, 0xFF))
    assert len(encode(frames.alive(status))) == SIZES["alive"]


@given(st.binary(max_size=80))
def test_any_bytes_are_a_frame_or_a_clear_error(data: bytes):
    try:
        frame = decode(data)
    except MalformedMessage:
        return
    assert encode(frame) == data


@given(st.sampled_from(sorted(FRAMES)).flatmap(lambda kind: FRAMES[kind]), st.integers(0, 60))
def test_a_frame_of_another_length_or_version_is_refused(frame: frames.Frame, length: int):
    sent = encode(frame)

    if length != len(sent):
        with pytest.raises(MalformedMessage):
            decode((sent + bytes(60))[:length])
    with pytest.raises(MalformedMessage, match="version 2"):
        decode(bytes([sent[0] + 0x10]) + sent[1:])


def test_there_is_a_size_for_every_kind():
    assert sorted(SIZES.values()) == sorted(layout.size for _, layout in KINDS)


def test_an_alive_frame_renews_the_counts_of_the_same_boots_last_status_only():
    last = Status(node="esteli", boot="b1", sequence=4, state="answering", release=7, answered=10)
    said = frames.alive(msgspec.structs.replace(last, sequence=5, answered=12, queue=3))

    assert frames.woken(last, said, at=99) == msgspec.structs.replace(last, sequence=5, answered=12, queue=3, at=99)
    assert frames.woken(msgspec.structs.replace(last, boot="b2"), said, at=99) is None


def test_a_question_by_reference_names_its_prompt_and_peer_and_a_span_instead_of_a_time():
    question = Question("ab" * 16, "esteli", "ranch", "soil 21 C\nen:", 0.25, 1_000)

    asked = frames.reference(question, "base", now=400.0)

    assert asked.prompt == bytes.fromhex(digest_bytes(b"soil 21 C\nen:"))[:8]
    assert (asked.expires_s, asked.peer, asked.task) == (600, mark("base"), mark("ranch"))
    assert frames.named(asked.peer, ["ridge", "base"]) == "base"


@pytest.mark.parametrize("change", [{"id": "q-1"}, {"path": ("ridge",)}])
def test_a_question_that_a_frame_would_cripple_is_refused(change: dict):
    question = msgspec.structs.replace(Question("ab" * 16, "esteli", "ranch", "soil", 0.25, 1_000), **change)

    with pytest.raises(BadInput, match="fit a frame"):
        frames.reference(question, "base", now=0.0)


@pytest.mark.parametrize("code", ["", *RANCH_CODES])
def test_a_verdict_names_the_code_by_its_place(code: str):
    reply = Reply("r", "ab" * 16, digest_bytes(b"p"), "base", "cd" * 32, f"{code}: a sentence", confidence=0.5, seconds=3.26)

    said = frames.verdict(reply, code, RANCH.codes)

    assert said.code == (RANCH_CODES.index(code) if code else NO_CODE)
    assert (said.model.hex(), decode(encode(said)).seconds) == ("cd" * 6, 3.3)


def test_a_refusal_of_unknown_words_is_still_a_refusal():
    reply = Reply("r", "ab" * 16, digest_bytes(b"p"), "base", "", "", refused="the disk is full")

    assert frames.verdict(reply, "", RANCH.codes).refused == REFUSALS[-1]


def test_a_frame_is_a_fraction_of_the_message_it_stands_for():
    status = Status(
        node="esteli", boot="0123456789abcdef", sequence=77, state="answering", release=3, model_digest="ab" * 32, adapter_digest="cd" * 32,
        at=1_790_000_000, answered=5_000, escalated=800, waiting=2, version="0.1.0",
    )  # fmt: skip

    assert len(encode_json(status)) > 5 * len(encode(status))
