"""The operators as torch sees them: schemas, dispatch keys, fakes, CPU kernels and tracing."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

import minimax_rms
import pytest
import torch
import torch.distributed as dist
from functorch.compile import make_boxed_func
from minimax_arithmetic import DTYPES, assert_rounded, exact, random_rows, random_weight
from minimax_rms import ops
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

# Those of vLLM, but that the workspace is written, so that no compiler drops or reorders calls.
SCHEMAS = {
    "minimax_allreduce_rms": (
        "(Tensor input, Tensor norm_weight, Tensor(a!) workspace, int rank, int nranks, "
        "float eps) -> Tensor"
    ),
    "minimax_allreduce_rms_qk": (
        "(Tensor qkv, Tensor norm_weight_q, Tensor norm_weight_k, Tensor(a!) workspace, "
        "int q_size, int kv_size, int rank, int nranks, float eps) -> (Tensor, Tensor)"
    ),
}
FUNCTIONAL = {
    "functional_allreduce_rms": (
        "(Tensor x, Tensor weight, float eps, Tensor(a!) order, SymInt workspace) -> Tensor"
    ),
    "functional_allreduce_rms_qk": (
        "(Tensor qkv, Tensor weight_q, Tensor weight_k, float eps, Tensor(a!) order, "
        "SymInt workspace) -> (Tensor, Tensor)"
    ),
}
PRIVATE = {
    "_check_minimax_allreduce_rms",
    "_check_minimax_allreduce_rms_qk",
    "_choose_tuning",
    "_comm_size",
    "_max_tokens",
    "_descriptor",
    "_places",
    "_allocate",
    "_open",
    "_free",
    "_register",
    "_set_timeout",
    "_check",
    "_missing_ranks",
    "_forget",
    "_announce_close",
    "_check_unraised",
}
NO_WORKSPACE = torch.empty(0, dtype=torch.int64)


def overload(name: str) -> torch._ops.OpOverload:
    return getattr(torch.ops.minimax_rms, name).default


def dispatch_keys(name: str) -> list[str]:
    return [
        key
        for key in ("CUDA", "CPU", "CompositeExplicitAutograd", "CompositeImplicitAutograd")
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"minimax_rms::{name}", key)
    ]


@pytest.fixture
def alone() -> Iterator[minimax_rms.Workspace]:
    """The workspace of a group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with minimax_rms.Workspace(None, 64, "cpu") as workspace:
        yield workspace
    dist.destroy_process_group()


@pytest.fixture
def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", SCHEMAS)
def test_schema(name: str) -> None:
    assert str(overload(name)._schema) == f"minimax_rms::{name}{SCHEMAS[name]}"
    assert dispatch_keys(name) == ["CUDA", "CPU"]


@pytest.mark.parametrize("name", SCHEMAS)
def test_checks_have_the_arguments_of_the_operator(name: str) -> None:
    arguments = SCHEMAS[name].partition(" -> ")[0].replace("Tensor(a!)", "Tensor")
    schema = str(overload(f"_check_{name}")._schema)
    assert schema == f"minimax_rms::_check_{name}{arguments} -> ()"


@pytest.mark.parametrize("name", sorted(PRIVATE))
def test_dispatch_key(name: str) -> None:
    assert dispatch_keys(name) == ["CompositeExplicitAutograd"]


@pytest.mark.parametrize("name", FUNCTIONAL)
def test_functional_schema(name: str) -> None:
    assert str(overload(name)._schema) == f"minimax_rms::{name}{FUNCTIONAL[name]}"
    assert torch.Tag.pt2_compliant_tag in overload(name).tags


@pytest.mark.parametrize("name", SCHEMAS)
def test_entry_point_has_the_arguments_of_the_schema(name: str) -> None:
    function = getattr(ops, name)
    assert function.__doc__
    expected = [argument.name for argument in overload(name)._schema.arguments]
    assert list(inspect.signature(function).parameters) == expected


def test_package_exports() -> None:
    assert minimax_rms.__version__ == version("minimax-rms")
    assert all(hasattr(minimax_rms, name) for name in minimax_rms.__all__)


