"""Notes: the Markdown that the MLflow UI shows on top of a run. The verdict comes first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from audit.deployment import between, bought_lines
from audit.spool import Record

MARKS = {"accept": "ACCEPT", "reject": "REJECT", "inconclusive": "INCONCLUSIVE"}
"""Words, not emoji: not every font that shows a trail has those."""


def sweep_note(result: Mapping[str, Any], signed_off: Sequence[str] = ()) -> str:
    """The parent run: what was decided, why, on what data, in what environment, who signed.

    Args:
        signed_off: what reviews said, one text each; nothing where there was none yet.
    """
    decision, several = result["decision"], len(result["tasks"]) > 1
    counts = {v: sum(c["verdict"] == v for c in result["schemes"]) for v in MARKS}
    lines = [
        f"# {MARKS[decision['verdict']]}: {decision['cell'] or 'no cell may be deployed'}",
        "",
        f"{decision['summary']}. Holds until {result['issued']['expires']}. **Signed off**: "
        + (signed_off[-1] if signed_off else _not_signed(result))
        + ".",
        "",
        *(
            ["**Earlier**", "", *[f"- {text}" for text in signed_off[:-1]], ""]
            if len(signed_off) > 1
            else []
        ),
        "**Criteria** (declared before the first cell ran)",
        "",
        *[
            f"- {named(task['name'], several)}{criterion_text(c)}"
            for task in result["tasks"]
            for c in task["criteria"]
        ],
        "",
    ]
    if result["confirmation"]:
        lines += [
            "**On the confirmation split**",
            "",
            *[
                f"- {f['verdict']}: {named(cell['task'], several)}{f['reason']}"
                for cell in result["confirmation"]
                for f in cell["findings"]
            ],
            "",
        ]
    exceptions = [*result["overrides"], *(f"{p}: skipped" for p in result["skipped"])]
    if exceptions:
        lines += ["**Sites treated otherwise**", "", *[f"- {e}" for e in exceptions], ""]
    if several:
        lines += [*_task_table(result), ""]
    if result["stages"].get("deployment"):
        lines += ["**What was bought for what**", "", *bought_lines(decision["bought"]), ""]
    notes = [*result["notes"], *result["calibration"]["notes"], *determinism_notes(result)]
    lines += [f"> {note}\n" for note in notes]
    lines += [
        f"**Matrix**: {len(result['schemes'])} schemes, "
        + ", ".join(f"{n} {v}" for v, n in counts.items())
        + "."
        + "".join(f" {reference_text(task, several)}." for task in result["tasks"]),
        "",
        "**Data**",
        "",
        *_data(result),
        "",
        f"**Environment**: {environment_text(result['environment'])}; all of it in "
        "`environment.json`.",
        "",
        f"**Reused**: {taken_text(origins(result))}.",
        "",
        "| | |",
        "| --- | --- |",
        f"| subject | `{result['subject_digest'][:16]}` |",
        f"| protocol | `{result['protocol_digest'][:16]}` |",
        f"| decision | `{decision['digest'][:16]}` |",
        f"| sweep | `{result['sweep_id']}` |",
        "",
        "The report is `report.html` under Artifacts; the record is `decision.md`, and "
        "`decision.json` for machines; the cells are the child runs.",
    ]
    return "\n".join(lines)


def origins(result: Mapping[str, Any]) -> dict[str, int]:
    """How many pieces of a sweep (runs, and corrected weights) are from which earlier one."""
    # Results that were recorded before these were kept have none.
    counted = dict(result.get("weights_from", {}))
    for origin in result.get("reused_from", {}).values():
        counted[origin] = counted.get(origin, 0) + 1
    return counted


def taken_text(counted: Mapping[str, int]) -> str:
    """The same in words."""
    return ", ".join(f"{n} piece(s) from {sweep}" for sweep, n in counted.items()) or "nothing"


def variant_note(result: Mapping[str, Any], variant: Record) -> str:
    """The description of a registered version."""
    decision = result["decision"]
    return (
        f"**{variant.name}** of subject `{result['subject_digest'][:16]}`: {decision['summary']}. "
        f"Sweep {result['sweep_id']}, run `{result['run_id']}`; holds until "
        f"{result['issued']['expires']}. `model.safetensors` are the weights as they were "
        "evaluated, `quantization.safetensors` codes, scales and zero points, `scheme.json` the "
        "scheme."
    )


def environment_text(found: Mapping[str, Any]) -> str:
    """The environment in a line."""
    return ", ".join(f"{name} {value}" for name, value in found.items() if value is not None)


def _not_signed(result: Mapping[str, Any]) -> str:
    return (
        f"nobody yet; declared author {result['issued']['author']}, another person reviews with "
        f"`halfstep review {result['sweep_id']}`"
    )


def _data(result: Mapping[str, Any]) -> list[str]:
    several = len(result["tasks"]) > 1
    return [
        f"- {named(task['name'], several)}{split}: {found['examples']} examples, SHA-256 "
        f"`{found['sha256'][:16]}`"
        for task in result["tasks"]
        for split, found in task["splits"].items()
    ]


def named(task: str, several: bool) -> str:
    """The task's name before a sentence, where there are several."""
    return f"{task}: " if several else ""


