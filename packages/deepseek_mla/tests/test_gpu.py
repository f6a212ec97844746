"""Every operator on CUDA against the reference, to the bit, and in the ways a server calls it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import deepseek_mla
import mla_calls
import mla_smoke
import pytest
import torch
from deepseek_mla import reference
from mla_calls import Call, make_call
from torch_defaults import GPU_DEFAULTS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

TOKENS = (0, 1, 2, 3, 16, 17, 127, 128, 1000)
HEADS = (1, 3, 8, 16, 64, 128)

# Every operator, cache format and flag once, at a size that has a partial block of each kind.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "quant_insert": (mla_calls.QUANT_INSERT, {}),
    "padded": (mla_calls.QUANT_INSERT, {"num_heads": 16, "q_head_padded": 64}),
    "padded_oddly": (mla_calls.QUANT_INSERT, {"num_heads": 5, "q_head_padded": 7, "gaps": True}),
    "rank3": (mla_calls.QUANT_INSERT, {"cache_rank": 3, "block_padding": 64}),
    "block_size_1": (mla_calls.QUANT_INSERT, {"block_size": 1}),
    "block_size_3": (mla_calls.QUANT_INSERT, {"block_size": 3, "block_padding": 8}),
    "block_size_256": (mla_calls.QUANT_INSERT, {"block_size": 256, "block_padding": 512}),
    "v41": (mla_calls.QUANT_INSERT, {"kind": "v41"}),
    "v41_block_size_3": (mla_calls.QUANT_INSERT, {"kind": "v41", "block_size": 3}),
    "interleaved": (mla_calls.QUANT_INSERT, {"is_q_interleaved": True}),
    "interleaved_padded": (
        mla_calls.QUANT_INSERT,
        {"is_q_interleaved": True, "num_heads": 5, "q_head_padded": 16},
    ),
    "no_norm": (mla_calls.QUANT_INSERT, {"apply_q_norm": False}),
    "no_rope": (mla_calls.QUANT_INSERT, {"apply_q_rope": False}),
    "neither": (mla_calls.QUANT_INSERT, {"apply_q_norm": False, "apply_q_rope": False}),
    "kv_alone": (mla_calls.QUANT_INSERT, {"q_head_padded": 0}),
    "int32_positions": (mla_calls.QUANT_INSERT, {"position_dtype": torch.int32}),
    "fewer_slots": (mla_calls.QUANT_INSERT, {"slots_missing": 7}),
    "no_slots": (mla_calls.QUANT_INSERT, {"slots_missing": 77}),
    "out": (mla_calls.QUANT_INSERT, {"with_q_out": True, "q_head_padded": 8, "gaps": True}),
    "kv_rope_v4": (mla_calls.KV_ROPE_INSERT, {"gaps": True, "slots_missing": 3}),
    "kv_rope_v41": (mla_calls.KV_ROPE_INSERT, {"kind": "v41", "block_padding": 48}),
    "kv_rope_bf16": (mla_calls.KV_ROPE_INSERT, {"kind": "bf16", "block_padding": 64}),
    "kv_rope_fp8": (mla_calls.KV_ROPE_INSERT, {"kind": "fp8", "block_padding": 64}),
    "kv_norm": (mla_calls.KV_NORM_INSERT, {"gaps": True}),
    "kv_norm_float_weight": (mla_calls.KV_NORM_INSERT, {"weight_dtype": torch.float32}),
    "full_bf16": (mla_calls.FULL_BF16_INSERT, {"num_heads": 16}),
    "full_bf16_gaps": (mla_calls.FULL_BF16_INSERT, {"gaps": True, "block_padding": 64}),
    "full_bf16_no_norm": (mla_calls.FULL_BF16_INSERT, {"apply_q_norm": False}),
    "full_fp8": (mla_calls.FULL_FP8_INSERT, {"num_heads": 16}),
    "full_fp8_gaps": (mla_calls.FULL_FP8_INSERT, {"gaps": True, "position_dtype": torch.int32}),
    "full_fp8_no_norm": (mla_calls.FULL_FP8_INSERT, {"apply_q_norm": False}),
}


@pytest.fixture
def generator(seed: int) -> torch.Generator:
    return torch.Generator("cuda").manual_seed(seed)


def check(call: Call) -> None:
    expected = call.reference_of()
    mla_calls.assert_same_bits(call.run(deepseek_mla), expected)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", GPU_DEFAULTS)
def test_defaults_of_the_process(name: str, device: str) -> None:
    current = torch.device(device, torch.cuda.current_device() if device == "cuda" else None)
    mla_smoke.check_under(GPU_DEFAULTS[name], current)


@pytest.mark.parametrize("dtype", mla_calls.DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_reference(generator: torch.Generator, variant: str, dtype: torch.dtype) -> None:
    op, options = VARIANTS[variant]
    check(make_call(op, generator, **{"num_tokens": 77, "dtype": dtype, **options}))


@pytest.mark.parametrize("op", mla_calls.OPS)
@pytest.mark.parametrize("num_tokens", TOKENS)
def test_batch_sizes(generator: torch.Generator, num_tokens: int, op: str) -> None:
    check(make_call(op, generator, num_tokens=num_tokens, num_heads=8))


@pytest.mark.parametrize("num_tokens", TOKENS)
@pytest.mark.parametrize("num_heads", HEADS)
def test_batch_sizes_by_heads(generator: torch.Generator, num_heads: int, num_tokens: int) -> None:
    check(make_call(mla_calls.QUANT_INSERT, generator, num_tokens=num_tokens, num_heads=num_heads))


@pytest.mark.parametrize("dtype", mla_calls.DTYPES, ids=str)
@pytest.mark.parametrize(("variant", "rows_per_multiprocessor"), mla_calls.TUNED_CALLS)
def test_every_tuning(
    generator: torch.Generator, variant: str, rows_per_multiprocessor: int, dtype: torch.dtype
) -> None:
    check(mla_calls.make_tuned_call(variant, rows_per_multiprocessor, generator, dtype))


@pytest.mark.parametrize("op", mla_calls.Q_OPS)
@pytest.mark.parametrize("num_heads", HEADS)
def test_heads(generator: torch.Generator, num_heads: int, op: str) -> None:
    check(make_call(op, generator, num_tokens=33, num_heads=num_heads))


@pytest.mark.parametrize("kind", ["bf16", "fp16"])
@pytest.mark.parametrize("op", [mla_calls.KV_ROPE_INSERT, mla_calls.FULL_BF16_INSERT])
def test_float16_rows_in_16_bit_caches(generator: torch.Generator, op: str, kind: str) -> None:
    check(make_call(op, generator, dtype=torch.float16, kind=kind))


@pytest.mark.parametrize("variant", VARIANTS)
def test_reference_is_the_same_on_both_devices(generator: torch.Generator, variant: str) -> None:
    op, options = VARIANTS[variant]
    call = make_call(op, generator, **{"num_tokens": 77, **options})
    on_cpu = call.clone("cpu").run(reference)
    mla_calls.assert_same_bits(call.run(reference), on_cpu)


@pytest.mark.parametrize("dtype", mla_calls.DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_adversarial_rows(generator: torch.Generator, variant: str, dtype: torch.dtype) -> None:
    op, options = VARIANTS[variant]
    rows = mla_calls.adversarial_rows(dtype, "cuda")
    options = {"dtype": dtype, **options, "num_tokens": 2 * len(rows)}
    call = make_call(op, generator, **options)
    call.args["kv"][::2] = rows
    for name in ("q_in", "q"):
        if name in call.args:
            call.args[name][::2] = rows[:, None]
    check(call)


def test_any_bits(generator: torch.Generator) -> None:
    """Uniformly random 16-bit patterns: every exponent, many NaNs and infinities."""
    for op in mla_calls.OPS:
        for dtype in mla_calls.DTYPES:
            call = make_call(op, generator, num_tokens=512, num_heads=4, dtype=dtype)
            for name in {"q_in", "q", "kv"} & call.args.keys():
                mla_calls.whole_storage(call.args[name]).random_(generator=generator)
            check(call)


@pytest.mark.parametrize("op", mla_calls.OPS)
def test_nan_tokens_do_not_change_others(generator: torch.Generator, op: str) -> None:
    clean = make_call(op, generator, num_tokens=64, num_heads=8, block_size=16)
    clean.args["slot_mapping"].copy_(torch.randperm(96, generator=generator, device="cuda")[:64])
    clean.args["position_ids"].fill_(5)
    dirty = clean.clone()
    bad = torch.zeros(64, dtype=torch.bool, device="cuda")
    bad[::3] = True
    for name in {"q_in", "q", "kv"} & dirty.args.keys():
        dirty.args[name][bad] = (
            torch.tensor([torch.nan, torch.inf], device="cuda").repeat(256).to(torch.bfloat16)
        )
    good_slots = clean.args["slot_mapping"][~bad]
    for side in (clean, dirty):
        side.run(deepseek_mla)
    tokens = [
        deepseek_mla.dequantize_cache(side.args["k_cache"], good_slots, 16)
        for side in (clean, dirty)
    ]
    assert torch.equal(*tokens)
    for name in ("q", "q_fp8"):
        if name in clean.args:
            sides = [side.args[name][~bad].view(torch.uint8) for side in (clean, dirty)]
            assert torch.equal(*sides)
    if clean.result is not None and dirty.result is not None:
        assert torch.equal(clean.result[~bad], dirty.result[~bad])


@pytest.mark.parametrize("dtype", mla_calls.DTYPES, ids=str)
def test_q_is_within_one_rounding_of_float64(
    generator: torch.Generator, dtype: torch.dtype
) -> None:
    call = make_call(mla_calls.QUANT_INSERT, generator, num_tokens=200, num_heads=64, dtype=dtype)
    call.args["position_ids"].clamp_(0, 63)
    result = call.run(deepseek_mla).result
    assert result is not None
    x = call.args["q_in"].double()
    x = x / torch.sqrt(x.square().mean(-1, keepdim=True) + call.args["eps"])
    table = call.args["cos_sin_cache"].double()[call.args["position_ids"]].unsqueeze(1)
    cos, sin = table[..., :32], table[..., 32:]
    even, odd = x[..., 448::2], x[..., 449::2]
    exact = x.clone()
    exact[..., 448::2] = even * cos - odd * sin
    exact[..., 449::2] = even * sin + odd * cos
    # Half a unit in the last place of the result, and what float32 may have lost before it was
    # rounded; in a rotation that is relative to the pair's length.
    info = torch.finfo(dtype)
    magnitude = exact.abs().clamp_min(info.tiny)
    half_unit = torch.exp2(torch.floor(torch.log2(magnitude))) * info.eps / 2
    length = x.abs()
    length[..., 448::2] = length[..., 449::2] = torch.hypot(even, odd)
    assert ((result.double() - exact).abs() <= half_unit + 2**-20 * length).all()


@pytest.mark.parametrize("op", mla_calls.OPS)
def test_row_bits_do_not_depend_on_the_batch(generator: torch.Generator, op: str) -> None:
    batch = make_call(op, generator, num_tokens=1000, num_heads=16)
    batch.args["slot_mapping"].copy_(torch.randperm(1000, generator=generator, device="cuda"))
    batch.args["position_ids"].clamp_(0, 63)
    alone = batch.clone()
    batch.run(deepseek_mla)
    per_token = {"q_in", "q", "kv", "q_fp8", "slot_mapping", "position_ids"} & alone.args.keys()
    for token in (0, 1, 499, 999):
        single = Call(op, dict(alone.args), alone.kv_dtype, alone.kind)
        for name in per_token:
            single.args[name] = alone.args[name][token : token + 1]
        single.run(deepseek_mla)
        for name in {"q", "q_fp8"} & per_token:
            sides = [side.args[name][token].view(torch.uint8) for side in (batch, alone)]
            assert torch.equal(*sides)
        if single.result is not None and batch.result is not None:
            assert torch.equal(
                single.result[0].view(torch.int16), batch.result[token].view(torch.int16)
            )
        slot = alone.args["slot_mapping"][token : token + 1]
        assert torch.equal(
            *(
                deepseek_mla.dequantize_cache(side.args["k_cache"], slot, 16)
                for side in (batch, alone)
            )
        )


@pytest.mark.parametrize("variant", VARIANTS)
def test_cuda_graph(generator: torch.Generator, variant: str) -> None:
    """Replays see the inputs that are there when they run."""
    op, options = VARIANTS[variant]
    options = {"num_tokens": 77, **options}
    call = make_call(op, generator, **options)
    call.clone().run(deepseek_mla)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call.run(deepseek_mla)
    for _ in range(3):
        fresh = make_call(op, generator, **options)
        call.copy_inputs_from(fresh)
        expected = call.reference_of()
        if call.result is not None and "q_out" not in call.args:
            call.result.view(torch.int16).fill_(-1)
        graph.replay()
        mla_calls.assert_same_bits(call, expected)


@pytest.mark.parametrize("op", mla_calls.OPS)
def test_another_stream(generator: torch.Generator, op: str) -> None:
    """The kernel is ordered after what its own stream was given before."""
    call = make_call(op, generator, num_tokens=300, num_heads=16)
    expected = call.reference_of()
    rows = call.args["kv"]
    values = rows.clone()
    rows.zero_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        rows.copy_(values)
        call.run(deepseek_mla)
    stream.synchronize()
    mla_calls.assert_same_bits(call, expected)


def test_current_device_is_left_alone(generator: torch.Generator) -> None:
    before = torch.cuda.current_device()
    make_call(mla_calls.QUANT_INSERT, generator).run(deepseek_mla)
    assert torch.cuda.current_device() == before


def call_on_device(op: str, device: int, seed: int) -> tuple[Call, Call]:
    """A call and its expectation on a device that is current for as long as they are made.

    torch too must find the device of its tensors: what goes wrong in here is no operator's doing.
    """
    with torch.cuda.device(device):
        call = make_call(op, torch.Generator(f"cuda:{device}").manual_seed(seed))
        expected = call.reference_of()
        torch.cuda.synchronize()
    return call, expected


def synchronize_all() -> None:
    """Wait for all devices, and raise what a launch on the wrong one did there."""
    for device in range(torch.cuda.device_count()):
        torch.cuda.synchronize(device)


@pytest.mark.multi_gpu
@pytest.mark.parametrize("op", mla_calls.OPS)
def test_tensors_decide_the_device(seed: int, op: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    call, expected = call_on_device(op, 1, seed)
    with torch.cuda.device(0):
        call.run(deepseek_mla)
        assert torch.cuda.current_device() == 0
    synchronize_all()
    mla_calls.assert_same_bits(call, expected)


@pytest.mark.multi_gpu
@pytest.mark.parametrize("in_thread", [False, True], ids=["main_thread", "fresh_thread"])
@pytest.mark.parametrize("op", mla_calls.OPS)
def test_alternating_devices(seed: int, op: str, in_thread: bool) -> None:
    """Tensors on device 0 and 1 in turn, while torch's current device is the other or the same."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    inputs, expected = zip(*(call_on_device(op, device, seed) for device in range(2)), strict=True)
    steps = [
        (current, device, inputs[device].clone())
        for _ in range(3)
        for current in (0, 1)
        for device in (1, 0)
    ]

    def run_steps() -> None:
        for current, device, call in steps:
            with torch.cuda.device(current):
                call.run(deepseek_mla)
                assert torch.cuda.current_device() == current
                assert call.result is None or call.result.device.index == device

    synchronize_all()
    if in_thread:
        # The first step is then the first that the thread asks of CUDA.
        with ThreadPoolExecutor(max_workers=1) as executor:
            executor.submit(run_steps).result()
    else:
        run_steps()
    synchronize_all()
    for _, device, call in steps:
        mla_calls.assert_same_bits(call, expected[device])


