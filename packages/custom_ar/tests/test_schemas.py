"""The operators as torch sees them: schemas, dispatch keys, fakes, and tracing."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from importlib.metadata import version

import custom_ar
import pytest
import torch
import torch.distributed as dist
from custom_ar import ops
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from torch._subclasses.fake_tensor import FakeTensorMode

# Those of vLLM.
SCHEMAS = {
    "init_custom_ar": (
        "(int[] ipc_tensors, Tensor rank_data, int rank, bool fully_connected) -> int"
    ),
    "all_reduce": (
        "(int fa, Tensor inp, Tensor(a!) out, int reg_buffer, int reg_buffer_sz_bytes) -> ()"
    ),
    "dispose": "(int fa) -> ()",
    "meta_size": "() -> int",
    "register_buffer": "(int fa, int[] ipc_tensors) -> ()",
    "get_graph_buffer_ipc_meta": "(int fa) -> (int[], int[])",
    "register_graph_buffers": "(int fa, int[][] handles, int[][] offsets) -> ()",
    "allocate_shared_buffer_and_handle": "(int size) -> (int, Tensor)",
    "open_mem_handle": "(Tensor mem_handle) -> int",
    "free_shared_buffer": "(int ptr) -> ()",
}
DISPATCH_KEYS = {"init_custom_ar": "CUDA", "all_reduce": "CUDA"}
FUNCTIONAL = torch.ops.custom_ar.functional_all_reduce
FUNCTIONAL_OUT = torch.ops.custom_ar.functional_all_reduce_out


def overload(name: str) -> torch._ops.OpOverload:
    return getattr(torch.ops.custom_ar, name).default


@pytest.fixture
def alone() -> Iterator[custom_ar.Communicator]:
    """The communicator of a group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with custom_ar.Communicator(device="cpu") as communicator:
        yield communicator
    dist.destroy_process_group()


@pytest.mark.parametrize("name", SCHEMAS)
def test_schema(name: str) -> None:
    assert str(overload(name)._schema) == f"custom_ar::{name}{SCHEMAS[name]}"


@pytest.mark.parametrize("name", SCHEMAS)
def test_dispatch_key(name: str) -> None:
    expected = DISPATCH_KEYS.get(name, "CompositeExplicitAutograd")
    found = [
        key
        for key in ("CUDA", "CPU", "CompositeExplicitAutograd", "CompositeImplicitAutograd")
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"custom_ar::{name}", key)
    ]
    assert found == [expected]


@pytest.mark.parametrize("name", SCHEMAS)
def test_entry_point_has_the_arguments_of_the_schema(name: str) -> None:
    function = getattr(ops, name)
    assert function.__doc__
    expected = [argument.name for argument in overload(name)._schema.arguments]
    assert list(inspect.signature(function).parameters) == expected


def test_package_exports() -> None:
    assert custom_ar.__version__ == version("custom-ar")
    assert all(hasattr(custom_ar, name) for name in custom_ar.__all__)


def test_sizes_need_no_device() -> None:
    assert ops.meta_size() > 0
    for world_size in range(2, 9):
        sizes = [torch.ops.custom_ar._buffer_size(world_size, 1 << n) for n in range(26)]
        assert sizes == sorted(sizes)
        assert sizes[-1] >= 2 * 2**25, "two calls are under way at once"
        # That a caller of meta_size() may allocate for messages of up to 8 MiB.
        assert torch.ops.custom_ar._buffer_size(world_size, 8 << 20) <= ops.meta_size() + (8 << 20)


def test_fakes_of_calls() -> None:
    """Traced calls write to their output and return nothing."""
    with FakeTensorMode():
        inp, out = torch.ones(4, device="cuda"), torch.empty(4, device="cuda")
        assert ops.all_reduce(1, inp, out, 0, 0) is None
        torch.ops.custom_ar._all_reduce_as(1, inp, out, 0, 1, 64, 1)
        assert ops.meta_size() > 0


@pytest.fixture
def cpu_kernel() -> Iterator[None]:
    """A kernel for CPU tensors, of a rank that is alone, so that the calls can be checked."""
    library = torch.library.Library("custom_ar", "IMPL")

    def call(fa: int, inp: Tensor, out: Tensor, *args: int) -> None:
        out.copy_(inp.detach())

    def try_call(fa: int, inp: Tensor, out: Tensor, max_size: int) -> bool:
        out.copy_(inp.detach())
        return True

    for name in ("all_reduce", "_all_reduce_as"):
        library.impl(name, call, "CPU")
    library.impl("_try_all_reduce", try_call, "CPU")
    library.impl("_try_all_reduce_new", lambda fa, inp, max_size: inp.detach().clone(), "CPU")
    yield
    library._destroy()


@pytest.mark.usefixtures("cpu_kernel")
@pytest.mark.parametrize("shape", [(5,), (3, 4), (0,)], ids=str)
def test_opcheck(shape: tuple[int, ...]) -> None:
    """Schema, fake and tracing agree with a kernel that writes its output and nothing else."""
    arguments = (1, torch.randn(shape), torch.randn(shape))
    torch.library.opcheck(overload("all_reduce"), (*arguments, 0, 0))
    torch.library.opcheck(overload("_all_reduce_as"), (*arguments, 0, 1, 64, 1))


