"""What is imported when: nothing heavy before it is used. Structure is asserted, not seconds."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import kvcompress_hf as kvc

SOURCE = Path(__file__).parents[1] / "kvcompress_hf" / "__init__.py"
HEAVY = {"torch", "transformers", "numpy", "safetensors", "tqdm", "matplotlib"}


def imported(code, tmp_path):
    """Modules that a fresh interpreter holds after running the code."""
    lines = [code, "import sys", "print('modules', *sys.modules)"]
    run = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    return set(run.stdout.splitlines()[-1].split()[1:])


def command(*arguments):
    return (
        f"import sys; sys.argv = {['kvcompress', *arguments]!r}\n"
        "from kvcompress_hf.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code"
    )


def test_importing_the_package_imports_nothing_of_it(tmp_path):
    modules = imported("import kvcompress_hf", tmp_path)
    assert not modules & HEAVY
    assert {name for name in modules if name.startswith("kvcompress_hf.")} == set()


@pytest.mark.parametrize("arguments", [["--help"], ["demo", "--help"], ["support", "--help"]], ids=" ".join)
def test_help_imports_nothing_heavy(arguments, tmp_path):
    assert not imported(command(*arguments), tmp_path) & HEAVY


def test_recipes_in_json_know_every_kind_before_anything_else_is_imported(tmp_path):
    code = """if True:
        from kvcompress_hf.recipe import Recipe
        Recipe.from_dict({"observer": {"kind": "window"}, "plan": {"kind": "pages"}, "budget": 0.5})
    """
    imported(code, tmp_path)


@pytest.mark.parametrize("name", ["presets", "perplexity"])
def test_a_submodule_never_takes_the_place_of_the_function_of_its_name(name, tmp_path):
    code = f"import kvcompress_hf, kvcompress_hf.{name}; assert callable(kvcompress_hf.{name})"
    imported(code, tmp_path)


def test_every_public_name_is_there_and_no_other():
    for name in kvc.__all__:
        assert getattr(kvc, name) is not None
    assert set(kvc.__all__) <= set(dir(kvc))
    with pytest.raises(AttributeError, match="has no attribute 'no_such_name'"):
        kvc.no_such_name  # noqa: B018
    assert not {"os", "sys", "importlib", "Any"} & set(dir(kvc))


def test_folders_with_more_names_are_found(tmp_path):
    code = "import kvcompress_hf as kvc; kvc.plans.EVICT, kvc.observers.Slots, kvc.patches.is_patched; assert kvc.EVICT"
    imported(code, tmp_path)


def test_type_checkers_see_the_names_that_are_imported_lazily():
    tree = ast.parse(SOURCE.read_text())
    [block] = [node for node in tree.body if isinstance(node, ast.If)]
    shown = {alias.asname or alias.name: (node.module, alias.name) for node in block.body for alias in node.names}
    there = {name: (module, kvc._NAME_THERE.get(name, name)) for name, module in kvc._MODULE_OF.items()}
    assert shown == there
    assert set(kvc.__all__) == set(there)
