"""Every operation, forward and backward, on small problems on a GPU: for compute-sanitizer.

No side and no width is a multiple of a tile, so that a wrong mask reads or writes what is not its
own. `make gpu-check` runs it, without PyTorch's cache of memory, in which that would go unnoticed.
"""

from conftest import draw
from test_gpu import differentiate, multiplying, on_device, operation

from idml_fast import backend


def main() -> None:
    for arithmetic in ("ieee", "bf16"):
        with multiplying(arithmetic) as dtype:
            for op in backend.OPERATIONS:
                for m in (130, None):
                    inputs = on_device(draw(139, m, 83, 41, dtype=dtype))
                    found = differentiate(operation(op, 139, m), inputs)
                    assert all(x.isfinite().all() for x in found.values()), (op, m, arithmetic)


if __name__ == "__main__":
    main()
