"""node/escalation/serving.py: rules, without a broker."""

import random

import msgspec
import pytest
import sqlalchemy as sa

from node.answering import Answering
from node.confidence.budget import COLD, HORIZON, Budget
from node.confidence.judging import ENVELOPE_BYTES, Judge, judged
from node.engine.worker import Busy, NoModel, Speaker, Worker
from node.escalation.serving import HELD_BACK, HOP_LIMIT, RETRY_S, Judged, Server, Spoke
from node.settings import Model, NodeSettings
from node.store import Store
from protocol import topics
from protocol.codec import encode
from protocol.digests import digest_bytes
from protocol.errors import MalformedMessage
from protocol.messages import Question, Reply
from protocol.mqtt import Incoming
from protocol.outbox import Outbox
from protocol.tasks import Record
from tests.node.fake_engine import FakeEngine
from tests.node.test_confidence_judging import calibration


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


class Peer:
    """A serving node whose model says what the test wants."""

    def __init__(self, engine, **options):
        self.engine, self.clock, self.prompts = engine, Clock(), []
        self.says, self.sure, self.handed = " leak: the pipe drips\nmore", True, []
        self.outbox = Outbox(engine, clock=self.clock)
        self.options = options
        self.make_server()

    def make_server(self):
        self.server = Server("base", self.outbox, self, engine=self.engine, clock=self.clock, **self.options)

    def answer(self, question, *, deadline_s, may_ask):
        self.prompts.append(question.prompt)
        if isinstance(self.says, Exception):
            raise self.says
        return Spoke(self.says, 0.75, "d" * 64, 0.5, "a" * 64, self.sure)

    def remember(self, connection, reply, spoke):
        pass

    def hand_on(self, session, question):
        self.handed.append(question)
        return True

    def hears(self, id="q1", *, asker="esteli", expiry=100, topic=None, prompt="window", **fields):
        question = Question(id, asker, fields.pop("task", "ranch"), prompt, 0.2, 17, **fields)
        self.server.heard(Incoming(topic or topics.question("base", asker), encode(question), correlation=id.encode(), expiry=expiry))

    @property
    def replies(self):
        return [(row.topic, msgspec.json.decode(row.payload, type=Reply)) for row in self.outbox.waiting()]

    def told(self, text="normal: all is well", confidence=0.8, *, peer="teacher", question="q1", **fields):
        """What this node's own peer says to the question it was handed."""
        digest = digest_bytes(b"window")
        return self.server.relay(Reply("up", question, digest, peer, "7" * 64, text, confidence, **fields))

    def reply_left(self):
        for row in self.outbox.waiting():
            self.outbox.handed_over(row.id)


@pytest.fixture
def peer(database):
    return Peer(database)


@pytest.fixture
def unsure(database):
    """A peer that is not sure and has peers of its own."""
    made = Peer(database)
    made.server.hand_on, made.sure = made.hand_on, False
    return made


@pytest.mark.rule("serve-4", "reply-2")
def test_a_question_is_answered_to_its_askers_topic_with_the_digest_of_its_prompt(peer):
    peer.hears()
    peer.server.step()

    [(topic, reply)] = peer.replies
    assert topic == topics.reply("esteli", "base")
    assert (reply.question, reply.question_digest, reply.peer) == ("q1", digest_bytes(b"window"), "base")
    assert (reply.text, reply.confidence, reply.refused) == ("leak: the pipe drips", 0.75, "")
    assert (reply.model_digest, reply.adapter_digest, reply.speaker) == ("d" * 64, "a" * 64, "")
    assert peer.outbox.waiting()[0].correlation == b"q1"


@pytest.mark.rule("serve-1")
def test_a_question_that_comes_again_gets_the_same_reply_and_is_not_computed_twice(peer):
    peer.hears()
    peer.hears()
    peer.server.step()
    assert peer.server.step() is False
    [(_, first)] = peer.replies
    peer.hears()
    assert len(peer.replies) == 1
    peer.reply_left()

    peer.hears()

    assert peer.prompts == ["window"]
    assert [reply for _, reply in peer.replies] == [first]


@pytest.mark.rule("serve-1")
def test_one_question_that_comes_by_two_ways_is_computed_once_and_both_are_answered(peer):
    peer.hears(asker="base-a", path=("esteli",))
    peer.hears(asker="base-b", path=("esteli",))
    peer.server.step()
    peer.hears(asker="base-c", path=("esteli",))

    assert peer.server.step() is False
    assert peer.prompts == ["window"]
    assert [topic for topic, _ in peer.replies] == [topics.reply(asker, "base") for asker in ("base-a", "base-b", "base-c")]
    assert len({reply.text for _, reply in peer.replies}) == 1


