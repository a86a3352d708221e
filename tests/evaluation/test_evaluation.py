"""A model file on records with known answers, through the engine that nodes use."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from coordinator.forge.judging import evaluation
from coordinator.forge.judging.engine_process import cpu_seconds, peak_rss_mb
from coordinator.forge.judging.evaluation import evaluate, evaluate_texts, few_shot, paired_bootstrap
from protocol.errors import BadInput, DoesNotFit, Unavailable
from protocol.tasks import RANCH, Record
from tests.evaluation.conftest import SPANISH, ranch_records, simulated
from tests.tiny import tiny_gguf

CONTRACT = {
    "n", "bleu", "chrf", "bleu_signature", "chrf_signature", "chrf_ci", "accuracy", "accuracy_ci", "tokens_per_second", "latency_p50_ms",
    "peak_rss_mb", "file_mb", "model_digest",
}  # fmt: skip


def test_a_verdict_is_judged_by_its_code_and_its_sentence_apart() -> None:
    records = ranch_records(3)
    right, other = records[0].target, f"{RANCH.codes[5]}: {records[1].target.partition(': ')[2]}"

    found = evaluate_texts([right, other, "no idea"], records, RANCH)

    assert [answer.correct for answer in found.answers] == [True, False, False]
    assert [answer.chrf for answer in found.answers] == pytest.approx([100.0, 100.0, 0.0])
    assert found.figures()["accuracy"] == pytest.approx(1 / 3)
    assert found.figures()["malformed"] == pytest.approx(1 / 3)


def test_the_right_code_is_right_whatever_the_sentence_says() -> None:
    records = ranch_records(1)

    found = evaluate_texts([f"{RANCH.codes[0]}: algo muy distinto"], records, RANCH)

    assert found.answers[0].correct
    assert found.answers[0].chrf < 50


def test_only_the_first_line_counts() -> None:
    records = ranch_records(1)

    found = evaluate_texts([f" {records[0].target}\nnormal: something else"], records, RANCH)

    assert found.answers[0].correct


def test_translations_have_no_accuracy() -> None:
    records = [Record(id="1", task=SPANISH.name, source="The cat.", target="El gato.", lang="es")]

    figures = evaluate_texts(["El gato."], records, SPANISH).figures()

    assert "accuracy" not in figures
    assert figures["chrf"] == pytest.approx(100.0)


@pytest.mark.parametrize(
    ("record", "told"),
    [
        (Record(id="a", task="ranch", source="x"), "'a' has no usable target"),
        (Record(id="b", task="ranch", source="x", target="nonsense"), "'b' has no usable target"),
        (Record(id="c", task="other", source="x", target="leak: x"), "of task 'other', not 'ranch'"),
    ],
)
def test_a_record_that_cannot_be_judged_is_named(record: Record, told: str) -> None:
    with pytest.raises(BadInput, match=told):
        evaluate_texts([""], [record], RANCH)


def test_models_are_compared_on_the_same_records_only() -> None:
    with pytest.raises(BadInput, match="different records"):
        paired_bootstrap(simulated(20, accuracy=0.5), simulated(21, accuracy=0.5), seed=0)


def test_examples_come_before_every_prompt_with_their_answers() -> None:
    examples = [Record(id="1", task=SPANISH.name, source="A {cat}.", target="Un {gato}.", lang="es")]

    prompt = few_shot(SPANISH, examples).prompt(Record(id="2", task=SPANISH.name, source="A dog.", lang="es"))

    assert prompt == "English: A {cat}.\nSpanish: Un {gato}.\n\nEnglish: A dog.\nSpanish:"


@pytest.mark.llama
def test_the_figures_have_the_names_that_programs_rely_on(tiny: Path) -> None:
    found = evaluate(tiny, ranch_records(6), RANCH)

    assert set(found.figures()) >= CONTRACT
    assert found.figures()["file_mb"] == pytest.approx(tiny.stat().st_size / 2**20)
    assert found.figures()["tokens_per_second"] > 0
    assert len(found.confidences(None)) == 6


@pytest.mark.llama
def test_more_engines_side_by_side_give_the_same_answers_in_the_same_order(tiny: Path) -> None:
    records, seen = ranch_records(7), []

    one = evaluate(tiny, records, RANCH, threads=1)
    three = evaluate(tiny, records, RANCH, threads=3, progress=lambda done, total: seen.append((done, total)))

    assert [(answer.id, answer.text, answer.features) for answer in one.answers] == [
        (answer.id, answer.text, answer.features) for answer in three.answers
    ]
    assert seen == [(done, 7) for done in range(1, 8)]


@pytest.mark.llama
def test_peak_memory_is_the_engines_own_and_not_its_parents(tiny: Path) -> None:
    ballast = bytearray(400 << 20)
    ballast[:: 1 << 12] = b"x" * len(ballast[:: 1 << 12])  # touch every page

    found = evaluate(tiny, ranch_records(2), RANCH)

    assert peak_rss_mb() > 400
    assert 0 < found.peak_rss_mb < 300


@pytest.mark.llama
def test_a_record_longer_than_the_context_is_named(tiny: Path) -> None:
    records = [*ranch_records(3), Record(id="long", task="ranch", source="agua " * 700, target="leak: x"), *ranch_records(3)]

    with pytest.raises(BadInput, match=r"record 'long': the prompt has \d+ tokens"):
        evaluate(tiny, records, RANCH, context=256)


@pytest.mark.llama
def test_a_file_that_is_no_model_is_told_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    file.write_text("hello")

    with pytest.raises(BadInput, match="is not a GGUF file"):
        evaluate(file, ranch_records(1), RANCH)


@pytest.mark.llama
def test_an_adapter_that_is_a_model_does_not_fit(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(DoesNotFit, match="is not for"):
        evaluate(tiny, ranch_records(1), RANCH, adapter=tiny_gguf(tmp_path / "other.gguf", seed=5))


def engine_that(does: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a program in the engine's place that loads, answers once and then misbehaves."""
    (folder / "bad_engine.py").write_text(
        "import os, sys, time\n"
        'say = lambda line: (sys.stdout.write(line + "\\n"), sys.stdout.flush())\n'
        'say(\'{"type":"loaded","model_digest":"d","adapter_digest":""}\')\n'
        'say(\'{"type":"answered","text":"x","features":[],"tokens":1,"prompt_tokens":1,"seconds":0.1,"stopped":"end"}\')\n'
        f'sys.stderr.write("GGML_ASSERT failed\\n"); sys.stderr.flush()\n{does}\n'
    )
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setattr(evaluation, "ENGINE_PROCESS", "bad_engine")


