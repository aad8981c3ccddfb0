"""What auditors and boards read on a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flows.show import COLOURS, say, table


def print_report(found: Mapping[str, Any]) -> None:
    """What `verify` found: each change by name, then what was checked."""
    for finding in found["findings"]:
        say(f"changed: {finding['where']}: {finding['what']}", style=COLOURS["fail"])
    for note in found["notes"]:
        say(f"note: {note}")
    for keyid, numbers in found["signed"].items():
        say(f"signed by key {keyid[:16]}: entries {', '.join(map(str, numbers))}")
    if found["unsigned"]:
        say(f"unsigned: entries {', '.join(map(str, found['unsigned']))}")
    say(f"{found['entries']} ledger entries, {found['runs']} runs, {found['items']} items compared")
    if found["head"]:
        say(f"head {found['head']}: keep it elsewhere, and check it later with --head")
    if found["intact"]:
        say("INTACT: everything is as it was recorded", style=COLOURS["ok"])
    else:
        say(f"TAMPERED: {len(found['findings'])} finding(s)", style=COLOURS["fail"])


def print_comparison(found: Mapping[str, Any]) -> None:
    """Two cells metric by metric, or two sweeps cell by cell."""
    for note in found["notes"]:
        say(f"note: {note}")
    one, two = found["first"], found["second"]
    if found["kind"] == "cells":
        say(f"first:  {one['name']} · {one['split']} · sweep {one['sweep_id']}")
        say(f"second: {two['name']} · {two['split']} · sweep {two['sweep_id']}")
        say(f"{found['examples']} examples in both, intervals of {found['confidence']:.0%}")
        table(["metric", "first", "second", "difference", "interval", ""], [
            [row["metric"], f"{row['first']:.4f}", f"{row['second']:.4f}",
             f"{row['difference']:+.4f}", *_interval(row)]
            for row in found["differences"]
        ])  # fmt: skip
        return
    for name, side in (("first", one), ("second", two)):
        say(f"{name}: sweep {side['sweep_id']} · {side['verdict']} · {side['cell'] or 'no cell'}")
    rows = [[f"reference · {ref['task']}", "", *_headline(ref)] for ref in found["references"]]
    rows += [
        [f"{cell['name']} · {cell['task']}", " → ".join(cell["verdicts"]), *_headline(cell)]
        for cell in found["cells"]
    ]
    say(f"intervals of {found['confidence']:.0%}")
    heads = ["cell", "verdict", "metric", "first", "second", "difference", "interval", ""]
    table(heads, rows)
    for name in ("first", "second"):
        for cell in found[f"only_{name}"]:
            say(f"only in the {name}: {cell}")


def _headline(found: Mapping[str, Any]) -> list[str]:
    row = next((r for r in found["differences"] if r["metric"] == found["headline"]), None)
    if row is None:
        return [""] * 6
    return [row["metric"], f"{row['first']:.4f}", f"{row['second']:.4f}",
            f"{row['difference']:+.4f}", *_interval(row)]  # fmt: skip


def _interval(row: Mapping[str, Any]) -> list[str]:
    if row["low"] is None or row["high"] is None:
        return ["not bounded", ""]
    return [f"{row['low']:+.4f} to {row['high']:+.4f}", "differs" if row["certain"] else ""]


def print_reproduction(found: Mapping[str, Any]) -> None:
    """What differs, beside what differs in code and environment; then the verdict."""
    different = [check for check in found["checks"] if not check["equal"]]
    for check in different:
        say(f"{check['what']}: recorded {_short(check['recorded'])}, now {_short(check['now'])}")
    for what in ("implementation", "environment"):
        if different or what == "implementation":
            for text in found[what]:
                say(f"{what} differs: {text}")
    say(f"{len(found['checks'])} checks, {len(different)} differ; sweep {found['sweep_id']}")
    say(found["says"], style=COLOURS["fail" if different else "ok"])


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:16]}…"


def print_case(found: Mapping[str, Any]) -> None:
    """What a reviewer signs."""
    say(f"sweep {found['sweep_id']} · run {found['run_id']}")
    say(f"{found['verdict'].upper()}: {found['summary']}", style=COLOURS[found["verdict"]])
    for reason in found["confirmation"]:
        say(f"  {reason}")
    for metric, verdict in found["not_passed"].items():
        say(f"  {metric}: {verdict}; approving needs a waiver")
    say(f"declared author {found['author']}; expires {found['expires']}")
    model = found["model"]
    held = f"version {model['version']} of model {model['name']}" if model else "nothing"
    say(f"registered: {held}")
    for one in found["reviews"]:
        say(f"reviewed: {one['text']}")
    say(
        f"sign off with: halfstep review {found['sweep_id']} --approve (or --refuse, --condition "
        "TEXT) --name NAME --role ROLE --comment WHY"
    )


def print_pack(found: Mapping[str, Any]) -> None:
    """A pack that was written."""
    say(f"{found['folder']}: {found['files']} files, {found['bytes'] / 2**20:.1f} MiB, sweep "
        f"{found['sweep_id']}")  # fmt: skip
    signed = found["signed_by"]
    say(f"signed by key {signed[:16]}" if signed else "not signed (--key FILE signs)")
    say(f"mapping.md shows {found['gaps']} gaps; model-card.md has parts for you to fill in")
    say(f"check it anywhere: halfstep verify {found['folder']}")


def print_entry(found: Mapping[str, Any]) -> None:
    """An entry that was made."""
    say(f"entered in the ledger as {found['number']} · {found['kind']} · {found['about']}")
    for line in found["shows"]["note"].splitlines():
        say(line)
    for name, moved in found["sets"]["aliases"].items():
        for alias, version in moved.items():
            say(f"model {name}: {alias} is {'version ' + version if version else 'taken away'}")
    signer = found["signer"]
    say(f"signed by key {signer[:16]}" if signer else "not signed (--key FILE signs)")
