"""node/escalation/asking.py and presence.py: rules, without a broker."""

import msgspec
import pytest

from node.escalation.asking import BUSY, PATIENCE_S, Asker
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


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


class Site:
    """One asking node whose `apply` remembers what it was told."""

    def __init__(self, engine, *, peers=("base", "ridge"), votes=1):
        self.engine, self.clock, self.applied = engine, Clock(), []
        self.outcome = "upgraded"
        self.presence = Presence()
        self.outbox = Outbox(engine, clock=self.clock)
        self.make_asker(peers, votes)

    def make_asker(self, peers=("base", "ridge"), votes=1):
        self.asker = Asker(
            "esteli", peers, self.outbox, engine=self.engine, presence=self.presence, votes=votes, clock=self.clock, apply=self.apply,
            reporter=Reporter("esteli", self.outbox, engine=self.engine, clock=self.clock), deadline_s=100,
        )  # fmt: skip

    def apply(self, reply):
        self.applied.append(reply)
        return self.outcome(reply) if callable(self.outcome) else self.outcome

    def ask(self, id="q1", task="ranch"):
        with self.engine.begin() as connection:
            self.asker.ask(connection, Question(id, "esteli", task, PROMPT, 0.2, int(self.clock.now) + 100))

    def hears(self, peer, text="leak: x", *, question="q1", confidence=0.9, refused="", id="", correlation=None, topic=None, digest=None):
        reply = Reply(
            id=id or f"r-{peer}-{question}", question=question, question_digest=digest or digest_bytes(PROMPT.encode()), peer=peer,
            model_digest="m", text="" if refused else text, confidence=confidence, refused=refused,
        )  # fmt: skip
        self.asker.heard(
            Incoming(
                topic or topics.reply("esteli", peer), encode(reply), correlation=question.encode() if correlation is None else correlation
            )
        )

    @property
    def asked(self):
        return [row.topic for row in self.outbox.waiting() if row.kind == "question"]


@pytest.fixture
def site(database):
    return Site(database)


def to(peer):
    return topics.question(peer, "esteli")


def test_a_question_goes_to_the_first_peer_with_everything_a_reply_needs(site):
    site.ask()

    [row] = site.outbox.waiting()
    assert (row.topic, row.response_topic, row.correlation) == (to("base"), topics.reply("esteli", "base"), b"q1")
    assert row.expires == site.clock.now + 100
    assert msgspec.json.decode(row.payload, type=Question).prompt == PROMPT


def test_a_peer_that_is_awake_is_asked_before_one_that_is_not(site):
    site.presence.note(Status("base", "b1", 1, "sleeping"))
    site.presence.note(Status("ridge", "b1", 1, "answering"))

    site.ask()

    assert site.asked == [to("ridge")]


def test_a_reply_is_applied_and_the_question_forgotten(site):
    site.ask()

    site.hears("base")

    assert [reply.text for reply in site.applied] == ["leak: x"]
    assert (site.asked, site.asker.open) == ([], 0)


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


def test_a_busy_peer_stays_asked_while_another_is_tried(site):
    site.ask()

    site.hears("base", refused=BUSY)
    assert site.asked == [to("base"), to("ridge")]
    site.hears("base", refused=BUSY, id="again")
    assert site.asked == [to("base"), to("ridge")]
    site.hears("base")

    assert [reply.peer for reply in site.applied] == ["base"]
    assert site.asked == []


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


def test_nobody_in_time_ends_the_question_without_an_upgrade(site):
    site.ask()
    site.clock.now += 101

    assert site.asker.sweep() == 1

    assert (site.applied, site.asker.open, site.asked) == ([], 0, [])
    site.hears("base")
    assert site.applied == []


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


def test_a_peer_that_sleeps_delays_the_others_vote_by_no_more_than_the_patience(database):
    site = Site(database, peers=("base", "ridge"), votes=2)
    site.ask()
    site.hears("ridge", "normal: y")
    site.clock.now += PATIENCE_S - 1
    site.asker.sweep()
    assert site.applied == []

    site.clock.now += 2
    site.asker.sweep()

    assert [reply.peer for reply in site.applied] == ["ridge"]


def test_when_time_runs_out_those_who_replied_decide(database):
    site = Site(database, peers=("base", "ridge", "coast"), votes=3)
    site.ask()
    site.hears("ridge", "normal: y")
    site.clock.now += 99

    site.asker.sweep()

    assert [reply.peer for reply in site.applied] == ["ridge"]
    assert (site.asker.open, site.asked) == (0, [])


def test_a_reply_that_was_stored_before_a_kill_is_applied_after_it(site, monkeypatch):
    site.ask()
    with monkeypatch.context() as killed:
        killed.setattr(site.asker, "decide", lambda question: None)
        site.hears("base")
    site.make_asker()

    site.asker.sweep()

    assert [reply.peer for reply in site.applied] == ["base"]


def test_a_question_shares_the_fate_of_the_callers_transaction(site):
    with pytest.raises(ZeroDivisionError), site.engine.begin() as connection:
        site.asker.ask(connection, Question("q1", "esteli", "ranch", PROMPT, 0.2, int(site.clock.now) + 100))
        raise ZeroDivisionError

    assert (site.asker.open, site.asked) == (0, [])


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"topic": topics.reply("esteli", "ridge")}, MalformedMessage),  # another peer's name under one's own topic
        ({"digest": "0" * 64}, BadInput),
        ({"correlation": b"other"}, BadInput),
    ],
)
def test_a_reply_that_does_not_belong_to_the_question_is_refused(site, options, error):
    site.ask()

    with pytest.raises(error):
        site.hears("base", **options)

    assert site.applied == []
    assert site.asker.open == 1


def test_a_reply_of_a_peer_that_was_not_asked_is_refused(site):
    site.ask()

    with pytest.raises(BadInput, match="never asked"):
        site.hears("ridge")


@pytest.mark.parametrize(("peers", "votes"), [((), 1), (("esteli",), 1), (("base",), 0), (("No Name",), 1)])
def test_asking_that_cannot_work_is_refused_when_it_is_configured(database, peers, votes):
    with pytest.raises(BadInput):
        Site(database, peers=peers, votes=votes)


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


def test_a_death_of_an_earlier_boot_is_ignored():
    presence = Presence()
    presence.note(Status("base", "old", 7, "answering"))
    presence.note(Status("base", "new", 1, "answering"))

    assert presence.note(Status("base", "old", 0, "lost")) is False

    assert presence.likely("base")


def test_a_death_of_this_boot_counts_until_the_next_word_of_it():
    presence = Presence()
    presence.note(Status("base", "b", 7, "answering"))

    assert presence.note(Status("base", "b", 0, "lost")) is True
    assert not presence.likely("base")
    assert presence.note(Status("base", "b", 6, "answering")) is False
    assert presence.note(Status("base", "b", 8, "answering")) is True

    assert presence.likely("base")


def test_a_peer_that_was_silent_too_long_is_not_likely_to_answer():
    clock = Clock()
    presence = Presence(silent=100, monotonic=clock)
    presence.note(Status("base", "b", 1, "answering"))
    clock.now += 101

    assert not presence.likely("base")


def test_a_status_under_another_nodes_topic_is_refused():
    with pytest.raises(MalformedMessage):
        Presence().hear(Incoming(topics.status("ridge"), encode(Status("base", "b", 1, "answering"))))
