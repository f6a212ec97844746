"""The operators' arithmetic once more, in numpy, ml_dtypes and fractions, value by value.

Nothing of the package or of torch's arithmetic is used, so agreement is evidence for both.
"""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import torch

F32 = np.float32


def round_to_float32(value: Fraction) -> np.float32:
    """Round an exact non-zero value to nearest even float32, subnormals included."""
    magnitude = abs(value)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    if magnitude < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** max(exponent - 23, -149)
    steps = round(magnitude / unit)  # to even
    rounded = float(steps * unit) if steps * unit < Fraction(2) ** 128 else math.inf
    return F32(math.copysign(rounded, value))


def fma(a: np.float32, b: np.float32, c: np.float32) -> np.float32:
    if not (np.isfinite(a) and np.isfinite(b) and np.isfinite(c)):
        return F32(float(a) * float(b) + float(c))
    exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
    if exact == 0:
        return F32(float(a) * float(b) + float(c))
    return round_to_float32(exact)


def rope_row(x: np.ndarray, cos_sin: np.ndarray) -> np.ndarray:
    """``x`` is 512 float32 values, ``cos_sin`` 32 cosines and 32 sines."""
    out = x.copy()
    with np.errstate(all="ignore"):
        for i in range(32):
            even, odd, cos, sin = x[448 + 2 * i], x[449 + 2 * i], cos_sin[i], cos_sin[32 + i]
            out[448 + 2 * i] = fma(even, cos, -F32(odd * sin))
            out[449 + 2 * i] = fma(even, sin, F32(odd * cos))
    return out


def norm_row(x: np.ndarray, eps: float) -> np.ndarray:
    with np.errstate(all="ignore"):
        sums = []
        for chunk in x.reshape(64, 8):
            total = F32(chunk[0] * chunk[0])
            for value in chunk[1:]:
                total = F32(total + F32(value * value))
            sums.append(total)
        while len(sums) > 1:
            half = len(sums) // 2
            sums = [F32(sums[i] + sums[i + half]) for i in range(half)]
        biased = F32(F32(sums[0] / F32(512)) + F32(eps))
        return x * inverse_sqrt(biased)


def inverse_sqrt(x: np.float32) -> np.float32:
    """Correctly rounded: the neighbour candidates are compared exactly."""
    if not (np.isfinite(x) and x > 0):
        with np.errstate(all="ignore"):
            return F32(1 / np.sqrt(np.float64(x)))
    guess = F32(1 / math.sqrt(float(x)))
    candidates = [np.nextafter(guess, F32(0)), guess, np.nextafter(guess, F32(np.inf))]
    exact = Fraction(float(x))
    for low, high in itertools.pairwise(candidates):
        middle = (Fraction(float(low)) + Fraction(float(high))) / 2
        if middle * middle * exact > 1:
            return F32(low)
    return F32(candidates[-1])


def quantize_run(x: np.ndarray) -> tuple[np.ndarray, int]:
    """E4M3 bits and the E8M0 byte of values that share a scale."""
    numbers = [abs(float(value)) for value in x if not np.isnan(value)]
    absmax = max([*numbers, float(F32(1e-4))])
    if math.isinf(absmax):
        bits = [
            0x7F if not np.isfinite(value) else (0x80 if np.signbit(value) else 0) for value in x
        ]
        return np.array(bits, dtype=np.uint8), 255
    ratio = Fraction(absmax) / 448
    exponent = ratio.numerator.bit_length() - ratio.denominator.bit_length() - 1
    while Fraction(2) ** exponent < ratio:
        exponent += 1
    with np.errstate(invalid="ignore"):
        scaled = np.clip(np.ldexp(x.astype(np.float64), -exponent), -448, 448)
        bits = scaled.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    return np.where(np.isnan(x), np.uint8(0x7F), bits), min(max(exponent + 127, 0), 255)


def quantize_scaled(x: np.ndarray) -> np.ndarray:
    """Saturated E4M3 bits of float32 values."""
    bits = np.clip(x.astype(np.float64), -448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    return np.where(np.isnan(x), np.uint8(0x7F), bits)


NUMPY_DTYPES = {torch.bfloat16: ml_dtypes.bfloat16, torch.float16: np.float16}


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """Exact copy, 16-bit floats by their bits."""
    if tensor.dtype in NUMPY_DTYPES:
        return tensor.contiguous().view(torch.int16).numpy().view(NUMPY_DTYPES[tensor.dtype])
    return tensor.contiguous().numpy()


def round_row(x: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """float32 values rounded to ``dtype`` and back."""
    with np.errstate(all="ignore"):
        return x.astype(NUMPY_DTYPES[dtype]).astype(F32)


def row_bytes(x: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Bytes of float32 values that ``dtype`` represents exactly."""
    return x.astype(NUMPY_DTYPES[dtype]).view(np.uint8)


def record(x: np.ndarray, dtype: torch.dtype, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Data and scale bytes of a rotated and rounded row in a packed format."""
    block, quantized = (32, 512) if kind == "v41" else (64, 448)
    runs = [quantize_run(run) for run in x[:quantized].reshape(-1, block)]
    values = np.concatenate([bits for bits, _ in runs])
    scales = [scale for _, scale in runs] + ([] if kind == "v41" else [0])
    rope = row_bytes(x[quantized:], dtype)
    return np.concatenate((values, rope)), np.array(scales, dtype=np.uint8)
