"""The workspace over gloo with CPU tensors, in processes of 1, 2 and 3 ranks.

The kernels are not run here. What comes before and after them is: a stand-in for the operators lets
workspaces of CPU tensors take the way that those of CUDA tensors take.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import minimax_rms
import minimax_smoke as smoke
import minimax_workers as workers
import peer_group_workers as shared
import pytest
import torch
import torch.distributed as dist
from minimax_rms import workspace as module
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
            f"minimax_rms: rank {rank} of {world_size}: all calls go to torch.distributed "
            f"({GLOO}): {reason}"
        )
        assert result == (reason, [(level, text)])


def test_one_rank(one: Run) -> None:
    assert one(workers.fallback) == [(None, [])]
    one(workers.default_group)
    one(workers.no_gradients)
    one(workers.special_values)
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


@pytest.mark.parametrize("how", [None, {"backend": "aot_eager"}, {}], ids=str)
def test_no_gradient_is_recorded(two: Run, how: dict[str, Any] | None) -> None:
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
def test_one_graph_serves_many_workspaces(two: Run, backend: str, dynamic: bool | None) -> None:
    two(shared.compiled_for_many, workers.Kind, {"backend": backend, "dynamic": dynamic})


@pytest.mark.parametrize("device", ["meta", "mps"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled_calls_for_another_device(two: Run, device: str, backend: str) -> None:
    two(shared.compiled_elsewhere, workers.Kind, device, backend)


def test_special_values(three: Run) -> None:
    three(workers.special_values)


def test_compile_to_a_full_graph(two: Run) -> None:
    two(workers.compiled)


def test_compile_with_inductor(two: Run) -> None:
    two(workers.compiled_with_inductor)


@pytest.mark.parametrize("members", [[0, 2], [2, 1]], ids=str)
def test_subgroup(three: Run, members: list[int]) -> None:
    results = three(shared.subgroup, workers.Kind, sorted(members))
    [outside] = set(range(3)) - set(members)
    assert results.pop(outside) == (
        "minimax_rms.Workspace: group must be a process group, got one that this process is not in"
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
        "minimax_rms.Workspace: group must be a process group, got one that torch.distributed "
        "does not know: it was destroyed, or made by other means than torch.distributed.new_group"
    )
    assert two(shared.unknown_group, workers.Kind, how) == [("ValueError", expected)] * 2


def test_group_without_a_cpu_backend(two: Run) -> None:
    expected = (
        "minimax_rms.Workspace: group must have a CPU backend, to exchange handles, got "
        "'cuda:gloo'; make it with the backend 'gloo' or 'cpu:gloo,cuda:nccl'"
    )
    assert two(shared.without_cpu_backend, workers.Kind) == [("ValueError", expected)] * 2


def test_no_default_group() -> None:
    expected = (
        "minimax_rms.Workspace: group must be a process group, got None and there is no default "
        "group; call torch.distributed.init_process_group first"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        minimax_rms.Workspace(None, 8)
    with pytest.raises(ValueError, match=r"^minimax_rms.Workspace: group must be .*, got gloo$"):
        minimax_rms.Workspace("gloo", 8)


BAD_ARGUMENTS = [
    *(
        ({"max_tokens": value}, {}, f"max_tokens must be tokens in [1, 2^24), got {value!r}")
        for value in (0, -1, 2**24, 8.0, True, None)
    ),
    *(
        (
            {"timeout": value},
            {},
            f"timeout must be a positive number of seconds below 1e9, got {value!r}",
        )
        for value in (0, float("nan"), 1e9, "soon")
    ),
    (
        {},
        {"MINIMAX_RMS_TIMEOUT": "10s"},
        "MINIMAX_RMS_TIMEOUT must be a positive number of seconds below 1e9, got '10s'",
    ),
    ({"device": "gpu"}, {}, "device must be a torch device, got 'gpu'"),
]


@pytest.mark.parametrize(("arguments", "environment", "message"), BAD_ARGUMENTS, ids=str)
def test_bad_argument_of_one_rank(
    two: Run, arguments: dict[str, Any], environment: dict[str, str], message: str
) -> None:
    """All ranks raise, so that none waits for another."""
    good, bad = two(shared.bad_argument, workers.Kind, 1, arguments, environment)
    assert bad == ("ValueError", f"minimax_rms.Workspace: {message}")
    assert good == ("ValueError", f"minimax_rms.Workspace: on rank 1, {message}")


def test_bad_argument_of_one_rank_alone(one: Run) -> None:
    [error] = one(shared.bad_argument, workers.Kind, 0, {"max_tokens": -1}, {})
    assert error == (
        "ValueError",
        "minimax_rms.Workspace: max_tokens must be tokens in [1, 2^24), got -1",
    )


def test_other_max_tokens(two: Run) -> None:
    expected = (
        "minimax_rms.Workspace: max_tokens must be the same on all ranks, got 8 on rank 0 and 9 on "
        "rank 1"
    )
    assert (
        two(shared.bad_argument, workers.Kind, 1, {"max_tokens": 9}, {})
        == [("ValueError", expected)] * 2
    )


def test_other_version(two: Run) -> None:
    expected = (
        "minimax_rms.Workspace: all ranks must have the same version of minimax-rms, got 1.0 on "
        "rank 0 and 1.1 on rank 1"
    )
    assert two(shared.other_version, workers.Kind) == [("RuntimeError", expected)] * 2


def test_timeouts(two: Run) -> None:
    assert two(shared.timeouts, workers.Kind) == [[1.0, 2.5, 30.0]] * 2


@pytest.mark.parametrize("world_size", [1, 2])
def test_bad_calls(one: Run, two: Run, world_size: int) -> None:
    """Alike for one rank and for more, and before any rank waits for another."""
    room = "a call may have at most max_tokens = 3 tokens in this workspace, got 4"
    begin, begin_qk = (f"minimax_rms::minimax_allreduce_rms{suffix}:" for suffix in ("", "_qk"))
    expected = [
        ("RuntimeError", f"{begin} {room}"),
        ("RuntimeError", f"{begin_qk} {room}"),
        (
            "RuntimeError",
            f"{begin} norm_weight must have shape [D] with D = input.size(1) = 16, got [8]",
        ),
        (
            "RuntimeError",
            f"{begin_qk} qkv must have shape [T, W] with W = q_size + 2 * kv_size = 24, got "
            "[2, 16]",
        ),
        ("RuntimeError", f"{begin} eps must be finite in float32 and at least 0, got -1"),
    ]
    run = one if world_size == 1 else two
    assert run(workers.bad_calls) == [expected] * world_size


@pytest.mark.parametrize("max_tokens", [1, 3, 20_000])
def test_kernels_get_the_calls(two: Run, three: Run, max_tokens: int) -> None:
    two(workers.kernels, max_tokens)
    three(workers.kernels, max_tokens)


STEPS = {
    "access": "use its peers' memory: no peer access",
    "_allocate": "allocate shared memory: _allocate failed",
    "_open": "map its peers' memory: _open failed",
    "_register": "map its peers' memory: _register failed",
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
    text = "minimax_rms: rank 1: close: _announce_close failed\nand more lines"
    unmapping = "minimax_rms: rank 1: close: _free failed\nand more lines"
    good, bad = two(shared.closing_with_failures, workers.Kind)
    assert good == [[], [], [], []]
    assert bad == [[("WARNING", text)], [("WARNING", unmapping)], [], []]


def test_closed_and_dropped_keep_no_group(two: Run) -> None:
    two(shared.dropping, workers.Kind)


def test_setting_up_and_unmapping_fail(two: Run) -> None:
    line = ("WARNING", "minimax_rms: rank 1: close: cannot unmap")
    assert two(shared.set_up_fails_and_unmapping, workers.Kind) == [[], [line]]


def test_group_dies_after_setting_up_failed(two: Run) -> None:
    two(shared.set_up_fails_and_group, workers.Kind)


def test_closing_reports_a_failure(two: Run) -> None:
    for rank, logs in enumerate(two(shared.closing_after_a_failure, workers.Kind)):
        text = f"minimax_rms: rank {rank}: close: a call has failed"
        assert logs == [[("WARNING", text)], []]


def test_ranks_that_share_a_gpu(three: Run) -> None:
    """Said once, by one rank."""
    logs = three(shared.sharing_gpus, workers.Kind, ["u", "v", "u"])
    text = "minimax_rms: ranks 0, 2 share a GPU, GPU u"
    assert logs == [[("WARNING", text)], [], []]
    assert three(shared.sharing_gpus, workers.Kind, ["u", "v", "w"]) == [[], [], []]


def test_out_of_memory(two: Run) -> None:
    two(workers.out_of_memory)


def test_dropped_without_closing(two: Run) -> None:
    assert two(workers.forgotten) == [["minimax_rms: a Workspace was not closed"]] * 2


@pytest.mark.parametrize("count", [2, 3, 16])
def test_good_ranks_have_no_obstacle(count: int) -> None:
    assert module._obstacle(shared.facts(count)) is None


OBSTACLES = [
    (17, {}, "the kernels serve at most 16 ranks, and the group has 17"),
    (
        2,
        {"capability": (7, 5), "device_name": "Tesla T4"},
        "the kernels need compute capability 8.0 or later, and the Tesla T4 of rank 1 has 7.5",
    ),
]


@pytest.mark.parametrize(("count", "changes", "reason"), OBSTACLES, ids=str)
def test_obstacles(count: int, changes: dict[str, Any], reason: str) -> None:
    assert module._obstacle(shared.facts(count, **changes)) == reason


@pytest.mark.parametrize(
    ("count", "changes", "num_multiprocessors"),
    [
        (1, {}, 132),
        # Ranks of one GPU, and for each its next call.
        (2, {}, 33),
        (3, {}, 22),
        (16, {}, 4),
        # The last one has a GPU of its own, and then one that is smaller than the others' shares.
        (3, {"device_uuid": "v"}, 33),
        (2, {"device_uuid": "v"}, 132),
        (2, {"device_uuid": "v", "num_multiprocessors": 78}, 78),
        (3, {"device_uuid": "v", "num_multiprocessors": 20}, 20),
    ],
    ids=str,
)
def test_multiprocessors(count: int, changes: dict[str, Any], num_multiprocessors: int) -> None:
    """What calls are cut for, the same on all ranks: of all that share a GPU, blocks find room."""
    assert module.multiprocessors_per_call(shared.facts(count, **changes)) == num_multiprocessors


def test_example(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, EXAMPLE],
        cwd=tmp_path,
        env={
            "GLOO_SOCKET_IFNAME": "lo",
            **os.environ,
            # Where this process has the package from.
            "PYTHONPATH": str(Path(minimax_rms.__file__).parents[1]),
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=180,
    )
    assert result.returncode == 0, result.stderr
    # Both processes print, and gloo does in some versions: lines may run into each other.
    found = re.findall(r"rank (\d) on \S+: ([\d.]+) \(([^)]*)\)", result.stdout)
    # 3 and 7 over the root of (9 + 49) / 2, in bfloat16.
    assert sorted(line[:2] for line in found) == [("0", "0.559"), ("1", "1.297")], result.stdout
    expected = (
        "the device of ranks 0, 1 is cpu" if torch.cuda.device_count() < 2 else "by the kernels"
    )
    assert all(expected in how for _, _, how in found)


def test_readme_shows_the_example() -> None:
    readme = EXAMPLE.parents[1] / "README.md"
    code = EXAMPLE.read_text().partition('"""\n\n')[2]
    assert f"```py\n{code}```\n" in readme.read_text()
