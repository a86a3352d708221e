"""node/escalation/asking.py: rules, without a broker."""

import random

import msgspec
import pytest

from node.escalation.asking import BIRTH_S, BUSY, PATIENCE_S, Asker
from node.escalation.choosing import RETRY_BASE_S, Me
from node.escalation.presence import Presence
from node.escalation.reporting import Reporter
from protocol import topics
from protocol.codec import encode
from protocol.digests import digest_bytes
from protocol.errors import BadInput, MalformedMessage
from protocol.messages import Ack, Question, Reply, Status
from protocol.mqtt import Incoming
from protocol.outbox import Outbox

PROMPT = "tank 12 cm, pump on\nen:"
TEACHER = "7" * 64  # digest of the model every peer here has announced


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


class Site:
    """One asking node whose `apply` remembers what it was told."""

    def __init__(self, engine, *, peers=("base", "ridge"), votes=1, **options):
        self.engine, self.clock, self.applied, self.refused, self.met = engine, Clock(), [], [], []
        self.outcome, self.linked = "upgraded", True
        self.presence = Presence(monotonic=self.clock)
        self.outbox = Outbox(engine, clock=self.clock)
        for peer in peers:
            self.knows(peer)
        self.make_asker(peers, votes, **options)

    def make_asker(self, peers=("base", "ridge"), votes=1, **options):
        self.asker = Asker(
            "esteli", peers, self.outbox, engine=self.engine, presence=self.presence, votes=votes, clock=self.clock, apply=self.apply,
            refuse=lambda reply, why: self.refused.append((reply.peer, why)), meet=self.met.append, linked=lambda: self.linked,
            me=lambda: Me("ranch", "student", "", 100),
            reporter=Reporter("esteli", self.outbox, engine=self.engine, clock=self.clock), deadline_s=100, rng=random.Random(1), **options,
        )  # fmt: skip

    def knows(self, peer, state="answering", *, boot="b", sequence=1, asleep_s=0.0, **fields):
        said = {"model_digest": TEACHER, "serves": True, "parameters": 500, **fields}
        self.presence.note(Status(peer, boot, sequence, state, **said), asleep_s=asleep_s)

    def apply(self, reply):
        self.applied.append(reply)
        return self.outcome(reply) if callable(self.outcome) else self.outcome

    def ask(self, id="q1", task="ranch", **fields):
        with self.engine.begin() as connection:
            self.asker.ask(connection, Question(id, "esteli", task, PROMPT, 0.2, int(self.clock.now) + 100, **fields))

    def sent(self):
        """The broker takes everything."""
        for row in self.outbox.waiting():
            self.outbox.handed_over(row.id)

    def after(self, seconds):
        self.clock.now += seconds
        return self.asker.sweep()

    def hears(self, peer, text="leak: x", *, question="q1", confidence=0.9, refused="", id="", correlation=None, topic=None, **fields):
        said = {"question_digest": digest_bytes(PROMPT.encode()), "model_digest": TEACHER, **fields}
        reply = Reply(
            id=id or f"r-{peer}-{question}", question=question, peer=peer,
            text="" if refused else text, confidence=confidence, refused=refused, **said,
        )  # fmt: skip
        correlation = question.encode() if correlation is None else correlation
        self.asker.heard(Incoming(topic or topics.reply("esteli", peer), encode(reply), correlation=correlation))

    @property
    def asked(self):
        return [row.topic for row in self.outbox.waiting() if row.kind == "question"]


@pytest.fixture
def site(database):
    return Site(database)


def to(peer):
    return topics.question(peer, "esteli")


@pytest.mark.rule("ask-1")
def test_a_question_goes_to_the_first_peer_with_everything_a_reply_needs(site):
    site.ask()

    [row] = site.outbox.waiting()
    assert (row.topic, row.response_topic, row.correlation) == (to("base"), topics.reply("esteli", "base"), b"q1")
    assert row.expires == site.clock.now + 100
    assert msgspec.json.decode(row.payload, type=Question).prompt == PROMPT


@pytest.mark.rule("ask-2")
def test_a_question_shares_the_fate_of_the_callers_transaction(site):
    with pytest.raises(ZeroDivisionError), site.engine.begin() as connection:
        site.asker.ask(connection, Question("q1", "esteli", "ranch", PROMPT, 0.2, int(site.clock.now) + 100))
        raise ZeroDivisionError

    assert (site.asker.open, site.asked) == (0, [])


