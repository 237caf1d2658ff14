"""The event core: tasks that wait for tasks, and resources that do one task at a time."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass
class Task:
    """One piece of work on one resource. Times in seconds; `start` and `end` are set by `run`."""

    resource: str
    seconds: float
    number: int
    waits_for: int = 0
    ready: float = 0.0
    start: float = 0.0
    end: float = 0.0
    followers: list[Task] = field(default_factory=list)


class Simulation:
    """Tasks are added, then run once. Of the tasks that are ready, a resource serves the first added."""

    def __init__(self) -> None:
        self.tasks: list[Task] = []

    def add(self, resource: str, seconds: float, after: Iterable[Task] = ()) -> Task:
        """Add a task that begins when all of `after` have ended and `resource` is free."""
        if seconds < 0:
            raise ValueError(f"a task cannot take {seconds} s")
        before = list({id(task): task for task in after}.values())
        task = Task(resource, seconds, len(self.tasks), len(before))
        for each in before:
            each.followers.append(task)
        self.tasks.append(task)
        return task

    def run(self) -> float:
        """Set all starts and ends; return when the last task ends."""
        free: dict[str, float] = {}
        queues: dict[str, list[int]] = {}
        # Ends come before beginnings of the same moment, so that a queue is complete when it is served.
        events: list[tuple[float, int, int]] = []
        for task in self.tasks:
            if not task.waits_for:
                heapq.heappush(events, (0.0, 0, task.number))
        while events:
            now, kind, number = heapq.heappop(events)
            task = self.tasks[number]
            queue = queues.setdefault(task.resource, [])
            if kind == 0:
                heapq.heappush(queue, number)
                heapq.heappush(events, (max(now, free.get(task.resource, 0.0)), 1, number))
                continue
            if not queue or free.get(task.resource, 0.0) > now:
                continue
            task = self.tasks[heapq.heappop(queue)]
            task.start, task.end = now, now + task.seconds
            free[task.resource] = task.end
            if queue:
                heapq.heappush(events, (task.end, 1, queue[0]))
            for follower in task.followers:
                follower.waits_for -= 1
                follower.ready = max(follower.ready, task.end)
                if not follower.waits_for:
                    heapq.heappush(events, (follower.ready, 0, follower.number))
        return max((task.end for task in self.tasks), default=0.0)

    def busy(self) -> dict[str, float]:
        """Seconds that each resource worked."""
        sums: dict[str, float] = {}
        for task in self.tasks:
            sums[task.resource] = sums.get(task.resource, 0.0) + task.seconds
        return sums
