"""Loading and starting kernels: the driver's C interface, against a library that runs them on the CPU."""

from __future__ import annotations

import ctypes
import re
import types

import pytest
import torch

from kvcompress_hf.kernels import Logits, dispatch
from kvcompress_hf.kernels.cuda import CudaBackend, CudaLauncher, DriverError, driver, images, load_driver, nvrtc

STREAM = types.SimpleNamespace(cuda_stream=0)


@pytest.fixture
def elf(monkeypatch):
    """Device code that the pretended driver takes."""
    monkeypatch.setattr(
        driver, "device_code", lambda unit, arch, use_shipped: (b"\177ELF" + unit.encode(), f"{arch} code")
    )


@pytest.fixture
def one_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: STREAM)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


@pytest.mark.parametrize("bulk_copies", [True, False])
def test_launch_through_the_driver(make_twins, exact, close, shim_library, elf, one_gpu, bulk_copies):
    launcher = CudaLauncher((9, 0), 3, load_driver(str(shim_library)), bulk_copies)
    assert (launcher.name, launcher.reason) == ("cuda-sm_90a", "sm_90a code")
    launcher.device_type = "cpu"
    backend = CudaBackend(launcher)
    twins = make_twins(tiers=[(8, 4), (4, 2)])
    q, k, v = twins.randn(8, 1), twins.randn(2, 1), twins.randn(2, 1)
    options = dict(position=900, logits=Logits(0.1), sum_field="sum")
    actual = backend.decode_attention(q, k, v, twins.rows, twins.tail, **options)
    expected = exact.decode_attention(q, k, v, twins.expected_rows, twins.expected_tail, **options)
    close(actual, expected, torch.float16)
    assert any(kernel.endswith("_bulk") for kernel in launcher._kernels) == launcher.bulk_copies == bulk_copies
    counts = torch.ones(2, 2, dtype=torch.int32)
    fields = {name: torch.zeros(2, 2, 1).to(twins.rows.layout.field_dtype(name)) for name in twins.rows.layout.fields}
    assert backend.pack(twins.rows, 1, k, v, counts, None, fields) == 0


def test_a_refused_start_is_an_error(shim_library, elf, one_gpu):
    launcher = CudaLauncher((8, 0), 3, load_driver(str(shim_library)))
    with pytest.raises(DriverError, match=r"starting kvc_advance with 1 blocks of 4096 threads failed: launch failed"):
        launcher.launch("kvc_advance", 1, 4096, (ctypes.c_int32(),), torch.device("cuda", 0))


def test_a_thread_without_a_context_is_given_one(make_twins, exact, close, shim_library, elf, one_gpu):
    library = load_driver(str(shim_library))
    launcher = CudaLauncher((9, 0), 3, library)
    launcher.device_type = "cpu"
    twins = make_twins()
    q, k, v = twins.randn(8, 1), twins.randn(2, 1), twins.randn(2, 1)
    options = dict(position=900, logits=Logits(0.1))
    library.kvc_shim_leave_context()  # asking for blocks, then starting: each finds none
    actual = CudaBackend(launcher).decode_attention(q, k, v, twins.rows, twins.tail, **options)
    close(actual, exact.decode_attention(q, k, v, twins.expected_rows, twins.expected_tail, **options), torch.float16)
    library.kvc_shim_leave_context()
    CudaBackend(launcher).append(twins.tail, k, v, 901)
    assert twins.tail.lengths.tolist() == [7, 2]


def test_the_driver_says_how_many_blocks_fit(shim_library, elf, one_gpu):
    launcher = CudaLauncher((8, 0), 5, load_driver(str(shim_library)))
    assert not launcher.bulk_copies
    assert launcher.resident("kvc_decode_64_f16_8", 128, torch.device("cuda", 0)) == 15
    with pytest.raises(DriverError, match="a block of kvc_chunk with 4096 threads does not fit on a multiprocessor"):
        launcher.resident("kvc_chunk", 4096, torch.device("cuda"))


