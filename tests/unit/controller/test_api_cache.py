"""When a new leader's copy of the Nodes is as new as a list: not before its watch has brought what the list has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from types import MappingProxyType
from typing import Any, cast

import pytest

from ovsmesh.controller.api_cache import ApiCache
from ovsmesh.controller.membership import NodeView, parse_node
from ovsmesh.kube.client import Page
from ovsmesh.kube.reflector import Collection
from ovsmesh.wakeup import Wakeup


def node(name: str, version: str = "1") -> dict[str, Any]:
    return {"metadata": {"name": name, "uid": f"{name}-{version}"}}


class Server:
    """An API server with these Nodes, and a watch that brings only what it is told to."""

    def __init__(self) -> None:
        self.nodes: list[dict[str, Any]] = []
        self.lists = 0
        self.watched: dict[str, NodeView] = {}

    def pages(self, path: str, limit: int) -> Iterator[Page]:
        self.lists += 1
        yield Page(self.nodes, "7")

    def collection(self) -> Collection[NodeView]:
        return Collection(MappingProxyType(dict(self.watched)), synced=True)

    def deliver(self, *nodes: dict[str, Any]) -> None:
        self.watched = {view.name: view for view in map(parse_node, nodes)}


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def cache(server: Server) -> Iterator[ApiCache]:
    with closing(Wakeup()) as wakeup:
        made = ApiCache(cast(Any, server), wakeup)
        made._nodes = cast(Any, server)
        yield made


def test_a_copy_that_is_current_is_taken_at_once(server: Server, cache: ApiCache) -> None:
    server.nodes = [node("a"), node("b")]
    server.deliver(*server.nodes)
    assert cache.caught_up(1)
    assert server.lists == 1


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([node("a")], [node("a"), node("b")]),
        ([node("a"), node("b")], [node("a")]),
        ([node("a")], [node("a", "2")]),
    ],
    ids=["one came", "one left", "one was made again"],
)
def test_a_copy_that_is_behind_is_waited_for(server: Server, cache: ApiCache, before: Any, after: Any) -> None:
    server.nodes = after
    server.deliver(*before)
    assert not cache.caught_up(1)
    assert not cache.caught_up(1)
    server.deliver(*after)
    assert cache.caught_up(1)
    assert server.lists == 1


def test_a_copy_that_is_ahead_of_the_list_is_current(server: Server, cache: ApiCache) -> None:
    server.nodes = [node("a"), node("b")]
    server.deliver(node("a"))
    assert not cache.caught_up(1)
    server.deliver(node("a"), node("b", "2"), node("c"))
    assert cache.caught_up(1)


def test_each_term_makes_a_list_of_its_own(server: Server, cache: ApiCache) -> None:
    server.nodes = [node("a"), node("b")]
    server.deliver(node("a"))
    assert not cache.caught_up(1)
    server.nodes.append(node("c"))
    assert not cache.caught_up(2)
    server.deliver(node("a"), node("b"))
    assert not cache.caught_up(2), "c came between the terms"
    server.deliver(*server.nodes)
    assert cache.caught_up(2)
    assert server.lists == 2


@pytest.mark.parametrize("known", [True, False])
def test_a_node_of_another_shape_stops_no_leader(server: Server, cache: ApiCache, known: bool) -> None:
    bad = {"metadata": {"name": "b", "uid": "b-1", "annotations": ["no map"]}, "spec": "no map", "status": 7}
    server.nodes = [node("a"), bad]
    server.deliver(node("a"), *([node("b")] if known else []))
    assert cache.caught_up(1)
