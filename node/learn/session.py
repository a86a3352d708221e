"""One training from beginning to end, as the command line and the daemon's child both run it. Importing it loads no heavy library.

    examples fixed -> trained (interrupted and gone on with, as often as it must) -> stored -> judged on this site's held-out examples

Every step leaves its result on disk before the next begins, and finds it there when it is asked again.
"""

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from node.learn import examples as parts_of
from node.learn import rules, site, stored, underway
from node.learn.examples import Parts, general_held_out, split, with_rehearsal
from node.store import Store
from node.update.slots import ActiveRelease, Slots
from protocol.codec import decode_record
from protocol.errors import BadInput, MilpaError
from protocol.tasks import Record, Task, task_named

if TYPE_CHECKING:
    from node.learn.train import LearnResult
    from node.settings import NodeSettings
    from protocol.models.training import Step

HUMBLE = 19  # nice value


def train(
    settings: "NodeSettings",
    *,
    max_memory_mb: int = 0,
    seed: int = 0,
    told: Callable[[str], None] = lambda text: None,
    progress: Callable[["Step"], None] | None = None,
    interrupted: Callable[[], bool] = lambda: False,
) -> "LearnResult":
    """Train on what was confirmed, or go on with the training that was interrupted; store what helped, and tell the coordinator.

    Raises:
        BadInput: no active release, or one without an initial adapter.
        NotEnough: examples, or memory.
        Unavailable: another training runs.
        Interrupted: as asked; called again it goes on.
    """
    active, task = release_of(settings)
    state, learn = settings.state_dir, settings.learn
    with underway.alone(state):
        plan = underway.begun(state, active.number, now=time.time())
        if plan is None:
            plan = _plan(settings, active, task, seed)
            underway.begin(state, active.number, plan)
        own = plan.own
        told(f"training on {own} of its own and {len(plan.parts.training) - own} general examples, {len(plan.parts.held_out)} held out")
        from node.learn import train  # torch, only now
        from protocol.models.training import Interrupted

        try:
            result = train.learn(
                state, settings.site, active, task, plan.parts, rate=plan.rate or train.RATE, epochs=plan.epochs,
                max_seconds=learn.max_seconds, max_memory_mb=max_memory_mb or learn.max_memory_mb, threads=learn.threads, seed=plan.seed,
                progress=progress, interrupted=interrupted,
            )  # fmt: skip
        except Interrupted:
            raise
        except MilpaError:
            underway.finish(state, active.number)  # the same examples would fail again
            raise
        ended = underway.Last(
            at=time.time(), examples=own, stored=result.stored, reason=result.reason, loss_before=result.loss_before,
            loss_after=result.loss_after,
        )  # fmt: skip
        if result.stored and settings.broker.host:
            report(settings, result)
        underway.finish(state, active.number, ended)
    return result


def nothing_new(settings: "NodeSettings") -> str:
    """Why another training would learn hardly anything that the last one on this release did not; "" where one is worth its energy.

    Raises:
        BadInput: no active release.
    """
    active, task = release_of(settings)
    store = Store(settings.state_dir / "node.db")
    try:
        examples, _ = store.example_parts(task.name)
    finally:
        store.close()
    last = underway.last(settings.state_dir, active.number)
    learned, new = last.examples if last else 0, settings.learn.new_examples
    if rules.worth_another(examples, learned, new=new, unfinished=underway.unfinished(settings.state_dir, active.number)):
        return ""
    return f"{max(0, examples - learned)} examples more than at the last training, of the {new} that are worth another"


def judge(settings: "NodeSettings", *, interrupted: Callable[[], bool] = lambda: False) -> site.Judged | None:
    """Decide whether the stored adapter answers better here than the release without it; None when there is nothing to decide.

    Raises:
        BadInput: no active release.
        Unavailable: a training runs.
        Interrupted: as asked; called again it begins anew.
    """
    active, task = release_of(settings)
    with underway.alone(settings.state_dir):
        if not unjudged(settings.state_dir, active.number):
            return None
        store = Store(settings.state_dir / "node.db")
        try:
            held_out = store.examples(task.name, held_out=True)
        finally:
            store.close()
        from node.learn import judging  # llama.cpp, only now

        verdict = judging.judge(
            settings.state_dir, active, task, [one.record for one in held_out], general_held_out(rehearsal(active)),
            threads=settings.learn.threads, context=settings.model.context, interrupted=interrupted, now=time.time(),
        )  # fmt: skip
        if verdict is not None:
            site.judged(settings.state_dir, active.number, verdict)
        return verdict


def unjudged(state_dir: Path, release: int) -> bool:
    """Whether an adapter is stored whose judgement is not known."""
    digest = stored.digest(state_dir, release)
    last = site.read(state_dir, release).last
    return bool(digest) and (last is None or last.learned != digest)


def release_of(settings: "NodeSettings") -> tuple[ActiveRelease, Task]:
    """The live release and its task.

    Raises:
        BadInput: there is none.
    """
    active = Slots(settings.state_dir, role=settings.node.role).active()
    if active is None:
        raise BadInput(f"{settings.state_dir} has no active release: a node learns on top of a release; let `milpa-node run` fetch one")
    return active, task_named(active.release.task)


def rehearsal(active: ActiveRelease) -> list[Record]:
    """The general records that came with the release."""
    return [decode_record(line) for line in active.rehearsal.read_bytes().splitlines()] if active.rehearsal else []


def humble() -> None:
    """Make this process give way to every other one: processor, disk, and memory (it is killed first, and goes on later)."""
    with contextlib.suppress(OSError):  # a sandbox may forbid even this
        os.nice(max(0, HUMBLE - os.nice(0)))
    for file, value in (("/proc/self/autogroup", str(HUMBLE)), ("/proc/self/oom_score_adj", "1000")):
        with contextlib.suppress(OSError):  # a kernel without it, or a container that forbids it
            Path(file).write_text(value, encoding="ascii")
    if ionice := shutil.which("ionice"):
        subprocess.run([ionice, "-c", "3", "-p", str(os.getpid())], check=False, capture_output=True, timeout=10)


def report(settings: "NodeSettings", result: "LearnResult") -> None:
    """Queue the event "adapter-trained" for the coordinator; the daemon sends it. Figures only."""
    from node.escalation.reporting import Reporter
    from protocol.outbox import Outbox

    figures = {"release": result.release, "examples": result.examples, "loss_before": result.loss_before, "loss_after": result.loss_after}
    store = Store(settings.state_dir / "node.db")
    try:
        reporter = Reporter(settings.node.name, Outbox(store.engine), engine=store.engine)
        with store.transaction() as session:
            reporter.report(session, "adapter-trained", figures)
    finally:
        store.close()


def _plan(settings: "NodeSettings", active: ActiveRelease, task: Task, seed: int) -> underway.Plan:
    store = Store(settings.state_dir / "node.db")
    try:
        parts: Parts = split(store.examples(task.name), minimum=settings.learn.min_examples)
    finally:
        store.close()
    own = len(parts.training)
    parts = with_rehearsal(parts, rehearsal(active))
    newest = msgspec.structs.replace(parts, held_out=parts.held_out[-parts_of.HELD_OUT_LIMIT :])
    return underway.Plan(newest, own, settings.learn.rate, float(settings.learn.epochs), seed, time.time())
