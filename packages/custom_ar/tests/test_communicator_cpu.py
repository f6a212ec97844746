"""The communicator over gloo with CPU tensors, in processes of 1, 2 and 3 ranks.

The kernels are not run here. What comes before and after them is: a stand-in for the operators lets
communicators of CPU tensors take the way that those of CUDA tensors take.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import communicator_workers as workers
import custom_ar
import custom_ar_smoke as smoke
import peer_group_workers as shared
import pytest
import torch
import torch.distributed as dist
from custom_ar import communicator as module
from rank_processes import Run, runner
from torch_defaults import DEFAULTS, check_owner

# What torch makes of the backend "gloo".
GLOO = str(dist.distributed_c10d.BackendConfig(dist.Backend("gloo")))
EXAMPLE = Path(__file__).parents[1] / "examples" / "two_processes.py"


@pytest.fixture(scope="module")
def one() -> Iterator[Run]:
    yield from runner(1)


@pytest.fixture(scope="module")
def two() -> Iterator[Run]:
    yield from runner(2)


@pytest.fixture(scope="module")
def three() -> Iterator[Run]:
    yield from runner(3)


def assert_one_line(
    results: list[tuple[str | None, list[tuple[str, str]]]], reason: str, level: str = "INFO"
) -> None:
    """All ranks fall back for this reason, and each logged it in one line."""
    world_size = len(results)
    for rank, result in enumerate(results):
        text = (
            f"custom_ar: rank {rank} of {world_size}: all calls go to torch.distributed "
            f"({GLOO}): {reason}"
        )
        assert result == (reason, [(level, text)])


def test_one_rank(one: Run) -> None:
    assert one(workers.fallback) == [(None, [])]
    one(workers.default_group)
    one(workers.compiled)


def test_two_ranks(two: Run) -> None:
    reason = "the kernels are for CUDA, and the device of ranks 0, 1 is cpu"
    assert_one_line(two(workers.fallback), reason)


def test_three_ranks(three: Run) -> None:
    reason = "the kernels are for CUDA, and the device of ranks 0, 1, 2 is cpu"
    assert_one_line(three(workers.fallback), reason)


def test_default_group(two: Run) -> None:
    two(workers.default_group)


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults_of_the_process(one: Run, two: Run, name: str) -> None:
    for run in (one, two):
        run(check_owner, name, smoke.make, smoke.check)


def test_outputs_that_autograd_guards(one: Run, two: Run) -> None:
    for run in (one, two):
        run(workers.outputs_that_autograd_guards)


@pytest.mark.parametrize("how", [None, {"backend": "aot_eager"}, {}], ids=str)
def test_no_gradient_is_recorded(one: Run, two: Run, how: dict[str, Any] | None) -> None:
    one(workers.no_gradients, how)
    two(workers.no_gradients, how)


HOW = [
    {},
    {"dynamic": True},
    {"backend": "aot_eager"},
    {"backend": "aot_eager", "dynamic": True},
    {"mode": "reduce-overhead"},
]


@pytest.mark.parametrize("how", HOW, ids=str)
def test_compiled_calls_keep_their_order(two: Run, how: dict[str, Any]) -> None:
    two(shared.compiled_order, workers.Kind, how)


@pytest.mark.parametrize("dynamic", [None, False, True])
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_one_graph_serves_many_communicators(two: Run, backend: str, dynamic: bool | None) -> None:
    two(shared.compiled_for_many, workers.Kind, {"backend": backend, "dynamic": dynamic})


@pytest.mark.parametrize("device", ["meta", "mps"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled_calls_for_another_device(two: Run, device: str, backend: str) -> None:
    two(shared.compiled_elsewhere, workers.Kind, device, backend)


def test_compile_to_a_full_graph(two: Run) -> None:
    two(workers.compiled)


def test_compile_with_inductor(two: Run) -> None:
    two(workers.compiled_with_inductor)


@pytest.mark.parametrize("members", [[0, 2], [2, 1]], ids=str)
def test_subgroup(three: Run, members: list[int]) -> None:
    results = three(shared.subgroup, workers.Kind, sorted(members))
    [outside] = set(range(3)) - set(members)
    assert results.pop(outside) == (
        "custom_ar.Communicator: group must be a process group, got one that this process is not in"
    )
    reason = "the kernels are for CUDA, and the device of ranks 0, 1 is cpu"
    assert_one_line(results, reason)


def test_subgroup_of_one(three: Run) -> None:
    results = three(shared.subgroup, workers.Kind, [1])
    assert results[1] == (None, [])


def test_group_that_spans_hosts(three: Run) -> None:
    results = three(shared.spanning_hosts, workers.Kind, ["a", "b", "a"])
    assert_one_line(results, "the group spans hosts: ranks 0, 2 on a, rank 1 on b")


@pytest.mark.parametrize("how", ["destroyed", "made otherwise"])
def test_group_that_torch_does_not_know(two: Run, how: str) -> None:
    expected = (
        "custom_ar.Communicator: group must be a process group, got one that torch.distributed "
        "does not know: it was destroyed, or made by other means than torch.distributed.new_group"
    )
    assert two(shared.unknown_group, workers.Kind, how) == [("ValueError", expected)] * 2


def test_group_without_a_cpu_backend(two: Run) -> None:
    expected = (
        "custom_ar.Communicator: group must have a CPU backend, to exchange handles, got "
        "'cuda:gloo'; make it with the backend 'gloo' or 'cpu:gloo,cuda:nccl'"
    )
    assert two(shared.without_cpu_backend, workers.Kind) == [("ValueError", expected)] * 2


def test_no_default_group() -> None:
    expected = (
        "custom_ar.Communicator: group must be a process group, got None and there is no default "
        "group; call torch.distributed.init_process_group first"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        custom_ar.Communicator()
    with pytest.raises(ValueError, match=r"^custom_ar.Communicator: group must be .*, got gloo$"):
        custom_ar.Communicator("gloo")


BAD_ARGUMENTS = [
    ({"max_size": 0}, {}, "max_size must be bytes in [1, 2^40], got 0"),
    ({"max_size": 2**40 + 1}, {}, "max_size must be bytes in [1, 2^40], got 1099511627777"),
    ({"max_size": 1e6}, {}, "max_size must be bytes in [1, 2^40], got 1000000.0"),
    *(
        (
            {"timeout": value},
            {},
            f"timeout must be a positive number of seconds below 1e9, got {value!r}",
        )
        for value in (0, -1.5, float("inf"), float("nan"), 1e9, "soon")
    ),
    *(
        (
            {},
            {"CUSTOM_AR_TIMEOUT": value},
            f"CUSTOM_AR_TIMEOUT must be a positive number of seconds below 1e9, got {value!r}",
        )
        for value in ("0", "nan", "10s")
    ),
    ({"device": "gpu"}, {}, "device must be a torch device, got 'gpu'"),
    ({"device": 1.5}, {}, "device must be a torch device, got 1.5"),
]


@pytest.mark.parametrize(("arguments", "environment", "message"), BAD_ARGUMENTS, ids=str)
def test_bad_argument_of_one_rank(
    two: Run, arguments: dict[str, Any], environment: dict[str, str], message: str
) -> None:
    """All ranks raise, so that none waits for another."""
    good, bad = two(shared.bad_argument, workers.Kind, 1, arguments, environment)
    assert bad == ("ValueError", f"custom_ar.Communicator: {message}")
    assert good == ("ValueError", f"custom_ar.Communicator: on rank 1, {message}")


def test_bad_argument_of_one_rank_alone(one: Run) -> None:
    [error] = one(shared.bad_argument, workers.Kind, 0, {"max_size": -1}, {})
    assert error == (
        "ValueError",
        "custom_ar.Communicator: max_size must be bytes in [1, 2^40], got -1",
    )


def test_other_max_size(two: Run) -> None:
    expected = (
        "custom_ar.Communicator: max_size must be the same on all ranks, got 33554432 on rank 0 "
        "and 1024 on rank 1"
    )
    assert (
        two(shared.bad_argument, workers.Kind, 1, {"max_size": 1024}, {})
        == [("ValueError", expected)] * 2
    )


def test_other_version(two: Run) -> None:
    expected = (
        "custom_ar.Communicator: all ranks must have the same version of custom-ar, got 1.0 on "
        "rank 0 and 1.1 on rank 1"
    )
    assert two(shared.other_version, workers.Kind) == [("RuntimeError", expected)] * 2


def test_timeouts(two: Run) -> None:
    assert two(shared.timeouts, workers.Kind) == [[1.0, 2.5, 30.0]] * 2


@pytest.mark.parametrize("how", [None, {"backend": "aot_eager"}, {}], ids=str)
def test_out_that_does_not_fit(one: Run, two: Run, how: dict[str, Any] | None) -> None:
    """Compiled calls raise as eager ones do."""
    texts = [
        "have the dtype of x, torch.float32, got torch.float64",
        "have the shape of x, [3], got [4]",
        "have the shape of x, [3], got [1]",
        "have the strides of x, [3, 1], got [1, 2]",
        "have the strides of x, [1, 3], got [2, 1]",
    ]
    if how is None:
        texts += [
            "have the device of x, cpu, got meta",
            "have the strides of x, [1], got [0]",
            "not overlap itself, got strides [0]",
            "not overlap itself, got strides [1, 1]",
            "not overlap itself, got strides [3, 3]",
            "be x itself or not overlap it",
            "have the strides of x, [1], got [2]",
            "be x itself or not overlap it",
        ]
    begin = "custom_ar.Communicator.all_reduce: out must"
    expected = [("RuntimeError", f"{begin} {text}") for text in texts]
    assert one(workers.out_errors, how) == [expected]
    assert two(workers.out_errors, how) == [expected] * 2


def test_kernels_get_what_they_take(two: Run) -> None:
    for rank, lines in enumerate(two(workers.kernels)):
        begin = f"custom_ar: rank {rank} of 2: a call with"
        goes = f"on cpu goes to torch.distributed ({GLOO}):"
        assert lines == [
            (
                "WARNING",
                f"{begin} [101] of torch.float32 {goes} the kernels take at most max_size = 400 "
                "bytes; this is logged once",
            ),
            (
                "WARNING",
                f"{begin} [3] of torch.float64 {goes} the kernels take float32, float16 and "
                "bfloat16, not torch.float64; this is logged once",
            ),
            (
                "WARNING",
                f"{begin} [5, 7] of torch.int64 {goes} the kernels take float32, float16 and "
                "bfloat16, not torch.int64; this is logged once",
            ),
        ]


STEPS = {
    "allocate_shared_buffer_and_handle": (
        "allocate shared memory: allocate_shared_buffer_and_handle failed"
    ),
    "open_mem_handle": "map its peers' memory: open_mem_handle failed",
    "init_custom_ar": "map its peers' memory: init_custom_ar failed",
    "_check": "verify its peers' writes: _check failed",
    "writes": "verify its peers' writes: sums of what the peers wrote are wrong",
}


@pytest.mark.parametrize("failing_rank", [0, 2])
@pytest.mark.parametrize("failing", STEPS)
def test_setting_up_fails_on_one_rank(three: Run, failing: str, failing_rank: int) -> None:
    results = three(workers.failing_step, failing, failing_rank)
    assert_one_line(results, f"rank {failing_rank} could not {STEPS[failing]}")


def test_closing_waits_for_no_peer(two: Run) -> None:
    two(shared.closing, workers.Kind)


def test_closing_fails_on_one_rank(two: Run) -> None:
    text = "custom_ar: rank 1: close: _announce_close failed\nand more lines"
    unmapping = "custom_ar: rank 1: close: free_shared_buffer failed\nand more lines"
    good, bad = two(shared.closing_with_failures, workers.Kind)
    assert good == [[], [], [], []]
    assert bad == [[("WARNING", text)], [("WARNING", unmapping)], [], []]


def test_closed_and_dropped_keep_no_group(two: Run) -> None:
    two(shared.dropping, workers.Kind)


def test_setting_up_and_unmapping_fail(two: Run) -> None:
    line = ("WARNING", "custom_ar: rank 1: close: cannot unmap")
    assert two(shared.set_up_fails_and_unmapping, workers.Kind) == [[], [line]]


def test_group_dies_after_setting_up_failed(two: Run) -> None:
    two(shared.set_up_fails_and_group, workers.Kind)


def test_closing_reports_a_failure(two: Run) -> None:
    for rank, logs in enumerate(two(shared.closing_after_a_failure, workers.Kind)):
        text = f"custom_ar: rank {rank}: close: a call has failed"
        assert logs == [[("WARNING", text)], []]


def test_ranks_that_share_a_gpu(three: Run) -> None:
    """Said once, by one rank."""
    logs = three(shared.sharing_gpus, workers.Kind, ["u", "v", "u"])
    text = "custom_ar: ranks 0, 2 share a GPU, GPU u"
    assert logs == [[("WARNING", text)], [], []]
    assert three(shared.sharing_gpus, workers.Kind, ["u", "v", "w"]) == [[], [], []]


def test_out_of_memory(two: Run) -> None:
    expected = [
        (
            "OutOfMemoryError",
            "custom_ar::all_reduce: cannot allocate the result, 12 bytes on cuda:0",
        ),
        ("RuntimeError", "custom_ar::all_reduce: something else"),
    ]
    assert two(workers.out_of_memory) == [expected] * 2


def test_dropped_without_closing(two: Run) -> None:
    assert two(workers.forgotten) == [["custom_ar: a Communicator was not closed"]] * 2


@pytest.mark.parametrize("count", [2, 3, 5, 8])
def test_good_ranks_have_no_obstacle(count: int) -> None:
    assert module._obstacle(shared.facts(count)) is None


OBSTACLES = [
    (9, {}, "the kernels serve at most 8 ranks, and the group has 9"),
    (2, {"host_id": "b", "host_name": "b"}, "the group spans hosts: rank 0 on a, rank 1 on b"),
    (3, {"device": "cpu"}, "the kernels are for CUDA, and the device of rank 2 is cpu"),
    (
        2,
        {"problem": "CUDA is not available"},
        "rank 1 cannot use its device: CUDA is not available",
    ),
    (
        2,
        {"capability": (7, 5), "device_name": "Tesla T4"},
        "the kernels need compute capability 8.0 or later, and the Tesla T4 of rank 1 has 7.5",
    ),
]


@pytest.mark.parametrize(("count", "changes", "reason"), OBSTACLES, ids=str)
def test_obstacles(count: int, changes: dict[str, Any], reason: str) -> None:
    assert module._obstacle(shared.facts(count, **changes)) == reason


def test_example(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, EXAMPLE],
        cwd=tmp_path,
        env={
            "GLOO_SOCKET_IFNAME": "lo",
            **os.environ,
            # Where this process has the package from.
            "PYTHONPATH": str(Path(custom_ar.__file__).parents[1]),
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=180,
    )
    assert result.returncode == 0, result.stderr
    # Both processes print, and gloo does in some versions: lines may run into each other.
    found = re.findall(r"rank (\d) on \S+: ([\d.]+) \(([^)]*)\)", result.stdout)
    assert sorted(line[:2] for line in found) == [("0", "3"), ("1", "3")], result.stdout
    expected = (
        "the device of ranks 0, 1 is cpu" if torch.cuda.device_count() < 2 else "by the kernels"
    )
    assert all(expected in how for _, _, how in found)


def test_readme_shows_the_example() -> None:
    readme = EXAMPLE.parents[1] / "README.md"
    code = EXAMPLE.read_text().partition('"""\n\n')[2]
    assert f"```py\n{code}```\n" in readme.read_text()


@pytest.mark.parametrize("peer", ["out of reach", "hidden", "the same device"])
def test_peer_access_is_asked_for(peer: str) -> None:
    """A device that is seen and cannot be reached is an error; the others are tried by mapping."""
    uuids = ["GPU-0", "GPU-1"]
    facts = [
        module._Facts("1", 1, "host", "id", "cuda", device_uuid=uuid)
        for uuid in ("GPU-0", {"out of reach": "GPU-1", "hidden": "GPU-2"}.get(peer, "GPU-0"))
    ]
    with (
        mock.patch.object(torch.cuda, "device_count", return_value=2),
        mock.patch.object(
            torch.cuda,
            "get_device_properties",
            side_effect=lambda index: SimpleNamespace(uuid=uuids[index]),
        ),
        mock.patch.object(torch.cuda, "can_device_access_peer", return_value=False),
    ):
        if peer == "out of reach":
            with pytest.raises(RuntimeError, match=r"no peer access to .* of rank 1, cuda:1"):
                module._check_peer_access(facts, 0)
        else:
            module._check_peer_access(facts, 0)
