"""A season at a site: its node is asked record after record, peers upgrade what it was unsure of, an operator corrects some.

What is measured is what the site would have seen: the first answer and its latency, the share handed on, the answer as it stood when the
replies were in. The truth is only used to count, and by the operator who corrects; the node never sees it otherwise.
"""

import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import httpx
import msgspec

from coordinator.forge.judging.evidence import live_curve
from coordinator.forge.judging.metrics import at_budget, wilson
from protocol import codec
from protocol.errors import Unavailable
from protocol.tasks import Record, task_named

REQUEST_DEADLINE_S = 150.0
SETTLE_POLL_S = 0.5
PAGE = 500
EQUAL_BUDGET = 0.2  # share handed on at which two releases are compared

Progress = Callable[[int], None]  # records done


class Asked(msgspec.Struct):
    """One record at one node."""

    record: Record
    answer: str  # the node's id of it
    verdict: str  # as first given
    confidence: float
    escalated: bool
    seconds: float  # from request to answer, at the client
    text: str = ""  # as first given
    final: str = ""  # verdict when the replies were in
    final_text: str = ""
    state: str = ""
    by: str = ""


class Site:
    """A node's API as a site's own programs use it."""

    def __init__(self, name: str, url: str) -> None:
        self.name = name
        self._http = httpx.Client(base_url=url, timeout=REQUEST_DEADLINE_S)

    def ask(self, records: Sequence[Record], *, progress: Progress | None = None) -> list[Asked]:
        """Send records one after the other.

        Raises:
            Unavailable: the node refused or did not answer.
        """
        found = []
        for done, record in enumerate(records, 1):
            blind = msgspec.structs.replace(record, target="", verdict="", numbers=())
            begun = time.perf_counter()
            body = self._call("POST", "/v1/records", content=codec.encode(blind), headers={"content-type": "application/json"})
            seconds = time.perf_counter() - begun
            found.append(Asked(record, body["id"], body["verdict"], body["confidence"], bool(body["escalation"]), seconds, body["text"]))
            if progress:
                progress(done)
        return found

    def settle(self, asked: Sequence[Asked], *, deadline_s: float) -> None:
        """Wait until no answer is provisional, or until the deadline; note how each stands."""
        end = time.monotonic() + deadline_s
        while True:
            now = self._answers()
            open_ = [item for item in asked if now.get(item.answer, {}).get("provisional")]
            if not open_ or time.monotonic() > end:
                break
            time.sleep(SETTLE_POLL_S)
        for item in asked:
            row = now[item.answer]
            item.final, item.final_text = task_named(row["task"]).parse(row["text"]).verdict, row["text"]
            item.state, item.by = row["state"], row["by"]

    def correct(self, asked: Sequence[Asked], *, share: float, seed: int) -> int:
        """The operator looks at a share of the answers and says what was right, through POST /v1/feedback. How many."""
        chosen = random.Random(f"{seed}-{self.name}").sample(list(asked), round(share * len(asked)))
        for item in chosen:
            self._call("POST", "/v1/feedback", json={"id": item.answer, "text": item.record.target})
        return len(chosen)

    def _answers(self) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        since = 0
        while True:
            page = self._call("GET", "/v1/answers", params={"since": since, "limit": PAGE})
            found |= {row["id"]: row for row in page["data"]}
            if len(page["data"]) < PAGE:
                return found
            since = page["next"]

    def _call(self, method: str, path: str, **arguments: Any) -> dict[str, Any]:
        try:
            answer = self._http.request(method, path, **arguments)
        except httpx.HTTPError as error:
            raise Unavailable(f"node {self.name} did not answer {path}: {error}") from error
        if answer.status_code != 200:
            raise Unavailable(f"node {self.name} answered {answer.status_code} to {path}: {answer.text[:200]}")
        return dict(answer.json())


def figures(asked: Sequence[Asked]) -> dict[str, Any]:
    """What a season at one site looked like, under the names that programs rely on.

    `accuracy_at_budget`: exactly the least confident EQUAL_BUDGET of the answers are the peer's, where a peer's answer is known;
    so two releases that hand on different shares are compared at equal cost.
    """
    right = [float(item.verdict == item.record.verdict) for item in asked]
    final = [float(item.final == item.record.verdict) for item in asked]
    seconds = sorted(item.seconds for item in asked)
    states: Mapping[str, int] = {state: sum(item.state == state for item in asked) for state in {item.state for item in asked}}
    return {
        "n": len(asked),
        "accuracy": sum(right) / len(right),
        "accuracy_ci": list(wilson(int(sum(right)), len(right))),
        "escalated": sum(item.escalated for item in asked) / len(asked),
        "accuracy_with_escalation": sum(final) / len(final),
        "accuracy_with_escalation_ci": list(wilson(int(sum(final)), len(final))),
        "accuracy_at_budget": at_budget([item.confidence for item in asked], right, final, EQUAL_BUDGET),
        "budget": EQUAL_BUDGET,
        "latency_p50_ms": 1000 * seconds[len(seconds) // 2],
        "latency_p95_ms": 1000 * seconds[int(0.95 * (len(seconds) - 1))],
        "states": dict(states),
        **live_curve([item.confidence for item in asked], right, final, [item.escalated for item in asked]),  # for the report's plots
    }
