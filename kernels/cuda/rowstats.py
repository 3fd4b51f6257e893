"""Launches the CUDA kernels of `rowstats`; called through `torch.ops.idml_fast`, checks done."""

from functools import partial

from idml_fast._triton import rowstats

from .tile import Walk

forward = partial(rowstats.forward, make=Walk)
backward = partial(rowstats.backward, make=Walk)
