"""The types of an evidence bundle: what a program that reads one may rely on. docs/evidence.md says what each key means.

`evidence.bundle` makes plain JSON values; these types check them (`check`) and give the JSON schema (docs/evidence.schema.json). Keys may
be added; a reader passes over those it does not know. Figures of a model stay an open object: they are `Evaluation.figures`.
"""

from collections.abc import Mapping
from typing import Any

import msgspec

from coordinator.forge.judging.economics import Cost, PowerModel
from coordinator.forge.judging.regressions import Comparison
from protocol.errors import BadInput

Figures = dict[str, Any]


class Paired(msgspec.Struct, frozen=True):
    """The student minus another model, paired over the records."""

    diff: float  # share of verdicts right, or points of mean sentence chrF
    low: float  # 95%, by itself
    high: float
    p: float  # two-sided
    n: float
    p_holm: float  # after Holm's correction over all `comparisons` of the evidence
    comparisons: float


class Spread(msgspec.Struct, frozen=True):
    """A value with its 95% interval."""

    value: float
    low: float
    high: float


class CategoryRow(msgspec.Struct, frozen=True):
    """One measure in one category, every model's value."""

    category: str
    measure: str
    n: int
    models: dict[str, Spread]


class Records(msgspec.Struct, frozen=True):
    """What was asked."""

    n: int
    digest: str  # SHA-256 of the records' canonical JSON


class Economics(msgspec.Struct, frozen=True):
    """What answers cost on the machine named."""

    power: PowerModel
    models: dict[str, Cost]
    share_of_teacher: dict[str, Any] | None


class HeldOut(msgspec.Struct, frozen=True):
    """One held-out set."""

    models: dict[str, Figures]
    baselines: dict[str, Figures]
    paired: dict[str, Paired]
    statements: list[str]
    economics: Economics
    records: Records | None = None
    categories: list[CategoryRow] = []
    codes: list[dict[str, Any]] = []
    confidence: dict[str, Any] | None = None


class TooFew(msgspec.Struct, frozen=True):
    """A category that was not tested."""

    set: str
    category: str
    n: int


class Regressions(msgspec.Struct, frozen=True):
    """Losses by category, over all sets."""

    alpha: float
    fewest: int
    correction: str
    tests: int
    rows: list[Comparison]
    too_few: list[TooFew]
    statements: list[str]


class Evidence(msgspec.Struct, frozen=True):
    """The bundle."""

    release: int  # 0: of no release
    task: str
    created: int  # seconds since 1970, UTC
    seed: int
    command: str
    commit: str
    code_digest: str
    machine: dict[str, Any]
    sets: dict[str, HeldOut]
    statements: list[str]
    regressions: Regressions | None
    calibration: dict[str, Any] | None
    lineage: list[dict[str, Any]]
    not_tested: list[str]


def check(bundle: Mapping[str, Any]) -> Evidence:
    """A bundle as typed values.

    Raises:
        BadInput: it is none; the message names the key.
    """
    try:
        return msgspec.convert(dict(bundle), Evidence)
    except msgspec.ValidationError as error:
        raise BadInput(f"this is no evidence bundle: {error}") from error


def json_schema() -> bytes:
    """The JSON schema as it stands in docs/evidence.schema.json."""
    return msgspec.json.format(msgspec.json.encode(msgspec.json.schema(Evidence), order="deterministic"), indent=1) + b"\n"