def test_a_question_is_worth_answering_for_as_long_as_anybody_waits_for_it(peer):
    peer.hears(asker="base-a", path=("esteli",), expiry=10)
    peer.hears(asker="base-b", path=("esteli",), expiry=100)
    peer.clock.now += 50

    assert peer.server.step() is True
    assert topics.reply("base-b", "base") in [topic for topic, _ in peer.replies]


def test_the_same_id_with_another_prompt_is_another_question(peer):
    peer.hears(asker="esteli", prompt="one")
    peer.hears(asker="malacatoya", prompt="two")
    peer.server.step()
    peer.server.step()

    assert peer.prompts == ["one", "two"]


@pytest.mark.rule("serve-2")
def test_a_question_over_the_queues_limit_is_declined_as_busy_and_may_come_again(database):
    peer = Peer(database, queue_limit=2)
    for id in ("q1", "q2", "q3"):
        peer.hears(id)
    assert [(reply.question, reply.refused) for _, reply in peer.replies] == [("q3", "busy")]
    peer.reply_left()
    peer.server.step()
    peer.reply_left()

    peer.hears("q3")
    while peer.server.step():
        pass

    assert {reply.question: reply.text for _, reply in peer.replies}["q3"] == "leak: the pipe drips"


@pytest.mark.rule("serve-2")
def test_a_busy_node_names_the_seconds_until_there_is_room_and_tells_the_fleet_once(database):
    loads = []
    peer = Peer(database, queue_limit=40, on_load=lambda: loads.append("changed"))
    peer.server.answer_s = 2.0
    for number in range(43):
        peer.hears(f"q{number}")

    assert {reply.retry_after for _, reply in peer.replies} == {20.0}
    assert RETRY_S[0] <= 20.0 <= RETRY_S[1]
    assert loads == ["changed"]
    while peer.server.step():
        pass
    assert loads == ["changed", "changed"]


@pytest.mark.rule("serve-2")
def test_a_busy_model_is_asked_again_when_the_question_comes_again(peer):
    peer.says = Busy("full", 7)
    peer.hears()
    peer.server.step()
    assert [(reply.refused, reply.retry_after) for _, reply in peer.replies] == [("busy", 7.0)]
    peer.reply_left()
    peer.says = "normal: all well"

    peer.hears()
    peer.server.step()

    assert [reply.text for _, reply in peer.replies] == ["normal: all well"]


@pytest.mark.rule("serve-3")
def test_a_question_past_its_life_is_dropped_in_silence(peer):
    peer.hears(expiry=10)
    peer.clock.now += 11

    assert peer.server.step() is False

    assert (peer.prompts, peer.replies, peer.server.waiting) == ([], [], 0)


@pytest.mark.rule("serve-3")
def test_the_askers_clock_decides_nothing(peer):
    """`Question.expires` is 17 seconds after 1970 in every test here; what counts is the broker's remaining expiry."""
    peer.hears(expiry=100)

    assert peer.server.step() is True
    assert peer.prompts == ["window"]


@pytest.mark.rule("serve-5")
def test_a_question_that_was_stored_before_a_kill_is_answered_after_it(peer):
    peer.hears()
    peer.make_server()

    assert peer.server.step() is True

    assert [reply.text for _, reply in peer.replies] == ["leak: the pipe drips"]


def test_what_the_model_refuses_is_told_to_the_asker(peer):
    peer.says = NoModel("no model is active yet")
    peer.hears()
    peer.server.step()

    assert [(reply.text, reply.refused) for _, reply in peer.replies] == [("", "no model is active yet")]


def test_a_model_that_breaks_on_one_question_declines_it_and_answers_the_next(peer):
    peer.says = RuntimeError("secret prompt text")
    peer.hears("q1")
    peer.server.step()
    peer.says = "normal: all well"
    peer.hears("q2")
    peer.server.step()

    replies = {reply.question: reply for _, reply in peer.replies}
    assert replies["q1"].refused == "the model failed: RuntimeError"
    assert replies["q2"].text == "normal: all well"


@pytest.mark.rule("chain-2", "chain-3")
@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"path": tuple(f"n{i}" for i in range(HOP_LIMIT + 1))}, "handed on 3 times"),
        ({"path": ("base",)}, "came by base before"),
        ({"asker": "base"}, "came by base before"),
        ({"task": "chess"}, "unknown task 'chess'"),
    ],
)
def test_a_question_nobody_here_should_answer_is_declined_with_the_reason(peer, fields, reason):
    peer.hears(**fields)

    [(_, reply)] = peer.replies
    assert reason in reply.refused
    assert peer.server.waiting == 0


@pytest.mark.rule("message-3")
def test_a_question_in_anothers_name_is_refused(peer):
    with pytest.raises(MalformedMessage):
        peer.hears(asker="esteli", topic=topics.question("base", "malacatoya"))

    assert peer.server.waiting == 0


