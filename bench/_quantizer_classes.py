"""The quantizer classes of an installed package, found in its source without importing it."""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Iterator
from pathlib import Path

ROOTS = {"Quantizer", "ComposableQuantizer", "EmbeddingQuantizer"}
"""The classes of torchao that quantizers derive from."""


@functools.cache
def find_classes(package: str) -> dict[str, str]:
    """Returns the module of each class of the package that derives from torchao's ``Quantizer``, by the class's name.

    Names of bases are followed through renaming imports, and from module to module; those of tests are left out.
    """
    found: dict[str, str] = {}
    defined = [(module, name, bases) for module, tree in _modules(package) for name, bases in _classes(tree)]
    known = set(ROOTS)
    while new := {name: module for module, name, bases in defined if name not in known and bases & known}:
        known |= set(new)
        found |= new
    return dict(sorted(found.items(), key=lambda item: (item[1], item[0])))


def _modules(package: str) -> Iterator[tuple[str, ast.Module]]:
    """Gives the modules whose source speaks of a quantizer, parsed."""
    spec = importlib.util.find_spec(package)
    for root in map(Path, (spec.submodule_search_locations if spec else None) or ()):
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            source = path.read_text(errors="replace")
            if "Quantizer" in source and not {"test", "tests"} & set(parts):
                yield ".".join([package, *(part for part in parts if part != "__init__")]), ast.parse(source)


def _classes(tree: ast.Module) -> Iterator[tuple[str, set[str]]]:
    """Gives the name of each class of a module, and of its bases, as they are called where they are defined."""
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    renamed = {alias.asname: alias.name for node in imports for alias in node.names if alias.asname}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            names = [ast.unparse(base).split(".")[-1] for base in node.bases]
            yield node.name, {renamed.get(name, name) for name in names}
