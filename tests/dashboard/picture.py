"""Takes the dashboard's picture for the README: `python -m tests.dashboard.picture docs/images/dashboard.png`.

With a folder instead of a file: every page, light, dark and phone, for looking at them.
"""

import sys
import tempfile
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from tests.browsing import chromium
from tests.dashboard.conftest import PASSWORD, Serving, build
from tests.dashboard.seed import NOW

PAGES = {
    "overview": "/", "nodes": "/nodes", "node": "/nodes/ocotal", "releases": "/releases", "release": "/releases/3", "rounds": "/rounds",
    "round": "/rounds/2", "escalations": "/escalations", "audit": "/audit",
}  # fmt: skip


def log_in(page: Page, serving: Serving, name: str = "ana") -> None:
    page.goto(serving.address + "/login")
    page.fill("#name", name)
    page.fill("#password", PASSWORD)
    page.click("main button")
    page.wait_for_url(serving.address + "/")


def main(target: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        coordinator = build(Path(folder), lambda: NOW, filled=True)
        coordinator.ledger.add_first_user("ana", coordinator.door._hasher.hash(PASSWORD))
        with Serving(coordinator) as serving, sync_playwright() as playwright:
            browser = chromium(playwright)
            looks = (("light", 1280), ("dark", 1280), ("light", 390)) if target.is_dir() else (("light", 1280),)
            for scheme, width in looks:
                context = browser.new_context(
                    color_scheme=scheme,
                    viewport={"width": width, "height": 800},
                    device_scale_factor=2 if target.suffix else 1,
                    locale="en-US",
                )  # type: ignore[arg-type]
                page = context.new_page()
                log_in(page, serving)
                for name, path in PAGES.items() if target.is_dir() else [("overview", "/")]:
                    page.goto(serving.address + path)
                    page.wait_for_selector(".live.on")
                    page.screenshot(
                        path=str(target / f"{name}-{scheme}-{width}.png" if target.is_dir() else target), full_page=target.is_dir()
                    )
                context.close()
            browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
