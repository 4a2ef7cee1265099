"""Leave secrets out of what goes to others.

From a source that may hold any, only what is known to be harmless is taken. From all text, what is known to be a secret
by its form or by the name before it is left out. Pure; linear in the length of the text, whatever is in it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from ovsmesh.text import printable

LEFT_OUT = "<left out>"

_NAME = (
    r"passw(?:or)?d|passwd|pwd|passphrase|secret|token|credential|authorization|(?<![a-z])auth|psk|community"
    r"|(?:api|access|private|secret|client|signing|encryption|shared|pre-?shared|wireguard|account)[-_. ]?key"
    r"|key[-_]data|certificate[-_](?:authority[-_])?data"
)
_VALUE = (
    r""""(?:\\.|[^"\\]){0,65536}"?|\\"(?:[^"\\]|\\[^"]){0,65536}(?:\\")?|'[^'\n]{0,65536}'?"""
    r"""|<left out>|(?![{\[])[^\s,;&"'}\]]+"""
)


def _value(found: re.Match[str]) -> str:
    """Return LEFT_OUT for the value of a name, in quotation marks where it has some or the name has, as in JSON."""
    mark = re.match(r"\\?[\"']", found[3])
    quote = mark[0] if mark else found[2]
    return f"{found[1]}{quote}{LEFT_OUT}{quote}"


