"""The forge's figures, one command: `make bench-forge`, `make bench-forge ONLY=step`; `python -m bench.forge --help`. See `harness`."""

from bench.harness import Row, Table

ROWS = {
    "time_to_quality": Row(
        (
            "x faster to equal chrF, Tatoeba dev: ours mostly on references, TRL on policy",
            "x faster to equal verdicts, ranch: the same two",
        ),
        (40.0, 40.0),
    ),
    "step": Row(("x fewer CPU-s a step, naive loop", "x fewer CPU-s a step, live teacher, dense KL"), (5.0, 2.0)),
    "with_capture": Row(("x fewer CPU-s with capture, 5 epochs",), (3.0,)),
    "tail_gap_nat": Row(("nat above dense KL, held-out",), (0.02,), at_most=True),
    "throughput": Row(("of the machine's limit",), (0.85,)),
    "ranch_kept": Row(("of the teacher's verdicts kept", "of its chrF kept"), (0.99, 0.98)),
    "tatoeba": Row(
        ("chrF above Apertium, Tatoeba test", "of the corrected teacher, Tatoeba test", "of the corrected teacher, NTREX-MX"),
        (8.0, 0.95, 0.95),
    ),
    "size_mb": Row(("MB, Q4_K_M", "MB, ternary", "MB, peak resident memory"), (40.0, 25.0, 150.0), at_most=True),
    "decode": Row(("x the teacher's Q4_K_M, decode a thread",), (8.0,)),
    "trim": Row(
        ("x smaller with --pieces 46000", "x faster, the same", "of general text tokenised identically, the same"), (2.5, 2.0, 0.99)
    ),
    "gates_auc": Row(tuple(f"AUC, {kind}" for kind in ("copied", "truncated", "shuffled", "wrong sentence")), (0.95,) * 4),
}

TABLE = Table("forge", ROWS)

if __name__ == "__main__":
    TABLE.main(__doc__)
