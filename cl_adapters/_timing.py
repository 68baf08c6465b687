"""Where the time goes: wall-clock and CPU seconds per part of the work."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Stopwatch:
    """Adds up seconds under names; nested parts are taken out of the part around them.

    Attributes:
        wall: seconds of real time per part.
        cpu: seconds of CPU time of this process per part.
    """

    wall: dict[str, float] = field(default_factory=dict)
    cpu: dict[str, float] = field(default_factory=dict)
    _nested: list[list[float]] = field(default_factory=list)

    @property
    def running(self) -> bool:
        """Whether a part is being timed."""
        return bool(self._nested)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time the block under ``name``."""
        started = (time.perf_counter(), time.process_time())
        self._nested.append([0.0, 0.0])
        try:
            yield
        finally:
            wall, cpu = time.perf_counter() - started[0], time.process_time() - started[1]
            inner = self._nested.pop()
            if self._nested:
                self._nested[-1][0] += wall
                self._nested[-1][1] += cpu
            self.wall[name] = self.wall.get(name, 0.0) + wall - inner[0]
            self.cpu[name] = self.cpu.get(name, 0.0) + cpu - inner[1]
