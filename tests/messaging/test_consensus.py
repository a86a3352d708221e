"""node/escalation/consensus.py: which of several replies stands."""

import itertools

import msgspec
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st

from node.escalation.consensus import MAX_SHARE, TRUST_FLOOR, Record, Vote, agree, capped, settled, verdicts_on
from protocol.likeness import chrf
from protocol.messages import Reply
from protocol.tasks import RANCH, translation

TEXT = translation("English", "Spanish")
words = st.text(alphabet="abcdeé ñ:", min_size=1, max_size=30).filter(lambda text: text.strip())
any_text = st.text(alphabet=st.characters(codec="utf-8"), max_size=40)
confidences = st.floats(min_value=-1.0, max_value=2.0)
said = st.lists(st.tuples(st.sampled_from(["leak: a", "leak: b", "normal: c", "overflow: d"]), st.floats(0, 1)), min_size=1, max_size=8)


def reply(text: str, confidence: float = 0.8, peer: str = "base", refused: str = "", **fields) -> Reply:
    return Reply(
        id=f"r-{peer}", question="q", question_digest="d", peer=peer, model_digest="m", text=text, confidence=confidence, refused=refused,
        **fields,
    )  # fmt: skip


def replies(*texts_and_confidences) -> list[Reply]:
    return [reply(text, confidence, f"peer{number}") for number, (text, confidence) in enumerate(texts_and_confidences)]


@pytest.mark.rule("vote-7")
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


@pytest.mark.rule("vote-7")
@given(any_text, any_text)
@settings(deadline=None)
def test_chrf_is_sacrebleus_on_any_text(text, reference):
    assert chrf(text, reference) == pytest.approx(sacrebleu.sentence_chrf(text, [reference]).score / 100, abs=1e-9)


@given(words, words)
@settings(deadline=None)
def test_chrf_is_a_share_and_one_for_equal_texts(text, reference):
    assert 0.0 <= chrf(text, reference) <= 1.0
    assert chrf(text, text) == pytest.approx(1.0)


@pytest.mark.rule("vote-1")
def test_the_verdict_with_the_most_weight_behind_it_wins_even_against_the_surest_single_peer():
    outcome = agree(replies(("leak: a", 0.7), ("normal: all well", 0.6), ("normal: all is well", 0.6)), RANCH)

    assert outcome.reply.text.startswith("normal:")
    assert outcome.agreement == pytest.approx(1.2 / 1.9)
    assert outcome.reply.confidence == pytest.approx(0.6 * 1.2 / 1.9)


def test_one_reply_keeps_its_own_confidence():
    outcome = agree([reply("leak: a", 0.7)], RANCH)

    assert (outcome.reply.text, outcome.reply.confidence, outcome.agreement) == ("leak: a", pytest.approx(0.7), 1.0)


def test_a_text_without_a_verdict_does_not_vote_but_counts_against_certainty():
    outcome = agree(replies(("I do not know", 0.9), ("leak: a", 0.9)), RANCH)

    assert outcome.reply.text == "leak: a"
    assert outcome.agreement == pytest.approx(0.5)


@pytest.mark.rule("vote-1")
def test_of_translations_the_one_most_like_the_others_stands():
    outcome = agree(replies(("Bananas are blue.", 0.8), ("El gato duerme en la casa.", 0.8), ("El gato duerme en casa.", 0.8)), TEXT)

    assert outcome.reply.text == "El gato duerme en la casa."


def test_refusals_do_not_count():
    outcome = agree([reply("", refused="busy"), reply("leak: a", 0.4, "ridge")], RANCH)

    assert (outcome.reply.text, outcome.agreement) == ("leak: a", 1.0)


def test_when_nobody_answered_there_is_no_consensus():
    with pytest.raises(ValueError, match="nobody answered"):
        agree([reply("", refused="busy")], RANCH)


# ---- liars


