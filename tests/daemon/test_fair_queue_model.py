"""The work queue against what is promised of it, in simulated time: no test here waits for anything."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import combinations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from hillinfer_core.errors import DeadlineExceeded, ForeignToken
from hillinferd.service.work_queue import BULK_SHARE, Priority, WorkQueue

WEIGHTS = {1: 1.0, 2: 2.0, 3: 4.0, 4: 1.0, 5: 1.0, 6: 3.0}
BULK = {5, 6}
LONGEST = 8.0


@dataclass
class Client:
    session_id: int
    weight: float = 1.0


@dataclass(eq=False)
class Asked:
    number: int
    seconds: float
    deadline: float | None
    task: asyncio.Task[None] | None = None


@dataclass
class Run:
    session_id: int
    priority: Priority
    number: int
    seconds: float
    started: float
    waiting: set[Priority]


class Simulation:
    """A queue, its clock, and what it ran; service takes simulated seconds."""

    def __init__(self) -> None:
        self.now = 0.0
        self.loop = asyncio.new_event_loop()
        self.queue = WorkQueue(clock=lambda: self.now)
        self.clients = {each: Client(each, weight) for each, weight in WEIGHTS.items()}
        self.asked: dict[int, deque[Asked]] = defaultdict(deque)
        self.ran: list[Run] = []
        self.numbers: Counter[int] = Counter()

    def priority(self, session_id: int) -> Priority:
        return Priority.bulk if session_id in BULK else Priority.decode

    def submit(self, session_id: int, seconds: float, patience: float | None = None) -> Asked:
        self.numbers[session_id] += 1
        deadline = None if patience is None else self.now + patience
        asked = Asked(self.numbers[session_id], seconds, deadline)

        async def work() -> None:
            waiting = {self.priority(each) for each in self.backlogged() if each != session_id}
            self.ran.append(
                Run(session_id, self.priority(session_id), asked.number, seconds, self.now, waiting)
            )
            self.now += seconds

        coroutine = self.queue.submit(
            self.clients[session_id], work, deadline, priority=self.priority(session_id)
        )
        asked.task = self.loop.create_task(coroutine)
        self.asked[session_id].append(asked)
        self.tick()
        return asked

    def tick(self) -> None:
        self.loop.run_until_complete(asyncio.sleep(0))

    def step(self) -> bool:
        some = self.loop.run_until_complete(self.queue.step())
        self.tick()
        return some

    def waits(self, asked: Asked) -> bool:
        assert asked.task is not None
        return not asked.task.done() and (asked.deadline is None or self.now < asked.deadline)

    def backlogged(self) -> set[int]:
        """Sessions with work that waits and whose time has not passed."""
        return {each for each, asked in self.asked.items() if any(map(self.waits, asked))}

    def close(self) -> None:
        for asked in self.asked.values():
            for each in asked:
                assert each.task is not None
                each.task.cancel()
        self.tick()
        for asked in self.asked.values():
            for each in asked:
                assert each.task is not None
                # So that nobody complains of errors that were expected.
                each.task.cancelled() or each.task.exception()
        self.loop.close()


sessions = st.sampled_from(sorted(WEIGHTS))
durations = st.floats(0.1, LONGEST)


class FairQueue(RuleBasedStateMachine):
    """Weighted shares, order, deadlines and no idling, whatever is asked in whatever order."""

    def __init__(self) -> None:
        super().__init__()
        self.simulation = Simulation()
        # Service since both of two sessions have had work waiting without a pause.
        self.together: dict[tuple[int, int], Counter[int]] = {}
        self.decode_since_bulk = 0.0
        self.last_bulk = 0.0

    def teardown(self) -> None:
        self.simulation.close()

    @rule(session=sessions, seconds=durations, count=st.integers(1, 4))
    def ask(self, session: int, seconds: float, count: int) -> None:
        for _ in range(count):
            self.simulation.submit(session, seconds)

    @rule(session=sessions, seconds=durations, patience=st.floats(0, 20))
    def ask_with_a_deadline(self, session: int, seconds: float, patience: float) -> None:
        self.simulation.submit(session, seconds, patience)

    @rule(session=sessions)
    def leave(self, session: int) -> None:
        self.simulation.queue.cancel(session, ForeignToken("the session has ended"))
        self.simulation.tick()
        assert session not in self.simulation.backlogged()
        self.part(session)

    @rule(session=sessions)
    def give_up_the_last(self, session: int) -> None:
        waiting = [asked for asked in self.simulation.asked[session] if self.simulation.waits(asked)]
        if waiting:
            assert waiting[-1].task is not None
            waiting[-1].task.cancel()
            self.simulation.tick()

    @rule(seconds=st.floats(0.1, 30))
    def let_time_pass_while_something_runs(self, seconds: float) -> None:
        self.simulation.now += seconds

    @rule(count=st.integers(1, 12))
    def serve(self, count: int) -> None:
        for _ in range(count):
            self.serve_one()

    def serve_one(self) -> None:
        simulation = self.simulation
        before, ran = simulation.backlogged(), len(simulation.ran)
        for pair in list(self.together):
            if not set(pair) <= before:
                del self.together[pair]
        for pair in combinations(sorted(before), 2):
            if simulation.priority(pair[0]) is simulation.priority(pair[1]):
                self.together.setdefault(pair, Counter())

        some = simulation.step()

        # Work conserving: it serves exactly if somebody waits.
        assert some == bool(before)
        assert len(simulation.ran) == ran + some
        if some:
            run = simulation.ran[-1]
            assert run.session_id in before
            self.account(run)

    def account(self, run: Run) -> None:
        for pair, served in self.together.items():
            if run.session_id in pair:
                served[run.session_id] += run.seconds
            one, other = pair
            apart = served[one] / WEIGHTS[one] - served[other] / WEIGHTS[other]
            assert abs(apart) <= LONGEST / WEIGHTS[one] + LONGEST / WEIGHTS[other] + 1e-6
        if run.priority is Priority.bulk:
            self.decode_since_bulk, self.last_bulk = 0.0, run.seconds
        elif Priority.bulk in run.waiting:
            self.decode_since_bulk += run.seconds
            # Bulk is not starved: after what pays for its last piece, it is next.
            limit = max(self.last_bulk, LONGEST) * (1 - BULK_SHARE) / BULK_SHARE + LONGEST
            assert self.decode_since_bulk <= limit + 1e-6
        else:
            self.decode_since_bulk = 0.0

    def part(self, session: int) -> None:
        for pair in list(self.together):
            if session in pair:
                del self.together[pair]

    @invariant()
    def order_within_a_session(self) -> None:
        for session in WEIGHTS:
            numbers = [run.number for run in self.simulation.ran if run.session_id == session]
            assert numbers == sorted(set(numbers))

    @invariant()
    def nothing_ran_late_and_only_what_is_late_was_refused(self) -> None:
        started = {(run.session_id, run.number): run.started for run in self.simulation.ran}
        for session, all_asked in self.simulation.asked.items():
            for asked in all_asked:
                assert asked.task is not None
                at = started.get((session, asked.number))
                if at is not None:
                    assert asked.deadline is None or at < asked.deadline
                elif asked.task.done() and not asked.task.cancelled():
                    error = asked.task.exception()
                    assert isinstance(error, DeadlineExceeded | ForeignToken)
                    if isinstance(error, DeadlineExceeded):
                        assert asked.deadline is not None
                        assert asked.deadline <= self.simulation.now

    @invariant()
    def decode_never_waits_for_two_pieces_of_bulk_in_a_row(self) -> None:
        if len(self.simulation.ran) > 1:
            earlier, later = self.simulation.ran[-2:]
            if earlier.priority is later.priority is Priority.bulk:
                assert Priority.decode not in later.waiting


FairQueue.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestFairQueue = FairQueue.TestCase


@dataclass
class Load:
    """Keeps ``depth`` pieces of ``seconds()`` of each session waiting."""

    simulation: Simulation
    seconds: Callable[[int], float]
    sessions: set[int]
    depth: int = 2
    served: Counter[int] = field(default_factory=Counter)

    def run(self, steps: int) -> Counter[int]:
        self.served.clear()
        for _ in range(steps):
            for session in self.sessions:
                waiting = sum(map(self.simulation.waits, self.simulation.asked[session]))
                for _ in range(self.depth - waiting):
                    self.simulation.submit(session, self.seconds(session))
                while self.simulation.asked[session] and not self.simulation.waits(
                    self.simulation.asked[session][0]
                ):
                    self.simulation.asked[session].popleft()
            assert self.simulation.step()
            run = self.simulation.ran.pop()
            self.simulation.ran.clear()
            self.served[run.session_id] += run.seconds
        return self.served


@pytest.fixture
def simulation() -> Iterator[Simulation]:
    simulation = Simulation()
    yield simulation
    simulation.close()


def test_shares_are_as_the_weights_whatever_the_pieces_cost(simulation: Simulation) -> None:
    load = Load(simulation, lambda session: {1: 5.0, 2: 0.7, 3: 1.3}[session], {1, 2, 3})
    served = load.run(3000)
    total = served.total()
    for session in (1, 2, 3):
        assert served[session] / total == pytest.approx(WEIGHTS[session] / 7, rel=0.02)


def test_bulk_has_its_share_beside_decode_that_could_use_everything(simulation: Simulation) -> None:
    served = Load(simulation, lambda _: 1.0, {1, 4, 5}).run(1000)
    assert served[5] / served.total() == pytest.approx(BULK_SHARE, rel=0.02)
    assert served[1] == pytest.approx(served[4], rel=0.02)


def test_bulk_has_all_that_decode_leaves(simulation: Simulation) -> None:
    served = Load(simulation, lambda _: 1.0, {5, 6}).run(1000)
    assert served[6] / served[5] == pytest.approx(3, rel=0.02)


def test_who_slept_has_saved_nothing(simulation: Simulation) -> None:
    Load(simulation, lambda _: 1.0, {1}).run(1000)
    # 4 was away for 1000 s of service: it gets its half from now on, not the thousand.
    served = Load(simulation, lambda _: 1.0, {1, 4}).run(20)
    assert abs(served[1] - served[4]) <= 2


def test_a_new_weight_counts_at_once(simulation: Simulation) -> None:
    load = Load(simulation, lambda _: 1.0, {1, 4})
    load.run(100)
    simulation.clients[4].weight = 3.0
    served = load.run(1000)
    assert served[4] / served[1] == pytest.approx(3, rel=0.02)


def test_what_ended_sessions_used_is_forgotten(simulation: Simulation) -> None:
    for session in range(100, 400):
        simulation.clients[session] = Client(session)
        simulation.submit(1, 1.0)
        simulation.submit(session, 1.0)
        simulation.submit(session, 1.0)
        simulation.step()
        simulation.queue.cancel(session, ForeignToken("the session has ended"))
    simulation.tick()
    assert simulation.backlogged() == {1}
    assert all(len(share._finish) <= 1 for share in (simulation.queue._decode, simulation.queue._bulk))