@pytest.mark.parametrize("nranks", range(1, 17))
def test_sizes_need_no_device(nranks: int) -> None:
    comm_size, max_tokens = overload("_comm_size"), overload("_max_tokens")
    sizes = [comm_size(nranks, 1 << n) for n in range(20)]
    assert sizes == sorted(sizes)
    for num_tokens in (1, 2, 100, 1000, 8192, 1 << 20):
        size = comm_size(nranks, num_tokens)
        assert size % 8 == 0
        assert max_tokens(nranks, size) >= num_tokens
        # What existing callers reckon with.
        assert size >= 8 * nranks * num_tokens
        assert max_tokens(nranks, size) * 8 * nranks <= size
        large = max(8 * nranks * num_tokens, 4096)
        assert max_tokens(nranks, large) >= num_tokens
    assert max_tokens(nranks, 0) == 0
    # What ranks tell each other has no room for more.
    most = 2**24 - 1
    assert max_tokens(nranks, comm_size(nranks, most)) == most
    assert max_tokens(nranks, 2**47) == most


def test_what_ranks_tell_each_other_of_a_call() -> None:
    """The tokens, whether there is a k, and 12 bits of what else must be the same."""
    descriptor = overload("_descriptor")
    calls = [
        (q * row_bytes, k * row_bytes, element_type, eps)
        for row_bytes in (16, 1024, 4096, 7168)
        for q in (1, 2, 6)
        for k in (0, 1, 2)
        for element_type in range(3)
        for eps in (0.0, 1e-6, 1e-5)
    ]
    for has_k in (False, True):
        hashes = set()
        for call in calls:
            all_bits = [descriptor(tokens, *call, has_k) for tokens in (0, 1, 2**24 - 1)]
            assert [bits & 0xFFFFFF for bits in all_bits] == [0, 1, 2**24 - 1]
            assert {bits >> 36 for bits in all_bits} == {int(has_k)}
            [own] = {bits >> 24 & 0xFFF for bits in all_bits}
            hashes.add(own)
        # As many as 4096 random numbers would leave, and some fewer.
        different = len(set(calls))
        assert len(hashes) > 0.9 * 4096 * (1 - (1 - 1 / 4096) ** different)
    base = (7168, 1024, 2, 1e-6)
    for index, value in enumerate((7184, 1040, 1, 1e-5)):
        other = (*base[:index], value, *base[index + 1 :])
        assert descriptor(5, *other, True) != descriptor(5, *base, True)


