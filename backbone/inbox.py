"""What outboxes send to a pipeline: each sender's batches in order and once, also when a restart shuffles them."""

from __future__ import annotations

import dataclasses
import pickle
import time
from collections.abc import Sequence
from typing import NamedTuple

from .store import Store

# What a worker says: its name, step, whether it is done with the step, packed metrics. Without a step it is gone.
Item = tuple[str, int | None, bool, bytes]


class Batch(NamedTuple):
    """What an outbox sends at once."""

    prefix: str
    sender: str  # the outbox
    process: tuple[str, int]  # its node and process id
    serial: int
    oldest: int  # the lowest serial that the sender has no answer to: all below it have been here
    said: int  # reports that the sender was given so far, with those that it found no room for
    last: bool  # it has no more, and nobody there holds a copy of the run
    items: Sequence[Item]


class Answer(NamedTuple):
    """The pipeline actor's to a batch."""

    generation: str  # another one after each restart
    finished: bool  # the batch was not taken


@dataclasses.dataclass
class Sender:
    """An outbox, as far as the pipeline knows it."""

    process: tuple[str, int]
    worker: str = ""  # the last one that logged through it
    floor: int = 0  # the lowest serial that has not been taken
    received: int = 0  # reports
    said: int = 0
    heard: float = 0.0
    ended: bool = False  # it has said its last word for now, or is dead
    early: set[int] = dataclasses.field(default_factory=set)  # serials that came before some below them
    missed: set[int] = dataclasses.field(default_factory=set)  # serials that a full disk had no room for


class Inbox:
    """The senders of a pipeline. Its state is in the store after `save`."""

    def __init__(self, store: Store, prefix: str):
        self._db, self._prefix = store.db, prefix
        self.senders: dict[str, Sender] = {}
        self._changed: set[str] = set()

    @property
    def said(self) -> int:
        """Reports that the workers are known to have logged."""
        return sum(max(sender.said, sender.received) for sender in self.senders.values())

    def load(self) -> None:
        """Goes back to what is in the store, but for what has been said since."""
        before, self._changed = self.senders, set()
        found = self._db.execute("SELECT id, state FROM senders WHERE prefix = ?", (self._prefix,))
        self.senders = {id_: pickle.loads(sender) for id_, sender in found}
        for id_, old in before.items():
            sender = self.senders.setdefault(id_, Sender(old.process))
            sender.said, sender.heard, sender.ended = max(sender.said, old.said), old.heard, old.ended
            sender.missed |= old.missed

    def hear_of(self, batch: Batch) -> Sender:
        """Notes what a batch says of its sender."""
        sender = self.senders.setdefault(batch.sender, Sender(batch.process))
        sender.said, sender.heard = max(sender.said, batch.said), time.time()
        self._changed.add(batch.sender)
        return sender

    def put(self, batch: Batch) -> list[Batch] | None:
        """The batches that can be taken now, in order: this one and those that waited for it. None for a repeat."""
        sender = self.hear_of(batch)
        if batch.serial < sender.floor or batch.serial in sender.early:
            return None
        if batch.serial == max(sender.floor, batch.oldest) and not sender.early:
            return self._taken(sender, [batch])
        self._db.execute("INSERT INTO early VALUES (?, ?, ?)", (batch.sender, batch.serial, pickle.dumps(batch)))
        sender.early.add(batch.serial)
        return self._early(batch.sender, below=self._due(sender, batch))

    def miss(self, batch: Batch) -> None:
        """Notes that there was no room for a batch, so that those behind it don't wait for it."""
        sender = self.hear_of(batch)
        if batch.serial >= sender.floor and batch.serial not in sender.early:
            sender.missed.add(batch.serial)

    def _due(self, sender: Sender, batch: Batch) -> int:
        """The lowest serial that is still to come."""
        due = max(sender.floor, batch.oldest)
        while due in sender.early or due in sender.missed:
            due += 1
        return due

    def dead(self, sender_id: str) -> list[Batch]:
        """A sender's batches that waited for one that will not come."""
        batches = self._early(sender_id, below=2**62)
        self.senders[sender_id].ended = True
        self._changed.add(sender_id)
        return batches

    def _early(self, sender_id: str, below: int) -> list[Batch]:
        where = "FROM early WHERE sender = ? AND serial < ?"
        found = self._db.execute(f"SELECT batch {where} ORDER BY serial", (sender_id, below)).fetchall()
        self._db.execute(f"DELETE {where}", (sender_id, below))
        return self._taken(self.senders[sender_id], [pickle.loads(batch) for (batch,) in found])

    def _taken(self, sender: Sender, batches: list[Batch]) -> list[Batch]:
        for batch in batches:
            sender.early.discard(batch.serial)
            sender.missed = {serial for serial in sender.missed if serial > batch.serial}
            sender.floor = batch.serial + 1
            sender.received += sum(item[1] is not None for item in batch.items)
            sender.ended = batch.last
            sender.worker = batch.items[-1][0] if batch.items else sender.worker
        return batches

    def save(self) -> None:
        rows = [(id_, self._prefix, pickle.dumps(self.senders[id_])) for id_ in self._changed]
        self._db.executemany("INSERT OR REPLACE INTO senders VALUES (?, ?, ?)", rows)
        self._changed.clear()
