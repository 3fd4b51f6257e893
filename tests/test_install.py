"""The source distribution builds a wheel that works elsewhere; importing it is light."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LEFT_OUT = shutil.ignore_patterns(
    ".*", "build", "dist", "runs", "__pycache__", "*.egg-info", "_C.*", "_gpu.*", "*.pyd"
)
NVCC = ("CUDACXX", "CUDA_HOME", "IDML_FAST_CUDA_ARCHS")  # what tells CMake of it
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on the PATH")


def run(*command, cwd, path="", **environment):
    """The output of a command; what it says when it fails is the test's message."""
    environment = {**os.environ, "PYTHONPATH": str(path), **environment}
    ran = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


@pytest.fixture(scope="module")
def build_tools(tmp_path_factory):
    """A folder for PYTHONPATH with what the build needs; empty where this environment has it."""
    folder = tmp_path_factory.mktemp("tools")
    needed = PROJECT["build-system"]["requires"]
    names = [re.match(r"[\w-]+", requirement)[0] for requirement in needed]
    if not all(importlib.util.find_spec(name) for name in names):
        constraints = ROOT / "constraints.txt"
        pip = sys.executable, "-m", "pip", "install", "--quiet", "--no-warn-script-location"
        run(*pip, "--target", folder, "-c", constraints, *needed, cwd=folder)
    return folder


def path_with(tools):
    """The PATH with the scripts of the tools: cmake and ninja."""
    folders = tools / "bin", Path(sys.executable).parent, os.environ["PATH"]
    return os.pathsep.join(map(str, folders))


def build(hook, source, destination, tools, **environment):
    """Calls a hook of the build backend as an installer does, in `source`; the file it made.

    Without the CUDA kernels, which take minutes.
    """
    destination.mkdir()
    code = (
        "import sys, setuptools.build_meta as backend;"
        f"sys.path.insert(0, '.'); backend.{hook}({str(destination)!r})"
    )
    environment = {"PATH": path_with(tools), "IDML_FAST_CUDA_ARCHS": "none"} | environment
    run(sys.executable, "-c", code, cwd=source, path=tools, **environment)
    (made,) = destination.iterdir()
    return made


@pytest.fixture
def configure(tmp_path, build_tools):
    """Runs CMake as setup.py does, with further arguments; it compiles nothing of ours."""
    python = sys.executable, "-m", "pybind11", "--cmakedir"
    pybind11 = run(*python, cwd=tmp_path, path=build_tools).strip()
    known = {name: x for name, x in os.environ.items() if name not in NVCC}
    known |= {"PATH": path_with(build_tools), "PYTHONPATH": str(build_tools)}

    def configured(*options, **environment):
        command = ["cmake", "-S", ROOT, "-B", tmp_path / "build", "-G", "Ninja", *options]
        command += [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11}"]
        ran = subprocess.run(
            command, env=known | environment, capture_output=True, text=True, check=False
        )
        return ran.returncode == 0, " ".join((ran.stdout + ran.stderr).split())  # as one line

    return configured


@pytest.fixture
def broken_nvcc(tmp_path):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\nexit 1\n")
    nvcc.chmod(0o755)
    return str(nvcc)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory, build_tools):
    folder = tmp_path_factory.mktemp("sdist")
    shutil.copytree(ROOT, folder / "source", ignore=LEFT_OUT)
    return build("build_sdist", folder / "source", folder / "dist", build_tools)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory, sdist, build_tools):
    """Built from the source distribution alone."""
    folder = tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (source,) = folder.iterdir()
    return build("build_wheel", source, folder / "dist", build_tools)


@pytest.fixture(scope="module")
def site(tmp_path_factory, wheel):
    """A folder with the wheel installed, to be put on the path."""
    folder = tmp_path_factory.mktemp("site")
    pip = sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"
    run(*pip, "--no-warn-script-location", "--target", folder, wheel, cwd=folder)
    return folder