@pytest.mark.usefixtures("cpu_kernel")
def test_no_gradient_is_recorded() -> None:
    x = torch.randn(5, requires_grad=True)
    for name, rest in (("all_reduce", (0, 0)), ("_all_reduce_as", (0, 1, 64, 1))):
        out = torch.empty(5)
        overload(name)(1, x, out, *rest)
        assert not out.requires_grad
        assert torch.equal(out, x)
    out = torch.empty(5)
    assert overload("_try_all_reduce")(1, x, out, 100)
    assert not out.requires_grad
    assert not overload("_try_all_reduce_new")(1, x, 100).requires_grad


@pytest.mark.usefixtures("cpu_kernel")
def test_raw_call_compiles_to_a_full_graph() -> None:
    torch.compiler.reset()

    def program(x: Tensor, out: Tensor) -> Tensor:
        ops.all_reduce(1, x * 2, out, 0, 0)
        return out + 1

    x, out = torch.randn(5), torch.zeros(5)
    result = torch.compile(program, fullgraph=True, backend="aot_eager")(x, out)
    assert torch.equal(out, x * 2)
    assert torch.equal(result, x * 2 + 1)


SETUP = {
    "init_custom_ar": lambda: ops.init_custom_ar([16, 32], torch.empty(1), 0, True),
    "dispose": lambda: ops.dispose(1),
    "register_buffer": lambda: ops.register_buffer(1, [16, 32]),
    "get_graph_buffer_ipc_meta": lambda: ops.get_graph_buffer_ipc_meta(1),
    "register_graph_buffers": lambda: ops.register_graph_buffers(1, [[]], [[]]),
    "allocate_shared_buffer_and_handle": lambda: ops.allocate_shared_buffer_and_handle(64),
    "open_mem_handle": lambda: ops.open_mem_handle(torch.empty(64, dtype=torch.uint8)),
    "free_shared_buffer": lambda: ops.free_shared_buffer(16),
}


@pytest.mark.parametrize("name", SETUP)
def test_setting_up_cannot_be_traced(name: str) -> None:
    message = rf"^custom_ar::{name}: cannot be traced; call it outside of torch\.compile$"
    with FakeTensorMode(), pytest.raises(RuntimeError, match=message):
        SETUP[name]()


def test_functional_schema() -> None:
    """The order is written: no compiler drops a call, or makes two in another order."""
    arguments = "(Tensor input, Tensor(a!) order, SymInt communicator"
    for op, schema in (
        (FUNCTIONAL, f"functional_all_reduce{arguments}) -> Tensor"),
        (FUNCTIONAL_OUT, f"functional_all_reduce_out{arguments}, Tensor(b!) out) -> ()"),
    ):
        assert str(op.default._schema) == f"custom_ar::{schema}"
        assert torch.Tag.pt2_compliant_tag in op.default.tags


LAYOUTS = {
    "contiguous": lambda: torch.randn(3, 4),
    "transposed": lambda: torch.randn(3, 4).t(),
    "channels_last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "spaced": lambda: torch.randn(3, 8)[:, ::2],
    "expanded": lambda: torch.randn(1, 4).expand(3, 4),
    "empty": lambda: torch.randn(0, 4),
    "scalar": lambda: torch.randn(()),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64], ids=str)
def test_functional_opcheck(alone: custom_ar.Communicator, layout: str, dtype: torch.dtype) -> None:
    x = LAYOUTS[layout]()
    # To keep the strides, of which to() may make others.
    x = (
        torch.empty_strided(x.shape, x.stride(), dtype=dtype).copy_(x)
        if layout != "expanded"
        else x
    )
    torch.library.opcheck(FUNCTIONAL.default, (x, alone._order, alone._id))
    assert torch.equal(FUNCTIONAL(x, alone._order, alone._id), x)
    out = torch.empty_like(x)
    torch.library.opcheck(FUNCTIONAL_OUT.default, (x, alone._order, alone._id, out))
    FUNCTIONAL_OUT(x, alone._order, alone._id, out)
    assert torch.equal(out, x)


def test_compiled_calls_copy_nothing(alone: custom_ar.Communicator) -> None:
    torch.compiler.reset()

    def program(x: Tensor, out: Tensor) -> Tensor:
        alone.all_reduce(x, out=out)
        alone.all_reduce(x, out=x)
        return alone.all_reduce(alone.all_reduce(x))

    with torch._inductor.config.patch(force_disable_caches=True):
        compiled = torch.compile(program, fullgraph=True)
        _, [code] = run_and_get_code(compiled, torch.randn(5), torch.zeros(5))
    assert code.count("= torch.ops.custom_ar.functional_all_reduce.default(") == 2
    assert code.count("torch.ops.custom_ar.functional_all_reduce_out.default(") == 2
    body = code[code.index("def call(") :]
    assert not re.search(r"empty_strided_cpu\(|\.copy_\(|clone|cpp_fused", body)


def test_functional_meta() -> None:
    order = torch.empty(1, device="meta", dtype=torch.uint8)
    result = FUNCTIONAL(torch.empty(3, 4, device="meta", dtype=torch.float16), order, 1)
    assert (result.shape, result.dtype, result.device.type) == ((3, 4), torch.float16, "meta")


def test_functional_of_an_unknown_communicator() -> None:
    message = (
        r"^custom_ar::functional_all_reduce: communicator must be the id of a Communicator that "
        r"exists, got 1099511627776$"
    )
    with pytest.raises(RuntimeError, match=message):
        FUNCTIONAL(torch.ones(3), torch.zeros(1, dtype=torch.uint8), 2**40)
