"""node/escalation/serving.py: rules, without a broker."""

import msgspec
import pytest

from node.engine.worker import Busy, NoModel
from node.escalation.serving import HOP_LIMIT, Server, Spoke
from protocol import topics
from protocol.codec import encode
from protocol.digests import digest_bytes
from protocol.errors import MalformedMessage
from protocol.messages import Question, Reply
from protocol.mqtt import Incoming
from protocol.outbox import Outbox


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


class Peer:
    """A serving node whose model says what the test wants."""

    def __init__(self, engine, **options):
        self.engine, self.clock, self.prompts = engine, Clock(), []
        self.says = " leak: the pipe drips\nmore"
        self.outbox = Outbox(engine, clock=self.clock)
        self.options = options
        self.make_server()

    def make_server(self):
        self.server = Server("base", self.outbox, self.answer, engine=self.engine, clock=self.clock, **self.options)

    def answer(self, task, prompt, max_new_tokens, deadline_s):
        self.prompts.append(prompt)
        if isinstance(self.says, Exception):
            raise self.says
        return Spoke(self.says, 0.75, "d" * 64, 0.5)

    def hears(self, id="q1", *, asker="esteli", expiry=100, topic=None, prompt="window", **fields):
        question = Question(id, asker, fields.pop("task", "ranch"), prompt, 0.2, 17, **fields)
        self.server.heard(Incoming(topic or topics.question("base", asker), encode(question), correlation=id.encode(), expiry=expiry))

    @property
    def replies(self):
        return [(row.topic, msgspec.json.decode(row.payload, type=Reply)) for row in self.outbox.waiting()]

    def reply_left(self):
        for row in self.outbox.waiting():
            self.outbox.handed_over(row.id)


@pytest.fixture
def peer(database):
    return Peer(database)


def test_a_question_is_answered_to_its_askers_topic_with_the_digest_of_its_prompt(peer):
    peer.hears()
    peer.server.step()

    [(topic, reply)] = peer.replies
    assert topic == topics.reply("esteli", "base")
    assert (reply.question, reply.question_digest, reply.peer) == ("q1", digest_bytes(b"window"), "base")
    assert (reply.text, reply.confidence, reply.model_digest, reply.refused) == ("leak: the pipe drips", 0.75, "d" * 64, "")
    assert peer.outbox.waiting()[0].correlation == b"q1"


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


def test_the_same_id_from_another_asker_is_another_question(peer):
    peer.hears(asker="esteli", prompt="one")
    peer.hears(asker="malacatoya", prompt="two")
    peer.server.step()
    peer.server.step()

    assert peer.prompts == ["one", "two"]


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


def test_a_busy_model_is_asked_again_when_the_question_comes_again(peer):
    peer.says = Busy("full")
    peer.hears()
    peer.server.step()
    assert [reply.refused for _, reply in peer.replies] == ["busy"]
    peer.reply_left()
    peer.says = "normal: all well"

    peer.hears()
    peer.server.step()

    assert [reply.text for _, reply in peer.replies] == ["normal: all well"]


def test_a_question_past_its_life_is_dropped_in_silence(peer):
    peer.hears(expiry=10)
    peer.clock.now += 11

    assert peer.server.step() is False

    assert (peer.prompts, peer.replies, peer.server.waiting) == ([], [], 0)


def test_the_askers_clock_decides_nothing(peer):
    """`Question.expires` is 17 seconds after 1970 in every test here; what counts is the broker's remaining expiry."""
    peer.hears(expiry=100)

    assert peer.server.step() is True
    assert peer.prompts == ["window"]


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


@pytest.mark.parametrize(
    ("fields", "reason"), [({"hops": HOP_LIMIT + 1}, "handed on 2 times"), ({"task": "chess"}, "unknown task 'chess'")]
)
def test_a_question_nobody_here_should_answer_is_declined_with_the_reason(peer, fields, reason):
    peer.hears(**fields)

    [(_, reply)] = peer.replies
    assert reason in reply.refused
    assert peer.server.waiting == 0


def test_a_question_in_anothers_name_is_refused(peer):
    with pytest.raises(MalformedMessage):
        peer.hears(asker="esteli", topic=topics.question("base", "malacatoya"))

    assert peer.server.waiting == 0
