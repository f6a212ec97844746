"""The reference against independent arithmetic: fractions, float64, ml_dtypes."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from deepseek_mla import dequantize_cache, reference

ml_dtypes = pytest.importorskip("ml_dtypes")

import independent  # noqa: E402
import mla_calls  # noqa: E402

EPS = 1e-6


def random_float32(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Any finite float32 bits: every exponent, subnormals and zeros."""
    bits = rng.integers(0, 2**32, shape, dtype=np.uint32)
    bits[(bits & 0x7F800000) == 0x7F800000] &= 0x80FFFFFF
    return bits.view(np.float32)


def fma_operands(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random triples, and triples whose exact sum lies next to or on a rounding boundary."""
    a, b, c = (random_float32((600,), rng) for _ in range(3))
    near = [x.copy() for x in (a, b, c)]
    near[0] = rng.standard_normal(600).astype(np.float32)
    near[1] = rng.standard_normal(600).astype(np.float32)
    product = near[0].astype(np.float64) * near[1].astype(np.float64)
    near[2] = (-product).astype(np.float32) * rng.choice(
        np.array([1, 2, 2**-12, 2**24, 2**25, 2**-24, 2**29, 2**-29], np.float32), 600
    )
    # c is 1 to 2 with an odd significand and a * b is 2**-24 - 2**-70, a hair below half its unit:
    # a sum rounded to float64 first becomes the tie, which then goes the other way.
    ties_a = np.full(600, np.ldexp(1 + 2**-23, -12), np.float32) * rng.choice([-1, 1], 600)
    ties_b = np.full(600, np.ldexp(1 - 2**-23, -12), np.float32)
    ties_c = (rng.integers(0, 2**23, 600, dtype=np.uint32) | np.uint32(0x3F800001)).view(np.float32)
    tiny = np.ldexp(rng.standard_normal((3, 600)), [[-75], [-74], [-148]]).astype(np.float32)
    return tuple(
        np.concatenate(parts)
        for parts in zip(
            (a, b, c), near, (ties_a.astype(np.float32), ties_b, ties_c), tiny, strict=True
        )
    )


def test_fma_rounds_once(seed: int) -> None:
    operands = fma_operands(np.random.default_rng(seed))
    actual = reference.fma(*(torch.from_numpy(x) for x in operands)).numpy()
    with np.errstate(all="ignore"):
        expected = np.array([independent.fma(*abc) for abc in zip(*operands, strict=True)])
    np.testing.assert_array_equal(actual.view(np.uint32), expected.view(np.uint32))
    with np.errstate(all="ignore"):
        a, b, c = (x.astype(np.float64) for x in operands)
        assert (actual != (a * b + c).astype(np.float32)).any(), "no operands show double rounding"


def test_fma_of_zeros_and_specials() -> None:
    values = np.array([0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 3e38], np.float32)
    a, b, c = (x.ravel() for x in np.meshgrid(values, values, values))
    actual = reference.fma(*(torch.from_numpy(x.copy()) for x in (a, b, c))).numpy()
    with np.errstate(all="ignore"):
        expected = (a.astype(np.float64) * b.astype(np.float64) + c).astype(np.float32)
    np.testing.assert_array_equal(actual, expected)
    np.testing.assert_array_equal(
        np.signbit(actual[actual == 0]), np.signbit(expected[expected == 0])
    )


@pytest.mark.parametrize("dtype", mla_calls.DTYPES, ids=str)
def test_rms_norm_bits_and_error(seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.cat(
        (
            mla_calls.wide_values((24, 512), dtype, generator),
            torch.zeros(1, 512, dtype=dtype),
            torch.full((1, 512), min(torch.finfo(dtype).max, 2.0**58), dtype=dtype),
        )
    )
    x = rows.float()
    actual = reference.rms_norm(x, EPS).numpy()
    expected = np.stack([independent.norm_row(row, EPS) for row in x.numpy()])
    np.testing.assert_array_equal(actual.view(np.uint32), expected.view(np.uint32))
    exact = x.double().numpy()
    exact = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + EPS)
    np.testing.assert_allclose(actual, exact, rtol=2**-21, atol=0)


def test_inverse_root_is_correctly_rounded(seed: int) -> None:
    """A row of equal values has a known mean; the result shows the root's bits times one value."""
    rng = np.random.default_rng(seed)
    mantissas = rng.integers(0, 2**23, 3000, dtype=np.uint32)
    mantissas[:4] = [651320, 3807459, 8388606, 3811897]  # nearest to a rounding boundary
    for exponent in (127, 128):
        m = (mantissas | np.uint32(exponent << 23)).view(np.float32)
        # A row of zeros leaves only eps under the root; its other factor is then 0, so the root is
        # read from a row whose squares vanish beside eps.
        x = torch.zeros(512)
        x[0] = 2.0**-40
        actual = np.array([reference.rms_norm(x, float(eps))[0].item() * 2**40 for eps in m])
        expected = np.array([independent.inverse_sqrt(eps) for eps in m], np.float32)
        np.testing.assert_array_equal(actual.astype(np.float32), expected)


@pytest.mark.parametrize("dtype", mla_calls.DTYPES, ids=str)
def test_rope_bits_and_error(seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = mla_calls.wide_values((16, 512), dtype, generator).float()
    table = mla_calls.cos_sin_table(16, generator)
    actual = reference.apply_rope(x, table[:, :32], table[:, 32:]).numpy()
    expected = [
        independent.rope_row(row, angles)
        for row, angles in zip(x.numpy(), table.numpy(), strict=True)
    ]
    np.testing.assert_array_equal(actual.view(np.uint32), np.stack(expected).view(np.uint32))

    even, odd = (x[:, 448 + i :: 2].double().numpy() for i in range(2))
    cos, sin = table[:, :32].double().numpy(), table[:, 32:].double().numpy()
    bound = 2**-23 * np.hypot(even, odd)
    assert (np.abs(actual[:, 448::2] - (even * cos - odd * sin)) <= bound).all()
    assert (np.abs(actual[:, 449::2] - (even * sin + odd * cos)) <= bound).all()


@pytest.mark.parametrize("block", [32, 64])
def test_scale_is_exact_at_448_times_powers_of_two(block: int) -> None:
    """The exponent steps just above ``448 * 2**k``, for every ``k`` that float32 has."""
    powers = np.ldexp(np.float64(448), np.arange(-22, 120)).astype(np.float32)
    below, above = np.nextafter(powers, np.float32(0)), np.nextafter(powers, np.float32(np.inf))
    x = np.zeros((3, len(powers), block), np.float32)
    x[..., block // 2] = np.stack((below, powers, above))
    x[..., 1] = -x[..., block // 2]
    values, scales = reference.quantize_e4m3_ue8m0(torch.from_numpy(x).flatten(1), block)
    exponents = scales.view(3, -1).numpy().astype(int) - 127
    expected = np.arange(-22, 120)
    np.testing.assert_array_equal(exponents, np.stack((expected, expected, expected + 1)))
    stored = values.view(3, -1, block)[..., block // 2].numpy().view(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(stored[:2].astype(np.float32), 448)
    np.testing.assert_array_equal(stored[2].astype(np.float32), 224)


@pytest.mark.parametrize("block", [32, 64])
@pytest.mark.parametrize("dtype", mla_calls.DTYPES, ids=str)
def test_quantisation_bits(seed: int, dtype: torch.dtype, block: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.cat(
        (
            mla_calls.wide_values((32, 512), dtype, generator),
            mla_calls.adversarial_rows(dtype),
            torch.randint(-(2**15), 2**15, (32, 512), generator=generator)
            .to(torch.int16)
            .view(dtype),
        )
    ).float()
    values, scales = reference.quantize_e4m3_ue8m0(rows, block)
    runs = rows.numpy().reshape(-1, block)
    quantized = [independent.quantize_run(run) for run in runs]
    np.testing.assert_array_equal(
        values.numpy().reshape(-1, block), np.stack([bits for bits, _ in quantized])
    )
    np.testing.assert_array_equal(scales.numpy().ravel(), [scale for _, scale in quantized])


def test_quantisation_error_is_half_a_step(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = mla_calls.wide_values((64, 512), torch.bfloat16, generator).float()
    values, scales = reference.quantize_e4m3_ue8m0(x, 64)
    decoded = values.numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    scale = scales.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float64).repeat(64, axis=1)
    error = np.abs(decoded * scale - x.numpy())
    assert (error <= np.maximum(np.abs(x.numpy()) * 2**-4, scale * 2**-10)).all()


def test_e4m3_of_every_representable_and_midpoint() -> None:
    codes = np.arange(0x7F, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    middles = (codes[1:] + codes[:-1]) / 2
    points = np.concatenate(
        (
            codes,
            middles,
            np.nextafter(middles, np.float32(0)),
            np.nextafter(middles, np.float32(1e9)),
            np.array([449, 464, 465, 480, 1e30, np.inf, np.nan], np.float32),
        )
    )
    points = np.concatenate((points, -points))
    actual = reference.quantize_e4m3(torch.from_numpy(points)).numpy()
    np.testing.assert_array_equal(actual, independent.quantize_scaled(points))
    assert actual[np.isinf(points)].tolist() == [0x7E, 0xFE]


def test_every_e8m0_code_decodes() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    expected = codes.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    np.testing.assert_array_equal(reference.decode_e8m0(codes).numpy(), expected)


@pytest.mark.parametrize("block", [32, 64])
def test_nan_and_infinity_stay_in_their_place(block: int) -> None:
    x = torch.linspace(-5, 5, 4 * block).reshape(1, -1)
    clean_values, clean_scales = reference.quantize_e4m3_ue8m0(x, block)
    dirty = x.clone()
    dirty[0, 3] = torch.nan
    dirty[0, 2 * block] = -torch.inf
    dirty[0, 2 * block + 5] = torch.nan
    values, scales = reference.quantize_e4m3_ue8m0(dirty, block)
    # The run of a lone NaN: its neighbours as if the NaN were zero.
    absent = x.clone()
    absent[0, 3] = 0
    without, without_scales = reference.quantize_e4m3_ue8m0(absent, block)
    assert values[0, 3] == 0x7F
    keep = torch.arange(block) != 3
    assert torch.equal(values[0, :block][keep], without[0, :block][keep])
    assert scales[0, 0] == without_scales[0, 0]
    # The run of an infinity.
    assert scales[0, 2] == 255
    run, signs = values[0, 2 * block : 3 * block], torch.signbit(x[0, 2 * block : 3 * block])
    expected = torch.where(signs, 0x80, 0).to(torch.uint8)
    expected[0] = expected[5] = 0x7F
    assert torch.equal(run, expected)
    # The other runs.
    for i in (1, 3):
        inside = slice(i * block, (i + 1) * block)
        assert torch.equal(values[0, inside], clean_values[0, inside])
        assert scales[0, i] == clean_scales[0, i]


def kv_rows_independently(call: mla_calls.Call) -> dict[int, np.ndarray]:
    """Slot to rotated row (float32 values of the KV dtype), for the rows that are inserted."""
    args, dtype = call.args, call.kv_dtype
    table = args["cos_sin_cache"].numpy()
    num_slots = args["k_cache"].shape[0] * args["cache_block_size"]
    rows = {}
    for token, slot in enumerate(args["slot_mapping"].tolist()):
        position = int(args["position_ids"][token])
        if not (0 <= slot < num_slots and 0 <= position < len(table)):
            continue
        x = args["kv"][token].float().numpy()
        if call.op == mla_calls.KV_NORM_INSERT:
            weight = args["norm_weight"].float().numpy()
            with np.errstate(all="ignore"):
                x = independent.round_row(independent.norm_row(x, args["eps"]) * weight, dtype)
        rows[slot] = independent.round_row(independent.rope_row(x, table[position]), dtype)
    return rows


def expected_storage(call: mla_calls.Call) -> np.ndarray:
    """The cache's storage after the call, by byte offsets."""
    cache, dtype, block_size = call.args["k_cache"], call.kv_dtype, call.args["cache_block_size"]
    storage = mla_calls.whole_storage(cache).clone().numpy()
    itemsize = cache.element_size()
    base, block_stride = cache.storage_offset() * itemsize, cache.stride(0) * itemsize
    for slot, x in kv_rows_independently(call).items():
        block = base + slot // block_size * block_stride
        token = slot % block_size
        if call.kind in ("v4", "v41"):
            data, scales = independent.record(x, dtype, call.kind)
            if call.kind == "v4":
                writes = {token * 576: data, block_size * 576 + token * 8: scales}
            else:
                writes = {token * 528: data, token * 528 + 512: scales}
        elif call.kind == "fp8":
            scaled = x / call.args["fp8_scale"].numpy()[0]
            writes = {token * 512: independent.quantize_scaled(scaled)}
        else:
            cache_dtype = cache.dtype
            rounded = independent.round_row(x, cache_dtype)
            writes = {token * 1024: independent.row_bytes(rounded, cache_dtype)}
        for offset, data in writes.items():
            storage[block + offset : block + offset + len(data)] = data
    return storage


CACHES = [
    (mla_calls.QUANT_INSERT, "v4", 2, 0),
    (mla_calls.QUANT_INSERT, "v4", 3, 32),
    (mla_calls.QUANT_INSERT, "v4", 2, 208),
    (mla_calls.QUANT_INSERT, "v41", 2, 0),
    (mla_calls.QUANT_INSERT, "v41", 3, 48),
    (mla_calls.KV_ROPE_INSERT, "v4", 3, 16),
    (mla_calls.KV_ROPE_INSERT, "v41", 3, 16),
    (mla_calls.KV_ROPE_INSERT, "bf16", 3, 64),
    (mla_calls.KV_ROPE_INSERT, "fp16", 3, 0),
    (mla_calls.KV_ROPE_INSERT, "fp8", 3, 16),
    (mla_calls.KV_NORM_INSERT, "v4", 2, 0),
    (mla_calls.KV_NORM_INSERT, "v4", 3, 80),
    (mla_calls.FULL_BF16_INSERT, "bf16", 3, 24),
    (mla_calls.FULL_BF16_INSERT, "fp16", 3, 0),
    (mla_calls.FULL_FP8_INSERT, "fp8", 3, 512),
]


@pytest.mark.parametrize(
    ("op", "kind", "rank", "padding", "dtype"),
    [
        (*cache, dtype)
        for cache in CACHES
        for dtype in mla_calls.DTYPES
        if not (cache[1] == "fp16" and dtype == torch.bfloat16)  # refused
    ],
)
def test_cache_bytes(
    seed: int, op: str, kind: str, rank: int, padding: int, dtype: torch.dtype
) -> None:
    """Layout, arithmetic, skipped rows and untouched bytes, against byte offsets and fractions."""
    call = mla_calls.make_call(
        op,
        torch.Generator().manual_seed(seed),
        num_tokens=13,
        num_heads=1,
        dtype=dtype,
        kind=kind,
        block_size=4,
        cache_rank=rank,
        block_padding=padding,
        slots_missing=2,
        position_dtype=torch.int32 if padding else torch.int64,
        gaps=bool(padding),
        weight_dtype=torch.float32 if padding else None,
    )
    call.args["kv"][3, 70] = torch.nan
    call.args["kv"][5, 200] = torch.inf
    call.args["kv"][7, 460] = -torch.inf
    call.args["kv"][8, 470] = torch.nan
    expected = call.clone()
    whole = expected_storage(call)
    mla_calls.whole_storage(expected.args["k_cache"]).copy_(torch.from_numpy(whole))
    before = call.clone()
    call.run(reference)
    # Only the cache is compared here.
    for side in (call, expected):
        side.result = None
        side.args = {
            name: side.args[name] for name in ("k_cache", "cache_block_size") if name in side.args
        }
    mla_calls.assert_same_bits(call, expected)
    before.args = {name: before.args[name] for name in call.args}
    with pytest.raises(AssertionError):
        mla_calls.assert_same_bits(before, expected)


@pytest.mark.parametrize("gaps", [False, True], ids=["dense", "gaps"])
@pytest.mark.parametrize("apply_q_rope", [True, False], ids=["rope", "no_rope"])
@pytest.mark.parametrize("apply_q_norm", [True, False], ids=["norm", "no_norm"])
@pytest.mark.parametrize("dtype", mla_calls.DTYPES, ids=str)
def test_q_bits(
    seed: int, dtype: torch.dtype, apply_q_norm: bool, apply_q_rope: bool, gaps: bool
) -> None:
    call = mla_calls.make_call(
        mla_calls.QUANT_INSERT,
        torch.Generator().manual_seed(seed),
        num_tokens=5,
        num_heads=2,
        q_head_padded=5,
        dtype=dtype,
        gaps=gaps,
        apply_q_norm=apply_q_norm,
        apply_q_rope=apply_q_rope,
    )
    call.args["position_ids"][1] = 64  # the table's end
    result = call.run(reference).result
    assert result is not None
    assert result.shape == (5, 5, 512)
    table = call.args["cos_sin_cache"].numpy()
    for token in range(5):
        position = int(call.args["position_ids"][token])
        for head in range(2):
            x = call.args["q_in"][token, head].float().numpy()
            if apply_q_norm:
                x = independent.norm_row(x, 1e-6)
            if apply_q_rope and 0 <= position < len(table):
                x = independent.rope_row(x, table[position])
            expected = independent.row_bytes(independent.round_row(x, dtype), dtype)
            actual = independent.to_numpy(result[token, head]).view(np.uint8)
            np.testing.assert_array_equal(actual, expected)
    assert (result[:, 2:].view(torch.int16) == 0).all()


def test_fp8_q_is_rounded_once(seed: int) -> None:
    """Q is not rounded to 16 bits on its way to E4M3."""
    call = mla_calls.make_call(
        mla_calls.FULL_FP8_INSERT, torch.Generator().manual_seed(seed), num_tokens=6, num_heads=2
    )
    call.args["q"][2, 1, 7] = torch.nan
    call.args["q_fp8_scale_inv"].fill_(50.0)
    call.run(reference)
    table = call.args["cos_sin_cache"].numpy()
    for token in range(6):
        position = int(call.args["position_ids"][token])
        for head in range(2):
            x = independent.norm_row(call.args["q"][token, head].float().numpy(), 1e-6)
            if 0 <= position < len(table):
                x = independent.rope_row(x, table[position])
            expected = independent.quantize_scaled(x * np.float32(50))
            actual = call.args["q_fp8"][token, head].view(torch.uint8).numpy()
            np.testing.assert_array_equal(actual, expected)


def test_interleaved_storage(seed: int) -> None:
    """Element (h, d) of a token is at ``(d // 16) * heads * 16 + h * 16 + d % 16``."""
    plain = mla_calls.make_call(
        mla_calls.QUANT_INSERT,
        torch.Generator().manual_seed(seed),
        num_tokens=3,
        num_heads=3,
        q_head_padded=8,
    )
    interleaved = plain.clone()
    interleaved.args["is_q_interleaved"] = True

    def permutation(heads: int) -> torch.Tensor:
        h, d = torch.meshgrid(torch.arange(heads), torch.arange(512), indexing="ij")
        return ((d // 16) * heads * 16 + h * 16 + d % 16).flatten()

    source = plain.args["q_in"].reshape(3, -1)
    interleaved.args["q_in"].view(3, -1)[:, permutation(3)] = source
    plain.run(reference)
    interleaved.run(reference)
    assert plain.result is not None
    assert interleaved.result is not None
    restored = interleaved.result.view(3, -1)[:, permutation(8)].view(3, 8, 512)
    assert torch.equal(restored.view(torch.int16), plain.result.view(torch.int16))


@pytest.mark.parametrize("kind", ["v4", "v41", "bf16", "fp8"])
def test_tokens_read_back(seed: int, kind: str) -> None:
    """Dequantised tokens are the rotated rows within half a step of the format."""
    call = mla_calls.make_call(
        mla_calls.KV_ROPE_INSERT,
        torch.Generator().manual_seed(seed),
        num_tokens=20,
        kind=kind,
        block_size=4,
        block_padding=16,
    )
    call.args["kv"].normal_(generator=torch.Generator().manual_seed(seed))
    call.run(reference)
    rows = kv_rows_independently(call)
    expected = torch.from_numpy(np.stack(list(rows.values())))
    actual = dequantize_cache(
        call.args["k_cache"],
        torch.tensor(list(rows)),
        4,
        kv_mxfp8=kind == "v41",
        fp8_scale=call.args.get("fp8_scale"),
    )
    assert actual.dtype == torch.float32
    if kind == "bf16":
        assert torch.equal(actual, expected)
        return
    if kind == "v4":
        assert torch.equal(actual[:, 448:], expected[:, 448:])
    step = 2**-4 * expected.abs() * (1 + 2**-20)
    # Below 2**-6 steps are 2**-9; a packed scale is at most absmax / 224, the tensor's at most 1.5.
    scale = torch.tensor(1.5) if kind == "fp8" else expected.abs().amax(-1, keepdim=True) / 224
    floor = 2**-10 * scale
    assert ((actual - expected).abs() <= torch.maximum(step, floor)).all()


def test_reading_past_the_cache_is_an_error() -> None:
    cache = torch.zeros(3, 4, 584, dtype=torch.uint8)
    for slot in (-1, 12):
        with pytest.raises(IndexError, match=r"slots must be in \[0, 12\)"):
            dequantize_cache(cache, torch.tensor([slot]), 4)


def test_reference_chunks_do_not_show(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    call = mla_calls.make_call(
        mla_calls.QUANT_INSERT, torch.Generator().manual_seed(seed), num_tokens=11, num_heads=4
    )
    chunked = call.clone()
    call.run(reference)
    monkeypatch.setattr(reference, "_CHUNK_ROWS", 8)
    chunked.run(reference)
    mla_calls.assert_same_bits(chunked, call)


def test_round_to_float32_is_what_numpy_does(seed: int) -> None:
    """The oracle's own rounding, on float64 values, where numpy's conversion is the judge."""
    rng = np.random.default_rng(seed)
    values = np.ldexp(rng.standard_normal(2000), rng.integers(-160, 120, 2000))
    actual = [independent.round_to_float32(Fraction(float(value))) for value in values]
    np.testing.assert_array_equal(np.array(actual), values.astype(np.float32))
