"""A dataplane is a value: nobody can change it once it is made."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import pytest

from ovsmesh.dataplane.types import Dataplane


def test_an_empty_dataplane_can_not_be_written_to() -> None:
    with pytest.raises(TypeError):
        cast(Any, Dataplane().ports)["gre-web2"] = None
    with pytest.raises(dataclasses.FrozenInstanceError):
        cast(Any, Dataplane()).ports = {}
