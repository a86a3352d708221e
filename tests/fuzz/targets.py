"""Every parser of the node that reads what somebody else wrote, with good inputs to begin from.

A target's `parse` may raise MilpaError and nothing else; whatever comes out of it otherwise is a crash. Parsers are called by the same
functions that the node calls, files included (they lie in memory, /dev/shm).
"""

import asyncio
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from protocol import codec
from protocol.errors import MilpaError

SHARED_MEMORY = Path("/dev/shm")
PRUNE_EVERY = 2_000  # requests between prunings of what the API keeps of bad input


class Target(NamedTuple):
    """One parser."""

    name: str
    corpus: Sequence[bytes]
    parse: Callable[[bytes], None]
    share: float = 1.0  # of the executions asked for; the slow ones make fewer and are told apart


@contextmanager
def opened(name: str) -> Iterator[Target]:
    """The target of that name, with a folder for its files."""
    folder = Path(tempfile.mkdtemp(prefix="milpa-fuzz-", dir=SHARED_MEMORY if SHARED_MEMORY.is_dir() else None))
    try:
        with NAMES[name](folder) as target:
            yield target
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# ---- the local HTTP API and the page, through ASGI, guard and all


@contextmanager
def http(folder: Path) -> Iterator[Target]:
    """Requests as text: the first line is METHOD PATH, then headers, an empty line, the body. A 500 is a crash."""
    import sqlalchemy as sa

    from tests.node.conftest import NodeInMemory
    from tests.node.fake_engine import FakeEngine

    node = NodeInMemory(folder, FakeEngine(probability=0.4), asking=None, budget=0.25, capacity=4, deadline_s=10.0)
    sa.event.listen(node.store.engine, "connect", lambda connection, _: connection.execute("PRAGMA synchronous = OFF"))
    node.store.engine.dispose()
    given = node.answer("soil 21 C")
    record = b'{"id":"r","task":"ranch","source":"soil 21 C","lang":"es","site":"esteli","numbers":[1.5,2]}'
    corpus = [
        _request("POST /v1/completions", b'{"model":"m","prompt":"soil 21 C","max_tokens":5,"logprobs":2,"x_milpa":{"lang":"es"}}'),
        _request("POST /v1/completions", b'{"prompt":["soil 21 C"],"stream":true,"stream_options":{"include_usage":true}}'),
        _request("POST /v1/chat/completions", b'{"messages":[{"role":"user","content":"soil 21 C"}],"stream":true}'),
        _request("POST /v1/chat/completions", b'{"messages":[{"role":"user","content":[{"type":"text","text":"a"}]}],"top_logprobs":3}'),
        _request("POST /v1/embeddings", b'{"input":["soil","leak"],"encoding_format":"base64"}'),
        _request("POST /api/generate", b'{"model":"m","prompt":"soil 21 C","stream":false,"options":{"num_predict":3}}'),
        _request("POST /api/chat", b'{"model":"m","messages":[{"role":"user","content":"soil"}]}'),
        _request("GET /api/tags", b""), _request("POST /api/show", b'{"model":"m"}'),
        _request("POST /v1/records", record), _request("POST /v1/records", b"[" + record + b"," + record + b"]"),
        _request("POST /v1/feedback", b'{"id":"%s","verdict":"leak","text":"the pipe broke"}' % given.id.encode()),
        _request("GET /v1/answers?since=0&limit=5&state=final", b""), _request(f"GET /v1/answers/{given.id}", b""),
        _request("GET /v1/models", b""), _request("GET /v1/status", b""), _request("GET /metrics", b""), _request("GET /healthz", b""),
        _request("GET /v1/memory?limit=3", b""), _request("POST /v1/memory", b'{"key":"a","shareable":true}'),
        _request("GET /?lang=es&skip=1&answer=x&keep=y", b"", "accept-language: es-NI,en;q=0.5", "cookie: milpa_lang=en; milpa_node=1.ab"),
        _request("GET /page/mark", b""), _request("GET /page/page.css", b"", 'if-none-match: "x"'), _request("GET /login", b""),
        _request(
            f"POST /page/answers/{given.id}", b"verdict=dry-run&text=no+hay+agua", "origin: http://127.0.0.1",
            "content-type: application/x-www-form-urlencoded",
        ),
    ]  # fmt: skip
    count = 0

    with asyncio.Runner() as runner:

        def parse(data: bytes) -> None:
            nonlocal count
            count += 1
            if count % PRUNE_EVERY == 0:
                node.store.prune(answers=100, refused=100)
                node.engine.prompts.clear()
                node.engine.said.clear()
            status = runner.run(_ask(node.app, data))
            if status == 500:
                raise RuntimeError("the API answered 500")

        try:
            yield Target("http", corpus, parse)
        finally:
            node.close()