@pytest.mark.parametrize("num_tokens", [1, 128])
def test_out_allocates_nothing(generator: torch.Generator, num_tokens: int) -> None:
    call = make_call(
        mla_calls.QUANT_INSERT, generator, num_tokens=num_tokens, num_heads=64, with_q_out=True
    )
    call.run(deepseek_mla)
    allocations = torch.cuda.memory_stats()["allocation.all.allocated"]
    for _ in range(5):
        call.run(deepseek_mla)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == allocations


def test_result_that_cannot_be_allocated(generator: torch.Generator) -> None:
    call = make_call(mla_calls.QUANT_INSERT, generator, num_heads=16, q_head_padded=4096)
    cache = call.args["k_cache"].clone()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties("cuda").total_memory
    torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total)
    try:
        with pytest.raises(
            torch.OutOfMemoryError,
            match=rf"^deepseek_mla::{mla_calls.QUANT_INSERT}: cannot allocate the result",
        ):
            call.run(deepseek_mla)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert torch.equal(call.args["k_cache"], cache)


@pytest.mark.parametrize("variant", ["padded", "out", "kv_rope_fp8", "kv_norm", "full_fp8"])
def test_compile(generator: torch.Generator, variant: str) -> None:
    torch.compiler.reset()
    op, options = VARIANTS[variant]
    call = make_call(op, generator, **{"num_tokens": 77, **options})
    expected = call.reference_of()
    call.result = torch.compile(getattr(deepseek_mla, op), fullgraph=True)(**call.args)
    mla_calls.assert_same_bits(call, expected)


