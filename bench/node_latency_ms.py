"""latency_ms: how long a ranch record takes, and how much later its answer comes because a peer is asked.

    latency_ms     ms from the record's prompt to its whole answer, p50, one thread, in the engine
    latency_ms_2   ms by which the first answer over HTTP is later on a node that asks a peer about every record: difference of medians
                   against a node that has nobody to ask, in whole ms; `difference` has the decimals

The student is of the `small` preset, Q4_K_M, its vocabulary trimmed to ranch records; it has learned nothing, which changes no time but
one: it would not end. So each answer is as long as the record's own target, its end token included. Beside the wall clock stands the
processor time of the thread, which a busy machine changes less.

`prefix` is what reading the fixed beginning of prompts only once saves: nothing for the ranch's own template, which begins with the record;
most of the reading where solved examples stand before it.

For latency_ms_2 two real daemons run over real mosquitto (the shipped settings) beside a third that answers the questions with the uncut
model. Two records go to one, then the same two to the other: each follows as often on a question whose peer has just computed, which
leaves cold caches, as on one without. Before the next one the peer's answer has been applied. Nobody remembers: `[memory] use = "off"`.
"""

import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import product
from pathlib import Path
from typing import Any

import httpx

from bench.node_blackhole_p95 import child
from bench.settings import Settings
from bench.student import cut_evenly
from coordinator.forge.judging.evaluation import few_shot
from coordinator.forge.students.trim import trim
from coordinator.ranch import generate, site_named
from deploy.broker import Broker
from protocol.errors import Unavailable
from protocol.models.checkpoint import Checkpoint, quantise
from protocol.models.engine import Engine
from protocol.models.tokenizer import Tokenizer, make_example
from protocol.ports import free_port
from protocol.tasks import RANCH, Record, Task

RECORDS, QUICK_RECORDS = 200, 4
COUNTED = 2_000  # records whose pieces the vocabulary keeps
CALIBRATED_ON = 16  # records that say which heads and neurons stay
WARM_UP = 5
SMALLER = ("tiny", "nano")  # presets beside it
SHOTS = 4  # solved examples in the longest fixed beginning
PAIRS, QUICK_PAIRS = 200, 3  # records sent to both daemons
REPLY_S = 60.0  # until a question must be answered
READY_S = 120.0
RESAMPLED = 2_000
USERS = {"esteli": "esteli-password", "base": "base-password"}


