"""Reads the outboxes of a node. Free of Ray.

What is new there is a list of records in the order of time. Besides what processes have put into their outboxes it says
when an outbox begins, when reports were lost in it, and when it ends.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from pathlib import Path
from typing import ClassVar, NamedTuple

from . import page, records
from .files import CLOSED_FOLDER, OUTBOXES
from .page import Position
from .records import Record
from .tail import OutboxTail


class Reading(NamedTuple):
    """What is new. `Reader.acknowledge` is to be called when it is safe."""

    records: list[Record]  # in the order of time
    is_cut: bool = False  # there is more to read
    is_last: bool = False  # of a relay: it has nothing more, and nobody logs there any more
    has_left: bool = False  # of a relay: it has nothing for now, so it goes

    @property
    def is_empty(self) -> bool:
        return not self.records and not self.is_cut


class Reader:
    """Reads the outboxes below a run's private folder on this node.

    positions: of the outboxes that have been read before.
    """

    LIMIT: ClassVar = 1 << 20  # bytes of a reading, about: whoever waits for room must not wait long

    def __init__(self, private: Path, positions: dict[str, Position]):
        self._private, self._state = private, page.IS_READ
        self._folder = private / (CLOSED_FOLDER if (private / CLOSED_FOLDER).exists() else OUTBOXES)
        self._tails = {name: OutboxTail(self._folder, name, position) for name, position in positions.items()}
        self._dying: set[str] = set()  # whose process has ended
        self._changed, self._next_look, self._next_touch = 0, 0.0, 0.0

    def read(self, look: bool = False) -> Reading:
        """What has come since the last reading. look: at each page, which is done now and then anyway."""
        found = list[Record]()
        looks = look or self._has_new_pages() or time.monotonic() >= self._next_look
        if looks:
            self._look(found)
            self._next_look = time.monotonic() + max(0.1, len(self._tails) / 1000)
        found, behind = self._read_tails(found)
        if not looks and any(record.kind == records.WHO for record in found):
            # It may take the place of one that has just died, whose end must come first: look, and read again.
            return self.read(look=True)
        last = {record.outbox: record for record in found}
        for name, record in last.items():
            self._tails[name].position = record.end
        # An end comes right behind the last record: later, the successor's first report would come before it.
        for name in self._dying - behind:
            found.append(self._tails[name].event(records.ENDED, last[name].time if name in last else 0.0))
        return Reading(sorted(found, key=lambda record: record.time), is_cut=bool(behind))

    def _read_tails(self, found: list[Record]) -> tuple[list[Record], set[str]]:
        """These records, and the new ones of all outboxes, as many as one reading may have; which of them have more.

        Where an outbox is cut off, nothing later is handed on from the others: else reports of one step would come in
        two readings, with another attempt at that step between them.
        """
        has_news = [(tail, tail.has_news()) for tail in self._tails.values()]
        found += [tail.event(records.VANISHED) for tail, has in has_news if has is None]
        news = [tail for tail, has in has_news if has]
        share = max(1 << 12, self.LIMIT // max(1, len(news)))
        cut_at = dict[str, float]()  # outbox -> time
        for tail in news:
            new, is_cut = tail.read(share)
            if is_cut:
                cut_at[tail.name] = new[-1].time
            found += new
        horizon = min(cut_at.values(), default=math.inf)
        late = {record.outbox for record in found if record.time > horizon}
        return [record for record in found if record.time <= horizon], late | cut_at.keys()

    @property
    def stays(self) -> bool:
        """Whether the relay that reads here must stay."""
        return any(tail.stays for tail in self._tails.values())

    # Pages

    def _has_new_pages(self) -> bool:
        """Whether a process has begun to log. Its reports must not come behind what is later, as its parent's end."""
        try:
            changed = os.stat(self._folder).st_mtime_ns
        except FileNotFoundError:
            return False
        if changed == self._changed:
            return False
        # The time that a folder has is coarse, so it is looked at again a little later.
        self._changed = changed if time.time_ns() - changed > 100_000_000 else 0
        return any(name not in self._tails for name in self._names())

    def _names(self, end: str = ".page") -> list[str]:
        try:
            return [name[:-5] for name in os.listdir(self._folder) if name.endswith(end)]
        except FileNotFoundError:
            return []

    def _look(self, found: list[Record]) -> None:
        """At each page: whether it is new, what was lost, and whether the process lives."""
        for name in self._names():
            if not (seen := page.see(f"{self._folder}/{name}.page", self._state)):
                continue
            if name not in self._tails:  # where a state was lost, it has been read to some place before
                self._begin(name, seen.position, seen.about, found)
            tail = self._tails[name]
            if seen.lost != tail.lost:
                tail.lost = seen.lost
                found.append(tail.event(records.LOST, content=seen.lost))
            tail.stays = seen.stays
            if not seen.is_alive:
                self._dying.add(name)
        for name in self._names(".lost"):  # of a process that had no room for an outbox: it is as if it had had one
            if name not in self._tails:
                with contextlib.suppress(FileNotFoundError):  # somebody has just removed it
                    process = os.readlink(f"{self._folder}/{name}.lost")
                    self._begin(name, Position(), json.dumps(dict(name=process, counted_as="")).encode(), found)
        if time.monotonic() > self._next_touch:  # some systems clean their temporary folder of what is old
            self._next_touch = time.monotonic() + 3600
            _touch(self._private)

    def _begin(self, name: str, position: Position, about: bytes, found: list[Record]) -> None:
        tail = self._tails[name] = OutboxTail(self._folder, name, position)
        found.append(tail.event(records.BEGUN, content=about))

    def set_state(self, state: int) -> None:
        """Tells all who log here."""
        self._state = state
        for name in self._names():
            page.see(f"{self._folder}/{name}.page", state)

    def acknowledge(self, reading: Reading) -> None:
        """It is safe in the run's state. Removes segments that are read to their end, and all of who has ended."""
        ended = {record.outbox for record in reading.records if record.kind in (records.ENDED, records.VANISHED)}
        for name, end in {record.outbox: record.end for record in reading.records}.items():
            self._tails[name].acknowledge(end, self._state, name in ended)
        for name in ended:
            del self._tails[name]
        self._dying -= ended

    @property
    def is_closed(self) -> bool:
        return self._folder.name == CLOSED_FOLDER

    def close(self) -> None:
        """Whoever logs here from now on is told that the run is finished; what was logged before can be read."""
        self.set_state(page.CLOSED)  # before the folder moves, where an outbox could not begin its next segment
        if not self.is_closed:
            with contextlib.suppress(OSError):
                (self._private / OUTBOXES).mkdir(exist_ok=True)  # if somebody has removed it
                (self._private / OUTBOXES).rename(self._private / CLOSED_FOLDER)
        self._folder, self._changed, self._next_look = self._private / CLOSED_FOLDER, 0, 0.0
        for tail in self._tails.values():
            tail.folder = self._folder
        self.set_state(page.CLOSED)  # for those that have begun in between


def _touch(folder: Path) -> None:
    with contextlib.suppress(OSError):
        for path in (folder, *folder.rglob("*")):
            with contextlib.suppress(OSError):
                os.utime(path, follow_symlinks=False)
