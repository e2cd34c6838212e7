"""Kernels compile without spills; needs NVRTC, but no GPU. All of them for all devices: `kernels/cuda/build.py`."""

from __future__ import annotations

import pytest

from kvcompress_hf.kernels.cuda import NvrtcError, build, images, nvrtc

try:
    VERSION: tuple[int, int] | None = nvrtc.nvrtc_version()
except NvrtcError as error:
    VERSION, REASON = None, str(error)
else:
    REASON = ""

needs_nvrtc = pytest.mark.skipif(VERSION is None, reason=f"no NVRTC: {REASON}")


@needs_nvrtc
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("unit", ["storage", "attention"])
def test_kernels_keep_to_their_registers(unit, arch):
    compiled = nvrtc.compile_source(unit, arch)
    assert compiled.cubin.startswith(b"\x7fELF")
    assert build.problems(unit, compiled.kernels) == []


@needs_nvrtc
@pytest.mark.slow
def test_tensor_core_decode_keeps_to_its_registers():  # the quickest of them
    assert build.problems("decode64_8", nvrtc.compile_source("decode64_8", "sm_90a").kernels) == []


@needs_nvrtc
@pytest.mark.slow
@pytest.mark.parametrize("unit", ["chunk256", "scores64"])  # the most registers, and the fewest
def test_tensor_core_chunks_keep_to_their_registers(unit):
    assert build.problems(unit, nvrtc.compile_source(unit, "sm_90a").kernels) == []


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
