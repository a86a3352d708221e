"""The two processes of bench/node_records_lost.py that are killed at random: a node's way out, and the coordinator's way in.

python -m bench.dying sender|coordinator FOLDER PORT
"""

import sys
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert

from protocol.mqtt import Session

RESEND_S, ASIDE_S = 5.0, 10.0  # seconds; a minute and an hour as shipped
USERS = {"coordinator": "coordinator-password", "esteli": "esteli-password"}
# What the site has handed over, as a daemon keeps an answer by its record's id.
taken = sa.Table("taken", sa.MetaData(), sa.Column("number", sa.Integer, primary_key=True))


def send(folder: Path, port: int) -> None:
    """The sender process: one line is one record, "ok" after its commit; "depth" is answered with how many wait."""
    from node.escalation.reporting import Reporter
    from node.store import Store
    from protocol import topics
    from protocol.drain import Drain
    from protocol.outbox import Outbox

    store = Store(folder / "node.db")
    taken.create(store.engine, checkfirst=True)
    outbox = Outbox(store.engine, resend=RESEND_S, aside=ASIDE_S)
    reporter = Reporter("esteli", outbox, engine=store.engine)
    session = Session("esteli", "127.0.0.1", port, username="esteli", password=USERS["esteli"])
    session.subscribe(topics.ack("esteli"), reporter.acknowledged)
    session.on_connected(lambda _: outbox.connected(session.maximum_packet))
    drain = Drain(outbox, session)
    session.start()
    drain.start()
    for line in sys.stdin:
        if line.strip() == "depth":
            print(f"depth {outbox.depth()}", flush=True)
            continue
        number = int(line)
        with store.transaction() as transaction:
            if transaction.execute(insert(taken).values(number=number).on_conflict_do_nothing().returning(taken.c.number)).first():
                reporter.report(transaction, "record", {"record": float(number)})
        outbox.wake()
        print(f"ok {number}", flush=True)


def coordinate(folder: Path, port: int) -> None:
    """The coordinator process: everything that comes goes into the ledger."""
    from coordinator.fleet.ledger import Ledger
    from coordinator.fleet.listening import Listener

    ledger = Ledger(f"sqlite:///{folder / 'ledger.db'}")
    ledger.migrate()
    session = Session("coordinator", "127.0.0.1", port, username="coordinator", password=USERS["coordinator"])
    Listener(session, ledger)
    session.start()
    sys.stdin.read()


if __name__ == "__main__":
    {"sender": send, "coordinator": coordinate}[sys.argv[1]](Path(sys.argv[2]), int(sys.argv[3]))
