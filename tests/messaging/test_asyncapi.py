"""protocol/asyncapi.yaml says what protocol/topics.py, protocol/messages.py and the session do."""

from pathlib import Path
from typing import get_args

import msgspec
import pytest
import yaml

from deploy.broker import PACKET_LIMIT
from protocol import frames, mqtt, topics
from protocol.codec import MESSAGE_LIMIT
from protocol.messages import Message

DOCUMENT = yaml.safe_load((Path(__file__).parents[2] / "protocol" / "asyncapi.yaml").read_text(encoding="utf-8"))
KINDS = get_args(Message)
TOPICS = {
    "release": topics.RELEASE,
    "status": topics.status("n"),
    "alive": topics.alive("n"),
    "radioUp": topics.radio_up("n"),
    "radioDown": topics.radio_down("n"),
    "event": topics.event("n"),
    "ack": topics.ack("n"),
    "question": topics.question("p", "a"),
    "groupQuestion": topics.group_question("g", "a"),
    "reply": topics.reply("a", "p"),
}
SAID_IN_PROSE = {"title", "description"}


def bare(schema):
    """A schema without its prose, alike however it was written."""
    if isinstance(schema, dict):
        return {key: bare(value) for key, value in schema.items() if not (key in SAID_IN_PROSE and isinstance(value, str))}
    return sorted(schema) if isinstance(schema, list | tuple) else schema


def pointed_at(reference):
    found = DOCUMENT
    for part in reference.removeprefix("#/").split("/"):
        found = found[part]
    return found


def references(node):
    if isinstance(node, dict):
        if "$ref" in node:
            yield node["$ref"]
        node = list(node.values())
    if isinstance(node, list):
        for value in node:
            yield from references(value)


@pytest.mark.rule("message-2")
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_message_has_the_same_fields_types_and_defaults_in_both(kind):
    _, components = msgspec.json.schema_components([kind])

    assert bare(DOCUMENT["components"]["schemas"][kind.__name__]) == bare(components[kind.__name__])


def test_there_are_no_other_messages():
    names = {kind.__name__ for kind in KINDS} | {"AliveFrame", "Frame"}

    assert set(DOCUMENT["components"]["schemas"]) == set(DOCUMENT["components"]["messages"]) == names
    assert {name for channel in DOCUMENT["channels"].values() for name in channel["messages"]} == names


def test_every_topic_is_a_channel_and_every_channel_a_topic():
    letters = {"{node}": "n", "{peer}": "p", "{asker}": "a", "{group}": "g"}
    addresses = {}
    for name, channel in DOCUMENT["channels"].items():
        address = channel["address"]
        assert {f"{{{parameter}}}" for parameter in channel.get("parameters", {})} == {word for word in letters if word in address}
        for word, letter in letters.items():
            address = address.replace(word, letter)
        addresses[name] = address

    assert addresses == TOPICS


def test_every_function_that_makes_a_topic_is_described():
    filters = {topics.ALL_STATUS, topics.ALL_ALIVE, topics.ALL_EVENTS, topics.questions_to("p"), topics.replies_to("a")}
    filters |= {topics.shared_questions("g").removeprefix("$share/g/")}

    for topic_filter in filters:
        assert any(mqtt.topic_matches_sub(topic_filter, topic) for topic in TOPICS.values()), topic_filter


def test_every_channel_has_an_operation_and_every_reference_leads_somewhere():
    assert {operation["channel"]["$ref"].split("/")[-1] for operation in DOCUMENT["operations"].values()} == set(DOCUMENT["channels"])
    for reference in references(DOCUMENT):
        assert pointed_at(reference) is not None


@pytest.mark.rule("message-2")
def test_the_sizes_of_frames_in_it_are_the_ones_in_the_code():
    frame = frames.encode(frames.Alive(b"boot", 1))

    assert DOCUMENT["components"]["schemas"]["AliveFrame"]["minLength"] == len(frame)
    assert DOCUMENT["components"]["schemas"]["Frame"]["maxLength"] == frames.FRAME_LIMIT


def test_the_figures_in_it_are_the_ones_in_the_code():
    binding = DOCUMENT["servers"]["site"]["bindings"]["mqtt"]

    assert binding["sessionExpiryInterval"] == mqtt.SESSION_EXPIRY_S
    assert f"{MESSAGE_LIMIT:,} bytes" in DOCUMENT["info"]["description"]
    assert f"{PACKET_LIMIT:,} bytes" in DOCUMENT["servers"]["site"]["description"]
    assert mqtt.PACKET_LIMIT == PACKET_LIMIT
