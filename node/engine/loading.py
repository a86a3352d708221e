"""From files on disk to a `Speaker` that has shown it can speak."""

from pathlib import Path

from node.engine.worker import Speaker, Speaks, probe, usable
from node.settings import Model
from node.update.selftest import known_answers_hold
from node.update.slots import ActiveRelease
from protocol import codec
from protocol.confidence import CALIBRATION_LIMIT, Calibration
from protocol.errors import BadInput, DoesNotFit, WrongDigest
from protocol.models.engine import Engine
from protocol.tasks import task_named


def load_release(active: ActiveRelease, *, threads: int, context: int) -> Speaker:
    """Load a release's files beside whatever runs now.

    Raises:
        WrongDigest: a file changed on this disk since it was verified.
        BadInput, NotEnough, DoesNotFit: see `Engine`; nothing stays loaded.
    """
    engine = Engine(active.model, threads=threads, context=context, adapter=active.adapter)
    adapter = active.adapter.name if active.adapter else ""  # a blob's name is its digest
    if (engine.model_digest, engine.adapter_digest) != (active.model.name, adapter):
        engine.close()
        raise WrongDigest(f"a file of release {active.number} is damaged on this disk")
    return speaker(engine, task=active.release.task, release=active.number, calibration=active.calibration)


def load_fixed(model: Model) -> Speaker:
    """Load the file the settings name, for a node without a coordinator.

    Raises:
        as `load_release`.
    """
    path, adapter, calibration = (Path(name).expanduser() if name else None for name in (model.path, model.adapter, model.calibration))
    if path is None:
        raise BadInput("model.path names no file")
    engine = Engine(path, threads=model.threads, context=model.context, adapter=adapter)
    return speaker(engine, task=model.task, release=0, calibration=calibration)


def speaker(engine: Speaks, *, task: str, release: int, calibration: Path | None) -> Speaker:
    """An engine with what belongs to it. A calibration made for another model or adapter is left out: its numbers would mean nothing."""
    try:
        task_named(task)
        return Speaker(engine, task, release, usable(read_calibration(calibration), engine))
    except BaseException:
        engine.close()
        raise


def read_calibration(path: Path | None) -> Calibration | None:
    """The calibration in `path`, or None without one.

    Raises:
        BadInput: unreadable, or not a calibration.
    """
    if path is None:
        return None
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadInput(f"cannot read the calibration {path}: {error.strerror}") from error
    return codec.decode_as(data, Calibration, limit=CALIBRATION_LIMIT, what=f"calibration {path.name}")


def prove(candidate: Speaker, active: ActiveRelease | None = None) -> None:
    """Make the candidate answer: any prompt, and a student the release's known answers too (they are the student's).

    Raises:
        DoesNotFit: it does not compute, or answers otherwise than on the coordinator.
    """
    task = task_named(candidate.task)
    if not candidate.engine.generate(probe(task), max_new_tokens=4, form=task.form).tokens:
        raise DoesNotFit("the model says nothing at all")
    if active is not None and active.role == "student":
        known_answers_hold(
            lambda prompt: candidate.engine.generate(prompt, max_new_tokens=task.max_new_tokens, form=task.form).text, active.release
        )
