"""A fleet to look at: ten days of twelve nodes, three releases with evidence, two rounds. Written through the ledger's own methods."""

import math
import random
from typing import Any

from coordinator.fleet.ledger import Ledger
from protocol.adapters import AdapterHeader, Module
from protocol.messages import Event, Status
from protocol.releases import Release, ReleaseFile

NOW = 1_795_000_000  # 2026-11-18 11:06:40 UTC
DAY = 86_400
NODES = ("aguas-zarcas", "apanas", "cusmapa", "el-sauce", "esteli", "jalapa", "la-trinidad", "malacatoya", "ocotal", "san-isidro", "somoto")
PEER = "base-condega"
PUBLISHED = {1: NOW - 9 * DAY, 2: NOW - 5 * DAY, 3: NOW - 30 * 3_600}
CODES = ("normal", "irrigation-due", "saturated-soil", "leak", "dry-run", "clogged-filter", "panel-soiled", "battery-cold", "gateway-loss")


def figures(right: int, n: int, *, chrf: float, mb: float, rss: float, speed: float, ms: float) -> dict[str, Any]:
    share = right / n
    half = 1.96 * math.sqrt(share * (1 - share) / n)
    return {
        "n": n, "accuracy": share, "accuracy_ci": [share - half, share + half], "chrf": chrf, "chrf_ci": [chrf - 1.9, chrf + 1.8],
        "chrf_signature": "nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:2.6.0", "bleu": chrf - 21, "tokens_per_second": speed,
        "latency_p50_ms": ms, "peak_rss_mb": rss, "file_mb": mb, "model_digest": "5" * 64,
    }  # fmt: skip


def category(name: str, measure: str, n: int, teacher: float, student: float, *, half: float) -> dict[str, Any]:
    values = {"teacher": teacher, "student": student}
    models = {model: {"value": value, "low": value - half, "high": value + half} for model, value in values.items()}
    return {"category": name, "measure": measure, "n": n, "models": models}


def evidence(number: int, right: int, *, seed: int) -> dict[str, Any]:
    """A bundle in the shape of coordinator/forge/evidence.py."""
    rng = random.Random(seed)
    curve = [[x / 20, right / 800 + (704 - right) / 800 * (1 - (1 - x / 20) ** 2.6)] for x in range(21)]
    codes = [
        {"code": code, "n": 60 + 9 * at, "student": round((60 + 9 * at) * rng.uniform(0.62, 0.95)), "teacher": round((60 + 9 * at) * 0.88)}
        for at, code in enumerate(CODES)
    ]
    bins = [{"confidence": 0.05 + x / 10, "accuracy": min(1.0, max(0.0, 0.05 + x / 10 + rng.uniform(-0.05, 0.05))), "count": 10 + x * x * 3}
            for x in range(2, 10)]  # fmt: skip
    general = {
        "models": {
            "teacher": figures(704, 800, chrf=71.4, mb=243.0, rss=392, speed=31, ms=940),
            "student_float": {"n": 800, "accuracy": (right + 4) / 800, "accuracy_ci": [(right - 22) / 800, (right + 29) / 800]},
            "student": figures(right, 800, chrf=65.8, mb=58.2, rss=121, speed=118, ms=236),
        },
        "baselines": {"majority": {"accuracy": 0.181, "accuracy_ci": [0.156, 0.209]}, "nearest_neighbour": {"accuracy": 0.547},
                      "gradient_boosted_trees": {"accuracy": 0.702, "accuracy_ci": [0.67, 0.733]}},
        "statements": [f"general: the student keeps {right / 704:.0%} of the teacher's verdict accuracy (95% interval, paired, n = 800)."],
        "codes": codes,
        "categories": [
            category("all", "verdict right", 800, 0.88, right / 800, half=0.03), category("numbers", "chrF", 310, 71.2, 64.0, half=2.1),
            category("numbers", "kept", 310, 0.94, 0.81, half=0.04), category("length: short", "chrF", 120, 70.0, 71.5, half=3.0),
        ],
        "confidence": {"calibrated": True, "ece": 0.031, "reliability": bins, "budget": 0.2, "escalated": 0.19, "curve": curve,
                       "accuracy_with_escalation": curve[4][1] - 0.002, "ends": [right / 800, 0.88]},
    }  # fmt: skip
    site = {
        "models": {"teacher": figures(163, 200, chrf=68.0, mb=243.0, rss=392, speed=31, ms=940),
                   "student": figures(round(right / 800 * 180), 200, chrf=61.0, mb=58.2, rss=121, speed=118, ms=240)},
        "baselines": {}, "statements": [],
    }  # fmt: skip
    return {
        "release": number, "task": "ranch", "seed": 7, "commit": "7ee33bb0c1d2", "sets": {"general": general, "esteli": site},
        "command": "milpa-coordinator evaluate --task ranch --model student.gguf --records general-test.jsonl --json",
        "machine": {"cpu": "AMD EPYC 7B13", "system": "Linux 6.1 x86_64"},
        "lineage": [{"name": "gemma-3-270m Q4_K_M", "file_mb": 241.4, "digest": "1" * 64, "note": "teacher"},
                    {"name": "corrected teacher", "digest": "2" * 64, "file_mb": 243.0}, {"name": "student, 6 layers", "file_mb": 201.0},
                    {"name": "student Q8_0", "digest": "5" * 64, "file_mb": 58.2}],
        "regressions": {
            "rows": [{"set": "general", "category": "numbers", "measure": "kept", "against": "teacher", "loss": True},
                     {"set": "general", "category": "numbers", "measure": "chrF", "against": "teacher", "loss": False}],
            "statements": ["general, numbers: 13 points fewer answers keep the numbers than the teacher's (n = 310)."],
        },
        "not_tested": ["Boards: everything ran on the machine named here, none of it on a Raspberry Pi or another ARM board."],
    }  # fmt: skip


