"""A node's way of one question, killed (SIGKILL) before its N-th database statement, commit or publication; then run again.

    python killed.py FOLDER PORT PASSWORD STRIDE

Forks one child for each N = 1, 1 + STRIDE, ... on a database of its own, and after its death another that may finish; stops at the first
child that was not killed. Prints N and the ids of all events that the databases know of. Run by test_kill.py; imports once, forks often.
"""

import json
import os
import random
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

import sqlalchemy as sa

from node.escalation.asking import Asker
from node.escalation.presence import Presence
from node.escalation.reporting import Reporter
from node.store import open_database
from protocol import topics
from protocol.drain import Drain
from protocol.messages import Question, Status
from protocol.mqtt import Session
from protocol.outbox import Outbox

STEPS_LIMIT = 400
DEADLINE_S = 30.0

metadata = sa.MetaData()
answers = sa.Table(
    "answers", metadata, sa.Column("question", sa.String, primary_key=True), sa.Column("state", sa.String), sa.Column("event", sa.String)
)  # fmt: skip


class Countdown:
    """Kills this process at the n-th call; the main thread's looking on does not count once `looking` is set."""

    def __init__(self, steps: int) -> None:
        self.left, self.looking, self.lock = steps, False, threading.Lock()

    def __call__(self, *_: object, **__: object) -> None:
        if self.looking and threading.current_thread() is threading.main_thread():
            return
        with self.lock:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)


def run(database: Path, port: int, password: str, countdown: Countdown | None) -> None:
    engine = open_database(database)
    metadata.create_all(engine)
    outbox = Outbox(engine, resend=0.2)
    reporter = Reporter("esteli", outbox, engine=engine)
    presence = Presence()
    presence.note(Status("base", "b1", 1, "answering", model_digest="m", task="ranch", parameters=9, serves=True))  # or nobody believes it
    asker = Asker("esteli", ["base"], outbox, engine=engine, presence=presence, reporter=reporter, deadline_s=60)
    session = Session("esteli", "127.0.0.1", port, username="esteli", password=password, backoff_base=0.02, rng=random.Random(1))
    session.subscribe(topics.ack("esteli"), reporter.acknowledged)
    session.subscribe(topics.replies_to("esteli"), asker.heard)
    if countdown is not None:
        sa.event.listen(engine, "before_cursor_execute", countdown)
        sa.event.listen(engine, "commit", countdown)
        send = session.send
        session.send = lambda *a, **k: (countdown(), send(*a, **k))[1]  # type: ignore[method-assign]

    def apply(reply):  # as `Answering.apply`: once, with its event, in one transaction
        with engine.begin() as connection:
            done = connection.execute(
                answers.update().where(answers.c.question == reply.question, answers.c.state == "provisional").values(state="upgraded")
            )
            if done.rowcount:
                event = reporter.report(connection, "escalation", {}, {"question": reply.question})
                connection.execute(answers.update().where(answers.c.question == reply.question).values(event=event))
        return "upgraded" if done.rowcount else "late"

    asker.apply = apply
    with engine.begin() as connection:
        if connection.execute(sa.select(answers.c.question)).first() is None:
            id = database.stem
            asker.ask(connection, Question(id, "esteli", "ranch", f"prompt {id}", 0.2, int(time.time()) + 60))
            connection.execute(answers.insert().values(question=id, state="provisional"))
    if countdown is not None:
        countdown.looking = True
    session.start()
    drain = Drain(outbox, session, poll=0.05)
    drain.start()
    end = time.monotonic() + DEADLINE_S
    while asker.open or outbox.depth():  # in this order: a question that ends leaves an event
        asker.sweep()
        if time.monotonic() > end:
            raise TimeoutError(f"{database}: {outbox.waiting()} {session.problem}")
        time.sleep(0.02)
    drain.stop()
    session.stop()


def in_child(*arguments) -> int:
    """Exit code of `run` in a forked process; -9 when it was killed."""
    child = os.fork()
    if child == 0:
        try:
            run(*arguments)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
    folder, port, password = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    events = []
    for step in range(1, STEPS_LIMIT, int(sys.argv[4])):
        database = folder / f"step-{step}.db"
        code = in_child(database, port, password, Countdown(step))
        if code not in (0, -signal.SIGKILL) or in_child(database, port, password, None) != 0:
            sys.exit(f"step {step} ended with {code}")
        engine = open_database(database)
        with engine.begin() as connection:
            events.append([tuple(row) for row in connection.execute(sa.select(answers))])
        engine.dispose()
        if code == 0:
            break
    print(json.dumps({"steps": step, "answers": events}))


if __name__ == "__main__":
    main()
