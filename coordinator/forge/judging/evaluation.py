"""How good a model file is: the GGUF itself, through the engine that nodes use, on records with known answers.

 * The engine runs in processes of its own (`engine_process`): one thread each, `threads` of them side by side over slices of the
   records. So peak memory is one engine's, latency and speed are of one thread, and a crash in llama.cpp is an error here.
 * Verdict tasks: the code is judged by equality, the sentence after it by chrF and BLEU. Text tasks: chrF and BLEU of the text.
 * An answer that is not of the task's form is wrong and its sentence is empty; nothing is repaired or left out.
 * `evaluate_texts` judges answers that came from elsewhere (a float model, another system) by the same rules.
Every record needs its reference answer. Answers are greedy, so an evaluation repeats exactly; only times differ.
"""

import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import msgspec

from coordinator.forge.judging.engine_process import Answered, Failed, Finished, Job, Line, Loaded
from coordinator.forge.judging.metrics import SEED, TextScores, paired_difference, sentence_chrf, text_scores, wilson
from protocol import errors
from protocol.confidence import Calibration, judge, quantile
from protocol.errors import BadInput, NotEnough, Unavailable
from protocol.tasks import Form, Record, Task

SILENCE_LIMIT_S = 180.0  # seconds without a line from an engine; a 270M model on one slow core answers in 5
STOP_LIMIT_S = 5.0  # seconds an engine process gets to end
CONTEXT = 1024  # tokens
FEW_SHOT_CONTEXT = 4096
ENGINE_PROCESS = "coordinator.forge.judging.engine_process"
ROOT = Path(__file__).parents[3]

Progress = Callable[[int, int], None]  # (done, total)


class Scored(msgspec.Struct, frozen=True):
    """One record's answer beside the truth."""

    id: str
    site: str
    text: str
    chrf: float  # sentence chrF2, 0 to 100: of the text, or of the sentence after the verdict
    verdict: str = ""  # what the model said; "" where it is not of the task's form
    expected: str = ""  # verdict tasks: the truth
    correct: bool = False  # verdict tasks: the code is right
    features: tuple[float, ...] = ()  # protocol.confidence.FEATURES; empty when the answer came as text only
    seconds: float = 0.0
    tokens: int = 0  # generated
    stopped: str = ""  # "end", "line" or "length"
    cpu_seconds: float = 0.0  # of the engine's process


class Evaluation(msgspec.Struct, frozen=True):
    """A model on a set of records. `answers` are in the order of the records."""

    task: str
    kind: str  # of the task: "verdict" or "text"
    answers: tuple[Scored, ...]
    scores: TextScores
    name: str = ""  # the model, for people
    model_digest: str = ""
    adapter_digest: str = ""
    file_mb: float = 0.0  # the model's file and its adapter's, MiB; 0 when the answers came as text
    peak_rss_mb: float = 0.0  # of one engine process, MiB
    engines: int = 0  # processes of one thread that ran side by side

    def figures(self) -> dict[str, Any]:
        """The figures under the names that programs rely on. Speed and size only where an engine was measured."""
        found: dict[str, Any] = {
            "n": len(self.answers),
            "bleu": self.scores.bleu,
            "bleu_ci": list(self.scores.bleu_ci),
            "chrf": self.scores.chrf,
            "chrf_ci": list(self.scores.chrf_ci),
            "bleu_signature": self.scores.bleu_signature,
            "chrf_signature": self.scores.chrf_signature,
        }
        if self.kind == "verdict":
            right = sum(answer.correct for answer in self.answers)
            found["accuracy"] = right / len(self.answers)
            found["accuracy_ci"] = list(wilson(right, len(self.answers)))
            found["malformed"] = sum(not answer.verdict for answer in self.answers) / len(self.answers)
        if self.model_digest:
            seconds = [answer.seconds for answer in self.answers]
            found |= {
                "tokens_per_second": sum(answer.tokens for answer in self.answers) / sum(seconds),
                "latency_p50_ms": 1000 * quantile(seconds, 0.5),
                "latency_p95_ms": 1000 * quantile(seconds, 0.95),
                "cpu_seconds_per_1000": 1000 * sum(answer.cpu_seconds for answer in self.answers) / len(self.answers),
                "peak_rss_mb": self.peak_rss_mb,
                "file_mb": self.file_mb,
                "model_digest": self.model_digest,
                "adapter_digest": self.adapter_digest,
                "cut_off": sum(answer.stopped == "length" for answer in self.answers) / len(self.answers),
            }
        return found

    def quality(self) -> tuple[float, ...]:
        """Per record: 1 or 0 for a right or wrong verdict; sentence chrF (0 to 100) for text."""
        return tuple(float(answer.correct) if self.kind == "verdict" else answer.chrf for answer in self.answers)

    def confidences(self, calibration: Calibration | None) -> tuple[float, ...]:
        """Per record, as a node would judge it.

        Raises:
            BadInput: the answers came as text only, so there is nothing to judge them by.
        """
        if any(not answer.features for answer in self.answers):
            raise BadInput(f"{self.name or 'this model'} gave text only: there are no log-probabilities to be confident by")
        verdicts = self.kind == "verdict"
        return tuple(
            judge(answer.features, calibration=calibration, threshold=None, in_form=bool(answer.verdict) or not verdicts).confidence
            for answer in self.answers
        )


