"""Ranks that do not run: what they send of a call is written by hand where a peer would write it.

This and ``pretend_calls`` are all that the tests know of what is in a communication buffer;
``csrc/rms_norm.h`` and ``peer_call.h`` have it in full.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from minimax_cases import Problem
from minimax_local_ranks import LocalRanks
from torch import Tensor

MAX_RANKS = 16
WORD_BYTES = 8
HEADER_BYTES = 768
LINE_BYTES = 128
CLOSED = 48  # the first of the words of the header that say which peers have closed
# Words of the header that are its owner's, after those that peers write.
BEGUN, COMPLETED, CLAIMED = 64, 65, 66
CALL_SHIFT = 40
ELEMENT_TYPES = (torch.float32, torch.float16, torch.bfloat16)
EMPTY_WORD = 0x8000000080000000  # what new memory is full of, and a header's zero


def as_int64(word: int) -> int:
    word %= 1 << 64
    return word - (1 << 64) if word >= 1 << 63 else word


def header_word(value: int) -> int:
    """As it is stored."""
    return as_int64(value + EMPTY_WORD)


def words_of(ranks: LocalRanks, rank: int) -> Tensor:
    """A rank's communication buffer in words."""
    return ranks.buffer(rank).view(torch.int64)


def slot_of(ranks: LocalRanks, rank: int, call: int) -> Tensor:
    """The words of a call's tokens and ranks, [T, nranks], in ``rank``'s buffer."""
    slot_bytes = (3 * ranks.comm_size - HEADER_BYTES) // 2 // LINE_BYTES * LINE_BYTES
    begin = (HEADER_BYTES + call % 2 * slot_bytes) // WORD_BYTES
    num_tokens = slot_bytes // WORD_BYTES // ranks.nranks
    words = words_of(ranks, rank)[begin : begin + num_tokens * ranks.nranks]
    return words.view(num_tokens, ranks.nranks)


def descriptor_index(call: int, rank: int) -> int:
    return call % 2 * MAX_RANKS + rank


def descriptor(problem: Problem, call: int) -> int:
    """As it is stored: the call's number, and what ranks must agree on."""
    itemsize = problem.dtype.itemsize
    q_row, k_row = (width * itemsize for width in (*problem.widths, 0)[:2])
    signature = torch.ops.minimax_rms._descriptor(
        problem.num_tokens,
        *(q_row, k_row, ELEMENT_TYPES.index(problem.dtype), problem.eps),
        len(problem.widths) == 2,
    )
    return header_word(call << CALL_SHIFT | signature)


def sums_of(problem: Problem) -> Tensor:
    """What the ranks send: sums of squares in float32, [nranks, T, 2], of q and of k."""
    sums = torch.zeros(problem.nranks, problem.num_tokens, 2, device=problem.inputs[0].device)
    for rank in range(problem.nranks):
        for index, part in enumerate(problem.parts(rank)):
            sums[rank, :, index] = part.double().square().sum(dim=1)
    return sums


def as_words(sums: Tensor) -> Tensor:
    """[..., 2] in words [...]: q in the lower half."""
    return sums.contiguous().view(torch.int64).squeeze(-1)


class ForgedPeers:
    """The peers of ``rank``. They work on the current stream."""

    def __init__(self, ranks: LocalRanks, rank: int = 0) -> None:
        self.ranks = ranks
        self.rank = rank
        self.peers = [peer for peer in range(ranks.nranks) if peer != rank]
        self._words = words_of(ranks, rank)

    def announce(self, problem: Problem, call: int, peers: Sequence[int] | None = None) -> None:
        """Say that the peers make this call."""
        for peer in self.peers if peers is None else peers:
            self._words[descriptor_index(call, peer)].fill_(descriptor(problem, call))

    def send(
        self,
        sums: Tensor,
        call: int,
        tokens: slice = slice(None),
        peers: Sequence[int] | None = None,
    ) -> None:
        """Send what of ``sums``, [nranks, T, 2], is of these tokens and peers."""
        ranks = self.ranks
        slot = slot_of(ranks, self.rank, call)
        places = ranks.ops._places(ranks.nranks, ranks.comm_size, sums.shape[1])
        where = torch.tensor(places, device=sums.device)[tokens]
        words = as_words(sums)
        for peer in self.peers if peers is None else peers:
            slot[where, peer] = words[peer, tokens]

    def inbox_is_empty(self) -> bool:
        """Whether the rank has emptied all that it was sent."""
        slots = [slot_of(self.ranks, self.rank, call) for call in (0, 1)]
        return all(bool((slot == as_int64(EMPTY_WORD)).all()) for slot in slots)


def pretend_calls(ranks: LocalRanks, count: int) -> None:
    """Let all ranks go on as if they had made ``count`` calls."""
    for rank in range(ranks.nranks):
        words = words_of(ranks, rank)
        words[BEGUN] = words[COMPLETED] = header_word(count << 32)
        words[CLAIMED] = header_word(count % (1 << 32))
    torch.cuda.synchronize()
