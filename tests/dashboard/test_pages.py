"""Every page, empty and filled; what it says, and what it keeps from breaking."""

import json
import re
from pathlib import Path

import pytest

from coordinator import dashboard
from coordinator.dashboard.catalogue import TEXTS
from coordinator.dashboard.views.nodes import SLEEP_GRACE_S, shown_state
from coordinator.dashboard.views.overview import first_page
from coordinator.dashboard.views.series import wilson
from coordinator.dashboard.words import Words, language, texts_used
from coordinator.fleet import tables
from protocol.messages import Event, Status
from tests.dashboard.seed import NOW, PEER, evidence, release

PAGES = ("/", "/nodes", "/releases", "/rounds", "/escalations", "/audit")
TEMPLATES = Path(dashboard.__file__).parent / "templates"


def text(page: str) -> str:
    """What a reader sees, in one line."""
    body = re.sub(r"<(script|style|title)\b.*?</\1>", "", page, flags=re.S)
    return " ".join(re.sub(r"<[^>]+>", " ", body).split())


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("lang", ["en", "es"])
def test_every_page_of_an_empty_fleet_loads_and_teaches(client, page, lang):
    answer = client.get(f"{page}?lang={lang}")

    assert answer.status_code == 200 and f'<html lang="{lang}">' in answer.text
    if page != "/audit":
        assert 'class="command"' in answer.text, "an empty page shows the command that fills it"


@pytest.mark.parametrize("page", [*PAGES, "/nodes/esteli", "/nodes/apanas", "/releases/1", "/releases/3", "/rounds/1", "/rounds/2"])
@pytest.mark.parametrize("lang", ["en", "es"])
def test_every_page_of_a_fleet_loads(filled, page, lang):
    answer = filled.get(f"{page}?lang={lang}")

    assert answer.status_code == 200 and "None" not in text(answer.text)


def test_the_overview_says_in_one_sentence_how_the_fleet_is(filled):
    sentence = text(re.search(r"<h1.*?</h1>", filled.get("/?lang=en").text, re.S)[0])

    assert re.fullmatch(r"7 of 12 answering ?, 2 asleep until 12:36 ?, release 3 on 92% ?, 1\d\.\d% asked a peer ?\.", sentence), sentence


def test_what_needs_a_person_comes_red_first_and_each_with_one_action(filled):
    needs = re.findall(r'<li class="(\w+)">(.*?)</li>', filled.get("/?lang=en").text, re.S)

    told = [(level, text(line)) for level, line in needs]
    assert told[0] == ("red", "apanas refused the latest release: needs 600 MB of memory, 512 are free See what it said")
    assert ("amber", "somoto has been silent since 06:46 See its last hours") in told
    assert all(line.count("<a ") == 1 for _, line in needs)


def test_the_sentence_and_the_list_agree_on_who_is_silent(filled):
    page = text(filled.get("/nodes?lang=en&q=silent").text)

    assert "somoto" in page and "esteli" not in page


def test_nodes_filter_by_every_word_and_keep_it_in_the_links(filled):
    page = filled.get("/nodes?lang=en&q=answering+base").text

    assert re.findall(r'<th scope="row"><a href="/nodes/([^"]+)"', page) == [PEER]
    assert "q=answering+base&amp;sort=release" in page


def test_nodes_sort_by_a_column_both_ways(filled):
    def names(query: str) -> list[str]:
        return re.findall(r'<th scope="row"><a href="/nodes/([^"]+)"', filled.get(f"/nodes?{query}").text)

    up, down = names("sort=name"), names("sort=name&order=desc")
    assert up == sorted(up) and down == up[::-1] and len(up) == 12


def test_a_node_page_tells_starts_releases_refusals_rounds_and_questions(filled):
    page = text(filled.get("/nodes/ocotal?lang=en").text) + text(filled.get("/nodes/apanas?lang=en").text)

    assert "Started" in page and "Runs release 2" in page
    assert "Refused release 3: needs 600 MB of memory, 512 are free" in page
    assert "Its adapter was refused in round 2: not-finite" in page
    assert f"Asked {PEER}: no reply in time" in page and re.search(r"Answered \d+ since .*?; a peer upgraded \d+ and confirmed \d+", page)


def test_a_release_shows_its_evidence_beside_the_one_before_and_what_got_worse_first(filled):
    page = filled.get("/releases/3?lang=en").text

    assert "79.2%" in page and "77.6%" in page, "this release and the one before it"
    assert "milpa-coordinator evaluate --task ranch" in page
    for table in re.findall(r'<table class="dense categories">.*?</table>', page, re.DOTALL):
        changes = [int(value.replace("−", "-").replace("+", "")) for value in re.findall(r'data-label="Change, points">([−+\d]+)', table)]
        assert changes == sorted(changes) and changes[0] < 0


