"""What a rank does in the tests of the workspace without a GPU."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator
from typing import Any, ClassVar
from unittest import mock

import minimax_rms
import peer_group_workers
import rank_reports
import torch
import torch.distributed as dist
from minimax_arithmetic import DTYPES, assert_rounded, exact, random_rows, random_weight
from minimax_rms import reference
from minimax_rms import workspace as module
from peer_group_workers import operators_replaced, resource_warnings
from rank_processes import Rank
from rank_reports import error_of
from torch import Tensor

logged = functools.partial(rank_reports.logged, "minimax_rms")

EPS = 1e-6
MAX_TOKENS = 40


def own_rows(rank: int, num_tokens: int, width: int, dtype: torch.dtype) -> Tensor:
    return random_rows(num_tokens, width, dtype, torch.Generator().manual_seed(rank))


def own_weight(rank: int, width: int, dtype: torch.dtype) -> Tensor:
    return random_weight(width, dtype, torch.Generator().manual_seed(1000 + rank))


def same_bits(actual: Tensor, expected: Tensor) -> bool:
    return actual.dtype == expected.dtype and torch.equal(actual, expected)


def check_calls(workspace: minimax_rms.Workspace, dtype: torch.dtype) -> None:
    """Both methods at several sizes, against the reference to the bit and against float64."""
    rank, ranks = workspace.rank, range(workspace.nranks)
    for num_tokens, width in ((1, 8), (5, 40), (MAX_TOKENS, 384), (3, 8)):
        inputs = [own_rows(r, num_tokens, width, dtype) for r in ranks]
        weights = [own_weight(r, width, dtype) for r in ranks]
        expected = reference.minimax_allreduce_rms(inputs, weights, EPS)[rank]
        before = inputs[rank].clone()
        result = workspace.allreduce_rms(inputs[rank], weights[rank])
        assert same_bits(result, expected)
        assert same_bits(inputs[rank], before)
        assert_rounded(result, exact(inputs, weights, EPS)[rank])
        # Rows of a larger tensor.
        spaced = torch.zeros(num_tokens, width + 16, dtype=dtype)[:, 8 : width + 8]
        result = workspace.allreduce_rms(spaced.copy_(before), weights[rank], EPS)
        assert same_bits(result, expected)
        assert result.is_contiguous()

    for num_tokens, q_size, kv_size in ((1, 8, 8), (7, 96, 16), (MAX_TOKENS, 48, 8), (2, 16, 0)):
        rows = [own_rows(r, num_tokens, q_size + 2 * kv_size, dtype) for r in ranks]
        weights_q = [own_weight(r, q_size, dtype) for r in ranks]
        weights_k = [own_weight(r, kv_size, dtype) for r in ranks]
        # eps that shows.
        results = reference.minimax_allreduce_rms_qk(rows, weights_q, weights_k, 0.5)
        q, k = workspace.allreduce_rms_qk(rows[rank], weights_q[rank], weights_k[rank], 0.5)
        assert same_bits(q, results[rank][0])
        assert same_bits(k, results[rank][1])

    # No call: none but this rank makes it.
    if rank == 0:
        empty = workspace.allreduce_rms(torch.empty(0, 8, dtype=dtype), torch.ones(8, dtype=dtype))
        assert (empty.shape, empty.dtype) == ((0, 8), dtype)
        q, k = workspace.allreduce_rms_qk(
            torch.empty(0, 32, dtype=dtype), torch.ones(16, dtype=dtype), torch.ones(8, dtype=dtype)
        )
        assert (q.shape, k.shape) == ((0, 16), (0, 8))


def check_closed(workspace: minimax_rms.Workspace) -> None:
    assert workspace.closed
    workspace.close()
    assert workspace.tensor is None
    assert repr(workspace).endswith(": closed>")
    x, w = torch.ones(3, 16), torch.ones(8)
    functional = torch.ops.minimax_rms
    named = (workspace._order, workspace._id)
    for name, call in (
        ("allreduce_rms", lambda: workspace.allreduce_rms(x, torch.ones(16))),
        ("allreduce_rms_qk", lambda: workspace.allreduce_rms_qk(x, w, w[:4])),
        (
            "allreduce_rms",
            lambda: functional.functional_allreduce_rms(x, torch.ones(16), EPS, *named),
        ),
        (
            "allreduce_rms_qk",
            lambda: functional.functional_allreduce_rms_qk(x, w, w[:4], EPS, *named),
        ),
        ("check", workspace.check),
    ):
        expected = f"minimax_rms.Workspace.{name}: the workspace is closed"
        assert error_of(call) == ("RuntimeError", expected)
    assert workspace.missing_ranks == []


def fallback(rank: Rank) -> tuple[str | None, list[tuple[str, str]]]:
    """A workspace of CPU tensors; why it falls back, and all that was logged."""
    with logged() as lines:
        workspace = minimax_rms.Workspace(rank.group, MAX_TOKENS, rank.device)
        assert (workspace.rank, workspace.nranks) == (rank.rank, rank.world_size)
        assert workspace.device == rank.device
        assert workspace.group is rank.group
        assert workspace.max_tokens == MAX_TOKENS
        assert workspace.timeout == 30.0
        assert workspace.tensor is None
        assert not workspace.closed
        how = workspace.fallback_reason or "one rank"
        expected = f"<minimax_rms.Workspace rank {rank.rank} of {rank.world_size}: {how}>"
        assert repr(workspace) == expected
        with workspace:
            for dtype in DTYPES:
                check_calls(workspace, dtype)
            workspace.check()
            assert workspace.missing_ranks == []
        check_closed(workspace)
    return workspace.fallback_reason, lines


def default_group(rank: Rank) -> None:
    with minimax_rms.Workspace(None, 3, "cpu") as workspace:
        assert workspace.group is dist.group.WORLD
        x = torch.full((3, 4), rank.rank + 1.0)
        result = workspace.allreduce_rms(x, torch.ones(4), 0.0)
    mean = sum((r + 1) ** 2 for r in range(rank.world_size)) / rank.world_size
    torch.testing.assert_close(result, x / mean**0.5)


def no_gradients(rank: Rank, how: dict[str, Any] | None = None) -> None:
    torch.compiler.reset()
    with minimax_rms.Workspace(rank.group, 3, rank.device) as workspace:

        def program(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
            q, k = workspace.allreduce_rms_qk(x, weight, weight[:4])
            return workspace.allreduce_rms(x[:, :8], weight), q, k

        function = program if how is None else torch.compile(program, fullgraph=True, **how)
        x = torch.ones(3, 16, device=rank.device, requires_grad=True)
        weight = torch.nn.Parameter(torch.ones(8, device=rank.device))
        for result in function(x, weight):
            assert not result.requires_grad


def bad_calls(rank: Rank) -> list[tuple[str, str]]:
    """No rank gets as far as to call the others."""
    with minimax_rms.Workspace(rank.group, 3, rank.device) as workspace:
        x, w = torch.ones(4, 16), torch.ones(8)
        return [
            error_of(workspace.allreduce_rms, x, torch.ones(16)),
            error_of(workspace.allreduce_rms_qk, x, w, w[:4]),
            error_of(workspace.allreduce_rms, x[:2], w),
            error_of(workspace.allreduce_rms_qk, x[:2], w, w),
            error_of(workspace.allreduce_rms, x[:2], torch.ones(16), -1.0),
        ]


def special_values(rank: Rank) -> None:
    """What is not finite shows in its token, on every rank, and in no other."""
    with minimax_rms.Workspace(rank.group, 6, rank.device) as workspace:
        inputs = [torch.ones(6, 8) for _ in range(rank.world_size)]
        inputs[0][1, 3] = float("nan")
        inputs[-1][2, 0] = float("inf")
        for x in inputs:
            x[3] = 0
            x[4] = 1e-40
            x[5] = -1e15
        weights = [torch.ones(8)] * rank.world_size
        result = workspace.allreduce_rms(inputs[rank.rank], weights[0])
        assert_rounded(result, exact(inputs, weights, EPS)[rank.rank])
        assert result[1].isnan().all()
        assert result[0].isfinite().all()


def compiled(rank: Rank) -> None:
    """Whole graphs, one for all numbers of tokens, and the eager results."""
    torch.compiler.reset()
    graphs = []

    def counting(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    with minimax_rms.Workspace(rank.group, MAX_TOKENS, rank.device) as workspace:

        def step(qkv: Tensor, q: Tensor, k: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            rows = qkv * 2
            q_out, k_out = workspace.allreduce_rms_qk(rows, q, k)
            return q_out + 1, k_out, workspace.allreduce_rms(rows, w, 0.5)

        weights = [own_weight(rank.rank, width, torch.float32) for width in (16, 8, 32)]
        function = torch.compile(step, fullgraph=True, dynamic=True, backend=counting)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for num_tokens in (5, 17, 33):
                qkv = own_rows(rank.rank, num_tokens, 32, torch.float32)
                results = function(qkv, *weights)
                for result, expected in zip(results, step(qkv, *weights), strict=True):
                    assert torch.equal(result, expected)
        # torch.compile may have begun anew, but has not compiled again.
        targets = [
            getattr(node.target, "overloadpacket", node.target) for node in graphs[-1].graph.nodes
        ]
        assert torch.ops.minimax_rms.functional_allreduce_rms in targets
        assert torch.ops.minimax_rms.functional_allreduce_rms_qk in targets


def compiled_with_inductor(rank: Rank) -> None:
    """Two calls and nothing that inductor would want a C++ compiler for."""
    torch.compiler.reset()
    with minimax_rms.Workspace(rank.group, MAX_TOKENS, rank.device) as workspace:

        def program(qkv: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
            q_out, k_out = workspace.allreduce_rms_qk(qkv, q, k)
            return workspace.allreduce_rms(q_out, q), k_out

        function = torch.compile(program, fullgraph=True)
        weights = [own_weight(rank.rank, width, torch.bfloat16) for width in (16, 8)]
        for round_ in range(3):
            qkv = own_rows(rank.rank + round_, 5, 32, torch.bfloat16)
            for result, expected in zip(
                function(qkv, *weights), program(qkv, *weights), strict=True
            ):
                assert torch.equal(result, expected)


class StandIn(peer_group_workers.StandIn):
    """The operators, as a workspace asks for them."""

    def __init__(self, rank: Rank, failing: str | None = None) -> None:
        super().__init__(rank, failing)
        self.registered: list[Tensor] = []
        self.num_bytes = 0

    def _comm_size(self, nranks: int, max_tokens: int) -> int:
        return torch.ops.minimax_rms._comm_size(nranks, max_tokens)

    def _allocate(self, num_bytes: int) -> tuple[int, Tensor]:
        self.enter("_allocate")
        self.num_bytes = num_bytes
        return self.allocate()

    def _open(self, handle: Tensor) -> int:
        self.enter("_open")
        return self.open(handle)

    def _free(self, address: int) -> None:
        self.enter("_free")
        self.free(address)

    def _register(
        self,
        workspace: Tensor,
        rank: int,
        nranks: int,
        max_tokens: int,
        num_multiprocessors: int,
        timeout: float,
        shares_gpu: bool,
    ) -> None:
        self.enter("_register")
        assert (rank, nranks) == (self.rank.rank, self.rank.world_size)
        assert num_multiprocessors == 1  # there is none to share
        assert shares_gpu == self.shares_gpu
        self.check_workspace(workspace, max_tokens)
        self.registered.append(workspace)
        self.timeouts.append(timeout)

    def check_workspace(self, workspace: Tensor, max_tokens: int) -> None:
        """It has the form that callers of the raw operators build."""
        nranks = self.rank.world_size
        assert workspace.dtype == torch.int64
        assert workspace.shape == (3 * nranks + 2,)
        buffers = workspace[2 * nranks : 3 * nranks].tolist()
        assert set(buffers) <= self.own | self.opened
        assert len(set(buffers)) == nranks
        assert buffers[self.rank.rank] in self.own
        assert self.num_bytes == 3 * self._comm_size(nranks, max_tokens)

    def _is_registered(self, workspace: Tensor) -> bool:
        return any(workspace is registered for registered in self.registered)

    def _set_timeout(self, workspace: Tensor, seconds: float) -> None:
        assert self._is_registered(workspace)
        self.timeouts.append(seconds)

    def _inputs(self, x: Tensor, workspace: Tensor, rank: int, nranks: int) -> list[Tensor]:
        """Those of all ranks, or this rank's alone as often."""
        assert self._is_registered(workspace)
        assert (rank, nranks) == (self.rank.rank, self.rank.world_size)
        inputs = [torch.empty_like(x) for _ in range(nranks)]
        dist.all_gather(inputs, x.contiguous(), group=self.rank.group)
        return [x] * nranks if self.failing == "writes" else inputs

    def rms(
        self, x: Tensor, weight: Tensor, workspace: Tensor, rank: int, nranks: int, eps: float
    ) -> Tensor:
        self.calls.append("rms")
        inputs = self._inputs(x, workspace, rank, nranks)
        return reference.minimax_allreduce_rms(inputs, [weight] * nranks, eps)[rank]

    def rms_qk(
        self,
        qkv: Tensor,
        weight_q: Tensor,
        weight_k: Tensor,
        workspace: Tensor,
        q_size: int,
        kv_size: int,
        rank: int,
        nranks: int,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        self.calls.append("rms_qk")
        assert (q_size, kv_size) == (weight_q.numel(), weight_k.numel())
        assert qkv.shape[1] == q_size + 2 * kv_size
        rows = self._inputs(qkv, workspace, rank, nranks)
        weights = [weight_q] * nranks, [weight_k] * nranks
        return reference.minimax_allreduce_rms_qk(rows, *weights, eps)[rank]

    def _check(self, workspace: Tensor) -> None:
        self.enter("_check")
        assert self._is_registered(workspace)
        self.check()

    def _missing_ranks(self, workspace: Tensor) -> list[int]:
        assert self._is_registered(workspace)
        return list(self.missing)

    def _announce_close(self, buffers: list[int], rank: int) -> None:
        self.enter("_announce_close")
        assert buffers[rank] in self.own
        assert set(buffers) <= self.own | self.opened

    def _check_unraised(self, workspace: Tensor) -> None:
        self.calls.append("_check_unraised")
        assert self._is_registered(workspace)
        self.check_unraised()

    def _forget(self, workspace: Tensor) -> None:
        self.enter("_forget")
        assert self._is_registered(workspace)
        self.registered = [other for other in self.registered if other is not workspace]

    def holds_nothing(self) -> bool:
        return super().holds_nothing() and not self.registered


@contextlib.contextmanager
def stand_in(rank: Rank, failing: str | None = None) -> Iterator[StandIn]:
    """Lets workspaces of CPU tensors take the way that those of CUDA tensors take."""
    ops = StandIn(rank, failing)
    with operators_replaced(module, ops, _rms=ops.rms, _rms_qk=ops.rms_qk):
        yield ops


def call(workspace: minimax_rms.Workspace, x: Tensor) -> Tensor:
    return workspace.allreduce_rms(x, x[0])


class Kind(peer_group_workers.Kind):
    owner = minimax_rms.Workspace
    module = module
    timeout_variable = "MINIMAX_RMS_TIMEOUT"
    free = "_free"
    arguments: ClassVar[dict[str, Any]] = {"max_tokens": 8}
    fallback = staticmethod(fallback)
    default_group = staticmethod(default_group)
    call = staticmethod(call)
    stand_in = staticmethod(stand_in)


def failing_step(
    rank: Rank, failing: str, failing_rank: int
) -> tuple[str | None, list[tuple[str, str]]]:
    """Setting up fails on one rank: all fall back, and nothing is left allocated."""
    own = failing if rank.rank == failing_rank else None
    no_access = RuntimeError("no peer access") if own == "access" else None
    with (
        stand_in(rank, own) as ops,
        logged() as lines,
        mock.patch.object(module, "_check_peer_access", side_effect=no_access, return_value=None),
    ):
        workspace = minimax_rms.Workspace(rank.group, MAX_TOKENS, rank.device, timeout=3)
        assert ops.holds_nothing()
        assert workspace.tensor is None
        calls = list(ops.calls)
    with workspace:
        for dtype in DTYPES:
            check_calls(workspace, dtype)
        assert ops.calls == calls
    check_closed(workspace)
    return workspace.fallback_reason, lines


def kernels(rank: Rank, max_tokens: int) -> None:
    """What is made, what calls the kernels get, and how it ends."""
    with stand_in(rank) as ops, logged() as lines:
        workspace = minimax_rms.Workspace(rank.group, max_tokens, rank.device, timeout=3)
        assert workspace.fallback_reason is None
        assert repr(workspace).endswith(": kernels>")
        assert workspace.timeout == 3
        # The last is the one that calls are made with.
        assert ops.timeouts == [10.0, 3]
        probes = [call for call in ops.calls if call.startswith("rms")]
        assert probes == ["rms", "rms", "rms_qk", "rms_qk"]
        tensor = workspace.tensor
        assert tensor is not None
        ops.check_workspace(tensor, max_tokens)
        counters, sizes = workspace._memory._pointees
        assert tensor[-2:].tolist() == [counters.data_ptr(), sizes.data_ptr()]
        assert (counters.dtype, counters.tolist()) == (torch.int32, [0, 0, 0])
        comm_size = ops._comm_size(rank.world_size, max_tokens)
        assert (sizes.dtype, sizes.tolist()) == (torch.int64, [0, comm_size])

        ops.calls.clear()
        x, w = torch.full((1, 16), rank.rank + 1.0), torch.ones(8)
        result = workspace.allreduce_rms(x, torch.ones(16), 0.0)
        mean = sum((r + 1) ** 2 for r in range(rank.world_size)) / rank.world_size
        torch.testing.assert_close(result, x / mean**0.5)
        functional = torch.ops.minimax_rms.functional_allreduce_rms
        named = (workspace._order, workspace._id)
        assert torch.equal(functional(x, torch.ones(16), 0.0, *named), result)
        q, k = workspace.allreduce_rms_qk(x, w, w[:4], 0.0)
        assert torch.equal(q, result[:, :8])
        assert torch.equal(k, result[:, :4])
        assert ops.calls == ["rms", "rms", "rms_qk"]

        workspace.check()
        ops.failure = "a call has failed"
        assert error_of(workspace.check) == ("RuntimeError", "a call has failed")
        ops.failure = None
        ops.missing = [1]
        assert workspace.missing_ranks == [1]
        ops.missing = []

        ops.calls.clear()
        peer_group_workers.closed(rank, workspace)
        assert ops.holds_nothing()
        frees = ["_free"] * rank.world_size
        assert ops.calls == ["_announce_close", "_check_unraised", "_forget", *frees]
        assert lines == []
        check_closed(workspace)


def out_of_memory(rank: Rank) -> None:
    """What is raised where the operators raise that memory is lacking, and something else."""
    x, w = torch.ones(3, 16), torch.ones(8)
    with stand_in(rank) as ops:
        workspace = minimax_rms.Workspace(rank.group, MAX_TOKENS, rank.device)
        tensor = workspace.tensor
        for text, kind in (
            ("minimax_rms::op: cannot allocate a result of [3, 16] on cuda:0", "OutOfMemoryError"),
            ("minimax_rms::op: something else", "RuntimeError"),
        ):
            failing = mock.Mock(side_effect=RuntimeError(text))
            with (
                mock.patch.multiple(
                    module,
                    _rms=minimax_rms.ops.minimax_allreduce_rms,
                    _rms_qk=minimax_rms.ops.minimax_allreduce_rms_qk,
                ),
                mock.patch.multiple(
                    minimax_rms.ops, _allreduce_rms=failing, _allreduce_rms_qk=failing
                ),
            ):
                for call in (
                    lambda: workspace.allreduce_rms(x, torch.ones(16)),
                    lambda: workspace.allreduce_rms_qk(x, w, w[:4]),
                    lambda: minimax_rms.ops.minimax_allreduce_rms(x, w, tensor, 0, 2, EPS),
                    lambda: minimax_rms.ops.minimax_allreduce_rms_qk(
                        x, w, w[:4], tensor, 8, 4, 0, 2, EPS
                    ),
                ):
                    assert error_of(call) == (kind, text)
        peer_group_workers.closed(rank, workspace)
        assert ops.holds_nothing()


def forgotten(rank: Rank) -> list[str]:
    """A workspace that is dropped says so, waits for nothing and leaves its memory alone."""
    with stand_in(rank) as ops:
        kept = [minimax_rms.Workspace(rank.group, 8, rank.device, timeout=60)]
        memory = kept[0]._memory
        begin = time.monotonic()
        texts = resource_warnings(kept.clear)
        assert time.monotonic() - begin < 5
        assert ops.own
        [registered] = ops.registered
        assert registered is memory.tensor
        assert module._dropped[-1] is memory
    kept = [minimax_rms.Workspace(rank.group, 8, rank.device)]
    named = (kept[0]._order, kept[0]._id)
    assert resource_warnings(kept.clear) == []
    functional = torch.ops.minimax_rms.functional_allreduce_rms
    kind, text = error_of(functional, torch.ones(1, 4), torch.ones(4), EPS, *named)
    assert kind == "RuntimeError"
    assert text.startswith("minimax_rms::functional_allreduce_rms: workspace must be the id of")
    return texts
