from __future__ import annotations

import json
import re
import signal
import socket
import stat
import time
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from raw_client import RawClient, Refused, running_daemon, wait_for
from test_limits import ROWS, SHAPE

from hillinfer_core.protocol import metrics_socket
from hillinferd.metrics.metrics import process_collector

DASHBOARD = Path(__file__).parents[2] / "monitoring" / "grafana-dashboard.json"

Samples = dict[str, list[tuple[dict[str, str], float]]]


def ask(runtime_dir: Path, request: bytes) -> tuple[int, bytes]:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(60)
        connection.connect(str(metrics_socket(runtime_dir)))
        connection.sendall(request)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    if not answer:
        return 0, b""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert int(re.search(rb"Content-Length: (\d+)", head)[1]) == len(body) or not body  # type: ignore[index]
    return int(head.split()[1]), body


def samples(text: str) -> Samples:
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def metrics(runtime_dir: Path) -> Samples:
    status, body = ask(runtime_dir, b"GET /metrics HTTP/1.1\r\nHost: daemon\r\n\r\n")
    assert status == 200
    return samples(body.decode())


def total(found: Samples, name: str, **labels: str) -> float:
    return sum(value for given, value in found.get(name, []) if labels.items() <= given.items())


@pytest.fixture
def file(runtime_dir: Path) -> Path:
    return runtime_dir / "hillinferd.prom"


def test_metrics_tell_what_was_done_and_the_file_says_the_same(runtime_dir: Path, file: Path) -> None:
    with running_daemon(runtime_dir, "--metrics-file", str(file)):
        wait_for(file.exists, 60)
        with RawClient(runtime_dir) as client:
            context = client.open(SHAPE)
            client.append(context, 0, 0, ROWS)
            for _ in range(3):
                client.evaluate(context, SHAPE, 0, np.ones((2, 64), np.float32), 4, 0, 64)
            with pytest.raises(Refused):
                client.append(context, 0, 0, ROWS)
            found = metrics(runtime_dir)
            evaluated = {"drive": "drive0", "driver": "host", "operation": "evaluate", "class": "decode"}
            appended = {**evaluated, "operation": "append", "class": "bulk"}
            for name in ("hillinferd_queue_seconds", "hillinferd_service_seconds"):
                assert total(found, f"{name}_count", **evaluated) == 3
                assert total(found, f"{name}_count", **appended) == 2
                assert total(found, f"{name}_bucket", le="+Inf", **evaluated) == 3
            assert total(found, "hillinferd_moved_bytes_total", kind="written", **appended) >= ROWS.nbytes
            assert total(found, "hillinferd_io_requests_total", kind="write", **appended) >= 1
            assert total(found, "hillinferd_moved_bytes_total", kind="evaluated", **evaluated) > 0
            assert total(found, "hillinferd_work_errors_total", error="OutOfOrder", **appended) == 1
            assert total(found, "hillinferd_refused_total", error="OutOfOrder") == 1
            assert total(found, "hillinferd_winners_total") == 3 * 4 * SHAPE.kv_heads
            assert total(found, "hillinferd_pool_used_bytes") > 0
            assert total(found, "hillinferd_sessions") == total(found, "hillinferd_contexts") == 1
            assert total(found, "hillinferd_drive_up", drive="drive0") == 1
        _only_known_metrics_are_shown(found)
        assert stat.S_IMODE(metrics_socket(runtime_dir).stat().st_mode) == 0o660
        written = samples(file.read_text())
        assert written["hillinferd_pool_capacity_bytes"] == found["hillinferd_pool_capacity_bytes"]
        # Whatever is sent there, the daemon goes on.
        assert ask(runtime_dir, b"POST /metrics HTTP/1.1\r\n\r\n")[0] == 405
        assert ask(runtime_dir, b"GET /etc/passwd HTTP/1.1\r\n\r\n")[0] == 404
        assert ask(runtime_dir, b"\x00\xff\r\n\r\n")[0] == 405
        assert ask(runtime_dir, b"HEAD /metrics HTTP/1.1\r\n\r\n") == (200, b"")
        assert ask(runtime_dir, b"G" * 100_000)[0] == 0
        assert metrics(runtime_dir)
    assert not file.exists()
    assert not metrics_socket(runtime_dir).exists()


def _only_known_metrics_are_shown(found: Samples) -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    expressions += [item["query"] for item in dashboard["templating"]["list"]]
    shown = set(re.findall(r"\bhillinferd_\w+", " ".join(expressions)))
    assert len(shown) > 20
    assert shown <= set(found)
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))
    for metric, labels in (
        (name, set(re.findall(r"(\w+)=~?\"", text)))
        for text in expressions
        for name, text in re.findall(r"(hillinferd_\w+)\{([^}]*)\}", text)
    ):
        # Prometheus itself adds the instance.
        assert labels - {"instance"} <= set(found[metric][0][0]), metric


def test_the_process_has_metrics_where_proc_has_processes_only(tmp_path: Path) -> None:
    (tmp_path / "self").symlink_to("/proc/self")

    def of(proc: Path) -> Samples:
        registry = CollectorRegistry()
        registry.register(process_collector(str(proc)))
        return samples(generate_latest(registry).decode())

    whole, sandboxed = of(Path("/proc")), of(tmp_path)
    assert "hillinferd_process_resident_memory_bytes" in whole
    assert set(sandboxed) == set(whole)
    name = "hillinferd_process_start_time_seconds"
    assert total(sandboxed, name) == pytest.approx(total(whole, name), abs=60)


def test_the_margin_of_the_watchdog_is_measured(runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, limit = "hillinferd_watchdog_margin_seconds", 3.0
    with running_daemon(runtime_dir):
        assert total(metrics(runtime_dir), f"{name}_count") == 0  # nobody waits
    monkeypatch.setenv("WATCHDOG_USEC", str(int(limit * 1e6)))
    (runtime_dir / "log").unlink()
    with running_daemon(runtime_dir) as daemon:
        wait_for(lambda: total(metrics(runtime_dir), f"{name}_count") >= 2, 60)
        before = metrics(runtime_dir)
        assert 0 < total(before, f"{name}_sum") <= limit * total(before, f"{name}_count")
        daemon.send_signal(signal.SIGSTOP)
        time.sleep(limit)
        daemon.send_signal(signal.SIGCONT)
        # It was late by more than systemd allows.
        wait_for(lambda: total(metrics(runtime_dir), f"{name}_bucket", le="0.0") == 1, 60)