def divide_up(dividend: int, divisor: int) -> int:
    return -(-dividend // divisor)


@pytest.mark.parametrize("shares_gpu", [False, True])
@pytest.mark.parametrize("nranks", [1, 2, 4, 16])
def test_tuning(nranks: int, shares_gpu: bool) -> None:
    """It is what the explicit operator takes, has work for the GPU, and room where it must."""
    multiprocessors = 132
    room = multiprocessors * (1024 if nranks == 1 else 512)  # threads, of 64 or 128 registers
    full = (3584, 7168, 14336, 16384)  # these rows fill the registers of a team
    for row_bytes in (16, 1024, *full, 1 << 20):
        for num_tokens in (1, 17, 132, 300, 2048, 4096, 4500, 6500, 8192, 1 << 20, (1 << 36) - 1):
            warps, blocks, threads = overload("_choose_tuning")(
                row_bytes, nranks, num_tokens, multiprocessors, shares_gpu
            )
            assert threads <= {1: 512, 2: 128, 4: 128, 8: 256}[warps]
            assert threads % (32 * warps) == 0
            teams_of_a_block = threads // (32 * warps)
            assert 1 <= blocks < 1 << 31
            teams = blocks * teams_of_a_block
            # None without a token, but for those that share a block with others.
            assert teams < num_tokens + teams_of_a_block
            # Each multiprocessor has some of the work, or every third at the least.
            assert 3 * blocks >= min(num_tokens, multiprocessors)
            at_a_time = room // (32 * warps)
            turns = divide_up(num_tokens, teams)
            if num_tokens <= 3 * at_a_time or nranks == 1:
                assert teams >= min(num_tokens, at_a_time)
            else:
                assert turns <= divide_up(num_tokens, at_a_time)
                # As many turns for all, but where teams that share a block were too many.
                assert teams - teams_of_a_block < divide_up(num_tokens, turns)
            if shares_gpu or nranks == 1 or row_bytes not in full:
                assert blocks * threads <= room


def test_tuning_of_many_tokens() -> None:
    """MiniMax-M2's rows on two and on four ranks, with GPUs of their own and without."""
    choose_tuning = overload("_choose_tuning")
    for nranks, row_bytes, warps, threads in ((2, 7168, 2, 128), (4, 3584, 1, 256)):
        for num_tokens in (6500, 8192, 20_000, 100_000):
            count = num_tokens * nranks // 2
            args = (row_bytes, nranks, count, 132)
            one_wave = choose_tuning(*args, True)
            waves = choose_tuning(*args)
            assert [one_wave[0], one_wave[2]] == [waves[0], waves[2]] == [warps, threads]
            assert one_wave[1] * threads <= 132 * 512 < waves[1] * threads
            assert 3 <= count / (waves[1] * threads // (32 * warps)) <= 5
            # Rows that are not like those.
            assert choose_tuning(row_bytes - 16, *args[1:]) == choose_tuning(
                row_bytes - 16, *args[1:], True
            )


@pytest.mark.parametrize("nranks", range(1, 17))
def test_places_of_tokens(nranks: int) -> None:
    """Each token has a place of its own within the capacity.

    In large calls the next token's is also not of the same group, as many as fit a line.
    """
    places_of = overload("_places")
    group = max(128 // (8 * nranks), 1)
    for max_tokens in (1, 100, 2048, 2049, 3001, 8192, 20_000):
        comm_size = overload("_comm_size")(nranks, max_tokens)
        capacity = overload("_max_tokens")(nranks, comm_size)
        assert capacity >= max_tokens
        for num_tokens in {0, 1, min(2048, capacity), min(2049, capacity), capacity - 1, capacity}:
            places = places_of(nranks, comm_size, num_tokens)
            assert len(places) == num_tokens
            if num_tokens <= 2048:
                assert places == list(range(num_tokens))
                continue
            assert len(set(places)) == num_tokens
            assert min(places) >= 0
            assert max(places) < capacity
            # A power of two of groups take tokens in turn, at least half of those that there are.
            groups = 1 << (comm_size // 128).bit_length() - 1
            for token in range(0, min(num_tokens, groups * group) - 1, 7):
                assert places[token] // group != places[token + 1] // group


def test_places_beyond_the_capacity() -> None:
    comm_size = overload("_comm_size")(2, 100)
    capacity = overload("_max_tokens")(2, comm_size)
    allowed = rf"minimax_rms::_places: num_tokens must be in \[0, {capacity}\]"
    for num_tokens in (-1, capacity + 1):
        with pytest.raises(RuntimeError, match=f"^{allowed}, got {num_tokens}$"):
            overload("_places")(2, comm_size, num_tokens)


# Operators of a single rank on the CPU.


def rms_arguments(num_tokens: int, dtype: torch.dtype, generator: torch.Generator) -> tuple:
    return (
        random_rows(num_tokens, 24, dtype, generator),
        random_weight(24, dtype, generator),
        NO_WORKSPACE,
        *(0, 1, 1e-5),
    )


def qk_arguments(
    num_tokens: int, dtype: torch.dtype, generator: torch.Generator, kv_size: int = 8
) -> tuple:
    return (
        random_rows(num_tokens, 24 + 2 * kv_size, dtype, generator),
        random_weight(24, dtype, generator),
        random_weight(kv_size, dtype, generator),
        NO_WORKSPACE,
        *(24, kv_size, 0, 1, 1e-5),
    )


ARGUMENTS: dict[str, Callable[..., tuple]] = {
    "minimax_allreduce_rms": rms_arguments,
    "minimax_allreduce_rms_qk": qk_arguments,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", [0, 1, 7])
def test_single_rank_on_the_cpu(
    generator: torch.Generator, num_tokens: int, dtype: torch.dtype
) -> None:
    x, weight, *rest = rms_arguments(num_tokens, dtype, generator)
    result = ops.minimax_allreduce_rms(x, weight, *rest)
    assert result.dtype == dtype
    assert_rounded(result, exact([x], [weight], 1e-5)[0])

    rows, weight_q, weight_k, *rest = qk_arguments(num_tokens, dtype, generator)
    q, k = ops.minimax_allreduce_rms_qk(rows, weight_q, weight_k, *rest)
    assert q.dtype == k.dtype == dtype
    assert_rounded(q, exact([rows[:, :24]], [weight_q], 1e-5)[0])
    assert_rounded(k, exact([rows[:, 24:32]], [weight_k], 1e-5)[0])


def test_no_k(generator: torch.Generator) -> None:
    arguments = qk_arguments(3, torch.float32, generator, kv_size=0)
    q, k = ops.minimax_allreduce_rms_qk(*arguments)
    assert (q.shape, k.shape) == ((3, 24), (3, 0))


@pytest.mark.parametrize("num_tokens", [0, 1, 7])
@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(
    generator: torch.Generator, name: str, num_tokens: int, dtype: torch.dtype
) -> None:
    """Schema, fake and tracing agree with the CPU kernel."""
    torch.library.opcheck(overload(name), ARGUMENTS[name](num_tokens, dtype, generator))


def test_opcheck_of_strided_rows(generator: torch.Generator) -> None:
    _, *rest = rms_arguments(5, torch.bfloat16, generator)
    x = random_rows(10, 64, torch.bfloat16, generator)[::2, 8:32]
    torch.library.opcheck(overload("minimax_allreduce_rms"), (x, *rest))


@pytest.mark.parametrize("name", ARGUMENTS)
def test_no_gradient_is_recorded(generator: torch.Generator, name: str) -> None:
    arguments = ARGUMENTS[name](3, torch.float32, generator)
    for value in arguments[:2]:
        value.requires_grad_()
    results = overload(name)(*arguments)
    for result in [results] if isinstance(results, Tensor) else results:
        assert not result.requires_grad
    torch.library.opcheck(overload(name), arguments)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_raw_call_compiles_to_a_full_graph(generator: torch.Generator, name: str) -> None:
    """One for all numbers of tokens."""
    torch.compiler.reset()

    def program(x: Tensor, *args: Any) -> Any:
        return overload(name)(x * 2, *args)

    function = torch.compile(program, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for num_tokens in (5, 9, 23):
            arguments = ARGUMENTS[name](num_tokens, torch.float32, generator)
            torch.testing.assert_close(function(*arguments), program(*arguments), rtol=0, atol=0)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_raw_calls_that_are_compiled_keep_their_order(
    generator: torch.Generator, name: str
) -> None:
    """Also those whose results are not used. By number of tokens, as no peer would see them."""
    torch.compiler.reset()
    traced: list[list[int]] = []

    def note(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        calls = [
            node
            for node in graph.graph.nodes
            if node.target is overload(name) or overload(name) in node.args
        ]
        rows = [{**node.kwargs, **dict(enumerate(node.args))} for node in calls]
        values = [
            next(v for v in row.values() if isinstance(v, torch.fx.Node)).meta["val"]
            for row in rows
        ]
        traced.append([value.shape[0] for value in values])
        return make_boxed_func(graph.forward)

    first, second, third = (ARGUMENTS[name](n, torch.float32, generator) for n in (3, 4, 5))
    rest = first[1:]

    def program(x: Tensor, y: Tensor, z: Tensor) -> Any:
        a = overload(name)(x, *rest)
        overload(name)(y, *rest)
        b = overload(name)(z, *rest)
        return b, a

    torch.compile(program, fullgraph=True, backend=aot_autograd(fw_compiler=note))(
        first[0], second[0], third[0]
    )
    assert traced == [[3, 4, 5]]


def test_fakes() -> None:
    """On any device, with any number of tokens."""
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        symbol = mode.shape_env.create_unbacked_symint()
        for num_tokens in (0, 5, symbol):
            qkv = torch.empty(num_tokens, 40, device="cuda", dtype=torch.float16)
            x = torch.empty(num_tokens, 24, device="cuda", dtype=torch.float16)
            weight_q, weight_k, w = (torch.empty(n, device="cuda") for n in (24, 8, 8))
            workspace = torch.empty(14, device="cuda", dtype=torch.int64)
            order = torch.empty(1, device="cuda", dtype=torch.uint8)
            results = [
                ops.minimax_allreduce_rms(x, weight_q, workspace, 1, 4, 1e-6),
                *ops.minimax_allreduce_rms_qk(
                    qkv, weight_q, weight_k, workspace, 24, 8, 1, 4, 1e-6
                ),
                *overload("_minimax_allreduce_rms_qk_as")(
                    qkv, weight_q, weight_k, workspace, 24, 8, 1, 4, 1e-6, 1, 1, 32
                ),
                overload("functional_allreduce_rms")(x, weight_q, 1e-6, order, 1),
                *overload("functional_allreduce_rms_qk")(qkv, weight_q, w, 1e-6, order, 1),
            ]
            widths = [24, 24, 8, 24, 8, 24, 24, 8]
            for result, width in zip(results, widths, strict=True):
                assert result.dtype == torch.float16
                assert result.device.type == "cuda"
                assert result.stride() == (width, 1)
                assert result.shape[1] == width
                assert result.shape[0] is num_tokens or result.shape[0] == num_tokens
        assert overload("_check_minimax_allreduce_rms")(x, weight_q, workspace, 1, 4, 1e-6) is None


def setting_up() -> dict[str, Callable[[], Any]]:
    def workspace() -> Tensor:
        return torch.empty(8, dtype=torch.int64)

    return {
        "_allocate": lambda: overload("_allocate")(64),
        "_open": lambda: overload("_open")(torch.empty(64, dtype=torch.uint8)),
        "_free": lambda: overload("_free")(16),
        "_register": lambda: overload("_register")(workspace(), 0, 2, 8, 132, 1.0),
        "_set_timeout": lambda: overload("_set_timeout")(workspace(), 1.0),
        "_check": lambda: overload("_check")(workspace()),
        "_missing_ranks": lambda: overload("_missing_ranks")(workspace()),
        "_forget": lambda: overload("_forget")(workspace()),
        "_announce_close": lambda: overload("_announce_close")([16, 32], 0),
        "_check_unraised": lambda: overload("_check_unraised")(workspace()),
    }


@pytest.mark.parametrize("name", setting_up())
def test_setting_up_cannot_be_traced(name: str) -> None:
    message = rf"^minimax_rms::{name}: cannot be traced; call it outside of torch\.compile$"
    with FakeTensorMode(), pytest.raises(RuntimeError, match=message):
        setting_up()[name]()


@pytest.mark.parametrize("num_tokens", [0, 1, 7])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_functional_opcheck(
    alone: minimax_rms.Workspace, generator: torch.Generator, dtype: torch.dtype, num_tokens: int
) -> None:
    qkv = random_rows(num_tokens, 40, dtype, generator)
    weight_q, weight_k = (random_weight(width, dtype, generator) for width in (24, 8))
    arguments = (qkv[:, :24], weight_q, 1e-6, alone._order, alone._id)
    torch.library.opcheck(overload("functional_allreduce_rms"), arguments)
    arguments = (qkv, weight_q, weight_k, 1e-6, alone._order, alone._id)
    torch.library.opcheck(overload("functional_allreduce_rms_qk"), arguments)
    results = overload("functional_allreduce_rms_qk")(*arguments)
    for result, expected in zip(
        results, alone.allreduce_rms_qk(qkv, weight_q, weight_k), strict=True
    ):
        assert torch.equal(result, expected)


def test_functional_of_an_unknown_workspace() -> None:
    x, w = torch.ones(1, 12), torch.ones(4)
    for name, arguments in (
        ("functional_allreduce_rms", (x, torch.ones(12))),
        ("functional_allreduce_rms_qk", (x, w, w)),
    ):
        message = (
            rf"^minimax_rms::{name}: workspace must be the id of a Workspace that exists, got "
            r"1099511627776$"
        )
        with pytest.raises(RuntimeError, match=message):
            overload(name)(*arguments, 1e-6, torch.zeros(1, dtype=torch.uint8), 2**40)