# ---- whom to ask


@pytest.mark.rule("ask-4")
def test_a_peer_that_is_awake_is_asked_before_one_that_is_not(site):
    site.knows("base", "lost", sequence=2)

    site.ask()

    assert site.asked == [to("ridge")]


@pytest.mark.rule("ask-4")
def test_of_two_peers_the_one_with_the_shorter_queue_is_asked(site):
    site.knows("base", sequence=2, queue=20, answer_s=2.0)
    site.knows("ridge", sequence=2, queue=1, answer_s=2.0)

    site.ask()

    assert site.asked == [to("ridge")]


@pytest.mark.rule("ask-3")
def test_a_question_that_came_by_a_peer_is_not_put_to_it_again(site):
    site.ask(path=("base",))

    assert site.asked == [to("ridge")]


@pytest.mark.rule("ask-3")
def test_a_question_that_nobody_may_be_asked_ends_at_the_next_look(site):
    told = []
    site.asker.unanswered = told.append
    site.ask(path=("base", "ridge"))

    site.after(1)

    assert (told, site.asker.open, site.asked) == (["q1"], 0, [])


@pytest.mark.rule("ask-7")
def test_a_question_waits_for_a_sleeper_that_wakes_in_time(site):
    site.knows("base", "sleeping", sequence=2, asleep_s=60)
    site.knows("ridge", "sleeping", sequence=2, asleep_s=30)

    site.ask()

    assert site.asked == [to("ridge")]
    site.clock.now += 40
    site.hears("ridge")
    assert [reply.peer for reply in site.applied] == ["ridge"]


@pytest.mark.rule("ask-7")
def test_a_question_goes_elsewhere_when_the_peer_sleeps_past_its_deadline(site):
    site.knows("base", "sleeping", sequence=2, asleep_s=5_000)
    site.knows("ridge", "lost", sequence=2)

    site.ask()

    assert site.asked == [to("ridge")]


@pytest.mark.rule("ask-7")
def test_a_peer_that_falls_asleep_with_the_question_is_not_waited_for(site):
    site.ask()
    site.sent()
    site.knows("base", "sleeping", sequence=2, asleep_s=90)

    site.after(PATIENCE_S)

    assert site.asked == [to("base"), to("ridge")]


# ---- silence, busy peers, groups


@pytest.mark.rule("ask-6")
def test_a_peer_that_is_silent_for_the_patience_is_not_the_only_one_asked(site):
    site.ask()
    site.sent()

    site.after(PATIENCE_S - 1)
    assert site.asked == [to("base")]
    site.after(2)

    assert site.asked == [to("base"), to("ridge")]


@pytest.mark.rule("ask-6")
def test_silence_counts_only_from_when_the_broker_has_the_question(site):
    site.ask()
    site.linked = False
    site.after(3 * PATIENCE_S - 5)
    site.linked = True
    site.after(1)
    site.sent()

    assert site.asked == [to("base")]


@pytest.mark.rule("ask-12")
def test_a_question_that_expired_under_a_clock_that_was_ahead_is_put_again_when_the_clock_is_right(site):
    site.ask()
    site.sent()
    site.clock.now += 7200
    site.outbox.sweep()  # the other sweep, which would end the question, does not get to it before the power is cut
    assert site.asked == []
    site.clock.now -= 7200

    site.after(PATIENCE_S + 1)
    assert site.asked == [to("base")]
    site.hears("base")
    assert [reply.peer for reply in site.applied] == ["base"] and site.asked == []


@pytest.mark.rule("ask-12")
def test_a_message_that_never_stays_in_the_outbox_is_not_put_there_for_ever(database):
    site = Site(database, peers=("base",))
    site.ask()

    seen = []
    for _ in range(3):
        found = site.outbox.waiting()
        with site.engine.begin() as connection:
            site.outbox.settle(connection, *(row.id for row in found))
        site.after(PATIENCE_S + 1)
        seen.append(site.asked)

    assert seen == [[to("base")], [to("base")], []]


@pytest.mark.rule("ask-5")
def test_a_busy_peer_is_asked_again_when_it_said_and_another_meanwhile(site):
    site.ask()

    site.hears("base", refused=BUSY, retry_after=20.0)
    assert site.asked == [to("ridge")]
    site.after(19)
    assert site.asked == [to("ridge")]
    site.after(1 + 2 * RETRY_BASE_S)

    assert site.asked == [to("ridge"), to("base")]
    site.hears("base")
    assert [reply.peer for reply in site.applied] == ["base"]
    assert site.asked == []


