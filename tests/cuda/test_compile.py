"""Kernels compile without spills; needs NVRTC or nvcc, but no GPU. All for all devices: `kernels/cuda/build.py`."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from kvcompress_hf.kernels.cuda import NvrtcError, build, images, nvrtc

try:
    VERSION: tuple[int, int] | None = nvrtc.nvrtc_version()
except NvrtcError as error:
    VERSION, REASON = None, str(error)
else:
    REASON = ""

needs_nvrtc = pytest.mark.skipif(VERSION is None, reason=f"no NVRTC: {REASON}")


@pytest.fixture
def compile_kernels(tmp_path):
    """Compiles a unit as the package does, or with a toolkit's nvcc, which reports the same resources."""
    if VERSION is not None:
        return nvrtc.compile_source
    if shutil.which("nvcc") is None:
        pytest.skip(f"no nvcc, and no NVRTC: {REASON}")

    def compile_kernels(unit, arch):
        for name, text in nvrtc.source_texts().items():
            if name != "stdint.h":  # NVRTC brings none, nvcc does
                (tmp_path / name).write_text(text)
        file, *options = nvrtc.SOURCES[unit]
        command = ["nvcc", "--cubin", f"--gpu-architecture={arch}", "--std=c++17", "--ptxas-options=-v", *options]
        done = subprocess.run(
            [*command, file, "-o", "unit.cubin"], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[:2000]
        return nvrtc.Compiled((tmp_path / "unit.cubin").read_bytes(), nvrtc._resources(done.stderr))

    return compile_kernels


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("unit", ["storage", "attention"])
def test_kernels_keep_to_their_registers(unit, arch, compile_kernels):
    compiled = compile_kernels(unit, arch)
    assert compiled.cubin.startswith(b"\x7fELF")
    assert build.problems(unit, compiled.kernels) == []


@pytest.mark.slow
def test_tensor_core_decode_keeps_to_its_registers(compile_kernels):  # the quickest of them
    assert build.problems("decode64_8", compile_kernels("decode64_8", "sm_90a").kernels) == []


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["chunk256", "scores64"])  # the most registers, and the fewest
def test_tensor_core_chunks_keep_to_their_registers(unit, compile_kernels):
    assert build.problems(unit, compile_kernels(unit, "sm_90a").kernels) == []


@needs_nvrtc
def test_a_source_that_does_not_compile_says_where(monkeypatch):
    texts = nvrtc.source_texts() | {"storage.cu": "extern int nothing\n"}
    monkeypatch.setattr(nvrtc, "source_texts", lambda: texts)
    with pytest.raises(NvrtcError, match=r"cannot compile storage for sm_90a(.|\n)*storage.cu\(\d"):
        nvrtc.compile_source("storage", "sm_90a")


@needs_nvrtc
def test_an_unknown_architecture_is_an_error():
    with pytest.raises(NvrtcError, match="sm_12345"):
        nvrtc.compile_source("storage", "sm_12345")


@needs_nvrtc
def test_build_writes_what_the_loader_takes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build, "NVRTC_VERSION", VERSION)
    for module in (build, images):
        monkeypatch.setattr(module, "CUBIN_DIR", tmp_path)
    assert build.main(["--arch", "sm_90a", "--unit", "storage"]) == 0
    assert "kvc_pack" in capsys.readouterr().out
    code, origin = images.device_code("storage", "sm_90a")
    assert code.startswith(b"\x7fELF") and origin == "shipped cubins for sm_90a"


def test_faults_are_found():
    kernels = [
        nvrtc.KernelResources("kvc_chunk", 200, 0, 0),
        nvrtc.KernelResources("kvc_scores", 20, 8, 0),
        nvrtc.KernelResources("kvc_other", 20, 0, 0),
    ]
    assert build.problems("attention", kernels) == [
        "kvc_other is not listed in attention",
        "kvc_statistics is missing in attention",
        "kvc_chunk takes 200 registers, more than 168",
        "kvc_scores spills 8 bytes",
    ]


def test_resident_warps():
    def warps(name, registers, shared, arch):
        return build.resident_warps(nvrtc.KernelResources(name, registers, 0, shared), arch)

    assert warps("kvc_pack", 32, 0, "sm_90a") == 64  # as many as there are
    assert warps("kvc_pack", 33, 0, "sm_90a") == 48  # 40 registers each
    assert warps("kvc_decode_128_f16_16", 255, 13296, "sm_90a") == 8
    assert warps("kvc_scores", 80, 35008, "sm_89") == 8  # 100 KiB hold two
    assert warps("kvc_advance", 32, 0, "sm_86") == 16


def test_without_nvrtc_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setattr(nvrtc, "_candidates", lambda: iter(()))
    nvrtc._library.cache_clear()
    try:
        with pytest.raises(NvrtcError, match="pip install nvidia-cuda-nvrtc"):
            nvrtc.nvrtc_version()
    finally:
        nvrtc._library.cache_clear()