def test_a_release_shows_kinds_of_record_and_marks_what_the_evidence_named_as_lost(filled):
    page = filled.get("/releases/3?lang=en").text

    assert "13 points fewer answers keep the numbers" in page
    marks = re.findall(r'<tr( class="worse")?><th scope="row">(numbers, \w+|length: short, chrF)</th>', page)
    assert [name for marked, name in marks if marked] == ["numbers, kept"] and len(marks) == 3
    assert "longitud: corta, chrF" in filled.get("/releases/3?lang=es").text


def test_a_release_whose_answers_are_text_has_kinds_of_record_where_it_has_no_verdicts(client, coordinator):
    bundle = evidence(1, 588, seed=1)
    del bundle["sets"]["general"]["codes"]
    coordinator.ledger.add_release(release(1), bundle, NOW)

    page = client.get("/releases/1?lang=en").text

    assert page.count('<table class="dense categories">') == 1
    assert re.search(r"numbers, chrF 64% 71% −7 310", text(page))


def test_a_round_bundle_shows_the_release_before_on_the_same_records_and_the_teacher_of_then(client, coordinator):
    coordinator.ledger.add_release(release(1), evidence(1, 588, seed=1), NOW)
    models = {"student": {"accuracy": 0.81, "n": 300}, "release-1": {"accuracy": 0.77, "n": 300}}
    coordinator.ledger.add_release(release(2), {"sets": {"general": {"models": models}}}, NOW)

    page = text(client.get("/releases/2?lang=en").text)

    assert re.search(r"Teacher measured with release 1 88\.0%", page)
    assert re.search(r"Student 81\.0% n=300 – .*Student Release 1, same records 77\.0% n=300", page)
    assert "73.5%" not in page, "the older bundle is of other records"


def test_a_figure_without_evidence_is_not_shown(client, coordinator):
    bundle = evidence(1, 588, seed=1)
    del bundle["sets"]["general"]["models"]["student"]["accuracy_ci"]
    del bundle["sets"]["general"]["models"]["student"]["tokens_per_second"]
    del bundle["sets"]["esteli"]
    coordinator.ledger.add_release(release(1), bundle, NOW)
    coordinator.ledger.add_release(release(2), None, NOW)

    one, two = client.get("/releases/1?lang=en").text, client.get("/releases/2?lang=en")
    assert "73.5%" in one and "118" not in text(one)
    assert "came without evidence" in two.text and not re.search(r"\d\.\d%", text(two.text))
    assert "Release 2 has no evidence" in text(client.get("/").text)


@pytest.mark.parametrize(
    "broken",
    [
        {}, {"sets": []}, {"sets": {"general": {"models": 5}}}, {"sets": {"general": {"models": {"student": {"accuracy": "high"}}}}},
        {"student": {"chrf": 41.2}}, {"sets": {"general": {"codes": [{"n": 0}], "confidence": {"curve": [["a", 1]]}}}},
    ],
)  # fmt: skip
def test_a_bundle_with_missing_or_strange_parts_breaks_no_page(client, coordinator, broken):
    coordinator.ledger.add_release(release(1), broken, NOW)

    assert [client.get(page).status_code for page in ("/releases", "/releases/1", "/escalations", "/")] == [200] * 4


def test_a_round_tells_who_was_asked_merged_refused_and_missing(filled):
    page = text(filled.get("/rounds/1?lang=en").text)

    assert "5 asked, 3 merged, 1 refused, 1 without an adapter" in page
    assert "not-finite: 12 of 163,840 numbers are NaN" in page and "somoto nothing came" in page
    assert "esteli 65.5% 70.1% +4.6" in page
    assert "became release 2" in page


def test_escalations_show_the_curve_with_its_operating_point_and_the_peer(filled):
    page = filled.get("/escalations?lang=en").text

    assert page.count('class="share-plot"') == 2
    assert "Operating point in the evidence: 19.0% asked" in text(page)
    assert re.search(rf'<a href="/nodes/{PEER}">{PEER}</a>', page)


def test_refused_payloads_and_record_texts_are_never_printed(client, coordinator):
    coordinator.ledger.add_refused("milpa/v1/node/x/event", b"la vaca tiene fiebre", "does not decode", NOW)

    page = client.get("/audit").text
    assert "milpa/v1/node/x/event" in page and "vaca" not in page


def test_hostile_text_is_shown_and_not_run(client, coordinator):
    nasty = '<script>alert("x")</script>'
    kept = release(1)
    coordinator.ledger.add_release(type(kept)(number=1, task="ranch", created=1, files=kept.files, note=nasty), {"sets": {nasty: {}}}, NOW)
    coordinator.ledger.seen_status(Status(node="esteli", boot="b", sequence=1, state="answering", role=nasty[:32], version=nasty), NOW)
    coordinator.ledger.add_event(Event(id="e", node="esteli", kind="release-refused", figures={"number": 1}, detail={"reason": nasty}), NOW)
    coordinator.ledger.add_refused(nasty, b"", nasty, NOW)

    pages = [client.get(page).text for page in (*PAGES, "/nodes/esteli", "/releases/1", f"/nodes?q={nasty}")]
    assert sum(page.count("&lt;script&gt;alert") for page in pages) >= 6
    assert not any("<script>alert" in page for page in pages)


