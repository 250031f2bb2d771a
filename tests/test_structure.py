"""The shape of the source: layers, sizes, private names. Part of ``make check``."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "zeropoint"
FILES = sorted(SOURCE.rglob("*.py"))
LAYERS = {
    "__main__": 10, "pt2e": 9, "cli": 9,
    "api": 8, "workflow": 8, "calibration": 8, "result": 8, "training": 8, "checkpoint": 8, "check_backend": 8,
    "distributed": 8, "benchmark": 8, "reporting": 8,
    "algorithms": 7, "runtime": 7, "report": 7,
    "passes": 6, "backends": 5, "annotate": 4, "graph": 3, "numerics": 2, "core": 1,
}  # fmt: skip
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 40
LONGER_FUNCTIONS: dict[str, str] = {"api.quantize": "one line per stage, and the docstring of the whole product"}
PRIVATE_IMPORTS = {
    "graph/compat.py": "its purpose",
}
SPECIFIC = ("torch.utils._pytree",)
"""Private by name, but the only home of pytrees that torch has."""


def name_of(path: Path) -> str:
    return str(path.relative_to(SOURCE))


def layer_of(path: Path) -> int | None:
    first = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    return None if first == "__init__" else LAYERS[first]


def imports_of(path: Path) -> list[str]:
    found: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.append(node.module)
            found.extend(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            found.extend(alias.name for alias in node.names)
    return found


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_down(path):
    layer = layer_of(path)
    if layer is None:
        return
    own = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    for module in imports_of(path):
        parts = module.split(".")
        if parts[0] != "zeropoint" or len(parts) < 2 or parts[1] not in LAYERS or parts[1] == own:
            continue
        other = LAYERS[parts[1]]
        assert other < layer or (other == layer == 8), f"{name_of(path)} (layer {layer}) imports {module} ({other})"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_and_functions_are_short(path):
    text = path.read_text()
    assert text.count("\n") <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            full_name = f"{name_of(path).removesuffix('.py').replace('/', '.')}.{node.name}"
            length = node.end_lineno - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES or full_name in LONGER_FUNCTIONS, f"{full_name}: {length} lines"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_frozen_dataclasses_have_slots(path):
    for node in ast.walk(ast.parse(path.read_text())):
        for decorator in node.decorator_list if isinstance(node, ast.ClassDef) else ():
            settings = {word.arg for word in decorator.keywords} if isinstance(decorator, ast.Call) else set()
            assert "frozen" not in settings or "slots" in settings, f"{name_of(path)}: {node.name}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_private_torch_names_are_in_one_file(path):
    if name_of(path) in PRIVATE_IMPORTS:
        return
    for module in imports_of(path):
        parts = module.split(".")
        private = parts[0] == "torch" and any(part.startswith("_") and part != "__future__" for part in parts[1:])
        assert not private or module.startswith(SPECIFIC), f"{name_of(path)} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_core_depends_on_torch_and_numpy_only(path):
    for module in imports_of(path):
        head = module.split(".")[0]
        if name_of(path).startswith("cli/") and head in ("rich", "typer"):
            continue
        assert head not in ("torchao", "executorch", "onnxruntime", "rich", "typer"), (
            f"{name_of(path)} imports {module}"
        )


def test_no_file_is_a_drawer():
    drawers = {"utils.py", "helpers.py", "common.py", "misc.py"}
    own = [path for path in FILES if not name_of(path).startswith("pt2e/")]  # There, torchao names the files.
    assert not [name_of(path) for path in own if path.name in drawers]


def test_every_public_name_exists():
    import zeropoint

    for name in zeropoint.__all__:
        assert getattr(zeropoint, name).__doc__ or name == "EdgeOrNode", name


def test_names_of_test_files_are_unique():
    """pytest imports them by their names, without their folders."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
