"""The whole round on a tiny model: real training, real Flower, real llama.cpp, signed release, ledger."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from coordinator.federation.collect import keep
from coordinator.federation.superlink import Keys
from coordinator.fleet.ledger import Ledger
from coordinator.fleet.publishing import Publisher, build_release
from node.learn import stored
from node.learn.examples import split
from node.store import LearningExample
from node.update.slots import ActiveRelease
from protocol.adapters import AdapterReply
from protocol.digests import digest_bytes, digest_file
from protocol.errors import BadInput, Unavailable
from protocol.tasks import RANCH, Record
from tests.federation.conftest import ROOT, SuperLink, Window

pytestmark = [pytest.mark.torch, pytest.mark.llama]
SITES = ("esteli", "malacatoya")
NOWHERE = Keys(control="x" * 40, fleet="", secret="y" * 40)


def record(site: str, number: int) -> Record:
    level = "low" if number % 2 else "high"
    return Record(
        id=f"{site}-{number}", task="ranch", source=f"moisture {level} hours {number % 7}", site=site, target="normal: the soil",
        verdict="normal",
    )  # fmt: skip


HELD_OUT = {name: [record(name, number) for number in range(100, 112)] for name in ("general", *SITES)}
DEV = {name: [record(name, number) for number in range(200, 210)] for name in SITES}


class Farm:
    """A store with release 1, and two sites that learned on it."""

    def __init__(self, folder: Path) -> None:
        from node.learn.train import learn
        from protocol.models.checkpoint import Checkpoint
        from protocol.models.lora import initial_adapter, write_adapter_gguf
        from tests.tiny import tiny_gguf

        self.folder = folder
        model, initial = tiny_gguf(folder / "student.gguf"), folder / "initial.gguf"
        general = initial.with_name("rehearsal.jsonl")
        general.write_bytes(b"{}\n")
        write_adapter_gguf(initial, *initial_adapter(Checkpoint.read(model), rank=8, alpha=16.0, seed=1))
        self.release, self.files = build_release(
            1,
            "ranch",
            [
                ("student", "model", model, ""),
                ("student", "initial-adapter", initial, digest_file(model)),
                ("student", "rehearsal", general, ""),
            ],
        )
        active = ActiveRelease(release=self.release, role="student", model=model, initial_adapter=initial)
        for site in SITES:
            examples = [LearningExample(record(site, number), "operator", 1.0, number % 5 == 0, False) for number in range(60)]
            assert learn(folder / site, site, active, RANCH, split(examples), rate=2e-2, epochs=30).stored

    def store(self, folder: Path) -> tuple[Path, Ledger, Publisher]:
        """A fresh coordinator's folder with release 1 published."""
        publisher = Publisher(folder / "repository")
        publisher.init()
        publisher.publish(self.release, self.files)
        ledger = Ledger(f"sqlite:///{folder / 'ledger.db'}")
        ledger.migrate()
        return folder, ledger, publisher

    def adapter(self, site: str) -> tuple[Any, np.ndarray]:
        found = stored.load(self.folder / site, 1)
        assert found is not None
        return found[0].header, found[1]

    def arrived(self, folder: Path, ledger: Ledger, *sites: str) -> int:
        """As a round leaves it that died after collecting: replies in its folder, the ledger row open."""
        number = ledger.open_round(1, list(SITES), 60, opened=0)
        here = folder / "rounds" / str(number)
        here.mkdir(parents=True)
        for site in sites:
            header, flat = self.adapter(site)
            keep(here, msgspec.json.encode(AdapterReply(site, "adapter", digest_bytes(flat.tobytes()), header)), flat, 0)
        (folder / "rounds" / "open.json").write_bytes(msgspec.json.encode({"number": number, "release": 1, "opened": 0}))
        return number


@pytest.fixture(scope="session")
def farm(tmp_path_factory: pytest.TempPathFactory) -> Farm:
    pytest.importorskip("torch", reason="pip install -e '.[train]'")
    return Farm(tmp_path_factory.mktemp("farm"))


