"""The arrows of the design: who may import whom, read from the sources."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Higher may import lower, never the other way; observers and plans are neighbours that do not know each other.
LEVEL = {
    "kernels": 0,
    "paging": 1,
    "observers": 2,
    "plans": 2,
    "presets": 3,
    "runtime": 3,
    "reports": 4,
    "compat": 4,
    "io": 4,
    "rotary": 5,
    "layers": 5,
    "sequence_indices": 5,
    "gradients": 5,
    "cache": 6,
    "patches": 7,
    "perplexity": 8,
    "cli": 9,
    "__init__": 10,
    # Old import paths, for one release; nobody imports them.
    "moved": 0,
    "attention": 11,
    "importance": 11,
    "planning": 11,
}
ANYONE = {"errors", "units", "recipe", "validation", "bounded_json"}
BELOW_CACHE = ["kernels", "paging", "observers", "plans", "runtime", "recipe", "presets", "reports", "io"]


def sources():
    folders = (ROOT / name for name in ("kvcompress_hf", "kernels", "patches"))
    return [path for folder in folders for path in sorted(folder.rglob("*.py"))]


def room_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0] if parts[0] != "kvcompress_hf" else parts[1]


def only_for_types(tree):
    """Nodes under `if TYPE_CHECKING`: names for annotations, which nothing imports when it runs."""
    blocks = [node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    return {id(inner) for block in blocks for statement in block.body for inner in ast.walk(statement)}


def imports_of(path):
    package = ["kvcompress_hf", *path.relative_to(ROOT).parent.parts]
    package = [part for i, part in enumerate(package) if i == 0 or part != "kvcompress_hf"]
    tree = ast.parse(path.read_text())
    # A recipe's annotations name the base classes of its parts, which are built on it.
    ignored = only_for_types(tree) if path.name == "recipe.py" else set()
    for node in ast.walk(tree):
        if id(node) in ignored:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            name = ".".join(part for part in (base, node.module) if part)
            yield name
            yield from (f"{name}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_arrows(path):
    room = room_of(path)
    known = set(LEVEL) | ANYONE
    assert room in known, f"{room} is a new room: give it a place in the arrows"
    for name in imports_of(path):
        if room in BELOW_CACHE:
            assert not name.startswith("transformers"), f"{path} imports transformers"
        parts = name.split(".")
        if parts[0] != "kvcompress_hf" or len(parts) < 2 or parts[1] not in known:
            continue
        target = parts[1]
        if target == room or target in ANYONE:
            continue
        assert room not in ANYONE, f"{room} is read by all and imports none of them, but it imports {name}"
        assert LEVEL[target] < LEVEL[room], f"{path.relative_to(ROOT)} imports {name}, against the arrows"


# How models of all families are built for the census.
MAY_IMPORT_INSIDES = {"kvcompress_hf/compat.py", "kvcompress_hf/cli/tiny_models.py"}
# These name modules of models in a table and import them by it.
MAY_NAME_INSIDES = MAY_IMPORT_INSIDES | {"patches/families.py"}


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_one_module_knows_the_inside_of_transformers(path):
    """Only names that `transformers` itself exports are imported elsewhere, and no other file spells the cache."""
    if str(path.relative_to(ROOT)) in MAY_IMPORT_INSIDES:
        return
    if str(path.relative_to(ROOT)) not in MAY_NAME_INSIDES:
        assert "transformers.models." not in path.read_text()
    inside = [node.module for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    assert not [name for name in inside if (name or "").startswith("transformers.")]
    assert "past_key_values" not in path.read_text()


def test_no_room_is_left_out():
    rooms = {room_of(path) for path in sources()}
    assert {"kernels", "paging", "observers", "plans", "runtime", "cache", "patches", "cli"} <= rooms


OLD_PATHS = {
    "importance.window": "observers.window",
    "planning.base": "plans.base",
    "attention": "runtime.attention",
    "patches.llama": "patches.families",
    "patches.qwen": "patches.families",
}


def test_old_import_paths_give_the_same_modules_and_warn():
    code = f"""
import importlib, warnings
for old, new in {OLD_PATHS}.items():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        old = importlib.import_module("kvcompress_hf." + old)
    told = [str(w.message) for w in caught if issubclass(w.category, DeprecationWarning)]
    assert any(new.split(".")[0] in message for message in told), (new, told)
    new = importlib.import_module("kvcompress_hf." + new)
    for shown in getattr(old, "__all__", dir(new)):
        assert getattr(old, shown) is getattr(new, shown), shown
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT.parent)


@pytest.mark.parametrize("path", [p for p in sources() if room_of(p) != "cli"], ids=lambda p: str(p.relative_to(ROOT)))
def test_libraries_do_not_print_or_assert(path):
    for node in ast.walk(ast.parse(path.read_text())):
        assert not isinstance(node, ast.Assert), f"{path}:{node.lineno} asserts"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", f"{path}:{node.lineno} prints"


MOST_LINES, MOST_STATEMENT_LINES, MOST_PARAMETERS = 600, 60, 8
#: Longer ones, and why.
LONG_FILES = {
    "kvcompress_hf/cache.py": 697,  # the transformers contract: mostly docstrings
    "kernels/reference.py": 677,  # every operation once more, in plain torch, to be read in one sitting
}
BACKENDS = ("backend", "reference", "cpu/backend", "cuda/backend")
#: Operations of the kernels: each backend has them with the same arguments, which are those of the native call.
OPERATIONS = {"decode_attention", "chunk_attention", "window_scores", "column_scores", "_scores"}
LONG_FUNCTIONS = {
    "cli/demo.py run_demo",
    # The public face takes what an attention layer has; from here on it is one `AttentionCall` with its `Logits`.
    "cache.py attend",
    "cache.py attend_shared",
    "patches/interface.py _attend",
    "plans/run.py make_view",
    "kernels/checks.py check_pack",  # what `pack` is given, and the device
    *(f"kernels/{file}.py {name}" for name in OPERATIONS for file in BACKENDS),
}


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_stay_small(path):
    name, text = str(path.relative_to(ROOT)), path.read_text()
    assert text.count("\n") <= LONG_FILES.get(name, MOST_LINES), f"{name} is too long: split it by what it holds"
    for node in ast.walk(ast.parse(text)):
        if (
            not isinstance(node, ast.FunctionDef)
            or f"{name.removeprefix('kvcompress_hf/')} {node.name}" in LONG_FUNCTIONS
        ):
            continue
        first = node.body[0]
        documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
        lines = node.end_lineno - node.lineno + 1 - (first.end_lineno - first.lineno + 1 if documented else 0)
        assert lines <= MOST_STATEMENT_LINES, (
            f"{name}:{node.lineno} {node.name} has {lines} lines besides its docstring"
        )
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        count = sum(argument.arg not in ("self", "cls") for argument in arguments)
        assert count <= MOST_PARAMETERS, f"{name}:{node.lineno} {node.name} has {count} parameters"


def test_the_rooms_of_runtime_build_on_each_other():
    """attention -> {packing, compression, rollback} -> state -> records; all read call."""
    order = ["call", "records", "state", "rollback", "packing", "compression", "past", "layer_work", "attention"]
    order.append("replay")
    for place, room in enumerate(order):
        for name in imports_of(ROOT / "kvcompress_hf" / "runtime" / f"{room}.py"):
            target = name.removeprefix("kvcompress_hf.runtime.").split(".")[0]
            if name.startswith("kvcompress_hf.runtime.") and target in order:
                assert order.index(target) < place or target == room, f"{room} imports {target}"
