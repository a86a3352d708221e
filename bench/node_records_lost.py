"""Records that were acknowledged and lost, and records applied twice, while everything is killed and cut off at random.

    site (this process) --ok?--> sender process --proxy--> mosquitto --proxy--> coordinator process
                                 Store, Reporter,           the shipped          Listener, Ledger
                                 Outbox, Drain, Session     settings

The site hands records over and counts one as acknowledged when the sender says so, after its commit; what was not acknowledged before a
kill is handed over again. After every FAULT_EVERY records or so, from the seed: SIGKILL of the sender, the broker or the coordinator; a
partition; all connections ended. At the end everything is healed and drained. Then:

    records_lost      acknowledged to the site, and not in the coordinator's ledger
    records_lost_2    in the ledger a second time (or third: each counts)

A record is an event of one figure, its number; so a record applied twice anywhere (at the sender after a second handing over, at the ledger
after a second delivery) is a second row. Scaled: what nobody answered leaves again after RESEND_S instead of a minute, what is set aside
after ASIDE_S instead of an hour. Everything else is as shipped. Resumable: the folder holds both databases, the broker's, and the journal.
"""

import itertools
import queue
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import sqlalchemy as sa

from bench.dying import ASIDE_S, RESEND_S, USERS
from bench.settings import Settings
from coordinator.fleet.tables import events
from deploy.broker import Broker
from protocol.errors import Unavailable
from protocol.ports import free_port
from tests.faults import FaultProxy

RECORDS, QUICK_RECORDS = 100_000, 300
FAULT_EVERY, QUICK_FAULT_EVERY = (200, 600), (30, 55)  # records between two faults, from and to
WINDOW = 100  # records handed over and not acknowledged
AHEAD = 5_000  # records acknowledged and not in the ledger, at most: the outbox holds 20,000 and would drop the oldest
FAULTS = ("kill sender", "kill broker", "kill coordinator", "partition sender", "partition coordinator", "end all connections")
DRAIN_DEADLINE_S = 900.0  # seconds for the last ones after all is healed
STALLED_S = 300.0  # seconds without one more record in the ledger: something is broken


def measure(settings: Settings) -> dict[str, Any]:
    records = QUICK_RECORDS if settings.quick else RECORDS
    run = Run(settings.folder("records_lost"), records, settings.seed, QUICK_FAULT_EVERY if settings.quick else FAULT_EVERY)
    with settings.continued(run.journal):
        run.go()
    lost, twice = run.judge()
    about = {
        "n": records, "against": {}, "faults": run.faults,
        "scaled": f"resend {RESEND_S:g} s for 60, set aside {ASIDE_S:g} s for 3600",
    }  # fmt: skip
    return {
        "records_lost": {"figure": float(len(lost)), "which": sorted(lost)[:20], **about},
        "records_lost_2": {"figure": float(twice), **about},
    }


class Child:
    """One of the processes that die. Its standard input is its work, its lines come into `said`."""

    def __init__(self, role: str, folder: Path, port: int) -> None:
        self.role, self.folder, self.port = role, folder, port
        self.said: queue.Queue[str] = queue.Queue()
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "bench.dying", self.role, str(self.folder), str(self.port)]
        log = (self.folder / f"{self.role}.log").open("a")
        self.said = queue.Queue()
        with log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, bufsize=1, cwd=Path(__file__).parents[1]
            )  # fmt: skip
        assert self.process.stdout is not None
        threading.Thread(target=_read, args=(self.process.stdout, self.said), daemon=True).start()

    def say(self, line: str) -> None:
        assert self.process is not None and self.process.stdin is not None
        try:
            self.process.stdin.write(line + "\n")
        except OSError:
            return  # it was killed; its replacement hears it again

    def ask(self, line: str, timeout_s: float = 60.0) -> int:
        """The number it says to a question, whatever else it says before."""
        self.say(line)
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            word, _, number = self.said.get(timeout=timeout_s).partition(" ")
            if word == line:
                return int(number)
        raise Unavailable(f"the {self.role} did not say its {line} within {timeout_s} s; see {self.folder / self.role}.log")

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(10)
            for stream in (self.process.stdin, self.process.stdout):
                if stream is not None:
                    stream.close()