def evaluate(
    model: Path,
    records: Sequence[Record],
    task: Task,
    *,
    adapter: Path | None = None,
    threads: int = 2,
    context: int = CONTEXT,
    name: str = "",
    seed: int = SEED,
    progress: Progress | None = None,
) -> Evaluation:
    """Answer `records` with the GGUF `model` and judge the answers.

    Args:
        threads: engine processes side by side, one thread each.
        context: tokens of prompt and answer together.
        seed: of the bootstrap intervals.

    Raises:
        BadInput: no records, a record without a reference answer or longer than the context, or a file that is no model.
        Unavailable: an engine process crashed or fell silent.
    """
    checked_references(records, task)
    loaded, answers, peak = generate_all(
        model, [task.prompt(record) for record in records], max_new_tokens=task.max_new_tokens, adapter=adapter, threads=threads,
        context=context, form=task.form, ids=[record.id for record in records], progress=progress,
    )  # fmt: skip
    files = [model] if adapter is None else [model, adapter]
    return msgspec.structs.replace(
        judged(records, task, answers, name=name or model.name, seed=seed),
        model_digest=loaded.model_digest, adapter_digest=loaded.adapter_digest, peak_rss_mb=peak, engines=min(threads, len(records)),
        file_mb=sum(file.stat().st_size for file in files) / (1 << 20),
    )  # fmt: skip


def evaluate_texts(texts: Sequence[str], records: Sequence[Record], task: Task, *, name: str = "", seed: int = SEED) -> Evaluation:
    """Judge answers that came as plain text (a float model, a peer system) by the same rules.

    Raises:
        BadInput: not one text a record, or a record without a reference answer.
    """
    checked_references(records, task)
    if len(texts) != len(records):
        raise BadInput(f"{len(texts)} answers for {len(records)} records: there must be one each")
    return judged(records, task, [Answered(text, (), 0, 0, 0.0, "") for text in texts], name=name, seed=seed)


def judged(records: Sequence[Record], task: Task, answers: Sequence[Answered], *, name: str, seed: int) -> Evaluation:
    """Put each answer beside its record's truth."""
    parsed = [task.parse(answer.text) for answer in answers]
    truth = [task.parse(record.target) for record in records]
    said, wanted = [answer.sentence for answer in parsed], [answer.sentence for answer in truth]
    scored = tuple(
        Scored(
            id=record.id, site=record.site, text=mine.text, chrf=chrf, verdict=mine.verdict, expected=right.verdict,
            correct=bool(mine.verdict) and mine.verdict == right.verdict, features=answer.features, seconds=answer.seconds,
            tokens=answer.tokens, stopped=answer.stopped, cpu_seconds=answer.cpu_seconds,
        )
        for record, answer, mine, right, chrf in zip(records, answers, parsed, truth, sentence_chrf(said, wanted), strict=True)
    )  # fmt: skip
    return Evaluation(task=task.name, kind=task.kind, answers=scored, scores=text_scores(said, wanted, seed=seed), name=name)


def checked_references(records: Sequence[Record], task: Task) -> None:
    """Check that every record can be judged.

    Raises:
        BadInput: no records, a record of another task, or one without a usable reference answer.
    """
    if not records:
        raise BadInput("there are no records to evaluate on")
    for record in records:
        if record.task != task.name:
            raise BadInput(f"record {record.id!r} is of task {record.task!r}, not {task.name!r}")
        truth = task.parse(record.target)
        if not truth.text or (task.codes and not truth.verdict):
            raise BadInput(f"record {record.id!r} has no usable target: there is nothing to compare an answer with")


def few_shot(task: Task, examples: Sequence[Record]) -> Task:
    """The same task with `examples` and their answers before every prompt: how an uncorrected teacher is asked. Use FEW_SHOT_CONTEXT."""
    shown = "".join(f"{task.prompt(example)}{task.target(example)}\n\n" for example in examples)
    return msgspec.structs.replace(task, template=shown.replace("{", "{{").replace("}", "}}") + task.template)


def paired_bootstrap(before: Evaluation | Sequence[float], after: Evaluation | Sequence[float], *, seed: int) -> dict[str, float]:
    """Mean of after - before on the same records: verdicts right (share) or sentence chrF (points).

    Returns:
        diff, low, high (95%), p (two-sided), n.

    Raises:
        BadInput: not of the same records.
    """
    if isinstance(before, Evaluation) and isinstance(after, Evaluation):
        if [answer.id for answer in before.answers] != [answer.id for answer in after.answers]:
            raise BadInput(f"{before.name!r} and {after.name!r} answered different records: a paired comparison needs the same")
        if before.task != after.task:
            raise BadInput(f"{before.name!r} is of task {before.task!r}, {after.name!r} of {after.task!r}")
    values = [side.quality() if isinstance(side, Evaluation) else side for side in (before, after)]
    return paired_difference(values[0], values[1], seed=seed)


