"""What of an answer's text is sent: the same whether at once or piece by piece."""

import math

from hypothesis import example, given
from hypothesis import strategies as st

from node.api.shapes import Asked
from node.api.telling import Telling
from protocol.models.generation import Piece

PIECES = st.lists(st.text("ab :ñ", max_size=4), min_size=1, max_size=12)
STOPS = st.lists(st.text("ab :ñ", min_size=1, max_size=3), max_size=3)


def said(pieces: list[str], **asked: object) -> tuple[list[str], Telling]:
    telling = Telling(Asked(("x",), **asked))  # type: ignore[arg-type]
    return [telling.hear(Piece(text, 0, math.log(0.5))) for text in pieces], telling


@given(PIECES, STOPS)
@example(["ba", "a"], ["a", "baa"])
def test_what_is_sent_is_the_text_up_to_the_first_stop_and_never_a_part_of_one(pieces: list[str], stop: list[str]) -> None:
    for heard in range(1, len(pieces) + 1):  # the stop that is complete first ends it, even if a longer one began before it
        whole = "".join(pieces[:heard]).lstrip()
        ends = [at for at in (whole.find(one) for one in stop) if at >= 0]
        if ends:
            break

    sent, telling = said(pieces, stop=tuple(stop))

    text = whole[: min(ends)] if ends else whole.rstrip()
    held = "" if ends else telling._held.rstrip()
    assert "".join(sent) + held == text or (ends and text.startswith("".join(sent)))
    assert not any(one in "".join(sent) for one in stop)


def test_white_space_at_both_ends_is_not_sent() -> None:
    sent, telling = said([" ", " leak", ": a ", " "])

    assert sent == ["", "leak", ": a", ""]
    assert telling.text == "leak: a"


def test_a_stop_string_split_over_pieces_is_found() -> None:
    sent, telling = said(["leak", ": the", " en", "d of", " it"], stop=(" end",))

    assert "".join(sent) == "leak: the"
    assert telling.finish == "stop"


def test_after_the_last_token_nothing_is_sent() -> None:
    sent, telling = said(["a", "b", "c", "d"], max_tokens=2)

    assert (sent, telling.finish, len(telling.sent)) == (["a", "b", "", ""], "length", 2)
