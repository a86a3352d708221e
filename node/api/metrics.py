"""What the node counts, for Prometheus. Base units; every name begins with `milpa_node_`. No record's text, ever."""

import statistics
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from node.answering import Given

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
SHARES = tuple(round(0.1 * step, 1) for step in range(1, 11))


disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series beside every first one, of use to nobody here


class Metrics:
    """The node's own registry: nothing of the process, nothing global."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._answers = Counter("milpa_node_answers", "Local answers, by the state they began in", ["state"], registry=self.registry)
        self._changes = Counter("milpa_node_answer_changes", "Answers that changed later, by new state", ["state"], registry=self.registry)
        self._requests = Counter("milpa_node_requests", "HTTP requests, by path and status", ["path", "status"], registry=self.registry)
        self._prompt = Counter("milpa_node_prompt_tokens", "Tokens read by the model", registry=self.registry)
        self._generated = Counter("milpa_node_generated_tokens", "Tokens written by the model", registry=self.registry)
        self._seconds = Histogram("milpa_node_answer_seconds", "The model's time an answer", buckets=SECONDS, registry=self.registry)
        self._lock = threading.Lock()
        self.answered_count = 0  # since this process began
        self.escalated_count = 0
        self._told = (0, 0)  # of both, what the last summary said
        self._recent: deque[float] = deque(maxlen=1000)  # seconds of the latest answers
        self._recalled = Counter("milpa_node_memory_answers", "Answers from memory, by match", ["match"], registry=self.registry)
        self._confidence = Histogram("milpa_node_confidence", "Confidence of local answers", buckets=SHARES, registry=self.registry)

    def answered(self, given: Given) -> None:
        """A local answer was given."""
        with self._lock:
            self.answered_count += 1
            self.escalated_count += given.provisional
            self._recent.append(given.seconds)
        self._answers.labels(given.state).inc()
        if given.recalled is not None:
            self._recalled.labels(given.recalled.match).inc()
        if given.spoken is not None:
            generation = given.spoken.generation
            self._prompt.inc(generation.prompt_tokens)
            self._generated.inc(len(generation.tokens))
            self._seconds.observe(generation.seconds)
            self._confidence.observe(given.judgement.confidence)

    def changed(self, state: str) -> None:
        """A reply, the operator or the clock changed an answer."""
        self._changes.labels(state).inc()

    def requested(self, path: str, status: int) -> None:
        """An HTTP request was answered."""
        self._requests.labels(path, str(status)).inc()

    def summary(self) -> dict[str, float]:
        """What happened since the last summary: count, escalated, latency_p50_ms."""
        with self._lock:
            count, escalated = self.answered_count - self._told[0], self.escalated_count - self._told[1]
            self._told = (self.answered_count, self.escalated_count)
            middle = statistics.median(self._recent) if self._recent else 0.0
        return {"count": float(count), "escalated": float(escalated), "latency_p50_ms": 1000.0 * middle}

    def watch(self, name: str, what: str, value: Callable[[], float]) -> None:
        """A figure that is read when asked for: `milpa_node_NAME`."""
        Gauge(f"milpa_node_{name}", what, registry=self.registry).set_function(value)

    def count_by(self, name: str, what: str, label: str, values: Callable[[], Mapping[Any, float]]) -> None:
        """Counters kept elsewhere, by label: `milpa_node_NAME_total{LABEL=...}`, read when asked for."""

        class Counters(Collector):
            def collect(self) -> Iterable[Metric]:
                found = CounterMetricFamily(f"milpa_node_{name}", what, labels=[label])
                for key, value in values().items():
                    found.add_metric([str(key)], value)
                return [found]

        self.registry.register(Counters())

    def render(self) -> bytes:
        """The text format."""
        return generate_latest(self.registry)
