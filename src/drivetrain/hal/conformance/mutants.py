"""The kit's own proof: every named defect of a simulated device is caught by the check named here,
and the device without a defect passes them all.

``drivetrain conformance --mutants`` runs it; the defects are in
``drivetrain.hal.drivers.simulated_mutants``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from drivetrain.errors import BadInput
from drivetrain.hal.conformance.check import Check, checks
from drivetrain.hal.conformance.report import FAILED, PASSED, Result
from drivetrain.hal.conformance.running import SIMULATED, Examination
from drivetrain.hal.drivers.simulated_mutants import MUTANTS, defect_of

CAUGHT_BY: Mapping[str, tuple[str, ...]] = {
    # memory
    "free_ignores_stream": ("memory.freed_in_order",),
    "leak_on_free": ("leaks.driver_memory_comes_back",),
    "double_free_accepted": ("memory.freed_once",),
    "oom_wrong_error": ("memory.out_of_memory",),
    "oom_null": ("memory.out_of_memory",),
    "alignment_eight": ("memory.alignment",),
    "alloc_half": ("memory.apart",),
    "memory_constant": ("memory.reported",),
    "close_leaks": ("lifecycle.memory_after_close",),
    "alloc_races": ("threads.allocations",),
    # copies and fills
    "copy_short": ("copies.round_trip",),
    "copy_swapped": ("copies.within_the_device",),
    "copy_size_of24_bits": ("copies.large",),
    "view_offset_dropped": ("copies.offsets",),
    "host_read_late": ("copies.host_reused",),
    "fill_width": ("memory.fill_widths",),
    "fill_short": ("memory.fill_widths",),
    "fill_out_of_order": ("ordering.fill_waits_its_turn",),
    "peer_copy_backwards": ("peer.copy",),
    # order
    "event_done_early": ("events.done_means_done", "events.synchronize_means_done"),
    "stream_done_early": ("ordering.done_means_done",),
    "synchronize_early": ("ordering.synchronize_means_done",),
    "synchronize_forgets_streams": ("ordering.device_synchronize",),
    "wait_ignored": ("ordering.wait_for_stream",),
    "wait_wrong_event": ("ordering.wait_for_the_right_event",),
    "wait_reads_late": ("ordering.wait_keeps_its_point",),
    "stream_destroy_drops_work": ("ordering.destroyed_stream_finishes",),
    "priority_crashes": ("ordering.priorities",),
    # time
    "event_time_backwards": ("timing.elapsed",),
    "elapsed_in_milliseconds": ("timing.elapsed",),
    "timeout_ignored": ("limits.stream",),
    "timeout_true": ("limits.stream",),
    "event_timeout_true": ("limits.event",),
    # kernels
    "atomic_lost": ("kernels.atomics",),
    "barrier_skipped": ("kernels.barriers",),
    "grid_yz_dropped": ("kernels.indices",),
    "block_swapped": ("kernels.indices",),
    "last_block_skipped": ("kernels.partial_blocks",),
    "shared_limited": ("kernels.dynamic_shared",),
    "byte_sign_lost": ("kernels.integers",),
    "struct_truncated": ("kernels.structure",),
    "arguments_read_late": ("kernels.arguments_at_the_call",),
    "arguments_shared": ("threads.launches",),
    "bad_code_accepted": ("errors.bad_code",),
    "missing_kernel_null": ("kernels.missing_symbol",),
    "unload_drops_work": ("lifecycle.module_before_its_work",),
    # graphs
    "graph_old_arguments": ("kernels.in_graph",),
    "graph_drops_last": ("graphs.launch_does_all",),
    "graph_runs_at_capture": ("graphs.capture_does_nothing",),
    "graph_changes_what_is_queued": ("kernels.graph_in_flight",),
    "graph_destroy_drops_work": ("graphs.closed_in_flight",),
    "graph_launches_once": ("graphs.launched_again",),
    # leaks
    "events_leak": ("leaks.events",),
    "streams_leak": ("leaks.streams",),
    "graphs_leak": ("leaks.graphs",),
    "modules_leak": ("leaks.modules",),
    "launches_leak": ("leaks.launches",),
    # failures
    "work_error_swallowed": ("faults.queued_work_fails",),
    "work_error_on_wrong_stream": ("faults.other_streams_go_on",),
    "loss_forgotten": ("faults.lost_for_good",),
    "close_hangs": ("lifecycle.closes",),
    "reopen_fails": ("lifecycle.opened_again",),
    # what is found
    "uuid_changes": ("discovery.same_again",),
    "uuid_shared": ("discovery.facts",),
    "groups_overstated": ("discovery.declared",),
}
"""Mutant -> the checks that must fail on it, each of them."""


@dataclass(frozen=True)
class Verdict:
    """One mutant before the checks that are named for it."""

    mutant: str
    defect: str
    results: tuple[Result, ...]
    control: tuple[Result, ...]
    """The same checks on the device without a defect."""

    @property
    def caught(self) -> bool:
        """Each check failed on the mutant, and passed without it."""
        failed = all(result.state == FAILED for result in self.results)
        return failed and all(result.state == PASSED for result in self.control)


def named(names: Sequence[str]) -> tuple[str, ...]:
    """These mutants, or all. Raises BadInput for one that there is not."""
    unknown = sorted(set(names) - set(MUTANTS))
    if unknown:
        raise BadInput(
            f"there is no mutant {', '.join(unknown)}; there are {', '.join(sorted(MUTANTS))}"
        )
    return tuple(names) or tuple(CAUGHT_BY)


def prove(
    names: Sequence[str] = (),
    *,
    at_once: int = 2,
    tell: Callable[[Verdict], None] = lambda verdict: None,
) -> tuple[Verdict, ...]:
    """Run the named checks on each mutant, and on the device without a defect."""
    chosen = named(names)
    known = {check.name: check for check in checks()}
    wanted = {name for mutant in chosen for name in CAUGHT_BY[mutant]}
    todo = [known[name] for name in known if name in wanted]
    control: dict[str, Result] = {}
    for topic in dict.fromkeys(check.topic for check in todo):
        group = [check for check in todo if check.topic == topic]
        control.update({r.name: r for r in _results("", group)})

    def one(mutant: str) -> Verdict:
        group = [known[name] for name in CAUGHT_BY[mutant]]
        results = _results(mutant, group)
        verdict = Verdict(
            mutant, defect_of(mutant), results, tuple(control[r.name] for r in results)
        )
        tell(verdict)
        return verdict

    with ThreadPoolExecutor(at_once) as pool:
        return tuple(pool.map(one, chosen))


def _results(mutant: str, group: Sequence[Check]) -> tuple[Result, ...]:
    words = f"{SIMULATED} mutant={mutant}" if mutant else SIMULATED
    with Examination("simulated:0", {"DRIVETRAIN_SIMULATED": words}) as examination:
        results = [examination.of(check) for check in group]
        examination.close()
    return tuple(results)
