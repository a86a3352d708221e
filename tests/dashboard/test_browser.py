"""The pages in the system's Chromium: nothing fails, nothing sticks out, everything can be read and reached, the line is live."""

from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Browser, Page, expect

from coordinator.app import Coordinator
from protocol.messages import Status
from tests.browsing import CONTRAST, browsing, windows
from tests.dashboard.conftest import PASSWORD, Serving, build
from tests.dashboard.picture import PAGES, log_in
from tests.dashboard.seed import NOW

pytestmark = pytest.mark.browser
LOOKS = {"light": ("light", 1280), "dark": ("dark", 1280), "phone": ("light", 390), "small phone, dark": ("dark", 320)}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with browsing() as browser:
        yield browser


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    coordinator = build(tmp_path_factory.mktemp("fleet"), lambda: NOW, filled=True)
    with_account(coordinator)
    with Serving(coordinator) as serving:
        yield serving


@pytest.fixture
def empty(coordinator: Coordinator) -> Iterator[Serving]:
    with_account(coordinator)
    with Serving(coordinator) as serving:
        yield serving


def with_account(coordinator: Coordinator) -> None:
    coordinator.ledger.add_first_user("ana", coordinator.door._hasher.hash(PASSWORD))


@pytest.fixture
def opened(browser: Browser) -> Iterator[Callable[..., Page]]:
    with windows(browser) as open_page:
        yield open_page


@pytest.mark.parametrize("look", LOOKS)
def test_every_page_loads_cleanly_fits_its_window_and_can_be_read(fleet, opened, look):
    scheme, width = LOOKS[look]
    page = opened(scheme=scheme, width=width)
    log_in(page, fleet)

    for name, path in PAGES.items():
        page.goto(fleet.address + path)
        expect(page.locator("#live")).to_have_class("live on")
        assert page.evaluate("document.documentElement.scrollWidth") <= width, f"{name} sticks out at {width} px"
        ratio, text = page.evaluate(CONTRAST)[0]
        assert ratio >= 4.5, f"{name}: {text!r} has a contrast of {ratio:.2f}"
    assert page.complaints == []


@pytest.mark.parametrize("path", ["/", "/nodes", "/releases", "/rounds", "/escalations", "/audit"])
def test_empty_pages_load_cleanly_and_fit_a_phone(empty, opened, path):
    page = opened(width=320)
    log_in(page, empty)

    page.goto(empty.address + path)

    assert page.evaluate("document.documentElement.scrollWidth") <= 320
    assert page.complaints == []


def test_nothing_is_fetched_from_elsewhere(fleet, opened):
    page, hosts = opened(), set()
    page.on("request", lambda request: hosts.add(request.url.split("/")[2]))

    log_in(page, fleet)
    page.goto(fleet.address + "/releases/3")

    assert hosts == {fleet.address.split("/")[2]}


def test_the_first_account_is_made_in_the_browser(coordinator, opened):
    with Serving(coordinator) as serving:
        page = opened()
        page.goto(serving.address)
        page.fill("#token", coordinator.door.token_file.read_text())
        page.fill("#name", "ana")
        page.fill("#password", PASSWORD)
        page.click("main button")

        expect(page.locator("h1")).to_have_text("No node has spoken yet.")
        page.click("text=Log out ana")
        expect(page).to_have_url(serving.address + "/login")
        assert page.complaints == []


def test_a_change_arrives_on_an_open_page_without_a_reload(empty, opened, coordinator):
    page = opened()
    log_in(page, empty)
    page.goto(empty.address + "/nodes")
    expect(page.locator("#live")).to_have_text("live")
    page.evaluate("window.kept = true")

    coordinator.ledger.seen_status(Status(node="jalapa", boot="b", sequence=1, state="answering"), NOW)
    expect(page.locator("tbody tr")).to_contain_text("answering")
    coordinator.ledger.seen_status(Status(node="jalapa", boot="b", sequence=2, state="no-model"), NOW)
    expect(page.locator("tbody tr")).to_contain_text("no model")

    assert page.evaluate("window.kept") is True, "the page was not loaded again"
    assert page.complaints == []


def test_an_open_overview_grows_its_charts_when_the_first_node_speaks(empty, opened, coordinator):
    page = opened()
    log_in(page, empty)
    expect(page.locator("#live")).to_have_text("live")

    coordinator.ledger.seen_status(Status(node="jalapa", boot="b", sequence=1, state="answering", answered=4), NOW)

    expect(page.locator("h1")).to_contain_text("1 of 1 answering")
    expect(page.locator(".small-chart")).to_have_count(4)


def test_a_cut_line_is_told_with_the_time_it_was_last_true(coordinator, opened):
    with_account(coordinator)
    with Serving(coordinator) as serving:
        page = opened()
        log_in(page, serving)
        expect(page.locator("#live")).to_have_class("live on")

    expect(page.locator("#live")).to_contain_text("line cut; this is as of ")


def test_typing_filters_the_nodes_keeps_the_focus_and_the_address(fleet, opened):
    page = opened()
    log_in(page, fleet)
    page.goto(fleet.address + "/nodes?sort=name")

    page.keyboard.press("/")
    page.keyboard.type("asleep")

    expect(page.locator("tbody tr")).to_have_count(2)
    expect(page.locator("#q")).to_be_focused()
    expect(page).to_have_url(fleet.address + "/nodes?sort=name&q=asleep")
    page.keyboard.press("Escape")
    expect(page.locator("tbody tr")).to_have_count(12)


def test_the_keyboard_goes_everywhere(fleet, opened):
    page = opened()
    log_in(page, fleet)

    for key, path in (("n", "/nodes"), ("r", "/releases"), ("d", "/rounds"), ("e", "/escalations"), ("a", "/audit"), ("o", "/")):
        page.keyboard.press("g")
        page.keyboard.press(key)
        expect(page).to_have_url(fleet.address + path)
    page.keyboard.press("Tab")
    expect(page.locator(".skip")).to_be_focused()
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid", "the focus can be seen"


def test_without_scripts_the_pages_are_whole(fleet, opened):
    page = opened(java_script_enabled=False)
    log_in(page, fleet)

    page.goto(fleet.address + "/")
    assert page.locator(".small-chart svg path.line").count() == 4
    page.goto(fleet.address + "/nodes")
    page.fill("#q", "silent")
    page.press("#q", "Enter")
    assert page.locator("tbody tr").count() == 1


def test_the_reader_chooses_spanish_and_it_stays(fleet, opened):
    page = opened()
    log_in(page, fleet)

    page.click("text=Español")
    page.click("nav >> text=Nodos")

    expect(page.locator("html")).to_have_attribute("lang", "es")
    expect(page.locator("tbody")).to_contain_text("respondiendo")