def reference_text(task: Mapping[str, Any], several: bool) -> str:
    """What full precision came to on a task's selection split."""
    headline = task["headline"]
    value = task["reference"]["selection"]["metrics"][headline]
    text = f"reference {headline} {value:.4f} on {task['splits']['selection']['examples']} examples"
    return f"{task['name']}: {text}" if several else text[0].upper() + text[1:]


def _task_table(result: Mapping[str, Any]) -> list[str]:
    """Each scheme's verdict on each task, the overall one first: at most the first 30 schemes."""
    tasks = [task["name"] for task in result["tasks"]]
    rows = [f"| scheme | overall | {' | '.join(tasks)} |", "| --- " * (len(tasks) + 2) + "|"]
    for scheme in result["schemes"][:30]:
        verdicts = " | ".join(scheme["tasks"][task] for task in tasks)
        rows.append(f"| {scheme['name']} | {scheme['verdict']} | {verdicts} |")
    return rows


def determinism_notes(result: Mapping[str, Any]) -> list[str]:
    """What may come out otherwise the next time."""
    notes = [
        f"operator {name} has no deterministic implementation here"
        for name in result["nondeterministic_operators"]
    ]
    if not result["deterministic"]:
        notes.insert(0, "the reference gave different outcomes when it was evaluated twice")
    return notes


def cell_note(cell: Mapping[str, Any]) -> str:
    """A child run: its verdict with the reasons."""
    lines = [f"# {MARKS[cell['verdict']]}", "", *[f"- {reason}" for reason in cell["reasons"]], ""]
    if cell["stopped"]:
        stop = cell["stopped"]
        lines += [f"Stopped at {stop['examples']:,} of {stop['of']:,} examples: {stop['why']}.", ""]
    if cell.get("measured"):
        lines += ["Measured: " + ", ".join(f"{name} {between(found)}" for name, found
                                           in cell["measured"].items()) + ".", ""]  # fmt: skip
    if cell.get("arithmetic"):
        lines += [_arithmetic_text(cell["arithmetic"]), ""]
    certificate, coverage = cell["certificate"], cell["coverage"]
    if certificate:
        lines.append(
            f"Certificate: {'every bound holds' if certificate['holds'] else 'A BOUND IS BROKEN'} "
            f"over {certificate['elements']:,} values at {certificate['sites']} places; the "
            f"largest in-range error is {certificate['error_over_bound']:.3f} of its bound; "
            f"{certificate['clipped_share']:.2%} clipped"
            + (", which the format's scale rule does by design." if certificate["clips_by_design"]
               else ".")
            + f" Checked: {', '.join(certificate['of'])}."
        )  # fmt: skip
    if coverage:
        lines.append(
            f"Coverage: {coverage['macs']:.1%} of multiply-accumulates, "
            f"{coverage['parameters']:.1%} of parameters, at {cell['bits_per_weight']:.2f} bits a "
            "quantized weight with its scales."
        )
    lines += ["", *[f"- {note}" for note in cell["notes"][:20]]]
    return "\n".join(lines)


def _arithmetic_text(found: Mapping[str, Any]) -> str:
    """How the integer products of a cell were computed."""
    by = (
        f"by float products of codes ({found['why_not']})"
        if found["why_not"]
        else f"{found['integer_operators']} of them by the processor's integer operators "
        f"({found['kernel']}), which gave the same bits on {found['compared']:,} outputs"
    )
    return f"Arithmetic: {found['products']} products of integers, exact, {by}."


def calibration_note(calibration: Mapping[str, Any]) -> str:
    """The calibration run: what was observed, and whether it may be relied on."""
    found = calibration["representativeness"]
    lines = ["What one pass over the calibration data left of every activation site.", ""]
    lines += [f"- {note}" for note in calibration["notes"]]
    if not calibration["notes"]:
        lines.append(
            f"- The {found['sites']} sites look alike on calibration and selection data: PSI at "
            f"most {found['worst_psi']:.3f}, at most {found['worst_outside']:.3%} of values "
            "outside the calibrated range, no channel's mean moved by more than "
            f"{found['worst_channel_shift']:.2f} standard deviations. No range moved by more than "
            "5 % over the second half of the data."
        )
    lines += ["", "`convergence.csv`: each range after 1/8, 1/4, 1/2 and all of the data. "
              "`representativeness.csv`: each site on the selection data."]  # fmt: skip
    return "\n".join(lines)


