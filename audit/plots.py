"""Plots of a sweep, as PNG: readable in grey, in print, and with any kind of colour vision."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

matplotlib.use("Agg")

# Okabe and Ito's palette, and a shape for each so that colour is never alone.
STYLES = {
    "accept": ("#009E73", "o"),
    "reject": ("#D55E00", "X"),
    "inconclusive": ("#999999", "s"),
}


def quality_against_size(result: Mapping[str, Any], task: Mapping[str, Any]) -> bytes:
    """Each cell's headline metric on one task against its weight bytes, the verdict as colour and
    shape."""
    headline = task["headline"]
    own = [c for c in result["cells"] if c["task"] == task["name"] and headline in c["metrics"]]
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    reference = task["reference"]["selection"]["metrics"]
    axes.axhline(reference[headline], color="black", lw=1, ls="--", label="reference (fp32)")
    for verdict, (colour, shape) in STYLES.items():
        cells = [c for c in own if c["verdict"] == verdict]
        if cells:
            axes.scatter(
                [c["weight_bytes"] / 1024 for c in cells],
                [c["metrics"][headline] for c in cells],
                c=colour, marker=shape, s=55, alpha=0.8, edgecolors="white", label=verdict,
            )  # fmt: skip
    chosen = next((c for c in own if c["name"] == result["decision"]["cell"]), None)
    if chosen:
        at = (chosen["weight_bytes"] / 1024, chosen["metrics"][headline])
        axes.scatter(*at, s=220, facecolors="none", edgecolors="black", lw=1.5, label="decision")
    axes.set_xlabel("weights (KiB, scales and zero points included)")
    axes.set_ylabel(f"{headline} on selection")
    axes.set_title(f"{task['name']}: {headline} against size")
    axes.legend(fontsize=8)
    return _png(figure, axes)


DOMINATED = "#D0D0D0"
SIDES = {"weight": ("#0072B2", ""), "activation": ("#E69F00", "///")}


def error_against_size(result: Mapping[str, Any], task: Mapping[str, Any]) -> bytes:
    """Each cell's distance to the reference against its weight bytes. Cells that another beats in
    both are grey; the line is the front of the others."""
    points = [
        (c["weight_bytes"] / 1024, c["distance"], c)
        for c in result["cells"]
        if c["task"] == task["name"] and c["distance"] is not None
    ]
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for verdict, (colour, shape) in STYLES.items():
        for behind in (True, False):
            own = [p for p in points if p[2]["verdict"] == verdict and p[2]["dominated"] == behind]
            if own:
                axes.scatter(
                    [x for x, _, _ in own], [y for _, y, _ in own], marker=shape, s=55,
                    c=DOMINATED if behind else colour, edgecolors="white", zorder=3 - 2 * behind,
                    label=f"{verdict}, dominated" if behind else verdict,
                )  # fmt: skip
    front = sorted((p for p in points if not p[2]["dominated"]), key=lambda p: p[0])
    axes.plot([x for x, _, _ in front], [y for _, y, _ in front], color="black", lw=1, zorder=2)
    if front and min(y for _, y, _ in front) > 0:
        axes.set_yscale("log")
    axes.set_xlabel("weights (KiB, scales and zero points included)")
    axes.set_ylabel(f"distance to the reference ({task['closeness']})")
    axes.set_title(f"{task['name']}: error against size, and the Pareto front", fontsize=10)
    axes.legend(fontsize=8)
    return _png(figure, axes)


SHAPES = "o^svP*"
"""One a backend."""


def quality_against_resource(
    result: Mapping[str, Any], task: Mapping[str, Any], resource: str
) -> bytes:
    """The headline metric of the reference and of every deployed cell against what was measured of
    them, with the bounds of the measurement; the line is the Pareto front."""
    headline = task["headline"]
    told = result["stages"]["deployment"]["timing"]["contenders"]
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    points = []
    for cell in result["cells"]:
        found = cell["measured"].get(resource)
        if cell["task"] == task["name"] and found and headline in cell["metrics"]:
            colour, _ = STYLES[cell["verdict"]]
            shape = SHAPES[sorted({c["backend"] for c in result["cells"]}).index(cell["backend"])]
            y = cell["metrics"][headline]
            _measured(axes, found, y, colour, shape, f"{cell['backend']}, {cell['verdict']}")
            points.append((found["value"], y))
            if cell["name"] == result["decision"]["cell"]:
                axes.scatter(found["value"], y, s=220, facecolors="none", edgecolors="black",
                             lw=1.5, label="decision")  # fmt: skip
    reference = task["reference"]["selection"]
    base = reference["measured"].get(resource)
    if base:
        y = reference["metrics"][headline]
        _measured(axes, base, y, "black", "D", "reference (fp32)")
        points.append((base["value"], y))
    better = max if task["higher_is_better"] else min
    front = []
    for x, y in sorted(points):
        if not front or better(y, front[-1][1]) != front[-1][1]:
            front.append((x, y))
    axes.plot(*zip(*front, strict=True), color="black", lw=1, drawstyle="steps-post", zorder=1)
    axes.set_xlabel(f"{resource} (less is better; bounds at 95 %)")
    axes.set_ylabel(f"{headline} on selection")
    axes.set_title(f"{task['name']}: {headline} against {resource}, {len(told)} contenders")
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(*zip(*dict(zip(labels, zip(handles, labels, strict=True), strict=True)).values(),
                     strict=True), fontsize=8)  # fmt: skip
    return _png(figure, axes)


def _measured(
    axes: Axes, found: Mapping[str, float], y: float, colour: str, shape: str, label: str
) -> None:
    reach = [[found["value"] - found["low"]], [found["high"] - found["value"]]]
    axes.errorbar(found["value"], y, xerr=reach, fmt=shape, color=colour, ms=7, capsize=3,
                  label=label)  # fmt: skip


def sqnr_by_site(certificates: Sequence[Mapping[str, str]], cell: str) -> bytes:
    """Signal over quantization noise at each site of one cell."""
    rows = [row for row in certificates if row["sqnr_db"] not in ("", None)]
    sites = list(dict.fromkeys(row["site"] for row in rows))
    figure = Figure(figsize=(7, max(2.4, 0.34 * len(sites) + 1.4)), layout="constrained")
    axes = figure.add_subplot()
    for offset, target in ((-0.2, "weight"), (0.2, "activation")):
        found = {r["site"]: float(r["sqnr_db"]) for r in rows if r["target"] == target}
        if found:
            places = [sites.index(site) + offset for site in found]
            axes.barh(
                places, list(found.values()), height=0.38, color=SIDES[target][0], label=target
            )
    axes.set_yticks(range(len(sites)), sites, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("SQNR (dB; more is closer to full precision)")
    axes.set_title(f"Noise by site: {cell}", fontsize=10)
    axes.legend(fontsize=8)
    return _png(figure, axes)


def error_against_bound(certificates: Sequence[Mapping[str, str]], cell: str) -> bytes:
    """The largest in-range error at each site beside the bound that it may not pass."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for target, shape in (("weight", "o"), ("activation", "^")):
        rows = [r for r in certificates if r["target"] == target]
        if rows:
            axes.scatter(
                range(len(rows)), [float(r["error_over_bound"]) for r in rows],
                c=SIDES[target][0], marker=shape, s=45, label=target,
            )  # fmt: skip
    axes.axhline(1.0, color="black", lw=1.2, label="bound")
    axes.set_ylim(0, 1.15)
    axes.set_xlabel("site, in order of the model")
    axes.set_ylabel("largest in-range error / bound")
    axes.set_title(f"Error against its bound: {cell}", fontsize=10)
    axes.legend(fontsize=8, loc="lower right")
    return _png(figure, axes)


