"""The Docker matrix with Docker 26.1, as Debian 13 has it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from ovsmesh.lab.lab import Lab
from tests.docker.matrix import Matrix, bring, cases
from tests.support import built

pytestmark = [pytest.mark.docker, pytest.mark.lab]


@pytest.fixture(scope="module")
def matrix(module_lab: Callable[..., Lab]) -> Iterator[Matrix]:
    yield from bring(module_lab, lambda: built.docker_26())


@pytest.mark.parametrize(("situation", "group"), cases())
def test_kbr0_does_what_docker0_does(matrix: Matrix, situation: str, group: str) -> None:
    assert not matrix.differences(situation, group)
