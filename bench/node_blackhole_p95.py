"""How much later the local answer comes when the broker is a black hole: p95 then, divided by p95 with all up.

    this process --HTTP--> milpa-node (real daemon, every answer asks its peer) --> mosquitto (the shipped settings) --> a peer

The black hole is a stopped broker process: TCP connections stand and new ones are accepted by the kernel, and nothing ever answers. That is
the unkindest kind: no error tells anybody. Turns are interleaved and long enough that the node gives up its silent connection and tries new
ones. The peer replies from a table in a process of its own, so that with all up no model but the node's takes the machine's time; a pause
after every request lets its reply be applied before the next one is measured. The student is the untrained `small` one, its answers cut
short: the shorter the answer, the more a delay of the same length would show.
"""

import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

from bench.settings import TRANSLATION, Settings
from bench.student import small
from deploy.broker import Broker
from node.settings import QUEUE_LIMIT
from protocol.confidence import quantile
from protocol.errors import Unavailable
from protocol.ports import free_port

TURNS, QUICK_TURNS = 4, 1  # of each link
REQUESTS, QUICK_REQUESTS = 160, 6  # a turn
WARM_UP = 10  # requests that are not measured
PAUSE_S = 0.15  # after each request
TOKENS = 12  # of an answer, at most
HEAL_DEADLINE_S = 180.0  # for the node to be connected again, and for its open questions to be answered
LINKS = ("up", "hole")
USERS = {"esteli": "esteli-password", "base": "base-password"}


def measure(settings: Settings) -> dict[str, Any]:
    turns, requests = (QUICK_TURNS, QUICK_REQUESTS) if settings.quick else (TURNS, REQUESTS)
    seconds: dict[str, list[list[float]]] = {link: [] for link in LINKS}
    with ExitStack() as stack:
        site = stack.enter_context(Site(settings).running())
        site.ask(WARM_UP)
        for turn in range(turns):
            for link in LINKS if turn % 2 == 0 else LINKS[::-1]:
                with site.link(link):
                    seconds[link].append(site.ask(requests))
    p95 = {link: quantile([one for turn in found for one in turn], 0.95) for link, found in seconds.items()}
    by_turn = [quantile(hole, 0.95) / quantile(up, 0.95) for up, hole in zip(seconds["up"], seconds["hole"], strict=True)]
    return {
        "figure": p95["hole"] / p95["up"],
        "against": {"p95 with all up, ms": 1000 * p95["up"], "p95 in the black hole, ms": 1000 * p95["hole"]},
        "p50, ms": {link: 1000 * statistics.median(one for turn in found for one in turn) for link, found in seconds.items()},
        "slowest in the black hole, ms": 1000 * max(one for turn in seconds["hole"] for one in turn),
        "by turn": [round(ratio, 3) for ratio in by_turn],
        "n": turns * requests,
    }


class Site:
    """The daemon, its broker and its peer, in `settings.folder`."""

    def __init__(self, settings: Settings) -> None:
        self.folder, self.model, self.threads = settings.folder("blackhole_p95"), small(settings), settings.threads
        self.records = [record.source for record in settings.pairs("dev", 200)]
        self.broker = Broker(self.folder / "broker", port=free_port(), users=USERS, program="mosquitto")
        self.port, self.asked = free_port(), 0
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60.0)

    @contextmanager
    def running(self) -> Iterator["Site"]:
        """Everything up, and the node connected; all ended afterwards."""
        with ExitStack() as stack:
            stack.enter_context(self.broker)
            stack.enter_context(self.client)
            peer = [sys.executable, "-m", "bench.peer", str(self.broker.port), "base", USERS["base"], TRANSLATION.name]
            stack.enter_context(child(peer, self.folder / "peer.log"))
            config = self._write_config()
            stack.enter_context(child([sys.executable, "-m", "node.cli", "run", "--config", str(config)], self.folder / "node.log"))
            self._wait_until_settled()
            yield self

    @contextmanager
    def link(self, kind: str) -> Iterator[None]:
        """With all up, or with a broker that hears nothing and says nothing."""
        if kind == "up":
            yield
            return
        assert self.broker.process is not None
        self.broker.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.broker.process.send_signal(signal.SIGCONT)
        self._wait_until_settled()

    def ask(self, count: int) -> list[float]:
        """Seconds to the local answer of each of the next `count` records."""
        took = []
        for _ in range(count):
            source = f"{self.records[self.asked % len(self.records)]} ({self.asked})"  # never the same twice: nothing is remembered
            self.asked += 1
            began = time.perf_counter()
            answer = self.client.post("/v1/completions", json={"prompt": source, "max_tokens": TOKENS})
            took.append(time.perf_counter() - began)
            if answer.status_code != 200 or not answer.json()["x_milpa"]["provisional"]:
                raise Unavailable(f"the node did not answer and ask its peer: {answer.status_code} {answer.text[:300]}")
            time.sleep(PAUSE_S)
        return took

    def _wait_until_settled(self) -> None:
        """Connected, and every question answered: what a black hole held back must not burden the next turn."""
        end = time.monotonic() + HEAL_DEADLINE_S
        while time.monotonic() < end:
            with suppress(httpx.TransportError):  # it is starting
                broker = self.client.get("/v1/status").json()["broker"]
                if self.client.get("/readyz").status_code == 200 and broker["connected"] and not broker["open_questions"]:
                    return
            time.sleep(0.2)
        raise Unavailable(f"the node was not settled within {HEAL_DEADLINE_S:.0f} s; see {self.folder / 'node.log'}")

    def _write_config(self) -> Path:
        (self.folder / "password").write_text(USERS["esteli"])
        state = self.folder / f"state-{time.time_ns()}"  # another run's answers are none of this one's business
        file = self.folder / "node.toml"
        file.write_text(
            f'[node]\nname = "esteli"\nstate_dir = "{state}"\n[api]\nport = {self.port}\nqueue = {QUEUE_LIMIT}\n'
            f'[model]\npath = "{self.model}"\ntask = "{TRANSLATION.name}"\nthreads = {self.threads}\nbudget = 1.0\n'
            f'[broker]\nhost = "127.0.0.1"\nport = {self.broker.port}\npassword_file = "{self.folder / "password"}"\n'
            '[peers]\nask = ["base"]\n[memory]\nuse = "off"\n'  # or what the peer said would answer the next record like it
        )
        return file


@contextmanager
def child(command: list[str], log: Path) -> Iterator[None]:
    """A process of ours, asked to end afterwards and then ended."""
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=Path(__file__).parents[1])
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)
