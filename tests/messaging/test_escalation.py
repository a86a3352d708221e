"""The whole way over a real broker: an unsure node, a peer with a larger model, the coordinator's ledger. Only the models are fakes."""

import threading
import time
from contextlib import ExitStack

import pytest
import sqlalchemy as sa

from coordinator.fleet.ledger import Ledger
from coordinator.fleet.listening import Listener
from coordinator.fleet.tables import events, nodes, refused
from deploy.broker import Broker
from node import settings as conf
from node.answering import Answering
from node.confidence.budget import Budget
from node.confidence.judging import Judge
from node.engine.worker import Speaker, Worker
from node.escalation import asking
from node.escalation.presence import Presence
from node.messaging import Messaging
from node.store import AnswerRow, RefusedRow, Store
from protocol import topics
from protocol.codec import decode_message, encode
from protocol.digests import digest_bytes
from protocol.messages import ReleaseNotice, Reply, Status
from protocol.mqtt import Session
from protocol.ports import free_port
from protocol.tasks import Record
from tests.faults import CELLULAR, FaultProxy
from tests.messaging.conftest import PASSWORDS
from tests.node.fake_engine import FakeEngine

pytestmark = pytest.mark.broker


class Member:
    """A node's messaging and answering, as its daemon wires them, around a fake engine."""

    def __init__(self, folder, name, broker, *, engine, ask=(), serve=False, budget=0.25, **peers):
        (folder / "password").parent.mkdir(parents=True, exist_ok=True)
        (folder / "password").write_text(PASSWORDS[name])
        settings = conf.NodeSettings(
            node=conf.Node(name=name),
            broker=conf.Broker(host=broker.host, port=broker.port, password_file=str(folder / "password")),
            peers=conf.Peers(ask=ask, serve=serve, deadline_s=60, **peers),
            model=conf.Model(budget=budget),
        )
        self.name, self.engine, self.stopped, self.leaving = name, engine, False, threading.Event()
        self.sweeper = threading.Thread(target=self.sweep, daemon=True)
        self.store = Store(folder / "node.db")
        self.worker = Worker()
        self.worker.swap_after_current_record(Speaker(engine, "ranch", release=1))
        self.judge = Judge(self.store, Budget(share=budget, audit=0.0))
        self.messaging = Messaging(
            settings, self.store, self.worker, self.judge, boot=f"boot-{time.monotonic_ns()}", describe=self.describe
        )
        self.messaging.outbox.resend = 0.3  # seconds; a minute in the field
        self.messaging.session._backoff_base = 0.05
        self.answering = Answering(
            self.store, self.worker, node=name, judge=self.judge, asking=self.messaging.asker, on_asked=self.messaging.wake
        )

    def describe(self):
        return Status(self.name, "", 0, "answering", release=1, waiting=self.messaging.waiting())

    def start(self):
        self.worker.start()
        self.messaging.start(apply=self.answering.apply, unanswered=self.answering.unanswered, on_release=lambda: None)
        self.sweeper.start()
        return self

    def sweep(self):
        """What the daemon does every second."""
        while not self.leaving.wait(0.1):
            self.messaging.sweep()

    def stop(self, **goodbye):
        if not self.stopped:
            self.stopped = True
            self.leaving.set()
            if self.sweeper.is_alive():
                self.sweeper.join(5)
            self.messaging.stop(**goodbye)
            self.worker.stop()
            self.store.close()

    def asks(self, source):
        return self.answering.answer(Record(id=source, task="ranch", source=source), deadline_s=10)

    def answers(self):
        with self.store.transaction() as session:
            rows = session.scalars(sa.select(AnswerRow).order_by(AnswerRow.row)).all()
        return {row.record: (row.state, row.verdict, row.by) for row in rows}


@pytest.fixture
def fleet(tmp_path, broker):
    with ExitStack() as stack:

        def member(name, *, through=broker, **options):
            made = Member(tmp_path / name, name, through, **options)
            stack.callback(made.stop)
            return made

        yield member


@pytest.fixture
def group_broker(tmp_path, mosquitto):
    """A broker that knows who is in the group "hills"."""
    groups = {"hills": ("base", "ridge")}
    with Broker(tmp_path / "broker", port=free_port(), users=PASSWORDS, program="mosquitto", groups=groups) as running:
        yield running


