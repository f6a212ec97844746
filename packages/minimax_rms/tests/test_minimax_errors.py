"""What bad arguments get where no GPU is needed to find out: the whole message.

The checks are those that the CUDA kernels run; ``_check_<op>`` runs them alone, on any device.
Arguments on different devices, and calls beyond a capacity, take a GPU.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from minimax_rms import ops
from torch import Tensor

private = torch.ops.minimax_rms

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def zeros(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def strided(
    rows: int, width: int, stride: int, offset: int = 0, dtype: torch.dtype = BF16
) -> Tensor:
    """Rows that are ``stride`` elements apart, ``offset`` elements past an aligned address."""
    storage = torch.zeros(offset + rows * stride + width, dtype=dtype)
    return storage[offset:].as_strided((rows, width), (stride, 1))


def workspace(nranks: int) -> Tensor:
    return torch.zeros(3 * nranks + 2, dtype=torch.int64)


ONE = "minimax_allreduce_rms"
QK = "minimax_allreduce_rms_qk"

# Good arguments, and those that a case puts in their place.
GOOD: dict[str, dict[str, Any]] = {
    ONE: {
        "input": zeros(5, 16),
        "norm_weight": zeros(16),
        "workspace": workspace(2),
        "rank": 1,
        "nranks": 2,
        "eps": 1e-6,
    },
    QK: {
        "qkv": zeros(5, 32),
        "norm_weight_q": zeros(16),
        "norm_weight_k": zeros(8),
        "workspace": workspace(2),
        "q_size": 16,
        "kv_size": 8,
        "rank": 1,
        "nranks": 2,
        "eps": 1e-6,
    },
}

DTYPES = "must be torch.bfloat16 or torch.float16 or torch.float32, got"
SIZE = "must be a positive multiple of 8 elements (16 bytes) below 2^31, got"
KV_SIZE = "kv_size must be zero or a positive multiple of 8 elements (16 bytes) below 2^31, got"
NRANKS = "nranks must be in [1, 16], got"
RANK = "rank must be in [0, nranks) with nranks = 2, got"
EPS = "eps must be finite in float32 and at least 0, got"

BAD: list[tuple[str, dict[str, Any], str]] = [
    (ONE, {"input": zeros(5, 16, dtype=torch.float64)}, f"input {DTYPES} torch.float64"),
    (ONE, {"input": zeros(5, 16, dtype=torch.int64)}, f"input {DTYPES} torch.int64"),
    (ONE, {"input": zeros(16)}, "input must have shape [T, D], got [16]"),
    (ONE, {"input": zeros(1, 5, 16)}, "input must have shape [T, D], got [1, 5, 16]"),
    (ONE, {"input": zeros(5, 12), "norm_weight": zeros(12)}, f"D = input.size(1) {SIZE} 12"),
    (ONE, {"input": zeros(5, 0), "norm_weight": zeros(0)}, f"D = input.size(1) {SIZE} 0"),
    (
        ONE,
        {"input": zeros(5, 6, dtype=F32), "norm_weight": zeros(6, dtype=F32)},
        "D = input.size(1) must be a positive multiple of 4 elements (16 bytes) below 2^31, got 6",
    ),
    (
        ONE,
        {"input": zeros(16, 16).t()},
        "input must be contiguous from dimension 1 on, got strides [1, 16] for shape [16, 16]",
    ),
    (
        ONE,
        {"input": strided(5, 16, 20)},
        "input must have a stride of dimension 0 that is a multiple of 16 bytes, got 40 bytes",
    ),
    (
        ONE,
        {"input": strided(5, 16, 24, offset=1)},
        "input must be aligned to 16 bytes, got an address that is 2 past a multiple",
    ),
    (
        ONE,
        {"norm_weight": zeros(16, dtype=F32)},
        "norm_weight must have the dtype of input, torch.bfloat16, got torch.float32",
    ),
    (
        ONE,
        {"norm_weight": zeros(8)},
        "norm_weight must have shape [D] with D = input.size(1) = 16, got [8]",
    ),
    (
        ONE,
        {"norm_weight": zeros(1, 16)},
        "norm_weight must have shape [D] with D = input.size(1) = 16, got [1, 16]",
    ),
    (
        ONE,
        {"norm_weight": zeros(32)[::2]},
        "norm_weight must be contiguous, got strides [2] for shape [16]",
    ),
    (
        ONE,
        {"norm_weight": zeros(24)[1:17]},
        "norm_weight must be aligned to 16 bytes, got an address that is 2 past a multiple",
    ),
    (ONE, {"nranks": 0}, f"{NRANKS} 0"),
    (ONE, {"nranks": 17}, f"{NRANKS} 17"),
    (ONE, {"rank": -1}, f"{RANK} -1"),
    (ONE, {"rank": 2}, f"{RANK} 2"),
    (ONE, {"eps": -1e-6}, f"{EPS} -1e-06"),
    (ONE, {"eps": float("nan")}, f"{EPS} nan"),
    (ONE, {"eps": float("inf")}, f"{EPS} inf"),
    (ONE, {"eps": 1e39}, f"{EPS} 1e+39"),
    (
        ONE,
        {"workspace": torch.zeros(8, dtype=torch.int32)},
        "workspace must be torch.int64, got torch.int32",
    ),
    (
        ONE,
        {"workspace": torch.zeros(7, dtype=torch.int64)},
        "workspace must have shape [3 * nranks + 2] or more with nranks = 2, got [7]",
    ),
    (
        ONE,
        {"workspace": torch.zeros(1, 8, dtype=torch.int64)},
        "workspace must have shape [3 * nranks + 2] or more with nranks = 2, got [1, 8]",
    ),
    (
        ONE,
        {"workspace": torch.zeros(16, dtype=torch.int64)[::2]},
        "workspace must be contiguous, got strides [2] for shape [8]",
    ),
    (QK, {"qkv": zeros(5, 32, dtype=torch.float64)}, f"qkv {DTYPES} torch.float64"),
    (QK, {"q_size": 12}, f"q_size {SIZE} 12"),
    (QK, {"q_size": 0}, f"q_size {SIZE} 0"),
    (QK, {"q_size": -8}, f"q_size {SIZE} -8"),
    (QK, {"q_size": 2**31}, f"q_size {SIZE} {2**31}"),
    (QK, {"q_size": 2**63 - 8}, f"q_size {SIZE} {2**63 - 8}"),
    (QK, {"kv_size": 4}, f"{KV_SIZE} 4"),
    (QK, {"kv_size": -8}, f"{KV_SIZE} -8"),
    (
        QK,
        {"qkv": zeros(5, 24)},
        "qkv must have shape [T, W] with W = q_size + 2 * kv_size = 32, got [5, 24]",
    ),
    (
        QK,
        {"qkv": zeros(32)},
        "qkv must have shape [T, W] with W = q_size + 2 * kv_size = 32, got [32]",
    ),
    (
        QK,
        {"qkv": zeros(32, 32).t()},
        "qkv must be contiguous from dimension 1 on, got strides [1, 32] for shape [32, 32]",
    ),
    (
        QK,
        {"qkv": strided(5, 32, 36)},
        "qkv must have a stride of dimension 0 that is a multiple of 16 bytes, got 72 bytes",
    ),
    (
        QK,
        {"qkv": strided(5, 32, 40, offset=4)},
        "qkv must be aligned to 16 bytes, got an address that is 8 past a multiple",
    ),
    (
        QK,
        {"norm_weight_q": zeros(16, dtype=F16)},
        "norm_weight_q must have the dtype of qkv, torch.bfloat16, got torch.float16",
    ),
    (
        QK,
        {"norm_weight_q": zeros(8)},
        "norm_weight_q must have shape [D] with D = q_size = 16, got [8]",
    ),
    (
        QK,
        {"norm_weight_k": zeros(8, dtype=F16)},
        "norm_weight_k must have the dtype of qkv, torch.bfloat16, got torch.float16",
    ),
    (
        QK,
        {"norm_weight_k": zeros(16)},
        "norm_weight_k must have shape [D] with D = kv_size = 8, got [16]",
    ),
    (
        QK,
        {"norm_weight_k": zeros(16)[::2]},
        "norm_weight_k must be contiguous, got strides [2] for shape [8]",
    ),
    (
        QK,
        {"qkv": zeros(1, 32).expand(2**24, -1)},
        "qkv must have fewer than 2^24 tokens for several ranks, got 16777216",
    ),
    (QK, {"nranks": 17}, f"{NRANKS} 17"),
    (QK, {"rank": 2}, f"{RANK} 2"),
    (QK, {"eps": float("nan")}, f"{EPS} nan"),
    (
        QK,
        {"workspace": torch.zeros(7, dtype=torch.int64)},
        "workspace must have shape [3 * nranks + 2] or more with nranks = 2, got [7]",
    ),
]


def case_id(case: Any) -> str | None:
    if not isinstance(case, dict):
        return case if isinstance(case, str) and case in GOOD else ""
    return ",".join(case)


@pytest.mark.parametrize("via", ["check", "cpu"])
@pytest.mark.parametrize(("op", "changes", "message"), BAD, ids=case_id)
def test_call(op: str, changes: dict[str, Any], message: str, via: str) -> None:
    """From the checks alone, and from the operator on CPU tensors."""
    arguments = {**GOOD[op], **changes}
    function = getattr(private, f"_check_{op}" if via == "check" else op)
    expected = re.escape(f"minimax_rms::{op}: {message}")
    with pytest.raises(RuntimeError, match=f"^{expected}$"):
        function(*arguments.values())


def test_many_tokens_of_several_ranks() -> None:
    """What ranks tell each other has no room for as many; a single rank tells no one."""
    check = private._check_minimax_allreduce_rms
    for num_tokens, nranks in ((2**24 - 1, 2), (2**24, 1)):
        arguments = {**GOOD[ONE], "input": zeros(1, 16).expand(num_tokens, -1), "rank": 0}
        check(*{**arguments, "nranks": nranks}.values())
    message = r"input must have fewer than 2\^24 tokens for several ranks, got 16777216$"
    with pytest.raises(RuntimeError, match=message):
        check(*{**arguments, "nranks": 2}.values())


@pytest.mark.parametrize("op", GOOD)
def test_good_arguments_pass(op: str) -> None:
    check = getattr(private, f"_check_{op}")
    first, weight = list(GOOD[op])[:2]
    for changes in (
        {},
        {"rank": 0, "eps": 0.0},
        {"workspace": torch.zeros(100, dtype=torch.int64)},
        {"workspace": workspace(16), "nranks": 16, "rank": 15},
        # A single rank has no use for a workspace.
        {"workspace": torch.zeros(0), "nranks": 1, "rank": 0},
        {first: GOOD[op][first][:0]},
        {first: GOOD[op][first][:1]},
        {first: strided(5, GOOD[op][first].shape[1], 40, offset=8)},
        {weight: zeros(32)[8:24]},
    ):
        assert check(*{**GOOD[op], **changes}.values()) is None
    for dtype in (F16, F32):
        arguments = [
            value.to(dtype) if isinstance(value, Tensor) and value.dtype == BF16 else value
            for value in GOOD[op].values()
        ]
        assert check(*arguments) is None


def test_no_k() -> None:
    changes = {"qkv": zeros(5, 16), "norm_weight_k": zeros(0), "kv_size": 0}
    private._check_minimax_allreduce_rms_qk(*{**GOOD[QK], **changes}.values())


@pytest.mark.parametrize(
    ("op", "method"), [(ONE, "allreduce_rms"), (QK, "allreduce_rms_qk")], ids=str
)
def test_cpu_tensors_have_no_peers(op: str, method: str) -> None:
    expected = re.escape(
        f"minimax_rms::{op}: nranks must be 1 for CPU tensors, which have no peers to reach, got "
        f"2; minimax_rms.Workspace.{method} takes them to torch.distributed"
    )
    with pytest.raises(RuntimeError, match=f"^{expected}$"):
        getattr(ops, op)(**GOOD[op])


def test_wrong_number_of_arguments() -> None:
    message = r"minimax_rms::minimax_allreduce_rms\(\) is missing value for"
    with pytest.raises(RuntimeError, match=message):
        private.minimax_allreduce_rms(zeros(1, 8), zeros(8))


def handle(*shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


# No allocation gets as far as this address.
UNKNOWN = 2**40
SECONDS = "seconds must be in (0, 1e9), got"
MULTIPROCESSORS = "num_multiprocessors must be in [1, 65536], got"
UNKNOWN_ADDRESS = "address must be what _allocate or _open returned and not be freed yet, got"

SETTING_UP: dict[str, tuple[Callable[[], Any], str]] = {
    "_choose_tuning no rank": (lambda: private._choose_tuning(4096, 0, 1, 132), f"{NRANKS} 0"),
    "_choose_tuning ranks": (lambda: private._choose_tuning(4096, 17, 1, 132), f"{NRANKS} 17"),
    "_choose_tuning no row": (
        lambda: private._choose_tuning(0, 2, 1, 132),
        "row_bytes must be a positive multiple of 16, got 0",
    ),
    "_choose_tuning row": (
        lambda: private._choose_tuning(24, 2, 1, 132),
        "row_bytes must be a positive multiple of 16, got 24",
    ),
    "_choose_tuning tokens": (
        lambda: private._choose_tuning(4096, 2, 0, 132),
        "num_tokens must be in [1, 2^36), got 0",
    ),
    "_choose_tuning too many tokens": (
        lambda: private._choose_tuning(4096, 2, 2**36, 132),
        f"num_tokens must be in [1, 2^36), got {2**36}",
    ),
    "_choose_tuning multiprocessors": (
        lambda: private._choose_tuning(4096, 2, 1, 0),
        f"{MULTIPROCESSORS} 0",
    ),
    "_choose_tuning many multiprocessors": (
        lambda: private._choose_tuning(4096, 2, 1, 2**16 + 1),
        f"{MULTIPROCESSORS} 65537",
    ),
    "_comm_size no rank": (lambda: private._comm_size(0, 1), f"{NRANKS} 0"),
    "_comm_size ranks": (lambda: private._comm_size(17, 1), f"{NRANKS} 17"),
    "_comm_size zero": (
        lambda: private._comm_size(2, 0),
        "max_tokens must be in [1, 2^24), got 0",
    ),
    "_comm_size huge": (
        lambda: private._comm_size(2, 2**24),
        f"max_tokens must be in [1, 2^24), got {2**24}",
    ),
    "_max_tokens ranks": (lambda: private._max_tokens(17, 1024), f"{NRANKS} 17"),
    "_max_tokens negative": (
        lambda: private._max_tokens(2, -1),
        "comm_size must be in [0, 2^48), got -1",
    ),
    "_max_tokens huge": (
        lambda: private._max_tokens(2, 2**48),
        f"comm_size must be in [0, 2^48), got {2**48}",
    ),
    "_allocate zero": (
        lambda: private._allocate(0),
        "num_bytes must be a positive multiple of 8, got 0",
    ),
    "_allocate odd": (
        lambda: private._allocate(12),
        "num_bytes must be a positive multiple of 8, got 12",
    ),
    "_open dtype": (
        lambda: private._open(handle(64, dtype=torch.int8)),
        "handle must be torch.uint8, got torch.int8",
    ),
    "_open length": (
        lambda: private._open(handle(63)),
        "handle must have shape [64], got [63]",
    ),
    "_open strides": (
        lambda: private._open(handle(128)[::2]),
        "handle must be contiguous, got strides [2] for shape [64]",
    ),
    "_free": (lambda: private._free(UNKNOWN), f"{UNKNOWN_ADDRESS} {UNKNOWN}"),
    "_free null": (lambda: private._free(0), f"{UNKNOWN_ADDRESS} 0"),
    "_register device": (
        lambda: private._register(workspace(2), 0, 2, 8, 132, 1.0),
        "workspace must be on a CUDA device, got cpu",
    ),
    "_register rank": (
        lambda: private._register(workspace(2), 2, 2, 8, 132, 1.0),
        f"{RANK} 2",
    ),
    "_set_timeout zero": (lambda: private._set_timeout(workspace(2), 0.0), f"{SECONDS} 0"),
    "_set_timeout negative": (lambda: private._set_timeout(workspace(2), -2.5), f"{SECONDS} -2.5"),
    "_set_timeout inf": (
        lambda: private._set_timeout(workspace(2), float("inf")),
        f"{SECONDS} inf",
    ),
    "_set_timeout unknown": (
        lambda: private._set_timeout(workspace(2), 1.0),
        "workspace must be registered",
    ),
    "_set_timeout dtype": (
        lambda: private._set_timeout(workspace(2).int(), 1.0),
        "workspace must be torch.int64, got torch.int32",
    ),
    "_missing_ranks dtype": (
        lambda: private._missing_ranks(workspace(2).int()),
        "workspace must be torch.int64, got torch.int32",
    ),
    "_announce_close rank": (lambda: private._announce_close([16, 32], 2), f"{RANK} 2"),
    "_announce_close ranks": (lambda: private._announce_close([], 0), f"{NRANKS} 0"),
}


@pytest.mark.parametrize("case", SETTING_UP)
def test_setting_up(case: str) -> None:
    call, expected = SETTING_UP[case]
    name = case.split(" ")[0]
    with pytest.raises(RuntimeError, match=f"^{re.escape(f'minimax_rms::{name}: {expected}')}$"):
        call()


def test_a_workspace_without_calls_has_not_failed() -> None:
    private._check(workspace(2))
    assert private._missing_ranks(workspace(2)) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_device() -> None:
    for call in (lambda: private._allocate(1024), lambda: private._open(handle(64))):
        with pytest.raises(RuntimeError, match=r"."):
            call()
