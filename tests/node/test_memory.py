"""The memory beside a real store and a real worker, with a small engine; and the file of vectors."""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from node.memory import routes, sharing, table, vectors
from node.memory.recall import Memory
from node.memory.rules import memory_key
from node.memory.vectors import NoVectors, Vectors
from node.settings import Memory as Chosen
from node.store import OPERATOR, AnswerRow
from protocol.digests import digest_bytes
from protocol.errors import BadInput, NotEnough
from protocol.reasons import read
from protocol.tasks import RANCH, task_named
from tests.node.conftest import ROOT, Notes, ask, eventually, reply_to, settings
from tests.node.fake_engine import FakeEngine

ENGINE = {"default": " normal: all is well", "probability": 0.3}
WORDS = {"leak": "pipe wet hiss drop", "dry-run": "pump hot empty loud", "tank-low": "tank light echo pale"}  # what goes with each verdict


@pytest.fixture
def remembering(make_node: Callable[..., Any], tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """A node with a memory; the thread that makes vectors is not started, tests call `step`."""
    made: list[Memory] = []

    def make(use: str = "exact", *, node: Any = None, **chosen: Any) -> Any:
        node = node or make_node(FakeEngine(**ENGINE), asking=Notes())
        memory = Memory(
            node.store, node.worker, tmp_path / f"memory{len(made)}", Chosen(use=use, **chosen), clock=node.clock,
            report=node.asking.report if node.asking else None,
        )  # fmt: skip
        node.memory = node.answering.memory = memory
        routes.add(node.app, memory, task=lambda: "ranch")
        made.append(memory)
        return node

    yield make
    for memory in made:
        memory.stop()


def confirm(node: Any, source: str, verdict: str = "leak", text: str = "the pipe is open") -> Any:
    given = node.answer(source)
    node.answering.correct(given.id, verdict=verdict, text=text)
    return given


def season(node: Any, count: int = 45, **instead: str) -> None:
    """So many confirmed records, a third of each verdict; records of one verdict share words. `instead` names other verdicts for them."""
    with node.store.transaction() as session:
        for number in range(count):
            words = sorted(WORDS)[number % len(WORDS)]
            verdict = instead.get(words, words)
            row = AnswerRow(
                id=f"a{number}", task="ranch", lang="en", source=f"{WORDS[words]} {number}", verdict=verdict,
                text=f"{verdict}: sentence {number}",
            )  # fmt: skip
            node.memory.remember(session, row, origin=OPERATOR, weight=1.0, now=float(number))


def make_vectors(node: Any) -> None:
    for _ in range(100):
        if not node.memory.making.step():
            return
    raise AssertionError("the memory never came to rest")


def learned(node: Any) -> Any:
    season(node)
    make_vectors(node)
    node.engine.prompts.clear()
    return node


# ---- exact


def test_a_record_that_was_corrected_is_answered_without_the_model(remembering: Any) -> None:
    node = remembering()
    first = confirm(node, "tank 3 bar")
    node.engine.prompts.clear()

    again = node.answer("tank  3 bar ")

    assert (again.answer.text, again.state, again.spoken) == ("leak: the pipe is open", "final", None)
    assert (again.recalled.match, again.recalled.source) == ("exact", first.id)
    assert node.engine.prompts == []


def test_an_answer_from_memory_says_so_in_what_is_stored(remembering: Any) -> None:
    node = remembering()
    first = confirm(node, "tank 3 bar")

    row = node.row(node.answer("tank 3 bar").id)

    assert (row.by, row.model_digest, row.state) == ("memory", "", "final")
    reason = str(read(row.reason))
    assert first.id in reason and "confirmed by the operator" in reason
    assert "confirmado por el operador" in read(row.reason).told("es")


def test_an_answer_from_memory_confirms_nothing_and_asks_nobody(remembering: Any) -> None:
    node = remembering()
    confirm(node, "tank 3 bar")
    examples, questions = node.store.example_count("ranch"), len(node.asking.questions)

    node.answer("tank 3 bar")

    assert (node.store.example_count("ranch"), len(node.asking.questions)) == (examples, questions)


def test_a_later_correction_replaces_what_was_remembered_at_once(remembering: Any) -> None:
    node = remembering()
    confirm(node, "tank 3 bar")
    recalled = node.answer("tank 3 bar")

    node.answering.correct(recalled.id, verdict="tank-low", text="the tank is empty")

    assert node.answer("tank 3 bar").answer.text == "tank-low: the tank is empty"


def test_a_peers_reply_is_remembered_and_never_replaces_the_operators_word(remembering: Any) -> None:
    node = remembering()
    node.answer("tank 3 bar")
    node.answering.apply(reply_to(node.asking.questions[0], "dry-run: the pump ran dry", confidence=0.8))
    peers = node.answer("tank 3 bar")
    node.answering.correct(peers.id, verdict="tank-low", text="the tank is empty")
    row = node.row(peers.id)
    with node.store.transaction() as session:
        table.remember(session, row, origin="peer:other", weight=0.9, now=0.0)
        origin = table.exact(session, peers.record).origin

    assert (peers.answer.verdict, peers.judgement.confidence, origin) == ("dry-run", 0.8, OPERATOR)


def test_another_language_is_another_record(remembering: Any) -> None:
    node = remembering()
    confirm(node, "tank 3 bar")

    assert node.answer("tank 3 bar", lang="es").recalled is None


def test_what_is_remembered_is_answered_while_there_is_no_model(remembering: Any) -> None:
    node = remembering()
    confirm(node, "tank 3 bar")
    node.worker.swap_after_current_record(None)

    assert node.answer("tank 3 bar").answer.verdict == "leak"


def test_off_asks_the_model_and_still_remembers(remembering: Any) -> None:
    node = remembering("off")
    confirm(node, "tank 3 bar")

    assert node.answer("tank 3 bar").recalled is None
    assert node.memory.status()["answers"] == 1


def test_a_database_from_before_the_memory_remembers_its_examples(make_node: Any, remembering: Any) -> None:
    node = make_node(FakeEngine(**ENGINE), asking=Notes())
    confirm(node, "tank 3 bar")

    remembering(node=node)

    assert node.answer("tank 3 bar").recalled.match == "exact"


def test_recalled_answers_are_counted_by_match(remembering: Any) -> None:
    node = remembering()
    confirm(node, "tank 3 bar")
    node.answer("tank 3 bar")

    assert 'milpa_node_memory_answers_total{match="exact"} 1.0' in node.metrics.render().decode()


def test_what_is_least_and_longest_ago_of_use_is_forgotten_first(remembering: Any) -> None:
    node = remembering(rows=2)
    for number in range(3):
        node.clock.now += 60
        confirm(node, f"tank {number}")
    node.answer("tank 0")

    node.memory.sweep()

    assert [node.answer(f"tank {number}").recalled is not None for number in range(3)] == [True, False, True]


def test_forgetting_is_at_once_and_takes_the_example_along(remembering: Any) -> None:
    node = remembering()
    confirm(node, "tank 3 bar")

    node.memory.forget(node.memory.listed()[0]["key"][:8])

    assert node.answer("tank 3 bar").recalled is None
    assert node.store.example_count("ranch") == 0


# ---- patterns


def pattern(node: Any, when: str = "chuco el espejo", **fields: Any) -> dict[str, Any]:
    given: dict[str, Any] = {"lang": "en", "verdict": "panel-soiled", "text": "clean the panel", "shareable": False}
    return node.memory.add(RANCH, when=when, **(given | fields))


def test_a_pattern_answers_records_its_words_stand_in(remembering: Any) -> None:
    node = remembering()
    added = pattern(node)

    given = node.answer("sun4 volt3; Chuco el espejo de tierra")

    assert (given.answer.text, given.recalled.match) == ("panel-soiled: clean the panel", "pattern")
    assert added["key"][:12] in given.judgement.reason
    assert given.judgement.why.told("es").startswith("recordado: el patrón 'chuco el espejo' del operador")


def test_the_longest_pattern_wins_and_a_confirmed_record_before_all(remembering: Any) -> None:
    node = remembering()
    pattern(node, "chuco", verdict="leak")
    pattern(node, "chuco el espejo")
    confirm(node, "sun9 chuco el espejo", "tank-low")

    assert node.answer("sun4 chuco el espejo").answer.verdict == "panel-soiled"
    assert node.answer("sun9 chuco el espejo").answer.verdict == "tank-low"


def test_a_pattern_says_how_many_remembered_records_contradict_it(remembering: Any) -> None:
    node = remembering()
    confirm(node, "sun1 chuco el espejo", "panel-soiled")
    confirm(node, "sun2 chuco el espejo", "leak")
    confirm(node, "sun3", "leak")

    added = pattern(node)

    assert (added["fits"], added["against"]) == (2, 1)


@pytest.mark.parametrize("fields", [{"when": "a b"}, {"verdict": "", "text": ""}, {"verdict": "nonsense"}, {"lang": "fr"}])
def test_a_pattern_that_says_too_little_is_refused(remembering: Any, fields: dict[str, str]) -> None:
    with pytest.raises(BadInput):
        pattern(remembering(), **fields)


def test_patterns_are_bounded_and_never_pruned(remembering: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "PATTERNS_LIMIT", 2)
    node = remembering(rows=1)
    pattern(node, "first one")
    pattern(node, "second one")

    with pytest.raises(NotEnough, match="forget one"):
        pattern(node, "third one")
    node.memory.sweep()
    assert node.memory.status()["patterns"] == 2


# ---- sharing


@pytest.mark.rule("event-3")
def test_nothing_leaves_that_the_operator_did_not_mark(remembering: Any) -> None:
    node = remembering()
    confirm(node, "tank 3 bar")
    pattern(node)

    node.memory.sweep()

    assert node.asking.events == []


@pytest.mark.rule("event-3")
def test_a_marked_pattern_leaves_once(remembering: Any) -> None:
    node = remembering()
    added = pattern(node, shareable=True)

    for _ in range(2):
        node.memory._sharing._next = 0.0
        node.memory.sweep()

    assert [(kind, detail["key"], detail["means"]) for kind, _, detail in node.asking.events] == [
        ("pattern", added["key"], "panel-soiled: clean the panel")
    ]
    assert node.memory.listed(shareable=True)[0]["shared"] > 0


def test_a_pattern_that_is_no_longer_marked_stays(remembering: Any) -> None:
    node = remembering()
    node.memory.share(pattern(node, shareable=True)["key"], shareable=False)

    node.memory.sweep()

    assert node.asking.events == []


def test_a_changed_pattern_leaves_again(remembering: Any) -> None:
    node = remembering()
    pattern(node, shareable=True)
    node.memory.sweep()
    pattern(node, shareable=True, text="wash it")
    node.memory._sharing._next = 0.0
    node.memory.sweep()

    assert [detail["means"] for _, _, detail in node.asking.events] == ["panel-soiled: clean the panel", "panel-soiled: wash it"]


def test_a_pattern_waits_for_a_link_rich_enough(remembering: Any) -> None:
    node = remembering()
    pattern(node, shareable=True)
    asked: list[int] = []
    poor = sharing.Sharing(node.store, report=node.asking.report, may_spend=lambda cost: bool(asked.append(cost)), clock=node.clock)

    assert poor.sweep() == 0
    assert node.asking.events == [] and asked[0] > sharing.ENVELOPE_BYTES
    assert node.memory.listed(shareable=True)[0]["shared"] == 0


def test_an_answer_cannot_be_shared(remembering: Any) -> None:
    node = remembering()
    confirm(node, "tank 3 bar")

    with pytest.raises(BadInput, match="only patterns"):
        node.memory.share(node.memory.listed()[0]["key"], shareable=True)


# ---- near and examples


def test_similar_records_that_agree_answer_without_the_model(remembering: Any) -> None:
    node = learned(remembering("near", near_right=0.8))

    given = node.answer(f"{WORDS['leak']} 99")

    assert (given.answer.verdict, given.recalled.match) == ("leak", "near")
    assert node.engine.prompts == [] and f"{given.recalled.similarity:.3f} alike" in given.judgement.reason
    assert "registros parecidos dicen esto" in given.judgement.why.told("es") and "el operador" in given.judgement.why.told("es")
    assert given.judgement.confidence >= 0.8


def test_a_record_like_nothing_remembered_goes_to_the_model(remembering: Any) -> None:
    node = learned(remembering("near", near_right=0.8))

    assert node.answer("quite another thing").recalled is None
    assert len(node.engine.prompts) == 1


def test_until_a_similarity_is_trusted_near_makes_no_vector_of_a_record(remembering: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    node = remembering("near")
    season(node, 6)
    make_vectors(node)
    monkeypatch.setattr(node.engine, "embed", lambda text: pytest.fail("a vector was made while a record waited"))

    assert node.answer(f"{WORDS['leak']} 99").recalled is None


def test_a_correction_counts_for_near_answers_at_once(remembering: Any) -> None:
    node = learned(remembering("near", near_right=0.8))
    season(node, **{"dry-run": "overflow"})

    assert node.answer(f"{WORDS['dry-run']} 99").answer.verdict == "overflow"


def test_examples_show_the_model_the_nearest_records_and_say_so(remembering: Any) -> None:
    node = learned(remembering("examples"))

    given = node.answer(f"{WORDS['leak']} 99")

    assert given.recalled is None and "3 remembered records shown" in given.judgement.reason
    assert node.engine.prompts[0].count("leak: sentence") == 3 and node.engine.prompts[0].endswith("99\nen:")
    assert node.row(given.id).prompt == f"{WORDS['leak']} 99\nen:"  # what a peer is asked is the record alone


def test_examples_that_do_not_fit_the_context_are_left_out(remembering: Any) -> None:
    node = learned(remembering("examples"))
    long = " ".join([WORDS["leak"]] * 125)  # 500 of the 512 words the engine reads

    assert "shown" not in node.answer(long).judgement.reason


def test_another_model_makes_its_own_vectors_while_exact_answers_go_on(remembering: Any) -> None:
    from node.engine.worker import Speaker

    node = learned(remembering("near", near_right=0.8))
    node.worker.swap_after_current_record(Speaker(FakeEngine(name="another", **ENGINE), "ranch", release=2))

    exact, near = node.answer(f"{WORDS['leak']} 1"), node.answer(f"{WORDS['leak']} 99")
    make_vectors(node)

    assert (exact.recalled.match, near.recalled) == ("exact", None)
    assert node.answer(f"{WORDS['leak']} 98").recalled.match == "near"


def test_vectors_are_not_made_while_records_wait_or_power_is_short(remembering: Any) -> None:
    node = remembering("near")
    season(node, 6)
    node.memory.making.may_work = lambda: False

    assert node.memory.making.step() == 0.0 and node.memory.status()["vectors"] == 0


def test_making_vectors_goes_on_where_it_was_left(remembering: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    node = remembering("near")
    season(node, 30)
    node.memory.making.step()
    made = node.memory.status()["vectors"]
    embedded: list[str] = []
    embed = node.engine.embed
    monkeypatch.setattr(node.engine, "embed", lambda text: (embedded.append(text), embed(text))[1])
    after = Memory(node.store, node.worker, node.memory._vectors.path.parent, Chosen(use="near"), clock=node.clock)

    while after.making.step():
        pass

    assert 0 < made < 30 and len(embedded) == 1 + 30 - made  # one more tells the model and the size of its vectors
    after.stop()


def test_a_node_that_remembers_nothing_makes_no_file(remembering: Any) -> None:
    node = remembering("near")

    assert node.memory.making.step() == 0.0
    assert not node.memory._vectors.path.exists()


def test_the_disk_limit_bounds_the_vectors(remembering: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    node = remembering("near")
    season(node, 12)
    monkeypatch.setattr("node.memory.making.room_for", lambda max_bytes, size: 5)

    make_vectors(node)

    assert node.memory.status()["vectors"] == 5


def test_a_record_the_model_cannot_read_gets_no_vector_and_neither_its_text_nor_its_digest_is_logged(
    remembering: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    node = remembering("near")
    season(node, 3)
    cannot, embed = f"{WORDS['leak']} 1", node.engine.embed

    def read(text: str) -> Any:
        if text.endswith(" 1"):
            raise BadInput(f"{text!r} does not fit the model's context")
        return embed(text)

    monkeypatch.setattr(node.engine, "embed", read)
    with caplog.at_level(logging.DEBUG):
        make_vectors(node)

    assert node.memory.status()["vectors"] == 2
    assert "gets no vector" in caplog.text
    assert not [told for told in (cannot, memory_key("ranch", "en", cannot), digest_bytes(cannot.encode())) if told in caplog.text]


def test_without_the_extension_exact_answers_go_on(remembering: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sqlite_vec", None)
    node = remembering("near")
    season(node, 3)

    with pytest.raises(NoVectors, match=r"install-node\.sh again"):
        node.memory.making.step()
    assert node.answer(f"{WORDS['leak']} 1").recalled.match == "exact"


def test_a_damaged_file_is_made_anew_and_exact_answers_go_on(remembering: Any) -> None:
    node = learned(remembering("near", near_right=0.8))
    path = node.memory._vectors.path
    node.memory._vectors.close()
    path.write_bytes(b"junk" * 4096)

    first = node.answer(f"{WORDS['leak']} 1")
    node.answer(f"{WORDS['leak']} 99")
    make_vectors(node)

    assert first.recalled.match == "exact" and node.memory._vectors.remade == 1
    assert node.answer(f"{WORDS['leak']} 98").recalled.match == "near"


# ---- the file


def unit(seed: int, size: int = 8) -> Any:
    vector = np.random.default_rng(seed).standard_normal(size).astype(np.float32)
    return vector / np.linalg.norm(vector)


def test_the_nearest_are_the_exact_nearest_of_the_scope(tmp_path: Path) -> None:
    file = Vectors(tmp_path / "memory.db")
    file.put("m", [(f"{seed}", "ranch/es" if seed % 2 else "ranch/en", unit(seed)) for seed in range(400)])

    found = file.nearest("m", unit(1000), scope="ranch/es", count=3)

    wanted = sorted(((float(unit(seed) @ unit(1000)), f"{seed}") for seed in range(1, 400, 2)), reverse=True)[:3]
    assert [key for key, _ in found] == [key for _, key in wanted]
    assert [similarity for _, similarity in found] == pytest.approx([similarity for similarity, _ in wanted], abs=1e-5)
    file.close()


def test_the_vectors_of_another_model_are_emptied(tmp_path: Path) -> None:
    file = Vectors(tmp_path / "memory.db")
    file.put("m", [("a", "s", unit(1))])

    assert file.keys("m", 8) == {"a"}
    assert file.keys("another", 16) == set()
    file.close()


def test_deleted_vectors_make_room_for_new_ones(tmp_path: Path) -> None:
    file = Vectors(tmp_path / "memory.db")
    file.put("m", [(f"0-{index}", "s", unit(index)) for index in range(512)])
    file.close()
    before = file.path.stat().st_size

    for turn in range(1, 4):
        file.drop([f"{turn - 1}-{index}" for index in range(512)])
        file.put("m", [(f"{turn}-{index}", "s", unit(index)) for index in range(512)])
    file.close()

    assert file.path.stat().st_size <= 1.2 * before


def test_a_kill_while_vectors_are_written_leaves_a_file_that_opens(tmp_path: Path) -> None:
    script = (
        "import sys, numpy as np; from pathlib import Path; from node.memory.vectors import Vectors\n"
        "file = Vectors(Path(sys.argv[1])); v = np.ones(64, dtype=np.float32) / 8\n"
        "for i in range(10**6):\n file.put('m', [(f'{i}-{j}', 's', v) for j in range(16)]); print(i, flush=True)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "memory.db")], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    for _ in range(20):
        last = int(child.stdout.readline())
    os.kill(child.pid, signal.SIGKILL)
    child.wait(30)
    child.stdout.close()

    file = Vectors(tmp_path / "memory.db")

    assert len(file.keys("m", 64)) >= 16 * (last + 1) and file.remade == 0
    file.close()


def test_room_is_what_the_disk_limit_leaves() -> None:
    assert vectors.room_for(64 << 20, 640) > 10_000
    assert vectors.room_for(1, 640) == 0


# ---- outside


def test_the_api_lists_adds_shares_and_forgets(remembering: Any) -> None:
    node = remembering()
    client = node.client()
    added = client.post("/v1/memory", json={"when": "chuco el espejo", "verdict": "panel-soiled", "text": "clean it"}).json()

    assert client.get("/v1/memory").json()["data"][0]["key"] == added["key"]
    assert client.post(f"/v1/memory/{added['key']}", json={"shareable": True}).json()["shareable"] is True
    assert [one["when"] for one in client.get("/v1/memory", params={"shareable": True}).json()["data"]] == ["chuco el espejo"]
    assert client.delete(f"/v1/memory/{added['key']}").status_code == 200
    assert client.get("/v1/memory").json()["data"] == []
    assert client.post("/v1/memory", json={"when": "x"}).status_code == 400


def test_a_completion_from_memory_names_no_model_and_counts_no_token(remembering: Any) -> None:
    node = remembering()
    confirm(node, "tank 3 bar")

    body = node.client().post("/v1/completions", json={"prompt": "tank 3 bar"}).json()

    assert (body["model"], body["usage"]["total_tokens"], body["x_milpa"]["memory"]["match"]) == ("milpa-memory", 0, "exact")


def test_the_command_line_works_on_the_folder_when_no_node_runs(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from node.cli import app
    from node.store import Store

    Store(tmp_path / "node.db").close()
    folder = ["--state-dir", str(tmp_path)]
    run = CliRunner(env={"MILPA_NODE_API_PORT": "1"}).invoke

    added = run(app, ["memory", "add", "chuco el espejo", "--verdict", "panel-soiled", "--shareable", *folder])
    listed = run(app, ["memory", "list", "--shareable", *folder])
    key = listed.output.split()[0]
    stopped = run(app, ["memory", "share", key, "--stop", *folder])
    gone = run(app, ["memory", "forget", key, *folder])

    assert (added.exit_code, listed.exit_code, stopped.exit_code, gone.exit_code) == (0, 0, 0, 0)
    assert "chuco el espejo" in listed.output and "stays here" in stopped.output
    assert "nothing" in run(app, ["memory", "list", *folder]).output


def test_an_exact_look_costs_less_than_a_tenth_of_an_answer(remembering: Any) -> None:
    node = remembering()
    with node.store.transaction() as session:
        for number in range(2_000):
            source = f"tank {number}"
            session.add(
                table.MemoryRow(
                    key=digest_bytes(source.encode()), kind="answer", task="ranch", lang="en", source=source, words="", text="leak: x",
                    verdict="leak", origin=OPERATOR, weight=1.0, answer="", created=0.0, uses=0, used=0.0, shareable=False, shared=0.0,
                )
            )  # fmt: skip
    record, took = node.answer("soil 9").record, []
    for _ in range(20):
        began = time.perf_counter()
        assert node.memory.recall(record, task_named("ranch"), deadline_s=1) is None
        took.append(time.perf_counter() - began)

    assert sorted(took)[10] < 0.005  # seconds; an answer takes 50 ms


@pytest.mark.parametrize(
    ("use", "running", "state", "says"),
    [
        ("exact", {}, "good", "from memory"),
        ("near", {}, "warn", "damaged"),
        ("near", {"memory": {"problem": "the disk is full"}}, "warn", "disk is full"),
        ("near", {"memory": {"answers": 7, "to_make": 0, "trusted": {}}}, "good", "no similarity is trusted yet, of 7"),
    ],
)
def test_the_doctor_says_what_keeps_the_memory_from_working(tmp_path: Path, use: str, running: Any, state: str, says: str) -> None:
    from node.doctor import remembered

    chosen = settings(tmp_path, memory__use=use)
    chosen.state_dir.mkdir()
    (chosen.state_dir / "memory.db").write_bytes(b"junk" * 100)

    found = remembered.memory(chosen, running=running)

    assert found.state == state and says in found.found


def test_the_doctor_names_the_libraries_that_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from node.doctor import remembered

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    found = remembered.memory(settings(tmp_path, memory__use="examples"), running={})

    assert "apsw and sqlite_vec" in found.found and "install-node.sh again" in found.advice


@pytest.mark.llama
def test_a_daemon_remembers_a_correction_and_shows_it(tmp_path: Path, tiny: Path, start: Any) -> None:
    daemon = start(settings(tmp_path, model__path=str(tiny), memory__use="near"))
    given = ask(daemon.server.url).json()["x_milpa"]
    httpx.post(daemon.server.url + "/v1/feedback", json={"id": given["id"], "verdict": "leak", "text": "a pipe"}, timeout=30)

    again = ask(daemon.server.url).json()["x_milpa"]
    eventually(lambda: httpx.get(daemon.server.url + "/v1/status", timeout=30).json()["memory"]["vectors"] == 1)

    assert (again["text"], again["memory"]["answer"]) == ("leak: a pipe", given["id"])
    assert "milpa_node_memory_vectors 1.0" in httpx.get(daemon.server.url + "/metrics", timeout=30).text


def test_what_the_model_had_said_is_known_of_its_own_answers_only(remembering: Any) -> None:
    node = remembering()
    confirm(node, "tank 3 bar")
    node.answering.correct(node.answer("tank 3 bar").id, verdict="tank-low", text="the tank is empty")
    confirm(node, "soil 9")

    with node.store.transaction() as session:
        found = table.meanings(session, RANCH)["en"].values()

    assert sorted((one.meaning, one.model) for one in found) == [("leak", "normal"), ("tank-low", None)]