def test_a_question_to_a_group_is_taken_by_its_members_only(database):
    member, stranger = Peer(database, groups=("hills",)), Peer(database)
    topic = topics.group_question("hills", "esteli")

    member.hears(topic=topic)
    with pytest.raises(MalformedMessage):
        stranger.hears("q2", topic=topic)

    assert member.server.waiting == 1


# ---- handing on


@pytest.mark.rule("chain-1")
def test_a_question_this_node_is_unsure_of_goes_on_with_its_path_and_time_held_back(unsure):
    unsure.hears(path=("field",))
    unsure.server.step()

    [further] = unsure.handed
    assert (further.id, further.asker, further.path, further.prompt) == ("q1", "base", ("field", "esteli"), "window")
    assert further.expires == int(unsure.clock.now + 100 * (1 - HELD_BACK))
    assert (unsure.replies, unsure.server.waiting) == ([], 0)


@pytest.mark.rule("chain-1")
def test_the_better_answer_is_relayed_and_names_who_spoke(unsure):
    unsure.hears()
    unsure.server.step()

    assert unsure.told("normal: all is well", 0.8) == "upgraded"

    [(topic, reply)] = unsure.replies
    assert topic == topics.reply("esteli", "base")
    assert (reply.peer, reply.speaker, reply.model_digest, reply.text) == ("base", "teacher", "7" * 64, "normal: all is well")


@pytest.mark.rule("chain-1")
def test_along_a_longer_chain_the_speaker_stays_the_one_whose_model_spoke(unsure):
    unsure.hears()
    unsure.server.step()

    unsure.told(peer="ridge", speaker="teacher")

    assert [reply.speaker for _, reply in unsure.replies] == ["teacher"]


@pytest.mark.rule("chain-1")
def test_an_answer_less_sure_than_this_nodes_own_is_not_relayed(unsure):
    unsure.hears()
    unsure.server.step()

    assert unsure.told("normal: all is well", 0.7) == "confirmed"

    assert [(reply.text, reply.speaker, reply.model_digest) for _, reply in unsure.replies] == [("leak: the pipe drips", "", "d" * 64)]


@pytest.mark.rule("chain-4")
def test_when_the_time_for_others_is_up_this_nodes_own_answer_goes_out(unsure):
    unsure.hears()
    unsure.server.step()
    assert unsure.server.sweep() == 0
    unsure.clock.now += 100 * (1 - HELD_BACK) + 1

    assert unsure.server.sweep() == 1

    assert [reply.text for _, reply in unsure.replies] == ["leak: the pipe drips"]
    assert unsure.told() == "late"
    assert len(unsure.replies) == 1


@pytest.mark.rule("chain-4")
def test_when_nobody_can_help_this_nodes_own_answer_goes_out_at_once(unsure):
    unsure.hears()
    unsure.server.step()

    assert unsure.told("gibberish") == "refused"
    assert unsure.told("", refused="no model") == "refused"
    unsure.server.unanswered("q1")
    unsure.server.unanswered("q1")

    assert [reply.text for _, reply in unsure.replies] == ["leak: the pipe drips"]


@pytest.mark.rule("chain-4")
def test_an_answer_kept_for_others_survives_a_kill(unsure):
    unsure.hears()
    unsure.server.step()
    unsure.make_server()

    assert unsure.server.handed("q1")
    assert unsure.told() == "upgraded"
    assert unsure.prompts == ["window"]


@pytest.mark.rule("chain-3")
def test_a_question_at_its_hop_limit_is_answered_here_however_unsure(unsure):
    unsure.hears(path=tuple(f"n{i}" for i in range(HOP_LIMIT)))
    unsure.server.step()

    assert unsure.handed == []
    assert [reply.text for _, reply in unsure.replies] == ["leak: the pipe drips"]


@pytest.mark.rule("chain-4")
def test_a_question_with_no_time_left_for_others_is_answered_here(unsure):
    unsure.hears(expiry=5)
    unsure.server.step()

    assert unsure.handed == []
    assert len(unsure.replies) == 1


@pytest.mark.rule("chain-5")
def test_whoever_brings_a_question_that_is_out_gets_this_nodes_own_answer_and_its_asker_the_relayed_one(unsure):
    unsure.hears()
    unsure.server.step()

    unsure.hears(asker="malacatoya")
    unsure.hears()
    assert [(topic, reply.text) for topic, reply in unsure.replies] == [(topics.reply("malacatoya", "base"), "leak: the pipe drips")]
    unsure.told()

    assert unsure.replies[-1][0] == topics.reply("esteli", "base")
    assert unsure.replies[-1][1].speaker == "teacher"


