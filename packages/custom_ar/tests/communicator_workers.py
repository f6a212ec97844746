"""What a rank does in the tests of the communicator without a GPU."""

from __future__ import annotations

import contextlib
import functools
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import custom_ar
import peer_group_workers
import rank_reports
import torch
import torch.distributed as dist
from custom_ar import communicator as module
from peer_group_workers import operators_replaced, resource_warnings
from rank_processes import Rank
from rank_reports import error_of
from torch import Tensor

logged = functools.partial(rank_reports.logged, "custom_ar")


def own_values(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Small integers, different on each rank and exact in any type and order of additions."""
    return (torch.arange(torch.Size(shape).numel()).view(shape) % 13 + 2 * rank).to(dtype)


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The values of a matrix in other layouts."""
    rows, columns = x.shape
    spaced = torch.zeros(rows, 2 * columns, dtype=x.dtype)[:, ::2]
    return {
        "contiguous": x.clone(),
        "transposed": x.clone().t(),
        "spaced": spaced.copy_(x),
        "expanded": x[:1].clone().expand(4, columns),
        "scalar": x[0, 0].clone(),
        "unaligned": torch.cat([x.new_zeros(1), x.flatten()])[1:],
    }


def check_calls(rank: Rank, communicator: custom_ar.Communicator, dtype: torch.dtype) -> None:
    """Every way to call, with every layout."""
    total = sum(own_values(r, (5, 7), torch.float64) for r in range(communicator.world_size))
    mine = own_values(communicator.rank, (5, 7), dtype)
    for name, x in layouts(mine).items():
        expected = layouts(total.to(dtype))[name]
        before = x.clone()

        result = communicator.all_reduce(x)
        assert torch.equal(result, expected), name
        assert result.dtype == dtype
        assert result.stride() == torch.empty_like(x).stride(), name
        assert result.data_ptr() != x.data_ptr()
        assert torch.equal(x, before), name

        out = torch.full_like(x, 99)
        if name not in ("spaced", "expanded"):
            assert out.stride() == x.stride()
        assert communicator.all_reduce(x, out=out) is out
        assert torch.equal(out, expected), name
        assert torch.equal(x, before), name

        if name != "expanded":
            assert communicator.all_reduce(x, out=x) is x
            assert torch.equal(x, expected), name

    empty = torch.empty(0, 3, dtype=dtype)
    assert communicator.all_reduce(empty).shape == (0, 3)
    assert communicator.all_reduce(empty, out=empty) is empty


def outputs_that_autograd_guards(rank: Rank) -> None:
    """Outputs that torch's own operators would not write: the kernels do."""
    with custom_ar.Communicator(rank.group, device=rank.device) as communicator:
        x = torch.full((6, 4), rank.rank + 1.0)
        total = torch.full((6, 4), sum(range(1, rank.world_size + 1)) * 1.0)
        for parts in (slice(None), slice(None, None, 2)):
            with torch.inference_mode():
                out = torch.zeros(6, 4)[:, parts]
            assert communicator.all_reduce(x[:, parts], out=out) is out
            assert torch.equal(out, total[:, parts])
        leaf = torch.zeros(6, 4, requires_grad=True)
        assert communicator.all_reduce(x, out=leaf) is leaf
        assert torch.equal(leaf.detach(), total)
        assert not communicator.all_reduce(x).is_inference()


def functional(communicator: custom_ar.Communicator, x: Tensor) -> Tensor:
    """As a compiler calls it."""
    return torch.ops.custom_ar.functional_all_reduce(x, communicator._order, communicator._id)


def check_closed(communicator: custom_ar.Communicator) -> None:
    assert communicator.closed
    communicator.close()
    x = torch.ones(3)
    assert not communicator.supports(x)
    for name, call in (
        ("all_reduce", lambda: communicator.all_reduce(x)),
        ("all_reduce", lambda: communicator.all_reduce(x, out=x)),
        ("all_reduce", lambda: functional(communicator, x)),
        ("check", communicator.check),
    ):
        expected = f"custom_ar.Communicator.{name}: the communicator is closed"
        assert error_of(call) == ("RuntimeError", expected)
    assert communicator.missing_ranks == []


def fallback(rank: Rank) -> tuple[str | None, list[tuple[str, str]]]:
    """A communicator of CPU tensors; why it falls back, and all that was logged."""
    with logged() as lines:
        communicator = custom_ar.Communicator(rank.group, rank.device)
        assert (communicator.rank, communicator.world_size) == (rank.rank, rank.world_size)
        assert communicator.device == rank.device
        assert communicator.group is rank.group
        assert communicator.max_size == 32 << 20
        assert communicator.timeout == 30.0
        assert not communicator.closed
        assert not communicator.supports(torch.ones(3))
        with communicator, communicator.capture():
            for dtype in (
                torch.float32,
                torch.float16,
                torch.bfloat16,
                torch.float64,
                torch.int64,
            ):
                check_calls(rank, communicator, dtype)
            communicator.check()
            assert communicator.missing_ranks == []
        check_closed(communicator)
    return communicator.fallback_reason, lines


def default_group(rank: Rank) -> None:
    with custom_ar.Communicator(device="cpu") as communicator:
        assert communicator.group is dist.group.WORLD
        x = torch.full((3,), rank.rank + 1.0)
        total = communicator.all_reduce(x)
    assert (total == rank.world_size * (rank.world_size + 1) // 2).all()


def no_gradients(rank: Rank, how: dict[str, Any] | None = None) -> None:
    """Also not of an ``out`` that requires one itself, or whose input does."""
    torch.compiler.reset()
    with custom_ar.Communicator(rank.group, rank.device) as communicator:

        def all_reduce(x: Tensor, out: Tensor | None = None) -> Tensor:
            return communicator.all_reduce(x, out)

        function = all_reduce if how is None else torch.compile(all_reduce, fullgraph=True, **how)
        x = torch.full((4,), 2.0, device=rank.device, requires_grad=True)
        result = function(x)
        assert not result.requires_grad
        assert (result == 2 * rank.world_size).all()
        out = torch.zeros_like(result)
        assert function(x, out) is out
        assert not out.requires_grad
        assert out.grad_fn is None
        assert torch.equal(out, result)
        if how is None:
            leaf = torch.zeros_like(result).requires_grad_()
            assert function(x, leaf) is leaf
            assert leaf.grad_fn is None
            assert torch.equal(leaf, result)


def out_errors(rank: Rank, how: dict[str, Any] | None = None) -> list[tuple[str, str]]:
    """No rank gets as far as to call the others."""
    torch.compiler.reset()
    with custom_ar.Communicator(rank.group, rank.device) as communicator:

        def into(x: Tensor, out: Tensor) -> Tensor:
            return communicator.all_reduce(x, out=out)

        # Not of a full graph, whose errors have other types.
        function = into if how is None else torch.compile(into, **how)
        x, grid, memory = torch.ones(3), torch.ones(2, 3), torch.ones(12)
        bad = [
            (x, torch.ones(3, dtype=torch.float64)),
            (x, torch.ones(4)),
            (x, torch.ones(1)),
            (grid, torch.ones(3, 2).t()),
            (grid.t(), torch.ones(3, 2)),
        ]
        if how is None:
            bad += [
                (x, torch.ones(3, device="meta")),
                (x, torch.ones(1).expand(3)),
                (torch.ones(1).expand(3), torch.ones(1).expand(3)),
                (memory[:3].as_strided((2, 2), (1, 1)), torch.ones(3).as_strided((2, 2), (1, 1))),
                (memory.as_strided((3, 2), (3, 3)), memory.as_strided((3, 2), (3, 3))),
                (memory[:6], memory[4:10]),
                (memory[:6], memory[::2]),
                (memory[::2], memory[4:10]),
            ]
        errors = [error_of(function, *arguments) for arguments in bad]
        # Gaps that lie in each other's, and the layout of a new tensor.
        even, odd = memory.view(6, 2).unbind(1)
        for out in (odd, torch.zeros(6), even):
            even.fill_(1)
            assert communicator.all_reduce(even, out=out) is out
            assert (out == rank.world_size).all()
        return errors


def compiled(rank: Rank) -> None:
    """Whole graphs, one for all sizes, and the eager results."""
    torch.compiler.reset()
    graphs = []

    def counting(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    with custom_ar.Communicator(rank.group, rank.device) as communicator:

        def step(x: Tensor) -> Tensor:
            return communicator.all_reduce(x * 2) + 1

        function = torch.compile(step, fullgraph=True, dynamic=True, backend=counting)
        for size in (5, 17, 33):
            x = own_values(rank.rank, (size, 3), torch.float32)
            before = x.clone()
            assert torch.equal(function(x), step(x))
            assert torch.equal(x, before)
        assert len(graphs) == 1
        targets = [node.target for node in graphs[0].graph.nodes]
        assert torch.ops.custom_ar.functional_all_reduce in [
            getattr(target, "overloadpacket", target) for target in targets
        ]

        def into(x: Tensor, out: Tensor) -> Tensor:
            return communicator.all_reduce(x, out=out)

        out = torch.zeros(5, 3)
        x = own_values(rank.rank, (5, 3), torch.float32)
        assert torch.compile(into, fullgraph=True, backend="aot_eager")(x, out) is out
        assert torch.equal(out, communicator.all_reduce(x))
        expected = out.clone()
        assert torch.compile(into, fullgraph=True, backend="aot_eager")(x, x) is x
        assert torch.equal(x, expected)


def compiled_with_inductor(rank: Rank) -> None:
    """Two calls and nothing that inductor would want a C++ compiler for."""
    torch.compiler.reset()
    with custom_ar.Communicator(rank.group, rank.device) as communicator:

        def program(x: Tensor) -> tuple[Tensor, Tensor]:
            first = communicator.all_reduce(x)
            return first, communicator.all_reduce(first.t())

        function = torch.compile(program, fullgraph=True)
        for round_ in range(3):
            x = own_values(rank.rank + round_, (5, 3), torch.bfloat16)
            before = x.clone()
            first, second = function(x)
            assert torch.equal(x, before)
            assert torch.equal(first, communicator.all_reduce(x))
            assert torch.equal(second, communicator.all_reduce(first.t()))


class StandIn(peer_group_workers.StandIn):
    """The operators, as a communicator asks for them."""

    def __init__(self, rank: Rank, failing: str | None = None) -> None:
        super().__init__(rank, failing)
        self.live: dict[int, set[int]] = {}  # and the peers' buffers that each unmaps
        self._next_fa = itertools.count(7)

    def _buffer_size(self, world_size: int, max_size: int) -> int:
        return torch.ops.custom_ar._buffer_size(world_size, max_size)

    def allocate_shared_buffer_and_handle(self, size: int) -> tuple[int, Tensor]:
        self.enter("allocate_shared_buffer_and_handle")
        return self.allocate()

    def open_mem_handle(self, mem_handle: Tensor) -> int:
        self.enter("open_mem_handle")
        return self.open(mem_handle)

    def init_custom_ar(self, addresses: list[int], rank_data: Tensor, rank: int, full: bool) -> int:
        self.enter("init_custom_ar")
        assert rank == self.rank.rank
        assert len(addresses) == self.rank.world_size
        assert set(addresses) <= self.own | self.opened
        assert addresses[rank] in self.own
        fa = next(self._next_fa)
        self.live[fa] = set(addresses) - self.own
        assert len(self.live[fa]) == len(addresses) - 1
        return fa

    def _keep_mappings(self, fa: int) -> None:
        self.enter("_keep_mappings")
        self.live[fa].clear()

    def _set_timeout(self, fa: int, seconds: float) -> None:
        assert fa in self.live
        self.timeouts.append(seconds)

    def _set_max_blocks(self, fa: int, max_blocks: int) -> None:
        assert fa in self.live
        assert max_blocks >= 1

    def _all_reduce_as(self, fa: int, inp: Tensor, out: Tensor, algorithm: int, *_: int) -> None:
        assert fa in self.live
        self.calls.append(f"algorithm {algorithm}")
        out.copy_(inp)
        dist.all_reduce(out, group=self.rank.group)
        if self.failing == "writes":
            out.copy_(inp)

    def all_reduce(self, fa: int, inp: Tensor, out: Tensor, buffer: int, size: int) -> None:
        assert fa in self.live
        assert inp.stride() == out.stride()
        assert (buffer, size) == (0, 0)
        self.calls.append("all_reduce")
        total = inp.contiguous().clone()
        dist.all_reduce(total, group=self.rank.group)
        out.copy_(total)

    def try_all_reduce(self, fa: int, inp: Tensor, out: Tensor, max_size: int) -> bool:
        is_dense = inp.is_contiguous() or module._is_dense(inp)
        if not (is_dense and inp.dtype in module.DTYPES and 0 < inp.nbytes <= max_size):
            return False
        self.all_reduce(fa, inp, out, 0, 0)
        return True

    def try_all_reduce_new(self, fa: int, inp: Tensor, max_size: int) -> Tensor | None:
        out = torch.empty_like(inp)
        return out if self.try_all_reduce(fa, inp, out, max_size) else None

    def _check(self, fa: int) -> None:
        self.enter("_check")
        assert fa in self.live
        self.check()

    def _missing_ranks(self, fa: int) -> list[int]:
        assert fa in self.live
        return list(self.missing)

    def _announce_close(self, fa: int) -> None:
        self.enter("_announce_close")
        assert fa in self.live

    def _check_unraised(self, fa: int) -> None:
        self.calls.append("_check_unraised")
        assert fa in self.live
        self.check_unraised()

    def dispose(self, fa: int) -> None:
        self.enter("dispose")
        self.opened -= self.live.pop(fa)

    def free_shared_buffer(self, address: int) -> None:
        self.enter("free_shared_buffer")
        self.free(address)

    def holds_nothing(self) -> bool:
        return super().holds_nothing() and not self.live


@contextlib.contextmanager
def stand_in(rank: Rank, failing: str | None = None) -> Iterator[StandIn]:
    """Lets communicators of CPU tensors take the way that those of CUDA tensors take."""
    ops = StandIn(rank, failing)
    functions = {
        "_try_all_reduce": ops.try_all_reduce,
        "_try_all_reduce_new": ops.try_all_reduce_new,
    }
    with operators_replaced(module, ops, **functions):
        yield ops


class Kind(peer_group_workers.Kind):
    owner = custom_ar.Communicator
    module = module
    timeout_variable = "CUSTOM_AR_TIMEOUT"
    free = "free_shared_buffer"
    fallback = staticmethod(fallback)
    default_group = staticmethod(default_group)
    call = staticmethod(custom_ar.Communicator.all_reduce)
    stand_in = staticmethod(stand_in)


def failing_step(
    rank: Rank, failing: str, failing_rank: int
) -> tuple[str | None, list[tuple[str, str]]]:
    """Setting up fails on one rank: all fall back, and nothing is left allocated."""
    with stand_in(rank, failing if rank.rank == failing_rank else None) as ops, logged() as lines:
        communicator = custom_ar.Communicator(rank.group, rank.device, timeout=3)
        assert ops.holds_nothing()
        assert not communicator.supports(torch.ones(3))
        with communicator:
            check_calls(rank, communicator, torch.float32)
        check_closed(communicator)
        assert "all_reduce" not in ops.calls
    return communicator.fallback_reason, lines


def kernels(rank: Rank) -> list[tuple[str, str]]:
    """Which calls the kernels get, in which layout, and what is logged of the others."""
    with stand_in(rank) as ops, logged() as lines:
        communicator = custom_ar.Communicator(rank.group, rank.device, max_size=400, timeout=3)
        assert communicator.fallback_reason is None
        assert communicator.timeout == 3
        # The last is the one that calls are made with.
        assert ops.timeouts == [10.0, 3]
        assert [c for c in ops.calls if c.startswith("algorithm")] == [
            "algorithm 0",
            "algorithm 0",
            "algorithm 1",
            "algorithm 1",
        ]
        assert lines == []

        def calls_of(function: Callable[[], object]) -> int:
            before = ops.calls.count("all_reduce")
            function()
            return ops.calls.count("all_reduce") - before

        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            check_calls(rank, communicator, dtype)
            for name, x in layouts(own_values(rank.rank, (5, 7), dtype)).items():
                is_dense = name not in ("spaced", "expanded")
                assert communicator.supports(x) == is_dense, name
                assert calls_of(lambda x=x: communicator.all_reduce(x)) == 1, name
        assert not communicator.supports(torch.empty(0))
        assert calls_of(lambda: communicator.all_reduce(torch.empty(0))) == 0
        assert communicator.supports(torch.ones(100))
        assert lines == []

        large = own_values(rank.rank, (101,), torch.float32)
        double = own_values(rank.rank, (3,), torch.float64)
        total = sum(own_values(r, (101,), torch.float32) for r in range(rank.world_size))
        for _ in range(2):
            for x in (large, double):
                assert not communicator.supports(x)
                assert calls_of(lambda x=x: communicator.all_reduce(x)) == 0
        assert torch.equal(communicator.all_reduce(large), total)
        assert calls_of(lambda: check_calls(rank, communicator, torch.int64)) == 0

        communicator.check()
        ops.failure = "a call has failed"
        # Not through torch.distributed either, which would wait for who is missing.
        x = torch.ones(3, dtype=torch.int32)
        error = error_of(lambda: communicator.all_reduce(x))
        assert error == ("RuntimeError", "a call has failed")
        assert error_of(communicator.check) == ("RuntimeError", "a call has failed")
        ops.failure = None

        log = list(lines)
        peer_group_workers.closed(rank, communicator)
        assert ops.holds_nothing()
        order = ["_announce_close", "_check_unraised", "dispose"]
        order += ["free_shared_buffer"] * rank.world_size
        assert [call for call in ops.calls if call in order] == order
        assert lines == log
        check_closed(communicator)
    return log


def out_of_memory(rank: Rank) -> list[tuple[str, str]]:
    """What is raised where the operators raise that memory is lacking, and something else."""
    errors = []
    with stand_in(rank) as ops:
        communicator = custom_ar.Communicator(rank.group, rank.device)
        for text in ("cannot allocate the result, 12 bytes on cuda:0", "something else"):
            error = RuntimeError(f"custom_ar::all_reduce: {text}")
            with mock.patch.object(module, "_try_all_reduce_new", side_effect=error):
                errors.append(error_of(communicator.all_reduce, torch.ones(3)))
        peer_group_workers.closed(rank, communicator)
        assert ops.holds_nothing()
    return errors


def forgotten(rank: Rank) -> list[str]:
    """A communicator that is dropped says so, waits for nothing and leaves its memory alone."""
    with stand_in(rank) as ops:
        kept = [custom_ar.Communicator(rank.group, rank.device, timeout=60)]
        begin = time.monotonic()
        texts = resource_warnings(kept.clear)
        assert time.monotonic() - begin < 5
        assert ops.own
        assert ops.live
    kept = [custom_ar.Communicator(rank.group, rank.device)]
    arguments = (torch.ones(1), kept[0]._order, kept[0]._id)
    assert resource_warnings(kept.clear) == []
    kind, text = error_of(torch.ops.custom_ar.functional_all_reduce, *arguments)
    assert kind == "RuntimeError"
    assert text.startswith("custom_ar::functional_all_reduce: communicator must be the id of")
    return texts