def generate_all(
    model: Path,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    adapter: Path | None = None,
    threads: int = 2,
    context: int = CONTEXT,
    form: Form | None = None,
    ids: Sequence[str] = (),
    progress: Progress | None = None,
) -> tuple[Loaded, list[Answered], float]:
    """Answer prompts with `threads` engine processes.

    Returns:
        What was loaded, the answers in the order of the prompts, and the peak memory of the largest process in MiB.

    Raises:
        BadInput, NotEnough, DoesNotFit: as the engine says; with the record's id (of `ids`) where one prompt is at fault.
        Unavailable: a process crashed or was silent for SILENCE_LIMIT_S.
    """
    if threads < 1:
        raise BadInput(f"threads is {threads}; it must be at least 1")
    count = min(threads, len(prompts))
    names = list(ids) or [str(index) for index in range(len(prompts))]
    with tempfile.TemporaryDirectory(prefix="milpa-evaluate-") as folder:
        crew = [
            _Process(Path(folder), index, Job(str(model), str(adapter or ""), context, max_new_tokens, tuple(prompts[index::count]), form))
            for index in range(count)
        ]
        try:
            return _collect(crew, names, model, progress)
        finally:
            for process in crew:
                process.stop()


class _Process:
    """One engine process, the thread that reads its lines, and what it has said so far."""

    def __init__(self, folder: Path, index: int, job: Job) -> None:
        self.index = index
        self.job = job
        self.loaded: Loaded | None = None
        self.finished: Finished | None = None
        self.answers: list[Answered] = []
        self.complaints = folder / f"{index}.err"
        job_file = folder / f"{index}.json"
        job_file.write_bytes(msgspec.json.encode(job))
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
        with self.complaints.open("wb") as err:
            self.child = subprocess.Popen(
                [sys.executable, "-m", ENGINE_PROCESS, str(job_file)],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=err,
                env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip

    def read_into(self, lines: "queue.Queue[tuple[_Process, Line | None]]") -> None:
        """Read lines until the process closes its end; None marks that."""
        decoder = msgspec.json.Decoder(Line)
        pipe: IO[bytes] | None = self.child.stdout
        assert pipe is not None
        with pipe:
            for line in pipe:
                lines.put((self, decoder.decode(line)))
        lines.put((self, None))

    def stop(self) -> None:
        """End the process if it still runs."""
        if self.child.poll() is None:
            self.child.kill()
        self.child.wait(STOP_LIMIT_S)

    def crash(self) -> Unavailable:
        """The error for a process that ended without a last word."""
        code = self.child.wait(STOP_LIMIT_S)
        how = f"was stopped by signal {-code}" if code < 0 else f"ended with code {code}"
        said = self.complaints.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        return Unavailable(
            f"the engine for {Path(self.job.model).name} {how} after {len(self.answers)} answers; {' '.join(said) or 'it said nothing'}"
        )


def _collect(
    crew: Sequence[_Process], names: Sequence[str], model: Path, progress: Progress | None
) -> tuple[Loaded, list[Answered], float]:
    lines: queue.Queue[tuple[_Process, Line | None]] = queue.Queue(maxsize=len(names) + 4 * len(crew))  # room for all: a reader never waits
    for process in crew:
        threading.Thread(target=process.read_into, args=(lines,), daemon=True, name=f"engine-{process.index}").start()
    done, open_ends = 0, len(crew)
    while open_ends:
        try:
            process, line = lines.get(timeout=SILENCE_LIMIT_S)
        except queue.Empty:
            raise Unavailable(f"the engine for {model.name} said nothing for {SILENCE_LIMIT_S:.0f} s; is the machine overloaded?") from None
        match line:
            case Loaded():
                process.loaded = line
            case Answered():
                process.answers.append(line)
                done += 1
                if progress:
                    progress(done, len(names))
            case Finished():
                process.finished = line
            case Failed():
                at = f"record {names[process.index + len(process.answers) * len(crew)]!r}: " if process.loaded else ""
                kind = getattr(errors, line.kind, errors.MilpaError)
                raise kind(at + line.message)
            case None:
                open_ends -= 1
                if not process.finished:
                    raise process.crash()
    answers: list[Answered] = [process.answers[place] for place, process in _order(crew, len(names))]
    loaded = crew[0].loaded
    assert loaded is not None
    if any(process.loaded != loaded for process in crew):
        raise NotEnough(f"{model} changed while it was evaluated; run again")
    return loaded, answers, max(process.finished.peak_rss_mb for process in crew if process.finished)


def _order(crew: Sequence[_Process], count: int) -> list[tuple[int, _Process]]:
    return [(index // len(crew), crew[index % len(crew)]) for index in range(count)]
