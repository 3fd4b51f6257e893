"""Which backend serves what, and what is said of those that do not."""

import platform
from types import SimpleNamespace

import pytest
import torch

import idml_fast
from idml_fast import backend, pairwise

CPU, META = torch.zeros(1), torch.zeros(1, device="meta")
SEM, UNC = torch.eye(3), torch.ones(3, 2)


def test_pairwise_on_the_cpu_is_served_by_its_kernel():
    assert backend.choose("pairwise", CPU) == "cpu"


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_a_named_backend_is_taken(name):
    assert backend.choose("pairwise", CPU, name) == name


def test_the_default_runs_the_kernel_and_the_reference_does_not(monkeypatch):
    ran = []

    def kernel(*arguments):
        ran.append(arguments)
        return torch.zeros(3, 3)

    monkeypatch.setattr("idml_fast._cpu.pairwise.forward", kernel)
    pairwise(SEM, UNC)
    assert len(ran) == 1
    pairwise(SEM, UNC, backend="cpu")
    assert len(ran) == 2
    pairwise(SEM, UNC, backend="reference")
    assert len(ran) == 2


@pytest.mark.parametrize("op", backend.OPERATIONS)
@pytest.mark.parametrize("device", ["cpu", "cuda", "meta"])
def test_the_reference_serves_everything(device, op):
    assert backend.refusal("reference", op, torch.device(device)) is None


@pytest.mark.parametrize("op", backend.OPERATIONS)
@pytest.mark.parametrize("name", backend.KERNELS)
def test_a_backend_without_a_kernel_says_so(name, op):
    if op in backend.KERNELS[name]:
        assert "it has no kernel" not in (backend.refusal(name, op, CPU.device) or "")
    else:
        with pytest.raises(RuntimeError) as error:
            backend.choose(op, CPU, name)
        told = f"backend {name!r} cannot serve {op} here: it has no kernel for this operation yet"
        assert str(error.value) == told


def test_the_cpu_backend_refuses_another_device():
    with pytest.raises(RuntimeError) as error:
        backend.choose("pairwise", META, "cpu")
    assert str(error.value) == (
        "backend 'cpu' cannot serve pairwise here: it serves tensors on the CPU, not on meta"
    )


@pytest.mark.parametrize("op", backend.OPERATIONS)
def test_triton_serves_tensors_on_a_gpu(monkeypatch, op):
    monkeypatch.setattr(backend, "_refusal_of_gpu", lambda index: None)
    gpu = torch.device("cuda", 0)
    assert backend.refusal("triton", op, gpu) is None
    told = backend.refusal("triton", op, gpu, torch.float64)
    assert told == "it has no kernels for float64"
    told = backend.refusal("triton", op, CPU.device)
    assert told == "it serves tensors on a GPU, not on cpu"
    monkeypatch.setattr(backend, "TRITON_MISSING", "Triton is not installed")
    assert backend.refusal("triton", op, gpu) == "Triton is not installed"


@pytest.fixture
def on_a_gpu(monkeypatch):
    """What stands for a tensor on a GPU, which every backend could serve."""
    monkeypatch.setattr(backend, "_refusal_of_gpu", lambda index: None)
    for reason in ("GPU_MISSING", "TRITON_MISSING"):
        monkeypatch.setattr(backend, reason, None)
    return SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16, shape=(9, 512))


def test_cuda_is_not_chosen_by_itself_before_it_is_known_to_be_faster(on_a_gpu):
    for op in backend.OPERATIONS:
        assert backend.choose(op, on_a_gpu) == "triton"
    assert backend.choose("pairwise", on_a_gpu, "cuda") == "cuda"


def test_cuda_is_chosen_where_it_is_known_to_be_faster(on_a_gpu, monkeypatch):
    known = ("pairwise", torch.bfloat16, 512, 1024), ("rowstats", torch.float16, 1, 512)
    monkeypatch.setattr(backend, "CUDA_IS_FASTER", known)
    assert backend.choose("pairwise", on_a_gpu) == "cuda"
    assert backend.choose("pairwise", on_a_gpu, None, ["a histogram"]) == "triton"
    assert backend.choose("rowstats", on_a_gpu) == "triton"
    on_a_gpu.shape = 9, 511
    assert backend.choose("pairwise", on_a_gpu) == "triton"


def test_a_setting_prefers_cuda_or_not(on_a_gpu, monkeypatch):
    monkeypatch.setattr(backend, "prefer_cuda", True)
    assert backend.choose("nearest", on_a_gpu) == "cuda"
    assert backend.choose("nearest", on_a_gpu, None, ["draws"]) == "triton"
    assert backend.choose("paired", on_a_gpu) == "triton"
    monkeypatch.setattr(backend, "prefer_cuda", False)
    monkeypatch.setattr(backend, "CUDA_IS_FASTER", (("nearest", torch.bfloat16, 1, 10**6),))
    assert backend.choose("nearest", on_a_gpu) == "triton"