def measure(settings: Settings) -> dict[str, Any]:
    model, records = student(settings), ranch(settings, "test", RECORDS)
    with Engine(model, threads=1) as engine:
        alone = speed(engine, RANCH, records)
        prefix = [saved(engine, count, records) for count in (0, SHOTS // 2, SHOTS)]
    smaller = {}
    for name in SMALLER:
        with Engine(student(settings, name), threads=1) as engine:
            smaller[name] = speed(engine, RANCH, records)
    return {
        "latency_ms": {
            "figure": alone["wall_ms"], **alone, "against": smaller, "prefix": prefix, "n": len(records), "trained": False,
            "megabytes": model.stat().st_size / 1e6,
        },
        "latency_ms_2": delay(settings, model),
    }  # fmt: skip


def ranch(settings: Settings, split: str, count: int) -> list[Record]:
    return generate(site_named("general"), seed=settings.seed, count=QUICK_RECORDS if settings.quick else count, split=split)


def student(settings: Settings, name: str = "small") -> Path:
    """The file of that preset, made once."""
    folder = settings.folder("latency_ms")
    path = folder / f"{name}-ranch.gguf"
    counted = ranch(settings, "train", COUNTED)
    texts = [text for one in counted for text in (RANCH.prompt(one), RANCH.target(one))]
    base, trimmed, cut = settings.base(), folder / "trimmed.gguf", folder / f"{name}-cut.gguf"  # the second is the peer's model
    settings.once(trimmed, lambda: trim(base, [*texts, RANCH.template, *RANCH.codes], trimmed))

    def make() -> None:
        with Tokenizer(trimmed) as tokenizer:
            examples = [make_example(tokenizer, RANCH, record) for record in counted[:CALIBRATED_ON]]
        cut_evenly(Checkpoint.read(trimmed), examples, quick=settings.quick, name=name).write(cut)
        quantise(cut, path, "F16" if settings.quick else "Q4_K_M", threads=settings.threads)

    return settings.once(path, make)


# ---- the engine


def speed(engine: Engine, task: Task, records: Sequence[Record]) -> dict[str, float]:
    """Medians a record: wall clock and processor ms, ms until the first token (the reading), tokens read and written."""
    answer = _answers(engine, task)
    for record in records[:WARM_UP]:
        answer(record)
    found = [answer(record) for record in records]
    names = ("wall_ms", "cpu_ms", "first_ms", "prompt_tokens", "answer_tokens")
    return {name: statistics.median(one[place] for one in found) for place, name in enumerate(names)}


def saved(engine: Engine, shots: int, records: Sequence[Record]) -> dict[str, float]:
    """The same record with its fixed beginning kept from the prompt before, and read anew, in turns."""
    task = few_shot(RANCH, records[-shots:]) if shots else RANCH
    answer, kept, anew = _answers(engine, task), [], []
    for record in records[:40]:
        answer(record)
        kept.append(answer(record)[1])
        engine.set_adapter(None)  # empties the cache
        anew.append(answer(record)[1])
    return {"examples": float(shots), "cpu_ms_kept": statistics.median(kept), "cpu_ms_anew": statistics.median(anew)}


def _answers(engine: Engine, task: Task) -> Callable[[Record], tuple[float, float, float, int, int]]:
    def answer(record: Record) -> tuple[float, float, float, int, int]:
        length = engine.count(task.target(record)) + 1
        wall, cpu = time.perf_counter(), time.thread_time()
        heard: list[float] = []
        said = engine.generate(
            task.prompt(record), max_new_tokens=length, form=task.form, on_piece=lambda _: heard.append(time.perf_counter())
        )
        took = (1000 * (time.perf_counter() - wall), 1000 * (time.thread_time() - cpu), 1000 * (heard[0] - wall))
        return (*took, said.prompt_tokens, len(said.tokens))

    return answer


# ---- two daemons


def delay(settings: Settings, model: Path) -> dict[str, Any]:
    """How much later the node that asks answers."""
    records, tokens = ranch(settings, "dev", PAIRS)[: QUICK_PAIRS if settings.quick else PAIRS], 16
    took: dict[str, list[float]] = {"alone": [], "asking": []}
    folder = settings.folder("latency_ms")
    with running(folder, model, folder / "trimmed.gguf") as nodes:
        numbered = list(enumerate([*records[:WARM_UP], *records]))
        for begin in range(0, len(numbered), 2):
            for name, (number, record) in product(("asking", "alone"), numbered[begin : begin + 2]):
                body = {"prompt": f"{record.source} ({number})", "max_tokens": tokens}  # never the same twice: nothing is remembered
                began = time.perf_counter()
                answer = nodes[name].post("/v1/completions", json=body)
                seconds = time.perf_counter() - began
                settle(nodes[name], answer, asking=name == "asking")
                if number >= min(WARM_UP, len(records)):
                    took[name].append(1000 * seconds)
    medians = {name: statistics.median(found) for name, found in took.items()}
    difference = medians["asking"] - medians["alone"]
    low, high = interval(took["asking"], took["alone"], seed=settings.seed)
    return {
        "figure": float(round(difference)), "interval": [low, high], "difference": {"ms": difference}, "against": {"p50, ms": medians},
        "n": len(took["asking"]), "tokens": tokens,
    }  # fmt: skip


def interval(asking: Sequence[float], alone: Sequence[float], *, seed: int) -> tuple[float, float]:
    """95% interval of the difference of medians, by resampling the pairs."""
    chance, count = random.Random(seed), len(asking)
    found = []
    for _ in range(RESAMPLED):
        drawn = [chance.randrange(count) for _ in range(count)]
        found.append(statistics.median(asking[at] for at in drawn) - statistics.median(alone[at] for at in drawn))
    found.sort()
    return found[int(0.025 * RESAMPLED)], found[int(0.975 * RESAMPLED) - 1]


def settle(node: httpx.Client, answer: httpx.Response, *, asking: bool) -> None:
    """Wait until the peer's answer has been applied.

    Raises:
        Unavailable: the node did not answer as it should, or no peer's answer came.
    """
    if answer.status_code != 200 or answer.json()["x_milpa"]["provisional"] is not asking:
        raise Unavailable(f"not the answer of this node: {answer.status_code} {answer.text[:300]}")
    end = time.monotonic() + REPLY_S
    while asking and not (told := node.get(f"/v1/answers/{answer.json()['x_milpa']['id']}").json())["by"].startswith("peer:"):
        if time.monotonic() > end or not told["provisional"]:
            raise Unavailable(f"no peer's answer within {REPLY_S:.0f} s: the question is {told['state']}")
        time.sleep(0.02)


@contextmanager
def running(folder: Path, model: Path, larger: Path) -> Iterator[dict[str, httpx.Client]]:
    """Broker, peer and both nodes; the nodes' clients once they are ready."""
    with ExitStack() as stack:
        broker = stack.enter_context(Broker(folder / "broker", port=free_port(), users=USERS, program="mosquitto"))
        clients = {}
        for name, gguf, peers in (("base", larger, "serve = true"), ("asking", model, 'ask = ["base"]'), ("alone", model, "")):
            port, user = free_port(), "base" if name == "base" else "esteli"
            config = configured(folder, name, port, gguf, user=user, broker=broker.port if peers else 0, peers=peers)
            stack.enter_context(child([sys.executable, "-m", "node.cli", "run", "--config", str(config)], folder / f"{name}.log"))
            clients[name] = stack.enter_context(httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60.0, trust_env=False))
        for name, client in clients.items():
            wait_until_ready(client, connected=name != "alone", log=folder / f"{name}.log")
        del clients["base"]
        yield clients


def configured(folder: Path, name: str, port: int, model: Path, *, user: str, broker: int, peers: str) -> Path:
    """A node's settings file; every run has a state folder of its own."""
    (folder / f"{user}.password").write_text(USERS[user])
    lines = [
        f'[node]\nname = "{user}"\nstate_dir = "{folder / f"{name}-{time.time_ns()}"}"\n[api]\nport = {port}',
        f'[model]\npath = "{model}"\ntask = "ranch"\nthreads = 1\nbudget = 1.0\n[memory]\nuse = "off"',
    ]
    if broker:
        lines += [f'[broker]\nhost = "127.0.0.1"\nport = {broker}\npassword_file = "{folder / f"{user}.password"}"', f"[peers]\n{peers}"]
    file = folder / f"{name}.toml"
    file.write_text("\n".join(lines) + "\n")
    return file


def wait_until_ready(client: httpx.Client, *, connected: bool, log: Path) -> None:
    """Wait until the node answers, and its broker has it.

    Raises:
        Unavailable: not within READY_S.
    """
    end = time.monotonic() + READY_S
    while time.monotonic() < end:
        with suppress(httpx.TransportError):  # it is starting
            if client.get("/readyz").status_code == 200 and (not connected or client.get("/v1/status").json()["broker"]["connected"]):
                return
        time.sleep(0.1)
    raise Unavailable(f"a node was not ready within {READY_S:.0f} s; see {log}")
