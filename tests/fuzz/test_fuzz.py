"""Some seconds of fuzzing for every parser, the same inputs each time; and every input that ever crashed one."""

from pathlib import Path

import pytest

from tests.fuzz.mutate import mutated
from tests.fuzz.run import Crash, attempt, crashes
from tests.fuzz.targets import NAMES, Target, opened

VECTORS = Path(__file__).parent / "vectors"
SECONDS_WORTH = {"http": 1_000, "adapter": 1_500, "settings": 3_000}  # the rest take 5,000
FAST = [name for name in NAMES if name != "llama"]


@pytest.mark.parametrize("name", FAST)
def test_a_parser_refuses_what_it_cannot_read_and_nothing_else_happens(name: str) -> None:
    with opened(name) as target:
        found = [crash for crash in crashes(target, seed=1, start=0, stop=SECONDS_WORTH.get(name, 5_000)) if isinstance(crash, Crash)]

    assert not found, f"{len(found)} crashes, the first: {found[0].error}; python -m tests.fuzz.run --only {name} --at {found[0].number}"


@pytest.mark.llama
def test_a_model_file_that_passes_our_check_does_not_end_llama_cpp() -> None:
    with opened("llama") as target:
        found = [crash for crash in crashes(target, seed=1, start=0, stop=60) if isinstance(crash, Crash)]

    assert not found, f"{found[0].error}; python -m tests.fuzz.run --only llama --at {found[0].number}"


@pytest.mark.parametrize("name", NAMES)
def test_good_inputs_are_read(name: str) -> None:
    with opened(name) as target:
        for data in target.corpus:
            if name != "http":
                target.parse(data) if name != "release" else attempt(target, data)
            assert attempt(target, data) == ""


@pytest.mark.parametrize("file", sorted(VECTORS.glob("*/*.bin")), ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_what_crashed_once_does_not_again(file: Path) -> None:
    with opened(file.parent.name) as target:
        assert attempt(target, file.read_bytes()) == ""


def test_an_input_depends_on_its_number_alone() -> None:
    corpus = [b'{"a":1}', b"[2]"]

    one, again = (mutated(7, "x", 41, corpus) for _ in range(2))

    assert one == again
    assert len({mutated(7, "x", number, corpus) for number in range(200)}) > 150


def test_anything_but_an_error_of_ours_is_a_crash() -> None:
    def parse(data: bytes) -> None:
        raise KeyError(data)

    found = list(crashes(Target("x", [b"a"], parse), seed=1, start=0, stop=3))

    assert [event.number for event in found if isinstance(event, Crash)] == [0, 1, 2]