@pytest.fixture
def group_fleet(tmp_path, group_broker):
    with ExitStack() as stack:

        def member(name, **options):
            made = Member(tmp_path / name, name, group_broker, **options)
            stack.callback(made.stop)
            return made

        yield member


@pytest.fixture
def group_join(group_broker):
    with ExitStack() as stack:

        def make(user):
            session = Session(user, group_broker.host, group_broker.port, username=user, password=PASSWORDS[user], backoff_base=0.05)
            stack.callback(session.stop)
            session.start()
            assert session.wait_connected(10)
            return session

        yield make


@pytest.fixture
def ledger(tmp_path, join):
    """A real ledger that listens to the fleet."""
    made = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    made.migrate()
    session = join("coordinator", start=False)
    made.listener = Listener(session, made)
    session.start()
    assert session.wait_connected(10)
    yield made
    session.stop()
    made.close()


def rows(ledger, table):
    with ledger.read() as connection:
        return connection.execute(sa.select(table)).mappings().all()


def unsure(name="student", **answers):
    return FakeEngine(answers, probability=0.3, name=name)


def sure():
    return FakeEngine({"tank": " leak: the tank loses water", "sun": " normal: todo bien"}, probability=0.95, name="teacher")


@pytest.mark.rule("event-3", "ask-1")
def test_an_unsure_answer_is_given_at_once_and_upgraded_or_confirmed_by_the_peer(fleet, ledger, eventually):
    base = fleet("base", engine=sure(), serve=True).start()
    esteli = fleet("esteli", engine=unsure(), budget=1.0, ask=("base",)).start()

    tank, sun = esteli.asks("tank 12 cm"), esteli.asks("sun all day")

    assert tank.provisional and sun.provisional
    assert tank.answer.verdict == "normal"
    eventually(lambda: all(state != "provisional" for state, _, _ in esteli.answers().values()), esteli.answers)
    assert esteli.answers() == {"tank 12 cm": ("upgraded", "leak", "peer:base"), "sun all day": ("confirmed", "normal", "peer:base")}
    assert len(base.engine.prompts) == 2
    eventually(lambda: len(rows(ledger, events)) == 2 and esteli.messaging.waiting() == 0, lambda: rows(ledger, events))
    assert sorted((row["kind"], row["detail"]["state"]) for row in rows(ledger, events)) == [
        ("escalation", "confirmed"),
        ("escalation", "upgraded"),
    ]
    eventually(lambda: {row["name"]: row["state"] for row in rows(ledger, nodes)} == {"base": "answering", "esteli": "answering"})
    assert "tank 12 cm" not in str(rows(ledger, events))  # no record's text reaches the coordinator


def test_over_a_cellular_fringe_a_question_its_answer_and_the_acknowledgement_arrive(broker, fleet, ledger, eventually):
    fleet("base", engine=sure(), serve=True).start()
    with FaultProxy((broker.host, broker.port), lambda _: CELLULAR) as air:
        esteli = fleet("esteli", through=air, engine=unsure(), budget=1.0, ask=("base",)).start()
        eventually(lambda: esteli.messaging._presence.likely("base"))

        tank = esteli.asks("tank 12 cm")
        eventually(lambda: esteli.answers()["tank 12 cm"][0] != "provisional" and esteli.messaging.waiting() == 0, esteli.answers)
        told = esteli.answers()
        esteli.stop()

    assert air.connections  # it came that way
    assert tank.provisional and tank.answer.verdict == "normal"
    assert told == {"tank 12 cm": ("upgraded", "leak", "peer:base")}
    assert [(row["kind"], row["detail"]["state"]) for row in rows(ledger, events)] == [("escalation", "upgraded")]


def test_questions_asked_while_the_broker_is_away_wait_and_arrive(broker, fleet, eventually):
    fleet("base", engine=sure(), serve=True).start()
    esteli = fleet("esteli", engine=unsure(), budget=1.0, ask=("base",)).start()
    eventually(lambda: esteli.messaging.connected)
    broker.kill()
    eventually(lambda: not esteli.messaging.connected)

    for number in range(5):
        assert esteli.asks(f"tank {number}").provisional
    broker.start()

    eventually(lambda: {state for state, _, _ in esteli.answers().values()} == {"upgraded"}, esteli.answers, 60.0)


