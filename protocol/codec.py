"""Bytes <-> messages and records, checked once. No I/O.

Rules: JSON, UTF-8, strict types, unknown fields refused, size limited before parsing. After this file everything is a typed value.
"""

from typing import TypeVar

import msgspec

from protocol.errors import BadInput, MalformedMessage, TooLarge
from protocol.messages import Message
from protocol.names import checked_name
from protocol.tasks import LANGUAGES, SOURCE_LIMIT, Record

CONTENT_TYPE = "application/json"
MESSAGE_LIMIT = 64 * 1024  # bytes; the broker's max_packet_size is four times that

UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)  # of msgspec; the last for brackets nested by the thousand

T = TypeVar("T")
_message = msgspec.json.Decoder(Message)
_record = msgspec.json.Decoder(Record)


def encode(value: object) -> bytes:
    """Canonical JSON: equal values are equal bytes.

    Raises:
        BadInput: a NaN or an infinity, which JSON cannot carry.
    """
    data = msgspec.json.encode(value, order="deterministic")
    if len(data) > MESSAGE_LIMIT and isinstance(value, Message):
        raise TooLarge(f"{type(value).__name__} is {len(data)} bytes, the limit is {MESSAGE_LIMIT}")
    return data


def decode_message(data: bytes) -> Message:
    """One message from the wire.

    Raises:
        TooLarge: over MESSAGE_LIMIT.
        MalformedMessage: not JSON, not of a known kind, a field missing, unknown or of the wrong type.
    """
    if len(data) > MESSAGE_LIMIT:
        raise TooLarge(f"message is {len(data)} bytes, the limit is {MESSAGE_LIMIT}")
    try:
        return _message.decode(data)
    except UNREADABLE as error:
        raise MalformedMessage(f"message does not decode: {error}") from error


def decode_as(data: bytes, kind: type[T], *, limit: int = MESSAGE_LIMIT, what: str = "document") -> T:
    """One value of `kind` from bytes (a manifest, a header).

    Raises:
        TooLarge, MalformedMessage: as `decode_message`.
    """
    if len(data) > limit:
        raise TooLarge(f"{what} is {len(data)} bytes, the limit is {limit}")
    try:
        return msgspec.json.decode(data, type=kind)
    except UNREADABLE as error:
        raise MalformedMessage(f"{what} does not decode: {error}") from error


def decode_record(data: bytes | str) -> Record:
    """One record from a JSON line.

    Raises:
        MalformedMessage: not JSON, a field missing, unknown or of the wrong type.
        BadInput: empty or oversized source, unknown language, an unusable site name.
    """
    try:
        record = _record.decode(data)
    except UNREADABLE as error:
        raise MalformedMessage(f"record does not decode: {error}") from error
    return checked_record(record)


def checked_record(record: Record) -> Record:
    """The record, if its fields can be used.

    Raises:
        BadInput: as `decode_record`.
    """
    if not record.source.strip():
        raise BadInput(f"record {record.id!r} has an empty source")
    if len(record.source) > SOURCE_LIMIT:
        raise TooLarge(f"record {record.id!r} has {len(record.source)} characters, the limit is {SOURCE_LIMIT}")
    if record.lang not in LANGUAGES:
        raise BadInput(f"record {record.id!r} asks for language {record.lang!r}; known: {', '.join(LANGUAGES)}")
    if record.site:
        checked_name(record.site, what="site")
    return record