@pytest.mark.rule("vote-2")
@given(st.floats(0, 1), st.lists(st.floats(0, 1), min_size=2, max_size=7))
@settings(deadline=None)
def test_one_liar_never_wins_against_all_others_together_however_sure_it_is(liars, honest):
    outcome = agree(replies(("leak: lies", liars), *(("normal: all well", confidence) for confidence in honest)), RANCH)

    assert outcome.reply.text.startswith("normal:")


@pytest.mark.rule("vote-2")
@given(st.floats(0, 1), st.lists(st.floats(0, 1), min_size=2, max_size=5), words, words)
@settings(deadline=None)
def test_one_lying_translation_never_wins_against_others_that_say_the_same(liars, honest, lie, truth):
    outcome = agree(replies((lie, liars), *((truth, confidence) for confidence in honest)), TEXT)

    assert outcome.reply.text == truth or "".join(lie.split()) == "".join(truth.split())


@pytest.mark.rule("vote-2")
@given(st.lists(st.floats(1e-3, 1.0), min_size=1, max_size=12))
@settings(deadline=None)
def test_shares_sum_to_one_keep_the_order_of_weights_and_none_is_above_the_cap(weights):
    shares = capped(weights)

    assert sum(shares) == pytest.approx(1.0)
    if len(weights) > 2:
        assert max(shares) <= MAX_SHARE + 1e-9
    ordered = sorted(zip(weights, shares, strict=True))
    assert all(later >= earlier - 1e-9 for (_, earlier), (_, later) in itertools.pairwise(ordered))


@pytest.mark.rule("vote-4")
def test_a_peer_that_lost_its_trust_is_outweighed_by_one_that_has_it():
    told = replies(("leak: lies", 0.9), ("normal: all well", 0.4), ("overflow: perhaps", 0.3))

    assert agree(told, RANCH).reply.text == "leak: lies"
    assert agree(told, RANCH, trust={"peer0": 0.2}).reply.text == "normal: all well"


@pytest.mark.rule("vote-4")
def test_trust_falls_with_lost_votes_and_comes_back_with_won_ones():
    record = Record()
    for _ in range(20):
        record = record.after(Vote(False, 0.5))
    low = record.trust
    for _ in range(100):
        record = record.after(Vote(True, 0.5))

    assert TRUST_FLOOR <= low < 0.2
    assert record.trust > 0.9


@pytest.mark.rule("vote-4")
def test_of_two_that_disagree_nobody_is_held_to_have_erred_and_of_three_the_odd_one_out():
    two = replies(("leak: a", 0.9), ("normal: b", 0.2))
    three = [*two, reply("leak: c", 0.5, "peer2")]

    assert verdicts_on(two, RANCH, agree(two, RANCH)) == {}
    assert verdicts_on(three, RANCH, agree(three, RANCH)) == {"peer0": Vote(True, 0.9), "peer1": Vote(False, 0.2), "peer2": Vote(True, 0.5)}


@pytest.mark.rule("vote-4")
def test_where_all_differ_nobody_is_held_to_have_erred_however_sure_the_one_that_stands():
    told = replies(("leak: lies", 1.0), ("normal: b", 0.3), ("overflow: c", 0.3))

    outcome = agree(told, RANCH)

    assert outcome.reply.text == "leak: lies"
    assert verdicts_on(told, RANCH, outcome) == {}


@pytest.mark.rule("vote-4")
def test_two_that_relay_one_speaker_do_not_agree_with_one_another():
    told = [
        reply("leak: a", 0.9, "base", speaker="teacher"), reply("leak: a", 0.9, "ridge", speaker="teacher"),
        reply("normal: b", 0.3, "coast"), reply("overflow: c", 0.3, "valley"),
    ]  # fmt: skip

    assert verdicts_on(told, RANCH, agree(told, RANCH)) == {}


