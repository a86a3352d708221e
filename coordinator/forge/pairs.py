"""Records from files that people bring: sentence pairs (TSV) and records (JSON lines). One clear error that names the broken line.

A pairs file is UTF-8, one pair a line, source and target apart by one tab, no header: the first column is the task's source language.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from protocol.codec import checked_record, decode_record
from protocol.errors import BadInput
from protocol.tasks import Record, Task, task_named, translation

LINE_LIMIT = 64 * 1024  # bytes; SOURCE_LIMIT characters and as many of an answer
T = TypeVar("T")

LANGUAGE_CODES = {"english": "en", "spanish": "es"}  # languages that `judging.categories` has word lists of; no others have a code here


def translated(task: Task) -> tuple[str, ...]:
    """Codes of a translation's source and target language, as far as they have one here; () for other tasks."""
    _, *languages = task.name.split("-") if task.kind == "text" else ("",)
    return tuple(LANGUAGE_CODES[language] for language in languages if language in LANGUAGE_CODES)


def language_of(task: Task, record: Record) -> str:
    """Code of the language that an answer is in: a translation's task names it, whatever its records say; "" where it has no code here."""
    return LANGUAGE_CODES.get(task.name.rpartition("-")[2], "") if task.kind == "text" else record.lang


def read_either(
    pairs: Path | None, source: str, target: str, task: str | None, records: Path | None, *, limit: int | None, to: str
) -> tuple[Task, list[Record]]:
    """The task and the records of a command that takes `--pairs FILE.tsv`, or `--task NAME --records FILE.jsonl`; `to` says what for.

    Raises:
        BadInput: neither file, both, no task, or a line that is broken.
    """
    if (pairs is None) == (records is None):
        raise BadInput(f"say what to {to}: either --pairs FILE.tsv or --task NAME --records FILE.jsonl")
    if pairs is not None:
        wanted = translation(source, target)
        return wanted, read_pairs(pairs, wanted, limit=limit)
    assert records is not None
    if task is None:
        raise BadInput("--records needs --task, such as --task ranch")
    wanted = task_named(task)
    return wanted, read_records(records, wanted, limit=limit)


def read_pairs(path: Path, task: Task, *, limit: int | None = None) -> list[Record]:
    """Records of a text task from a TSV file, the first `limit` of them; ids are "NAME-LINE".

    Raises:
        BadInput: the file cannot be read or is empty, or a line is not two filled columns; the message names the line.
    """
    lang = LANGUAGE_CODES.get(task.name.rpartition("-")[2], "en")  # a record has to name one of the codec's; see `language_of`
    records = []
    for number, line in _lines(path, limit):
        columns = line.split("\t")
        if len(columns) != 2 or not all(column.strip() for column in columns):
            raise BadInput(
                f"{path}, line {number}: expected SOURCE<tab>TARGET, both filled, got {len(columns)} column(s); mend or drop the line"
            )
        source, target = (column.strip() for column in columns)
        record = Record(id=f"{path.stem}-{number}", task=task.name, source=source, target=target, lang=lang)
        records.append(_told(path, number, checked_record, record))
    return _some(records, path)


def read_records(path: Path, task: Task, *, limit: int | None = None) -> list[Record]:
    """Records of `task` from a file of JSON lines, the first `limit` of them.

    Raises:
        BadInput: the file cannot be read or is empty, or a line is no record of this task; the message names the line and the field.
    """
    records = []
    for number, line in _lines(path, limit):
        record = _told(path, number, decode_record, line)
        if record.task != task.name:
            raise BadInput(f"{path}, line {number}: a record of task {record.task!r}, not {task.name!r}")
        records.append(record)
    return _some(records, path)


def _lines(path: Path, limit: int | None) -> Iterator[tuple[int, str]]:
    """Numbered lines that are not empty; at most `limit` of them."""
    found = 0
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(iter(lambda: file.readline(LINE_LIMIT + 1), b""), start=1):
                if len(raw) > LINE_LIMIT:
                    raise BadInput(f"{path}, line {number}: longer than {LINE_LIMIT} bytes; is this the right file?")
                try:
                    line = raw.decode("utf-8").rstrip("\r\n").removeprefix("\ufeff")
                except UnicodeDecodeError as error:
                    raise BadInput(f"{path}, line {number}: not UTF-8; convert the file first (iconv -t UTF-8)") from error
                if not line.strip():
                    continue
                if limit is not None and found >= limit:
                    return
                found += 1
                yield number, line
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}") from error


def _told(path: Path, number: int, check: Callable[[T], Record], value: T) -> Record:
    """check(value), with file and line in front of what it complains about."""
    try:
        return check(value)
    except BadInput as error:
        raise type(error)(f"{path}, line {number}: {error}") from error


def _some(records: list[Record], path: Path) -> list[Record]:
    if not records:
        raise BadInput(f"{path} holds no records")
    return records
