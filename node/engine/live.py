"""The model that answers: loaded at start, proven before it goes live, gone back from when it does not load.

Rules:
 * A release is loaded beside the live one and made to answer; only then is it given to the worker, between two records.
 * A release that does not load at start goes back by itself; damaged files are thrown away, so that the next look fetches them again.
 * Nothing here waits for the network. Without a model `why` says what the node waits for.
 * Another adapter goes on the model that speaks, between two answers; one that does not speak is taken off, and the one before is on again.
Threads: `at_start` runs in the main thread before the others; after that the updater calls, and the learner for `wear`.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from node.engine.worker import Speaker, Worker
from node.settings import Model
from protocol.digests import digest_file
from protocol.errors import MilpaError, Unavailable

if TYPE_CHECKING:
    from node.update.slots import ActiveRelease, Slots

log = logging.getLogger("milpa.node")


class LiveModel:
    """What the worker speaks with, and how it came to be.

    Args:
        updates: whether releases come to this node at all; only the words for the operator depend on it.
        on_change: called after another release went live.
    """

    def __init__(self, worker: Worker, slots: "Slots", model: Model, *, updates: bool, on_change: Callable[[], None]) -> None:
        self._worker, self._slots, self._model = worker, slots, model
        self._updates, self._on_change = updates, on_change
        self._candidate: Speaker | None = None  # passed its self-test, not yet live
        self._worn: tuple[int, Path] | None = None  # the site's own adapter, and the release it is on
        self._why = "starting"

    @property
    def why(self) -> str:
        """Why there is no model; "" when there is one."""
        return "" if self._worker.speaker else self._why

    @property
    def release(self) -> int:
        """Number of the release that speaks; 0: none, or a fixed file."""
        speaker = self._worker.speaker
        return speaker.release if speaker else 0

    def describe(self) -> dict[str, object] | None:
        """The active model for people and programs; None without one."""
        speaker = self._worker.speaker
        if speaker is None:
            return None
        return {
            "task": speaker.task, "release": speaker.release, "model_digest": speaker.model_digest,
            "adapter_digest": speaker.adapter_digest, "calibrated": speaker.calibration is not None,
        }  # fmt: skip

    def at_start(self) -> None:
        """Make the fixed file or the live release speak.

        Raises:
            MilpaError: the fixed file does not load. A release that does not is left for the previous one instead.
        """
        if self._model.path:
            from node.engine.loading import load_fixed

            self._worker.swap_after_current_record(load_fixed(self._model))
            return
        active, tried = self._slots.starting(), set[int]()
        while active is not None and active.number not in tried:
            tried.add(active.number)
            try:
                self.self_test(active)
                self.activate(active)
            except MilpaError as error:
                log.error("release %d does not load: %s", active.number, error)
                self._why = f"release {active.number} does not load: {error}"
                active = self._instead_of(active, str(error))
            else:
                live = self._slots.active()
                if live is not None and live.number == active.number:
                    self._slots.confirm()
                return
        if self._why == "starting":
            self._why = "no model yet: waiting for a release" if self._updates else "no model: set model.path or update.url"
        log.warning("%s", self._why)

    def self_test(self, active: "ActiveRelease") -> None:
        """Load a release beside the live one and make it answer; it stays loaded until it goes live."""
        from node.engine.loading import load_release, prove

        self.drop_candidate()
        candidate = load_release(active, threads=self._model.threads, context=self._model.context)
        try:
            prove(candidate, active)
        except BaseException:
            candidate.engine.close()
            raise
        self._candidate = candidate

    def activate(self, active: "ActiveRelease") -> None:
        """Answer with this release from the next record on."""
        from node.engine.loading import load_release

        candidate, self._candidate = self._candidate, None
        if candidate is None or candidate.release != active.number:
            if candidate is not None:
                candidate.engine.close()
            candidate = load_release(active, threads=self._model.threads, context=self._model.context)
        self._worker.swap_after_current_record(candidate)
        log.info("release %d answers", active.number)
        self._on_change()

    def wear(self, adapter: Path | None, *, release: int) -> None:
        """Answer with that adapter on the release that speaks: the site's own, or None for what the release came with.

        The worker waits meanwhile: for reading a file of a few megabytes and one short probe.

        Raises:
            Unavailable: another release speaks by now, or none; nothing changed.
            DoesNotFit, BadInput: the file is not for this model, or does not speak with it. The adapter before is on again.
        """
        from node.engine.loading import prove, read_calibration
        from node.engine.worker import usable

        active = self._slots.active()
        if active is None or active.number != release:
            raise Unavailable(f"release {release} is not the live one any more")
        calibration, after = read_calibration(active.calibration), adapter or active.adapter

        def change(speaker: Speaker) -> Speaker:
            if speaker.release != release:
                raise Unavailable(f"release {release} does not speak any more")
            before = self._worn[1] if self._worn and self._worn[0] == release else active.adapter
            speaker.engine.set_adapter(after)
            try:
                candidate = Speaker(speaker.engine, speaker.task, release, usable(calibration, speaker.engine))
                prove(candidate)
            except BaseException:
                speaker.engine.set_adapter(before)
                raise
            self._worn = (release, adapter) if adapter else None
            return candidate

        self._worker.readapt(change)
        log.info("release %d answers with %s", release, "the site's own adapter" if adapter else "what it came with")
        self._on_change()

    def follow(self) -> None:
        """Answer with the live release, if another one speaks: its files were damaged at start and have been fetched again."""
        live = self._slots.active()
        if live is not None and live.number != self.release:
            self.self_test(live)
            self.activate(live)

    def drop_candidate(self) -> None:
        """Free what was tested and never went live."""
        if self._candidate is not None:
            self._candidate.engine.close()
            self._candidate = None

    def _instead_of(self, active: "ActiveRelease", reason: str) -> "ActiveRelease | None":
        """What to try after `active` failed to load: damaged files are thrown away, so that the next look fetches them again."""
        damaged = [path for path in (active.model, active.adapter, active.calibration) if path and digest_file(path) != path.name]
        for path in damaged:
            path.unlink()
        if not damaged and not self._slots.confirmed():
            return self._slots.go_back(reason)
        return self._slots.previous()
