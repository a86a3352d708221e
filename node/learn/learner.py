"""The thread that lets a site learn by itself: trains when enough is new and the sun allows, takes up what turned out better, syncs.

Rules:
 * Training is a child process of low priority (`process.py`), with a deadline; it is stopped within seconds when power falls, the day's
   joules are spent or the node stops, and goes on later. Its death in any way costs work, never the node.
 * What answers is decided by `site.json`: it is put on the running model between two answers, and taken off if it does not speak with it.
 * A sync window opens by schedule, if there is an adapter the coordinator does not have, and power and link allow.
 * One of these at a time; nothing here is on the way of an answer.
Limits: one look a minute; RUN_SPARE_S beside the training's own budget for loading and judging.
"""

import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal

from node.energy.power import Power
from node.energy.rules import Kind
from node.engine.live import LiveModel
from node.learn import needs, rules
from node.parts import Figure, Part, dead
from node.settings import NodeSettings
from node.store import Store
from protocol.errors import MilpaError, Unavailable
from protocol.links import Verdict

if TYPE_CHECKING:
    from node.learn.process import Job, Said
    from node.learn.sync import SyncResult
    from node.update.slots import ActiveRelease, Slots

LOOK_S = 60.0  # seconds between looks
RUN_SPARE_S = 1_800.0  # seconds beyond the training's budget that its process may take
WINDOW_BYTES = 60_000  # Flower's own words in a window of two minutes: a call every half second
KEPT_RELEASES = 3  # folders of learnt adapters; late ones are still of use to a round

log = logging.getLogger("milpa.node")

Doing = Literal["waits", "trains", "syncs"]
Run = Callable[["Job", Callable[[], bool]], "Iterator[Said]"]
Window = Callable[[Callable[[], bool]], "SyncResult"]


