"""A node on a radio and its gateway, over a real broker: nothing but frames one way, the fleet's own messages the other."""

import threading
import time

import pytest
import sqlalchemy as sa

from deploy.broker import Broker
from node import settings as conf
from node.answering import Answering
from node.confidence.budget import Budget
from node.confidence.judging import Judge
from node.engine.worker import Speaker, Worker
from node.escalation.radio import Gateway, Radio
from node.messaging import Messaging
from node.store import AnswerRow, Store
from protocol import frames, topics
from protocol.codec import decode_message, encode
from protocol.digests import digest_bytes
from protocol.errors import BadInput, MalformedMessage, TooLarge
from protocol.messages import Event, Question, ReleaseNotice, Reply, Status
from protocol.mqtt import Incoming, Session
from protocol.ports import free_port
from protocol.tasks import RANCH, Record
from tests.faults import LORA_DR5, FaultProxy
from tests.messaging.conftest import PASSWORDS
from tests.node.fake_engine import FakeEngine

ID = "ab" * 16
PROMPT = RANCH.prompt(Record("r", "ranch", "pump 2 A, no flow"))


class Taken:
    """A session that keeps what is sent."""

    def __init__(self):
        self.sent, self.filters = [], []

    def subscribe(self, topic_filter, handler):
        self.filters.append(topic_filter)

    def send(self, topic, payload, **options):
        self.sent.append((topic, payload))

    publish = send


class Kept:
    """An outbox that keeps what is put."""

    def __init__(self, engine):
        self.engine, self.put_in, self.settled = engine, [], []

    def put(self, connection, topic, payload, **options):
        self.put_in.append((topic, decode_message(payload)))

    def settle(self, connection, *ids):
        self.settled += ids

    def wake(self):
        pass


@pytest.fixture
def radio():
    digests = {ID: digest_bytes(PROMPT.encode())}
    return Radio("esteli", Taken(), peers=["base"], digest_of=digests.get, task=lambda: "ranch", clock=lambda: 1_000.0)


@pytest.fixture
def gateway(database):
    prompts = {digest_bytes(PROMPT.encode())[:16]: PROMPT}
    return Gateway(
        Taken(), Kept(database), ["esteli"], peers=["base"], prompt_of=lambda short: prompts.get(short.hex()),
        tasks=lambda: ["ranch"], clock=lambda: 5_000.0,
    )  # fmt: skip


def up(frame):
    return Incoming(topics.radio_up("esteli"), frames.encode(frame))


def verdict(**change):
    reply = Reply("r", ID, digest_bytes(PROMPT.encode()), "base", "cd" * 32, "leak: a pipe", confidence=0.9)
    frame = frames.verdict(reply, "leak", RANCH.codes)
    return Incoming(topics.radio_down("esteli"), frames.encode(frames.msgspec.structs.replace(frame, **change)))


def test_a_question_leaves_as_a_reference_and_an_event_waits_for_a_richer_link(radio):
    question = Question(ID, "esteli", "ranch", PROMPT, 0.3, 1_600)

    radio.send(topics.question("base", "esteli"), encode(question), expiry=600)

    [(topic, frame)] = radio.session.sent
    assert topic == topics.radio_up("esteli")
    assert frames.decode(frame) == frames.decode(frames.encode(frames.reference(question, "base", now=1_000.0)))
    with pytest.raises(TooLarge, match="richer link"):
        radio.send(topics.event("esteli"), encode(Event("e", "esteli", "answers")))


def test_a_verdict_becomes_the_reply_it_stands_for(radio):
    vouched = []
    radio._vouch = lambda peer, model: vouched.append((peer, model))

    message = radio.heard(verdict())

    reply = decode_message(message.payload)
    assert (message.topic, reply.peer, reply.text) == (topics.reply("esteli", "base"), "base", "leak:")
    assert reply.question_digest == digest_bytes(PROMPT.encode())
    assert vouched == [("base", "cd" * 6)]


@pytest.mark.parametrize("change", [{"prompt": bytes(8)}, {"peer": b"????"}, {"code": 200}], ids=str)
def test_a_verdict_on_another_prompt_of_a_stranger_or_of_no_code_is_refused(radio, change):
    with pytest.raises(BadInput):
        radio.heard(verdict(**change))


def test_a_verdict_on_a_question_that_is_settled_and_a_release_do_nothing(radio):
    assert radio.heard(verdict(question="cd" * 16)) is None
    assert radio.heard(Incoming("t", frames.encode(frames.Release(9)))) is None
    assert radio.newest_release == 9


def test_the_gateway_asks_in_the_nodes_name_for_a_prompt_it_has(gateway):
    question = Question(ID, "esteli", "ranch", PROMPT, 0.3, 1_600)

    gateway.up(up(frames.reference(question, "base", now=1_000.0)))

    [(topic, asked)] = gateway.outbox.put_in
    assert topic == topics.question("base", "esteli")
    assert (asked.id, asked.asker, asked.prompt, asked.expires) == (ID, "esteli", PROMPT, 5_600)


def test_the_gateway_declines_a_prompt_it_does_not_have(gateway):
    gateway.up(up(frames.reference(Question(ID, "esteli", "ranch", "another", 0.3, 1_600), "base", now=1_000.0)))

    [(topic, frame)] = gateway.session.sent
    assert topic == topics.radio_down("esteli")
    assert frames.decode(frame).refused == "not known here"


