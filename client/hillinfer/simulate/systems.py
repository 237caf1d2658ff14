"""What each system reads, scores and moves for one layer. Sizes in bytes, times in seconds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from hillinfer.pipeline.choice import Predictor
from hillinfer.simulate.machine import Machine
from hillinfer.simulate.selections import miss_rate
from hillinfer.simulate.workload import Work
from hillinfer.split.boundary import BLOCK_TOKENS, choose
from hillinfer.split.estimates import Estimate


class System(StrEnum):
    """Ways to attend to a KV cache that is on a drive."""

    reload = "reload"
    """All KV comes to the GPU in each step, a layer ahead (FlexGen-like)."""
    host_scoring = "host_scoring"
    """FP16 keys come to the host and are scored there, a layer ahead (H2O/InfiniGen-like)."""
    key_abstracts = "key_abstracts"
    """Abstracts of chunks come to the host, then whole chunks (LeoAM-like)."""
    no_csd = "no_csd"
    """HillInfer's pools, INT4 keys and prefetch, but the host ranks what it streams from the drive."""
    hkm_only = "hkm_only"
    """The drive ranks with the exact query; pools, no split, no prefetch."""
    hillinfer = "hillinfer"
    """HKM and APP: CPU and drive rank together, with the query that APP chooses."""


@dataclass(frozen=True)
class Storage:
    """The drive as the host sees it."""

    read: float
    iops: float
    write: float


def storage(machine: Machine, system: System, same_drive: bool) -> Storage:
    """Return the SmartSSD, or for systems that need none the paper's faster host SSD unless `same_drive`."""
    needs_drive = system in (System.no_csd, System.hkm_only, System.hillinfer)
    if needs_drive or same_drive:
        return Storage(machine.drive_read, machine.drive_iops, machine.drive_write)
    return Storage(machine.ssd_read, machine.ssd_iops, machine.ssd_write)


@dataclass(frozen=True)
class Layer:
    """Work of one layer, of all sequences. Each figure is the time that one resource needs for it.

    project, attend: GPU; weights: link, those that do not fit the GPU. scan_drive: streaming for scoring;
    scan_card: the FPGA's; scan_cpu: the host's; fetch: missing rows; upload: link. delay: of a request.
    place: the model's thread, placing rows in pools.
    cpu_needs_stream: the host scores what the drive streamed. moved: bytes read from NAND; ios: row reads.
    """

    project: float
    attend: float
    weights: float
    upload: float
    scan_drive: float = 0.0
    scan_card: float = 0.0
    scan_cpu: float = 0.0
    fetch: float = 0.0
    delay: float = 0.0
    place: float = 0.0
    cpu_needs_stream: bool = False
    moved: float = 0.0
    ios: float = 0.0
    miss: float = 0.0
    cpu_share: float = 0.0


def held_share(work: Work, machine: Machine) -> float:
    """Return the share of the KV held, what host memory has room for at most."""
    return min(work.held, machine.host_memory / (work.kv * work.model.layers))


def misses(alpha: float, held: float, machine: Machine) -> float:
    """Return the miss rate by the pools; where not even the attended rows fit, of those that do."""
    fitting = min(1.0, held / alpha)
    return 1.0 - fitting * (
        1.0 - miss_rate(round(alpha, 4), round(max(held, alpha), 3), machine.step_overlap)
    )


def layer(
    system: System,
    work: Work,
    machine: Machine,
    same_drive: bool = False,
    cpu_share: float | None = None,
) -> Layer:
    """Return the work of one layer. cpu_share: of hillinfer's tokens, the CPU's; None: by `choose`."""
    drive = storage(machine, system, same_drive)
    held = held_share(work, machine)
    if system is System.reload:
        cold = (1 - held) * work.kv
        upload = work.kv / machine.gpu_link
        return replace(
            compute(work, machine, work.kv), upload=upload, scan_drive=cold / drive.read, moved=cold
        )
    uses_keys = system in (System.no_csd, System.hillinfer)
    mirror = max(0.0, held - work.alpha) / 2 if uses_keys else 0.0
    missing = misses(work.alpha, held - mirror, machine)
    selected = work.alpha * work.kv
    base = replace(compute(work, machine, selected), upload=_upload(work, machine, selected), miss=missing)
    rows = missing * work.attended * work.streams
    key_bytes = work.key_bytes_per_token * work.tokens
    mirrored_tokens = int(mirror * work.kv / work.key_bytes_per_token)
    if system is System.host_scoring:
        streamed = (1 - held) * work.kv / 2
        ios = rows / machine.rows_per_read
        values = rows * work.row_bytes / 2  # the keys have come already
        return replace(
            base, scan_drive=streamed / drive.read, scan_cpu=work.kv / 2 / machine.host_scan,
            cpu_needs_stream=True, fetch=max(ios / drive.iops, values / drive.read),
            moved=streamed + values, ios=ios,
        )  # fmt: skip
    if system is System.key_abstracts:
        abstracts = machine.abstract_share * work.kv / 2
        streamed, chunks = (1 - held) * abstracts, rows * work.row_bytes * machine.chunk_waste
        return replace(
            base, scan_drive=streamed / drive.read, scan_cpu=abstracts / machine.host_scan,
            cpu_needs_stream=True, fetch=chunks / drive.read, moved=streamed + chunks,
        )  # fmt: skip
    ios, row_bytes = rows / machine.rows_per_read, rows * work.row_bytes
    base = replace(
        base,
        delay=machine.request,
        fetch=max(ios / drive.iops, row_bytes / drive.read),
        ios=ios,
        moved=row_bytes,
    )
    if system is System.no_csd:
        streamed = max(0.0, key_bytes - mirrored_tokens * work.key_bytes_per_token)
        return replace(
            base, scan_drive=streamed / drive.read, scan_cpu=key_bytes / machine.host_scan,
            cpu_needs_stream=True, moved=base.moved + streamed,
        )  # fmt: skip
    base = replace(base, delay=machine.request + machine.kernel_start)
    if system is System.hkm_only:
        return _ranked(base, work, machine, 0)
    if cpu_share is None:
        return _ranked(base, work, machine, balanced(work, machine, mirrored_tokens))
    return _ranked(base, work, machine, round(cpu_share * work.tokens))


