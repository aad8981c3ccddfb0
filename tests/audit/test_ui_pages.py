"""Five questions answered from the MLflow UI alone, by somebody who has never seen halfstep: what
was decided, why, on what data, in what environment, who signed."""

import os
import re
import subprocess
import sys

import pytest
import yaml
from browser import executable, page
from servers import answers, free_port
from tests_config import TINY
from waiting import until

from audit import signing
from audit.issuer import Issuer
from audit.review import Review
from audit.review import review as enter_review
from audit.store import Store
from flows.conduct import conduct
from flows.config import read_plan

PATIENCE = 60_000
MODE = "workflowType=machine_learning"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The UI on a store that was moved after it was written, with one approved sweep."""
    executable()
    folder = tmp_path_factory.mktemp("ui")
    config = yaml.safe_load(yaml.safe_dump(TINY))
    config["matrix"]["weights"] = {"format": ["int8", "int2"], "granularity": "per_channel"}
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(config))
    made = Store(folder / "made")
    public = signing.make_key(folder / "key", None)
    signer = signing.signer(folder / "key")
    result = conduct(read_plan(path), path.read_text(), made, issuer=Issuer("Ada Author", signer))
    made.path.rename(folder / "mlruns")
    store = Store(folder / "mlruns")
    said = Review("approve", "Jane Doe", "Head of ML", "margins are kept")
    enter_review(store, result["sweep_id"], said, None)
    port = free_port()
    command = [sys.executable, "-m", "flows.cli", "ui", "--store", str(store.path),
               "--port", str(port)]  # fmt: skip
    server = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    address = f"http://127.0.0.1:{port}"
    try:
        until(lambda: answers(f"{address}/health"), server)
        yield address, result, public
    finally:
        os.killpg(server.pid, 15)
        server.wait(30)


@pytest.fixture
def tab(served):
    with page() as opened:
        opened.set_default_timeout(PATIENCE)
        yield opened


def sees(tab, text):
    tab.get_by_text(text).first.wait_for()


@pytest.mark.slow
def test_what_was_decided_and_the_cells_beside_each_other(tab, served):
    address, result, _ = served
    experiment = f"{address}/#/experiments/{result['experiment_id']}/runs?{MODE}"
    tab.goto(f"{experiment}&viewStateShareKey=audit")
    sees(tab, f"ACCEPT: {result['decision']['cell']}")
    for column in ("accuracy", "weight_bytes_r", "weights.format", "halfstep.verdict"):
        sees(tab, re.compile(f"^{column}"))
    accuracy = result["cells"][0]["metrics"]["accuracy"]
    sees(tab, f"{accuracy:.3f}".rstrip("0"))
    sees(tab, "reject")
    shown = tab.locator("[role=grid]").first.inner_text()
    by_size = sorted(result["cells"], key=lambda c: c["weight_bytes"])
    places = [shown.index(cell["name"][:12]) for cell in (by_size[0], by_size[-1])]
    assert places[0] < places[1], "the cheapest first"


@pytest.mark.slow
def test_why_on_what_data_in_what_environment_and_who_signed(tab, served):
    address, result, _ = served
    tab.goto(f"{address}/#/experiments/{result['experiment_id']}/runs/{result['run_id']}?{MODE}")
    sees(tab, f"ACCEPT: {result['decision']['cell']}")
    sees(tab, "Head of ML")  # who signed, before anything is unfolded
    tab.get_by_text("Show more").click()
    sees(tab, "accuracy may drop by less than 0.05")
    sees(tab, re.compile("accuracy drop .*, at most .* at 95%"))
    examples = result["tasks"][0]["splits"]["selection"]["examples"]
    sees(tab, re.compile(f"selection: {examples} examples, SHA-256"))
    sees(tab, re.compile(r"Environment.*torch 2\.13"))
    sees(tab, re.compile("digits calibration"))  # dataset inputs
    sees(tab, result["cells"][0]["name"])  # child runs
    sees(tab, "Ada Author")  # declared author
    tab.get_by_role("link", name="tiny", exact=True).last.click()  # the registered model
    sees(tab, "champion")


@pytest.mark.slow
def test_the_models_version_names_its_run_and_its_sign_off(tab, served):
    address, result, _ = served
    tab.goto(f"{address}/#/models/tiny/versions/1")
    sees(tab, "champion")
    sees(tab, result["run_id"])
    sees(tab, re.compile("approved by Jane Doe"))


@pytest.mark.slow
def test_the_report_opens_in_the_artifact_view(tab, served):
    address, result, _ = served
    page_of = f"{address}/#/experiments/{result['experiment_id']}/runs/{result['run_id']}"
    tab.goto(f"{page_of}/artifacts?{MODE}")
    tab.get_by_text("report.html", exact=True).first.click()
    frame = tab.frame_locator("iframe").first
    frame.locator("h1").wait_for()
    assert frame.locator("h1").inner_text() == f"ACCEPT: {result['decision']['cell']}"
    assert frame.locator("img").first.evaluate("img => img.naturalWidth") > 300
    frame.locator("nav a", has_text="Coverage").click()
    frame.locator("h2#coverage").wait_for()
    assert frame.locator("h1").count() == 1, "the link stays on the page"


@pytest.mark.slow
def test_the_ledger_is_an_experiment_of_its_own(tab, served):
    address, _, _ = served
    tab.goto(f"{address}/")
    tab.get_by_text("Model training", exact=True).first.click()
    tab.get_by_text("Experiments", exact=True).first.click()
    tab.get_by_role("link", name="halfstep ledger").first.click()
    sees(tab, re.compile("2 · review"))
    sees(tab, re.compile("1 · decision"))
    tab.get_by_text("Views", exact=True).first.click()
    tab.get_by_text("audit", exact=True).last.click()
    sees(tab, "Jane Doe")
    sees(tab, "Ada Author")
