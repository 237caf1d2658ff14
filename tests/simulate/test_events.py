"""The event core: nothing is lost, nothing overlaps on one resource, and closed forms come out."""

import random
from itertools import pairwise

import pytest

from hillinfer.simulate.events import Simulation


def random_simulation(seed: int) -> Simulation:
    chance = random.Random(seed)
    simulation = Simulation()
    for _ in range(200):
        before = chance.sample(simulation.tasks, min(len(simulation.tasks), chance.randrange(4)))
        simulation.add(chance.choice("abcd"), chance.choice((0, chance.random())), before)
    return simulation


@pytest.mark.parametrize("seed", range(5))
def test_every_task_runs_once_after_what_it_waits_for_and_alone_on_its_resource(seed):
    simulation = random_simulation(seed)
    before = [(task, list(task.followers)) for task in simulation.tasks]
    end = simulation.run()
    for task, followers in before:
        assert task.end == pytest.approx(task.start + task.seconds)
        assert all(follower.start >= task.end for follower in followers)
    for name in "abcd":
        mine = sorted((t for t in simulation.tasks if t.resource == name), key=lambda t: (t.start, t.end))
        assert all(second.start >= first.end for first, second in pairwise(mine))
    assert sum(simulation.busy().values()) == pytest.approx(sum(t.seconds for t in simulation.tasks))
    assert max(simulation.busy().values()) <= end == max(task.end for task in simulation.tasks)


def test_a_resource_is_never_idle_while_a_task_is_ready():
    for seed in range(5):
        simulation = random_simulation(seed)
        waited_for = {id(task): 0.0 for task in simulation.tasks}
        simulation.run()
        for task in simulation.tasks:
            for follower in task.followers:
                waited_for[id(follower)] = max(waited_for[id(follower)], task.end)
        for task in simulation.tasks:
            ready, others = waited_for[id(task)], [t for t in simulation.tasks if t.resource == task.resource]
            worked = sum(max(0.0, min(t.end, task.start) - max(t.start, ready)) for t in others)
            assert worked == pytest.approx(task.start - ready)


def test_two_stages_of_a_pipeline_take_the_longer_and_one_of_the_shorter():
    simulation = Simulation()
    before = []
    for _ in range(10):
        read = simulation.add("drive", 3.0)
        before = [simulation.add("gpu", 2.0, [read, *before])]
    assert simulation.run() == pytest.approx(10 * 3.0 + 2.0)


def test_of_two_ready_tasks_the_first_added_goes_first():
    simulation = Simulation()
    gate = simulation.add("gate", 1.0)
    first = simulation.add("drive", 1.0, [gate])
    second = simulation.add("drive", 1.0)
    third = simulation.add("drive", 1.0)
    simulation.run()
    assert (second.start, first.start, third.start) == (0.0, 1.0, 2.0)


def test_negative_time_is_refused():
    with pytest.raises(ValueError, match="cannot take"):
        Simulation().add("drive", -1.0)