def test_code_for_another_device_is_an_error(shim_library, monkeypatch):
    monkeypatch.setattr(driver, "device_code", lambda unit, arch, use_shipped: (b"PTX", "shipped"))
    with pytest.raises(DriverError, match=r"cuLibraryLoadData failed: no kernel image .* \(209\)"):
        CudaLauncher((9, 0), 3, load_driver(str(shim_library)))


def test_old_devices_are_refused(shim_library):
    with pytest.raises(DriverError, match="compute capability 8.0 .* this device has 7.5"):
        CudaLauncher((7, 5), 3, load_driver(str(shim_library)))


def test_no_driver():
    with pytest.raises(DriverError, match="cannot be loaded"):
        load_driver("libnothing_of_the_kind.so.1")
    with pytest.raises(DriverError, match="too old"):
        load_driver("libm.so.6")


@pytest.mark.parametrize(
    "capability, library, compiler, why",
    [
        (
            (9, 0),
            "libnothing_of_the_kind.so.1",
            True,
            "the CUDA driver library libnothing_of_the_kind.so.1 cannot be loaded",
        ),
        ((7, 5), None, True, "compute capability 8.0 .Ampere. or newer is needed, this device has 7.5"),
        ((8, 7), None, False, "NVRTC was not found: `pip install nvidia-cuda-nvrtc`"),
    ],
    ids=["no driver", "old device", "no code and no compiler"],
)
def test_what_cannot_be_used_falls_back_with_a_reason(
    monkeypatch, tmp_path, shim_library, capability, library, compiler, why
):
    device = types.SimpleNamespace(major=capability[0], minor=capability[1], multi_processor_count=3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(driver, "load_driver", lambda: load_driver(library or str(shim_library)))
    monkeypatch.setattr(images, "CUBIN_DIR", tmp_path)
    caches = [dispatch._backend_for, driver.launcher_for, nvrtc._library]
    if not compiler:
        monkeypatch.setattr(nvrtc, "_candidates", lambda: iter(()))
    for cache in caches:
        cache.cache_clear()
    try:
        with pytest.warns(UserWarning, match=f"falls back to plain torch on cuda:0, .*{why}"):
            backend = dispatch.get_backend("cuda")
        assert backend.name == "reference" and re.search(why, backend.reason)
    finally:
        for cache in caches:
            cache.cache_clear()


def test_without_a_device():
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    backend = dispatch.get_backend("cuda")
    assert (backend.name, backend.reason) == ("reference", "PyTorch sees no CUDA device")


def test_architectures():
    assert images.architecture_of((9, 0)) == "sm_90a"
    assert images.architecture_of((8, 7)) == "sm_87"
    assert sorted(driver.UNIT_OF) == sorted(name for names in images.KERNELS.values() for name in names)


def test_cubins_from_other_sources_are_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "CUBIN_DIR", tmp_path)
    assert images.shipped("storage", "sm_90a") is None
    (tmp_path / "storage.sm_90a.cubin").write_bytes(b"code")
    digest = "5694d08a2e53ffcae0c3103e5ad6f6076abd960eb1f8a56577040bc1028f702b"
    manifest = '{"sources": "%s", "cubins": {"storage.sm_90a": {"sha256": "%s"}}}'
    (tmp_path / "manifest.json").write_text(manifest % (images.source_hash(), digest))
    assert images.shipped("storage", "sm_90a") == b"code"
    (tmp_path / "storage.sm_90a.cubin").write_bytes(b"damaged")
    assert images.shipped("storage", "sm_90a") is None
    (tmp_path / "storage.sm_90a.cubin").write_bytes(b"code")
    (tmp_path / "manifest.json").write_text(manifest % ("0" * 64, digest))
    assert images.shipped("storage", "sm_90a") is None


def test_compiled_code_is_kept(tmp_path, monkeypatch):
    calls = []

    def compile_source(unit, arch):
        calls.append((unit, arch))
        return types.SimpleNamespace(cubin=b"new code")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(images, "compile_source", compile_source)
    monkeypatch.setattr(images, "nvrtc_version", lambda: (13, 0))
    for _ in range(2):
        code, origin = images.device_code("storage", "sm_87", use_shipped=False)
        assert code == b"new code" and origin == "compiled on this machine for sm_87 by NVRTC 13.0"
    assert calls == [("storage", "sm_87")]
