"""One decode step of a system as events, of one application or several."""

from __future__ import annotations

from dataclasses import dataclass

from hillinfer.pipeline import choice
from hillinfer.pipeline.choice import Measured, Predictor
from hillinfer.simulate.events import Simulation, Task
from hillinfer.simulate.machine import Machine
from hillinfer.simulate.systems import PREDICTING, Layer, System, layer
from hillinfer.simulate.workload import Work

GPU, LINK, CPU, FPGA, DRIVE = "gpu", "link", "cpu", "fpga", "drive"
"""Resources: `drive` is NAND with its one path out, shared by streams to FPGA and host and by rows."""

CLIENT = "client"
"""The thread of each application that runs the model: it places rows in pools."""


RESOURCES = (GPU, LINK, CPU, FPGA, DRIVE, CLIENT)

_PIECES = 8
"""A stream for scoring is cut in so many; rows that an earlier layer waits for come between. Our choice."""


@dataclass(frozen=True)
class Step:
    """A decode step. seconds: until the last application has its token; busy: of it, by resource.

    moved_bytes: read from NAND; ios: reads of rows; both of all applications.
    """

    seconds: float
    busy: dict[str, float]
    predictor: Predictor
    miss_rate: float
    cpu_share: float
    moved_bytes: float
    ios: float

    @property
    def bottleneck(self) -> str:
        """The resource that works longest, with its share of the step."""
        name = max(self.busy, key=lambda each: self.busy[each])
        return f"{name} {min(1.0, self.busy[name] / self.seconds):.0%}"


def simulate(
    system: System,
    work: Work,
    machine: Machine,
    *,
    same_drive: bool = False,
    applications: int = 1,
    cpu_share: float | None = None,
) -> Step:
    """Return one decode step. cpu_share: see `systems.layer`."""
    one = layer(system, work, machine.shared_by(applications), same_drive, cpu_share)
    predictor = PREDICTING.get(system) or _chosen(one, work, machine, applications)
    simulation, _ = build(one, work.model.layers, predictor, applications)
    seconds = simulation.run()
    busy = {name: spent for name, spent in simulation.busy().items() if name in RESOURCES}
    layers = work.model.layers * applications
    return Step(seconds, busy, predictor, one.miss, one.cpu_share, one.moved * layers, one.ios * layers)


def build(
    one: Layer, layers: int, predictor: Predictor, applications: int = 1
) -> tuple[Simulation, list[tuple[Task | None, Task, Task]]]:
    """Return the tasks of a step, not yet run, and of the first application's layers those after which the
    rows were asked for, that had them on the GPU, and that needed them next.
    """
    simulation = Simulation()
    add = simulation.add
    marks: list[tuple[Task | None, Task, Task]] = []
    done: list[list[Task]] = [[] for _ in range(applications)]
    for number in range(layers):
        for application, before in enumerate(done):
            weights = add(LINK, one.weights, before[-2:-1])
            project = add(GPU, one.project, [*before[-1:], weights])
            # The first layer has none before it that could predict.
            ahead = predictor is not Predictor.exact and number > 0
            thread = CLIENT if application == 0 else f"{CLIENT} {application}"
            asked = [before[-2]] if ahead and number > 1 else [] if ahead else [project]
            request = add(f"request of {application}.{number}", one.delay, asked)
            stream = [add(DRIVE, one.scan_drive / _PIECES, [request]) for _ in range(_PIECES)]
            card = add(FPGA, one.scan_card, [request])
            scored = add(CPU, one.scan_cpu, stream if one.cpu_needs_stream else asked)
            fetch = add(DRIVE, one.fetch, [*stream, card, scored])
            upload = add(LINK, one.upload, [fetch])
            place = add(thread, one.place, [project, upload])
            attend = add(GPU, one.attend, [place])
            if application == 0:
                marks.append((asked[0] if asked else None, upload, project))
            before.append(attend)
    return simulation, marks


def _chosen(one: Layer, work: Work, machine: Machine, applications: int) -> Predictor:
    simulation, marks = build(one, work.model.layers, Predictor.next_layer, applications)
    simulation.run()
    measured = Measured()
    for asked, upload, project in marks[1:]:
        begun = asked.end if asked else 0.0
        measured.timed(upload.end - begun, max(0.0, project.end - begun))
    for _ in range(choice.MIN_SAMPLES):
        # What the step before lacks of the selection is taken for what it lacks of the attention: too much.
        lost = {
            Predictor.next_layer: machine.prediction_loss,
            Predictor.previous_step: 1 - machine.step_overlap,
        }
        measured.lost(lost)
    return choice.choose(Predictor.exact, measured, work.attended)
