"""What an answer costs, and what is only a model of it."""

import msgspec
import pytest

from coordinator.forge.judging import economics
from coordinator.forge.judging.economics import ASSUMED, PowerModel, cost, given, share, table
from coordinator.forge.judging.evaluation import Evaluation, evaluate_texts
from protocol.errors import BadInput
from protocol.tasks import RANCH
from tests.evaluation.conftest import ranch_records, simulated


def costing(cpu: float, *, memory: float = 80.0, size: float = 30.0) -> Evaluation:
    made = simulated(100, accuracy=0.9)
    rows = tuple(
        msgspec.structs.replace(answer, cpu_seconds=cpu * (1 + place % 2), seconds=float(place + 1))
        for place, answer in enumerate(made.answers)
    )
    return msgspec.structs.replace(made, answers=rows, peak_rss_mb=memory, file_mb=size)


def test_costs_are_those_of_a_thousand_answers() -> None:
    found = cost(costing(0.2), PowerModel(10.0, "a test"))

    assert found is not None
    assert found.cpu_seconds_per_1000 == pytest.approx(300.0)  # half take 0.2, half 0.4
    assert found.joules_per_1000 == pytest.approx(3000.0)
    assert found.latency_p50_ms == pytest.approx(50_500.0)
    assert found.latency_p95_ms == pytest.approx(95_050.0)
    assert found.tokens_per_second == pytest.approx(1200 / 5050)
    assert found.file_bytes == 30 << 20
    assert found.n == 100


def test_answers_that_came_as_text_have_no_cost() -> None:
    records = ranch_records(3)
    texts = evaluate_texts([record.target for record in records], records, RANCH)

    assert cost(texts) is None
    assert share(texts, costing(0.2), seed=1) is None
    assert set(table({"peer": texts, "student": costing(0.2)}, ASSUMED)) == {"student"}


def test_the_students_share_of_the_teachers_cost_has_its_interval() -> None:
    found = share(costing(1.0, memory=400.0, size=300.0), costing(0.1), seed=1)

    assert found is not None
    assert found["cpu"]["ratio"] == pytest.approx(0.1)
    assert (found["cpu"]["low"], found["cpu"]["high"]) == pytest.approx((0.1, 0.1))  # every answer a tenth: no spread
    assert (found["bytes"], found["memory"]) == (pytest.approx(0.1), pytest.approx(0.2))


def test_the_watts_say_where_they_come_from() -> None:
    assert "not measured" in ASSUMED.source
    assert given(None) == ASSUMED
    assert given(3.5) == PowerModel(3.5, "as given by whoever ran it")


@pytest.mark.parametrize("watts", [0.0, -1.0, float("nan"), 5000.0])
def test_watts_that_no_core_draws_are_refused(watts: float) -> None:
    with pytest.raises(BadInput, match="give the watts of one busy core"):
        economics.given(watts)
