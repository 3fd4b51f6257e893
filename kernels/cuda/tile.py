"""The walk over tiles of pairs by the CUDA kernels: `idml_fast._triton.tile.Walk` with another
launch, whose epilogues are the twins of those in Triton."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from idml_fast._triton import configs, gradient, nearest, pairwise, rowstats, tile
from torch import Tensor

from idml_fast import _gpu


class Walk(tile.Walk):
    """All pairs of rows and columns."""

    finishes = False

    def configure(self, purpose: str) -> configs.Config:
        return configs.Config(_gpu.TILE, _gpu.TILE, 0, 0, 0)

    def launch(
        self,
        chunk: tile.Chunk,
        epilogue: Any,
        arguments: tuple[Any, ...],
        upstream: Any = None,
        statistics: tuple[Any, ...] = (),
    ) -> None:
        programs = self.programs(chunk)
        flags = torch.empty(programs, dtype=torch.int8, device=self.device)
        inverse_tau, gamma, _ = (0.0, 0.0, None) if self.metric[0] is None else self.metric
        name, native = EPILOGUES[epilogue, upstream](arguments, statistics)
        with on_device(self.device) as stream:
            try:
                walk = _gpu.Walk(
                    *(_items(*x) for x in self.measured),
                    *(str(self.dtype).removeprefix("torch."), self.form, inverse_tau, gamma),
                    *(chunk.rows.start, chunk.rows.stop, chunk.cols.start, chunk.cols.stop),
                    *(self.own, self.symmetric, chunk.triangle),
                    *(configs.near_of(self.dtype, "tf32"), programs, flags.data_ptr()),
                )
                getattr(_gpu, name)(walk, *native, stream)
            except RuntimeError as error:
                n, m = chunk.shape
                raise RuntimeError(f"the CUDA kernel {name} of {n} x {m} pairs: {error}") from error


@contextmanager
def on_device(device: torch.device) -> Iterator[int]:
    """The current stream of a device, which is the current one meanwhile. The kernels' emulation
    takes tensors on the CPU, and no stream."""
    if device.type == "cpu":
        yield 0
    else:
        with torch.cuda.device(device):
            yield torch.cuda.current_stream().cuda_stream


def _items(
    x: Tensor | None, stride: int | None, _: int | None, squares: Tensor | None
) -> _gpu.Items:
    if x is None:
        return _gpu.Items()
    if x.data_ptr() % 16:
        raise RuntimeError("embeddings must begin at multiples of 16 bytes")
    return _gpu.Items(x.data_ptr(), squares.data_ptr(), stride, x.shape[1])


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _pairwise(arguments: tuple[Any, ...], statistics: tuple[Any, ...]) -> tuple[str, list[Any]]:
    scores, stride = arguments
    return "pairwise", [_gpu.Pairs(scores.data_ptr(), stride)]


def _weights(outputs: tuple[Any, ...]) -> _gpu.WeightsTo:
    sem, unc, stride, mirrored, sem_rows, unc_rows, rows, sem_cols, unc_cols, cols, _ = outputs
    return _gpu.WeightsTo(
        *(_address(sem), _address(unc), stride, mirrored is not None),
        *(_address(sem_rows), _address(unc_rows), rows),
        *(_address(sem_cols), _address(unc_cols), cols),
    )


def _weigh_pairwise(
    arguments: tuple[Any, ...], statistics: tuple[Any, ...]
) -> tuple[str, list[Any]]:
    outputs, (upstream, *strides) = arguments
    return "weigh_pairwise", [_weights(outputs), _gpu.Matrix(upstream.data_ptr(), *strides)]


def _statistics(items: tuple[Any, ...], statistics: tuple[Any, ...]) -> _gpu.Statistics:
    numbers, labels, labels2, bounds, stride = items
    fields = rowstats.FIELDS.value
    described = []
    for k in range(len(statistics) // fields):
        reduction, where, power, _, threshold, above, below, value, _, state, _ = statistics[
            k * fields : (k + 1) * fields
        ]
        scale = numbers[k][0]
        described.append(
            _gpu.Statistic(reduction, where, power, scale, threshold, above, below, value, state)
        )
    addresses = _address(labels), _address(labels2), _address(bounds)
    return _gpu.Statistics(described, *addresses, stride)


def _of_tiles(x: tuple[Any, ...] | None) -> _gpu.OfTiles:
    return _gpu.OfTiles() if x is None else _gpu.OfTiles(x[0].data_ptr(), *x[1:])


def _rowstats(arguments: tuple[Any, ...], statistics: tuple[Any, ...]) -> tuple[str, list[Any]]:
    *items, (rows, cols, _) = arguments
    return "rowstats", [_statistics(items, statistics), _of_tiles(rows), _of_tiles(cols)]


def _weigh_rowstats(
    arguments: tuple[Any, ...], statistics: tuple[Any, ...]
) -> tuple[str, list[Any]]:
    outputs, (*items, (upstream, state, count)) = arguments
    learned = _gpu.Learned(upstream.data_ptr(), state.data_ptr(), count)
    return "weigh_rowstats", [_weights(outputs), _statistics(items, statistics), learned]


def _nearest(arguments: tuple[Any, ...], options: tuple[Any, ...]) -> tuple[str, list[Any]]:
    keys, _, stride, labels, labels2, above, _ = arguments
    addresses = _address(labels), _address(labels2), _address(above)
    return "nearest", [_gpu.Keys(keys.data_ptr(), stride, *options, *addresses)]


EPILOGUES = {
    (nearest.store_keys, None): _nearest,
    (pairwise.store, None): _pairwise,
    (gradient.weigh, pairwise.load_upstream): _weigh_pairwise,
    (rowstats.reduce_tile, None): _rowstats,
    (gradient.weigh, rowstats.differentiate): _weigh_rowstats,
}
