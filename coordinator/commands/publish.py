"""`milpa-coordinator publish`: describe files as a release, sign it, put it where nodes look."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from protocol.console import print_json, stderr
from protocol.errors import BadInput

if TYPE_CHECKING:
    from coordinator.fleet.publishing import Publisher
    from protocol.releases import Kind, KnownAnswer, Role
    from protocol.tasks import Task

KNOWN_LIMIT = 8  # answers in a manifest: enough to catch a broken model, few enough for a slow board
CLEAR_MARGIN = 1.0  # nats between best and second token, everywhere: rounding on another processor moves it by hundredths
GOES_WITHOUT = {  # option -> what nodes do not do with a release that lacks it, and what adds it
    "calibration": "no calibration: nodes ask peers by raw probability, which nobody measured, and cannot correct it by what is confirmed; "
    "add --calibration FILE.json, made by `milpa-coordinator calibrate`",
    "initial-adapter": "no initial adapter: sites do not learn from this release, and no round can follow it; "
    "add --initial-adapter FILE.gguf, which `milpa-coordinator distill` writes beside the student",
    "rehearsal": "no rehearsal records: sites learn their own examples alone, and nothing there notices what they forget; "
    "add --rehearsal FILE.jsonl with general records",
    "known": "no known answers: a node's self-test sees that the model says something, not that it says what it said here; "
    "add --known FILE.jsonl",
    "min-memory-mb": "no memory figure: nodes with too little memory install it all the same; "
    "add --evidence FILE.json of `milpa-coordinator evaluate`, or --min-memory-mb",
}  # fmt: skip


def publish(
    store: Path = typer.Option(..., help="The coordinator's folder, as for `serve` and `round`; releases lie in its `repository`."),
    task: str = typer.Option("ranch", help="What the models answer: ranch, translate-english-spanish, ..."),
    model: Path | None = typer.Option(None, help="The students' GGUF."),
    adapter: Path | None = typer.Option(None, help="LoRA adapter (GGUF) for that model."),
    initial_adapter: Path | None = typer.Option(None, help="The adapter that sites start training from."),
    rehearsal: Path | None = typer.Option(None, help="General records (JSON lines) that sites learn among their own, not to forget."),
    calibration: Path | None = typer.Option(None, help="Confidence calibration of the student (JSON)."),
    teacher: Path | None = typer.Option(None, help="The peers' GGUF."),
    teacher_calibration: Path | None = typer.Option(
        None, help="Confidence calibration of the teacher (JSON): what base stations reply is weighed, and handed on, by it."
    ),
    evidence: Path | None = typer.Option(
        None, help="Evidence (JSON) of `evaluate --evidence`; the student's peak memory in it becomes what a node must have."
    ),
    known: Path | None = typer.Option(None, help="Records (JSON lines); the student answers them, and each node must answer the same."),
    min_memory_mb: int = typer.Option(0, min=0, help="MiB of memory a node must have; 0: take it from the evidence."),
    note: str = typer.Option("", help="One line for the operator."),
    keys: Path | None = typer.Option(None, help="Folder of the signing keys, when not STORE/keys."),
    init: bool = typer.Option(False, "--init", help="Make the store and its keys first, if there are none."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Sign a release and make it the latest.

    Without --model, --init only makes the store. What a release goes without, and what nodes then do not do, is told on stderr.

    Examples:

        milpa-coordinator publish --store store --init

        milpa-coordinator publish --store store --model student.gguf --initial-adapter initial-adapter.gguf --rehearsal general.jsonl --calibration calibration.json --evidence evidence.json --known dev.jsonl

        milpa-coordinator publish --store store --model student.gguf --teacher teacher.gguf --teacher-calibration teacher-calibration.json

        milpa-coordinator publish --store store --model student-q8.gguf --adapter round-3.gguf --note "round 3: +4.1 points at esteli"
    """  # noqa: E501
    from coordinator.fleet.publishing import Publisher, build_release
    from coordinator.forge.pairs import read_records
    from protocol.digests import digest_file
    from protocol.tasks import task_named

    found = task_named(task)
    publisher = Publisher(store / "repository", keys=keys)
    if init:
        publisher.init()
    if model is None:
        if not init or any((adapter, initial_adapter, rehearsal, calibration, teacher, teacher_calibration, evidence, known)):
            raise BadInput("name the students' model with --model FILE.gguf")
        _print_store(publisher, as_json=as_json)
        return
    if rehearsal is not None:
        read_records(rehearsal, found)
    before = publisher.latest()
    files = _files(
        model=model, adapter=adapter, initial_adapter=initial_adapter, rehearsal=rehearsal, calibration=calibration, teacher=teacher,
        teacher_calibration=teacher_calibration, evidence=evidence,
    )  # fmt: skip
    if teacher_calibration is not None:
        _check_calibration(teacher_calibration, teacher)
    base = digest_file(model)
    number = before.number + 1 if before else 1
    measured = _measured_memory(evidence, base) if evidence else 0
    memory = min_memory_mb or measured
    release, paths = build_release(
        number,
        task,
        [(role, kind, path, base if kind in ("adapter", "initial-adapter") else "") for role, kind, path in files],
        previous=before.number if before else 0,
        note=note,
        known_answers=_known_answers(model, adapter, known, found) if known else (),
        min_memory_mb=memory,
    )
    publisher.publish(release, paths)
    given = {
        "calibration": calibration,
        "initial-adapter": initial_adapter,
        "rehearsal": rehearsal,
        "known": known,
        "min-memory-mb": memory,
    }
    missing = [option for option in GOES_WITHOUT if not given[option]]
    if as_json:
        answers = len(release.known_answers)
        print_json({"number": number, "model_digest": base, "files": release.files, "known_answers": answers, "missing": missing})
    else:
        size = sum(file.size for file in release.files) / 1e6
        stderr.print(f"release {number} is published: {len(files)} files, {size:.1f} MB, {len(release.known_answers)} known answers")
    for option in missing:
        stderr.print(f"warning: {GOES_WITHOUT[option]}", style="yellow", markup=False, highlight=False, soft_wrap=True)