@pytest.mark.parametrize("page", ["/nodes/nobody", "/releases/99", "/releases/x", "/rounds/99", "/rounds/" + "9" * 40, "/nowhere"])
def test_what_is_not_there_is_said_plainly(client, page):
    answer = client.get(page, headers={"accept": "text/html"})

    assert answer.status_code == 404 and "Nothing else is wrong" in answer.text


def test_a_ledger_that_does_not_answer_is_said_plainly_and_nothing_leaks(client, coordinator):
    with coordinator.ledger.write() as connection:
        connection.exec_driver_sql("ALTER TABLE nodes RENAME TO gone")

    answer = client.get("/?lang=en")
    assert answer.status_code == 503 and "Nodes go on answering" in answer.text and "sqlite" not in answer.text


def test_the_audit_page_says_when_a_row_was_changed(client, coordinator):
    with coordinator.ledger.write() as connection:
        connection.execute(tables.audit.update().where(tables.audit.c.id == 1).values(actor="somebody"))

    assert "Row 1 does not follow" in client.get("/audit").text
    assert "The audit was changed at row 1" in text(client.get("/").text)


def test_the_audit_exports_every_row(filled):
    rows = [json.loads(line) for line in filled.get("/audit.jsonl").text.splitlines()]

    assert [row["id"] for row in rows] == list(range(len(rows), 0, -1)) and rows[0]["hash"]


@pytest.mark.parametrize(
    "status,quiet,refusal,shown",
    [
        ("answering", 10, "", "answering"), ("answering", 901, "", "silent"), ("lost", 10, "", "silent"),
        ("answering", 10, "no room", "refused"), ("answering", 901, "no room", "silent"),
        ("stopped", 90_000, "", "stopped"), ("no-model", 10, "", "no-model"), ("updating", 10, "", "updating"),
    ],
)  # fmt: skip
def test_a_state_is_what_was_said_last_unless_silence_outweighs_it(status, quiet, refusal, shown):
    row = {"state": status, "last_seen": NOW - quiet, "sleeping_until": 0}

    assert shown_state(row, now=NOW, silent_after_s=900, refusal=refusal) == shown


def test_announced_sleep_is_no_silence_until_it_is_overdue():
    row = {"state": "sleeping", "last_seen": NOW - 30_000, "sleeping_until": NOW - 60}

    assert shown_state(row, now=NOW, silent_after_s=900, refusal="") == "asleep"
    assert shown_state(row, now=NOW + SLEEP_GRACE_S, silent_after_s=900, refusal="") == "silent"


def test_increments_are_counted_within_a_boot(client, coordinator):
    for sequence, (boot, answered, escalated) in enumerate([("a", 10, 1), ("a", 30, 3), ("b", 5, 1)], start=1):
        coordinator.ledger.seen_status(
            Status(node="esteli", boot=boot, sequence=sequence, state="answering", answered=answered, escalated=escalated),
            NOW - 300 + sequence,
        )

    view = first_page(coordinator.ledger, now=NOW, silent_after_s=900)

    assert view.asked == pytest.approx(4 / 35)
    assert next(one.whole.value for one in view.series if one.kind == "answers") == 35


def test_wilson_interval_agrees_with_the_published_example():
    low, high = wilson(81, 263)  # Newcombe 1998, table I

    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)


def test_every_text_that_a_template_names_is_in_the_catalogue_and_both_languages_fill_in_the_same():
    used = {key for template in TEMPLATES.glob("*.html") for key in texts_used(template.read_text())}

    missing = {key for key in used if key not in TEXTS and not any(known.startswith(key) for known in TEXTS if key.endswith((".", "-")))}
    assert missing == set()
    for key, (english, spanish) in TEXTS.items():
        fields = [sorted(set(re.findall(r"{(\w+)}", one))) for one in (english, spanish)]
        assert fields[0] == fields[1] and english.count("|") == spanish.count("|"), key


def test_language_follows_the_request_then_the_cookie_then_the_browser():
    assert language("es", "en", "en") == ("es", True)
    assert language("", "es", "en-US") == ("es", True)
    assert language("", "", "fr, es-NI;q=0.8, en;q=0.5") == ("es", False)
    assert language("", "", "fr") == ("en", False)
    assert language("<script>", "xx", "") == ("en", False)


def test_numbers_and_times_follow_the_reader():
    import zoneinfo

    spanish = Words(lang="es", comma=True, zone=zoneinfo.ZoneInfo("America/Managua"), now=NOW)
    english = Words(lang="en", comma=False, zone=zoneinfo.ZoneInfo("UTC"), now=NOW)

    assert (spanish.number(1234.5, 1), english.number(-1234.5, 1), english.percent(0.031)) == ("1.234,5", "−1,234.5", "3.1%")
    assert (spanish.clock(NOW), english.clock(NOW), english.clock(NOW - 86_400)) == ("05:06", "11:06", "17 Nov, 11:06")
    assert english.time(2**52) == "–", "a node's clock may say anything"
