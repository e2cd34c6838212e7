"""Compiled kernels in the user's cache folder: only what this user has put there is used."""

import os
import stat

import pytest

from kvcompress_hf.kernels.cuda import disk_cache, images
from kvcompress_hf.kernels.cuda.disk_cache import KernelCache
from kvcompress_hf.kernels.cuda.nvrtc import Compiled

pytestmark = pytest.mark.skipif(os.name != "posix", reason="POSIX owners and permissions")


@pytest.fixture
def kept(tmp_path):
    return KernelCache(tmp_path / "cache")


def test_what_was_kept_is_read_again(kept):
    assert kept.read("unit") is None
    kept.write("unit", b"code")
    kept.write("unit", b"newer code")
    assert kept.read("unit") == b"newer code" and kept.read("other") is None
    assert [p.name for p in kept.folder.iterdir()] == ["unit.cubin"]
    assert stat.S_IMODE(kept.folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((kept.folder / "unit.cubin").stat().st_mode) == 0o600


@pytest.mark.parametrize("how", ["cut", "changed", "renamed", "bare", "empty", "link", "pipe", "writable", "folder"])
def test_what_could_be_from_somebody_else_is_not(kept, how):
    kept.write("unit", b"code" * 100)
    path = kept.folder / "unit.cubin"
    content = path.read_bytes()
    if how == "renamed":
        kept.write("other", b"code of another")
        (kept.folder / "other.cubin").replace(path)
    elif how in ("cut", "changed", "bare", "empty"):
        changed = {"cut": content[:-1], "changed": content[:-1] + b"x", "bare": b"code" * 100, "empty": b""}
        path.write_bytes(changed[how])
    elif how == "writable":
        path.chmod(0o666)
    else:
        path.unlink()
        if how == "link":
            (kept.folder / "elsewhere").write_bytes(content)
            path.symlink_to(kept.folder / "elsewhere")
        elif how == "pipe":
            os.mkfifo(path)
        else:
            path.mkdir()
    assert kept.read("unit") is None
    kept.write("unit", b"new")  # and is replaced, where that can be done
    assert kept.read("unit") == (None if how == "folder" else b"new")


def test_a_file_or_folder_of_another_user_is_not_used(kept, monkeypatch):
    kept.write("unit", b"code")
    monkeypatch.setattr(disk_cache.os, "geteuid", lambda: kept.folder.stat().st_uid + 1)
    with pytest.warns(UserWarning, match="belongs to this user alone"):
        assert kept.read("unit") is None
    with pytest.warns(UserWarning, match="compiled anew by every process"):
        kept.write("unit", b"other")
    monkeypatch.undo()
    assert kept.read("unit") == b"code"


def test_a_folder_of_ours_is_closed_to_others(kept):
    kept.write("unit", b"code")
    kept.folder.chmod(0o777)
    assert kept.read("unit") == b"code"
    assert stat.S_IMODE(kept.folder.stat().st_mode) == 0o755


def test_a_folder_that_cannot_be_written_to_costs_time_only(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for folder in (tmp_path / "file" / "inside", None):
        kept = KernelCache(folder)
        kept.write("unit", b"code")
        assert kept.read("unit") is None


def test_device_code_is_compiled_once_and_again_after_damage(tmp_path, monkeypatch):
    compiled = []

    def compile_source(unit, arch):
        compiled.append(unit)
        return Compiled(b"cubin of " + unit.encode(), ())

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(images, "compile_source", compile_source)
    monkeypatch.setattr(images, "nvrtc_version", lambda: (13, 0))
    for _ in range(2):
        assert images.device_code("storage", "sm_99", use_shipped=False)[0] == b"cubin of storage"
    assert compiled == ["storage"]
    (path,) = (tmp_path / "kvcompress_hf").iterdir()
    path.write_bytes(b"code of somebody else")
    assert images.device_code("storage", "sm_99", use_shipped=False)[0] == b"cubin of storage"
    assert compiled == ["storage"] * 2


def test_the_folder_is_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/folders/are/ignored")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert KernelCache.of_user().folder == tmp_path / ".cache" / "kvcompress_hf"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert KernelCache.of_user().folder == tmp_path / "xdg" / "kvcompress_hf"