_STEMS = ("pass", "pwd", "secret", "token", "credential", "auth", "psk", "community", "key", "data")
_YAML = (*_STEMS, "last-applied")
_RULES: tuple[tuple[tuple[str, ...], re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = tuple(
    (stems, re.compile(pattern, flags), into)
    for stems, pattern, flags, into in (
        # what stands under a key that a mesh file should not have may be anything
        (("unknown key",), r"(node [^\s:]{1,253}: [^\s:]{1,253} )[^\n]{1,4096}?(: unknown key)", 0, rf"\1{LEFT_OUT}\2"),
        (("unknownkey",), r"(UnknownKey\"[^{}]{0,4096}?\"value\": )(?:\"(?:\\.|[^\"\\]){0,65536}\")", 0,
         rf'\1"{LEFT_OUT}"'),
        # to the end where the end marker is cut off
        (("-----begin",), r"-----BEGIN [A-Z0-9 ]{1,40}-----.*?(?:-----END [A-Z0-9 ]{1,40}-----|\Z)", re.S, LEFT_OUT),
        # what kubectl keeps of the object as it was applied, secrets of its author included
        (("last-applied",), r"(last-applied-configuration[\"']?\s{0,8}[:=])(?! ?[|>])[^\n]*", 0, rf"\1 {LEFT_OUT}"),
        # as far as the last @ before the end of the word: a password may hold any of / : @
        (("@",), r"([A-Za-z][A-Za-z0-9+.-]{0,30}://)[^\s\"'<>]{0,1024}@", 0, rf"\1{LEFT_OUT}@"),
        (("@",), r"(?<![\w.%+:/-])[\w.%+-]{1,128}:[^\s:@/\"'<>]{1,256}@(?=[\w\[])", 0, f"{LEFT_OUT}@"),
        (("authorization",), r"(authorization\\?[\"']?\s{0,8}[:=]\s{0,8}\\?[\"']?)[^\n\"'\\]+", re.I, rf"\1{LEFT_OUT}"),
        (("bearer",), r"\b(bearer)(?:\s{1,8}|%20)(?!tokens?\b|auth|<left out>)[^\s\"'\\<]+", re.I, rf"\1 {LEFT_OUT}"),
        # in YAML the value goes on to the end of the line, or of the block
        (_YAML, rf"((?:{_NAME}|last-applied-configuration)[\"']?[ \t]{{0,8}}:[ \t]{{0,8}}[|>][^\n]{{0,8}}\n)"
         r"(?:[ \t]+[^\n]*(?:\n|\Z))+", re.I, rf"\1  {LEFT_OUT}\n"),
        (_STEMS, rf"^([ \t-]{{0,64}}[\w.-]{{0,64}}(?:{_NAME})[\w.-]{{0,64}}: )(?![|>])([^\s\"'{{\[][^\n]*)$",
         re.I | re.M, rf"\1{LEFT_OUT}"),
        (("basic", "digest", "negotiate", "token"),
         r"\b(basic|digest|negotiate|token)(\s{1,8}|%20)(?=[\w.~+/=-]{8})[\w.~+/=:-]+", re.I, rf"\1 {LEFT_OUT}"),
        (_STEMS, rf"((?:{_NAME})[\w.-]{{0,64}}(\\?[\"']?)\s{{0,8}}(?:=>|:=|[=:])\s{{0,8}})({_VALUE})", re.I, _value),
        (("eyj",), r"\beyJ[\w-]{8,}(?:\.[\w-]*){1,4}", 0, LEFT_OUT),
        (("akia", "asia", "gh", "glpat", "xox", "sk-", "age-"),
         r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|\bgh[pousr]_\w{20,}|\bgithub_pat_\w{20,}|\bglpat-[\w-]{16,}"
         r"|\bxox[abprs]-[\w-]{10,}|\bsk-[\w-]{20,}|\bAGE-SECRET-KEY-\w+", 0, LEFT_OUT),
    )
)  # fmt: skip
"""Words in lower case of which a text has one if the rule finds something in it, the rule, and what it puts in."""
_NAMED = re.compile(_NAME, re.I)
_OPTION = re.compile(rf"((?<![\w-])--?([\w-]{{1,64}})[ \t]{{1,8}})(?!<left out>|-)({_VALUE})")
_LONG = re.compile(r"(?<![\w+/=.-])[A-Za-z0-9+/_-]{40,}={0,2}(?![\w+/])")


def redact(text: str) -> str:
    """Return the text with LEFT_OUT for each secret."""
    lower = text.lower()
    for stems, pattern, into in _RULES:
        if any(stem in lower for stem in stems):
            text = pattern.sub(into, text)
    return _LONG.sub(_encoded, _OPTION.sub(_option, text))


def _option(found: re.Match[str]) -> str:
    return found[1] + LEFT_OUT if _NAMED.search(found[2]) else found[0]


def _encoded(found: re.Match[str]) -> str:
    """Return LEFT_OUT for what looks like key material in base64: digits and both cases. Paths and digests stay."""
    text = found[0]
    mixed = any(map(str.isdigit, text)) and any(map(str.isupper, text)) and any(map(str.islower, text))
    return LEFT_OUT if mixed and text.count("/") * 12 < len(text) else text


# What is known to be harmless

_OPTIONS = (
    *("remote_ip", "local_ip", "key", "in_key", "out_key", "dst_port", "csum", "df_default", "tos", "ttl", "peer"),
    *("packet_type", "exts", "egress_pkt_mark", "n_rxq", "dpdk-devargs"),
)
_CONFIG = (
    *("flow-restore-wait", "hw-offload", "tc-policy", "max-idle", "max-revalidator", "n-handler-threads"),
    *("n-revalidator-threads", "vlan-limit", "stats-update-interval", "mac-table-size", "mac-aging-time", "hwaddr"),
    *("datapath-id", "disable-in-band", "forward-bpdu", "pmd-cpu-mask", "dpdk-init", "datapath-type"),
    *("driver_name", "driver_version", "tunnel_egress_iface", "tunnel_egress_iface_carrier", "hostname", "rundir"),
)
"""Keys of map columns whose values are known to be harmless: besides these, those of ovsmesh."""
TABLES = {
    "Open_vSwitch": "ovs_version db_version next_cfg cur_cfg system_type system_version datapath_types iface_types "
    "dpdk_initialized other_config external_ids",
    "Bridge": "name datapath_type datapath_id datapath_version fail_mode protocols stp_enable rstp_enable "
    "mcast_snooping_enable other_config external_ids",
    "Port": "name tag trunks vlan_mode protected bond_mode fake_bridge other_config external_ids",
    "Interface": "name type options ofport ofport_request error admin_state link_state link_speed mac mac_in_use mtu "
    "mtu_request ifindex link_resets statistics status other_config external_ids",
    "Controller": "target is_connected role",
    "Manager": "target is_connected",
}
"""Table → the columns that are taken."""
_DOCKER = (
    *("bridge", "bip", "fixed-cidr", "fixed-cidr-v6", "ipv6", "ip6tables", "iptables", "ip-forward", "ip-masq", "mtu"),
    *("icc", "userland-proxy", "live-restore", "default-gateway", "default-address-pools", "firewall-backend"),
    *("allow-direct-routing", "ip-forward-no-drop"),
)
"""Keys of daemon.json about networks."""
_COMMENT = re.compile(r"""(comment )(?!--|"?ovsmesh|"[a-z0-9-]{1,40} [0-9a-f]{8}")("[^"\n]*"?|\S+)""")
"""Comments but those of ovsmesh's own rules, see nft_syntax."""
_ALIAS = re.compile(r"^( +alias )(?!ovsmesh$).*$", re.MULTILINE)
_BRACES = re.compile(r"\{[^{}\n]*\}")
_PAIR = re.compile(r"""([\w-]+)=("(?:\\.|[^"\\])*"?|[^,}\s]*)""")


def comments(text: str) -> str:
    """Return a list of filter rules without the comments of others."""
    return _COMMENT.sub(rf"\1{LEFT_OUT}", text)


def aliases(text: str) -> str:
    """Return what `ip` prints without the link aliases of others."""
    return _ALIAS.sub(rf"\1{LEFT_OUT}", text)


def daemon_json(found: dict[str, Any]) -> dict[str, Any]:
    """Return what a daemon.json says about networks."""
    return {key: found[key] for key in _DOCKER if key in found}


def _known(key: object) -> bool:
    return str(key) in (*_OPTIONS, *_CONFIG) or str(key).startswith("ovsmesh")


def _column(value: Any) -> Any:
    """Return a value of the database as plain JSON, what is not known to be harmless left out."""
    match value:
        case ["map", list(pairs)]:
            return {k: v if _known(k) or isinstance(v, int) else LEFT_OUT for k, v in pairs}
        case ["set", list(values)]:
            return [_column(each) for each in values]
        case ["uuid", str(text)]:
            return text
    return value


def table(name: str, text: str) -> str:
    """Return a table of OVSDB as `ovs-vsctl -f json list` prints it, a row a line. Raise ValueError if it is none."""
    names = TABLES[name].split()
    try:
        found = json.loads(text)
        rows = [dict(zip(found["headings"], row, strict=True)) for row in found["data"]]
        return "".join(json.dumps({n: _column(row[n]) for n in names if n in row}) + "\n" for row in rows)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ValueError(f"wanted a table, found {printable(text.strip(), 200, ' ')}") from None


def show(text: str) -> str:
    """Return the text of `ovs-vsctl show` with the values of unknown keys left out."""
    return _BRACES.sub(lambda b: _PAIR.sub(lambda p: p[0] if _known(p[1]) else f"{p[1]}={LEFT_OUT}", b[0]), text)