@pytest.mark.parametrize("num_tokens", [1, 16, 300])
@pytest.mark.parametrize("use_graph", [False, True], ids=["eager", "graph"])
def test_chain_of_dependent_launches(
    generator: torch.Generator, num_tokens: int, use_graph: bool
) -> None:
    """Back to back, each launch reads what the last wrote: a programmatic launch must wait for it.

    Q goes back and forth between two buffers, KV is its first head, and one more operator works in
    place on the last result.
    """
    first = make_call(
        mla_calls.QUANT_INSERT, generator, num_tokens=num_tokens, num_heads=8, with_q_out=True
    )
    first.args["position_ids"].clamp_(0, 63)
    ping, pong = first.args["q_in"], first.args["q_out"]
    whole = mla_calls.make_cache("bf16", num_tokens // 16 + 2, 16, generator)
    shared = ("slot_mapping", "position_ids", "cos_sin_cache", "eps", "cache_block_size")

    def chain(
        implementation: Any, q: torch.Tensor, out: torch.Tensor, caches: list[torch.Tensor]
    ) -> None:
        for _ in range(10):
            args = {**first.args, "q_in": q, "kv": q[:, 0], "q_out": out, "k_cache": caches[0]}
            getattr(implementation, mla_calls.QUANT_INSERT)(**args)
            args = {name: first.args[name] for name in shared}
            args |= {"q": out[:, 1:], "kv": out[:, 0], "k_cache": caches[1]}
            getattr(implementation, mla_calls.FULL_BF16_INSERT)(**args)
            q, out = out, q

    def buffers() -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        caches = [first.args["k_cache"], whole]
        return (
            ping.clone(),
            torch.full_like(pong, torch.nan),
            [mla_calls.clone_with_storage(cache, "cuda") for cache in caches],
        )

    expected = buffers()
    chain(reference, *expected)
    actual, pristine = buffers(), buffers()
    graph = torch.cuda.CUDAGraph() if use_graph else None
    if graph is not None:
        with torch.cuda.graph(graph):
            chain(deepseek_mla, *actual)
    for _ in range(20):
        for target, source in zip(
            (*actual[:2], *actual[2]), (*pristine[:2], *pristine[2]), strict=True
        ):
            target.copy_(source)
        if graph is not None:
            graph.replay()
        else:
            chain(deepseek_mla, *actual)
        for got, want in zip(actual[:2], expected[:2], strict=True):
            assert torch.equal(got.view(torch.int16), want.view(torch.int16))
        for got, want in zip(actual[2], expected[2], strict=True):
            assert torch.equal(mla_calls.whole_storage(got), mla_calls.whole_storage(want))


def device_cases() -> list[tuple[str, str]]:
    generator = torch.Generator().manual_seed(0)
    cases = []
    for op in mla_calls.OPS:
        kind = "fp8" if op == mla_calls.KV_ROPE_INSERT else None
        call = make_call(op, generator, kind=kind, with_q_out=op == mla_calls.QUANT_INSERT)
        tensors = [name for name, value in call.args.items() if isinstance(value, torch.Tensor)]
        cases += [(op, name) for name in tensors if name != "kv"]
    return cases


@pytest.mark.parametrize(("op", "name"), device_cases())
def test_tensor_on_another_device(generator: torch.Generator, op: str, name: str) -> None:
    kind = "fp8" if op == mla_calls.KV_ROPE_INSERT else None
    call = make_call(op, generator, kind=kind, with_q_out=name == "q_out")
    call.args[name] = call.args[name].cpu()
    message = rf"deepseek_mla::{op}: {name} must be on the device of kv, cuda:\d+, got cpu"
    with pytest.raises(RuntimeError, match=message):
        call.run(deepseek_mla)
    torch.cuda.synchronize()


@pytest.mark.parametrize("kind", ["bf16", "v4"])
def test_unused_scale_on_another_device(generator: torch.Generator, kind: str) -> None:
    call = make_call(mla_calls.KV_ROPE_INSERT, generator, kind=kind)
    call.args["fp8_scale"] = torch.ones(1)
    message = rf"deepseek_mla::{call.op}: fp8_scale must be on the device of kv, cuda:\d+, got cpu"
    with pytest.raises(RuntimeError, match=message):
        call.run(deepseek_mla)


@pytest.mark.parametrize("op", mla_calls.OPS)
def test_kv_on_another_device(generator: torch.Generator, op: str) -> None:
    call = make_call(op, generator)
    call.args["kv"] = call.args["kv"].cpu()
    with pytest.raises(
        RuntimeError, match=rf"deepseek_mla::{op}: .* must be on the device of kv, cpu"
    ):
        call.run(deepseek_mla)


def test_out_of_range_values_on_the_device_write_nothing(generator: torch.Generator) -> None:
    for op in mla_calls.OPS:
        call = make_call(op, generator, num_tokens=64)
        call.args["slot_mapping"].copy_(
            torch.tensor([-1, -(2**63), 2**63 - 1, 96], device="cuda").repeat(16)
        )
        cache = mla_calls.whole_storage(call.args["k_cache"]).clone()
        call.run(deepseek_mla)
        assert torch.equal(mla_calls.whole_storage(call.args["k_cache"]), cache)
