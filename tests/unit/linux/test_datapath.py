"""Whether the kernel has Open vSwitch's datapath."""

from __future__ import annotations

import pytest

from ovsmesh.linux import kernel


@pytest.mark.parametrize(("family", "there"), [("nlctrl", True), ("ovsmesh_none", False)])
def test_a_family_that_every_kernel_has_and_one_that_none_has(
    monkeypatch: pytest.MonkeyPatch, family: str, there: bool
) -> None:
    monkeypatch.setattr(kernel, "_OVS_DATAPATH", family)
    assert kernel.kernel_datapath() is there