def release(number: int) -> Release:
    def file(name: str, role: Any, kind: Any, size: int, fill: str, base: str = "") -> ReleaseFile:
        return ReleaseFile(name=name, role=role, kind=kind, digest=fill * 64, size=size, base_digest=base)

    files = [
        file("student.gguf", "student", "model", 61_026_304, "5"), file("teacher.gguf", "teacher", "model", 254_803_968, "2"),
        file("initial.gguf", "student", "initial-adapter", 1_064_960, "6", "5" * 64),
        file("calibration.json", "student", "calibration", 3_120, "7"),
    ]  # fmt: skip
    if number > 1:
        files.append(file(f"merged-{number}.gguf", "student", "adapter", 2_129_920, "89"[number - 2], "5" * 64))
    notes = {
        1: "First student, distilled on the general corpus",
        2: "Round 1: +4.1 points at esteli",
        3: "Round 2: +2.6 points at malacatoya",
    }
    return Release(number=number, task="ranch", created=PUBLISHED[number], files=tuple(files), note=notes[number], previous=number - 1)


def header(site: str, release_number: int, examples: int) -> AdapterHeader:
    return AdapterHeader(
        site=site, release=release_number, base_digest="5" * 64, initial_digest="6" * 64, rank=8, alpha=16.0,
        modules=(Module("blk.0.attn_q.weight", 640, 640),), examples=examples, loss_before=1.42, loss_after=1.17, held_out=24,
    )  # fmt: skip