def _request(line: str, body: bytes, *headers: str) -> bytes:
    told = headers or ("content-type: application/json",)
    return "\n".join((line, *told, "", "")).encode() + body


async def _ask(app: Any, data: bytes) -> int:
    head, _, body = data.partition(b"\n\n")
    first, *lines = head.split(b"\n")
    method, _, target = first.partition(b" ")
    path, _, query = target.partition(b"?")
    headers = [(b"host", b"127.0.0.1")]
    headers += [(name.strip().lower(), value.strip()) for name, _, value in (line.partition(b":") for line in lines)]
    from urllib.parse import unquote

    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1",
        "method": method.decode("latin-1").upper(), "scheme": "http", "path": unquote(path.decode("latin-1")), "raw_path": path,
        "query_string": query, "root_path": "",
        "headers": headers, "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80), "state": {},
    }  # fmt: skip
    messages = iter(({"type": "http.request", "body": body[:100], "more_body": True}, {"type": "http.request", "body": body[100:]}))
    done = asyncio.Event()
    found = 0

    async def receive() -> dict[str, Any]:
        for message in messages:
            return message
        await done.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        nonlocal found
        if message["type"] == "http.response.start":
            found = message["status"]
            for name, value in message["headers"]:
                if b"\n" in name + value or b"\r" in name + value:
                    raise RuntimeError("a header of the answer has a line break")
        elif not message.get("more_body"):
            done.set()

    async with asyncio.timeout(30):
        await app(scope, receive, send)
    return found


# ---- what comes over the broker and the radio


@contextmanager
def messages(_: Path) -> Iterator[Target]:
    """MQTT payloads. What decodes is encoded and decoded again, to the same value."""
    from protocol.messages import Ack, Event, Question, ReleaseNotice, Reply, Status

    status = Status(node="esteli", boot="b1", sequence=3, state="answering", release=2, model_digest="a" * 64, version="0.1.0")
    corpus = [
        status, ReleaseNotice(number=4, url="http://10.0.0.1/repository"),
        Question(id="q1", asker="esteli", task="ranch", prompt="soil 21 C\nes:", confidence=0.4, expires=1_800_000_000),
        Reply(id="r1", question="q1", question_digest="b" * 64, peer="base", model_digest="c" * 64, text="leak: x", confidence=0.9),
        Event(id="e1", node="esteli", kind="answers", at=1, figures={"count": 3.0}, detail={"peer": "base"}),
        Ack(id="a1", events=("e1", "e2")),
    ]  # fmt: skip

    def parse(data: bytes) -> None:
        message = codec.decode_message(data)
        again = codec.decode_message(codec.encode(message))
        if again != message:
            raise RuntimeError(f"{message!r} came back as {again!r}")

    yield Target("messages", [codec.encode(message) for message in corpus], parse)


@contextmanager
def frames(_: Path) -> Iterator[Target]:
    """Compact frames. What decodes is encoded again, to the same value."""
    from protocol import frames as compact
    from protocol.messages import Question, Reply, Status

    status = Status(
        node="esteli", boot="0" * 16, sequence=3, state="sleeping", release=2, model_digest="a" * 64, at=1_800_000_000, answered=70_000
    )
    question = Question(id="0" * 32, asker="esteli", task="ranch", prompt="soil 21 C\nes:", confidence=0.4, expires=1_800_000_000)
    reply = Reply(
        id="1" * 32, question="0" * 32, question_digest="b" * 64, peer="base", model_digest="c" * 64, text="leak: x", confidence=0.9
    )
    corpus = [
        compact.encode(compact.alive(status)), compact.encode(status), compact.encode(compact.Release(number=7)),
        compact.encode(compact.reference(question, "base", now=1_799_999_000.0)),
        compact.encode(compact.verdict(reply, "leak", ("leak", "normal"))),
    ]  # fmt: skip

    def parse(data: bytes) -> None:
        frame = compact.decode(data, node="esteli")
        again = compact.decode(compact.encode(frame), node="esteli")
        if again != frame:
            raise RuntimeError(f"{frame!r} came back as {again!r}")

    yield Target("frames", corpus, parse)


@contextmanager
def records(_: Path) -> Iterator[Target]:
    """Records as they lie in the spool folder or come over the site's topic, down to the model's prompt."""
    from protocol.tasks import task_named

    corpus = [
        b'{"id":"r1","task":"ranch","source":"soil 21 C, tank 2.1 m\\nnote: la hoja","lang":"es","site":"esteli","numbers":[1,2.5]}',
        b'{"id":"r2","task":"translate-english-spanish","source":"Where is the well?","target":"x","verdict":""}',
    ]

    def parse(data: bytes) -> None:
        record = codec.decode_record(data)
        task = task_named(record.task)
        task.parse(task.prompt(record))

    yield Target("records", corpus, parse)


# ---- files