class Learner(Part):
    """Learning, as a part of the daemon.

    Args:
        may_sync, synced: what the link says to a sync window of so many bytes; told once they are spent (an estimate: Flower counts none).
        run, window: how a training and a window run, each until it is asked to end; replaced in tests.
    """

    name = "learn"

    def __init__(
        self,
        settings: NodeSettings,
        slots: "Slots",
        store: Store,
        model: LiveModel,
        power: Power,
        *,
        clock: Callable[[], float] = time.time,
        may_sync: Callable[[int], Verdict] = lambda cost: Verdict(True),
        synced: Callable[[int], None] = lambda cost: None,
        run: Run | None = None,
        window: Window | None = None,
    ) -> None:
        self.settings = settings
        self._slots, self._store, self._model, self._power, self._clock = slots, store, model, power, clock
        self._may_sync, self._synced = may_sync, synced
        self._run, self._window = run or in_a_child, window or self._open_window
        self._stop, self._wake = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._not_before = 0.0  # after a failure
        self._last_window = 0.0
        self._tidied = 0  # release for which old folders were looked through
        self.doing: Doing = "waits"
        self.reason = "starting"
        self.share = 0.0  # of the training under way
        self.last = ""  # how the last training ended, in words
        self.failure = ""  # why the last one failed; "" after one that did not

    # ---- a part of the daemon

    def start(self) -> None:
        """Put the site's adapter on what was loaded, then look now and then."""
        self._guarded(self.wear)
        if self.settings.node.role == "student" and not self.settings.model.path:
            self._thread = threading.Thread(target=self._loop, name="milpa-learn", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End the thread, and the training with it: it goes on at the next start."""
        self._stop.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(15)

    def look_soon(self) -> None:
        """Another release went live."""
        self._wake.set()

    def reload(self, settings: NodeSettings) -> None:
        """The next look goes by these."""
        self.settings = settings
        self._wake.set()

    def trouble(self) -> str:
        """A dead thread."""
        return dead(self._thread, self._stop)

    def figures(self) -> tuple[Figure, ...]:
        """For Prometheus."""
        return (
            ("training", "1 while a training runs", lambda: float(self.doing == "trains")),
            ("training_share_ratio", "Share of its budget that the training under way has used", lambda: self.share),
        )

    def status(self) -> dict[str, Any]:
        """What it does, why it waits, and what answers."""
        active = self._slots.active()
        found: dict[str, Any] = {
            "auto": self.settings.learn.auto, "doing": self.doing, "reason": self.reason, "last": self.last,
            "failure": self.failure,
        }  # fmt: skip
        if self.doing == "trains":
            found["share"] = round(self.share, 3)
        if active is not None:
            from node.learn import site

            file = site.read(self.settings.state_dir, active.number)
            if file.last is not None:
                found["judged"] = {"good": file.last.good, "reason": file.last.reason, "before": file.last.before, "after": file.last.after}
            found["site_adapter"] = file.current.adapter if file.current and self.settings.learn.site_adapter else ""
        return found

    # ---- the thread

    def _loop(self) -> None:
        while not self._stop.is_set():
            self._wake.clear()
            self._guarded(self.look)
            self._wake.wait(LOOK_S)

    def _guarded(self, work: Callable[[], object]) -> None:
        try:
            work()
        except MilpaError as error:
            self.reason = str(error)
            log.warning("learning: %s", error)
        except Exception:  # a full disk or a defect: answers go on, the next look tries again
            log.exception("a look at what could be learned failed")

    def look(self) -> None:
        """One look: take up what was judged good, train if it is due, else sync if that is."""
        active = self._slots.active()
        if active is None:
            self.reason = "waits for a release"
            return
        self._tidy(active)
        self.wear()
        if not self.settings.learn.auto:
            self.reason = "learn.auto is off: milpa-learn.timer or `milpa-node learn` trains"
            return
        standing = self.standing(active)
        due = self._due(standing)
        self.reason = due.reason
        if due.ok:
            self._train(standing)
            self.wear()
        elif self._window_is_due():
            self._sync()

    def standing(self, active: "ActiveRelease") -> rules.Standing:
        """What there is to learn from."""
        from node.learn import underway
        from node.learn.session import unjudged

        state = self.settings.state_dir
        training, held_out = self._store.example_parts(active.release.task)
        last = underway.last(state, active.number)
        missing, why_not = needs.missing(), ""
        if active.initial_adapter is None:
            why_not = f"release {active.number} ships no initial adapter to start from"
        elif missing and self._run is in_a_child:
            why_not = f"this node cannot train: {', '.join(missing)} is not installed ({needs.CURE})"
        return rules.Standing(
            why_not=why_not, examples=training, held_out=held_out, learned=last.examples if last else 0,
            unfinished=underway.unfinished(state, active.number), not_before=self._not_before,
            unjudged=self.settings.learn.site_adapter and unjudged(state, active.number),
        )  # fmt: skip

    def _due(self, standing: rules.Standing) -> Verdict:
        from node.learn.examples import MINIMUM_HELD_OUT

        learn = self.settings.learn
        return rules.training_due(
            standing, now=self._clock(), minimum=learn.min_examples, held_out=MINIMUM_HELD_OUT, new=learn.new_examples,
            power=self._power.may("train"), joules_left=self._joules_left(),
        )  # fmt: skip

    def _joules_left(self) -> float:
        limit = self.settings.learn.max_joules_a_day
        return limit - self._power.joules_today("train") if limit else float("inf")

    def _train(self, standing: rules.Standing) -> None:
        from node.learn.process import Job

        learn = self.settings.learn
        fresh = rules.worth_another(standing.examples, standing.learned, new=learn.new_examples, unfinished=standing.unfinished)
        over = _Over(self._stop, self._why_stop_training, self._power, "train", learn.max_seconds + RUN_SPARE_S, threads=learn.threads)
        self.doing, self.share, ended = "trains", 0.0, ""
        log.info("training begins: %s", self.reason)
        try:
            for said in self._run(Job(self.settings, fresh), over):
                self.share = max(self.share, said.share)
                if said.kind == "failed":
                    self._failed(said.text)
                if said.kind != "step":
                    ended = said.kind
                    self.last = f"{said.kind}: {said.text}"
                    log.info("training: %s", self.last)
        finally:
            self.doing = "waits"
            over.settle()
        if over.why:
            self.reason = over.why
            log.info("training stops, and goes on later: %s", over.why)
        elif not ended:
            self._failed("its process ended without a word; it was killed, for want of memory perhaps")
        elif ended in ("trained", "judged"):
            self.failure = ""

    def _failed(self, why: str) -> None:
        self.failure = self.last = self.reason = why
        self._not_before = self._clock() + rules.RETRY_S
        log.warning("training failed: %s", why)

    def _why_stop_training(self) -> str:
        verdict = self._power.may("train")
        if not verdict.ok:
            return f"power: {verdict.reason}"
        return "" if self._joules_left() > 0 else "today's joules for training are spent"

    # ---- what answers

    def wear(self) -> None:
        """Put on the model what `site.json` names, or what the release came with; what does not speak is put back."""
        state = self.settings.state_dir
        active, said = self._slots.active(), self._model.describe()
        if active is None or said is None or said["release"] != active.number:
            return
        from node.learn import site  # numpy comes with it

        for _ in range(3):  # the new one, the one before, the release alone
            file = site.read(state, active.number) if self.settings.learn.site_adapter else site.SiteFile()
            wanted = file.current.adapter if file.current else (active.adapter.name if active.adapter else "")
            if said["adapter_digest"] == wanted:
                break
            found = site.usable(state, active.number, str(said["model_digest"]))
            try:
                if file.current is not None and found is None:
                    raise Unavailable("its file is missing or damaged, or for another model")
                self._model.wear(found[1] if file.current and found else None, release=active.number)
                break
            except MilpaError as error:
                if self._model.release != active.number:
                    return  # another release went live meanwhile, and wears its own
                if file.current is None:
                    raise
                log.error("the site's adapter does not answer: %s", error)
                self.last = f"put back: {error}"
                site.put_back(state, active.number, str(error))
        if self.settings.learn.site_adapter:
            site.proven(state, active.number)

    def _tidy(self, active: "ActiveRelease") -> None:
        """Old releases' folders: only the adapters that a round may still ask for stay, then nothing."""
        if self._tidied == active.number:
            return
        root, previous = self.settings.state_dir / "learn", self._slots.previous()
        wanted = {active.number, previous.number if previous else 0}
        others = sorted(
            (int(path.name) for path in root.glob("[0-9]*") if path.name.isdigit() and int(path.name) not in wanted), reverse=True
        )
        for place, number in enumerate(others):
            if place >= KEPT_RELEASES:
                shutil.rmtree(root / str(number))
                continue
            for name in ("site*", "plan.json", "training.pt", "candidate-*"):
                for path in (root / str(number)).glob(name):
                    path.unlink()
        self._tidied = active.number

    # ---- sync windows

    def _window_is_due(self) -> bool:
        learn, now = self.settings.learn, self._clock()
        if not learn.superlink or not rules.window_due(
            now=now, last=self._last_window, every_s=learn.sync_every_s, hours=learn.sync_hours, window_s=learn.window_s
        ):
            return False
        from node.learn import stored

        release = stored.undelivered(self.settings.state_dir)
        if release is None:
            return False
        for verdict in (self._power.may("sync"), self._may_sync(self._cost(release))):
            if not verdict.ok:
                self.reason += f"; a sync window waits: {verdict.reason}"
                return False
        return True

    def _cost(self, release: int) -> int:
        """Bytes of a window that delivers that release's adapter."""
        from node.learn import stored

        return stored.size(self.settings.state_dir, release) + WINDOW_BYTES

    def _sync(self) -> None:
        from node.learn import stored

        self._last_window = self._clock()
        release = stored.undelivered(self.settings.state_dir)
        over = _Over(self._stop, self._why_stop_syncing, self._power, "sync", self.settings.learn.window_s + LOOK_S)
        self.doing = "syncs"
        try:
            result = self._window(over)
        finally:
            self.doing = "waits"
            over.settle()
        log.info(
            "sync window: %s", "delivered" if result.delivered else f"nothing delivered (answers: {', '.join(result.answered) or 'none'})"
        )
        self._synced(self._cost(release) if result.delivered and release is not None else WINDOW_BYTES)
        if result.delivered and release is not None:
            stored.note_delivered(self.settings.state_dir, release)

    def _why_stop_syncing(self) -> str:
        verdict = self._power.may("sync")
        return "" if verdict.ok else verdict.reason

    def _open_window(self, over: Callable[[], bool]) -> "SyncResult":
        from node.learn.sync import sync
        from node.settings import named_file, secret

        learn = self.settings.learn
        token = secret(learn.fleet_token_file, what="learn.fleet_token_file")
        return sync(
            self.settings.state_dir, self.settings.site, learn.superlink, window_s=learn.window_s, fleet_token=token,
            ca=named_file(learn.superlink_ca_file), stop=over,
        )  # fmt: skip


class _Over:
    """Asked a few times a second whether a child must end; counts its joules while it is at it. `why` says why it had to."""

    def __init__(
        self, stop: threading.Event, why_stop: Callable[[], str], power: Power, kind: Kind, deadline_s: float, *, threads: int = 1
    ) -> None:
        self._stop, self._why_stop, self._power, self._kind, self._threads = stop, why_stop, power, kind, threads
        self._end = time.monotonic() + deadline_s
        self._counted = time.monotonic()
        self.why = ""

    def __call__(self) -> bool:
        self.settle()
        if self._stop.is_set():
            self.why = "the node stops"
        elif time.monotonic() > self._end:
            self.why = "its time is up"
        else:
            self.why = self._why_stop()
        return bool(self.why)

    def settle(self) -> None:
        """Count up to now."""
        now = time.monotonic()
        self._power.spent(self._kind, now - self._counted, threads=self._threads)
        self._counted = now


def in_a_child(job: "Job", over: Callable[[], bool]) -> "Iterator[Said]":
    """Run the job in a process of its own until it ends or is over."""
    from node.learn.process import Said
    from protocol.lines import child_lines

    threads = str(job.settings.learn.threads)
    return child_lines("node.learn.process", job, Said, environment={"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}, over=over)
