"""What happens to a run that the processes which log to it must hear of."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Set


class Events:
    """Pipelines that end, and the wish of somebody to stop the run."""

    def __init__(self) -> None:
        self._happened = threading.Condition()
        self._ended: set[str] = set()
        self.stopped = False

    def end(self, prefixes: Iterable[str]) -> None:
        with self._happened:
            self._ended.update(prefixes)
            self._happened.notify_all()

    def stop(self) -> None:
        with self._happened:
            self.stopped = True
            self._happened.notify_all()

    def beyond(self, ended: Set[str], stopped: bool) -> tuple[set[str], bool]:
        """Waits until there is more than the caller knows: prefixes of the pipelines that end, whether to stop."""
        with self._happened:
            self._happened.wait_for(lambda: self._ended - ended or self.stopped > stopped)
            return set(self._ended), self.stopped