def options(**more: Any) -> Any:
    from coordinator.federation.round import Options

    # a random model must change more than its own weights to say anything: hence the generous norm
    return Options(**{"expected": SITES, "norm_share": 50.0, "threads": 2, **more})


@pytest.mark.flower
def test_two_sites_adapters_become_release_two_and_the_ledger_says_how(
    farm: Farm, superlink: SuperLink, windows: Callable[..., Window], tmp_path: Path
) -> None:
    from coordinator.dashboard.views.rounds import round_numbered
    from coordinator.federation.round import run_round

    store, ledger, publisher = farm.store(tmp_path)
    for site in SITES:
        windows(farm.folder / site, site)

    result = run_round(
        store, ledger=ledger, superlink=superlink.address, keys=superlink.keys, heldout=HELD_OUT, dev=DEV,
        options=options(deadline_s=60.0, etas=(1.0, 2.0)),
    )  # fmt: skip

    assert (result["decision"], result["release"]) == ("released", 2), result
    assert {one["site"] for one in result["accepted"]} == set(SITES)
    assert result["sets"]["sites"]["after"] > result["sets"]["sites"]["before"]
    release = publisher.latest()
    assert release is not None
    assert (release.number, release.previous) == (2, 1)
    kinds = {file.kind: file for file in release.files}
    assert set(kinds) == {"model", "initial-adapter", "rehearsal", "adapter", "calibration", "evidence"}
    assert kinds["adapter"].base_digest == kinds["model"].digest
    assert publisher.verify() > 0
    latest = ledger.latest_release()
    assert latest is not None
    assert latest.number == 2
    assert latest.evidence is not None
    shown = round_numbered(ledger, result["round"])
    assert shown is not None
    assert shown.published == 2
    assert {reply.node for reply in shown.replies if reply.accepted} == set(SITES)
    assert not (store / "rounds" / "open.json").exists()
    ledger.close()


def test_a_round_that_died_after_collecting_goes_on_without_a_superlink(farm: Farm, tmp_path: Path) -> None:
    from coordinator.federation.round import run_round

    store, ledger, _ = farm.store(tmp_path)
    number = farm.arrived(store, ledger, *SITES)

    result = run_round(store, ledger=ledger, superlink="127.0.0.1:1", keys=NOWHERE, heldout=HELD_OUT, options=options(deadline_s=1.0))

    assert (result["round"], result["release"]) == (number, 2)
    ledger.close()


