"""A task so small that a tiny model learns it in seconds, and the models for it: what the fleet's own tests run on.

Three kinds of record. Both models know two of them; the third is said in a site's own words, which only the teacher knows.
"""

from pathlib import Path

from protocol.models.checkpoint import Checkpoint
from protocol.models.feed import Epochs
from protocol.models.lora import initial_adapter, write_adapter_gguf
from protocol.models.tokenizer import Tokenizer, make_example
from protocol.models.torch_model import from_torch, to_torch
from protocol.models.training import train
from protocol.tasks import RANCH, Record
from tests.tiny import tiny_gguf

KINDS = (
    ("moisture low", "irrigation-due", "irrigation-due: soil is dry"),
    ("moisture high", "normal", "normal: level is on"),
    ("la bomba seco", "dry-run", "dry-run: no water and pump"),
)
RATE = 4e-3
SECONDS = 60.0  # a limit, not a wish: 300 steps of this size take about 10


def record(number: int, kind: int, *, prefix: str = "r", site: str = "") -> Record:
    words, verdict, target = KINDS[kind]
    source = f"flow{number % 10}{number // 10 % 10}{number // 100 % 10} {words}"
    return Record(id=f"{prefix}{number}", task="ranch", source=source, lang="en", site=site, target=target, verdict=verdict)


def records(count: int, *, kinds: tuple[int, ...] = (0, 1, 2), start: int = 0, prefix: str = "r") -> list[Record]:
    return [record(start + number, kinds[number % len(kinds)], prefix=prefix) for number in range(count)]


def trained(path: Path, *, kinds: tuple[int, ...], seed: int = 0, steps: int = 160) -> Path:
    """A tiny model that answers records of `kinds`."""
    raw = tiny_gguf(path.with_suffix(".raw.gguf"), seed=seed)
    checkpoint = Checkpoint.read(raw)
    model = to_torch(checkpoint)
    with Tokenizer(raw) as tokenizer:
        examples = [make_example(tokenizer, RANCH, one) for one in records(240, kinds=kinds)]
    parameters = [p for name, p in model.named_parameters() if "embed" not in name]
    train(model, Epochs(examples, batch_tokens=512, seed=seed), parameters=parameters, learning_rate=RATE, steps=steps, seconds=SECONDS)
    from_torch(model, checkpoint).write(path)
    return path


def start_adapter(student: Path, path: Path) -> Path:
    """The initial adapter of a release with `student`."""
    write_adapter_gguf(path, *initial_adapter(Checkpoint.read(student), rank=4, alpha=8.0, seed=1))
    return path
