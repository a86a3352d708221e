"""node/escalation/presence.py and choosing.py: who is there, and whom to ask. Without a broker."""

import math

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from node.escalation.choosing import RETRY_BASE_S, RETRY_CAP_S, Me, Peer, order, wait_s, why_not
from node.escalation.presence import KEPT_S, MODELS_LIMIT, NODES_LIMIT, Presence, will
from protocol import topics
from protocol.codec import decode_message, encode
from protocol.errors import MalformedMessage
from protocol.messages import Status
from protocol.mqtt import Incoming

ME = Me("ranch", "mine", "", 100)


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def peer(name="base", place=0, *, likely=True, asleep_s=0.0, **fields):
    said = {"state": "answering", "serves": True, "model_digest": "theirs", "parameters": 500, **fields}
    return Peer(name, place, Status(name, "b", 1, **said), likely, asleep_s)


# ---- births and deaths


@pytest.mark.rule("presence-3")
def test_a_death_of_an_earlier_boot_is_ignored():
    presence = Presence()
    presence.note(Status("base", "old", 7, "answering"))
    presence.note(Status("base", "new", 1, "answering"))

    assert presence.note(Status("base", "old", 0, "lost")) is False

    assert presence.likely("base")


@pytest.mark.rule("presence-4")
def test_a_death_of_an_earlier_connection_of_this_boot_is_ignored():
    presence = Presence()
    presence.note(Status("base", "b", 1, "answering", connection=1))
    presence.note(Status("base", "b", 2, "answering", connection=2))

    assert presence.note(Status("base", "b", 0, "lost", connection=1)) is False

    assert presence.likely("base")


@pytest.mark.rule("presence-2", "presence-4")
def test_a_death_of_this_connection_counts_until_the_next_word_of_it():
    presence = Presence()
    presence.note(Status("base", "b", 7, "answering", connection=2))

    assert presence.note(Status("base", "b", 0, "lost", connection=2)) is True
    assert not presence.likely("base")
    assert presence.note(Status("base", "b", 6, "answering", connection=2)) is False
    assert presence.note(Status("base", "b", 8, "answering", connection=3)) is True

    assert presence.likely("base")


@pytest.mark.rule("presence-5")
def test_the_death_the_broker_speaks_names_boot_and_connection():
    topic, payload = will("base", "b7", 3)

    assert (topic, decode_message(payload)) == (topics.status("base"), Status("base", "b7", 0, "lost", connection=3))


@pytest.mark.rule("presence-6")
@pytest.mark.parametrize("goodbye", ["sleeping", "stopped"])
def test_a_death_after_a_goodbye_says_nothing_new(goodbye):
    presence = Presence()
    presence.note(Status("base", "b", 1, goodbye, connection=1), asleep_s=600)

    assert presence.note(Status("base", "b", 0, "lost", connection=1)) is False

    assert presence.last("base").state == goodbye


@given(st.permutations(range(5)))
@settings(deadline=None)
def test_however_late_the_deaths_come_a_node_with_a_newer_birth_is_alive(order_of_arrival):
    """Births come in their order; every death of an earlier session may come at any later time."""
    births = [Status("base", f"boot{n // 2}", 1 + n % 2, "answering", connection=1 + n % 2) for n in range(6)]
    presence = Presence()
    for birth in births:
        presence.note(birth)
    for n in order_of_arrival:
        presence.note(Status("base", births[n].boot, 0, "lost", connection=births[n].connection))

    assert presence.likely("base")


@pytest.mark.rule("presence-8")
def test_a_peer_that_was_silent_too_long_is_not_likely_to_answer():
    clock = Clock()
    presence = Presence(silent=100, monotonic=clock)
    presence.note(Status("base", "b", 1, "answering"))
    clock.now += 101

    assert not presence.likely("base")


@pytest.mark.rule("message-3")
def test_a_status_under_another_nodes_topic_is_refused():
    with pytest.raises(MalformedMessage):
        Presence().hear(Incoming(topics.status("ridge"), encode(Status("base", "b", 1, "answering"))))


@pytest.mark.rule("presence-7")
@pytest.mark.parametrize("their_clock", [0, 1_900_000_000])
def test_how_long_a_peer_sleeps_is_the_brokers_count_whatever_its_clock_says(their_clock):
    clock = Clock()
    presence = Presence(monotonic=clock)
    word = Status("base", "b", 1, "sleeping", at=their_clock, sleeping_until=their_clock + 7_200)

    presence.hear(Incoming(topics.status("base"), encode(word), retained=True, expiry=KEPT_S + 600))
    clock.now += 500

    assert presence.asleep_s("base") == 100


