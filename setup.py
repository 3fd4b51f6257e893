"""Builds the native modules `_C` and `_gpu` with CMake; everything else is in pyproject.toml."""

import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Builds all modules in one run; `pip install -e .` then copies them into the source tree."""

    def build_extensions(self) -> None:
        destination = Path(self.get_ext_fullpath(self.extensions[0].name)).resolve().parent
        build = Path(self.build_temp).resolve()
        configure = [
            "cmake", "-S", ROOT, "-B", build, "-G", "Ninja",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]  # fmt: skip
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", build], check=True)
        subprocess.run(["cmake", "--install", build, "--prefix", destination], check=True)
        # Without nvcc there is no `_gpu`.
        self.extensions = [
            ext for ext in self.extensions if Path(self.get_ext_fullpath(ext.name)).exists()
        ]


setup(
    ext_modules=[Extension(f"idml_fast.{name}", sources=[]) for name in ("_C", "_gpu")],
    cmdclass={"build_ext": CMakeBuild},
)