def test_a_broker_that_lost_a_question_it_had_acknowledged_gets_it_again(broker, fleet, eventually):
    """What a PUBACK is worth when the disk under the broker dies: the question comes back from the outbox."""
    esteli = fleet("esteli", engine=unsure(), budget=1.0, ask=("base",)).start()
    esteli.asks("tank 1")
    eventually(lambda: [row.sent for row in esteli.messaging.outbox.waiting() if row.kind == "question"] == [1])
    broker.kill()
    for file in (broker.folder / "data").iterdir():
        file.unlink()

    broker.start()
    fleet("base", engine=sure(), serve=True).start()

    eventually(lambda: esteli.answers() == {"tank 1": ("upgraded", "leak", "peer:base")}, esteli.answers)


@pytest.mark.rule("ask-9")
def test_a_duplicate_reply_is_applied_once(fleet, join, ledger, eventually):
    base = join("base")  # replies by hand
    base.publish(topics.status("base"), encode(Status("base", "b", 1, "answering", model_digest="m", serves=True)), retain=True)
    esteli = fleet("esteli", engine=unsure(), budget=1.0, ask=("base",)).start()
    question = esteli.asks("tank 1").question
    with esteli.store.transaction() as session:
        prompt = session.scalars(sa.select(AnswerRow.prompt)).one()
    reply = encode(Reply("r1", question, digest_bytes(prompt.encode()), "base", "m", "leak: yes", 0.9))

    for _ in range(3):
        base.publish(topics.reply("esteli", "base"), reply, correlation=question.encode())

    eventually(lambda: len(rows(ledger, events)) >= 1 and esteli.messaging.waiting() == 0)
    base.publish(topics.reply("esteli", "base"), reply, correlation=question.encode())
    esteli.asks("sun")  # its question reaches the broker after the last reply
    eventually(lambda: esteli.messaging.asker.open == 1)
    assert len(rows(ledger, events)) == 1
    assert esteli.answers()["tank 1"] == ("upgraded", "leak", "peer:base")


@pytest.mark.rule("event-2")
def test_an_event_is_in_the_ledger_once_however_often_it_is_sent(fleet, ledger, eventually, monkeypatch):
    """The coordinator's first Acks are lost: the node repeats, the ledger does not."""
    real, lost = ledger.listener.session.send, []

    def lossy(topic, payload, **options):
        if len(lost) < 2:
            lost.append(topic)
            topic = topics.ack("ridge")  # goes astray
        return real(topic, payload, **options)

    monkeypatch.setattr(ledger.listener.session, "send", lossy)
    esteli = fleet("esteli", engine=unsure()).start()
    with esteli.store.transaction() as session:
        esteli.messaging.report(session, "answers", {"count": 3.0}, {})

    eventually(lambda: esteli.messaging.waiting() == 0, esteli.messaging.outbox.waiting)

    assert lost == [topics.ack("esteli")] * 2
    assert [row["figures"] for row in rows(ledger, events)] == [{"count": 3.0}]


@pytest.mark.rule("message-1")
def test_a_message_the_ledger_cannot_use_is_kept_with_the_reason_and_the_next_is_taken(join, ledger, eventually):
    esteli = join("esteli")

    esteli.publish(topics.event("esteli"), b"not a message")
    esteli.publish(topics.status("esteli"), encode(Status("malacatoya", "b", 1, "answering")))
    esteli.publish(topics.status("esteli"), encode(Status("esteli", "b", 1, "answering")))

    eventually(lambda: [row["name"] for row in rows(ledger, nodes)] == ["esteli"])
    assert [row["topic"] for row in rows(ledger, refused)] == [topics.event("esteli"), topics.status("esteli")]
    assert "does not decode" in rows(ledger, refused)[0]["reason"]


def test_the_newest_release_is_announced_to_whoever_comes_later_and_to_a_broker_that_forgot(broker, join, ledger, eventually):
    ledger.listener.publish_notice(ReleaseNotice(2, "http://here"))
    ledger.listener.publish_notice(ReleaseNotice(1, "http://here"))
    broker.kill()
    for file in (broker.folder / "data").iterdir():
        file.unlink()
    broker.start()
    got = []
    esteli = join("esteli", start=False)
    esteli.subscribe(topics.RELEASE, lambda message: got.append(message.payload))
    esteli.start()

    eventually(lambda: got)

    assert got[0] == encode(ReleaseNotice(2, "http://here"))


