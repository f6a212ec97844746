"""The operators as torch sees them: schemas, fakes, compilation, and CPU tensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import deepseek_mla
import mla_calls
import mla_smoke
import pytest
import torch
from mla_calls import Call, make_call
from torch._subclasses.fake_tensor import FakeTensorMode
from torch_defaults import DEFAULTS

QNORM_ARGUMENTS = (
    "(Tensor q_in, Tensor kv, Tensor(a!) k_cache, Tensor slot_mapping, Tensor position_ids, "
    "Tensor cos_sin_cache, int q_head_padded, float eps, int cache_block_size, "
    "bool apply_q_norm=True, bool kv_mxfp8=False, bool apply_q_rope=True, "
    "bool is_q_interleaved=False"
)
SCHEMAS = {
    mla_calls.QUANT_INSERT: f"{QNORM_ARGUMENTS}) -> Tensor",
    f"{mla_calls.QUANT_INSERT}.out": f"{QNORM_ARGUMENTS}, *, Tensor(b!) q_out) -> ()",
    mla_calls.KV_ROPE_INSERT: (
        "(Tensor kv, Tensor(a!) k_cache, Tensor slot_mapping, Tensor position_ids, "
        "Tensor cos_sin_cache, int cache_block_size, Tensor? fp8_scale=None, "
        "bool kv_mxfp8=False) -> ()"
    ),
    mla_calls.KV_NORM_INSERT: (
        "(Tensor kv, Tensor norm_weight, Tensor(a!) k_cache, Tensor slot_mapping, "
        "Tensor position_ids, Tensor cos_sin_cache, float eps, int cache_block_size) -> ()"
    ),
    mla_calls.FULL_BF16_INSERT: (
        "(Tensor(a!) q, Tensor kv, Tensor(b!) k_cache, Tensor slot_mapping, Tensor position_ids, "
        "Tensor cos_sin_cache, float eps, int cache_block_size, bool apply_q_norm=True) -> ()"
    ),
    mla_calls.FULL_FP8_INSERT: (
        "(Tensor q, Tensor kv, Tensor(a!) q_fp8, Tensor(b!) k_cache, Tensor slot_mapping, "
        "Tensor position_ids, Tensor cos_sin_cache, Tensor fp8_scale, Tensor q_fp8_scale_inv, "
        "float eps, int cache_block_size, bool apply_q_norm=True) -> ()"
    ),
}

# Keyword arguments of make_call: every operator, every cache format, every flag.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "quant_insert": (mla_calls.QUANT_INSERT, {}),
    "quant_insert_padded": (mla_calls.QUANT_INSERT, {"q_head_padded": 8, "gaps": True}),
    "quant_insert_rank3": (mla_calls.QUANT_INSERT, {"cache_rank": 3, "block_padding": 64}),
    "quant_insert_v41": (mla_calls.QUANT_INSERT, {"kind": "v41", "dtype": torch.float16}),
    "quant_insert_interleaved": (
        mla_calls.QUANT_INSERT,
        {"is_q_interleaved": True, "q_head_padded": 8},
    ),
    "quant_insert_no_norm": (mla_calls.QUANT_INSERT, {"apply_q_norm": False}),
    "quant_insert_no_rope": (mla_calls.QUANT_INSERT, {"apply_q_rope": False}),
    "quant_insert_kv_alone": (mla_calls.QUANT_INSERT, {"q_head_padded": 0}),
    "quant_insert_out": (
        mla_calls.QUANT_INSERT,
        {"with_q_out": True, "q_head_padded": 8, "gaps": True},
    ),
    "kv_rope_v4": (mla_calls.KV_ROPE_INSERT, {"gaps": True, "slots_missing": 3}),
    "kv_rope_v41": (mla_calls.KV_ROPE_INSERT, {"kind": "v41"}),
    "kv_rope_bf16": (mla_calls.KV_ROPE_INSERT, {"kind": "bf16", "block_padding": 64}),
    "kv_rope_fp16": (mla_calls.KV_ROPE_INSERT, {"kind": "fp16", "dtype": torch.float16}),
    "kv_rope_fp16_in_bf16": (mla_calls.KV_ROPE_INSERT, {"kind": "bf16", "dtype": torch.float16}),
    "kv_rope_fp8": (mla_calls.KV_ROPE_INSERT, {"kind": "fp8", "block_padding": 64}),
    "kv_norm": (mla_calls.KV_NORM_INSERT, {"gaps": True}),
    "kv_norm_float_weight": (mla_calls.KV_NORM_INSERT, {"weight_dtype": torch.float32}),
    "full_bf16": (mla_calls.FULL_BF16_INSERT, {"gaps": True}),
    "full_fp8": (mla_calls.FULL_FP8_INSERT, {"gaps": True, "position_dtype": torch.int32}),
}


@pytest.fixture(params=VARIANTS)
def call(request: pytest.FixtureRequest, seed: int) -> Call:
    op, options = VARIANTS[request.param]
    return make_call(op, torch.Generator().manual_seed(seed), **options)


def overload(call: Call) -> Any:
    packet = getattr(torch.ops.deepseek_mla, call.op)
    return packet.out if "q_out" in call.args else packet.default


@pytest.mark.parametrize("name", SCHEMAS)
def test_schema(name: str) -> None:
    packet = getattr(torch.ops.deepseek_mla, name.removesuffix(".out"))
    schema = (packet.out if name.endswith(".out") else packet.default)._schema
    assert str(schema) == f"deepseek_mla::{name}{SCHEMAS[name]}"


def test_every_operator_has_an_entry_point() -> None:
    assert set(mla_calls.OPS) <= set(deepseek_mla.__all__)
    assert all(hasattr(deepseek_mla, name) for name in deepseek_mla.__all__)
    assert deepseek_mla.__version__ == version("deepseek-mla")


def test_cpu_equals_reference(call: Call) -> None:
    expected = call.reference_of()
    call.run(deepseek_mla)
    if "q_out" in call.args:
        assert call.result is call.args["q_out"]
    mla_calls.assert_same_bits(call, expected)


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults_of_the_process(name: str) -> None:
    mla_smoke.check_under(DEFAULTS[name], torch.device("cpu"))


def test_tensors_of_inference_mode_are_written_outside(call: Call) -> None:
    """As by the CUDA kernels. A new result is no such tensor."""
    expected = call.reference_of()
    with torch.inference_mode():
        call = call.clone()
    assert call.args["k_cache"].is_inference()
    call.run(deepseek_mla)
    if call.result is not None and "q_out" not in call.args:
        assert not call.result.is_inference()
    mla_calls.assert_same_bits(call, expected)


def test_no_gradient_is_recorded(call: Call) -> None:
    """On the CPU as on CUDA."""
    expected = call.reference_of()
    inputs = [
        value
        for name, value in call.args.items()
        if name not in ("k_cache", "q_out", "q_fp8")
        and isinstance(value, torch.Tensor)
        and value.is_floating_point()
    ]
    for value in inputs:
        value.requires_grad_()
    call.run(deepseek_mla)
    # A leaf among them is written in place, and is still a leaf.
    assert all(value.is_leaf for value in inputs)
    written = [call.args[name] for name in ("k_cache", "q_out", "q_fp8") if name in call.args]
    assert not any(value.requires_grad for value in written)
    if "q_out" not in call.args and call.result is not None:
        assert not call.result.requires_grad
    mla_calls.assert_same_bits(call, expected)


def test_result_is_allocated_once(seed: int, tmp_path: Path) -> None:
    call = make_call(
        mla_calls.QUANT_INSERT, torch.Generator().manual_seed(seed), num_heads=1, q_head_padded=512
    )
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        call.run(deepseek_mla)
    assert call.result is not None
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    changes = [event["args"]["Bytes"] for event in events if event["name"] == "[memory]"]
    assert [size for size in changes if size >= call.result.nbytes] == [call.result.nbytes]


def test_torch_ops_equals_entry_point(call: Call) -> None:
    expected = call.clone().run(deepseek_mla)
    result = overload(call)(**call.args)
    if "q_out" in call.args:
        assert result is None
        result = call.args["q_out"]
    call.result = result
    mla_calls.assert_same_bits(call, expected)


def test_nine_arguments_are_enough(seed: int) -> None:
    """The call of vLLM's first version."""
    call = make_call(mla_calls.QUANT_INSERT, torch.Generator().manual_seed(seed))
    expected = call.reference_of()
    call.args.pop("kv_mxfp8")
    packet = getattr(torch.ops.deepseek_mla, mla_calls.QUANT_INSERT)
    call.result = packet(*call.args.values())
    mla_calls.assert_same_bits(call, expected)


