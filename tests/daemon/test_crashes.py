"""kill -9 of daemon or worker at random moments: no acknowledged row is lost or altered, no space leaks."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from raw_client import RawClient, Refused, log_of, spawn, wait_for

from hillinfer_core.layout import DType, Precision, Shape
from hillinferd.driver.storage import Storage
from hillinferd.records.check import PoolReport, check
from hillinferd.records.database import Database
from hillinferd.records.durable import DurableRecords

SHAPE = Shape(2, 2, 32, DType.float16, Precision.int4)
UNIT = SHAPE.append_unit
LONGEST = 1024


def rows_of(name: str, layer: int) -> np.ndarray:
    """All rows that context `name` will ever have in `layer`."""
    rng = np.random.default_rng([int(name[1:]), layer])
    return rng.standard_normal((SHAPE.kv_heads, LONGEST, 2, SHAPE.head_dim)).astype(np.float16)


@dataclass
class Expected:
    """What has been acknowledged of a durable context, and what may have happened beyond it."""

    layers: list[int] = field(default_factory=lambda: [0] * SHAPE.layers)
    pending: tuple[int, int] | None = None
    exists: bool = False
    saved: bool = False
    deleting: bool = False
    saving: bool = False


class Scenario:
    """One pool through many deaths of those who serve it."""

    def __init__(self, directory: Path, seed: int) -> None:
        self.directory = directory
        self.random = random.Random(seed)
        self.contexts: dict[str, Expected] = {}
        self.counts: Counter[str] = Counter()
        self.numbers = 0
        self.process: subprocess.Popen[str] | None = None

    def start(self, *, wait: bool = True) -> Path:
        self.numbers += 1
        runtime = self.directory / f"r{self.numbers}"
        runtime.mkdir()
        flags = ("--pool", str(self.directory / "pool"), "--pool-capacity", "64MiB")
        self.process = spawn(runtime, *flags)
        if wait:
            process = self.process
            wait_for(lambda: process.poll() is not None or " ready " in log_of(runtime), 60)
            assert process.poll() is None, log_of(runtime)
        return runtime

    def end(self, number: int = signal.SIGKILL) -> None:
        assert self.process is not None
        self.process.send_signal(number)
        self.process.wait(60)

    def a_life(self) -> None:
        """Work on a daemon until it, or its worker, is killed; then see that nothing is missing."""
        if self.random.random() < 0.15:
            self.counts["killed while starting"] += 1
            self.start(wait=False)
            time.sleep(self.random.uniform(0.1, 0.9))
            self.end()
        runtime = self.start()
        with RawClient(runtime) as client:
            self.verify(client)
            status = client.status()
            victim = self.random.choice(("daemon", "worker"))
            assert self.process is not None
            pid = self.process.pid if victim == "daemon" else status.device.worker_pid
            timer = threading.Timer(self.random.uniform(0.0, 0.4), os.kill, (pid, signal.SIGKILL))
            timer.start()
            try:
                while True:
                    self.work(client)
            except Refused:
                self.counts[f"{victim} killed"] += 1
            timer.join()
        if victim == "worker" and self.random.random() < 0.5:
            # The daemon lives on with another worker.
            with RawClient(self.back(runtime)) as client:
                self.verify(client)
        self.end()
        report = self.fsck()
        assert report.clean, report

    def back(self, runtime: Path) -> Path:
        def serving() -> bool:
            try:
                with RawClient(runtime) as client:
                    status = client.status()
                    return status.drives[0].state == "serving" and not any(
                        s.contexts for s in status.sessions
                    )
            except Refused:
                return False

        wait_for(serving, 60)
        return runtime

    def work(self, client: RawClient) -> None:
        """Carry out one piece of work, noting before what may come of it and after what has."""
        unsaved = [name for name, it in self.contexts.items() if not it.saved]
        saved = [name for name, it in self.contexts.items() if it.saved]
        action = self.random.random()
        if len(self.contexts) < 3 or (not unsaved and len(self.contexts) < 6):
            self.create(client)
        elif action < 0.75 and unsaved:
            self.write(client, self.random.choice(unsaved))
        elif action < 0.9 and saved:
            self.read(client, self.random.choice(saved))
        else:
            self.delete(client, self.random.choice(list(self.contexts)))

    def create(self, client: RawClient) -> None:
        name = f"c{self.counts['created']}"
        self.counts["created"] += 1
        it = self.contexts[name] = Expected()
        context = client.open_named(SHAPE, durable_name=name).context_id
        it.exists = True
        client.close_context(context)

    def write(self, client: RawClient, name: str) -> None:
        it = self.contexts[name]
        context = client.open_named(SHAPE, durable_name=name).context_id
        for _ in range(self.random.randint(1, 4)):
            layer = self.random.randrange(SHAPE.layers)
            self.append(client, name, context, layer, UNIT * self.random.randint(1, 300 // UNIT))
        if self.random.random() < 0.4:
            longest = max(it.layers)
            for layer in range(SHAPE.layers):
                self.append(client, name, context, layer, longest - it.layers[layer])
            it.saving = True
            client.save(context)
            it.saved, it.saving = True, False
            self.counts["saved"] += 1
        client.close_context(context)

    def append(self, client: RawClient, name: str, context: int, layer: int, tokens: int) -> None:
        it = self.contexts[name]
        first = it.layers[layer]
        tokens = min(tokens, LONGEST - first)
        if tokens <= 0:
            return
        it.pending = (layer, tokens)
        client.append(context, layer, first, rows_of(name, layer)[:, first : first + tokens])
        it.layers[layer] += tokens
        it.pending = None
        self.counts["appended"] += 1

    def read(self, client: RawClient, name: str) -> None:
        context = client.open_named(SHAPE, base_name=name).context_id
        for layer, held in enumerate(self.contexts[name].layers):
            if held:
                found = client.fetch_range(context, SHAPE, layer, 0, held)
                np.testing.assert_array_equal(found, rows_of(name, layer)[:, :held])
                # Something of its own, to be freed by the death of whoever.
                client.append(context, layer, held, rows_of("c9999", layer)[:, : UNIT * 2])
        client.close_context(context)
        self.counts["read"] += 1

    def delete(self, client: RawClient, name: str) -> None:
        self.contexts[name].deleting = True
        client.delete(name)
        del self.contexts[name]
        self.counts["deleted"] += 1

    def verify(self, client: RawClient) -> None:
        """Every acknowledged row is there, what was under way is there or not, nothing else is."""
        listed = client.durable()
        for name in list(self.contexts):
            it = self.contexts[name]
            if name not in listed:
                assert it.deleting or not it.exists, f"{name} is lost: {it}"
                del self.contexts[name]
                continue
            found = listed.pop(name)
            assert found.saved == it.saved or (it.saving and found.saved), f"{name}: {it}"
            it.exists, it.saved, it.saving, it.deleting = True, found.saved, False, False
            kind = {"base_name": name} if it.saved else {"durable_name": name}
            opened = client.open_named(SHAPE, **kind)
            for layer, held in enumerate(opened.layer_tokens):
                more = it.pending[1] if it.pending and it.pending[0] == layer else 0
                assert held in (it.layers[layer], it.layers[layer] + more), f"{name}: {it}, not {held}"
                it.layers[layer] = held
                if held:
                    rows = client.fetch_range(opened.context_id, SHAPE, layer, 0, held)
                    np.testing.assert_array_equal(rows, rows_of(name, layer)[:, :held])
                    query = np.ones((2, SHAPE.head_dim), np.float32)
                    ids, *_ = client.evaluate(opened.context_id, SHAPE, layer, query, held, 0, held)
                    assert (ids == np.arange(held)).all()
                    self.counts["tokens verified"] += held
            it.pending = None
            client.close_context(opened.context_id)
        assert not listed, f"contexts that nobody made: {listed}"
        durable = sum(found.extent_bytes for found in client.durable().values())
        assert client.status().pool.used_bytes == durable

    def fsck(self) -> PoolReport:
        storage = Storage(self.directory / "pool", 0, keep=True)
        try:
            database = Database(self.directory / "pool.catalogue")
            try:
                return check(storage, DurableRecords(database))[0]
            finally:
                database.close()
        finally:
            storage.close()


def lives(directory: Path, kills: int, seed: int) -> None:
    scenario = Scenario(directory, seed)
    for _ in range(kills):
        scenario.a_life()
    print(f"\n{kills} kills: {dict(scenario.counts)}")
    assert scenario.counts["daemon killed"] + scenario.counts["worker killed"] == kills
    assert scenario.counts["tokens verified"] > 0


@pytest.mark.timeout(600)
def test_twelve_kills_lose_nothing(runtime_dir: Path) -> None:
    lives(runtime_dir, 12, 1)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_three_hundred_kills_lose_nothing(runtime_dir: Path) -> None:
    lives(runtime_dir, 300, 2)
