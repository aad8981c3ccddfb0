"""Prefect runs the same steps: names that people can read, the same digests, useful artifacts."""

import asyncio
import os
import subprocess
import sys

import pytest
from waiting import LIMIT

from flows.conduct import conduct
from flows.config import read_plan
from flows.server import configured_api
from halfstep.errors import UserError


@pytest.fixture(scope="module")
def server():
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=LIMIT):
        yield


async def recorded():
    from prefect.client.orchestration import get_client

    async with get_client() as client:
        flows = await client.read_flow_runs()
        tasks = await client.read_task_runs()
        artifacts = await client.read_artifacts()
    return flows, tasks, artifacts


def small(config):
    config["matrix"] = {"weights": {"format": ["int8", "int2"]}, "activations": {"format": "int8"}}
    config["mixed_precision"] = {"weights": {"format": ["int8", "int4"]}, "examples": 16,
                                 "budgets": [{"weight_bytes": 0.25}]}  # fmt: skip
    config["sensitivity"] = {"examples": 16}


@pytest.mark.filterwarnings("ignore")
def test_the_flow_gives_the_same_decision_and_reads_well(server, tiny, store, tmp_path):
    from audit.store import Store
    from flows.sweep import run_flow

    path = tiny(small)
    result = run_flow(str(path), str(store.path), False)
    plain = conduct(read_plan(path), path.read_text(), Store(tmp_path / "plain"))
    assert result["decision"] == plain["decision"]
    flows, tasks, artifacts = asyncio.run(recorded())
    for _ in range(60):
        if len(tasks) >= 12:
            break
        asyncio.run(asyncio.sleep(0.5))
        flows, tasks, artifacts = asyncio.run(recorded())
    assert [f.name for f in flows] == [f"sweep {path}"]
    assert {t.name for t in tasks} == {
        "load",
        "reference · digits · selection",
        "reference · digits · confirmation",
        "calibrate",
        "mixed precision",
        f"sensitivity · {result['decision']['cell']}",
        *[f"{c['name']} · digits · selection" for c in result["cells"]],
        f"{result['decision']['cell']} · digits · confirmation",
        "select",
        "decide",
        f"variant · {result['decision']['cell']}",
        "record",
    }
    kinds = {a.key: a for a in artifacts}
    assert kinds["halfstep-decision"].data.startswith("# ACCEPT")
    assert "int2" in str(kinds["halfstep-cells"].data)


def test_without_a_server_prefect_is_not_even_imported(tiny, store):
    code = (
        "import sys; from flows.cli import app; app(sys.argv[1:], standalone_mode=False); "
        "sys.exit('prefect' in sys.modules)"
    )
    arguments = ["sweep", str(tiny(small)), "--store", str(store.path)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT")}
    environment["PREFECT_HOME"] = str(store.path / "no-prefect-home")
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_configured_server_that_is_down_is_named(monkeypatch):
    from prefect.settings import PREFECT_API_URL, temporary_settings

    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    with (
        temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}),
        pytest.raises(
            UserError, match=r"PREFECT_API_URL is http://127.0.0.1:9/api, but no Prefect"
        ),
    ):
        configured_api()


@pytest.mark.filterwarnings("ignore")
def test_spans_of_flow_and_tasks_reach_whatever_opentelemetry_exports_to(server, tiny, store):
    """Prefect makes them; `opentelemetry-instrument` sets up in a process what this does here."""
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    from flows.sweep import run_flow

    kept, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(kept))
    trace.set_tracer_provider(provider)
    path = tiny(lambda c: c.update(matrix={"weights": {"format": "int8"}}))
    run_flow(str(path), str(store.path), False)
    spans = {span.name: span for span in kept.get_finished_spans()}
    assert {f"sweep {path}", "load", "calibrate", "select", "record"} <= set(spans)
    assert spans["load"].end_time > spans["load"].start_time
    assert spans["load"].context.trace_id == spans[f"sweep {path}"].context.trace_id