@pytest.mark.parametrize("op", mla_calls.OPS)
def test_no_tokens(seed: int, op: str) -> None:
    call = make_call(op, torch.Generator().manual_seed(seed), num_tokens=0)
    before = call.clone()
    call.run(deepseek_mla)
    if op == mla_calls.QUANT_INSERT:
        assert call.result is not None
        assert call.result.shape == (0, 3, 512)
        before.result = call.result.clone()
    mla_calls.assert_same_bits(call, before)


def test_no_query_heads_asked_for(seed: int) -> None:
    call = make_call(mla_calls.QUANT_INSERT, torch.Generator().manual_seed(seed), q_head_padded=0)
    result = call.run(deepseek_mla).result
    assert result is not None
    assert result.shape == (17, 0, 512)
    assert result.dtype == torch.bfloat16


def test_no_slots(seed: int) -> None:
    """An empty slot mapping inserts nothing and still processes Q."""
    generator = torch.Generator().manual_seed(seed)
    call = make_call(mla_calls.QUANT_INSERT, generator, slots_missing=17)
    cache = mla_calls.whole_storage(call.args["k_cache"]).clone()
    expected = call.reference_of()
    mla_calls.assert_same_bits(call.run(deepseek_mla), expected)
    assert torch.equal(mla_calls.whole_storage(call.args["k_cache"]), cache)


