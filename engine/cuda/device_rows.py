"""What a rank knows of its rows, on the device: tokens, block tables, sampling parameters.

All of it lies in one array of int32 words, so that every change a plan brings is a span of words at an address, and one
kernel writes them all. The last row is nobody's: padding of a step points to it. Its table is null blocks only.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from treadle.engine.sampling.device_params import WORDS, DeviceParams, pack_params
from treadle.errors import ConfigError
from treadle.transport.codec import unpack
from treadle.transport.messages import RowStart

from .row_ops import RowOps
from .staging import Field, Layout, Staging, Words, aligned

Int64 = npt.NDArray[np.int64]
_DELTA_WORDS = 1 << 18
_DELTA_TURNS = 3
# A started row is a span of tokens, one of blocks and one of sampling parameters.
_SPANS = 3
_MOST_WORDS = 1 << 31


class DeviceRows:
    """history: int32 [max_rows + 1, width], a row's tokens, sampled ones included. table: int32 [max_rows + 1, pages].

    parameters: of sampling, by row. `spare` is the number of nobody's row, which is greedy; `trash` is an address in
    its history, for what is written and never read.
    """

    def __init__(
        self, max_rows: int, max_len: int, block_size: int, vocab_size: int, ops: RowOps, device: torch.device
    ) -> None:
        rows, width = max_rows + 1, aligned(max_len + 1)
        pages = aligned(-(-max_len // block_size))
        sizes = (rows * width, rows * pages, rows * 2 * WORDS)
        bases = np.cumsum([0, *map(aligned, sizes)]).tolist()
        if bases[2] >= _MOST_WORDS:
            raise ConfigError(f"max_num_seqs={max_rows} rows of max_model_len={max_len} tokens: too many together")
        self.max_rows = self.spare = max_rows
        self.block_size = block_size
        self.vocab_size = vocab_size
        self.ops = ops
        self._arena = torch.zeros(bases[-1], dtype=torch.int32, device=device)
        parts = [self._arena[base : base + size] for base, size in zip(bases, sizes, strict=False)]
        self.history = parts[0].view(rows, width)
        self.table = parts[1].view(rows, pages)
        self.parameters = DeviceParams(parts[2].view(torch.int64).view(rows, WORDS), vocab_size)
        self.trash = max_rows * width + width - 1
        self._table_base, self._parameter_base = bases[1], bases[2]
        longest = width + pages + 2 * WORDS + self._overhead(_SPANS)
        self._staging = Staging(max(_DELTA_WORDS, longest), _DELTA_TURNS, device)

    @property
    def nbytes(self) -> int:
        return int(self._arena.nbytes + self._staging.device.nbytes)

    def history_address(self, rows: Int64, positions: Int64) -> Int64:
        return rows * self.history.shape[1] + positions

    def table_address(self, rows: Int64, pages: Int64) -> Int64:
        return rows * self.table.shape[1] + pages

    def start(self, starts: Sequence[RowStart]) -> None:
        """Takes rows over: tokens, blocks, sampling parameters."""
        spans: list[int] = []
        data: list[Words] = []
        words = 0
        for start in starts:
            pieces = self._pieces(start)
            size = sum(len(piece) for _, piece in pieces)
            if spans and words + size + self._overhead(len(spans) + len(pieces)) > self._staging.words:
                self._write(spans, data)
                spans, data, words = [], [], 0
            spans += [address for address, _ in pieces]
            data += [piece for _, piece in pieces]
            words += size
        self._write(spans, data)

    def grow(self, rows: Int64, pages: Int64, blocks: npt.NDArray[np.int32]) -> None:
        """Enters blocks into tables, outside of a graph."""
        addresses = (self.table_address(rows, pages) + self._table_base).tolist()
        self._write(addresses, list(blocks.astype(np.int32).reshape(-1, 1)))

    def _pieces(self, start: RowStart) -> list[tuple[int, Words]]:
        row = start.row
        return [
            (row * self.history.shape[1], unpack(start.tokens)),
            (self._table_base + row * self.table.shape[1], unpack(start.blocks)),
            (self._parameter_base + row * 2 * WORDS, pack_params(start, self.vocab_size).view(np.int32)),
        ]

    def _overhead(self, spans: int) -> int:
        return aligned(6 * spans) + 4

    def _write(self, addresses: list[int], data: list[Words]) -> None:
        if not addresses:
            return
        lengths = np.array([len(piece) for piece in data], np.int64)
        ends = np.cumsum(lengths)
        layout = Layout([Field(3 * len(data), wide=True), Field(int(ends[-1]), wide=False)])
        spans, words = layout.host(self._staging.take())
        spans[:] = np.concatenate((np.array(addresses, np.int64), ends - lengths, lengths))
        np.concatenate(data, out=words)
        self._staging.send(layout.end)
        on_device = layout.device(self._staging.device)
        self.ops.write_spans(self._arena, on_device[0].view(3, -1), on_device[1], max(int(lengths.max()), 1))