@pytest.mark.rule("presence-5", "presence-6")
def test_a_node_that_vanishes_is_lost_and_one_that_stops_is_stopped(fleet, ledger, eventually):
    esteli = fleet("esteli", engine=unsure()).start()
    malacatoya = fleet("malacatoya", engine=unsure())
    malacatoya.messaging.session._will_delay = 0
    malacatoya.start()
    eventually(lambda: len(rows(ledger, nodes)) == 2)

    esteli.messaging.stop()
    malacatoya.messaging.session._stopping.set()  # its socket closes without a word

    eventually(lambda: {row["name"]: row["state"] for row in rows(ledger, nodes)} == {"esteli": "stopped", "malacatoya": "lost"})


@pytest.mark.rule("presence-1")
def test_a_node_is_born_again_for_a_broker_that_forgot_it(broker, fleet, join, eventually):
    esteli = fleet("esteli", engine=unsure()).start()
    eventually(lambda: esteli.messaging._voice._sequence)  # the first birth left
    broker.kill()
    for file in (broker.folder / "data").iterdir():
        file.unlink()
    broker.start()
    got = []
    newcomer = join("base", start=False)
    newcomer.subscribe(topics.ALL_STATUS, lambda message: got.append(decode_message(message.payload)))
    newcomer.start()

    eventually(lambda: any(said.sequence >= 2 for said in got))  # the first birth may come again before it: nobody acknowledged it

    assert (got[-1].node, got[-1].state) == ("esteli", "answering")


# ---- chains and groups


@pytest.mark.rule("chain-1")
def test_a_base_station_that_is_unsure_itself_relays_the_teachers_answer(fleet, eventually):
    teacher = fleet("malacatoya", engine=sure(), serve=True, budget=0.0).start()
    base = fleet("base", engine=unsure("middle", tank=" overflow: perhaps"), serve=True, ask=("malacatoya",)).start()
    esteli = fleet("esteli", engine=unsure(), budget=1.0, ask=("base",)).start()

    esteli.asks("tank 12 cm")

    eventually(lambda: esteli.answers() == {"tank 12 cm": ("upgraded", "leak", "peer:base")}, esteli.answers)
    assert (len(base.engine.prompts), len(teacher.engine.prompts)) == (1, 1)
    assert base.answers() == {}  # the question of another is nothing of this site's


@pytest.mark.rule("chain-2")
def test_two_base_stations_that_ask_each_other_do_not_go_round_in_circles(fleet, eventually):
    base = fleet("base", engine=unsure("one", tank=" overflow: perhaps"), serve=True, ask=("ridge",)).start()
    ridge = fleet("ridge", engine=unsure("two", tank=" overflow: maybe"), serve=True, ask=("base",)).start()
    esteli = fleet("esteli", engine=unsure(), budget=1.0, ask=("base", "ridge"), votes=2).start()

    esteli.asks("tank 12 cm")

    eventually(lambda: esteli.answers() == {"tank 12 cm": ("upgraded", "overflow", esteli.answers()["tank 12 cm"][2])}, esteli.answers)
    assert (len(base.engine.prompts), len(ridge.engine.prompts)) == (1, 1)


@pytest.mark.rule("ask-8")
def test_base_stations_of_a_group_share_its_questions_and_one_that_left_gets_none(group_fleet, eventually):
    base = group_fleet("base", engine=sure(), serve=True, serve_groups=("hills",)).start()
    ridge = group_fleet("ridge", engine=sure(), serve=True, serve_groups=("hills",)).start()
    esteli = group_fleet("esteli", engine=unsure(), budget=1.0, ask_groups=("hills",)).start()
    eventually(lambda: sorted(esteli.messaging._presence.members("hills")) == ["base", "ridge"])

    for number in range(6):
        esteli.asks(f"tank {number}")
    eventually(lambda: {state for state, _, _ in esteli.answers().values()} == {"upgraded"}, esteli.answers)
    shared = {by for _, _, by in esteli.answers().values()}
    base.stop(sleeping_until=2_000_000_000)
    for number in range(6, 12):
        esteli.asks(f"tank {number}")
    eventually(lambda: {state for state, _, _ in esteli.answers().values()} == {"upgraded"}, esteli.answers)

    assert shared == {"peer:base", "peer:ridge"}
    assert len(base.engine.prompts) == 3
    assert len(ridge.engine.prompts) == 9


