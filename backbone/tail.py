"""Reads an outbox, and later on what has been added. Free of Ray."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from pathlib import Path

from . import page, records
from .page import Position
from .records import HEAD, Record


@dataclasses.dataclass
class OutboxTail:
    """An outbox, and how far it has been read."""

    folder: Path
    name: str
    position: Position
    lost: bytes = page.NOTHING_LOST
    stays: bool = False  # its relay must stay, see `records.OpenFiles`

    def __post_init__(self) -> None:
        self._first = self.position.segment  # that is there

    def path(self, end: str | int) -> str:
        return f"{self.folder}/{self.name}.{end}"

    def has_news(self) -> bool | None:
        """None where somebody has removed it."""
        segment, offset, *_ = self.position
        try:
            size = os.stat(self.path(segment)).st_size
        except FileNotFoundError:
            return None
        return size > offset or (size >= records.SEGMENT and os.path.exists(self.path(segment + 1)))

    def read(self, share: int) -> tuple[list[Record], bool]:
        """The next records, as many as a share of bytes allows, or one; whether there are more."""
        found: list[Record] = []
        segment, offset, count, total = self.position
        latest = 0.0
        while True:
            # Asked before this one is read: whoever has begun the next segment adds nothing to this one.
            has_next = os.path.exists(self.path(segment + 1))
            content, is_cut = _content(self.path(segment), offset, share)
            share -= len(content)
            for length, (_, kind, pipeline, step, at, wall_time), body in records.parse(content):
                offset, total, latest = offset + length, total + length, max(latest, at)
                count += kind in records.COUNTED
                end = Position(segment, offset, count, total)
                found.append(Record(latest, self.name, kind, pipeline, step, wall_time, body, end))
            if is_cut or not has_next or share <= 0:
                return found, bool(found) and (is_cut or has_next)
            segment, offset = segment + 1, 0

    def event(self, kind: int, at: float = 0.0, content: bytes = b"") -> Record:
        """Something that the reader says of it; without a time, before all that was logged."""
        return Record(at, self.name, kind, 0, 0, 0.0, content, self.position)

    def acknowledge(self, end: Position, state: int, has_ended: bool) -> None:
        """Notes that it is read for good up to `end`, and removes what is of no further use."""
        last = end.segment + has_ended
        for segment in range(self._first, last):
            _remove(self.path(segment))
        self._first = last
        page.note_read(self.path("page"), state, end)
        if has_ended:
            for kind in ("page", "lost"):
                with contextlib.suppress(OSError):
                    os.unlink(self.path(kind))  # not cut: its process may have it mapped


def _remove(path: str) -> None:
    with contextlib.suppress(OSError):
        os.truncate(path, 0)  # a fork of the process may have it open
        os.unlink(path)


def _content(path: str, offset: int, share: int) -> tuple[bytes, bool]:
    """What a segment has from `offset` on, as much as the share allows, or one record; whether there is more of it."""
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size - offset
        content = os.pread(file.fileno(), min(size, share), offset)
        if HEAD.size <= len(content) < size:
            first = HEAD.size + HEAD.unpack_from(content)[0]
            if len(content) < first <= size:  # it is larger than the share
                content = os.pread(file.fileno(), first, offset)
        return content, len(content) < size
