"""Launches the CUDA kernels of `nearest`; called through `torch.ops.idml_fast`, checks done."""

from functools import partial

from idml_fast._triton import nearest

from .tile import Walk

forward = partial(nearest.forward, make=Walk)
