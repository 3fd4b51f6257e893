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
    ".*", "build", "dist", "runs", "__pycache__", "*.egg-info", "_C.*", "*.pyd"
)


def run(*command, cwd, path=""):
    """The output of a command; what it says when it fails is the test's message."""
    environment = {**os.environ, "PYTHONPATH": str(path)}
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


def build(hook, source, destination, tools):
    """Calls a hook of the build backend as an installer does, in `source`; the file it made."""
    destination.mkdir()
    # The scripts of the tools (cmake, ninja) are looked for beside them.
    code = (
        "import os, sys, setuptools.build_meta as backend;"
        f"os.environ['PATH'] = {str(tools / 'bin')!r} + os.pathsep"
        f" + {str(Path(sys.executable).parent)!r} + os.pathsep + os.environ['PATH'];"
        f"sys.path.insert(0, '.'); backend.{hook}({str(destination)!r})"
    )
    run(sys.executable, "-c", code, cwd=source, path=tools)
    (made,) = destination.iterdir()
    return made


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
    native = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").iterdir()}
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


def test_importing_costs_little_beyond_torch(tmp_path):
    """At most 0.1 s, in the best of five runs: the others may have met a busy machine."""
    code = """
import time, torch
start = time.perf_counter()
import idml_fast
print(time.perf_counter() - start)
"""
    best = float("inf")
    for _ in range(5):
        best = min(best, float(run(sys.executable, "-c", code, cwd=tmp_path)))
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