PHRASES = {
    "max_drop": "may drop by less than {}",
    "max_increase": "may increase by less than {}",
    "max_relative_drop": "may drop by less than {:%} of the reference's",
    "max_relative_increase": "may increase by less than {:%} of the reference's",
    "floor": "is at least {}",
    "ceiling": "is at most {}",
}


def criterion_text(criterion: Mapping[str, Any]) -> str:
    """A criterion as a sentence."""
    name = criterion["metric"]
    if "max_ratio" in criterion:
        return f"{name} at most {criterion['max_ratio']:g} of the reference"
    if "confidence" not in criterion:
        limit = criterion["ceiling"]
        return f"{name} at most {limit:,.0f}" if limit >= 1000 else f"{name} at most {limit:g}"
    limit = next(limit for limit in PHRASES if limit in criterion)
    if "slice" in criterion:
        name += f", in each slice by {criterion['slice']} of {criterion['min_examples']} or more,"
    value = criterion[limit]
    phrase = PHRASES[limit].replace("{:%}", f"{100 * value:g} %").replace("{}", f"{value:g}")
    text = f"{name} {phrase}, shown with {criterion['confidence']:.0%} confidence"
    if "preset" in criterion:
        text += f" (preset {criterion['preset']}; not an MLPerf result)"
    return text


def sensitivity_note(found: Mapping[str, Any]) -> str:
    """A sensitivity run: the sites that cost most."""
    lines = [
        f"Each site of **{found['scheme']}** quantized alone, on {found['examples']} calibration "
        f"examples of {found['task']}. The whole scheme's output error is "
        f"{found['output_error']:.3g} of the output's power; its sites' add up to "
        f"{found['sum_of_errors']:.3g}.",
        "",
        f"| rank | site | output error alone | error gone without it | {found['metric']} loss |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row['rank']} | {site_text(row)} | {row['output_error']:.3g} | "
        f"{row['error_gained_back']:.0%} | {row['metric_loss']:+.4f} |"
        for row in found["sites"][:20]
    ]
    lines += ["", "All sites: `sensitivity.csv`; the picture: `sensitivity.png`."]
    return "\n".join(lines)


def site_text(row: Mapping[str, Any]) -> str:
    """A site with its side, and whether the model begins or ends there."""
    mark = f" ({row['end']})" if row["end"] else ""
    return f"{row['site']} {row['side']}{mark}"


def mixed_note(found: Mapping[str, Any]) -> str:
    """The search for mixed schemes: what was predicted, what was measured, against uniform ones."""
    lines = [
        f"Formats chosen site by site on {found['examples']} calibration examples of "
        f"{found['task']}. Output error: mean squared distance to full precision's outputs, over "
        "their power.",
        "",
        f"| scheme | weight bytes | output error | {found['metric']} loss | predicted |",
        "| --- | --- | --- | --- | --- |",
    ]
    for one in found["found"]:
        measured = one["measured"]
        lines.append(
            f"| **{one['scheme']}** | {one['weight_bytes']:,} | {measured['output_error']:.4g} | "
            f"{measured['metric_loss']:+.4f} | {one['predicted']:.4g} ({one['predicted_of']}) |"
        )
    lines += [
        f"| {one['scheme']} | {one['weight_bytes']:,} | {one['output_error']:.4g} | "
        f"{one['metric_loss']:+.4f} | |"
        for one in found["uniform"]
    ]
    for one in found["found"]:
        spread: dict[str, list[str]] = {}
        for choice in one["choices"]:
            text = f"{choice['chosen']} {choice['side']}"
            spread.setdefault(text, []).append(", ".join(choice["sites"]))
        lines += ["", f"**{one['scheme']}**" + _repair_text(one), ""]
        lines += [f"- {choice}: {'; '.join(sites)}" for choice, sites in spread.items()]
    return "\n".join(lines)


def _repair_text(found: Mapping[str, Any]) -> str:
    if not found["kept"]:
        return ": the budget could not be kept by any choice that was measured"
    if not found["steps"]:
        return ""
    before = found["measured_first"]["output_error"]
    return f": repaired in {len(found['steps'])} measured step(s), from an error of {before:.4g}"