@pytest.mark.rule("ask-8")
def test_a_member_of_a_group_that_was_killed_keeps_no_question_for_itself(group_fleet, eventually):
    base = group_fleet("base", engine=sure(), serve=True, serve_groups=("hills",)).start()
    ridge = group_fleet("ridge", engine=sure(), serve=True, serve_groups=("hills",)).start()
    esteli = group_fleet("esteli", engine=unsure(), budget=1.0, ask_groups=("hills",), patience_s=1.0).start()
    eventually(lambda: sorted(esteli.messaging._presence.members("hills")) == ["base", "ridge"])
    base.messaging.session._stopping.set()  # its socket closes without a word; the broker keeps its session

    for number in range(4):
        esteli.asks(f"tank {number}")

    def upgraded():
        return {state for state, _, _ in esteli.answers().values()} == {"upgraded"}

    eventually(upgraded, esteli.answers)
    assert {by for _, _, by in esteli.answers().values()} == {"peer:ridge"}
    assert len(ridge.engine.prompts) == 4


@pytest.mark.rule("message-3")
def test_only_members_hear_the_questions_to_a_group(group_fleet, group_join, eventually):
    got = []
    spy = group_join("malacatoya")
    spy.subscribe(topics.shared_questions("hills"), lambda message: got.append(message.topic))
    base = group_fleet("base", engine=sure(), serve=True, serve_groups=("hills",)).start()
    esteli = group_fleet("esteli", engine=unsure(), budget=1.0, ask_groups=("hills",)).start()
    eventually(lambda: esteli.messaging._presence.members("hills") == ["base"])

    for number in range(4):
        esteli.asks(f"tank {number}")

    eventually(lambda: {state for state, _, _ in esteli.answers().values()} == {"upgraded"}, esteli.answers)
    assert (len(base.engine.prompts), got) == (4, [])


@pytest.mark.rule("presence-6", "presence-7")
def test_the_broker_tells_whoever_comes_later_how_long_a_node_still_sleeps(fleet, join, eventually):
    esteli = fleet("esteli", engine=unsure()).start()
    eventually(lambda: esteli.messaging.connected)
    esteli.stop(sleeping_until=int(time.time()) + 3_600)
    presence = Presence()
    newcomer = join("base", start=False)
    newcomer.subscribe(topics.ALL_STATUS, presence.hear)
    newcomer.start()

    eventually(lambda: presence.last("esteli") is not None)

    assert presence.last("esteli").state == "sleeping"
    assert 3_500 < presence.asleep_s("esteli") <= 3_600


@pytest.mark.rule("reply-3")
def test_a_reply_in_the_name_of_a_model_the_peer_does_not_have_is_refused_and_kept(fleet, join, eventually, monkeypatch):
    monkeypatch.setattr(asking, "BIRTH_S", 0.2)
    base = join("base")  # replies by hand
    base.publish(topics.status("base"), encode(Status("base", "b", 1, "answering", model_digest="m", serves=True)), retain=True)
    esteli = fleet("esteli", engine=unsure(), budget=1.0, ask=("base",)).start()
    eventually(lambda: esteli.messaging._presence.announced("base"))
    question = esteli.asks("tank 1").question
    with esteli.store.transaction() as session:
        prompt = session.scalars(sa.select(AnswerRow.prompt)).one()
    forged = encode(Reply("r1", question, digest_bytes(prompt.encode()), "base", "another", "leak: yes", 0.9))

    base.publish(topics.reply("esteli", "base"), forged, correlation=question.encode())

    def kept():
        with esteli.store.transaction() as session:
            return [row.reason for row in session.scalars(sa.select(RefusedRow)) if "has not announced" in row.reason]

    eventually(kept)
    assert esteli.answers()["tank 1"][0] != "upgraded"
