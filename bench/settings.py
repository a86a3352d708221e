"""What every measure of `make bench-forge` is told, and the models and data that several of them share.

Rules:
 * A measure is a module bench/forge_KEY.py with `measure(settings)`; it returns {"figure": number, "against": {...}, "n": ...} or, for
   several figures of a row, {KEY: {...}, KEY_2: {...}}.
 * It keeps what took long in `settings.folder(KEY)`, whole or not at all, and goes on from there after a kill. Every part is made through
   `once` or `kept`, which stamp it (`bench.stamps`); what a part is made of is made before it, not inside.
 * `quick` means tiny models and seconds: the measure's code is exercised, its figure means nothing.
 * Shares are numbers in [0, 1]; times are seconds.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from bench import stamps
from coordinator.forge.pairs import read_pairs, translated
from coordinator.forge.students.trim import FREQUENT, PIECES, trim
from coordinator.forge.teachers.packaged import packaged_teacher
from protocol.blobs import write_atomically
from protocol.tasks import Record, translation

if TYPE_CHECKING:
    from protocol.models.checkpoint import Checkpoint

TRANSLATION = translation("English", "Spanish")
COUNTED = 40_000  # pairs whose pieces are counted for the shared trimmed vocabulary
LIMIT_S = 4 * 3600.0  # seconds after which a slow baseline is stopped, unless another number is said


class Settings(msgspec.Struct, frozen=True):
    """One run of the harness."""

    data: Path  # holds tatoeba-en-es/{train,dev,test}.tsv and ntrex-en-es/first-997-mx.tsv
    work: Path  # kept between runs
    threads: int = 1
    seed: int = 1
    quick: bool = False
    limit_s: float = LIMIT_S  # wall-clock after which a slow baseline is stopped
    parts: dict[str, stamps.Stamp] = msgspec.field(default_factory=dict)  # that the measure used so far, by file

    def folder(self, key: str) -> Path:
        """Where that measure keeps what it has so far."""
        path = self.work / key
        path.mkdir(parents=True, exist_ok=True)
        return path

    def kept(self, key: str, name: str, make: Callable[[], Any]) -> Any:
        """A part of a measure, JSON, computed once."""
        file = self.folder(key) / f"{name}.json"
        self.once(file, lambda: write_atomically(file, msgspec.json.format(msgspec.json.encode(make()))))
        return msgspec.json.decode(file.read_bytes())

    def once(self, path: Path, make: Callable[[], object]) -> Path:
        """A part of a measure, a file that `make` leaves at `path`, made once."""
        if path.is_file():
            self.used(path, stamps.read(path))
        else:
            with self.continued(path):
                make()
        return path

    @contextmanager
    def continued(self, part: Path) -> Iterator[None]:
        """Work on a part: a file, or a folder that is gone on with after a kill."""
        stamp, began = stamps.begun(part), time.monotonic()
        yield
        spent = time.monotonic() - began
        stamp = stamps.Stamp(stamp.runs, seconds=spent, here=spent)
        stamps.write(part, stamp)
        self.used(part, stamp)

    def used(self, part: Path, stamp: stamps.Stamp) -> None:
        """Have the entry of this measure say who made that part."""
        self.parts.setdefault(os.path.relpath(part, self.work), stamp)

    def pairs(self, part: str, limit: int | None = None) -> list[Record]:
        """Tatoeba's "train", "dev" or "test"; a handful of made-up ones when quick."""
        if self.quick:
            words = ("the cat sat on a mat", "the tank is low", "water is due", "no leak since night")
            turned = ("el agua de la bomba", "el tanque del suelo", "la nota de la noche", "sin fuga en el nivel")
            return [
                Record(id=f"{part}-{i}", task=TRANSLATION.name, source=f"{words[i % 4]} {i}", target=f"{turned[i % 4]} {i}")
                for i in range(min(limit or 24, 24))
            ]
        return read_pairs(self.data / "tatoeba-en-es" / f"{part}.tsv", TRANSLATION, limit=limit)

    def base(self) -> Path:
        """The packaged model as it is."""
        if self.quick:
            return _tiny(self.folder("shared") / "tiny.gguf")
        return packaged_teacher(self.folder("shared"))

    def trimmed(self) -> Path:
        """The packaged model with the vocabulary of the training pairs alone: about 25,000 pieces."""
        path = self.folder("shared") / "trimmed.gguf"
        if self.quick:
            return _tiny(path)
        base = self.base()
        return self.once(path, lambda: trim(base, self._counted(COUNTED), path))

    def trimmed_for_users(self, pieces: int = PIECES) -> Path:
        """The packaged model with the vocabulary of `milpa-coordinator distill --pieces N`: all pairs, general words of both languages."""
        path, base = self.folder("shared") / f"trimmed-{pieces}.gguf", self.base()
        frequent = 0 if self.quick else FREQUENT  # the tiny vocabulary has no more
        general = translated(TRANSLATION)
        return self.once(path, lambda: trim(base, self._counted(), path, frequent=frequent, general=general, pieces=pieces))

    def _counted(self, limit: int | None = None) -> list[str]:
        texts = [text for one in self.pairs("train", limit) for text in (TRANSLATION.prompt(one), TRANSLATION.target(one))]
        return [*texts, TRANSLATION.template]

    def corrected(self, path: Path, records: Sequence[Record], *, steps: int) -> "Checkpoint":
        """The trimmed model after some steps on these records, made once, at `path`."""
        from coordinator.forge.training.recipe import trained, upper_half  # torch; the node's measures do without
        from protocol.models.checkpoint import Checkpoint
        from protocol.models.tokenizer import Tokenizer, make_example

        trimmed = self.trimmed()

        def correct() -> None:
            teacher = Checkpoint.read(trimmed)
            with Tokenizer(trimmed) as tokenizer:
                examples = [make_example(tokenizer, TRANSLATION, record) for record in records]
            trained(teacher, examples, upper_half(teacher.blocks, steps=steps), seed=self.seed)[0].write(path)

        return Checkpoint.read(self.once(path, correct))


def _tiny(path: Path) -> Path:
    from tests.tiny import tiny_checkpoint

    if not path.is_file():
        tiny_checkpoint(layers=4, kind="F16").write(path)
    return path
