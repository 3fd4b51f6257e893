"""Every operation, forward and backward, on small problems on a GPU: for compute-sanitizer.

No side and no width is a multiple of a tile, so that a wrong mask reads or writes what is not its
own. `make gpu-check` runs it, without PyTorch's cache of memory, in which that would go unnoticed.
"""

from conftest import draw
from test_gpu import differentiate, multiplying, on_device, operation

from idml_fast import backend

# Rows, columns and widths. The CUDA kernels read 16 bytes at a time; of many tiles some blocks of
# theirs take several.
SMALL, ALIGNED, MANY = (139, 130, 83, 41), (139, 130, 88, 40), (1540, 1410, 8, 8)


def main(kernels: str = "cuda") -> None:
    for arithmetic in ("ieee", "bf16"):
        for op in backend.OPERATIONS:
            run(op, arithmetic, SMALL)
    for arithmetic in ("tf32", "bf16"):
        for op in backend.KERNELS["cuda"]:
            run(op, arithmetic, ALIGNED, kernels)
    run("pairwise", "bf16", MANY, kernels)


def run(op: str, arithmetic: str, shape: tuple[int, ...], kernels: str | None = None) -> None:
    """Two sets, and rows against themselves."""
    n, m, ds, du = shape
    for cols in (m, None):
        with multiplying(arithmetic) as dtype:
            inputs = on_device(draw(n, cols, ds, du, dtype=dtype))
            found = differentiate(operation(op, n, cols), inputs, backend=kernels)
            assert all(x.isfinite().all() for x in found.values()), (op, cols, arithmetic)


if __name__ == "__main__":
    main()
