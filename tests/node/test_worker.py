import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from node.engine.worker import Busy, Late, NoModel, Speaker, Worker
from protocol.errors import BadInput, Unavailable
from tests.node.fake_engine import FakeEngine


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as threads:
        yield threads


@pytest.fixture
def held() -> Iterator[tuple[Worker, FakeEngine]]:
    """A worker with room for two, whose engine waits at its gate."""
    engine, worker = FakeEngine(), Worker(capacity=2)
    engine.gate.clear()
    worker.swap_after_current_record(Speaker(engine, "ranch"))
    worker.start()
    yield worker, engine
    engine.gate.set()
    worker.stop()


def ask(worker: Worker, prompt: str = "soil", *, deadline_s: float = 20.0) -> str:
    return worker.ask("ranch", prompt, max_new_tokens=16, deadline_s=deadline_s).generation.text


def fill(worker: Worker, engine: FakeEngine, pool: ThreadPoolExecutor) -> list:  # type: ignore[type-arg]
    """One request under way and two waiting."""
    first = pool.submit(ask, worker, "first")
    assert engine.started.wait(10)
    rest = [pool.submit(ask, worker, name) for name in ("second", "third")]
    limit = threading.Event()
    for _ in range(1000):
        if worker.waiting == 2:
            return [first, *rest]
        limit.wait(0.01)
    raise AssertionError("the queue never filled")


def test_a_full_queue_is_told_at_once(held: tuple[Worker, FakeEngine], pool: ThreadPoolExecutor) -> None:
    worker, engine = held
    asked = fill(worker, engine, pool)

    with pytest.raises(Busy, match="2 requests already wait"):
        ask(worker)

    engine.gate.set()
    assert [future.result(10) for future in asked] == [engine.default] * 3


def test_a_request_past_its_deadline_is_never_read_by_the_model(held: tuple[Worker, FakeEngine], pool: ThreadPoolExecutor) -> None:
    worker, engine = held
    first = pool.submit(ask, worker, "first")
    assert engine.started.wait(10)

    with pytest.raises(Late):
        ask(worker, "too late", deadline_s=0.05)
    engine.gate.set()
    first.result(10)
    ask(worker, "after")

    assert engine.prompts == ["first", "after"]


def test_a_swap_drops_no_request(held: tuple[Worker, FakeEngine], pool: ThreadPoolExecutor) -> None:
    worker, old = held
    new = FakeEngine(default=" leak: new", name="new")
    asked = fill(worker, old, pool)
    swap = pool.submit(worker.swap_after_current_record, Speaker(new, "ranch", release=2))

    old.gate.set()
    swap.result(10)
    texts = [future.result(10) for future in asked]

    assert texts[0] == old.default  # it was under way
    assert set(texts[1:]) <= {old.default, new.default} and len(texts) == 3
    assert old.closed and not new.closed
    assert ask(worker) == new.default


def test_another_task_is_refused_and_the_owner_lives_on(held: tuple[Worker, FakeEngine]) -> None:
    worker, engine = held
    engine.gate.set()

    with pytest.raises(BadInput, match="answers 'ranch'"):
        worker.ask("translate-english-spanish", "x", max_new_tokens=4, deadline_s=10)

    assert ask(worker) == engine.default


def test_a_failing_model_fails_its_own_request_only(held: tuple[Worker, FakeEngine]) -> None:
    worker, engine = held
    engine.gate.set()

    with pytest.raises(BadInput):
        ask(worker, "")

    assert ask(worker) == engine.default
    assert worker.alive


def test_without_a_model_there_is_no_waiting() -> None:
    with pytest.raises(NoModel, match="waits for its first release"):
        ask(Worker())


def test_stopping_refuses_what_waits_and_frees_the_model(held: tuple[Worker, FakeEngine], pool: ThreadPoolExecutor) -> None:
    worker, engine = held
    asked = fill(worker, engine, pool)
    stopping = pool.submit(worker.stop)

    engine.gate.set()
    stopping.result(20)

    assert asked[0].result(10) == engine.default
    ends = [future.exception(10) or future.result() for future in asked[1:]]
    assert all(end == engine.default or isinstance(end, Unavailable) for end in ends)  # nobody waits for ever
    assert engine.closed