MOST_SITES = 40
"""Shown in a plot; the table has all."""


def sensitivity_by_site(found: Mapping[str, Any]) -> bytes:
    """What each site costs alone, with its interval, and what of the scheme's error goes without
    it; the most costly on top, the model's first and last operation in bold."""
    rows = found["sites"][:MOST_SITES]
    figure = Figure(figsize=(9, max(2.6, 0.27 * len(rows) + 1.5)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    for i, row in enumerate(rows):
        colour, hatch = SIDES[row["side"]]
        style = {"color": colour, "hatch": hatch, "edgecolor": "white", "height": 0.7}
        reach = [
            [row["output_error"] - row["output_error_low"]],
            [row["output_error_high"] - row["output_error"]],
        ]
        left.barh(i, row["output_error"], **style)
        left.errorbar(row["output_error"], i, xerr=reach, color="black", lw=1, capsize=2)
        right.barh(i, 100 * row["error_gained_back"], **style)
    if any(row["output_error"] > 0 for row in rows):
        left.set_xscale("log")
    names = [f"{row['site']}{' · ' + row['end'] if row['end'] else ''}" for row in rows]
    left.set_yticks(range(len(rows)), names, fontsize=8)
    for label, row in zip(left.get_yticklabels(), rows, strict=True):
        label.set_fontweight("bold" if row["end"] else "normal")
    left.invert_yaxis()
    left.set_xlabel("output error, quantized alone (share of output power)", fontsize=9)
    right.set_xlabel("% of the scheme's error gone without it", fontsize=9)
    right.axvline(0, color="black", lw=0.8)
    right.legend(
        handles=[Patch(facecolor=c, hatch=h, edgecolor="white", label=s)
                 for s, (c, h) in SIDES.items()],
        fontsize=8, loc="lower right",
    )  # fmt: skip
    left.set_title(f"Sensitivity: {found['scheme']}", fontsize=10, loc="left")
    return _png(figure, left, right)


def _png(figure: Figure, *panels: Axes) -> bytes:
    for axes in panels:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=130, metadata={"Software": None})
    return out.getvalue()
