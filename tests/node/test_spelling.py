"""Which tokens may spell a verdict."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import DoesNotFit
from protocol.models.spelling import Spelling
from protocol.tasks import RANCH_CODES

LETTERS = [bytes([sign]) for sign in b" abcdefghijklmnopqrstuvwxyz-:\n0"]


def pieces(spelling: Spelling, vocabulary: list[bytes], state: bytes) -> set[bytes]:
    return {vocabulary[token] for token in spelling.allowed(state)}


def test_a_token_may_lie_inside_a_code_end_at_its_colon_or_go_beyond() -> None:
    vocabulary = [*LETTERS, b" le", b"leak", b"ak", b"ak:", b"ak: the", b"ak:\n", b"aks", b"normal"]
    spelling = Spelling(("leak", "normal"), vocabulary)

    assert pieces(spelling, vocabulary, b"") == {b" ", b"l", b"n", b" le", b"leak", b"normal"}
    assert pieces(spelling, vocabulary, b" le") == {b"a", b"ak", b"ak:", b"ak: the"}
    assert spelling.after(b" le", b"ak") == b" leak"
    assert spelling.after(b" le", b"ak:") is None
    assert spelling.after(b" le", b"ak: the") is None


def test_a_token_with_no_way_on_is_not_allowed() -> None:
    vocabulary = [b" ", b"l", b"le", b"ak:", b"e"]  # after "l" comes "e" and then "ak:"; there is no "a" and no "k"
    spelling = Spelling(("leak",), [*vocabulary, b"lea"])

    assert pieces(spelling, [*vocabulary, b"lea"], b"") == {b" ", b"l", b"le"}


def test_a_vocabulary_that_cannot_spell_a_code_is_told() -> None:
    with pytest.raises(DoesNotFit, match="'leak:'"):
        Spelling(("normal", "leak"), [b"normal", b":", b"l", b"e"])


def test_the_longest_way_to_say_a_code_is_by_its_smallest_tokens() -> None:
    assert Spelling(("leak", "normal"), LETTERS).longest == len(" normal:")
    assert Spelling(("leak", "normal"), [*LETTERS[:1], b"leak", b"normal", b":", b"leak:"]).longest == 3
    assert Spelling(("leak", "normal"), [b" leak: the", b" normal", b": all"]).longest == 2


WORDS = sorted({code[start:end].encode() for code in RANCH_CODES for start, end in itertools.combinations(range(0, len(code) + 1, 3), 2)})
VOCABULARY = [*LETTERS, *WORDS, b": the", b"\xc3"]
RANCH_SPELLING = Spelling(RANCH_CODES, VOCABULARY)


@given(st.data())
def test_whatever_is_chosen_among_the_allowed_a_whole_code_comes_out(data: st.DataObject) -> None:
    state: bytes | None = b""
    said, tokens = b"", 0
    while state is not None:
        piece = VOCABULARY[data.draw(st.sampled_from(list(map(int, RANCH_SPELLING.allowed(state)))))]
        said += piece
        state, tokens = RANCH_SPELLING.after(state, piece), tokens + 1

    assert tokens <= RANCH_SPELLING.longest
    code, colon, _ = said.decode().partition(":")
    assert colon and code.removeprefix(" ") in RANCH_CODES
