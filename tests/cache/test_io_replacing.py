"""Writing over what is there: whole or not at all, with its permissions, and never over what is no file."""

import os
import signal
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import kvcompress_hf as kvc
from kvcompress_hf.io.replace import replace_file

posix = pytest.mark.skipif(os.name != "posix", reason="POSIX permissions and pipes")


@pytest.fixture(scope="module")
def model(tiny_llama):
    return kvc.patch(
        tiny_llama(initializer_range=0.02, hidden_size=32, intermediate_size=32, num_attention_heads=2, head_dim=16),
        "lossless",
    )


@pytest.fixture(scope="module")
def cache(model):
    return kvc.prefill(model, torch.arange(3, 43)[None], "k8v4")


def loads(path, model, tokens=40):
    assert kvc.CompressedPagedCache.load(path, model).get_seq_length() == tokens


@posix
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444, 0o777])
def test_permissions_of_what_was_there_are_kept(cache, model, mode, tmp_path):
    path = tmp_path / "cache"
    path.write_bytes(b"old")
    path.chmod(mode)
    cache.save(path)
    assert stat.S_IMODE(path.stat().st_mode) == mode
    loads(path, model)


@posix
def test_a_new_file_has_the_permissions_that_any_new_file_has(cache, tmp_path):
    before = os.umask(0o027)
    try:
        cache.save(tmp_path / "cache")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "cache").stat().st_mode) == 0o640
    assert [p.name for p in tmp_path.iterdir()] == ["cache"]


@posix
def test_a_symbolic_link_is_followed(cache, model, tmp_path):
    (tmp_path / "disk").mkdir()
    for target in (tmp_path / "disk" / "there", tmp_path / "disk" / "not yet"):
        if target.name == "there":
            target.write_bytes(b"old")
        link = tmp_path / f"link to {target.name}"
        link.symlink_to(target)
        cache.save(link)
        assert link.is_symlink() and not target.is_symlink()
        loads(target, model)
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(OSError, match="symbolic links"):
        cache.save(loop)
    assert loop.is_symlink()


@posix
def test_what_is_no_file_is_never_replaced_nor_waited_for(cache, model, tmp_path):
    pipe, folder = tmp_path / "pipe", tmp_path / "folder"
    os.mkfifo(pipe)
    folder.mkdir()
    for path in (pipe, Path("/dev/null")):
        with pytest.raises(FileExistsError, match="not an ordinary file"):
            cache.save(path)
    with pytest.raises(IsADirectoryError, match="this is a folder"):
        cache.save(folder)
    for path in (pipe, folder, Path("/dev/null"), Path("/dev/zero")):
        with pytest.raises(kvc.CacheFormatError, match="not an ordinary file"):
            kvc.CompressedPagedCache.load(path, model)
    assert stat.S_ISFIFO(pipe.stat().st_mode) and sorted(p.name for p in tmp_path.iterdir()) == ["folder", "pipe"]


@pytest.mark.parametrize("nameless", [True, False])
@pytest.mark.parametrize("what", ["write", "os.fsync", "os.replace", "check"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), MemoryError()])
def test_whatever_fails_the_old_file_stays_and_nothing_else(tmp_path, monkeypatch, nameless, what, error):
    if not nameless:
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(*args, **kwargs):
        raise error

    def write(file):
        file.write(b"half")
        if what == "write":
            fail()

    if what.startswith("os."):
        monkeypatch.setattr(what, fail)
    with pytest.raises(type(error)):
        replace_file(path, write, fail if what == "check" else None)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and path.read_bytes() == b"old"
    replace_file(path, lambda file: file.write(b"new"))
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and path.read_bytes() == b"new"


def test_file_and_folder_are_flushed_in_this_order(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr("os.fsync", lambda fd: (calls.append(stat.S_IFMT(os.fstat(fd).st_mode)), fsync(fd)))
    monkeypatch.setattr("os.replace", lambda *names: (calls.append("replace"), replace(*names)))
    replace_file(tmp_path / "file", lambda file: file.write(b"new"))
    assert calls == [stat.S_IFREG, "replace", stat.S_IFDIR]


@posix
@pytest.mark.skipif(not hasattr(os, "O_TMPFILE"), reason="files without a name are Linux's")
def test_a_killed_process_leaves_nothing_behind(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    code = """
        import os, signal, sys
        from kvcompress_hf.io.replace import replace_file

        def write(file):
            file.write(b"half" * 100_000)
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

        replace_file(sys.argv[1] + "/file", write)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)], capture_output=True, timeout=120
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-1000:]
    left = [p.name for p in tmp_path.iterdir()]
    if left != ["file"]:
        pytest.skip("this file system has no files without a name (O_TMPFILE)")
    assert (tmp_path / "file").read_bytes() == b"old"


def test_names_as_long_as_they_may_be(tmp_path):
    path = tmp_path / ("n" * 255)
    replace_file(path, lambda file: file.write(b"new"))
    replace_file(path, lambda file: file.write(b"newer"))
    assert path.read_bytes() == b"newer"


def test_a_file_that_could_not_be_loaded_is_not_written(cache, model, tmp_path, monkeypatch):
    """Should a cache ever hold what `load` refuses, the older file is worth more than the newer."""
    path = tmp_path / "cache"
    cache.save(path)
    before = path.read_bytes()
    fork = cache.fork()
    fork.inspect().stores[0].tail_lengths[0, 0] = 5  # in a tail of no tokens
    with pytest.raises(RuntimeError, match="could be read again"):
        fork.save(path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["cache"]


def test_a_header_beyond_what_load_reads_is_refused_by_save(model, tmp_path):
    """So many recipes of their own that their description would be larger than any that is read."""
    recipe = kvc.get_preset("kv-compress")
    rows = [recipe.with_overrides(budget=1000 + i, name="n" * 1500) for i in range(1500)]
    cache = kvc.CompressedPagedCache(model.config, rows)
    with pytest.raises(RuntimeError, match="header is .* bytes long, more than"):
        cache.save(tmp_path / "cache")
    assert not list(tmp_path.iterdir())
