"""`milpa-coordinator publish`: describe files as a release, sign it, put it where nodes look."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from protocol.console import print_json, stderr
from protocol.errors import BadInput

if TYPE_CHECKING:
    from coordinator.fleet.publishing import Publisher
    from protocol.releases import Kind, KnownAnswer, Role
    from protocol.tasks import Task

KNOWN_LIMIT = 8  # answers in a manifest: enough to catch a broken model, few enough for a slow board
CLEAR_MARGIN = 1.0  # nats between best and second token, everywhere: rounding on another processor moves it by hundredths


def publish(
    store: Path = typer.Option(..., help="The coordinator's folder, as for `serve` and `round`; releases lie in its `repository`."),
    task: str = typer.Option("ranch", help="What the models answer: ranch, translate-english-spanish, ..."),
    model: Path | None = typer.Option(None, help="The students' GGUF."),
    adapter: Path | None = typer.Option(None, help="LoRA adapter (GGUF) for that model."),
    initial_adapter: Path | None = typer.Option(None, help="The adapter that sites start training from."),
    rehearsal: Path | None = typer.Option(None, help="General records (JSON lines) that sites learn among their own, not to forget."),
    calibration: Path | None = typer.Option(None, help="Confidence calibration of the student (JSON)."),
    teacher: Path | None = typer.Option(None, help="The peers' GGUF."),
    evidence: Path | None = typer.Option(None, help="Evidence bundle (JSON); its peak_rss_mb becomes the memory that a node must have."),
    known: Path | None = typer.Option(None, help="Records (JSON lines); the student answers them, and each node must answer the same."),
    min_memory_mb: int = typer.Option(0, min=0, help="MiB of memory a node must have; 0: take it from the evidence."),
    note: str = typer.Option("", help="One line for the operator."),
    keys: Path | None = typer.Option(None, help="Folder of the signing keys, when not STORE/keys."),
    init: bool = typer.Option(False, "--init", help="Make the store and its keys first, if there are none."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Sign a release and make it the latest.

    Without --model, --init only makes the store.

    Examples:

        milpa-coordinator publish --store store --init

        milpa-coordinator publish --store store --model student-q8.gguf --known dev.jsonl --evidence evidence.json

        milpa-coordinator publish --store store --model student-q8.gguf --adapter round-3.gguf --note "round 3: +4.1 points at esteli"
    """
    from coordinator.fleet.publishing import Publisher, build_release
    from coordinator.forge.pairs import read_records
    from protocol.digests import digest_file
    from protocol.tasks import task_named

    found = task_named(task)
    publisher = Publisher(store / "repository", keys=keys)
    if init:
        publisher.init()
    if model is None:
        if not init or any((adapter, initial_adapter, rehearsal, calibration, teacher, evidence, known)):
            raise BadInput("name the students' model with --model FILE.gguf")
        _print_store(publisher, as_json=as_json)
        return
    if rehearsal is not None:
        read_records(rehearsal, found)
    before = publisher.latest()
    files = _files(
        model=model, adapter=adapter, initial_adapter=initial_adapter, rehearsal=rehearsal, calibration=calibration, teacher=teacher,
        evidence=evidence,
    )  # fmt: skip
    base = digest_file(model)
    number = before.number + 1 if before else 1
    release, paths = build_release(
        number,
        task,
        [(role, kind, path, base if kind in ("adapter", "initial-adapter") else "") for role, kind, path in files],
        previous=before.number if before else 0,
        note=note,
        known_answers=_known_answers(model, adapter, known, found) if known else (),
        min_memory_mb=min_memory_mb or _measured_memory(evidence),
    )
    publisher.publish(release, paths)
    if as_json:
        print_json({"number": number, "model_digest": base, "files": release.files, "known_answers": len(release.known_answers)})
    else:
        size = sum(file.size for file in release.files) / 1e6
        stderr.print(f"release {number} is published: {len(files)} files, {size:.1f} MB, {len(release.known_answers)} known answers")


def _files(**given: Path | None) -> list[tuple["Role", "Kind", Path]]:
    roles: dict[str, tuple[Role, Kind]] = {
        "model": ("student", "model"),
        "adapter": ("student", "adapter"),
        "initial_adapter": ("student", "initial-adapter"),
        "rehearsal": ("student", "rehearsal"),
        "calibration": ("student", "calibration"),
        "teacher": ("teacher", "model"),
        "evidence": ("student", "evidence"),
    }
    found = [(*roles[name], path) for name, path in given.items() if path is not None]
    for _, _, path in found:
        if not path.is_file():
            raise BadInput(f"{path} is not a file")
    return found


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


def _measured_memory(evidence: Path | None) -> int:
    """`peak_rss_mb` of the student in an evidence bundle, rounded up; 0 when it is not there."""
    if evidence is None:
        return 0
    try:
        bundle: Any = json.loads(evidence.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{evidence} is not a JSON evidence bundle: {error}") from error
    student = bundle.get("student", bundle) if isinstance(bundle, dict) else {}
    peak = student.get("peak_rss_mb", 0) if isinstance(student, dict) else 0
    return int(-(-float(peak) // 1)) if isinstance(peak, (int, float)) else 0


def _print_store(publisher: "Publisher", *, as_json: bool) -> None:
    latest = publisher.latest()
    if as_json:
        print_json({"store": str(publisher.root), "keys": str(publisher.keys), "number": latest.number if latest else 0})
    else:
        stderr.print(f"{publisher.root} is a release store; its keys are in {publisher.keys}: carry root-*.pem to a safe place")