def balanced(work: Work, machine: Machine, limit: int) -> int:
    """Return the tokens that the client's own boundary gives to the CPU once its estimates have settled."""
    cpu, drive, tokens = Estimate(), Estimate(), 0
    per_token = work.key_bytes_per_token
    nothing = Layer(0, 0, 0, 0, delay=machine.request + machine.kernel_start)
    alone_s = drive_seconds(_ranked(nothing, work, machine, 0))
    for _ in range(_SETTLING):
        ranked = _ranked(nothing, work, machine, tokens)
        waited = drive_seconds(ranked)
        drive.observe(per_token * (work.tokens - tokens), waited, waited - ranked.delay)
        seen = tokens or min(BLOCK_TOKENS, work.tokens)
        scan = per_token * seen / machine.host_scan
        cpu.observe(per_token * seen, scan, scan)
        chosen = choose(work.tokens, tokens, limit, per_token, cpu, drive, alone_s, machine.request)
        tokens = chosen.cpu_tokens
    return tokens


def drive_seconds(work: Layer) -> float:
    """Return how long the drive's side takes to rank."""
    return work.delay + max(work.scan_drive, work.scan_card)


_SETTLING = 40


def _ranked(base: Layer, work: Work, machine: Machine, cpu_tokens: int) -> Layer:
    per_token = work.key_bytes_per_token
    scanned = per_token * (work.tokens - cpu_tokens)
    streamed = max(0.0, scanned - machine.fpga_memory / work.model.layers)
    # A split asks once more, for the rows.
    delay = base.delay + (machine.request if cpu_tokens and base.fetch else 0.0)
    return replace(
        base, delay=delay, scan_drive=streamed / machine.p2p_read, scan_card=scanned / machine.kernel_rate,
        scan_cpu=per_token * cpu_tokens / machine.host_scan, moved=base.moved + streamed,
        cpu_share=cpu_tokens / work.tokens,
    )  # fmt: skip


def compute(work: Work, machine: Machine, attended: float) -> Layer:
    """Return what the GPU computes for one layer that attends to `attended` bytes of KV."""
    weights = 2 * work.model.parameters / work.model.layers
    room = (machine.gpu_memory - machine.gpu_reserve) / work.model.layers
    bandwidth = machine.gpu_bandwidth * machine.gpu_efficiency
    flops = machine.gpu_flops * machine.gpu_efficiency
    dense = max(weights / bandwidth, weights * work.batch / flops)
    # Of a decoder layer's weights about a quarter make query, key and value.
    return Layer(
        project=dense / 4, attend=dense * 3 / 4 + attended / bandwidth,
        weights=max(0.0, weights - room) / machine.gpu_link, upload=0.0,
    )  # fmt: skip


def _upload(work: Work, machine: Machine, selected: float) -> float:
    weights = 2 * work.model.parameters
    room = max(0.0, machine.gpu_memory - machine.gpu_reserve - weights) / work.model.layers
    stays = min(1.0, room / selected) * machine.step_overlap
    return selected * (1 - stays) / machine.gpu_link


PREDICTING = {
    System.reload: Predictor.next_layer,
    System.host_scoring: Predictor.next_layer,
    System.key_abstracts: Predictor.next_layer,
    System.no_csd: Predictor.next_layer,
    System.hkm_only: Predictor.exact,
}
"""When a layer's work begins; hillinfer's is chosen by its own code."""
