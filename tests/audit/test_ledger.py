"""The chain: what follows what, what it sets, and what is wrong with a broken one."""

import json

import pytest

from audit import ledger
from audit.ledger import START, Entry, Settings, after, chain_faults, heads, replay


def make(place, number=0, **sets):
    shows = {"tags": {}, "note": ""}
    return ledger.entry(place, "review", f"k{number}", "x", {}, Settings(**sets), shows, None)


def chain(length):
    entries = []
    for number in range(length):
        entries.append(make(after(entries) if entries else START, number))
    return entries


def test_each_entry_holds_the_digest_of_the_one_before_it():
    entries = chain(4)
    assert [one.number for one in entries] == [1, 2, 3, 4]
    assert [one.previous for one in entries] == [(), *((e.digest,) for e in entries[:3])]
    assert heads(entries) == (entries[-1].digest,)
    assert chain_faults(entries, heads(entries)) == []


@pytest.mark.parametrize("gone", range(4))
def test_a_removed_entry_is_missed(gone):
    entries = chain(4)
    head = heads(entries)
    assert chain_faults(entries[:gone] + entries[gone + 1 :], head)


def test_a_changed_entry_breaks_the_chain():
    entries = chain(3)
    body = json.loads(entries[1].data)
    body["what"] = {"verdict": "accept"}
    faults = chain_faults([entries[0], Entry(body), entries[2]], heads(entries))
    assert any("is missing or was changed" in fault for fault in faults)


def test_an_entry_that_was_added_is_not_named_by_the_head():
    entries = chain(2)
    head = heads(entries)
    faults = chain_faults([*entries, make(after(entries), 7)], head)
    assert any("is not named by the ledger's head" in fault for fault in faults)


def test_a_fork_is_joined_by_the_next_entry_and_nothing_is_lost():
    first = make(START, 1)
    forks = [make(after([first]), n) for n in (2, 3)]
    entries = [first, *forks]
    assert chain_faults(entries, heads(entries)) == []
    joined = make(after(entries), 4)
    assert set(joined.previous) == {fork.digest for fork in forks}
    assert joined.number == 3
    assert chain_faults([*entries, joined], [joined.digest]) == []
    assert chain_faults([first, forks[0], joined], [joined.digest])


def test_what_the_store_should_hold_is_what_was_set_last():
    entries = []
    for alias in ({"candidate": "1"}, {"champion": "1", "candidate": None}, {"previous": "1"}):
        entries.append(make(after(entries) if entries else START, aliases={"m": alias}))
    assert replay(entries).aliases == {"m": {"candidate": None, "champion": "1", "previous": "1"}}
    first = {"m/1": {"files": {"a": "b"}, "tags": {"x": "1", "y": "2"}}}
    both = Settings(versions=first).then(Settings(versions={"m/1": {"tags": {"x": "3"}}}))
    assert both.versions == {"m/1": {"files": {"a": "b"}, "tags": {"x": "3", "y": "2"}}}


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"null", b'{"schema": "halfstep-ledger/1"}'])
def test_what_is_no_entry_is_refused(data):
    with pytest.raises(ValueError, match=r"entry|value|Expecting"):
        ledger.read_entry(data)


def test_an_entry_in_other_spaces_is_refused():
    one = make(START)
    with pytest.raises(ValueError, match="not written as entries are"):
        ledger.read_entry(json.dumps(one.body).encode())
    assert ledger.read_entry(one.data) == one


def test_a_head_is_written_down_and_read():
    entries = chain(3)
    place = after(entries)
    text = ledger.head_text(place.number - 1, place.previous)
    assert ledger.read_head(text) == (3, (entries[-1].digest,))
    for bad in ("", "3", "3:", "x:" + "0" * 64, "3:" + "g" * 64):
        with pytest.raises(ValueError, match="not of the form"):
            ledger.read_head(bad)
