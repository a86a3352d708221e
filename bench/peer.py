"""A peer that replies from a table: `python -m bench.peer PORT NAME PASSWORD TASK`, until it is ended.

One answer to every question, at once. For measures of the node that asks, where a second model would take the machine's time.
"""

import signal
import sys

from protocol import topics
from protocol.codec import decode_message, encode
from protocol.digests import digest_bytes
from protocol.messages import Question, Reply, Status
from protocol.mqtt import Incoming, Session

DIGEST = "7" * 64  # of a model larger than any other
TEXT = "La respuesta de un modelo mayor."


def serve(port: int, name: str, password: str, task: str) -> None:
    """Announce a large model, reply to every question, end at SIGTERM."""
    session = Session(name, "127.0.0.1", port, username=name, password=password, backoff_base=0.1, backoff_cap=1.0)

    def answer(message: Incoming) -> None:
        question = decode_message(message.payload)
        assert isinstance(question, Question)
        reply = Reply(f"r{question.id}", question.id, digest_bytes(question.prompt.encode()), name, DIGEST, TEXT, 0.9)
        session.send(topics.reply(question.asker, name), encode(reply), correlation=message.correlation)

    def born(_: bool) -> None:
        birth = Status(name, "b", 1, "answering", model_digest=DIGEST, parameters=10**12, serves=True, task=task)
        session.send(topics.status(name), encode(birth), retain=True)

    session.subscribe(topics.questions_to(name), answer)
    session.on_connected(born)
    session.start()
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    session.stop()


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})  # for sigwait, in every thread
    serve(int(sys.argv[1]), *sys.argv[2:5])
