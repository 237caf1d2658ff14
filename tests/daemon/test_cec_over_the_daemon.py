"""A daemon whose drive has a card: the real worker and driver on a fake pyxrt."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from uuid import UUID

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from raw_client import RawClient, Refused, log_of, random_rows, running_daemon, wait_for
from xclbin_writer import SHELL, Container, default_sections, ip_layout

from hillinfer_core.arena import create_arena
from hillinfer_core.errors import ConfigError, NotAllowed
from hillinfer_core.layout import DType, Precision, Reduction, Shape
from hillinferd import config, ctl
from hillinferd.cec.configurations import SHIPPED
from hillinferd.domain.contexts import UNLIMITED
from hillinferd.domain.regions import ArenaSpace
from hillinferd.service.administration import Administration
from hillinferd.service.limits import Limits
from hillinferd.service.sessions import Peer, Session, Sessions

TESTS = Path(__file__).parents[1]
BDF = "0000:65:00.1"
INT8, INT4, Q16 = (UUID(int=number) for number in (1, 2, 3))
TOKENS = 1200


class Machine:
    """A directory with a card, a catalogue of its bitstreams, and daemons that drive it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.run = directory
        self._numbers = itertools.count()
        self.card = directory / "card"
        self.bitstreams = directory / "bitstreams"
        for path in (self.card, self.bitstreams):
            path.mkdir()
        self.fault()
        tables = ["version = 1"]
        for number, kernel in enumerate(SHIPPED, start=1):
            layout = ip_layout([f"{kernel.name}:{kernel.name}_1"])
            sections = [
                (kind, name, layout if kind == 8 else data) for kind, name, data in default_sections()
            ]
            data = Container(own=UUID(int=number), sections=sections).build()
            (self.bitstreams / f"{kernel.name}.hw.xclbin").write_bytes(data)
            tables.append(
                f'[[bitstream]]\nfile = "{kernel.name}.hw.xclbin"\n'
                f'sha256 = "{hashlib.sha256(data).hexdigest()}"\nkernel = "{kernel.name}"\n'
                f'precision = "{kernel.precision}"\nhead_dims = [64]\ninterface_uuid = "{SHELL}"\n'
            )
        (self.bitstreams / "manifest.toml").write_text("\n".join(tables))
        self.config = directory / "hillinferd.toml"
        # The larger pool is the one that contexts are opened on.
        self.config.write_text(
            f'state_dir = "{directory}/state"\n'
            f'[[drive]]\nname = "plain"\npool = "{directory}/plain.pool"\npool_capacity = "64MiB"\n'
            f'[[drive]]\nname = "smart"\ndriver = "xrt"\ncard = "{BDF}"\npool = "{directory}/smart.pool"\n'
            f'pool_capacity = "256MiB"\nconfigurations = "{self.bitstreams}"\n'
        )
        (directory / "state").mkdir()

    def fault(self, **faults: object) -> None:
        part = self.card / "faults.part"
        part.write_text(json.dumps(faults))
        part.rename(self.card / "faults.json")

    @property
    def loads(self) -> list[UUID]:
        path = self.card / "loads"
        return [UUID(line) for line in path.read_text().split()] if path.exists() else []

    def runs(self, pid: int) -> int:
        path = self.card / f"runs-{pid}"
        return int(path.read_text()) if path.exists() else 0

    def daemon(self) -> AbstractContextManager[subprocess.Popen[str]]:
        """A daemon in a runtime directory of its own, :attr:`run`."""
        self.run = self.directory / f"run{next(self._numbers)}"
        return running_daemon(self.run, "--config", str(self.config))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    paths = [TESTS / "daemon" / "machine_with_card", TESTS / "driver", TESTS]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, paths)))
    with tempfile.TemporaryDirectory(prefix="hd-", dir="/tmp") as directory:
        machine = Machine(Path(directory))
        monkeypatch.setenv("FAKE_CARD", str(machine.card))
        yield machine
        assert not (machine.card / "violations").exists(), (machine.card / "violations").read_text()


