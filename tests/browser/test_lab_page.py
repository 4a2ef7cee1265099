"""The page of a real agent in a real mesh: what it shows is what the agent serves."""

from __future__ import annotations

import http.client
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ovsmesh.lab import netns
from ovsmesh.lab.faults import fault, tunnel
from ovsmesh.lab.host import Host
from tests.support.chromium import Chromium, Page
from tests.support.labtools import SOON, Make

VERDICT = "document.getElementById('verdict').textContent"


@contextmanager
def page_of(host: Host, folder: Path) -> Iterator[Page]:
    """The page as someone on the host sees it."""
    browser = netns.within(host.ns, lambda: Chromium(folder))
    try:
        yield browser.open("http://127.0.0.1:9474/")
    finally:
        browser.close()


@pytest.mark.lab
@pytest.mark.browser
def test_the_page_shows_what_packets_do_and_that_the_agent_is_gone(lab: Make, tmp_path: Path) -> None:
    mesh = lab(3, 1)
    one, three = mesh.host(1), mesh.host(3)
    with page_of(one, tmp_path) as page:
        page.until(f"{VERDICT}.startsWith('✔ h1')")
        page.until("document.querySelectorAll('#matrix-tables td[class^=rtt]').length === 6")
        peers = {row[0]: row for row in page.rows("#peers-table")}
        assert peers.keys() == {"h2", "h3"} and peers["h2"][1] == "ok"
        page.until(
            "[...document.querySelectorAll('#peers-table tbody tr')].every(row => !row.textContent.includes('–, –'))"
        )
        about = page.text("#about-table")
        assert "datapath" in about and "version unknown" not in about and "digest" in about
        assert "start" in [row[1] for row in page.rows("#history-table")]

        with fault(mesh, f"{tunnel(one, three)} drop", f"{tunnel(three, one)} drop"):
            page.until(f"{VERDICT}.startsWith('✖') && {VERDICT}.includes('h3')")
            page.until("document.querySelector('#problems').textContent.includes('h3')")
            page.until("document.querySelectorAll('#matrix-tables td.bad').length === 2")
            page.until("document.querySelector('#history-table').textContent.includes('h3 unreachable')")
        page.until(f"{VERDICT}.startsWith('✔ h1')")
        assert not page.complaints()

        one.stop_agent(signal.SIGKILL)
        page.until(f"{VERDICT}.startsWith('✖ the agent does not answer since ')")


def asked(ns: str, address: str, path: str) -> int:
    """The status of a GET from inside a namespace."""
    connection = http.client.HTTPConnection(address, 9474, timeout=SOON)
    connection.sock = netns.within(ns, lambda: socket.create_connection((address, 9474), SOON))
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    finally:
        connection.close()


@pytest.mark.lab
def test_pods_and_other_hosts_get_health_and_metrics_and_no_page(lab: Make) -> None:
    mesh = lab(2, 1)
    one, two = mesh.hosts
    one.stop_agent()
    one.start_agent("--listen=0.0.0.0:9474")
    netns.wait_for("the agent to listen", one.ready, SOON)
    own, gateway = str(one.address), str(one.pod_cidrs[0].network_address + 1)
    strangers = [
        (one.pods[0].ns, own),
        (one.pods[0].ns, gateway),
        (two.pods[0].ns, own),
        (two.ns, own),
        (two.ns, gateway),
    ]
    documents = ("/", "/status.json", "/matrix.json", "/history.json")
    for ns, address in strangers:
        assert {path: asked(ns, address, path) for path in documents} == dict.fromkeys(documents, 403)
        assert asked(ns, address, "/metrics") == asked(ns, address, "/healthz") == 200
    for address in ("127.0.0.1", own, gateway):
        assert {path: asked(one.ns, address, path) for path in documents} == dict.fromkeys(documents, 200)