@contextmanager
def gguf(_: Path) -> Iterator[Target]:
    """The header of a model file and of an adapter."""
    from protocol.models.header import read

    yield Target("gguf", _models(), lambda data: _nothing(read(data, what="fuzzed")))


@contextmanager
def llama(folder: Path) -> Iterator[Target]:
    """Model files that our check lets through, loaded and asked by llama.cpp in a process that may die of it. Slow."""
    from protocol.models.engine import Engine
    from tests.tiny import tiny_gguf

    model = tiny_gguf(folder / "tiny.gguf", layers=1, hidden=32).read_bytes()
    file = folder / "fuzzed.gguf"

    def parse(data: bytes) -> None:
        file.write_bytes(data + model[len(data) :] if len(data) > len(model) // 2 else data)
        child = os.fork()
        if child == 0:
            with suppress(BaseException):
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
                with suppress(MilpaError):
                    engine = Engine(file, context=64)
                    engine.generate("soil", max_new_tokens=2)
                    engine.close()
                os._exit(0)
            os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code:
            raise RuntimeError(f"llama.cpp ended its process with {code}")

    yield Target("llama", [model], parse, share=0.001)


@contextmanager
def adapter(folder: Path) -> Iterator[Target]:
    """header.json and its array, as a training leaves them and a sync window reads them. The input is both, parted by two zero bytes."""
    from node.learn import stored
    from protocol.adapters import AdapterHeader, Module, pack, unpack

    modules = (Module("blk.0.attn_q.weight", 4, 6), Module("blk.1.ffn_up.weight", 8, 4))
    rng = np.random.default_rng(1)
    factors = {m.tensor: tuple(rng.standard_normal(s).astype("<f4") for s in ((2, m.inputs), (m.outputs, 2))) for m in modules}
    header = AdapterHeader("esteli", 3, "a" * 64, "b" * 64, 2, 4.0, modules, examples=40, loss_before=2.0, loss_after=1.5)
    stored.save(folder, pack(factors, modules), header)  # type: ignore[arg-type]
    here = stored.folder(folder, 3)
    (array,) = here.glob("adapter-*.npy")
    corpus = [(here / "header.json").read_bytes() + b"\0\0" + array.read_bytes()]

    def parse(data: bytes) -> None:
        told, _, flat = data.partition(b"\0\0")
        (here / "header.json").write_bytes(told)
        array.write_bytes(flat)
        found = stored.load(folder, 3)
        if found is not None:
            unpack(found[1], found[0].header)

    yield Target("adapter", corpus, parse)


@contextmanager
def calibration(folder: Path) -> Iterator[Target]:
    """A calibration file, loaded and used."""
    from node.engine.loading import read_calibration
    from protocol.confidence import FEATURES, Calibration

    good = msgspec.json.encode(_calibration())
    file = folder / "calibration.json"

    def parse(data: bytes) -> None:
        file.write_bytes(data)
        found = read_calibration(file)
        if isinstance(found, Calibration):
            for budget in (0.0, 0.25, 1.0):
                found.threshold(budget)
            for level in (0.0, -1.0, -1e9):
                for agreement in (None, 0.0, 1.0):
                    value = found.confidence([1.0] + [level] * (len(FEATURES) - 1), agreement=agreement)
                    if not 0.0 <= value <= 1.0:
                        raise RuntimeError(f"a confidence of {value}")

    yield Target("calibration", [good], parse)


@contextmanager
def run_file(folder: Path) -> Iterator[Target]:
    """run.json, by which the command line finds the daemon."""
    from node.client import read_run_file

    file = folder / "run.json"

    def parse(data: bytes) -> None:
        file.write_bytes(data)
        read_run_file(folder)

    yield Target("run-file", [b'{"pid":1,"url":"http://127.0.0.1:8642","boot":"0f","started":1800000000}'], parse)


@contextmanager
def settings(folder: Path) -> Iterator[Target]:
    """The settings file, checked."""
    from node.settings import read

    file = folder / "node.toml"
    corpus = [
        b'[node]\nname = "esteli"\nrole = "student"\nstate_dir = "/var/lib/milpa"\n[api]\nport = 8642\nqueue = 16\ndeadline_s = 30.0\n'
        b'[model]\nthreads = 1\nbudget = 0.25\n[broker]\nhost = "10.0.0.1"\nport = 1883\n[peers]\nask = ["base", "ridge"]\n',
        b'[update]\nurl = "http://10.0.0.1/repository"\nroot_file = "/etc/milpa/root.json"\npoll_s = 900\n[limits]\nanswers = 1000\n',
    ]

    def parse(data: bytes) -> None:
        file.write_bytes(data)
        read(file, environment={})

    yield Target("settings", corpus, parse)


@contextmanager
def release(folder: Path) -> Iterator[Target]:
    """A release's manifest, and the pointer file that says which one is live."""
    from node.update.slots import Slots
    from protocol.releases import MANIFEST_LIMIT, Release, ReleaseFile, checked_release

    files = (ReleaseFile("student.gguf", "student", "model", "a" * 64, 100), ReleaseFile("a", "student", "adapter", "b" * 64, 9, "a" * 64))
    good = codec.encode(Release(number=3, task="ranch", created=1_800_000_000, files=files, note="round 3", min_memory_mb=120))
    pointer = b'{"active":' + good + b',"previous":null,"confirmed":false,"starts":1,"failures":[]}'
    slots = Slots(folder)
    slots.folder.mkdir(parents=True)

    def parse(data: bytes) -> None:
        (slots.folder / "pointer.json").write_bytes(data)
        slots.starting()
        checked_release(codec.decode_as(data, Release, limit=MANIFEST_LIMIT, what="manifest"))

    yield Target("release", [good, pointer], parse)


def _nothing(_: object) -> None:
    return None


def _models() -> list[bytes]:
    """Whole files of few bytes, written by hand: most damages hit the header."""
    pieces = [b"<pad>", b"<eos>", b"<bos>", b"<unk>", b"<0x41>", "▁a".encode(), b"b"]
    count = len(pieces)
    shape = {b"block_count": 1, b"embedding_length": 32, b"feed_forward_length": 64, b"context_length": 64, b"attention.head_count": 1}
    model = [
        _entry(b"general.architecture", 8, _text(b"gemma3")),
        _entry(b"general.type", 8, _text(b"model")),
        *(_entry(b"gemma3." + key, 4, struct.pack("<I", value)) for key, value in shape.items()),
        _entry(b"gemma3.attention.layer_norm_rms_epsilon", 6, struct.pack("<f", 1e-6)),
        _entry(b"tokenizer.ggml.tokens", 9, struct.pack("<IQ", 8, count) + b"".join(map(_text, pieces))),
        _entry(b"tokenizer.ggml.scores", 9, struct.pack(f"<IQ{count}f", 6, count, *map(float, range(count)))),
        _entry(b"tokenizer.ggml.token_type", 9, struct.pack(f"<IQ{count}i", 5, count, 3, 3, 3, 2, 6, 1, 1)),
        _entry(b"tokenizer.ggml.bos_token_id", 4, struct.pack("<I", 2)),
        _entry(b"tokenizer.ggml.add_bos_token", 7, b"\1"),
        _entry(b"general.alignment", 4, struct.pack("<I", 32)),
    ]
    lora = [
        _entry(b"general.architecture", 8, _text(b"gemma3")),
        _entry(b"general.type", 8, _text(b"adapter")),
        _entry(b"adapter.type", 8, _text(b"lora")),
        _entry(b"adapter.lora.alpha", 6, struct.pack("<f", 4.0)),
    ]
    return [
        _file(model, {b"token_embd.weight": (32, 7), b"output_norm.weight": (32,)}),
        _file(lora, {b"blk.0.ffn_up.weight.lora_a": (32, 2), b"blk.0.ffn_up.weight.lora_b": (2, 64)}),
    ]


def _text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def _entry(key: bytes, kind: int, value: bytes) -> bytes:
    return _text(key) + struct.pack("<I", kind) + value


def _file(entries: list[bytes], tensors: dict[bytes, tuple[int, ...]]) -> bytes:
    head, offset = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(entries)) + b"".join(entries), 0
    for name, shape in tensors.items():
        head += _text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape) + struct.pack("<IQ", 0, offset)
        offset += -(-4 * int(np.prod(shape)) // 32) * 32
    return head + bytes(-len(head) % 32) + bytes(offset)


def _calibration() -> Any:
    from protocol.confidence import FEATURES, Agreed, Calibration, Tree

    count = len(FEATURES)
    return Calibration(
        task="ranch", model_digest="a" * 64, adapter_digest="", means=(0.5,) * count, scales=(1.5,) * count, weights=(0.25,) * count,
        bias=-0.5, points=((-3.0, 0.1), (0.0, 0.5), (2.0, 0.9)), quantiles=(0.1, 0.3, 0.5, 0.7, 0.95), count=400, right=300, method="trees",
        names=FEATURES, version=2, trees=(Tree((0, 1, 2), (0.5, -1.0, -2.0), (0.1, -0.1, 0.2, -0.2)),),
        agreed=Agreed(samples=4, temperature=0.7, bias=0.1, slope=0.9, weight=1.1),
    )  # fmt: skip


NAMES: dict[str, Callable[[Path], Any]] = {
    "http": http, "messages": messages, "frames": frames, "records": records, "gguf": gguf, "llama": llama, "adapter": adapter,
    "calibration": calibration, "run-file": run_file, "settings": settings, "release": release,
}  # fmt: skip
