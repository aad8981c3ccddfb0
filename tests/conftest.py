"""Shared by all tests: quiet tools, no configured servers, and a tiny real sweep."""

import os
import sys
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent / "support"))
from tests_config import TINY

from flows.cli import collect_seldom

for name in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL", "HALFSTEP_STORE"):
    os.environ.pop(name, None)
os.environ["PREFECT_SERVER_ANALYTICS_ENABLED"] = "false"
collect_seldom()

LONGEST_FIRST = ("test_servers", "test_faults", "test_shipped", "test_resume", "test_verify",
                 "test_runners", "test_cli", "test_interrupted", "test_watch")  # fmt: skip


def pytest_collection_modifyitems(items):
    """So that the longest file is not begun when all others are done."""
    place = {name: i for i, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@pytest.fixture
def tiny(tmp_path):
    """Writes the tiny config, changed as asked, and returns its path."""

    def write(change=None, name="tiny.yaml") -> Path:
        config = yaml.safe_load(yaml.safe_dump(TINY))
        if change:
            change(config)
        path = tmp_path / name
        path.write_text(yaml.safe_dump(config, sort_keys=False))
        return path

    return write


@pytest.fixture
def store(tmp_path):
    """An empty store."""
    from audit.store import Store

    return Store(tmp_path / "mlruns")
