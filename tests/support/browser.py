"""A real headless browser: Debian's Chromium, or another that is installed."""

import os
import shutil
from contextlib import contextmanager

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
QUIET_MLFLOW = (
    "localStorage.setItem('mlflow.assistant.panelOpen_v1','false');"
    "localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1','true');"
)


def executable():
    """Where the browser is; without one the test is skipped, on CI it fails."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        if os.environ.get("CI"):
            pytest.fail("no Chromium on CI: .ci/run installs it")
        pytest.skip("no Chromium is installed (Debian: apt-get install chromium)")
    return found


@contextmanager
def page(width=1400, height=1000):
    """A page, and what went wrong on it: errors of its scripts, and dialogs."""
    from playwright.sync_api import sync_playwright

    where = executable()
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=where, args=FLAGS)
        try:
            context = browser.new_context(viewport={"width": width, "height": height})
            context.add_init_script(f"try {{ {QUIET_MLFLOW} }} catch (e) {{}}")
            yield context.new_page()
        finally:
            browser.close()