@pytest.mark.rule("vote-4")
def test_who_claims_more_than_comes_true_is_believed_less_than_who_lost_as_often_and_said_it_was_unsure():
    loud = quiet = Record()
    for won in [True, False, False] * 10:
        loud, quiet = loud.after(Vote(won, 1.0)), quiet.after(Vote(won, 0.3))

    assert quiet.trust > 2 * loud.trust
    assert 1.0 * loud.trust < 0.3 * quiet.trust + 0.05


@pytest.mark.rule("vote-4")
def test_a_translation_that_is_merely_different_is_not_held_against_its_peer():
    told = replies(
        ("El gato duerme en la casa.", 0.9), ("El gato duerme en casa.", 0.9), ("Duerme el felino en su casa.", 0.9), ("zz qq", 0.9)
    )

    counted = verdicts_on(told, TEXT, agree(told, TEXT))

    assert (counted["peer0"].agreed, counted["peer1"].agreed, counted["peer3"].agreed) == (True, True, False)
    assert "peer2" not in counted


@pytest.mark.rule("vote-6")
def test_one_models_answer_relayed_by_two_peers_is_one_voice():
    told = [
        reply("leak: a", 0.9, "base", speaker="teacher"), reply("leak: a", 0.9, "ridge", speaker="teacher"),
        reply("normal: b", 0.8, "coast"), reply("normal: b", 0.8, "valley"),
    ]  # fmt: skip

    outcome = agree(told, RANCH)

    assert (outcome.reply.text, outcome.voices) == ("normal: b", 3)


# ---- ties and stragglers


@pytest.mark.rule("vote-3")
@given(said, st.randoms())
@settings(deadline=None)
def test_the_order_of_arrival_changes_nothing(texts, rng):
    told = replies(*texts)
    shuffled = told.copy()
    rng.shuffle(shuffled)

    assert agree(told, RANCH) == agree(shuffled, RANCH)


@pytest.mark.rule("vote-3")
def test_of_two_that_disagree_the_surer_one_stands_and_the_doubt_is_told():
    outcome = agree(replies(("leak: a", 0.6), ("normal: b", 0.8)), RANCH)

    assert (outcome.reply.text, outcome.agreement) == ("normal: b", 0.5)
    assert outcome.reply.confidence == pytest.approx(0.4)


@pytest.mark.rule("vote-5")
@given(said, st.lists(st.tuples(st.sampled_from(["leak: a", "normal: c", "tank-low: e"]), st.floats(0, 1)), max_size=3))
@settings(deadline=None)
def test_what_is_settled_no_later_reply_overturns(texts, later):
    told = replies(*texts)
    late = [reply(text, confidence, f"late{number}") for number, (text, confidence) in enumerate(later)]

    if settled(told, RANCH, pending=len(late)):
        before, after = agree(told, RANCH).reply.text, agree([*told, *late], RANCH).reply.text

        assert RANCH.parse(before).verdict == RANCH.parse(after).verdict


@pytest.mark.rule("vote-5")
def test_two_equal_translations_of_three_are_settled_and_two_alike_are_not():
    equal = replies(("El gato duerme.", 0.8), ("El gato duerme.", 0.6))
    alike = replies(("El gato duerme.", 0.8), ("El gato está durmiendo.", 0.6))

    assert settled(equal, TEXT, pending=1)
    assert not settled(alike, TEXT, pending=1)


@given(st.lists(st.tuples(st.sampled_from(["leak: a", "leak: b", "normal: c", "nonsense"]), confidences), min_size=1, max_size=8))
@settings(deadline=None)
def test_the_outcome_is_one_of_the_replies_and_never_surer_than_it_was(texts):
    told = replies(*texts)

    outcome = agree(told, RANCH)

    assert any(msgspec.structs.replace(one, confidence=0.0) == msgspec.structs.replace(outcome.reply, confidence=0.0) for one in told)
    assert 0.0 < outcome.agreement <= 1.0
    assert 0.0 <= outcome.reply.confidence <= max(min(1.0, max(0.0, one.confidence)) for one in told)