def test_fake(call: Call) -> None:
    real = call.clone().run(deepseek_mla).result
    with FakeTensorMode() as mode:
        args = {
            name: mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
            for name, value in call.args.items()
        }
        fake = getattr(deepseek_mla, call.op)(**args)
    if real is None:
        assert fake is None
    else:
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


def test_meta_tensors(seed: int) -> None:
    call = make_call(mla_calls.QUANT_INSERT, torch.Generator().manual_seed(seed), q_head_padded=64)
    result = call.clone("meta").run(deepseek_mla).result
    assert result is not None
    assert (result.shape, result.dtype) == ((17, 64, 512), torch.bfloat16)
    assert result.is_meta


def test_opcheck(call: Call) -> None:
    args = {
        name: value.clone(memory_format=torch.preserve_format)
        if isinstance(value, torch.Tensor)
        else value
        for name, value in call.args.items()
    }
    test_utils = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if call.kind == "fp8":
        # torch compares inputs before and after by allclose, which it lacks for float8;
        # assert_same_bits does it here.
        test_utils.remove("test_schema")
        expected = call.reference_of()
        mla_calls.assert_same_bits(call.run(deepseek_mla), expected)
    else:
        test_utils.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(overload(call), (), args, test_utils=test_utils)


def compiled(call: Call, **options: Any) -> Callable[..., Any]:
    """The operator between two torch operations, so that there is a graph to be whole."""
    function = getattr(deepseek_mla, call.op)
    rows = "q_in" if "q_in" in call.args else "q" if "q" in call.args else "kv"

    def program(args: dict[str, Any]) -> torch.Tensor | None:
        args = {**args, "position_ids": args["position_ids"] + 1}
        args[rows].mul_(2)
        result = function(**args)
        return None if result is None else result * 2

    return torch.compile(program, fullgraph=True, backend="aot_eager", **options)


