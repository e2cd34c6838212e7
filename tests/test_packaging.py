"""What is installed and shipped: one package, and never a module of the name `kernels` (a PyPI package has it)."""

import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.machinery import PathFinder
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
FOLDERS = {"kvcompress_hf": "kvcompress_hf", "kernels": "kvcompress_hf/kernels", "patches": "kvcompress_hf/patches"}
LINKS = {
    "kvcompress_hf/kernels": "../kernels",
    "kvcompress_hf/patches": "../patches",
    "editable/kvcompress_hf": "../kvcompress_hf",
}
# The finder that an editable install puts before all others would hide what sys.path alone finds.
FIND = "import sys; from importlib.machinery import PathFinder; print([PathFinder.find_spec(n) for n in {names!r}])"


def build(hook, folder, target):
    """Calls a build hook without compiling (the library's place is tested by every other test)."""
    pytest.importorskip("scikit_build_core", reason="scikit-build-core builds the package")
    call = f"import scikit_build_core.build as b; b.{hook}({str(target)!r}, {{'wheel.cmake': 'false'}})"
    subprocess.run([sys.executable, "-c", call], cwd=folder, check=True, capture_output=True)
    [made] = target.iterdir()
    return made


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    return build("build_sdist", ROOT, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    unpacked = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(unpacked, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    [folder] = unpacked.iterdir()
    return build("build_wheel", folder, tmp_path_factory.mktemp("wheel"))


def names_in(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def python_files():
    """Path in the repository and in the wheel of each Python file of the package."""
    for folder, place in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            yield path.relative_to(ROOT).as_posix(), f"{place}/{path.relative_to(ROOT / folder).as_posix()}"


@pytest.mark.parametrize("link", LINKS)
def test_links_are_relative_and_lead_to_the_folders_at_the_top(link):
    assert (ROOT / link).is_symlink(), f"{link} must be a symbolic link; was the clone made without them?"
    assert os.readlink(ROOT / link) == LINKS[link]


@pytest.mark.parametrize("name", ["kernels", "patches"])
def test_the_clone_is_one_package_without_being_installed(name):
    spec = PathFinder.find_spec(f"kvcompress_hf.{name}", [str(ROOT / "kvcompress_hf")])
    assert Path(spec.origin) == ROOT / "kvcompress_hf" / name / "__init__.py"


def test_python_started_in_the_clone_finds_the_installed_library():
    code = """if True:
        import sys
        sys.meta_path[:] = [finder for finder in sys.meta_path if "ScikitBuild" not in type(finder).__name__]
        from kvcompress_hf import kernels, patches
        from kvcompress_hf.kernels.library import load_library
        load_library()
        print(kernels.__file__, patches.__file__, sep="\\n")
    """
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    parts = [str(ROOT / "kvcompress_hf" / name / "__init__.py") for name in ("kernels", "patches")]
    assert result.stdout.splitlines()[-2:] == parts


def test_sdist_holds_each_file_once_and_the_links_as_links(sdist):
    with tarfile.open(sdist) as archive:
        members = {member.name.split("/", 1)[1]: member for member in archive.getmembers()}
    assert {name: members[name].linkname for name in LINKS} == LINKS
    assert not [name for name in members if name.startswith(tuple(f"{link}/" for link in LINKS))]
    assert {name for name, _ in python_files()} <= set(members)
    assert not {name.split("/")[0] for name in members} & {".ci", ".git", ".venv", "build", "demo_output"}


def test_wheel_made_from_the_sdist_holds_one_package(wheel):
    names = names_in(wheel)
    assert len(names) == len(set(names))
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"kvcompress_hf"}
    shipped = {place for _, place in python_files() if "/host_shim/" not in place}
    assert {name for name in names if name.endswith(".py")} == shipped
    assert {"kvcompress_hf/py.typed", "kvcompress_hf/kernels/include/page_layout.h"} <= set(names)
    assert not [name for name in names if name.endswith((".cpp", "CMakeLists.txt")) or "host_shim" in name]


def test_wheel_made_from_the_clone_is_the_same(wheel, tmp_path):
    assert sorted(names_in(build("build_wheel", ROOT, tmp_path))) == sorted(names_in(wheel))


def test_editable_install_makes_nothing_else_importable(tmp_path):
    with zipfile.ZipFile(build("build_editable", ROOT, tmp_path)) as archive:
        [pth] = [name for name in archive.namelist() if name.endswith(".pth")]
        lines = archive.read(pth).decode().splitlines()
    folders = [Path(line) for line in lines if line and not line.startswith("import ")]
    assert [path.name for folder in folders for path in folder.iterdir()] == ["kvcompress_hf"]


def test_nothing_but_the_working_directory_offers_our_folders():
    # `python -m pytest` puts the working directory there itself.
    folders = [Path(entry) for entry in sys.path if entry and Path(entry) != Path.cwd()]
    ours = {ROOT / "kernels", ROOT / "tests" / "kernels"}
    assert not [folder for folder in folders if (folder / "kernels").resolve() in ours]


def test_pytest_does_not_make_them_importable(tmp_path):
    probe = f"{__file__}::test_nothing_but_the_working_directory_offers_our_folders"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0"]
    command += ["--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml"), probe]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("cwd", ["elsewhere", "clone, python -P"])
def test_import_kernels_does_not_find_ours(cwd, tmp_path):
    flags, folder = ([], tmp_path) if cwd == "elsewhere" else (["-P"], ROOT)
    command = [sys.executable, *flags, "-c", FIND.format(names=["kernels", "patches"])]
    found = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout
    assert str(ROOT) not in found


def pins():
    """What the lock says: name, version and marker of each line."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_the_lock_has_one_version_of_everything_that_make_installs(python):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    where = {"python_version": python, "python_full_version": f"{python}.1", "sys_platform": "linux", "extra": ""}
    where |= {"platform_machine": "x86_64", "platform_system": "Linux", "platform_python_implementation": "CPython"}
    held = [pin for pin in pins() if pin.marker is None or pin.marker.evaluate(where)]
    versions = {canonicalize_name(pin.name): pin for pin in held}
    assert len(versions) == len(held)
    assert all([s.operator for s in pin.specifier] == ["=="] for pin in held)
    for line in [
        *project["dependencies"],
        *(r for e in ("models", "plot", "build", "nvrtc", "dev") for r in extras[e]),
    ]:
        wanted = Requirement(line)
        [pin] = versions[canonicalize_name(wanted.name)].specifier
        assert wanted.specifier.contains(pin.version), f"{line}: the lock has {pin.version}; run make lock"


def test_the_lock_serves_builds_of_torch_with_and_without_cuda():
    [torch] = [pin.specifier for pin in pins() if pin.name == "torch"]
    [pinned] = torch
    assert torch.contains(f"{pinned.version}+cpu") and torch.contains(f"{pinned.version}+cu130")
    assert {"nvidia-cuda-nvrtc", "nvidia-cublas", "triton"} <= {pin.name for pin in pins()}