def called(command: Callable[..., None], *words: object) -> dict[str, Any]:
    """What one of our commands prints with --json."""
    app = typer.Typer()
    app.command()(command)
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, (result.output, result.exception)
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_the_command_in_a_merged_releases_evidence_measures_it_again(farm: Farm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from coordinator.commands.evaluate import evaluate
    from coordinator.commands.round import round
    from coordinator.forge.judging import evidence

    monkeypatch.setattr(evidence, "commit", lambda: "c0ffee")
    store, ledger, _ = farm.store(tmp_path)
    farm.arrived(store, ledger, *SITES)
    keys = store / "superlink"
    keys.mkdir()
    for name in ("control.token", "superexec.secret"):
        (keys / name).write_text("x" * 40)
        (keys / name).chmod(0o600)
    sets = []
    for name, rows in HELD_OUT.items():
        file = tmp_path / f"{name} test.jsonl"
        file.write_bytes(b"\n".join(msgspec.json.encode(row) for row in rows))
        sets += ["--heldout", f"{name}={file}"]
    done = called(round, "--store", store, *sets, "--superlink", "127.0.0.1:1", "--deadline", 1, "--norm-share", 50, "--json")
    latest = ledger.latest_release()
    assert done["release"] == 2
    assert latest is not None
    assert latest.evidence is not None
    proof = latest.evidence

    assert proof["command"].startswith("milpa-coordinator evaluate --model ")
    again = called(evaluate, *shlex.split(proof["command"])[2:])["sets"]

    assert proof["commit"] == "c0ffee"
    assert any(sentence.startswith("Teacher, float student and peers:") for sentence in proof["not_tested"])
    for name in HELD_OUT:
        assert set(again[name]["models"]) == {"student", "release-1"}
        for model, figures in proof["sets"][name]["models"].items():
            same = ("accuracy", "chrf", "chrf_ci", "n", "model_digest", "adapter_digest")
            assert [again[name]["models"][model][key] for key in same] == [figures[key] for key in same]
        assert again[name]["paired"] == proof["sets"][name]["paired"]
    ledger.close()


def test_a_round_that_died_before_publishing_publishes_what_was_decided(
    farm: Farm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from coordinator.federation import round as rounds

    store, ledger, publisher = farm.store(tmp_path)
    number = farm.arrived(store, ledger, *SITES)

    def power_cut(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    arguments: dict[str, Any] = {"ledger": ledger, "superlink": "127.0.0.1:1", "keys": NOWHERE, "heldout": HELD_OUT}
    with monkeypatch.context() as cut:
        cut.setattr(Publisher, "publish", power_cut)
        with pytest.raises(KeyboardInterrupt):
            rounds.run_round(store, **arguments, options=options(deadline_s=1.0))
    before = publisher.latest()
    assert before is not None
    assert before.number == 1
    monkeypatch.setattr(rounds, "evaluate", power_cut)  # nothing is computed again

    result = rounds.run_round(store, **arguments, options=options(deadline_s=1.0))

    after = publisher.latest()
    assert (result["round"], result["release"]) == (number, 2)
    assert after is not None
    assert after.number == 2
    assert [found.number for found in ledger.releases()] == [2]
    ledger.close()


def test_a_site_that_sleeps_counts_with_its_last_adapter_and_a_poisoned_one_not_at_all(farm: Farm, tmp_path: Path) -> None:
    from coordinator.federation.round import run_round

    store, ledger, _ = farm.store(tmp_path)
    farm.arrived(store, ledger, "esteli")
    header, flat = farm.adapter("malacatoya")
    poisoned = np.full_like(flat, np.nan)
    payload = msgspec.json.encode(AdapterReply("malacatoya", "adapter", digest_bytes(poisoned.tobytes()), header))
    keep(store / "rounds" / "1", payload, poisoned, 0)

    first = run_round(
        store, ledger=ledger, superlink="127.0.0.1:1", keys=NOWHERE, heldout=HELD_OUT, options=options(deadline_s=1.0, dry_run=True)
    )
    (store / "rounds" / "2").mkdir()
    farm_number = ledger.open_round(1, list(SITES), 60, opened=0)
    payload = msgspec.json.encode(AdapterReply("malacatoya", "adapter", digest_bytes(flat.tobytes()), header))
    keep(store / "rounds" / str(farm_number), payload, flat, 0)
    (store / "rounds" / "open.json").write_bytes(msgspec.json.encode({"number": farm_number, "release": 1, "opened": 0}))
    second = run_round(
        store, ledger=ledger, superlink="127.0.0.1:1", keys=NOWHERE, heldout=HELD_OUT, options=options(deadline_s=1.0, dry_run=True)
    )

    assert first["decision"] == "would release"
    assert [one["site"] for one in first["accepted"]] == ["esteli"]
    assert {one["site"]: one["reason"] for one in first["refused"]} == {"malacatoya": "not-finite"}
    assert {one["site"]: one["from_round"] for one in second["accepted"]} == {"malacatoya": 2, "esteli": 1}
    ledger.close()


def test_nothing_is_released_when_nothing_is_better(farm: Farm, tmp_path: Path) -> None:
    from coordinator.federation.round import run_round

    store, ledger, publisher = farm.store(tmp_path)
    farm.arrived(store, ledger, *SITES)
    other = {
        name: [msgspec.structs.replace(one, target="leak: water", verdict="leak") for one in records] for name, records in HELD_OUT.items()
    }

    result = run_round(store, ledger=ledger, superlink="127.0.0.1:1", keys=NOWHERE, heldout=other, options=options(deadline_s=1.0))

    assert (result["decision"], result["release"]) == ("not better", None)
    assert "does not lie above zero" in result["reasons"][0]
    latest = publisher.latest()
    assert latest is not None
    assert latest.number == 1
    ledger.close()


def test_an_outlier_accepted_on_arrival_is_a_refusal_in_the_ledger_in_the_end(farm: Farm, tmp_path: Path) -> None:
    from coordinator.dashboard.views.rounds import round_numbered
    from coordinator.federation.round import run_round

    store, ledger, _ = farm.store(tmp_path)
    number = farm.arrived(store, ledger, "esteli")
    header, flat = farm.adapter("malacatoya")
    huge = flat * np.float32(4.0)  # both factors: sixteen times the norm
    payload = msgspec.json.encode(AdapterReply("malacatoya", "adapter", digest_bytes(huge.tobytes()), header))
    keep(store / "rounds" / str(number), payload, huge, 0)

    result = run_round(
        store, ledger=ledger, superlink="127.0.0.1:1", keys=NOWHERE, heldout=HELD_OUT,
        options=options(deadline_s=1.0, dry_run=True, norm_share=1e6),
    )  # fmt: skip

    assert {one["site"]: one["reason"] for one in result["refused"]} == {"malacatoya": "outlier"}
    shown = round_numbered(ledger, number)
    assert shown is not None
    assert {reply.node: reply.accepted for reply in shown.replies} == {"esteli": True, "malacatoya": False}
    ledger.close()


def test_a_round_where_nobody_answers_and_no_superlink_is_there_fails_in_words(farm: Farm, tmp_path: Path) -> None:
    from coordinator.federation.round import run_round

    store, ledger, _ = farm.store(tmp_path)

    with pytest.raises(Unavailable, match="no SuperLink answer"):
        run_round(store, ledger=ledger, superlink="127.0.0.1:1", keys=NOWHERE, heldout=HELD_OUT, options=options(deadline_s=3.0))
    ledger.close()


def test_a_round_needs_a_site_to_be_judged_at(farm: Farm, tmp_path: Path) -> None:
    from coordinator.federation.round import run_round

    store, ledger, _ = farm.store(tmp_path)

    with pytest.raises(BadInput, match="no held-out set of a site"):
        run_round(store, ledger=ledger, superlink="127.0.0.1:1", keys=NOWHERE, heldout={"general": HELD_OUT["general"]})
    ledger.close()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--heldout", "esteli"], "write NAME=FILE.jsonl"),
        (["--heldout", "esteli={records}", "--heldout", "esteli={records}"], "given twice"),
        (["--heldout", "esteli={records}", "--eta", "one"], "positive numbers"),
        (["--heldout", "esteli={records}", "--eta", "0"], "above 0"),
        (["--heldout", "esteli={folder}/none.jsonl"], "none.jsonl"),
        (["--heldout", "esteli={records}"], "no SuperLink is known"),
    ],
)
def test_bad_arguments_are_one_clear_line(farm: Farm, tmp_path: Path, arguments: list[str], told: str) -> None:
    store, ledger, _ = farm.store(tmp_path)
    ledger.close()
    records = tmp_path / "records.jsonl"
    records.write_bytes(b"\n".join(msgspec.json.encode(one) for one in HELD_OUT["esteli"]))
    given = [one.format(records=records, folder=tmp_path) for one in arguments]
    program = (
        "import typer; from coordinator.commands.round import round; from protocol.console import run; "
        "a = typer.Typer(); a.command()(round); run(a)"
    )

    done = subprocess.run(
        [sys.executable, "-c", program, "--store", str(store), *given],
        cwd=ROOT, capture_output=True, text=True, timeout=120, env={**os.environ, "COLUMNS": "200"},
    )  # fmt: skip

    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr
