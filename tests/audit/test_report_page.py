"""The report in a real browser: alone, on a phone, on paper, by keyboard, for screen readers."""

import json

import pytest
import yaml
from browser import page
from tests_config import TINY

from audit.store import Store
from flows.conduct import conduct
from flows.config import read_plan

EVIL = "<img src=x onerror=alert(1)><script>alert(2)<script>"
SECTIONS = ("criteria", "confirmation", "the-matrix", "sensitivity", "certificate", "coverage",
            "calibration-data", "data-and-protocol", "environment", "limits", "verify",
            "reproduce")  # fmt: skip


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The report of a sweep whose name tries to be markup."""
    folder = tmp_path_factory.mktemp("report")
    config = yaml.safe_load(yaml.safe_dump(TINY)) | {"name": EVIL, "sensitivity": {"examples": 16}}
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(config))
    store = Store(folder / "mlruns")
    result = conduct(read_plan(path), path.read_text(), store)
    return next(store.spool.glob("*/decision/*/files/report.html")), result


def test_one_page_that_asks_for_nothing_and_runs_nothing(report):
    path, result = report
    with page() as tab:
        asked, dialogs = [], []
        tab.on("request", lambda request: asked.append(request.url))
        tab.on("dialog", lambda dialog: dialogs.append(dialog.message))
        tab.goto(path.as_uri())
        assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
        assert dialogs == []
        assert tab.locator("script").count() == 0
        assert tab.title().startswith(EVIL)
        assert tab.locator("h1").inner_text() == f"ACCEPT: {result['decision']['cell']}"
        assert tab.locator("main > section").first.bounding_box()["y"] < 120, "verdict first"
        for section in SECTIONS:
            assert tab.locator(f"h2#{section}").count() == 1, section
        for link in tab.locator("nav a").all():
            assert tab.locator(link.get_attribute("href")).count() == 1


def test_the_heat_map_holds_every_cell(report):
    path, result = report
    with page() as tab:
        tab.goto(path.as_uri())
        shown = tab.locator("table.heat td").all_inner_texts()
        values = sorted(text.split()[0] for text in shown if text != "–")
        assert values == sorted(f"{c['metrics']['accuracy']:.4f}" for c in result["cells"])
        assert tab.locator("table.heat td.chosen").count() == 1


def test_it_is_accessible(report):
    from axe_playwright_python.sync_playwright import Axe

    path, _ = report
    with page() as tab:
        tab.goto(path.as_uri())
        for details in tab.locator("details").all():
            details.evaluate("d => d.open = true")
        found = Axe().run(tab).response["violations"]
        assert [(v["id"], [n["target"] for n in v["nodes"]][:3]) for v in found] == []


def test_by_keyboard_the_first_stop_leads_to_the_verdict(report):
    path, _ = report
    with page() as tab:
        tab.goto(path.as_uri())
        tab.keyboard.press("Tab")
        assert tab.evaluate("document.activeElement.textContent") == "Skip to the verdict"
        assert tab.locator(".skip").bounding_box()["x"] >= 0
        reached = set()
        for _ in range(60):
            tab.keyboard.press("Tab")
            reached.add(tab.evaluate("document.activeElement.tagName"))
        assert {"A", "DIV", "SUMMARY"} <= reached, "links, tables that scroll, details"


def test_on_a_phone_nothing_but_tables_scrolls_sideways(report):
    path, _ = report
    with page(375, 700) as tab:
        tab.goto(path.as_uri())
        assert tab.evaluate("document.documentElement.scrollWidth") <= 375


def test_on_paper_what_is_folded_is_shown(report, tmp_path):
    path, _ = report
    with page() as tab:
        tab.goto(path.as_uri())
        folded = tab.locator("details", has_text="Site by site").first.locator("table")
        shown = "table => table.checkVisibility({contentVisibilityAuto: true})"
        assert not folded.evaluate(shown)
        tab.emulate_media(media="print")
        assert folded.evaluate(shown)
        assert not tab.locator("nav").is_visible()
        tab.set_viewport_size({"width": 794, "height": 1123})  # A4 at 96 dots an inch
        assert tab.evaluate("document.documentElement.scrollWidth") <= 794
        data = tab.pdf(format="A4")
        assert data.startswith(b"%PDF")
        assert len(data) > 50_000


def test_the_page_says_what_the_record_says(report):
    path, result = report
    text = path.read_text()
    decided = json.loads((path.parent / "decision.json").read_text())
    assert decided["issued"]["expires"] in text
    assert decided["digest"] in text
    assert result["subject_digest"] in text