def test_what_cuda_refuses_is_said(on_a_gpu, monkeypatch):
    def told(dtype=torch.bfloat16, beyond=()):
        return backend.refusal("cuda", "rowstats", on_a_gpu.device, dtype, beyond)

    assert told() is None
    assert told(beyond=["a histogram", "draws"]) == "it does not serve a histogram"
    assert told(torch.float64) == "it has no kernels for float64"
    assert told(torch.float32) == (
        "it multiplies float32 as tf32, and torch's float32 matmul precision is highest"
    )
    monkeypatch.setattr(backend, "precision", "tf32x3")
    assert told(torch.float32) == (
        "it multiplies float32 as tf32, and backend.precision is 'tf32x3'"
    )
    monkeypatch.setattr(backend, "precision", "tf32")
    assert told(torch.float32) is None
    monkeypatch.setattr(backend, "GPU_MISSING", "not built")
    assert told() == "not built"
    assert backend.refusal("cuda", "rowstats", CPU.device) == (
        "it serves tensors on a GPU, not on cpu"
    )


@pytest.mark.parametrize(("capability", "serves"), [((7, 5), False), ((8, 0), True)])
def test_triton_needs_an_ampere_gpu(monkeypatch, capability, serves):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    told = backend.refusal("triton", "pairwise", torch.device("cuda", 0))
    assert (told is None) == serves
    assert serves or told.startswith("it needs an NVIDIA GPU of compute capability 8.0")


def test_the_interpreter_is_never_chosen_by_itself(monkeypatch):
    monkeypatch.setattr(backend, "INTERPRETED", True)
    assert backend.choose("pairwise", CPU) == "cpu"
    assert backend.choose("pairwise", CPU, "triton") == "triton"
    monkeypatch.setattr(backend, "INTERPRETED", False)
    with pytest.raises(RuntimeError, match="it serves tensors on a GPU, not on cpu"):
        backend.choose("pairwise", CPU, "triton")


def test_when_no_kernel_serves_each_reason_is_given_and_nothing_falls_back():
    with pytest.raises(RuntimeError) as error:
        pairwise(SEM.to("meta"), UNC.to("meta"))
    message = str(error.value)
    assert message.startswith("no kernel can serve pairwise on meta here (")
    assert message.endswith("); backend='reference' runs it in eager PyTorch")
    for name in backend.KERNELS:
        assert f"{name}: " in message
    assert "cpu: it serves tensors on the CPU, not on meta" in message


def test_a_missing_native_module_is_a_reason(monkeypatch):
    reason = "the native module idml_fast._C is not built; `pip install -e .` builds it"
    monkeypatch.setattr(backend, "NATIVE_MISSING", reason)
    assert backend.refusal("cpu", "pairwise", CPU.device) == reason
    with pytest.raises(RuntimeError, match=r"cpu: the native module idml_fast\._C is not"):
        pairwise(SEM, UNC)
    assert pairwise(SEM, UNC, backend="reference").shape == (3, 3)
    assert f"_C         missing: {reason}" in backend.report()


def test_report_names_versions_and_devices():
    lines = backend.report().splitlines()
    head = dict(line.split(maxsplit=1) for line in lines[: lines.index("")])
    assert head["idml_fast"] == idml_fast.__version__
    assert head["python"].startswith(platform.python_version())
    assert head["torch"].startswith(f"{torch.__version__}, {torch.get_num_threads()} threads")
    assert (head["GPU"] == "none") == (not torch.cuda.is_available())
    assert "vectors: " in head["_C"]
    assert "threads: " in head["_C"]
    assert head["triton"]


def test_report_names_the_gpus_that_the_cuda_kernels_are_compiled_for(monkeypatch):
    monkeypatch.setattr(backend, "GPU_MISSING", None)
    built = SimpleNamespace(ARCHITECTURES=("80", "90a", "100"))
    monkeypatch.setattr(idml_fast, "_gpu", built, raising=False)
    told = "_gpu       compiled for compute capability 8.0, 9.0a, 10.0"
    assert told in backend.report().splitlines()


def test_report_says_why_there_are_no_cuda_kernels(monkeypatch):
    monkeypatch.setattr(backend, "GPU_MISSING", "the native module idml_fast._gpu is not built")
    told = "_gpu       missing: the native module idml_fast._gpu is not built"
    assert told in backend.report().splitlines()


def test_report_names_a_lowered_instruction_set(monkeypatch):
    monkeypatch.setenv("IDML_FAST_CPU_ISA", "avx2")
    assert "(IDML_FAST_CPU_ISA=avx2)" in backend.report()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the table is of the device that is there")
def test_report_says_what_each_backend_serves_and_why_not():
    lines = backend.report().splitlines()
    title = next(i for i, line in enumerate(lines) if line.startswith("backend"))
    assert lines[title].split()[1:] == list(backend.OPERATIONS)
    table = {row.split()[0]: row.split()[1:] for row in lines[title + 1 : lines.index("", title)]}
    assert list(table) == list(backend.BACKENDS)
    why_not = lines[lines.index("Why not (tensors on cpu):") + 1 :]
    for name, cells in table.items():
        for op, cell in zip(backend.OPERATIONS, cells, strict=True):
            reason = backend.refusal(name, op, CPU.device)
            assert cell == ("yes" if reason is None else "-")
            told = [line for line in why_not if line.startswith(f"  {name}, ") and op in line]
            assert told == [] if reason is None else told[0].endswith(f": {reason}")
