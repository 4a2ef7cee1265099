"""daemon.json is changed as a careful person would: every byte of other settings stays."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovsmesh.containers.daemon_json import edit, settings
from ovsmesh.errors import OvsmeshError

OURS = {"bridge": "kbr0", "mtu": 1462}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", '{\n  "bridge": "kbr0",\n  "mtu": 1462\n}\n'),
        ("{}", '{\n  "bridge": "kbr0",\n  "mtu": 1462\n}'),
        ("{\n}\n", '{\n  "bridge": "kbr0",\n  "mtu": 1462\n}\n'),
        ('{"a": 1}', '{"a": 1,"bridge": "kbr0","mtu": 1462}'),
        ('{"a":1, "b":2}', '{"a":1, "b":2, "bridge":"kbr0", "mtu":1462}'),
        ('{\r\n\t"a": [1,\r\n 2]\r\n}', '{\r\n\t"a": [1,\r\n 2],\r\n\t"bridge": "kbr0",\r\n\t"mtu": 1462\r\n}'),
        ('{\n    "mtu" : 9000\n  , "a": "x"\n}\n', '{\n    "mtu" : 1462\n  , "a": "x", "bridge": "kbr0"\n}\n'),
        ('{"bridge":"kbr0","mtu":1462.0}', '{"bridge":"kbr0","mtu":1462.0}'),
        ("\ufeff{}", '\ufeff{\n  "bridge": "kbr0",\n  "mtu": 1462\n}'),
    ],
)
def test_settings_are_added_in_the_manner_of_the_file(before: str, after: str) -> None:
    assert edit(before.encode(), OURS).decode() == after
    assert edit(after.encode(), OURS).decode() == after


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('{"bip": "172.18.0.1/16"}', "{}"),
        ('{\n  "bip": "x",\n  "a": 1\n}\n', '{\n  "a": 1\n}\n'),
        ('{\n  "a": 1,\n  "bip": "x"\n}\n', '{\n  "a": 1\n}\n'),
        ('{"a": 1, "bip": "x", "c": 3}', '{"a": 1, "c": 3}'),
        ('{"a": {"bip": "}"}}', '{"a": {"bip": "}"}}'),
    ],
)
def test_a_setting_is_taken_out_with_its_comma(before: str, after: str) -> None:
    assert edit(before.encode(), {"bip": None}).decode() == after


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"[]", "not an object"),
        (b"null", "not an object"),
        (b'{"a": 1,}', "line 1"),
        (b'{\n "a": 1\n "b": 2}', "line 3"),
        (b'{"a": 1, "a": 2}', "'a' more than once"),
        (b'{"a": {"b": 1, "b": 1}}', "'b' more than once"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": 1} {"b": 2}', "after its object"),
        (b'{"a": "\xff"}', "UTF-8"),
        (b"\xff\xfe{\x00}\x00", "UTF-8"),
        (b'{"a": ' + b"[" * 100_000, "deep"),
        (b'{"a": ' + b"[" * 80 + b"]" * 80 + b"}", "deep"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"a": "cut', "not JSON"),
        (b"// comment\n{}", "not JSON"),
    ],
)
def test_what_can_be_read_in_two_ways_is_refused(text: bytes, says: str) -> None:
    for read in (settings, lambda data: edit(data, OURS)):
        with pytest.raises(OvsmeshError, match=says):
            read(text)


space = st.text(" \t\r\n", max_size=4)
words = st.text('ab"\\{}[],: \n\u00e9\u2028\U0001f600', max_size=6)
scalar = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | words
value = st.recursive(scalar, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3))
keys = st.sampled_from(["bridge", "mtu", "bip", "a", "b", "log-opts", "", "é", '"', "}"])


@st.composite
def files(draw: st.DrawFn) -> tuple[bytes, dict[str, Any]]:
    """Text of a daemon.json as anyone may have laid it out, and what it says."""
    says = draw(st.dictionaries(keys, value, max_size=5))
    parts = []
    for key, what in says.items():
        ascii_only, spread = draw(st.booleans()), draw(st.sampled_from([None, 2]))
        text = json.dumps(what, ensure_ascii=ascii_only, indent=spread)
        parts.append(f"{draw(space)}{json.dumps(key, ensure_ascii=ascii_only)}{draw(space)}:{draw(space)}{text}")
    joined = ""
    for n, part in enumerate(parts):
        joined += f"{draw(space)},{part}" if n else part
    text = f"{draw(space)}{{{joined}{draw(space)}}}{draw(space)}"
    return text.encode(), says


@given(files(), st.dictionaries(keys, st.none() | st.integers() | st.text("ab", max_size=3), max_size=4))
def test_an_edit_says_what_it_was_to_say_and_nothing_else(
    file: tuple[bytes, dict[str, Any]], changes: dict[str, Any]
) -> None:
    data, says = file
    assert settings(data) == says
    after = edit(data, changes)
    found = settings(after)
    wanted = says | changes
    gone = {key for key, what in changes.items() if what is None}
    assert found == {key: what for key, what in wanted.items() if key not in gone}
    assert list(found) == [k for k in says if k not in gone] + [k for k in changes if k not in says and k not in gone]
    assert edit(after, changes) == after
    # outside of the white space and commas around, each member that stays keeps its own bytes
    kept = {key: what for key, what in says.items() if key not in changes}
    if kept == says and not gone:
        added = [key for key in changes if key not in says]
        if says:
            assert edit(after, dict.fromkeys(added)) == data


@given(st.binary(max_size=40))
def test_no_bytes_bring_it_down(data: bytes) -> None:
    try:
        found = settings(data)
    except OvsmeshError:
        return
    assert settings(edit(data, OURS)) == found | OURS
