"""Brings the outboxes of other nodes to the pipeline actor: by a relay, a small actor on each node that has some.

A relay reads, and keeps nothing: what it has brought stays where it was until it is told that it is safe. So either of
them may die at any moment.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from . import page, ray_internals
from .files import Address, is_private_folder
from .page import Position
from .reading import Reader, Reading


@ray.remote(num_cpus=0, max_restarts=0)
class Relay:
    """Reads a run's outboxes below `folder` on its node. Raises FileNotFoundError if it doesn't see that folder.

    key: of the place in Ray's key-value store. positions: of the outboxes that have been read before.
    """

    IDLE = 60.0  # seconds without news after which it goes: nodes must get free for the autoscaler

    def __init__(self, key: bytes, folder: Path, positions: dict[str, Position]):
        if not is_private_folder(folder):
            raise FileNotFoundError(f"{folder} is not there for Ray: a container with a temporary folder of its own?")
        self._key, self._folder, self._reader = key, folder, Reader(folder, positions)
        self._last, self._heard, self._closed = Reading([]), time.monotonic(), False

    def read(self) -> Reading:
        """What is new; after a second without news, nothing. Called again, it takes what it has brought for safe."""
        self._reader.commit(self._last)
        self._last, deadline = Reading([]), time.monotonic() + 1
        while time.monotonic() < deadline:
            self._last = self._reader.read(look=self._closed)
            if not self._last.is_empty:
                self._heard = time.monotonic()
                return self._last
            if self._closed or (time.monotonic() - self._heard > self.IDLE and not self._reader.stays):
                return self._leave()
            time.sleep(0.02)
        return self._last

    def _leave(self) -> Reading:
        """Goes, unless somebody has logged meanwhile. Whoever logs from now on tells the run of this place again."""
        if not self._closed:
            (self._folder / "known").unlink(missing_ok=True)
            ray_internals.delete(self._key)
            self._reader.set_state(page.NOBODY_READS)
            self._last = self._reader.read(look=True)
        if self._last.is_empty:
            if self._closed:
                shutil.rmtree(self._folder, ignore_errors=True)
            return Reading([], is_last=True)
        self._heard = time.monotonic()
        self._reader.set_state(page.IS_READ)
        ray_internals.put(self._key, os.fsencode(self._folder))
        return self._last

    def close(self) -> None:
        """Nothing more is taken here."""
        self._reader.close()
        self._closed = True


class Relays:
    """The places on other nodes where outboxes are, and the relay of each. It has one call under way.

    A place is a node and a view of its files: a container may have a temporary folder of its own.

    positions: how far the outboxes of a place have been read. gone: called with a place that can't be read, and why.
    """

    PATIENCE = 10.0  # seconds for a place that doesn't answer

    def __init__(
        self, address: Address, positions: Callable[[str], dict[str, Position]], gone: Callable[[str, str], None]
    ):
        self._address, self._positions, self._gone = address, positions, gone
        self._found: dict[str, tuple[bytes, Path]] = {}  # by place, at the last look
        self._open: dict[str, tuple[bytes, Path]] = {}  # those that are not read to their end
        self._read: set[str] = set()  # places that are read to their end, or can't be read
        self._relays: dict[str, ray.actor.ActorHandle] = {}  # by place
        self._calls: dict[str, ray.ObjectRef] = {}  # by place, those under way
        self._asked_at: dict[str, float] = {}  # by place, when it was asked last, or found
        self._closed = False

    def look(self) -> None:
        """Asks Ray's GCS where there are outboxes. In a thread of its own: a GCS that restarts doesn't answer."""
        prefix = self._address.key("place")
        folders = {key: ray_internals.get(key) for key in ray_internals.keys(prefix)}
        found = {key: Path(os.fsdecode(folder)) for key, folder in folders.items() if folder}
        self._found = {key.removeprefix(prefix).decode(): (key, folder) for key, folder in found.items()}

    def start(self) -> None:
        """Starts relays in places that have none."""
        self._open = {place: at for place, at in self._found.items() if place not in self._read} | self._open
        for place in self._open.keys() - self._asked_at.keys():
            self._asked_at[place] = time.monotonic()
        missing = self._open.keys() - self._relays.keys()
        for place in missing if missing and ray_internals.ray_answers() else ():
            here = NodeAffinitySchedulingStrategy(_node(place), soft=False)
            relay = Relay.options(scheduling_strategy=here).remote(*self._open[place], self._positions(place))
            self._relays[place] = relay
            if self._closed:
                relay.close.remote()
            self.go_on(place)

    def go_on(self, place: str) -> None:
        """What a relay has brought is safe, and it may bring more."""
        if relay := self._relays.get(place):
            self._calls[place], self._asked_at[place] = relay.read.remote(), time.monotonic()

    def brought(self) -> list[tuple[str, Reading]]:
        """What relays have brought by now."""
        self.start()
        calls = {call: place for place, call in self._calls.items()}
        done, _ = ray.wait([*calls], num_returns=len(calls), timeout=0) if calls else ([], [])
        readings = []
        for place, call in ((calls[call], call) for call in done):
            del self._calls[place]
            try:
                reading = ray.get(call)
                readings.append((place, reading))
                if reading.is_last:
                    self._leave(place)
            except ray.exceptions.RayError as error:
                self._fail(place, error)
        return readings

    def _leave(self, place: str) -> None:
        for known in (self._found, self._open, self._relays, self._calls, self._asked_at):
            known.pop(place, None)
        if self._closed:  # else somebody may log there again
            self._read.add(place)

    def _fail(self, place: str, error: Exception) -> None:
        del self._relays[place]
        if isinstance(error, ray.exceptions.RayActorError) and "creation task" in str(error):
            self.give_up(place, str(error).strip().rpartition("\n")[2])
        elif ray_internals.ray_answers() and not _is_alive(place):
            self.give_up(place, "it is dead")
        # else its process was killed, and another one is started

    def give_up(self, place: str, why: str) -> None:
        self._leave(place)
        self._read.add(place)
        self._gone(place, why)

    def silent(self, seconds: float) -> list[str]:
        """Places whose answer, or whose relay's start, takes longer than so many seconds."""
        asked = [place for place in self._open if place in self._calls or place not in self._relays]
        late = [place for place in asked if time.monotonic() - self._asked_at[place] > seconds]
        calls = [self._calls[place] for place in late if place in self._calls]
        answered, _ = ray.wait(calls, num_returns=len(calls), timeout=0) if calls else ([], [])
        return [place for place in late if self._calls.get(place) not in answered]

    def close(self) -> None:
        """Nothing more is taken anywhere. What they still bring ends with a reading that `is_last`."""
        ray_internals.delete(self._address.key("open"))
        self._closed = True
        # Behind that: whoever logs for the first time notes its place, then looks for that key. So one sees the other.
        self.look()
        for relay in self._relays.values():
            relay.close.remote()
        self.start()

    @property
    def places(self) -> list[str]:
        """Those that are not read to their end."""
        return [*self._open]


def _node(place: str) -> str:
    return place.partition(" ")[0]


def _is_alive(place: str) -> bool:
    return any(node["NodeID"] == _node(place) and node["Alive"] for node in ray.nodes())