def test_the_gateway_hands_a_state_on_and_a_reply_down_and_settles_the_question(gateway):
    status = Status("esteli", "0123456789abcdef", 1, "answering", release=3)

    gateway.up(up(status))
    gateway.reply(
        Incoming(
            topics.reply("esteli", "base"),
            encode(Reply("r", ID, digest_bytes(PROMPT.encode()), "base", "cd" * 32, "dry-run: no water", confidence=0.9)),
        )
    )
    gateway.announce(ReleaseNotice(4, "http://far/away"))

    (_, said), (_, down), (_, release) = gateway.session.sent
    assert (decode_message(said).release, decode_message(said).link) == (3, "lora")
    assert RANCH.codes[frames.decode(down).code] == "dry-run"
    assert frames.decode(release) == frames.Release(4)
    assert gateway.outbox.settled == [f"radio:{ID}:base"]


def test_the_gateway_refuses_frames_that_nodes_do_not_send(gateway):
    with pytest.raises(MalformedMessage, match="nodes send none"):
        gateway.up(up(frames.Release(9)))


class Member:
    """A node as its daemon wires it, around a fake engine."""

    def __init__(self, folder, name, broker, engine, **settings):
        folder.mkdir()
        (folder / "password").write_text(PASSWORDS[name])
        given = conf.NodeSettings(
            node=conf.Node(name=name), model=conf.Model(budget=1.0),
            broker=conf.Broker(host=broker.host, port=broker.port, password_file=str(folder / "password")), **settings,
        )  # fmt: skip
        self.store, self.worker, self.leaving = Store(folder / "node.db"), Worker(), threading.Event()
        self.worker.swap_after_current_record(Speaker(engine, "ranch", release=1))
        judge = Judge(self.store, Budget(share=1.0, audit=0.0))
        self.messaging = Messaging(
            given, self.store, self.worker, judge, boot=f"{time.monotonic_ns():016x}", describe=lambda: Status(name, "", 0, "answering")
        )
        self.answering = Answering(
            self.store, self.worker, node=name, judge=judge, asking=self.messaging.asker, on_asked=self.messaging.wake
        )
        self.worker.start()
        self.messaging.start(apply=self.answering.apply, unanswered=self.answering.unanswered, on_release=lambda: None)
        threading.Thread(target=self.sweep, daemon=True).start()

    def sweep(self):
        while not self.leaving.wait(0.1):
            self.messaging.sweep()

    def asks(self, source):
        return self.answering.answer(Record(id=source, task="ranch", source=source), deadline_s=10)

    def rows(self):
        with self.store.transaction() as session:
            return {row.record: (row.state, row.text, row.by) for row in session.scalars(sa.select(AnswerRow))}

    def stop(self):
        self.leaving.set()
        self.messaging.stop()
        self.worker.stop()
        self.store.close()


@pytest.mark.broker
def test_an_unsure_node_on_a_radio_is_upgraded_by_its_base_and_says_nothing_but_frames(tmp_path, mosquitto, eventually):
    said: dict[str, list[bytes]] = {}
    gateways = {"base": ["esteli"]}
    with (
        Broker(tmp_path / "broker", port=free_port(), users=PASSWORDS, program="mosquitto", gateways=gateways) as broker,
        FaultProxy((broker.host, broker.port), lambda _: LORA_DR5) as air,
    ):
        watcher = Session("coordinator", broker.host, broker.port, username="coordinator", password=PASSWORDS["coordinator"])
        watcher.subscribe("milpa/#", lambda message: said.setdefault(message.topic, []).append(message.payload))
        watcher.start()
        assert watcher.wait_connected(10), watcher.problem
        base = Member(
            tmp_path / "base", "base", broker, FakeEngine(default=" dry-run: the pump sucks air", name="teacher"),
            peers=conf.Peers(serve=True), link=conf.Link(radio=("esteli",)),
        )  # fmt: skip
        site = Member(
            tmp_path / "esteli", "esteli", air, FakeEngine(default=" leak: a pipe", probability=0.3),
            peers=conf.Peers(ask=("base",), deadline_s=60), link=conf.Link(class_="lora"),
        )  # fmt: skip
        try:
            base.asks("pump 2 A, no flow")  # the base hears the same sensors

            site.asks("pump 2 A, no flow")
            site.asks("something only the site has seen")

            eventually(lambda: site.rows()["pump 2 A, no flow"][0] == "upgraded", site.rows)
            eventually(lambda: site.rows()["something only the site has seen"][0] == "unconfirmed", site.rows)
            eventually(lambda: topics.status("esteli") in said)
            base.asks("pump 3 A, no flow")  # a peer that was heard of by its verdict alone is asked again
            site.asks("pump 3 A, no flow")
            eventually(lambda: site.rows()["pump 3 A, no flow"][0] == "upgraded", site.rows)
        finally:
            for one in (site, base, watcher):
                one.stop()

    assert site.rows()["pump 2 A, no flow"] == ("upgraded", "dry-run:", "peer:base")
    assert max(map(len, said[topics.radio_up("esteli")] + said[topics.radio_down("esteli")])) <= frames.FRAME_LIMIT
    assert decode_message(said[topics.status("esteli")][0]).link == "lora"
    assert topics.event("esteli") not in said
