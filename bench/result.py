"""How every benchmark leaves its result: bench/results/NAME.json with `figures`, `machine`, `commit`, `command`, and a table on stdout."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coordinator.forge.judging.evidence import commit, machine

RESULTS = Path(__file__).parent / "results"


def write(name: str, figures: dict[str, Any], *, command: str, rows: Sequence[Sequence[str]]) -> None:
    RESULTS.mkdir(exist_ok=True)
    result = {"figures": figures, "machine": machine(), "commit": commit(), "command": command}
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print_table(rows)


def print_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
