"""What auditors and boards read on a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flows.show import COLOURS, say


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
