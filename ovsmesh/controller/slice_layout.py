"""Which members stand in which MeshSlice, and which writes make the slices say so.

Invariants that agents rely on: slice 0 carries the current count, no other a larger one; the slices of equal
settings carry an equal meshGeneration, never lower than any before; a name stands in one place, for life; the last
slice is empty only if it is slice 0. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ovsmesh.mesh.meshslice import MOST, MeshSlice, slice_name, slice_spec
from ovsmesh.mesh.types import MeshSettings, Node

_FAR = 16
"""So many slices may be missing at once and are still made again in their own place."""
FIRST_PAUSE, LONGEST_PAUSE, GROWTH = 0.1, 1.0, 1.5
"""Seconds between writes in a burst of changes: the first at once, the second after 0.1 s, growing to 1 s."""
BURST = 4
"""So many members changed since the last write make it a burst: single ones never wait for more than 0.1 s."""
_NAME = re.compile(r"(.+)-([0-9]{3}|[1-9][0-9]{3})")


class Write(NamedTuple):
    """One write: `spec` None deletes; `resource_version` "" creates, else it must still be the one there."""

    name: str
    spec: dict[str, Any] | None
    resource_version: str = ""


def assign(
    mesh: str, wanted: Sequence[Node], settings: MeshSettings, generation: int, there: Iterable[MeshSlice]
) -> tuple[Write, ...]:
    """Return the fewest writes that make the slices say `wanted` (unique names) and `settings`.

    `generation` is the Mesh's metadata.generation. Writes come in the order in which they are safe: what is
    new first, slice 0 with its count after all that it counts, deletions last.
    """
    own, strays, counted = _sort(mesh, there)
    places, dirty = _keep(wanted, own)
    for index in range(counted):
        if index not in own:
            places.setdefault(index, [])
            dirty.add(index)
    _place(wanted, places, dirty)
    if not places:
        places[0] = []
        dirty.add(0)
    # An empty slice at the end goes: in the order below no agent misses it, as slice 0 no longer counts it then.
    while not places[last := max(places)] and last > 0:
        del places[last]
        dirty.discard(last)
        if last in own:
            strays.append(own.pop(last))
    count = max(places) + 1
    since = _generation(settings, generation, own.values())
    for index, found in own.items():
        wrong_count = found.count != count if index == 0 else not index < found.count <= count
        right = (found.mesh, found.index, found.generation, found.settings) == (mesh, index, since, settings)
        if not right or wrong_count or found.problem or not found.labelled:
            dirty.add(index)
    # Those that are not there yet first: a count may only name slices that exist.
    order = sorted(dirty, key=lambda index: (index in own, index == 0, index))
    writes = [
        Write(
            slice_name(mesh, index),
            slice_spec(mesh, index, count, since, settings, places[index]),
            own[index].resource_version if index in own else "",
        )
        for index in order
    ]
    return (*writes, *(Write(stray.name, None, stray.resource_version) for stray in strays))


def _sort(mesh: str, there: Iterable[MeshSlice]) -> tuple[dict[int, MeshSlice], list[MeshSlice], int]:
    """Return the mesh's slices by index; those to delete; and how many there should be as far as they tell.

    The name decides which slice it is: its spec may have been edited.
    """
    own: dict[int, MeshSlice] = {}
    strays: list[MeshSlice] = []
    for found in sorted(there, key=lambda found: found.name):
        match = _NAME.fullmatch(found.name)
        if match and match[1] == mesh:
            own[int(match[2])] = found
        elif found.mesh == mesh:
            strays.append(found)
    if not own:
        return own, strays, 0
    # One that was counted and is gone is made again. A count or an index far beyond the others was made up by someone.
    told = own[0].count if 0 in own else max(found.count for found in own.values())
    counted = told if told <= len(own) + _FAR else 0
    while counted in own:
        counted += 1
    strays += [own.pop(index) for index in sorted(own) if index >= counted]
    return own, strays, counted


def _keep(wanted: Sequence[Node], own: Mapping[int, MeshSlice]) -> tuple[dict[int, list[Node]], set[int]]:
    """Return the members that have a place, in it, with their new entries; and the slices that this changes."""
    new = {entry.name: entry for entry in wanted}
    seen: set[str] = set()
    places: dict[int, list[Node]] = {}
    dirty: set[int] = set()
    for index, found in sorted(own.items()):
        stay: list[Node] = []
        for old in found.nodes:
            node = new.get(old.name if isinstance(old, Node) else old.node)
            if node is not None and node.name not in seen and len(stay) < MOST:
                seen.add(node.name)
                stay.append(node)
        if tuple(stay) != found.nodes:
            dirty.add(index)
        places[index] = stay
    return places, dirty


def _place(wanted: Sequence[Node], places: dict[int, list[Node]], dirty: set[int]) -> None:
    """Give members without a place one: in slices that are written anyway, then where most fit, then in new ones."""
    placed = {entry.name for nodes in places.values() for entry in nodes}
    left = [entry for entry in wanted if entry.name not in placed]
    while left:
        open_ = [index for index, nodes in places.items() if len(nodes) < MOST]
        if open_:
            index = min(open_, key=lambda at: (at not in dirty, len(places[at]), at))
        else:
            index = len(places)
            places[index] = []
        free = MOST - len(places[index])
        places[index].extend(left[:free])
        dirty.add(index)
        del left[:free]


def _generation(settings: MeshSettings, generation: int, own: Iterable[MeshSlice]) -> int:
    """Return the generation for slices of these settings; it grows even if the Mesh was deleted and made again."""
    found = list(own)
    highest = max((one.generation for one in found), default=0)
    same = [one.generation for one in found if one.settings == settings]
    if same and max(same) == highest:
        return highest
    return max(generation, highest + 1) if found else max(generation, 1)


class Pacer:
    """When to write: a first change at once, those of a burst together, at growing intervals."""

    def __init__(self) -> None:
        self._pause = 0.0
        self._last = float("-inf")

    def due(self) -> float:
        """Return the time, on the caller's clock, from which the next write may go out."""
        return self._last + self._pause

    def wrote(self, now: float, changed: int) -> None:
        """Note a write for so many changed members. Few of them, or a while without any, end the burst."""
        calm = now - self._last > 2 * max(self._pause, FIRST_PAUSE)
        if calm or changed < BURST:
            self._pause = FIRST_PAUSE
        else:
            self._pause = min(LONGEST_PAUSE, max(FIRST_PAUSE, self._pause * GROWTH))
        self._last = now
