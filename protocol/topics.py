"""Where each message travels. `asyncapi.yaml` beside this file says the same for other programs; a test holds them together.

milpa/v1/release                        ReleaseNotice   coordinator -> all          retained
milpa/v1/node/NODE/status               Status          node -> coordinator, all    retained, will
milpa/v1/node/NODE/alive                Alive frame     node -> coordinator, all    (`frames.py`)
milpa/v1/node/NODE/event                Event           node -> coordinator
milpa/v1/node/NODE/ack                  Ack             coordinator -> node
milpa/v1/peer/PEER/question/ASKER       Question        node -> peer                response topic, correlation data, expiry
milpa/v1/group/GROUP/question/ASKER     Question        node -> one of the group    the same; the group's members share one subscription
milpa/v1/node/ASKER/reply/PEER          Reply           peer -> node                correlation data
milpa/v1/radio/NODE/up                  any frame       node -> its gateway         (`frames.py`)
milpa/v1/radio/NODE/down                any frame       gateway -> node
"""

from protocol.names import checked_name

RELEASE = "milpa/v1/release"
ALL_STATUS = "milpa/v1/node/+/status"
ALL_ALIVE = "milpa/v1/node/+/alive"
ALL_EVENTS = "milpa/v1/node/+/event"


def status(node: str) -> str:
    """A node's status."""
    return f"milpa/v1/node/{checked_name(node)}/status"


def alive(node: str) -> str:
    """A node's heartbeat between two statuses."""
    return f"milpa/v1/node/{checked_name(node)}/alive"


def event(node: str) -> str:
    """What happened on a node."""
    return f"milpa/v1/node/{checked_name(node)}/event"


def ack(node: str) -> str:
    """What the coordinator has of a node."""
    return f"milpa/v1/node/{checked_name(node)}/ack"


def question(peer: str, asker: str) -> str:
    """A question to a peer."""
    return f"milpa/v1/peer/{checked_name(peer)}/question/{checked_name(asker)}"


def questions_to(peer: str) -> str:
    """Filter: all questions to a peer."""
    return f"milpa/v1/peer/{checked_name(peer)}/question/+"


def group_question(group: str, asker: str) -> str:
    """A question to whichever member of a group the broker gives it to."""
    return f"milpa/v1/group/{checked_name(group, what='group')}/question/{checked_name(asker)}"


def shared_questions(group: str) -> str:
    """Filter: a member's share of the questions to its group (MQTT 5, 4.8.2: the broker delivers each to one member)."""
    return f"$share/{checked_name(group, what='group')}/milpa/v1/group/{group}/question/+"


def reply(asker: str, peer: str) -> str:
    """A peer's reply."""
    return f"milpa/v1/node/{checked_name(asker)}/reply/{checked_name(peer)}"


def replies_to(asker: str) -> str:
    """Filter: all replies to a node."""
    return f"milpa/v1/node/{checked_name(asker)}/reply/+"


def covers(topic_filter: str, topic: str) -> bool:
    """Whether a subscription to `topic_filter` hears what is said on `topic` (MQTT 5, 4.7; "$" topics are not treated apart)."""
    wanted, have = topic_filter.split("/"), topic.split("/")
    for index, level in enumerate(wanted):
        if level == "#":
            return True
        if index >= len(have) or level not in ("+", have[index]):
            return False
    return len(wanted) == len(have)


def radio_up(node: str) -> str:
    """What a node on a radio says."""
    return f"milpa/v1/radio/{checked_name(node)}/up"


def radio_down(node: str) -> str:
    """What its gateway says to it."""
    return f"milpa/v1/radio/{checked_name(node)}/down"
