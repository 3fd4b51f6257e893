"""What the compiled CUDA kernels take of a GPU: registers, stack, matrix instructions.

    python -m idml_fast._cuda.resources [--json]

reads the module `_gpu` that is installed, by cuobjdump: that of the CUDA toolkit, or Triton's.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

FORMS = "distance", "cosine", "official"
DTYPES = {"f": "float32", "NS_8Bfloat16E": "bfloat16", "NS_7Float16E": "float16"}
# A kernel's name as the linker has it.
NAME = re.compile(
    r"(?P<walk>ampere|hopper)\d+(?P<kernel>walk_tiles|walk_again)"
    rf"I(?P<dtype>{'|'.join(DTYPES)})LNS_4FormE(?P<form>\d)E.*"
    r"\d(?P<epilogue>StoreKeys|Store|Load|Reduce|Differentiate)[EI]"
)
EPILOGUES = {
    "Store": "pairwise",
    "Load": "pairwise backward",
    "Reduce": "rowstats",
    "Differentiate": "rowstats backward",
    "StoreKeys": "nearest",
}


class Row(NamedTuple):
    """A kernel for an architecture."""

    architecture: str
    epilogue: str
    dtype: str
    form: str
    kernel: str
    registers: int
    stack: int  # bytes of a thread: spills, and all other local memory
    matrix_instructions: int  # HMMA or HGMMA


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="a line of JSON a kernel")
    told = parser.parse_args()
    if not told.json:
        print("  ".join(Row._fields))
    for row in rows():
        print(json.dumps(row._asdict()) if told.json else "  ".join(map(str, row)))


def rows() -> Iterator[Row]:
    """Every kernel of the module, but those that have no code for an architecture."""
    products: Counter[tuple[str, str]] = Counter()
    for architecture, name, line in _lines("-sass", r"Function : (\S+)"):
        products[architecture, name] += bool(re.search(r"\bHG?MMA\b", line))
    for architecture, name, line in _lines("-res-usage", r"Function (\S+):"):
        used = re.match(r"\s*REG:(\d+) STACK:(\d+)", line)
        if used is None:
            continue
        kernel = NAME.search(name)
        # Hopper has a walk over all tiles of its own, where the other one is empty, and vice versa.
        elsewhere = (kernel["walk"] == "hopper") != (architecture == "90a")
        if kernel["kernel"] == "walk_tiles" and elsewhere:
            continue
        yield Row(
            architecture,
            EPILOGUES[kernel["epilogue"]],
            DTYPES[kernel["dtype"]],
            FORMS[int(kernel["form"])],
            f"{kernel['walk']} {kernel['kernel']}",
            *map(int, used.groups()),
            products[architecture, name],
        )


def _lines(what: str, function: str) -> Iterator[tuple[str, str, str]]:
    """What cuobjdump tells, each line with its architecture and its function."""
    tool = shutil.which("cuobjdump")
    if tool is None:
        import triton

        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    module = importlib.util.find_spec("idml_fast._gpu").origin
    architecture = name = ""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}  # it warns of its own formats
    with subprocess.Popen([tool, what, module], **pipes, text=True) as ran:
        for line in ran.stdout:
            if found := re.match(r"\s*arch = sm_(\w+)", line):
                architecture = found[1]
            elif found := re.match(rf"\s*{function}", line):
                name = found[1]
            yield architecture, name, line
    if ran.returncode != 0:
        raise RuntimeError(f"{tool} {what} ended with exit code {ran.returncode}")


if __name__ == "__main__":
    main()