@pytest.mark.rule("ask-5")
def test_two_nodes_told_the_same_by_a_busy_peer_come_back_at_different_times(database):
    site = Site(database, peers=("base",))
    again = []
    for number in range(8):
        site.ask(f"q{number}")
        site.hears("base", refused=BUSY, retry_after=20.0, question=f"q{number}")
    for _ in range(60):
        site.after(1)
        again.append(len(site.asked))

    assert again[18] == 0 and again[-1] == 8
    assert len(set(again)) > 3


@pytest.mark.rule("ask-8")
def test_a_group_is_asked_on_its_own_topic_and_any_member_may_reply(database):
    site = Site(database, peers=(), groups=("hills",))
    site.knows("ridge", groups=("hills",))
    site.ask()
    assert site.asked == [topics.group_question("hills", "esteli")]

    site.hears("ridge")

    assert [reply.peer for reply in site.applied] == ["ridge"]
    assert site.asked == []


@pytest.mark.rule("ask-8")
def test_a_group_whose_member_is_silent_is_asked_again_for_the_broker_to_pick_another(database):
    site = Site(database, peers=(), groups=("hills",))
    site.knows("ridge", groups=("hills",))
    site.ask()
    site.sent()

    site.after(PATIENCE_S + 1)

    assert [row.sent for row in site.outbox.waiting()] == [0]


@pytest.mark.rule("ask-8")
def test_a_member_that_declines_leaves_the_group_another_try(database):
    site = Site(database, peers=(), groups=("hills",))
    site.knows("ridge", groups=("hills",))
    site.ask()

    site.hears("ridge", refused="no model")
    assert site.asked == []
    site.after(2 * RETRY_BASE_S)

    assert site.asked == [topics.group_question("hills", "esteli")]


@pytest.mark.rule("ask-8")
def test_a_reply_of_a_node_outside_the_group_is_refused(database):
    site = Site(database, peers=(), groups=("hills",))
    site.knows("ridge", groups=("hills",))
    site.knows("stranger")
    site.ask()

    site.hears("stranger")
    site.after(BIRTH_S + 1)

    assert (site.applied, [peer for peer, _ in site.refused]) == ([], ["stranger"])


# ---- replies


@pytest.mark.rule("ask-9")
def test_a_reply_is_applied_and_the_question_forgotten(site):
    site.ask()

    site.hears("base")

    assert [reply.text for reply in site.applied] == ["leak: x"]
    assert (site.asked, site.asker.open) == ([], 0)


@pytest.mark.rule("ask-9")
def test_a_second_or_late_reply_changes_nothing(site):
    site.ask()
    site.hears("base")

    site.hears("base")
    site.hears("base", id="another")
    site.hears("base", question="never-asked")

    assert len(site.applied) == 1


def test_when_a_peer_declines_the_next_is_asked(site):
    site.ask()

    site.hears("base", refused="no model")
    assert site.asked == [to("ridge")]
    site.hears("ridge")

    assert [reply.peer for reply in site.applied] == ["ridge"]


def test_when_every_peer_declines_the_last_refusal_is_told_once(site):
    site.ask()

    site.hears("base", refused="no model")
    site.hears("ridge", refused="no model either")

    assert [reply.refused for reply in site.applied] == ["no model either"]
    assert site.asker.open == 0


def test_a_question_nobody_can_help_with_is_told_at_once(site):
    told = []
    site.asker.unanswered = told.append
    site.outcome = "refused"
    site.ask()

    site.hears("base", "gibberish")
    assert told == []
    site.hears("ridge", "more gibberish")

    assert told == ["q1"]
    assert site.asker.open == 0


def test_an_answer_that_cannot_be_used_makes_room_for_the_next_peer(site):
    site.outcome = lambda reply: "refused" if reply.peer == "base" else "confirmed"
    site.ask()

    site.hears("base", "gibberish")
    site.hears("ridge")

    assert [reply.peer for reply in site.applied] == ["base", "ridge"]
    assert site.asker.open == 0


@pytest.mark.rule("ask-10")
def test_nobody_in_time_ends_the_question_without_an_upgrade(site):
    site.ask()

    assert site.after(101) == 1

    assert (site.applied, site.asker.open, site.asked) == ([], 0, [])
    site.hears("base")
    assert site.applied == []


