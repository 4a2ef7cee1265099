"""The nodes of a mesh file: a bad entry is refused with node, field and value, and keeps its last good entry."""

from __future__ import annotations

import pytest

from tests.support.meshtext import A, B, C, names, read, text_of

CIDRS_CASES = {
    # case: (podCIDRs, reason, index, value, parts of the text)
    "host bits": ("[10.97.2.7/24]", "PodCIDRInvalid", 0, "10.97.2.7/24", ["10.97.2.0/24"]),
    "host bits v6": ("['fd00:97:2::1/64']", "PodCIDRInvalid", 0, "fd00:97:2::1/64", ["fd00:97:2::/64"]),
    "second CIDR": ("[10.97.2.0/24, nope]", "PodCIDRInvalid", 1, "nope", ["not a CIDR"]),
    "no prefix length": ("[10.97.2.0]", "PodCIDRInvalid", 0, "10.97.2.0", ["prefix length"]),
    "netmask": ("[10.97.2.0/255.255.255.0]", "PodCIDRInvalid", 0, "10.97.2.0/255.255.255.0", []),
    "outside": ("[10.98.2.0/24]", "PodCIDROutside", 0, "10.98.2.0/24", ["10.97.0.0/16"]),
    "larger than the cluster": ("[10.96.0.0/15]", "PodCIDROutside", 0, "10.96.0.0/15", []),
    "overlap": ("[10.97.0.0/20]", "PodCIDRConflict", 0, "10.97.0.0/20", ["10.97.1.0/24 of node a", "comes first"]),
    "overlap with itself": (
        "[10.97.2.0/24, 10.97.2.128/25]", "PodCIDRConflict", 1, "10.97.2.128/25", ["podCIDRs[0]"],
    ),
    "mapped CIDR": ("['::ffff:10.97.2.0/120']", "PodCIDROutside", 0, "::ffff:10.97.2.0/120", []),
    "no room": ("[10.97.2.0/31]", "PodCIDRInvalid", 0, "10.97.2.0/31", ["/30"]),
    "no room v6": ("['fd00:97:2::/127']", "PodCIDRInvalid", 0, "fd00:97:2::/127", ["/126"]),
    "null": ("", "PodCIDRMissing", None, "missing", []),
    "empty": ("[]", "PodCIDRMissing", None, "[]", []),
    "a string": ("10.97.2.0/24", "PodCIDRInvalid", None, "10.97.2.0/24", ["wanted a list", "[10.97.2.0/24]"]),
    "a list of lists": ("[[10.97.2.0/24]]", "PodCIDRInvalid", 0, "[10.97.2.0/24]", ["found a list"]),
    "a list of numbers": ("[10.97]", "PodCIDRInvalid", 0, "10.97", ["found a number"]),
    "too many": ("[" + "10.97.2.0/24, " * 38 + "]", "PodCIDRInvalid", None, "10.97.2.0/24, …]", ["38"]),
}  # fmt: skip
ADDRESS_CASES = {
    # address: (value, parts of the text)
    "1.5": ("1.5", ["found a number"]),
    "192.0.2.256": ("192.0.2.256", ["not an IP address"]),
    "192.0.2.2/24": ("192.0.2.2/24", ["leave out"]),
    "'fe80::1%eth0'": ("'fe80::1%eth0'", []),
    "0.0.0.0": ("0.0.0.0", ["unspecified"]),
    "'::'": ("::", ["unspecified"]),
    "127.0.0.1": ("127.0.0.1", ["loopback"]),
    "'::1'": ("::1", ["loopback"]),
    "224.0.0.9": ("224.0.0.9", ["multicast"]),
    "'ff02::1'": ("ff02::1", ["multicast"]),
    "169.254.1.1": ("169.254.1.1", ["link-local"]),
    "'fe80::1'": ("fe80::1", ["link-local"]),
    "255.255.255.255": ("255.255.255.255", ["broadcast"]),
    "'::ffff:192.0.2.2'": ("::ffff:192.0.2.2", ["IPv4-mapped"]),
    "10.97.200.1": ("10.97.200.1", ["10.97.0.0/16"]),
    "10.97.2.1": ("10.97.2.1", ["10.97.0.0/16"]),
    "10.97.1.1": ("10.97.1.1", ["10.97.0.0/16"]),
    '"\\a192.0.2.2"': (r"'\x07192.0.2.2'", []),
    '"192.0.2.2\\n"': (r"'192.0.2.2\n'", []),
}
NAME_CASES = {
    # name: (value, parts of the text)
    "123": ("123", ["found an integer", "quotes"]),
    "1e3": ("1e3", ["found a number", "quotes"]),
    "no": ("no", ["found a boolean"]),
    "[b]": ("[b]", ["found a list"]),
    "''": ("''", []),
    "-b": ("-b", []),
    "b_": ("b_", []),
    "bü": (r"'b\xfc'", []),
    '"b\\n"': (r"'b\n'", []),
    '"b\\e[2J"': (r"'b\x1b[2J'", []),
    "x" * 300: ("x" * 80 + "…", ["253"]),
}
CIDRS_OF_B = "podCIDRs: [10.97.2.0/24]"
BARE = {"a string": ("b", "a string"), "nothing": ("~", "nothing"), "a list": ("[b]", "a list")}
NODE: dict[str, tuple[str, str, str, str, str, list[str]]] = {
    # case: (entry, reason, node, field, value, parts of the text)
    "no podCIDRs": ("{name: b, address: 192.0.2.2}", "PodCIDRMissing", "b", "podCIDRs", "missing", []),
    "no address": (f"{{name: b, {CIDRS_OF_B}}}", "AddressMissing", "b", "address", "missing", []),
    "duplicate address": (
        f"{{name: b, address: 192.0.2.1, {CIDRS_OF_B}}}", "AddressConflict", "b", "address", "192.0.2.1", ["node a"],
    ),
    "duplicate name": (
        f"{{name: a, address: 192.0.2.2, {CIDRS_OF_B}}}", "DuplicateName", "a", "name", "a", ["line 6", "line 7"],
    ),
    "no name": (f"{{address: 192.0.2.2, {CIDRS_OF_B}}}", "NameMissing", "nodes[1]", "name", "missing", []),
    "unknown key": (
        f"{{name: b, adress: 192.0.2.2, {CIDRS_OF_B}}}", "UnknownKey", "b", "adress", "192.0.2.2",
        ["did you mean address?"],
    ),
    "unknown key by case": (
        "{name: b, address: 192.0.2.2, podCidrs: [x]}", "UnknownKey", "b", "podCidrs", "[x]",
        ["did you mean podCIDRs?"],
    ),
    "uid a number": (f"{B[:-1]}, uid: 7}}", "NodeInvalid", "b", "uid", "7", []),
    "zone hostile": (B[:-1] + ', zone: "\\e"}', "NodeInvalid", "b", "zone", r"'\x1b'", []),
    **{f"entry {k}": (e, "NodeInvalid", "nodes[1]", "entry", e, [what]) for k, (e, what) in BARE.items()},
    **{
        f"podCIDRs {k}": (
            f"{{name: b, address: 192.0.2.2, podCIDRs: {text}}}", reason, "b",
            "podCIDRs" if index is None else f"podCIDRs[{index}]", value, parts,
        )
        for k, (text, reason, index, value, parts) in CIDRS_CASES.items()
    },
    **{
        f"address {text}": (
            f"{{name: b, address: {text}, {CIDRS_OF_B}}}", "AddressInvalid", "b", "address", value, parts,
        )
        for text, (value, parts) in ADDRESS_CASES.items()
    },
    **{
        f"name {text[:20]}": (
            f"{{name: {text}, address: 192.0.2.2, {CIDRS_OF_B}}}", "NameInvalid", "nodes[1]", "name", value, parts,
        )
        for text, (value, parts) in NAME_CASES.items()
    },
}  # fmt: skip


@pytest.mark.parametrize("case", NODE)
def test_one_node_is_refused_and_the_others_converge(case: str) -> None:
    entry, reason, node, field, value, parts = NODE[case]
    mesh, problems = read(text_of(A, entry, C))
    assert names(mesh) == "ac"
    assert mesh == read(text_of(A, C))[0]
    (problem,) = problems
    assert (problem.reason, problem.node, problem.field) == (reason, node, field)
    assert problem.value == value or (len(value) > 12 and problem.value.endswith(value))
    text = str(problem)
    assert text.isprintable() and len(text) < 500
    for part in [f"node {node}", field, value, *parts]:
        assert part in text
    assert ("line 7" in text) == entry.startswith("{")


@pytest.mark.parametrize("case", [c for c in NODE if NODE[c][2] == "b"])
def test_a_refused_node_keeps_its_last_good_entry(case: str) -> None:
    last, _ = read(text_of(A, B, C))
    mesh, (problem,) = read(text_of(A, NODE[case][0], C), last)
    assert "keeping its last good entry" in problem.message
    assert mesh is last
