"""Training on image files, stopped and resumed: learn the digits 0 to 4, find the unseen 5 to 9.

The digits of scikit-learn are written as PNG files, in the layout of CUB-200-2011, whose classes up
to 100 are learned and whose others are retrieved. A small network of timm learns them. It is
stopped by SIGTERM half way, as where a machine is needed elsewhere, and the same command goes on.
"""

import argparse
import sys
import time
from multiprocessing import get_context
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_digits

from idml_fast.cli import STOPPED, main

CLASSES = (
    *("001.zero", "002.one", "003.two", "004.three", "005.four"),
    *("101.five", "102.six", "103.seven", "104.eight", "105.nine"),
)
MODES = "L", "P", "RGB"  # grey, with a palette, with colours
SIDE = 48  # of an image, in pixels; the digits have 8 x 8


def write_digits(root: Path, most: int) -> None:
    """At most so many images of each class."""
    found = load_digits()
    for digit, name in enumerate(CLASSES):
        folder = root / "CUB_200_2011" / "images" / name
        folder.mkdir(parents=True, exist_ok=True)
        for number, pixels in enumerate(found.images[found.target == digit][:most]):
            small = Image.fromarray((pixels * 255 / 16).astype("uint8"))  # of sixteen grey levels
            large = small.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
            large.convert(MODES[number % len(MODES)]).save(folder / f"{number:03}.png")


def train(arguments: list[str], stop_at: Path | None = None) -> int:
    """The exit status of ``idml-fast train``, in a process of its own.

    Args:
        stop_at: SIGTERM is sent once there is a new file in this folder whose name begins with
            ``introspective``.
    """
    print("\n$ idml-fast train", *arguments, flush=True)
    process = get_context("fork").Process(target=command, args=(arguments,))
    there = set() if stop_at is None else set(stop_at.glob("introspective*"))
    process.start()
    while stop_at is not None and process.is_alive():
        if set(stop_at.glob("introspective*")) - there:
            process.terminate()
            break
        time.sleep(0.1)
    process.join()
    return process.exitcode


def command(arguments: list[str]) -> None:
    sys.exit(main(["train", *arguments]))


def demo() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", default="runs", help="where all is written (runs)")
    parser.add_argument("--most", type=int, default=100, help="images of each class (100)")
    given, more = parser.parse_known_args()
    data = Path(given.folder, "digits_as_files")
    write_digits(data, given.most)
    settings = {
        "--name": "demo-images",
        "--run.folder": given.folder,
        "--run.overwrite": "true",
        "--data.name": "cub",
        "--data-root": str(data),
        "--data.resize": str(SIDE),
        "--data.image_size": str(SIDE),
        "--data.workers": "2",
        "--model.backbone": "test_resnet",
        "--model.pretrained": "false",
        "--model.freeze_norm": "false",
        "--data.batch_size": "50",
        "--optim.lr": "1e-3",
        "--optim.epochs": "6",
    }
    arguments = [word for setting in settings.items() for word in setting] + more
    status = train(arguments, stop_at=Path(given.folder, "demo-images", "checkpoints"))
    if status != STOPPED:
        print(f"the run must be stopped with status {STOPPED}, got {status}", file=sys.stderr)
        return 1
    print(f"exit status {status}: the same command goes on", flush=True)
    return train(arguments)


if __name__ == "__main__":
    sys.exit(demo())