@pytest.mark.rule("ask-2")
def test_a_reply_that_was_stored_before_a_kill_is_applied_after_it(site, monkeypatch):
    site.ask()
    with monkeypatch.context() as killed:
        killed.setattr(site.asker, "decide", lambda question: None)
        site.hears("base")
    site.make_asker()

    site.after(PATIENCE_S)

    assert [reply.peer for reply in site.applied] == ["base"]


@pytest.mark.rule("reply-1", "reply-2")
@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"topic": topics.reply("esteli", "ridge")}, MalformedMessage),  # another peer's name under one's own topic
        ({"question_digest": "0" * 64}, BadInput),
        ({"correlation": b"other"}, BadInput),
    ],
)
def test_a_reply_that_does_not_belong_to_the_question_is_refused(site, options, error):
    site.ask()

    with pytest.raises(error):
        site.hears("base", **options)

    assert site.applied == []
    assert site.asker.open == 1


def test_a_reply_that_names_a_speaker_nobody_can_be_is_refused_and_holds_nothing_up(site):
    site.ask()

    with pytest.raises(BadInput, match="speaker"):
        site.hears("base", speaker="No Name")
    site.hears("base")

    assert [reply.peer for reply in site.applied] == ["base"]


def test_a_question_that_cannot_be_looked_at_does_not_hold_up_the_others(site, monkeypatch):
    for id in ("broken", "whole"):
        site.ask(id)
        site.sent()
    look = site.asker._look
    monkeypatch.setattr(site.asker, "_look", lambda id: look(id) if id == "whole" else 1 / 0)

    site.after(PATIENCE_S + 1)

    assert site.asked.count(to("ridge")) == 1


@pytest.mark.rule("reply-1")
def test_a_reply_of_a_peer_that_was_not_asked_is_refused(site):
    site.ask()

    with pytest.raises(BadInput, match="never asked"):
        site.hears("ridge")


@pytest.mark.rule("reply-3")
@pytest.mark.parametrize("fields", [{"model_digest": "0" * 64}, {"model_digest": ""}, {"adapter_digest": "1" * 64}])
def test_a_reply_of_a_model_its_peer_never_announced_is_refused_kept_and_another_peer_asked(site, fields):
    site.ask()
    site.hears("base", **fields)
    assert site.applied == []

    site.after(BIRTH_S + 1)

    [(peer, why)] = site.refused
    assert peer == "base" and "has not announced" in why
    assert site.applied == [] and to("ridge") in site.asked


@pytest.mark.rule("reply-3")
def test_a_relayed_reply_is_held_to_what_its_speaker_announced(site):
    site.knows("teacher", model_digest="9" * 64)
    site.ask()

    site.hears("base", speaker="teacher", model_digest=TEACHER)
    assert site.applied == []
    site.after(BIRTH_S + 1)
    site.hears("ridge", speaker="teacher", model_digest="9" * 64)

    assert [reply.peer for reply in site.applied] == ["ridge"]


@pytest.mark.rule("reply-4")
def test_a_reply_that_overtook_its_peers_birth_waits_for_it(site):
    site.ask()
    site.hears("base", model_digest="8" * 64)
    assert site.applied == []

    site.knows("base", sequence=2, model_digest="8" * 64)
    site.after(2)

    assert [reply.peer for reply in site.applied] == ["base"]
    assert site.refused == []


@pytest.mark.rule("reply-4")
def test_the_word_of_a_speaker_nobody_knows_is_sought(site):
    site.ask()

    site.hears("base", speaker="teacher", model_digest="9" * 64)
    site.hears("base", speaker="teacher", model_digest="9" * 64)
    assert site.met == ["teacher"]
    site.knows("teacher", model_digest="9" * 64)
    site.after(2)

    assert [reply.speaker for reply in site.applied] == ["teacher"]


@pytest.mark.rule("reply-3")
def test_a_reply_that_left_before_its_peer_changed_its_model_still_counts(site):
    site.ask()
    site.knows("base", sequence=2, model_digest="8" * 64)

    site.hears("base", model_digest=TEACHER)

    assert [reply.peer for reply in site.applied] == ["base"]


# ---- several votes


