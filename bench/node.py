"""The node's figures, one command: `make bench-node`, `make bench-node ONLY=audc`; `python -m bench.node --help`. See `harness`."""

from bench.harness import Row, Table

ROWS = {
    "offline_answered": Row(("of requests answered, cold boot with only lo and the clock at 1970",), (1.0,)),
    "blackhole_p95": Row(("x p95 with the broker black-holed",), (1.05,), at_most=True),
    "latency_ms": Row(("ms a ranch record, p50, one thread", "ms by which escalation delays the first answer"), (50.0, 0.0), at_most=True),
    "audc": Row(("normalised AUDC, ranch", "normalised AUDC, translation"), (0.35, 0.35)),
    "gap_closed": Row(("of the gap to the teacher closed, 30% escalated",), (0.80,)),
    "calibration": Row(("expected calibration error", "realised minus planned share, over 1,000"), (0.05, 0.02), at_most=True),
    "records_lost": Row(("acknowledged and lost, of 100,000", "applied twice"), (0.0, 0.0), at_most=True),
    "offline_growth_mib": Row(("MiB grown in 7 days offline",), (5.0,), at_most=True),
    "poison_s": Row(("s until the message after a poison one leaves",), (10.0,), at_most=True),
    "footprint": Row(
        ("MiB resident without a model", "MiB with the `small` student", "of a core when idle", "s from start to ready beyond the model"),
        (90.0, 200.0, 0.01, 3.0),
        at_most=True,
    ),
    "idle_bytes_day": Row(("bytes a day, idle",), (100_000.0,), at_most=True),
    "systemd_exposure": Row(("exposure of the unit",), (2.0,), at_most=True),
    "fuzz_executions": Row(("fuzzed inputs of the least run parser, no crash",), (1_000_000.0,)),
}
TABLE = Table("node", ROWS)

if __name__ == "__main__":
    TABLE.main(__doc__)
