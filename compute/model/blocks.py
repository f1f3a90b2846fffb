"""Linear layers whose weights are read by all threads at once, with the same bits.

Theory of operation. A decode step multiplies one row by every weight of the stage, and what it costs is
reading them. torch hands such a product to a library routine (MKL's gemm for float32) that runs it in one
thread, at a third of what memory gives. The same product cut into blocks of output features is a batch of
products, which the library spreads over its threads. Each output stays the dot product of the same two rows,
computed by the same routine, so it comes out the same bit by bit; and where it does not, a trial on loading
says so and that layer stays as it is.

Rows of several sessions (`mycel.compute.model.packed`) go through the blocks too: they are promised to be
right up to rounding, and blocks are faster there as well. A prefill does not: for many rows the library
has other routines, and the bits are to be those of the unsplit model.

How many threads a step uses (`mycel.compute.model.threads`) must not show in the bits either. torch's
attention for one row cuts the past in as many parts as there are threads, so in a step alone only the blocks
run with fewer; a packed forward does so as a whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from mycel.compute.model.threads import levels

BYTES_MIN = 1 << 20
"""Smaller weights are read faster than threads are woken."""
BLOCK_FEATURES_MIN = 32
"""Output features of a block, at least."""
BLOCKS_PER_THREAD = (8, 4, 2, 1)
"""How many blocks for each thread, best first."""
TRIES = 4
"""How many ways of cutting a layer are tried for the same bits."""


class BlockUse:
    """How the forward that runs uses the blocks; shared by the layers of a model."""

    def __init__(self, most: int) -> None:
        self.most = most
        """torch's threads."""
        self.threads = most
        """Those that read blocks; one thread needs none."""
        self.packed = False
        """Whether the rows are those of several sessions."""

    @contextlib.contextmanager
    def alone(self, threads: int) -> Iterator[None]:
        """While a session's rows run by themselves; 0: all threads."""
        self.threads = threads or self.most
        try:
            yield
        finally:
            self.threads = self.most

    @contextlib.contextmanager
    def together(self, threads: int) -> Iterator[None]:
        """While rows of several sessions run; 0: all threads."""
        self.packed = True
        self._run_with(threads or self.most)
        try:
            yield
        finally:
            self.packed = False
            self._run_with(self.most)

    def multiply(self, layer: BlockLinear, rows: torch.Tensor) -> torch.Tensor:
        """`layer.in_blocks(rows)` with the threads at hand."""
        if self.threads == self.most or self.packed:
            return layer.in_blocks(rows)
        torch.set_num_threads(self.threads)
        try:
            return layer.in_blocks(rows)
        finally:
            torch.set_num_threads(self.most)

    def _run_with(self, threads: int) -> None:
        if threads != torch.get_num_threads():
            torch.set_num_threads(threads)


class BlockLinear(nn.Linear):
    """`nn.Linear` that takes a single row in blocks. An instance is a plain layer that changed its class."""

    count: int
    blocks: torch.Tensor
    """The weight as [blocks, in, out / blocks]; the same memory."""
    offsets: torch.Tensor | None
    """The bias as [blocks, 1, out / blocks]."""
    use: BlockUse

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        shape = input.shape
        if input.numel() == self.in_features and self.use.threads > 1:
            out = self.use.multiply(self, input.reshape(1, 1, -1))
            return out.view(*shape[:-1], self.out_features)
        if self.use.packed:
            out = self.use.multiply(self, input.reshape(1, -1, self.in_features))
            return out.transpose(0, 1).reshape(*shape[:-1], self.out_features)
        return functional.linear(input, self.weight, self.bias)

    def in_blocks(self, rows: torch.Tensor) -> torch.Tensor:
        """[1, rows, in] -> [blocks, rows, out / blocks]."""
        each = rows.expand(self.count, -1, -1)
        if self.offsets is None:
            return torch.bmm(each, self.blocks)
        return torch.baddbmm(self.offsets, each, self.blocks)

    def cut(self, count: int) -> None:
        """Have `count` blocks."""
        self.count = count
        self.blocks = self.weight.detach().view(count, -1, self.in_features).transpose(1, 2)
        self.offsets = None if self.bias is None else self.bias.detach().view(count, 1, -1)


def use_blocks(model: nn.Module) -> BlockUse:
    """Turn those layers of `model` into `BlockLinear` that gain by it and give the same bits."""
    use = BlockUse(torch.get_num_threads())
    has_mkl: bool = torch._C.has_mkl
    if use.most > 1 and has_mkl:
        random = torch.Generator().manual_seed(0)
        for module in model.modules():
            if type(module) is nn.Linear and _is_worth_it(module.weight):
                _turn(module, use, torch.randn(2, 1, module.in_features, generator=random))
    return use


def block_counts(features: int, threads: int) -> list[int]:
    """In how many equal blocks `features` can be cut for `threads`, best first: as many for each thread, else
    so many that it matters little if some thread has one less.
    """
    even = [threads * each for each in BLOCKS_PER_THREAD]
    uneven = range(even[0], threads, -1)
    found = dict.fromkeys((*even, *uneven))
    return [n for n in found if features % n == 0 and features // n >= BLOCK_FEATURES_MIN]


def _turn(module: Any, use: BlockUse, rows: torch.Tensor) -> None:
    """Make an `nn.Linear` a `BlockLinear` if `rows` come out the same."""
    expected = [module(row) for row in rows]
    module.__class__, module.use = BlockLinear, use
    for count in block_counts(module.out_features, use.most)[:TRIES]:
        module.cut(count)
        if _is_same(module, rows, expected):
            return
    module.__class__ = nn.Linear


def _is_same(layer: BlockLinear, rows: torch.Tensor, expected: list[torch.Tensor]) -> bool:
    """Whether `rows` give what is `expected`, bit by bit, with any number of threads that use blocks."""
    for threads in levels(layer.use.most)[:-1]:
        with layer.use.alone(threads):
            if not all(torch.equal(layer(row), wanted) for row, wanted in zip(rows, expected, strict=True)):
                return False
    return True


def _is_worth_it(weight: torch.Tensor) -> bool:
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and weight.is_contiguous()
        and weight.nbytes >= BYTES_MIN
    )