def test_a_crash_in_the_engine_is_an_error_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine_that("os.abort()", tmp_path, monkeypatch)

    with pytest.raises(Unavailable, match=r"stopped by signal 6 after 1 answers; GGML_ASSERT failed"):
        evaluate(tmp_path / "m.gguf", ranch_records(3), RANCH, threads=1)


def test_an_engine_that_ends_early_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine_that("sys.exit(0)", tmp_path, monkeypatch)

    with pytest.raises(Unavailable, match="ended with code 0 after 1 answers"):
        evaluate(tmp_path / "m.gguf", ranch_records(3), RANCH, threads=1)


def test_a_silent_engine_is_given_up_and_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine_that("time.sleep(300)", tmp_path, monkeypatch)
    monkeypatch.setattr(evaluation, "SILENCE_LIMIT_S", 1.5)

    with pytest.raises(Unavailable, match="said nothing for 2 s"):
        evaluate(tmp_path / "m.gguf", ranch_records(3), RANCH, threads=1)


def test_peak_memory_is_what_was_resident_and_not_what_was_reserved() -> None:
    reserve = "import mmap; hole = mmap.mmap(-1, 1 << 31, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)"  # 2 GiB, never touched
    touch = "block = bytearray(256 << 20); block[::4096] = b'x' * len(block[::4096]); del block"
    code = f"{reserve}\n{touch}\nfrom coordinator.forge.judging.engine_process import peak_rss_mb; print(peak_rss_mb())"

    peak = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120).stdout)

    assert 256 < peak < 1024  # VmPeak would be over 2048, VmRSS without the block that is gone under 256


def test_processor_time_grows_with_work_and_not_with_waiting() -> None:
    started = cpu_seconds()
    time.sleep(0.3)
    waited = cpu_seconds() - started
    while cpu_seconds() - started < 0.1:
        sum(range(10_000))

    assert waited < 0.1


@pytest.mark.llama
def test_an_answers_processor_time_is_its_own(tiny: Path) -> None:
    found = evaluate(tiny, ranch_records(6), RANCH, threads=2)

    assert all(0 <= answer.cpu_seconds <= answer.seconds + 0.1 for answer in found.answers)
    assert found.figures()["cpu_seconds_per_1000"] == pytest.approx(1000 * sum(answer.cpu_seconds for answer in found.answers) / 6)


@pytest.mark.llama
@pytest.mark.parametrize("threads", [1, 3])
def test_every_answer_is_to_its_own_records_prompt(tiny: Path, threads: int) -> None:
    prompts = [f"window {'agua ' * place}" for place in range(7)]  # each of another length

    _, answers, _ = evaluation.generate_all(tiny, prompts, max_new_tokens=2, threads=threads)

    lengths = [answer.prompt_tokens for answer in answers]
    assert lengths == sorted(lengths)
    assert len(set(lengths)) == 7


@pytest.mark.llama
def test_what_is_measured_is_what_a_node_answers(tiny: Path) -> None:
    from node.engine.worker import Speaker, Worker
    from protocol.confidence import features
    from protocol.models.engine import Engine

    records = ranch_records(5)
    measured = evaluate(tiny, records, RANCH, threads=1)
    worker = Worker()
    worker.swap_after_current_record(Speaker(Engine(tiny), "ranch"))
    worker.start()

    answers = [
        worker.ask("ranch", RANCH.prompt(record), max_new_tokens=RANCH.max_new_tokens, deadline_s=60, form=RANCH.form).generation
        for record in records
    ]
    worker.stop()

    assert [(RANCH.parse(one.text).text, features(one)) for one in answers] == [(one.text, one.features) for one in measured.answers]
    assert all(one.verdict for one in measured.answers)