@pytest.fixture
def cec(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Run ``hillinferctl cec``; gives what it prints, on standard error if it fails."""

    def run(*arguments: str, fails: bool = False) -> str:
        socket = machine.run / "attach.sock"
        monkeypatch.setattr(sys, "argv", ["hillinferctl", "cec", *arguments, "--socket", str(socket)])
        monkeypatch.setenv("COLUMNS", "120")
        with pytest.raises(SystemExit) as ended:
            ctl.main()
        printed = capsys.readouterr()
        assert ended.value.code == (1 if fails else 0), printed.err
        if fails:
            assert printed.out == ""
            assert printed.err.count("\n") == 1, "one line and no traceback"
        return printed.err if fails else printed.out

    return run


def smart(client: RawClient):
    """Status of the drive with a card."""
    return next(drive for drive in client.status().drives if drive.name == "smart")


def shape_for(precision: Precision) -> Shape:
    return Shape(layers=2, kv_heads=2, head_dim=64, dtype=DType.float16, precision=precision)


def answers(client: RawClient, shape: Shape) -> list[np.ndarray]:
    """Fill a context, and return all that evaluations and fetches of it bring; closes it again."""
    rng = np.random.default_rng(7)
    rows = random_rows(rng, shape, TOKENS // 16 * 16)
    context, found = client.open(shape), []
    for layer in range(shape.layers):
        for first in range(0, rows.shape[1], 400):
            client.append(context, layer, first, rows[:, first : first + 400])
    query = rng.standard_normal((6, shape.head_dim)).astype(np.float32)
    for layer, reduction, first, end in (
        (0, Reduction.sum, 0, 1200),
        (1, Reduction.max, 16, 1100),
        (1, Reduction.sum, 300, 500),
    ):
        ids, scores, brought, _ = client.evaluate(
            context, shape, layer, query, 50, first, end, room=100, reduction=reduction
        )
        found += [ids, scores, brought, client.fetch_ids(context, shape, layer, ids.tolist())]
    found.append(client.fetch_range(context, shape, 0, 5, 700))
    client.close_context(context)
    return found


def test_a_card_answers_as_a_host_drive_does(
    machine: Machine, cec: Callable[..., str], runtime_dir: Path
) -> None:
    with (
        machine.daemon(),
        running_daemon(runtime_dir),
        RawClient(machine.run) as on_card,
        RawClient(runtime_dir) as on_host,
    ):
        assert smart(on_card).device.driver == "xrt"
        # All of the card's memory but what work needs, not a share of the host's.
        assert smart(on_card).device.evaluation_key_limit_bytes > 3_900_000_000
        worker = smart(on_card).device.worker_pid
        for precision in (Precision.int8, Precision.int4):
            cec("load", f"evaluate_{precision}")
            before = machine.runs(worker)
            shape = shape_for(precision)
            for ours, theirs in zip(answers(on_card, shape), answers(on_host, shape), strict=True):
                np.testing.assert_array_equal(ours, theirs)
            assert machine.runs(worker) > before, "the card was not asked"
        # A context of the other precision is told so; nothing is computed elsewhere in silence.
        with pytest.raises(Refused, match="evaluate_int8") as refused:
            answers(on_card, shape_for(Precision.int8))
        assert refused.value.code == grpc.StatusCode.UNAVAILABLE


def test_the_commands(machine: Machine, cec: Callable[..., str]) -> None:
    with machine.daemon(), RawClient(machine.run) as client:
        check = health_pb2.HealthCheckRequest(service="hillinfer.v1.Admin")
        serving = health_pb2_grpc.HealthStub(client.channel).Check(check)
        assert serving.status == health_pb2.HealthCheckResponse.SERVING
        shown = cec("status")
        for part in (
            BDF,
            "none; load one with hillinferctl cec load",
            "evaluate_int8_q16.hw.xclbin",
            "smart",
        ):
            assert part in shown
        assert "evaluate_int4.hw.xclbin is loaded and passed its self-test" in cec("load", "evaluate_int4")
        printed = json.loads(cec("load", "evaluate_int8.hw.xclbin", "--drive", "smart", "--json"))
        assert printed["loaded_uuid"] == str(INT8)
        assert printed["good"]["kernel"] == "evaluate_int8"
        assert printed["good"]["precision"] == "PRECISION_INT8"
        assert printed["previous"]["file"] == "evaluate_int4.hw.xclbin"
        assert (printed["drive"], printed["card"], printed["good_loaded"]) == ("smart", BDF, True)
        assert machine.loads == [INT4, INT8]

        assert "no bitstream 'nothing'; it has evaluate_int8" in cec("load", "nothing", fails=True)
        assert "drive plain has no FPGA to configure" in cec("status", "--drive", "plain", fails=True)
        assert "there is no drive 'x'; drives are plain, smart" in cec("rollback", "--drive", "x", fails=True)

        context = client.open(shape_for(Precision.int8))
        told = "1 open context needs the loaded bitstream; close them"
        assert told in cec("load", "evaluate_int4", fails=True)
        assert told in cec("rollback", fails=True)
        assert json.loads(cec("status", "--json"))["cards"][0]["contexts"] == 1
        assert machine.loads == [INT4, INT8]
        client.close_context(context)

        assert "evaluate_int4.hw.xclbin is loaded" in cec("rollback")
        machine.fault(miscomputing=[str(Q16)])
        said = cec("load", "evaluate_int8_q16", fails=True)
        assert "does not compute what it should" in said
        assert "evaluate_int4.hw.xclbin is loaded again" in said
        (card,) = json.loads(cec("status", "--json"))["cards"]
        assert (card["loaded_uuid"], card["good_loaded"]) == (str(INT4), True)
        assert card["previous"]["kernel"] == "evaluate_int8"
        assert machine.loads == [INT4, INT8, INT4, Q16, INT4]

        # A bitstream that is added is there without a restart; one that is damaged is not loaded.
        path = machine.bitstreams / "evaluate_int8.hw.xclbin"
        path.write_bytes(path.read_bytes().replace(b"<xml/>", b"<XML/>"))
        assert "it is not that file" in cec("load", "evaluate_int8", fails=True)
        (machine.bitstreams / "manifest.toml").unlink()
        assert "manifest.toml: No such file" in cec("status", fails=True)


def test_verified_again_after_a_crash_of_the_worker_and_a_restart(
    machine: Machine, cec: Callable[..., str]
) -> None:
    shape = shape_for(Precision.int4)
    with machine.daemon() as daemon:
        with RawClient(machine.run) as client:
            cec("load", "evaluate_int8")
            cec("load", "evaluate_int4")
            lost = client.open(shape)
            worker = smart(client).device.worker_pid
            os.kill(worker, signal.SIGKILL)
            wait_for(lambda: smart(client).device.worker_pid not in (0, worker), 60)
            wait_for(lambda: smart(client).state == "serving", 60)
            # The card kept it: it is not loaded again, but proved again.
            assert machine.runs(smart(client).device.worker_pid) >= 3
            assert machine.loads == [INT8, INT4]
            with pytest.raises(Refused, match="lost"):
                client.fetch_range(lost, shape, 0, 0, 1)
            answers(client, shape)
            # A lost context needs no bitstream.
            assert "evaluate_int8.hw.xclbin is loaded" in cec("rollback")
        assert daemon.poll() is None
        assert log_of(machine.run).count("bitstream verified") == 1
    # As after a cold start of the machine, with the catalogue lost too.
    (machine.card / "loaded").unlink()
    shutil.rmtree(machine.bitstreams)
    machine.bitstreams.mkdir()
    with machine.daemon(), RawClient(machine.run) as client:
        assert machine.loads == [INT8, INT4, INT8, INT8]
        assert log_of(machine.run).count("bitstream verified") == 1
        answers(client, shape_for(Precision.int8))
    # What no longer computes as it should is not used; rows are served all the same.
    machine.fault(miscomputing=[str(INT8)])
    with machine.daemon(), RawClient(machine.run) as client:
        assert "the last good bitstream is not in use" in log_of(machine.run)
        with pytest.raises(Refused, match="has no bitstream; load one with hillinferctl cec load"):
            answers(client, shape_for(Precision.int8))


def test_a_kernel_that_hangs(machine: Machine, cec: Callable[..., str]) -> None:
    with machine.daemon() as daemon, RawClient(machine.run) as client:
        cec("load", "evaluate_int8")
        worker = smart(client).device.worker_pid
        machine.fault(hang=True)
        with pytest.raises(Refused, match=r"has not ended after .* reset the card") as refused:
            answers(client, shape_for(Precision.int8))
        assert refused.value.code == grpc.StatusCode.UNAVAILABLE
        machine.fault()
        # The heartbeat sees that the card is of no use to this worker any more.
        wait_for(lambda: smart(client).device.worker_restarts > 0 and smart(client).state == "serving", 40)
        assert smart(client).device.worker_pid != worker
        assert daemon.poll() is None
        answers(client, shape_for(Precision.int8))
        assert machine.loads == [INT8]


def test_others_may_not_ask() -> None:
    fd = create_arena(4096, "test")
    try:
        peer = Peer(os.getpid(), os.getuid() + 1)
        stranger = Session(1, "token", "stranger", peer, ArenaSpace(4096, 1), fd)
        administration = Administration([], Sessions(Limits()))
        for ask in (
            administration.status(stranger, "", None),
            administration.load(stranger, "", "evaluate_int8", None),
            administration.rollback(stranger, "", None),
        ):
            with pytest.raises(NotAllowed, match="ask as root, as the daemon's user"):
                asyncio.run(ask)
    finally:
        os.close(fd)


def test_the_keys_of_a_drive_with_a_card(tmp_path: Path) -> None:
    def loaded(keys: str) -> config.DriveConfig:
        (tmp_path / "c.toml").write_text(f'[[drive]]\ndriver = "xrt"\npool = "{tmp_path}/p"\n{keys}')
        return config.load(tmp_path / "c.toml", {}).drives[0]

    drive = loaded(f'configurations = "{tmp_path}"')
    assert drive.configurations == tmp_path
    assert drive.evaluation_keys_dram == UNLIMITED
    assert loaded('evaluation_keys_dram = "1MiB"').evaluation_keys_dram == 1 << 20
    with pytest.raises(ConfigError, match=r"configurations: .* give a directory that exists"):
        loaded(f'configurations = "{tmp_path}/none"')
    with pytest.raises(ConfigError, match="bitstream and configurations; give one"):
        loaded(f'configurations = "{tmp_path}"\nbitstream = "{tmp_path}/b.xclbin"')
