"""torchvision beside a torch of another build: ``python tests/any_torchvision.py SCRIPT``.

The compiled operators of torchvision load beside the build of torch that they were compiled for:
those of its usual wheel not beside a torch for CPUs alone. Its Python code then describes operators
that nobody has defined, and cannot be imported, nor can what imports it (timm, Lightning).
Nothing here calls them: it is enough to define them.
"""

import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

import torch


def define_missing_operators() -> None:
    """Define the operators that torchvision's Python code describes, if its own do not load and
    nobody has defined them yet."""
    found = find_spec("torchvision")
    if found is None:
        return
    try:
        for library in Path(found.origin).parent.glob("_C*"):
            torch.ops.load_library(library)
    except OSError:
        for name in ("nms", "qnms"):
            if not hasattr(torch.ops.torchvision, name):
                arguments = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                torch.library.define(f"torchvision::{name}", arguments)


if __name__ == "__main__":
    define_missing_operators()
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
