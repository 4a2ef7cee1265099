"""What happens to the bridge between two transactions. All else is tried with a real database, in the lab."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from ovsmesh.ovs.ovsdb import Ovs


def test_a_bridge_that_someone_deletes_while_it_is_made_again_ends_that(monkeypatch: pytest.MonkeyPatch) -> None:
    row = SimpleNamespace(datapath_type="netdev")
    rows: list[Any] = [row, row, None]
    ovs, written = Ovs.__new__(Ovs), []
    ovs._ports = {}
    monkeypatch.setattr(ovs, "_bridge", lambda name: rows.pop(0))
    monkeypatch.setattr(ovs, "_transaction", lambda *_: None)
    monkeypatch.setattr(ovs, "_commit", lambda *_: written.append(row.datapath_type))
    ovs.remake()
    assert written == ["system"] and not rows
