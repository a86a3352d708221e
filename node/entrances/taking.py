"""One record from an entrance that may repeat itself: answered once, told as often as asked.

A file is read again after a power cut and a broker delivers again after a lost acknowledgement, so the same record (equal id, task,
language and source) is answered once and told again as its answer stands by then. Who wants a new answer gives a new id.
"""

from typing import Any

from sqlalchemy import select

from node.answering import Answering
from node.store import AnswerRow, answer_to
from protocol import codec, reasons
from protocol.errors import BadInput, TooLarge, UnknownName

RECORD_LIMIT = 64 * 1024  # bytes; 4,000 characters of source, escaped, and the raw figures


def take(answering: Answering, data: bytes, *, origin: str, deadline_s: float) -> dict[str, Any]:
    """What to say about the record in `data` (JSON): its answer, or why there is none. A refused one is kept with the reason.

    Raises:
        Unavailable: no model, a full queue, no answer in time: try again later.
    """
    try:
        if len(data) > RECORD_LIMIT:
            raise TooLarge(f"the record is {len(data)} bytes, the limit is {RECORD_LIMIT}")
        record = codec.decode_record(data)
    except BadInput as error:
        answering.refuse(data[:RECORD_LIMIT].decode("utf-8", "replace"), reason=str(error), origin=origin)
        return refusal(error)
    with answering.store.transaction() as session:
        row = answer_to(session, record)
    if row is None:
        try:
            given = answering.answer(record, deadline_s=deadline_s, origin=origin)
        except BadInput as error:  # kept there
            return refusal(error, record=record.id)
        with answering.store.transaction() as session:
            row = session.scalars(select(AnswerRow).where(AnswerRow.id == given.id)).one()
    return told(row)


def told(row: AnswerRow) -> dict[str, Any]:
    """An answer as it stands now, for whoever sent the record."""
    return {
        "id": row.id, "record_id": row.record, "task": row.task, "text": row.text, "verdict": row.verdict, "confidence": row.confidence,
        "reason": str(reasons.read(row.reason)), "state": row.state, "provisional": row.state == "provisional", "by": row.by,
        "release": row.release, "model_digest": row.model_digest, "adapter_digest": row.adapter_digest,
    }  # fmt: skip


def refusal(error: Exception, *, record: str = "") -> dict[str, Any]:
    """An error in an answer's place."""
    codes = ((TooLarge, "too_large"), (UnknownName, "unknown_name"), (BadInput, "bad_input"))
    code = next((code for kind, code in codes if isinstance(error, kind)), "unavailable")
    return {"record_id": record, "error": {"code": code, "message": str(error)}}