def eager(call: Call) -> Call:
    call = call.clone()
    rows = "q_in" if "q_in" in call.args else "q" if "q" in call.args else "kv"
    call.args[rows].mul_(2)
    positions = call.args["position_ids"]
    call.args["position_ids"] = positions + 1
    call.run(deepseek_mla)
    call.args["position_ids"] = positions
    if call.result is not None:
        call.result = call.result * 2
    return call


def test_compile_to_a_full_graph(call: Call) -> None:
    torch.compiler.reset()
    expected = eager(call)
    call.result = compiled(call)(call.args)
    if "is_q_interleaved" not in call.args:
        mla_calls.assert_same_bits(call, expected)
    else:
        assert call.result is not None
        assert torch.equal(call.result.view(torch.int16), expected.result.view(torch.int16))


def test_compile_once_for_every_batch_size(seed: int) -> None:
    torch.compiler.reset()
    generator = torch.Generator().manual_seed(seed)
    calls = [make_call(mla_calls.QUANT_INSERT, generator, num_tokens=n) for n in (17, 5, 33)]
    graphs = []

    def counting_backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    def program(args: dict[str, Any]) -> torch.Tensor:
        return deepseek_mla.fused_deepseek_v4_qnorm_rope_kv_rope_quant_insert(**args)

    function = torch.compile(program, fullgraph=True, dynamic=True, backend=counting_backend)
    for call in calls:
        expected = call.reference_of()
        call.result = function(call.args)
        mla_calls.assert_same_bits(call, expected)
    assert len(graphs) == 1


@pytest.mark.parametrize("name", ["quant_insert_padded", "full_fp8"])
def test_compile_with_inductor(seed: int, name: str) -> None:
    torch.compiler.reset()
    op, options = VARIANTS[name]
    call = make_call(op, torch.Generator().manual_seed(seed), **options)
    expected = call.reference_of()
    call.result = torch.compile(getattr(deepseek_mla, op), fullgraph=True)(**call.args)
    mla_calls.assert_same_bits(call, expected)


@pytest.mark.parametrize("dtype", mla_calls.DTYPES, ids=str)
def test_adversarial_rows(dtype: torch.dtype) -> None:
    """NaN, infinities and extremes pass through every operator; clean tokens do not change."""
    rows = mla_calls.adversarial_rows(dtype)
    for op in mla_calls.OPS:
        generator = torch.Generator().manual_seed(1)
        call = make_call(op, generator, num_tokens=2 * len(rows), num_heads=1, dtype=dtype)
        call.args["slot_mapping"].copy_(torch.arange(2 * len(rows)))
        call.args["position_ids"].zero_()
        clean = call.clone()
        call.args["kv"][::2] = rows
        for name in ("q_in", "q"):
            if name in call.args:
                call.args[name][::2, 0] = rows
        expected = call.reference_of()
        mla_calls.assert_same_bits(call.run(deepseek_mla), expected)
        clean.run(deepseek_mla)
        odd_slots = torch.arange(1, 2 * len(rows), 2)
        dirty_tokens, clean_tokens = (
            deepseek_mla.dequantize_cache(side.args["k_cache"], odd_slots, 16, dtype=dtype)
            for side in (call, clean)
        )
        assert torch.equal(dirty_tokens, clean_tokens)


@pytest.mark.parametrize("kind", ["v4", "bf16", "fp8"])
def test_dequantize_cache_of_other_blocks(seed: int, kind: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    cache = mla_calls.make_cache(kind, 4, 8, generator)
    message = (
        r"^dequantize_cache: k_cache must have shape \[num_blocks, cache_block_size, ...\] with "
        rf"cache_block_size = 16, got \[4, 8, {cache.shape[2]}\]"
    )
    with pytest.raises(ValueError, match=message):
        deepseek_mla.dequantize_cache(cache, torch.arange(4), 16)
