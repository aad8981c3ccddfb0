"""The report: one self-contained HTML page, verdict first, everything escaped."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from audit.deployment import between, contenders, cost_text, missing, natively, truth
from audit.heatmap import heat_map
from audit.note import MARKS, criterion_text, named, reference_text, site_text
from audit.plots import (
    error_against_bound,
    error_against_size,
    quality_against_resource,
    quality_against_size,
    sensitivity_by_site,
    sqnr_by_site,
)


def read_csv(data: bytes) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(data.decode())))


BOUGHT = ("latency_p50_ms", "artefact_bytes", "cost_per_million")
"""What quality is plotted against where backends run cells."""


def plots(
    result: Mapping[str, Any], certificates: list[dict[str, str]], cell: str
) -> dict[str, bytes]:
    """PNG by name. ``certificates`` are those of the one cell that is shown site by site."""
    figures = {
        _figure(task["name"], result): quality_against_size(result, task)
        for task in result["tasks"]
    }
    figures |= {
        f"pareto-{_figure(task['name'], result)}": error_against_size(result, task)
        for task in result["tasks"]
    }
    for task in result["tasks"]:
        for name in BOUGHT:
            if any(name in cell.get("measured", {}) for cell in result["cells"]):
                figures[f"{name}-{_figure(task['name'], result)}"] = quality_against_resource(
                    result, task, name
                )
    if "sensitivity" in result["stages"]:
        figures["sensitivity"] = sensitivity_by_site(result["stages"]["sensitivity"])
    if certificates:
        figures["sqnr_by_site"] = sqnr_by_site(certificates, cell)
        figures["error_against_bound"] = error_against_bound(certificates, cell)
    return figures


def report_html(
    result: Mapping[str, Any],
    plan: Mapping[str, Any],
    environ: Mapping[str, Any],
    figures: Mapping[str, bytes],
    cell: str,
    certificates: list[dict[str, str]],
    coverage: list[dict[str, str]],
) -> str:
    """The page. ``cell`` names the one whose certificate and coverage are shown."""
    templates = Environment(
        loader=PackageLoader("audit"),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["number"] = _number
    images = {name: base64.b64encode(data).decode() for name, data in figures.items()}
    return templates.get_template("report.html").render(
        result=result,
        plan=plan,
        environ=environ,
        images=images,
        cell=cell,
        result_cell=next(c for c in result["cells"] if c["name"] == cell),
        certificates=certificates,
        coverage=coverage,
        marks=MARKS,
        criterion_text=criterion_text,
        heat_map=heat_map,
        sections=_sections(result),
        figure=lambda task: _figure(task, result),
        named=named,
        reference_text=reference_text,
        site_text=site_text,
        bought=BOUGHT,
        between=between,
        contenders=contenders,
        cost_text=cost_text,
        missing=missing,
        natively=natively,
        truth=truth,
    )


SECTIONS = (
    ("criteria", "Criteria"),
    ("confirmation", "Confirmation"),
    ("the-matrix", "The matrix"),
    ("mixed-precision", "Mixed precision"),
    ("sensitivity", "Sensitivity"),
    ("deployment", "Deployment"),
    ("bought", "What was bought for what"),
    ("certificate", "Certificate"),
    ("coverage", "Coverage"),
    ("calibration-data", "Calibration data"),
    ("data-and-protocol", "Data and protocol"),
    ("environment", "Environment"),
    ("assumptions", "Assumptions"),
    ("limits", "Limits"),
    ("verify", "How to verify"),
    ("reproduce", "How to reproduce"),
)


def _sections(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Anchor and title of each section that this page has."""
    has = {
        "confirmation": bool(result["confirmation"]),
        "mixed-precision": "mixed" in result["stages"],
        "sensitivity": "sensitivity" in result["stages"],
        "deployment": "deployment" in result["stages"],
        "bought": bool(result["decision"]["bought"]),
    }
    return [section for section in SECTIONS if has.get(section[0], True)]


def _figure(task: str, result: Mapping[str, Any]) -> str:
    return "size" if len(result["tasks"]) == 1 else f"size-{task.replace(' ', '_')}"


def _number(value: float) -> str:
    """Counts with thousands marked, measurements with four digits."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def table(folder: Path, name: str) -> list[dict[str, str]]:
    """A recorded CSV, or nothing where the cell left none."""
    path = folder / "files" / name
    return read_csv(path.read_bytes()) if path.is_file() else []