def test_only_a_question_that_was_handed_on_is_told_from_this_nodes_own(unsure):
    """Whoever knows the id of a question of ours cannot draw its reply away by asking it back."""
    unsure.sure = True
    unsure.hears("ours")
    unsure.server.step()

    assert not unsure.server.handed("ours")


# ---- the node's own judge


class Base(Peer):
    """A base station as its daemon wires it: a real judge and engine thread, around a small engine."""

    def __init__(self, folder, *, budget, calibrated=True, **options):
        self.store, self.worker, self.model = Store(folder / "node.db"), Worker(), FakeEngine()
        self.worker.swap_after_current_record(Speaker(self.model, "ranch", 1, calibration(self.model) if calibrated else None))
        self.worker.start()
        self.budget, self.luck = budget, random.Random(7)
        super().__init__(self.store.engine, **options)

    def make_server(self):
        self.judge = Judge(self.store, self.budget, clock=self.clock, random=random.Random(1))
        self.answering = Answering(self.store, self.worker, node="base", judge=self.judge, clock=self.clock)
        own = Judged(self.worker, self.judge)
        self.server = Server("base", self.outbox, own, engine=self.engine, clock=self.clock, hand_on=self.hand_on, **self.options)

    def serves(self, count, *, probability=None, **fields):
        """So many questions; how many of them were handed on."""
        before = len(self.handed)
        for _ in range(count):
            self.clock.now += 60
            self.model.probability = probability or self.luck.uniform(0.02, 0.98)
            self.hears(f"q{self.luck.getrandbits(60)}", **fields)
            self.server.step()
        return len(self.handed) - before

    def rows(self):
        with self.store.transaction() as session:
            return session.execute(sa.select(judged).order_by(judged.c.row)).all()

    def close(self):
        self.worker.stop()
        self.store.close()


@pytest.fixture
def base(tmp_path):
    opened = []

    def make(**how):
        opened.append(Base(tmp_path, **how))
        return opened[-1]

    yield make
    for each in opened:
        each.close()


@pytest.mark.rule("chain-1")
@pytest.mark.parametrize(("count", "calibrated"), [(1_000, True), (200, False)])
def test_the_share_of_others_questions_that_is_handed_on_is_the_budget_s(base, count, calibrated):
    peer = base(budget=Budget(share=0.2, audit=0.5), calibrated=calibrated)

    handed = peer.serves(count)

    assert abs(handed - 0.2 * count) <= HORIZON  # 2 points of 1,000
    status = peer.judge.status()
    assert (status["realised"], status["over"], status["calibrated"]) == (handed / count, count, calibrated)
    surest = max(question.confidence for question in peer.handed[COLD:])
    assert surest < sorted(row.shipped for row in peer.rows())[count // 2]  # the least sure, and none only to check


def test_the_confidence_of_a_reply_is_the_calibrated_one(base):
    peer = base(budget=Budget(share=0.0))

    peer.serves(1, probability=0.9)

    [(_, reply)] = peer.replies
    assert reply.confidence == pytest.approx(peer.rows()[0].shipped)
    assert reply.confidence != pytest.approx(0.9 * 0.9, abs=0.01)  # what the model thinks of its verdict's two tokens


def test_what_is_handed_on_is_paid_from_the_bytes_of_the_day_that_the_site_has_too(base):
    each = ENVELOPE_BYTES + len("window")
    peer = base(budget=Budget(share=1.0, bytes_a_day=480 * each, audit=0.0))  # a third of one question a minute

    handed = peer.serves(30)

    assert 0 < handed < 30
    assert peer.judge.status()["day"]["bytes"] == handed * each
    peer.budget = Budget(share=1.0, bytes_a_day=handed * each, audit=0.0)
    peer.make_server()  # the next process
    assert peer.judge.status()["day"]["bytes"] == handed * each
    assert peer.serves(5) == 0
    assert not peer.answering.answer(Record(id="r", task="ranch", source="window"), deadline_s=10).judgement.ask


def test_a_budget_that_is_reloaded_holds_for_the_next_question_of_others(base):
    peer = base(budget=Budget(share=1.0, audit=0.0))
    before = peer.serves(5)

    peer.judge.reload(NodeSettings(model=Model(budget=0.0)))

    assert (before, peer.serves(5)) == (5, 0)


def test_a_question_that_cannot_travel_on_costs_nothing_of_the_budget(base):
    peer = base(budget=Budget(share=1.0, audit=0.0))

    peer.serves(3, path=tuple(f"n{i}" for i in range(HOP_LIMIT)))
    peer.serves(3, expiry=5)

    assert (peer.rows(), peer.judge.status()["owed"], peer.handed) == ([], 0.0, [])
    assert len(peer.replies) == 6
    assert all(reply.confidence > 0 for _, reply in peer.replies)