def sources():
    """Every module and data file of the package, as they are called in a wheel."""
    package = {p: p.relative_to(ROOT) for p in (ROOT / "idml_fast").rglob("*")}
    for kind in (ROOT / "kernels").iterdir():
        inside = Path(f"idml_fast/_{kind.name}")
        package |= {p: inside / p.relative_to(kind) for p in kind.rglob("*")}
    kept = (".py", ".yaml", ".j2", ".csv")
    return {str(name) for path, name in package.items() if path.suffix in kept}


def test_the_sdist_holds_what_is_needed_to_build(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    files = (*(ROOT / "csrc").iterdir(), *(ROOT / "kernels").glob("*/*.*"))
    native = {str(p.relative_to(ROOT)) for p in files}
    assert native | {"CMakeLists.txt", "pyproject.toml", "setup.py", "LICENSE"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyd", ".pyc"))]


def test_the_wheel_holds_every_module_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert sources() <= names
    native = f"idml_fast/_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    assert native in names
    others = {name for name in names - sources() - {native} if ".dist-info/" not in name}
    assert all(name.startswith("idml_fast/_") for name in others)  # the kernels' native sources
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"idml_fast"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.parametrize("modules", [["_C"], ["_C", "_gpu"]])
def test_an_editable_install_puts_what_was_built_into_the_source_tree(
    tmp_path, build_tools, modules
):
    source, bin = tmp_path / "source", tmp_path / "bin"
    shutil.copytree(ROOT, source, ignore=LEFT_OUT)
    bin.mkdir()
    files = [f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}" for name in modules]
    cmake = bin / "cmake"  # stands in for it: installs empty modules
    installed = f"mkdir -p $4 && cd $4 && touch {' '.join(files)}"
    cmake.write_text(f"#!/bin/sh\nif [ $1 = --install ]; then {installed}; fi\n")
    cmake.chmod(0o755)
    path = os.pathsep.join([str(bin), path_with(build_tools)])
    build("build_editable", source, tmp_path / "dist", build_tools, PATH=path)
    assert sorted(p.name for p in (source / "idml_fast").glob("_*.so")) == sorted(files)


@needs_nvcc
def test_with_nvcc_the_kernels_are_compiled_for_the_usual_gpus(configure, tmp_path):
    done, said = configure()
    assert done, said
    assert "CUDA kernels for 80;90a-real" in said
    commands = (tmp_path / "build" / "build.ninja").read_text()
    # PTX for the GPUs to come.
    assert "--generate-code=arch=compute_80,code=[compute_80,sm_80]" in commands
    assert "--generate-code=arch=compute_90a,code=[sm_90a]" in commands
    assert "-DIDML_FAST_HOPPER" in commands
    assert "_gpu" in commands


@needs_nvcc
def test_the_gpus_to_compile_for_can_be_chosen(configure, tmp_path):
    done, said = configure("-DIDML_FAST_CUDA_ARCHS=80-real", IDML_FAST_CUDA_ARCHS="90")
    assert done, said
    assert "CUDA kernels for 80-real: " in said
    commands = (tmp_path / "build" / "build.ninja").read_text()
    assert "--generate-code=arch=compute_80,code=[sm_80]" in commands
    assert "compute_90" not in commands
    assert "-DIDML_FAST_HOPPER" not in commands


@needs_nvcc
def test_a_gpu_that_nvcc_does_not_know_is_an_error(configure):
    done, said = configure(IDML_FAST_CUDA_ARCHS="80;990")
    assert not done
    assert re.search(r"asks for CUDA kernels, but nvcc [\d.]+ does not know 990", said)


@pytest.mark.parametrize("archs", ["none", ""])
def test_the_cuda_kernels_can_be_left_out(configure, tmp_path, archs):
    done, said = configure(IDML_FAST_CUDA_ARCHS=archs)
    assert done, said
    told = f'No CUDA kernels, Triton\'s serve GPUs: IDML_FAST_CUDA_ARCHS is "{archs}"'
    assert told in said
    assert "_gpu" not in (tmp_path / "build" / "build.ninja").read_text()


@pytest.mark.parametrize("archs", ["70", "foo", "80,90a", "80;sm_90a", "80;;90a"])
def test_gpus_that_no_kernel_serves_are_an_error(configure, archs):
    done, said = configure(IDML_FAST_CUDA_ARCHS=archs)
    assert not done
    assert (
        "IDML_FAST_CUDA_ARCHS must be none or a list of architectures from 80 on, such as "
        f"80;90a-real, not {archs}"
    ) in said


def test_without_nvcc_there_are_no_cuda_kernels(configure, tmp_path):
    done, said = configure("-DIDML_FAST_NVCC=OFF", IDML_FAST_CUDA_ARCHS="80-real")
    assert done, said
    assert "No CUDA kernels, Triton's serve GPUs: nvcc was not found" in said
    assert "_gpu" not in (tmp_path / "build" / "build.ninja").read_text()


def test_an_nvcc_that_does_not_work_is_an_error_only_to_who_asks_for_it(configure, broken_nvcc):
    done, said = configure(CUDACXX=broken_nvcc)
    assert done, said
    assert f"No CUDA kernels, Triton's serve GPUs: {broken_nvcc} compiles no program" in said
    done, said = configure(CUDACXX=broken_nvcc, IDML_FAST_CUDA_ARCHS="80")
    assert not done
    assert f"asks for CUDA kernels, but {broken_nvcc} compiles no program" in said


def test_the_installed_wheel_computes_somewhere_else(site, tmp_path):
    code = """
import idml_fast, torch
print(idml_fast.__file__)
print(idml_fast.__version__)
sem = torch.eye(3, requires_grad=True)
scores = idml_fast.pairwise(sem, torch.ones(3, 2), backend="cpu")
scores.sum().backward()
print(scores[0, 0].item(), bool(sem.grad.isfinite().all()))
print(idml_fast.backend.report().splitlines()[0])
"""
    said = run(sys.executable, "-c", code, cwd=tmp_path, path=site).splitlines()
    assert Path(said[0]).is_relative_to(site)
    assert said[1] == PROJECT["project"]["version"]
    assert said[2:] == ["0.0 True", f"idml_fast  {PROJECT['project']['version']}"]


def test_the_installed_command_runs(site, tmp_path):
    said = run(sys.executable, "-m", "idml_fast.cli", "doctor", cwd=tmp_path, path=site)
    script = run(sys.executable, site / "bin" / "idml-fast", "doctor", cwd=tmp_path, path=site)
    assert script.splitlines()[0] == f"idml_fast  {PROJECT['project']['version']}"
    assert said in ("", script)


def test_importing_costs_little_beyond_torch(site, tmp_path):
    """At most 0.1 s, in the best of five runs: the others may have met a busy machine.

    As installed: an installer compiles the modules, which a checkout may do on every import.
    """
    code = """
import time, torch
start = time.perf_counter()
import idml_fast
print(time.perf_counter() - start)
"""
    best = float("inf")
    for _ in range(5):
        best = min(best, float(run(sys.executable, "-c", code, cwd=tmp_path, path=site)))
        if best <= 0.1:
            break
    assert best <= 0.1


def test_importing_loads_nothing_heavy(tmp_path):
    code = """
import sys, torch
before = set(sys.modules)
import idml_fast
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
print("idml_fast._C" in sys.modules, "idml_fast.cli" in sys.modules)
"""
    loaded, native = run(sys.executable, "-c", code, cwd=tmp_path).splitlines()
    heavy = {"triton", "matplotlib", "sklearn", "scipy", "accelerate", "jsonargparse", "jinja2"}
    assert not heavy & set(loaded.split())
    assert native == "False False"  # the native module waits for the first call