def _files(**given: Path | None) -> list[tuple["Role", "Kind", Path]]:
    roles: dict[str, tuple[Role, Kind]] = {
        "model": ("student", "model"),
        "adapter": ("student", "adapter"),
        "initial_adapter": ("student", "initial-adapter"),
        "rehearsal": ("student", "rehearsal"),
        "calibration": ("student", "calibration"),
        "teacher": ("teacher", "model"),
        "teacher_calibration": ("teacher", "calibration"),
        "evidence": ("student", "evidence"),
    }
    found = [(*roles[name], path) for name, path in given.items() if path is not None]
    for _, _, path in found:
        if not path.is_file():
            raise BadInput(f"{path} is not a file")
    return found


def _check_calibration(calibration: Path, teacher: Path | None) -> None:
    """A base station goes without a calibration of another model, and says nothing: better told here.

    Raises:
        BadInput: there is no teacher, or the file is no calibration of it.
    """
    from protocol.codec import decode_as
    from protocol.confidence import CALIBRATION_LIMIT, Calibration
    from protocol.digests import digest_file

    made = decode_as(calibration.read_bytes(), Calibration, limit=CALIBRATION_LIMIT, what=f"--teacher-calibration {calibration}")
    if teacher is None or not made.fits(digest_file(teacher), ""):
        whose = f"another model than {teacher}" if teacher else "a teacher, and --teacher names none"
        raise BadInput(f"{calibration} is of {whose}; make it with: milpa-coordinator calibrate --model TEACHER.gguf --out {calibration}")


def _known_answers(model: Path, adapter: Path | None, records: Path, task: "Task") -> tuple["KnownAnswer", ...]:
    """The student's own answers to the first records that it answers without a close call."""
    from protocol.codec import decode_record
    from protocol.models.engine import Engine
    from protocol.releases import KnownAnswer

    chosen: list[KnownAnswer] = []
    engine = Engine(model, adapter=adapter)
    try:
        for line in records.read_text(encoding="utf-8").splitlines():
            if not line.strip():
                continue
            prompt = task.prompt(decode_record(line))
            answer = engine.generate(prompt, max_new_tokens=task.max_new_tokens, form=task.form)
            if answer.text.strip() and min(answer.margins, default=0.0) >= CLEAR_MARGIN:
                chosen.append(KnownAnswer(prompt, answer.text))
            if len(chosen) == KNOWN_LIMIT:
                break
    finally:
        engine.close()
    if not chosen:
        raise BadInput(f"{records} has no record that the student answers clearly; give others with --known, or leave it out")
    return tuple(chosen)


def _measured_memory(evidence: Path, model: str) -> int:
    """The student's peak memory in MiB, rounded up: the most over an evidence's held-out sets, 0 where none was measured.

    Raises:
        BadInput: the file is not evidence, or of another model than the one of that digest.
    """
    import msgspec

    from coordinator.forge.judging import schema
    from coordinator.forge.judging.evidence import STUDENT

    try:
        proof = schema.check(msgspec.json.decode(evidence.read_bytes(), type=dict))
        figures = [each.models[STUDENT] for each in proof.sets.values() if STUDENT in each.models]
        others = {str(one["model_digest"]) for one in figures if one.get("model_digest")} - {model}
        if others:
            raise BadInput(f"it is of the model {min(others)[:12]}, and --model is {model[:12]}")
        return math.ceil(max((msgspec.convert(one.get("peak_rss_mb", 0.0), float) for one in figures), default=0.0))
    except (msgspec.DecodeError, BadInput) as error:
        raise BadInput(f"{evidence}: give what `milpa-coordinator evaluate --evidence` wrote ({error})") from error


def _print_store(publisher: "Publisher", *, as_json: bool) -> None:
    latest = publisher.latest()
    if as_json:
        print_json({"store": str(publisher.root), "keys": str(publisher.keys), "number": latest.number if latest else 0})
    else:
        stderr.print(f"{publisher.root} is a release store; its keys are in {publisher.keys}: carry root-*.pem to a safe place")