@pytest.mark.rule("vote-1")
def test_with_several_votes_the_majority_is_applied_once(database):
    site = Site(database, peers=("base", "ridge", "coast"), votes=3)
    site.ask()
    assert site.asked == [to("base"), to("ridge"), to("coast")]

    site.hears("base", "leak: x", confidence=0.9)
    site.hears("ridge", "normal: y", confidence=0.6)
    assert site.applied == []
    site.hears("coast", "normal: y", confidence=0.6)

    assert [reply.text for reply in site.applied] == ["normal: y"]
    assert site.asker.open == 0


@pytest.mark.rule("vote-5")
def test_nobody_waits_for_a_vote_that_can_change_nothing(database):
    site = Site(database, peers=("base", "ridge", "coast"), votes=3)
    site.ask()

    site.hears("base", "normal: y")
    site.hears("ridge", "normal: y")

    assert [reply.text for reply in site.applied] == ["normal: y"]


@pytest.mark.rule("vote-5")
def test_a_quorum_decides(database):
    site = Site(database, peers=("base", "ridge", "coast"), votes=3, quorum=2)
    site.ask()

    site.hears("base", "normal: y", confidence=0.9)
    site.hears("ridge", "leak: y", confidence=0.4)

    assert [reply.text for reply in site.applied] == ["normal: y"]


@pytest.mark.rule("vote-5")
def test_a_peer_that_sleeps_delays_the_others_vote_by_no_more_than_the_patience(database):
    site = Site(database, peers=("base", "ridge"), votes=2)
    site.ask()
    site.hears("ridge", "normal: y")
    site.after(PATIENCE_S - 1)
    assert site.applied == []

    site.after(2)

    assert [reply.peer for reply in site.applied] == ["ridge"]


@pytest.mark.rule("vote-5")
def test_when_time_runs_out_those_who_replied_decide(database):
    site = Site(database, peers=("base", "ridge", "coast"), votes=3)
    site.ask()
    site.hears("ridge", "normal: y")

    site.after(99)

    assert [reply.peer for reply in site.applied] == ["ridge"]
    assert (site.asker.open, site.asked) == (0, [])


@pytest.mark.rule("vote-4")
def test_a_peer_that_is_often_outvoted_loses_its_weight_and_keeps_the_loss_over_a_restart(database):
    peers = ("base", "ridge", "coast")
    site = Site(database, peers=peers, votes=3)
    for number in range(12):
        site.ask(f"q{number}")
        site.hears("base", "leak: lies", confidence=1.0, question=f"q{number}")
        site.hears("ridge", "normal: y", confidence=0.6, question=f"q{number}")
        site.hears("coast", "normal: y", confidence=0.6, question=f"q{number}")
    site.make_asker(peers, 3)

    trust = {peer["name"]: peer["trust"] for peer in site.asker.status()}

    assert trust["base"] < 0.3
    assert (trust["ridge"], trust["coast"]) == (1.0, 1.0)


@pytest.mark.rule("vote-4")
def test_a_question_counts_once_for_or_against_a_peer_however_often_it_is_decided(database):
    site = Site(database, peers=("base", "ridge", "coast"), votes=3)
    site.ask()
    for peer, text in (("base", "leak: x"), ("ridge", "normal: y"), ("coast", "normal: y")):
        site.hears(peer, text)
    before = site.asker.status()

    site.asker.decide("q1")
    site.hears("coast", "normal: y")

    assert site.asker.status() == before


@pytest.mark.parametrize(
    ("peers", "votes", "options"),
    [((), 1, {}), (("esteli",), 1, {}), (("base",), 0, {}), (("No Name",), 1, {}), (("base",), 1, {"quorum": 2})],
)
def test_asking_that_cannot_work_is_refused_when_it_is_configured(database, peers, votes, options):
    with pytest.raises(BadInput):
        Site(database, peers=peers, votes=votes, **options)


# ---- events


@pytest.mark.rule("event-1")
def test_an_event_waits_for_the_coordinators_ack_and_an_ack_may_come_twice(site):
    with site.engine.begin() as connection:
        first = site.asker.reporter.report(connection, "answers", {"count": 3.0})
        site.asker.reporter.report(connection, "answers", {"count": 4.0})
    ack = Incoming(topics.ack("esteli"), encode(Ack("a1", (first,))))

    site.asker.reporter.acknowledged(ack)
    site.asker.reporter.acknowledged(ack)

    assert len(site.outbox.waiting()) == 1


def test_an_event_with_a_figure_that_is_not_a_number_is_refused(site):
    with pytest.raises(BadInput, match="finite"), site.engine.begin() as connection:
        site.asker.reporter.report(connection, "answers", {"count": float("nan")})
