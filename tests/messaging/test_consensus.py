"""node/escalation/consensus.py: which of several replies stands."""

import msgspec
import pytest
import sacrebleu
from hypothesis import given
from hypothesis import strategies as st

from node.escalation.consensus import agree, chrf
from protocol.messages import Reply
from protocol.tasks import RANCH, translation

TEXT = translation("English", "Spanish")
words = st.text(alphabet="abcdeé ñ:", min_size=1, max_size=30).filter(lambda text: text.strip())
confidences = st.floats(min_value=-1.0, max_value=2.0)


def reply(text: str, confidence: float = 0.8, peer: str = "base", refused: str = "") -> Reply:
    return Reply(
        id="r", question="q", question_digest="d", peer=peer, model_digest="m", text=text, confidence=confidence, refused=refused
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("leak: the valve drips", "leak: the valve drips all night"),
        ("El gato duerme.", "El perro duerme."),
        ("a", "b"),
        ("ab", "ab"),
        ("", "something"),
        ("fuga: se pierde agua en la línea 3", "fuga: hay una pérdida de agua en la línea"),
    ],
)
def test_chrf_is_sacrebleus(text, reference):
    assert chrf(text, reference) == pytest.approx(sacrebleu.sentence_chrf(text, [reference]).score / 100, abs=1e-9)


@given(words, words)
def test_chrf_is_a_share_and_one_for_equal_texts(text, reference):
    assert 0.0 <= chrf(text, reference) <= 1.0
    assert chrf(text, text) == pytest.approx(1.0)


def test_the_verdict_with_the_most_confidence_behind_it_wins_even_against_the_surest_single_peer():
    replies = [reply("leak: a", 0.9, "one"), reply("normal: all well", 0.6, "two"), reply("normal: all is well", 0.6, "three")]

    outcome = agree(replies, RANCH)

    assert outcome.reply.text.startswith("normal:")
    assert outcome.agreement == pytest.approx(1.2 / 2.1)
    assert outcome.reply.confidence == pytest.approx(0.6 * 1.2 / 2.1)


def test_one_reply_keeps_its_own_confidence():
    outcome = agree([reply("leak: a", 0.7)], RANCH)

    assert (outcome.reply.text, outcome.reply.confidence, outcome.agreement) == ("leak: a", pytest.approx(0.7), 1.0)


def test_a_text_without_a_verdict_does_not_vote_but_counts_against_certainty():
    outcome = agree([reply("I do not know", 0.9), reply("leak: a", 0.9)], RANCH)

    assert outcome.reply.text == "leak: a"
    assert outcome.agreement == pytest.approx(0.5)


def test_of_translations_the_one_most_like_the_others_stands():
    replies = [reply("Bananas are blue."), reply("El gato duerme en la casa."), reply("El gato duerme en casa.")]

    assert agree(replies, TEXT).reply.text == "El gato duerme en la casa."


def test_refusals_do_not_count():
    outcome = agree([reply("", refused="busy"), reply("leak: a", 0.4)], RANCH)

    assert (outcome.reply.text, outcome.agreement) == ("leak: a", 1.0)


def test_when_nobody_answered_there_is_no_consensus():
    with pytest.raises(ValueError, match="nobody answered"):
        agree([reply("", refused="busy")], RANCH)


@given(st.lists(st.tuples(st.sampled_from(["leak: a", "leak: b", "normal: c", "nonsense"]), confidences), min_size=1, max_size=8))
def test_the_outcome_is_one_of_the_replies_and_never_surer_than_it_was(said):
    replies = [reply(text, confidence) for text, confidence in said]

    outcome = agree(replies, RANCH)

    assert any(msgspec.structs.replace(one, confidence=0.0) == msgspec.structs.replace(outcome.reply, confidence=0.0) for one in replies)
    assert 0.0 < outcome.agreement <= 1.0
    assert 0.0 <= outcome.reply.confidence <= max(min(1.0, max(0.0, one.confidence)) for one in replies)


@given(st.lists(st.tuples(st.sampled_from(["leak", "normal", "overflow"]), st.floats(0.06, 1.0)), min_size=1, max_size=8), st.randoms())
def test_the_order_of_replies_does_not_change_the_winning_weight(said, rng):
    replies = [reply(f"{verdict}: x", confidence) for verdict, confidence in said]
    shuffled = replies.copy()
    rng.shuffle(shuffled)

    assert agree(replies, RANCH).agreement == pytest.approx(agree(shuffled, RANCH).agreement)
