"""The node's page in the system's Chromium, on a telephone and a desk, in both languages: it can be read, reached and tapped."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from node.api import routes
from node.api.server import Server, bind
from tests.browsing import CONTRAST, browsing, windows
from tests.node.fake_engine import FakeEngine

pytestmark = pytest.mark.browser
LOOKS = {"phone": ("light", 390), "small phone, dark": ("dark", 320), "desk": ("light", 1280), "desk, dark": ("dark", 1280)}
RECORDS = {
    "leak": ("tank 2.1 m, 1.7 m, 1.2 m; pump off\nnote: charco junto al tubo", " leak: hay fuga cerca del tanque"),
    "normal": ("soil 21 C, 24% 25% 24%; tank 2.1 m", " normal: todo bien"),
    "tank": ("tank 0.2 m; pump on\nnote: sale aire", " tank-low: queda poca agua"),
}
WIDTH = "document.documentElement.scrollWidth"
TARGETS = """() => [...document.querySelectorAll("button, summary, a.button-like, input, textarea")].filter((one) => one.offsetParent)
  .map((one) => [one.getBoundingClientRect().height, one.textContent.trim().slice(0, 30)]).sort((a, b) => a[0] - b[0])[0]"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with browsing() as browser:
        yield browser


@pytest.fixture
def opened(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Windows of a telephone, unless told otherwise."""
    with windows(browser) as open_page:

        def opening(*, width: int = 390, **more: Any) -> Page:
            return open_page(width=width, height=844 if width < 600 else 900, **more)

        yield opening


class Site:
    """A node on a port, and its records."""

    def __init__(self, node: Any, key: str = "") -> None:
        self.node = node
        status = {
            "site": "esteli", "ready": True, "uptime_s": 200_000.0, "examples": 12, "model": {"release": 3, "model_digest": "1a2b3c4d5e"},
            "power": {"joules_today": {"answer": 2_000.0, "idle": 16_000.0}, "source": "solar", "charge": 0.82},
            "link": {"up_bytes": 40_000, "down_bytes": 1_000, "bytes_a_day": 1e5},
            "broker": {"connected": True, "outbox": 0},
        }  # fmt: skip
        app = routes.build(
            node.answering, node.metrics, default_task="ranch", deadline_s=10, status=lambda: status, why_not_ready=lambda: "", key=key,
            clock=node.clock,
        )  # fmt: skip
        self.server = Server(app, bind("127.0.0.1", 0, key=key))
        self.server.start()
        self.url = self.server.url

    def answer(self, name: str, *, sure: bool) -> Any:
        source, said = RECORDS[name]
        self.node.engine.default, self.node.engine.probability = said, 0.98 if sure else 0.3
        return self.node.answer(source, lang="es")


@pytest.fixture
def site(make_node: Callable[..., Any]) -> Iterator[Site]:
    running = Site(make_node(FakeEngine()))
    yield running
    running.server.stop()


@pytest.fixture
def busy(site: Site) -> Site:
    """A site with two sure answers and one to check."""
    site.answer("normal", sure=True)
    site.unsure = site.answer("leak", sure=False)  # type: ignore[attr-defined]
    site.answer("tank", sure=True)
    return site


@pytest.mark.parametrize("locale", ["en-US", "es-NI"])
@pytest.mark.parametrize("look", LOOKS)
def test_the_page_fits_can_be_read_and_tapped_and_is_quiet(busy: Site, opened: Callable[..., Any], look: str, locale: str) -> None:
    scheme, width = LOOKS[look]
    page = opened(scheme=scheme, width=width, locale=locale)

    page.goto(busy.url)
    expect(page.locator("#line")).to_have_text("live" if locale == "en-US" else "en vivo")
    page.locator("#latest summary").first.click()

    assert page.locator("html").get_attribute("lang") == locale[:2]
    assert page.evaluate(WIDTH) <= width
    ratio, text = page.evaluate(CONTRAST)[0]
    assert ratio >= 7.0, f"{text!r} has a contrast of {ratio:.2f}; in the sun it takes 7"
    height, what = page.evaluate(TARGETS)
    assert height >= 44, f"{what!r} is {height:.0f} px high; a thumb in a glove needs 44"
    assert page.complaints == []


@pytest.mark.parametrize(
    ("locale", "button", "saved"), [("en-US", "Pump runs dry", "Saved: Pump runs dry"), ("es-NI", "Bomba sin agua", "Guardado")]
)
def test_one_tap_corrects_and_arrives_in_the_store(busy: Any, opened: Callable[..., Any], locale: str, button: str, saved: str) -> None:
    page = opened(locale=locale, has_touch=True)
    page.goto(busy.url)
    page.evaluate("window.kept = true")

    page.get_by_role("button", name=button).tap()

    expect(page.locator("#said")).to_contain_text(saved)
    row = busy.node.row(busy.unsure.id)
    assert (row.verdict, row.state, row.by) == ("dry-run", "corrected", "operator")
    assert [example.record.verdict for example in busy.node.store.examples("ranch")] == ["dry-run"]
    expect(page.locator("#check .card")).to_have_count(0)
    assert page.evaluate("window.kept") is True, "the page was not loaded again"
    assert page.complaints == []


def test_one_tap_confirms(busy: Any, opened: Callable[..., Any]) -> None:
    page = opened(has_touch=True)
    page.goto(busy.url)

    page.get_by_role("button", name="Yes, that is right").tap()

    expect(page.locator("#said")).to_contain_text("Saved: Water leak")
    assert (busy.node.row(busy.unsure.id).state, busy.node.row(busy.unsure.id).by) == ("confirmed", "operator")


def test_without_scripts_a_tap_is_saved_all_the_same(busy: Any, opened: Callable[..., Any]) -> None:
    page = opened(java_script_enabled=False)
    page.goto(busy.url)

    page.fill("#check input[name=text]", "no llega agua")
    page.click("text=Pump runs dry")

    assert "Saved: Pump runs dry" in page.inner_text("#said")
    assert busy.node.row(busy.unsure.id).text == "dry-run: no llega agua"


def test_an_answer_appears_by_itself_and_never_takes_the_place_of_the_card_in_hand(busy: Any, opened: Callable[..., Any]) -> None:
    page = opened()
    page.goto(busy.url)
    expect(page.locator("#line")).to_have_class("line")
    before = page.locator("[data-card]").get_attribute("data-card")

    new = busy.answer("tank", sure=False)
    expect(page.locator(f"#answer-{new.id}")).to_be_visible()

    assert page.locator("[data-card]").get_attribute("data-card") == before == busy.unsure.id
    expect(page.locator("#check .after")).to_contain_text("1 more waits")


def test_what_somebody_is_writing_is_not_taken_away(busy: Any, opened: Callable[..., Any]) -> None:
    page = opened()
    page.goto(busy.url)
    page.locator("#check input[name=text]").press_sequentially("se rompi")

    new = busy.answer("normal", sure=True)
    expect(page.locator(f"#answer-{new.id}")).to_be_visible()
    page.keyboard.type("ó")

    expect(page.locator("#check input[name=text]")).to_have_value("se rompió")


def test_a_node_that_cannot_be_reached_is_told_and_the_tap_can_be_repeated(busy: Any, opened: Callable[..., Any]) -> None:
    page = opened()
    page.goto(busy.url)
    expect(page.locator("#line")).to_have_text("live")

    page.context.set_offline(True)
    page.get_by_role("button", name="Pump runs dry").click()
    expect(page.locator(".card .problem")).to_contain_text("Not saved: no connection to the node")
    expect(page.locator("#line")).to_contain_text("No connection to the node; this is as of ")
    assert busy.node.row(busy.unsure.id).state == "unconfirmed"

    page.context.set_offline(False)
    page.get_by_role("button", name="Pump runs dry").click()
    expect(page.locator("#said")).to_contain_text("Saved: Pump runs dry")


def test_the_keyboard_reaches_everything_in_order_and_can_be_seen(busy: Any, opened: Callable[..., Any]) -> None:
    page = opened(width=1280)
    page.goto(busy.url)

    page.keyboard.press("Tab")
    expect(page.locator(".skip")).to_be_focused()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="Yes, that is right")).to_be_focused()
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")

    expect(page.locator("#said")).to_contain_text("Saved")


def test_a_screen_reader_finds_names_and_landmarks(busy: Any, opened: Callable[..., Any]) -> None:
    page = opened()
    page.goto(busy.url)

    assert page.get_by_role("main").count() == 1 and page.get_by_role("heading", level=1).count() == 1
    assert page.get_by_role("group", name="No, it is:").get_by_role("button").count() == 15
    assert page.get_by_label("In your words").count() == 1
    nameless = (
        "[...document.querySelectorAll('input, textarea, button')].filter((one) => !one.labels?.length && !one.textContent.trim()).length"
    )
    assert page.evaluate(nameless) == 0
    assert page.locator("blockquote").first.get_attribute("lang") == "es"


def test_nothing_is_fetched_from_elsewhere_and_little_from_here(busy: Any, opened: Callable[..., Any]) -> None:
    page, hosts, sizes = opened(), set[str](), list[int]()
    page.on("request", lambda request: hosts.add(request.url.split("/")[2]))
    page.on("response", lambda response: sizes.append(len(response.body())) if response.ok and "/page/mark" not in response.url else None)

    page.goto(busy.url)
    expect(page.locator("#line")).to_have_text("live")

    assert hosts == {busy.url.split("/")[2]}
    assert sum(sizes) < 64_000, "a page over a weak link stays under 64 kB"


def test_the_reader_chooses_a_language_and_it_stays(busy: Any, opened: Callable[..., Any]) -> None:
    page = opened()
    page.goto(busy.url)

    page.click("text=Español")
    page.goto(busy.url)

    expect(page.locator("html")).to_have_attribute("lang", "es")
    expect(page.locator("h1")).to_have_text("Funciona.")


def test_a_node_with_a_key_asks_for_it_once(make_node: Callable[..., Any], opened: Callable[..., Any], tmp_path: Path) -> None:
    site = Site(make_node(FakeEngine()), key="sesame")
    try:
        given = site.answer("leak", sure=False)
        page = opened(locale="es-NI")
        page.goto(site.url)
        page.fill("#key", "sesame")
        page.click("text=Entrar")
        page.get_by_role("button", name="Sí, está bien").click()
        expect(page.locator("#said")).to_contain_text("Guardado: Fuga de agua")

        assert site.node.row(given.id).by == "operator"
        page.click("text=Salir")
        expect(page).to_have_url(site.url + "/login")
        assert page.complaints == []
    finally:
        site.server.stop()
