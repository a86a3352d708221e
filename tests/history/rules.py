"""What a history must not show, after Jepsen: plain values in, a list of what is wrong out. No I/O.

* acknowledged and lost      an answer that was given, or an operator's word that was taken, is not there at the end
* applied twice              more than one reply changed an answer, or an event stands for more than one change
* order                      an operator's word was changed by somebody else; change numbers or releases went back
* unverified                 an answer names a model that nobody signed; or memory gave it, and nobody had confirmed what it stands on
* silence                    a request without an answer
"""

import itertools
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple


class Given(NamedTuple):
    """An answer that a client holds in its hands."""

    id: str
    source: str
    release: int
    model: str  # digest
    remembered: str = ""  # the answer it stands on, where memory spoke and not the model


class Change(NamedTuple):
    """One write to an answer, in the order of the writes, as the database itself noted it."""

    id: str
    change: int
    state: str
    by: str


class History(NamedTuple):
    """All that was seen."""

    given: Sequence[Given]
    silent: Sequence[str]  # requests without an answer, and why
    corrected: Mapping[str, str]  # answer -> the verdict that the operator was told is taken
    changes: Sequence[Change]
    stored: Mapping[str, str]  # answer -> its record's source, at the end
    verdicts: Mapping[str, str]  # answer -> its verdict, at the end
    events: Sequence[tuple[str, str]]  # (id, state) of every escalation event in the coordinator's ledger
    signed: Collection[str]  # digests of the models in signed releases


def wrong(history: History) -> list[str]:
    """Every rule that was broken, in words; empty when all held."""
    found = [f"silence: {why}" for why in history.silent]
    found += _lost(history) + _twice(history) + _told(history) + _order(history)
    return found + _unverified(history)


def _unverified(history: History) -> list[str]:
    confirmed = {change.id for change in history.changes if change.by == "operator" or change.by.startswith("peer:")}
    spoken = [one for one in history.given if not one.remembered]
    found = [f"unverified: {one.id} was answered by {one.model[:12]}" for one in spoken if one.model not in history.signed]
    unfounded = [one for one in history.given if one.remembered and one.remembered not in confirmed]
    return found + [f"unverified: {one.id} was remembered from {one.remembered}, which nobody confirmed" for one in unfounded]


def _lost(history: History) -> list[str]:
    found = [f"lost: answer {one.id}" for one in history.given if history.stored.get(one.id) != one.source]
    found += [
        f"lost: the operator's {verdict!r} on {id} is {history.verdicts.get(id)!r}"
        for id, verdict in history.corrected.items()
        if history.verdicts.get(id) != verdict
    ]
    return found


def _told(history: History) -> list[str]:
    """Each reply that was applied is one event in the ledger: fewer are lost, more are told twice."""
    applied = Counter(change.state for change in history.changes if change.by.startswith("peer:"))
    told = Counter(state for _, state in history.events)
    found = []
    for state in ("upgraded", "confirmed"):
        if applied[state] != told[state]:
            what = "lost" if applied[state] > told[state] else "twice"
            found.append(f"{what}: {applied[state]} replies {state} an answer, the ledger has {told[state]} such events")
    return found


def _twice(history: History) -> list[str]:
    replies = Counter(change.id for change in history.changes if change.by.startswith("peer:"))
    found = [f"twice: {count} replies changed {id}" for id, count in replies.items() if count > 1]
    found += [
        f"twice: event {id} is {count} times in the ledger" for id, count in Counter(id for id, _ in history.events).items() if count > 1
    ]
    return found


def _order(history: History) -> list[str]:
    found, last, operators = [], 0, set[str]()
    for change in history.changes:
        if change.change <= last:
            found.append(f"order: change {change.change} of {change.id} follows {last}")
        last = max(last, change.change)
        if change.id in operators and change.by != "operator":
            found.append(f"order: {change.by or 'the clock'} changed {change.id} after the operator")
        if change.by == "operator":
            operators.add(change.id)
    for earlier, later in itertools.pairwise(one.release for one in history.given if not one.remembered):
        if later < earlier:
            found.append(f"order: release {later} answered after {earlier}")
    return found