@pytest.mark.rule("presence-7")
def test_a_peer_that_is_overdue_is_not_asleep_any_more():
    presence = Presence()

    presence.hear(Incoming(topics.status("base"), encode(Status("base", "b", 1, "sleeping", sleeping_until=9)), expiry=KEPT_S - 50))

    assert presence.asleep_s("base") == 0


def test_a_node_is_known_by_the_models_it_announced_lately():
    presence = Presence()
    for number in range(MODELS_LIMIT + 2):
        presence.note(Status("base", "b", number + 1, "answering", model_digest=f"m{number}", adapter_digest="a"))
    presence.note(Status("base", "b", 0, "lost"))

    assert presence.announced("base") == tuple((f"m{number}", "a") for number in range(MODELS_LIMIT + 1, 1, -1))


def test_words_of_more_nodes_than_are_kept_push_out_the_one_heard_longest_ago():
    presence = Presence()
    for number in range(NODES_LIMIT):
        presence.note(Status(f"n{number}", "b", 1, "answering"))
    presence.note(Status("n0", "b", 2, "answering"))
    presence.note(Status("newcomer", "b", 1, "answering"))

    assert presence.last("n1") is None
    assert presence.last("n0") is not None


# ---- whom to ask


@pytest.mark.rule("ask-3")
@pytest.mark.parametrize(
    ("other", "why"),
    [
        (peer("esteli"), "came by it"),
        (peer(serves=False), "takes no questions"),
        (peer(task="translate-english-spanish"), "it answers translate"),
        (peer(model_digest="mine"), "this node's own"),
        (peer(parameters=99), "fewer parameters"),
        (peer(state="sleeping", likely=False, asleep_s=100), "sleeps past"),
    ],
)
def test_a_peer_with_nothing_to_add_is_not_asked(other, why):
    assert why in why_not(other, ME, task="ranch", left_s=100, path=("esteli",))


@pytest.mark.parametrize(
    "other",
    [
        Peer("base", 0, None, False),
        peer(task="ranch"),
        peer(parameters=0),
        peer(model_digest="mine", adapter_digest="another"),
        peer(state="lost", likely=False),
        peer(state="sleeping", likely=False, asleep_s=99),
    ],
)
def test_a_peer_that_may_have_something_to_add_may_be_asked(other):
    assert why_not(other, ME, task="ranch", left_s=100, path=()) == ""


@pytest.mark.rule("ask-4")
@pytest.mark.parametrize(
    ("first", "second"),
    [
        (peer("b", 1), peer("a", 0, state="lost", likely=False)),
        (Peer("b", 1, None, False), peer("a", 0, state="sleeping", likely=False, asleep_s=5)),
        (peer("b", 1, state="sleeping", likely=False, asleep_s=5), peer("a", 0, state="lost", likely=False)),
        (peer("b", 1, state="sleeping", likely=False, asleep_s=5), peer("a", 0, state="sleeping", likely=False, asleep_s=6)),
        (peer("b", 1, queue=9, answer_s=9.0), peer("a", 0, parameters=0)),
        (peer("b", 1, queue=9, answer_s=9.0), peer("a", 0, parameters=100, adapter_digest="x")),
        (peer("b", 1, queue=9, answer_s=9.0, model_digest="new"), peer("a", 0, model_digest="asked")),
        (peer("b", 1, queue=1, answer_s=1.0), peer("a", 0, queue=2, answer_s=1.0)),
        (peer("b", 1, link="lan"), peer("a", 0, link="cellular")),
        (peer("b", 1, link="cellular"), peer("a", 0, link="lora")),
        (peer("b", 0), peer("a", 1)),
    ],
)
def test_the_better_peer_comes_first(first, second):
    assert [one.name for one in order([second, first], ME, spoken=("asked",))] == ["b", "a"]


@pytest.mark.rule("ask-5")
@given(st.integers(0, 100), st.floats(), st.floats(0, 1))
@settings(deadline=None)
def test_a_wait_is_what_the_peer_said_and_a_part_by_chance_both_bounded(tries, said, luck):
    waited = wait_s(tries, retry_after=said, uniform=lambda low, high: low + luck * (high - low))

    asked_for = min(RETRY_CAP_S, max(0.0, said)) if math.isfinite(said) else 0.0
    assert asked_for <= waited <= asked_for + min(RETRY_CAP_S, RETRY_BASE_S * 2.0**tries)


@pytest.mark.rule("message-4")
def test_a_field_with_its_default_costs_no_bytes_and_is_read_as_its_default():
    word = Status("base", "b", 1, "answering")

    assert set(msgspec.json.decode(encode(word))) == {"type", "node", "boot", "sequence", "state"}
    assert decode_message(encode(word)) == word
