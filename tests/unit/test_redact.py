"""What goes to others holds no secret, and what a maintainer needs stays."""

from __future__ import annotations

import base64
import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovsmesh.redact import LEFT_OUT, redact

SECRET = "hunter2-S3cr3t"
PEM = "-----BEGIN RSA PRIVATE KEY-----\nMIIEow\nIBAAKC\n-----END RSA PRIVATE KEY-----"
PLANTED = [
    f"https://user:{SECRET}@proxy.example:3128/x",
    f"http://u:p@ss/{SECRET}@proxy.example",
    f"socks5h://{SECRET}@[::1]:1080",
    f"proxy = bob:{SECRET}@proxy.example:3128",
    f'{{"proxies": {{"default": {{"httpProxy": "http://bob:{SECRET}@p:1"}}}}}}',
    f'"password": "{SECRET}"',
    f"'db_password' : '{SECRET}'",
    f"PASSWORD={SECRET}",
    f"export AWS_SECRET_ACCESS_KEY={SECRET}",
    f'external_ids {{password="{SECRET}", ovsmesh=x}}',
    f"options: {{psk={SECRET}, remote_ip=192.0.2.1}}",
    f'{{\\"password\\":\\"{SECRET} with spaces\\",\\"a\\":1}}',
    f"Authorization: Bearer {SECRET}",
    f"authorization: Basic {SECRET}",
    f"curl -H 'Authorization: token {SECRET}'",
    f"got a bearer {SECRET}abcdef in a line",
    f"--password {SECRET}",
    f"--registry-token={SECRET} --other x",
    f"client-key-data: {SECRET}",
    f'kubectl.kubernetes.io/last-applied-configuration: \'{{"a": "{SECRET}"}}\'',
    f'"kubectl.kubernetes.io/last-applied-configuration":"{{\\"a\\":\\"{SECRET}\\"}}"',
    PEM.replace("MIIEow", SECRET),
    PEM.replace("MIIEow", SECRET).replace("\n", "\\n"),
    f"-----BEGIN OPENSSH PRIVATE KEY-----\n{SECRET}\nand the rest was cut off",
    f"eyJhbGciOiJIUzI1NiJ9.{SECRET}.abc",
    f"auth={SECRET}",
    f"snmp community={SECRET}",
    f"Authorization: Basic {SECRET[:7]} {SECRET}",
    f"bearer {SECRET}",
    f"password: |\n  one {SECRET}\n  two {SECRET}",
    f'kubectl.kubernetes.io/last-applied-configuration: |\n  {{"a": "{SECRET}"}}',
    f"! node web2: x-registry {SECRET}: unknown key: known are name, address",
    f'{{"reason": "UnknownKey", "message": "unknown", "node": "b", "field": "x-pull", "value": "{SECRET}"}}',
]


@pytest.mark.parametrize("text", PLANTED)
def test_a_secret_is_left_out(text: str) -> None:
    for around in (text, f"Nov 29 02:10:11 host ovsmesh[1]: {text} and more", f"line\n{text}\nline"):
        found = redact(around)
        assert SECRET not in found and LEFT_OUT in found
        assert redact(found) == found


def test_a_value_of_yaml_goes_on_to_the_end_of_the_line() -> None:
    assert redact(f"a: 1\n  db_password: correct horse {SECRET}\nb: 2") == f"a: 1\n  db_password: {LEFT_OUT}\nb: 2"


def test_json_stays_json() -> None:
    tree = {"password": SECRET, "token": 12345, "auth": None, "x": {"secret": 'a " b'}, "secrets": {"y": [1]}}
    left_out = dict.fromkeys(("password", "token", "auth"), LEFT_OUT)
    assert json.loads(redact(json.dumps(tree))) == tree | left_out | {"x": {"secret": LEFT_OUT}}


def test_key_material_is_left_out_by_its_form() -> None:
    for size in (32, 48, 300):
        key = base64.b64encode(bytes(range(7, 7 + 32)) * (size // 32)).decode()
        assert key not in redact(f"key {key}\n") and key not in redact(f'{{"x": "{key}"}}')


KEPT = [
    " cookie=0x6f76736d, duration=1.5s, table=0, n_packets=3, priority=100,in_port=LOCAL,dl_dst=0a:58:0a:61:02:01"
    ' actions=output:"gre-web2"',
    'options: {key="7", local_ip="192.0.2.11", remote_ip="192.0.2.12"}',
    "10.97.2.0/24 via 10.97.2.1 dev kbr0 proto 111 metric 111 onlink mtu 1462",
    "fd00:97:2::/64 via fd00:97:2::1 dev kbr0 proto 111 metric 111 pref medium",
    "0a:58:0a:61:02:01 dev obr0 master kbr0 static",
    "-A FORWARD -m comment --comment ovsmesh:forward-in:1a2b3c -j ACCEPT",
    '2026-11-29T02:10:11.123Z {"event": "drift", "what": "route 10.97.2.0/24 was deleted by someone"}',
    "/usr/lib/x86_64-linux-gnu/python3.11/site-packages/Openvswitch2/db/idl.py",
    "sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    "web1: 1 of 2 peers not reachable: web3 (since 14:02:11, nothing arrives from it)",
    "node web2: address 192.0.2.12: is also the address of web1",
    "MeshSlices with its service account; see https://example.com/a?b=c#d",
    "inet6 fe80::858:aff:fe61:101/64 scope link",
]


@pytest.mark.parametrize("text", KEPT)
def test_what_a_maintainer_needs_stays(text: str) -> None:
    assert redact(text) == text


@given(st.text(alphabet="a@:/ \"'=-\\\n<>eyJ.", max_size=200), st.sampled_from(PLANTED))
def test_nothing_around_it_saves_a_secret(noise: str, planted: str) -> None:
    assert SECRET not in redact(f"{noise}\n{planted}\n{noise}")


@pytest.mark.parametrize(
    "unit",
    [
        "a:",
        "a://",
        "--",
        "password",
        "key---",
        "x@",
        "://",
        "-----BEGIN A-----",
        "eyJ",
        '"',
        "\\",
        "token ",
        "A1a/",
        "-",
    ],
)
def test_time_grows_with_the_length_of_a_hostile_text_and_not_with_its_square(unit: str) -> None:
    def took(size: int) -> float:
        text = unit * (size // len(unit)) + " password a@b"
        start = time.process_time()
        redact(text)
        return time.process_time() - start

    small = min(took(20_000) for _ in range(3))
    assert took(320_000) < max(small, 0.002) * 16 * 6