class Run:
    """The site, and the hand that breaks things."""

    def __init__(self, folder: Path, records: int, seed: int, fault_every: tuple[int, int]) -> None:
        self.folder, self.records, self.fault_every = folder, records, fault_every
        self.journal = folder / "acknowledged"
        self.acknowledged = {int(line) for line in self.journal.read_text().split()} if self.journal.is_file() else set()
        self.rng = random.Random(f"{seed}/{len(self.acknowledged)}")  # a resumed run goes on with faults of its own
        self.faults: dict[str, int] = dict.fromkeys(FAULTS, 0)
        self.next_faults: list[str] = []  # every kind once, in a random order, and again
        self.broker = Broker(folder / "broker", port=free_port(), users=USERS, program="mosquitto")

    def go(self) -> None:
        """Hand all records over, breaking things, and drain."""
        with ExitStack() as stack:
            self.broker.start()
            stack.callback(self.broker.stop)
            self.proxies = [stack.enter_context(FaultProxy((self.broker.host, self.broker.port))) for _ in range(2)]
            roles = ("sender", "coordinator")
            self.sender, self.coordinator = (
                Child(*pair) for pair in zip(roles, [self.folder] * 2, [p.port for p in self.proxies], strict=True)
            )
            for child in (self.sender, self.coordinator):
                child.start()
                stack.callback(child.kill)
            self._hand_over()
            self._drain()

    def judge(self) -> tuple[set[int], int]:
        """What was lost, and how many rows are one too many."""
        rows = list(self._in_ledger())
        return self.acknowledged - set(rows), len(rows) - len(set(rows))

    def _hand_over(self) -> None:
        waiting = iter([number for number in range(self.records) if number not in self.acknowledged])
        under_way: dict[int, None] = {}
        until_fault = self.rng.randint(*self.fault_every)
        known, looked = len(set(self._in_ledger())), time.monotonic()
        with self.journal.open("a") as journal:
            while len(self.acknowledged) < self.records:
                if len(self.acknowledged) - known < AHEAD:
                    for number in itertools.islice(waiting, WINDOW - len(under_way)):
                        under_way[number] = None
                        self.sender.say(str(number))
                else:
                    known, looked = self._wait_for_more(known, looked)
                for number in self._acknowledgements():
                    if under_way.pop(number, 0) is None:
                        self.acknowledged.add(number)
                        journal.write(f"{number}\n")
                        until_fault -= 1
                if until_fault <= 0:
                    journal.flush()
                    until_fault = self.rng.randint(*self.fault_every)
                    self._break(under_way)

    def _wait_for_more(self, known: int, looked: float) -> tuple[int, float]:
        time.sleep(1.0)
        more = len(set(self._in_ledger()))
        if more == known and time.monotonic() - looked > STALLED_S:
            raise Unavailable(f"nothing came into the ledger for {STALLED_S:g} s; see the logs in {self.folder}")
        return more, time.monotonic() if more > known else looked

    def _acknowledgements(self) -> Iterator[int]:
        """What the sender has acknowledged; waits a moment for the first."""
        try:
            line = self.sender.said.get(timeout=0.5)
            while True:
                if line.startswith("ok "):
                    yield int(line[3:])
                line = self.sender.said.get_nowait()
        except queue.Empty:
            return

    def _break(self, under_way: dict[int, None]) -> None:
        self.next_faults = self.next_faults or self.rng.sample(FAULTS, len(FAULTS))
        fault = self.next_faults.pop()
        self.faults[fault] += 1
        pause = self.rng.uniform(0.0, 2.0)  # seconds
        match fault:
            case "kill sender":
                self.sender.kill()
                time.sleep(pause / 4)
                self.sender.start()
                for number in under_way:  # nobody said that they are safe
                    self.sender.say(str(number))
            case "kill broker":
                self.broker.kill()
                time.sleep(pause)
                self.broker.start()
            case "kill coordinator":
                self.coordinator.kill()
                time.sleep(pause)
                self.coordinator.start()
            case "partition sender" | "partition coordinator":
                proxy = self.proxies[fault == "partition coordinator"]
                proxy.partition()
                threading.Timer(pause, proxy.heal).start()
            case _:
                for proxy in self.proxies:
                    proxy.drop()

    def _drain(self) -> None:
        """Heal everything and wait until the sender's outbox is empty."""
        for proxy in self.proxies:
            proxy.heal()
        end = time.monotonic() + DRAIN_DEADLINE_S
        while self.sender.ask("depth") and time.monotonic() < end:
            time.sleep(0.5)

    def _in_ledger(self) -> Iterator[int]:
        database = self.folder / "ledger.db"
        if not database.exists():
            return
        engine = sa.create_engine(f"sqlite:///{database}", connect_args={"timeout": 30})
        try:
            with engine.connect() as connection:
                if sa.inspect(connection).has_table("events"):
                    for (figures,) in connection.execute(sa.select(events.c.figures)):
                        yield int(figures["record"])
        finally:
            engine.dispose()


def _read(stream: IO[str], lines: "queue.Queue[str]") -> None:
    try:
        for line in stream:
            if line.endswith("\n"):  # a killed process leaves half a word: it was not said
                lines.put(line.strip())
    except ValueError:
        return  # closed: the process was killed