def fill(ledger: Ledger, *, days: int = 10, seed: int = 3) -> None:
    """Ten days, ending at NOW."""
    rng = random.Random(seed)
    ledger.clock = lambda: PUBLISHED[1]
    for number, right in ((1, 588), (2, 621), (3, 634)):
        ledger.clock = lambda number=number: PUBLISHED[number]  # type: ignore[misc]
        ledger.add_release(release(number), evidence(number, right, seed=number), PUBLISHED[number])
        if number < 3:
            opened = PUBLISHED[number + 1] - 2_400
            ledger.clock = lambda opened=opened: opened  # type: ignore[misc]
            asked = ("esteli", "malacatoya", "jalapa", "ocotal", "somoto")
            round_ = ledger.open_round(number, asked, opened + 1_800)
            for place, site in enumerate(asked[:4]):
                bad = site == "ocotal"
                ledger.add_reply(round_, site, header(site, number, 48 + 31 * place), f"{place + 1}{number}" * 32, not bad,
                                 "not-finite: 12 of 163,840 numbers are NaN" if bad else "", opened + 95 + 240 * place)  # fmt: skip
            sites = [{"name": site, "n": 200, "before": 0.655 + 0.02 * at, "after": 0.701 + 0.017 * at, "low": 0.012 - 0.008 * at,
                      "high": 0.081} for at, site in enumerate(asked[:3])]  # fmt: skip
            ledger.close_round(
                round_, {"decision": "released", "published": number + 1, "sites": sites, "relative_error": 0.0004,
                         "general": {"name": "general", "n": 800, "before": 0.735, "after": 0.776, "low": 0.02, "high": 0.062},
                         "reasons": ["sites together: 0.675 -> 0.718 (+0.043, 95 % +0.020..+0.066, n=600)",
                                     "general: 0.735 -> 0.776 (+0.041, 95 % +0.020..+0.062, n=800)"]},
                closed=opened + 2_200,
            )  # fmt: skip
    for place, name in enumerate((*NODES, PEER)):
        boot, sequence, answered, escalated = f"{name}-1", 0, 0, 0
        role = "teacher" if name == PEER else "student"
        at = NOW - days * DAY + 600 * place
        while at < NOW - 60:
            sequence += 1
            if name == "cusmapa" and at > NOW - 2 * DAY and boot.endswith("1"):
                boot, sequence, answered, escalated = f"{name}-2", 1, 0, 0
            count = 0 if role == "teacher" else rng.randint(14, 34)
            now_release = max((number for number, when in PUBLISHED.items() if when <= at), default=0)
            asks = 0.21 if now_release < 2 else 0.155 if now_release < 3 else 0.11
            answered, escalated = answered + count, escalated + sum(rng.random() < asks for _ in range(count))
            if name == "apanas" and now_release == 3:
                now_release = 2
            state = "answering" if now_release else "no-model"
            ledger.seen_status(
                Status(node=name, boot=boot, sequence=sequence, state=state, role=role, release=now_release, model_digest="5" * 64,
                       adapter_digest="9" * 64 if now_release > 1 else "", at=at, answered=answered, escalated=escalated, version="0.1.0"),
                at,
            )  # fmt: skip
            if role == "student":
                ledger.add_event(
                    Event(id=f"{name}-{boot}-{sequence}", node=name, kind="answers", at=at,
                          figures={"count": count, "escalated": 2, "latency_p50_ms": rng.gauss(241, 14)}), at,
                )  # fmt: skip
                if rng.random() < 0.75:
                    agreed = 0.44 if now_release < 2 else 0.52 if now_release < 3 else 0.6
                    state = "expired" if rng.random() < 0.06 else "confirmed" if rng.random() < agreed else "upgraded"
                    numbers = {"confidence": rng.uniform(0.2, 0.6)} | (
                        {} if state == "expired" else {"seconds": rng.lognormvariate(0.6, 0.5)}
                    )
                    ledger.add_event(
                        Event(id=f"q-{name}-{boot}-{sequence}", node=name, kind="escalation", at=at, figures=numbers,
                              detail={"state": state, "peer": PEER}), at,
                    )  # fmt: skip
            at += 6 * 3_600
        if name not in ("somoto",):
            final = "sleeping" if name in ("jalapa", "el-sauce") else "updating" if name == "la-trinidad" else "answering"
            ledger.seen_status(
                Status(node=name, boot=boot, sequence=sequence + 1, state=final, role=role, release=2 if name == "apanas" else 3,
                       model_digest="5" * 64, adapter_digest="9" * 64, at=NOW, sleeping_until=NOW + 5_400 if final == "sleeping" else 0,
                       answered=answered + 3, escalated=escalated, waiting=place % 3, version="0.1.0"),
                NOW - 20 - 4 * place,
            )  # fmt: skip
    ledger.add_event(Event(id="refusal", node="apanas", kind="release-refused", figures={"number": 3},
                           detail={"reason": "needs 600 MB of memory, 512 are free"}), NOW - 7_000)  # fmt: skip
    ledger.add_event(Event(id="trained", node="esteli", kind="adapter-trained", figures={"release": 3, "examples": 61, "loss_before": 1.31,
                           "loss_after": 1.12}), NOW - 9_000)  # fmt: skip
    ledger.add_event(Event(id="active", node="esteli", kind="release-activated", figures={"number": 3, "seconds": 4.2}), NOW - 29 * 3_600)
    ledger.add_refused("milpa/v1/node/ocotal/event", b"{", "message does not decode: Input data was truncated", NOW - 4_000)
    ledger.clock = lambda: NOW
