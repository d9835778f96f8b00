"""Brings the outboxes of other nodes to the pipeline actor: by a relay, a small actor on each node that has some.

A relay reads, and keeps nothing: what it has brought stays where it was until it is told that it is safe. So either of
them may die at any moment.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from . import nodes, page, ray_internals
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
        """What is new, or nothing after a second. Each call acknowledges the reading that the one before returned."""
        self._reader.acknowledge(self._last)
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
        if self._closed:
            ray_internals.delete(self._key)
            shutil.rmtree(self._folder, ignore_errors=True)
            return Reading([], is_last=True)
        (self._folder / "known").unlink(missing_ok=True)
        ray_internals.delete(self._key)
        self._reader.set_state(page.NOBODY_READS)
        self._last = self._reader.read(look=True)
        if self._last.is_empty and not self._reader.stays:
            return Reading([], has_left=True)
        self._heard = time.monotonic()
        self._reader.set_state(page.IS_READ)
        ray_internals.put(self._key, os.fsencode(self._folder))
        (self._folder / "known").touch()
        return self._last

    def close(self) -> None:
        """Nothing more is taken here."""
        self._reader.close()
        self._closed = True


@dataclasses.dataclass
class Place:
    """A folder with outboxes on another node. There may be several: containers have temporary folders of their own."""

    key: bytes  # in Ray's key-value store
    folder: Path
    asked_at: float = 0.0  # when its relay was asked last; before that, when the place was found
    relay: ray.actor.ActorHandle | None = None
    call: ray.ObjectRef | None = None  # under way


class Relays:
    """The places on other nodes where outboxes are, each with a relay that has one call under way.

    positions: how far the outboxes of a place have been read. gone: called with a place that can't be read, and why.
    """

    PATIENCE = 10.0  # seconds for a place that doesn't answer

    def __init__(
        self, address: Address, positions: Callable[[str], dict[str, Position]], gone: Callable[[str, str], None]
    ):
        self._address, self._positions, self._gone = address, positions, gone
        self._found: dict[str, Place] = {}  # name -> place: what looks have found since the last `start`
        self._left: dict[str, Place] = {}  # where a relay was that has left
        self.places: dict[str, Place] = {}  # those that are not read to their end
        self._done: set[str] = set()  # names of those that are, or that can't be read
        self._closed = False

    def look(self) -> None:
        """Asks Ray's GCS where there are outboxes. In a thread of its own: a GCS that restarts doesn't answer."""
        prefix = self._address.key("place")
        for key in ray_internals.keys(prefix):
            if folder := ray_internals.get(key):
                self._found[key.removeprefix(prefix).decode()] = Place(key, Path(os.fsdecode(folder)))

    def start(self) -> None:
        """Starts relays in places that have none."""
        while self._found:  # to which a look may add at any moment
            name, place = self._found.popitem()
            if name not in self._done and name not in self.places:
                self.places[name], place.asked_at = place, time.monotonic()
        missing = [(name, place) for name, place in self.places.items() if not place.relay]
        if not missing or not ray_internals.ray_answers():
            return
        for name, place in missing:
            here = NodeAffinitySchedulingStrategy(_node(name), soft=False)
            relay = Relay.options(scheduling_strategy=here)
            place.relay = relay.remote(place.key, place.folder, self._positions(name))
            if self._closed:
                place.relay.close.remote()
            self.go_on(name)

    def go_on(self, name: str) -> None:
        """What a relay has brought is safe, and it may bring more."""
        if (place := self.places.get(name)) and place.relay and not place.call:
            place.call, place.asked_at = place.relay.read.remote(), time.monotonic()

    def brought(self) -> list[tuple[str, Reading]]:
        """What relays have brought by now."""
        readings = []
        for name, place in self._answered(self.places.items()):
            call, place.call = place.call, None
            try:
                reading = ray.get(call)
                if self._closed:  # it has been told meanwhile to read to the end
                    reading = reading._replace(has_left=False)
                readings.append((name, reading))
                if reading.is_last:
                    self._done.add(name)
                    del self.places[name]
                elif reading.has_left:
                    self._left[name] = Place(place.key, place.folder)
                    del self.places[name]
                    self._found.pop(name, None)  # somebody may log there again: the next look finds that
            except ray.exceptions.RayError as error:
                self._fail(name, error)
        self.start()  # here, so that a place that has to be read again is never missing
        return readings

    def _answered(self, places: Iterable[tuple[str, Place]]) -> list[tuple[str, Place]]:
        """Those of the places whose call has an answer."""
        calls = {place.call: (name, place) for name, place in places if place.call}
        done, _ = ray.wait([*calls], num_returns=len(calls), timeout=0) if calls else ([], [])
        return [calls[call] for call in done]

    def _fail(self, name: str, error: Exception) -> None:
        self.places[name].relay = None
        if isinstance(error, ray.exceptions.RayActorError) and "creation task" in str(error):
            self.give_up(name, str(error).strip().rpartition("\n")[2])
        elif ray_internals.ray_answers() and not nodes.is_alive(_node(name)):
            self.give_up(name, "it is dead")
        # else its process was killed, and another one is started

    def give_up(self, name: str, why: str) -> None:
        """A place can't be read. If nobody has told of it since a relay has left, nothing is missing there."""
        place = self.places.pop(name)
        self._done.add(name)
        with contextlib.suppress(Exception):  # of a GCS that restarts
            if ray_internals.ray_answers():
                if ray_internals.get(place.key) is None:
                    why = ""
                elif self._closed:
                    ray_internals.delete(place.key)
        self._gone(name, why)

    def silent(self, seconds: float) -> list[str]:
        """Places whose answer, or whose relay's start, takes longer than so many seconds."""
        late = {
            name: place
            for name, place in self.places.items()
            if (place.call or not place.relay) and time.monotonic() - place.asked_at > seconds
        }
        answered = dict(self._answered(late.items()))
        return [name for name in late if name not in answered]

    def close(self) -> None:
        """Nothing more is taken anywhere. What they still bring ends with a reading that `is_last`."""
        self._closed = True
        for place in self.places.values():
            if place.relay:
                place.relay.close.remote()
        ray_internals.delete(self._address.key("open"))
        # Behind that: whoever logs for the first time notes its place, then looks for that key. So one sees the other.
        # Where a relay has left there is nothing to read, but a folder to remove, and somebody may still want to log.
        self._found |= self._left
        self._left.clear()  # else a place that is read to its end would keep its relay
        self.look()
        self.start()


def _node(place: str) -> str:
    return place.partition(" ")[0]
