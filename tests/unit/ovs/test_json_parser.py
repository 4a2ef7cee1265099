"""The JSON parser that stands in for python-ovs's: fed in pieces, it gives what json gives of the whole."""

from __future__ import annotations

import json
from typing import Any

import ovs.json
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ovsmesh.ovs.json_parser import Parser, install

"""A busy machine is no finding."""

DOCUMENTS = [
    "{}",
    "[]",
    "[[],[{}]]",
    '{"a":1}',
    '{"id":7,"result":[{"rows":[{"_uuid":["uuid","36bc"]}]}],"error":null}',
    r'{"a":"b\"c"}',
    r'{"a":"\\"}',
    r'{"a":"\\\\","b":"}"}',
    r'["\\\"]"]',
    r'["\ud83d\ude00 \u007b"]',
    '{"braces in a string }{][":"[[["}',
    ' \n\t{"space before": [1, 2 ,3 ]}',
    '{"ü€😀":"ü€😀"}',
    '{"n":[-1.5e3,0,true,false,null]}',
]


def fed(*chunks: Any) -> Any:
    """The parser after as many of these chunks as it wanted, and what it did not take of them."""
    parser, rest = Parser(), "".join(chunks)
    for chunk in chunks:
        if parser.is_done():
            break
        taken = parser.feed(chunk)
        assert taken == len(chunk) or parser.is_done()
        rest = rest[taken:]
    return parser, rest


@pytest.mark.parametrize("text", DOCUMENTS)
def test_every_split_point(text: Any) -> None:
    for at in range(1, len(text)):
        parser, rest = fed(text[:at], text[at:])
        assert parser.is_done() and rest == ""
        assert parser.finish() == json.loads(text), at


@pytest.mark.parametrize("text", DOCUMENTS)
def test_one_character_at_a_time(text: Any) -> None:
    parser, rest = fed(*text)
    assert parser.finish() == json.loads(text) and rest == ""


@pytest.mark.parametrize("text", DOCUMENTS)
def test_what_follows_is_the_next_message(text: Any) -> None:
    both = text + '{"next":["message"]}'
    for at in range(1, len(both)):
        parser, rest = fed(both[:at], both[at:])
        assert parser.finish() == json.loads(text)
        assert json.loads(rest) == {"next": ["message"]}


@pytest.mark.parametrize("text", DOCUMENTS)
def test_it_is_done_at_the_end_and_not_before(text: Any) -> None:
    parser = Parser()
    for character in text[:-1]:
        parser.feed(character)
        assert not parser.is_done()
    assert parser.feed(text[-1]) == 1
    assert parser.is_done()


@pytest.mark.parametrize(
    "text", ['{"a":}', '{"a" 1}', "[1,]", "{]", "[}", "}", "]", "nonsense{}", '{"a":"\x01"}', "{'a':1}"]
)
def test_what_is_no_json_is_told_by_a_string(text: Any) -> None:
    parser, _ = fed(text)
    assert parser.is_done()
    assert isinstance(parser.finish(), str) and parser.finish()


@pytest.mark.parametrize("text", ["", "{", '{"a":[1', '["never ended'])
def test_half_a_message_is_not_done_and_no_value(text: Any) -> None:
    parser, _ = fed(text)
    assert not parser.is_done()
    assert isinstance(parser.finish(), str)


def test_nesting_as_deep_as_anyone_sends() -> None:
    deep = "[" * 500 + "]" * 500
    assert fed(deep)[0].finish() == json.loads(deep)


def test_nesting_deeper_than_python_can_is_an_error_and_not_the_end() -> None:
    parser, _ = fed("[" * 200_000, "]" * 200_000)
    assert parser.is_done()
    assert isinstance(parser.finish(), str)


# python-ovs takes no null character and no number beyond 64 bits, and OVS sends none
TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=8)
PLAIN = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | TEXT


def messages(leaves: Any) -> Any:
    values = st.recursive(
        leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4), max_leaves=8
    )
    return st.lists(values, max_size=4) | st.dictionaries(TEXT, values, max_size=4)


@given(
    messages(PLAIN | st.floats(allow_nan=False, allow_infinity=False)),
    st.booleans(),
    st.lists(st.integers(1, 400), max_size=6),
    st.none() | st.integers(0, 4),
)
def test_any_value_in_any_pieces(value: Any, ascii_only: Any, cuts: Any, indent: Any) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    ends = sorted({cut for cut in cuts if cut < len(text)})
    chunks = [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True)]
    parser, rest = fed(*chunks)
    assert parser.is_done() and rest == ""
    assert parser.finish() == value


@given(st.lists(st.text(st.sampled_from('{}[]"\\,:1a \n'), min_size=1, max_size=8), max_size=6))
def test_garbage_never_raises(chunks: Any) -> None:
    parser, _ = fed(*chunks)
    found = parser.finish()
    assert isinstance(found, (str, dict, list, int))


@settings(max_examples=40)
@given(messages(PLAIN), st.text(max_size=5))
def test_python_ovs_reads_the_same(value: Any, trailer: Any) -> None:
    text = json.dumps(value)
    theirs = ovs.json.from_string(text)
    assert fed(text + trailer)[0].finish() == theirs == value


def test_it_is_installed_only_where_the_fast_one_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = ovs.json.Parser
    monkeypatch.setattr(ovs.json, "Parser", slow)
    monkeypatch.setattr(ovs.json, "PARSER", ovs.json.PARSER_C)
    install()
    assert ovs.json.Parser is slow
    monkeypatch.setattr(ovs.json, "PARSER", ovs.json.PARSER_PY)
    install()
    assert ovs.json.Parser is Parser
    assert ovs.json.from_string('{"a": [1]}') == {"a": [1]}
