"""Loading a ``.pt2`` file without running what it may hold.

``torch.export.load`` unpickles members of the archive (``torch.load(..., weights_only=False)``, ``pickle.loads``),
loads compiled code, looks operators up by any name and evaluates formulas and guards. So the archive is read here
first, and what could run code is refused; guards are not compiled. Source: torch/export/pt2_archive/_package.py and
torch/_export/serde/serialize.py of torch 2.9 to 2.13.
"""

from __future__ import annotations

import io
import json
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from zeropoint.core.errors import FileError

ORIGIN = "Write it with torch.export.save(torch.export.export(model, example_inputs), 'model.pt2')."
TRUST = (
    "A file from another place could run any code with that; load it in Python, where you trust it, and export again."
)
ARITHMETIC = (
    "add sub mul truediv floordiv mod pow neg pos getitem lt le eq ne gt ge and_ or_ not_ xor lshift rshift is_ is_not"
)
TARGET = re.compile(
    r"torch\.ops\.(?!_)\w+\.\w+(\.\w+)?|_operator\.(" + ARITHMETIC.replace(" ", "|") + r")"
    r"|math\.\w+|torch\.sym_\w+|torch\._sym_\w+|torch\._check\w*|torch\.utils\._sympy\.functions\.\w+"
)
"""Operators and arithmetic: what a graph of torch.export calls."""
FORMULA = re.compile(r"(?:[A-Za-z_]\w*|\d+\.\d+|\d+|[-+*/%(), <>=!&|~])*")
"""Symbols, numbers, operators, calls: no strings, no attributes, no subscripts."""
CALLED = re.compile(r"(\w+|\))\s*\(")
FUNCTIONS = frozenset(
    (
        "Max", "Min", "Mod", "PythonMod", "FloorDiv", "CeilDiv", "CleanDiv", "ModularIndexing", "Where", "IntTrueDiv",
        "FloatTrueDiv", "ToFloat", "TruncToInt", "TruncToFloat", "CeilToInt", "FloorToInt", "RoundToInt",
        "RoundDecimal", "PowByNatural", "FloatPow", "LShift", "RShift", "Identity", "Eq", "Ne", "Lt", "Le", "Gt", "Ge",
        "And", "Or", "Not", "Piecewise", "Abs", "floor", "ceiling", "sqrt", "log", "exp", "Integer", "Float",
        "Rational", "Pow", "Add", "Mul",
    )
)  # fmt: skip
"""What formulas of sizes call: of sympy, and of torch.utils._sympy.functions."""
MAX_JSON = 2**30
"""Bytes of a graph that are read."""


def load_pt2(path: Path) -> ExportedProgram:
    """Returns the program of a ``.pt2`` file.

    Raises:
        FileError: it is not there, is no such file, is damaged, or holds pickled objects or compiled code.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            _Archive(archive, str(path)).check()
    except OSError as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"cannot be read: {error.strerror}", where=str(path)) from error
    except zipfile.BadZipFile as error:
        what = f"it is no .pt2 file: {error}"
        raise FileError(what, where=str(path), remedy=ORIGIN) from error
    try:
        with warnings.catch_warnings(), path.open("rb") as file:
            warnings.simplefilter("ignore")
            return torch.export.load(file)  # type: ignore[arg-type]
    except Exception as error:
        what = f"torch.export.load cannot read it: {type(error).__name__}: {str(error).strip()[:300]}"
        raise FileError(
            what, where=str(path), remedy=f"It was damaged, or written by another torch. {ORIGIN}"
        ) from error


class _Archive:
    """The members of a ``.pt2`` file."""

    def __init__(self, archive: zipfile.ZipFile, where: str) -> None:
        self.archive, self.where = archive, where
        self.names = archive.namelist()

    def check(self) -> None:
        """Raises where it is no exported program, or holds what could run code."""
        models = [n for n in self.names if "models/" in n or n.endswith("serialized_exported_program.json")]
        if not models:
            what = "it is a zip archive, but no exported program is in it"
            hint = " A .pt file of torch.save or torch.jit.save is another format." if self._is_other_torch() else ""
            raise FileError(what, where=self.where, remedy=ORIGIN + hint)
        if len({name.lower() for name in self.names}) < len(self.names):  # torch's reader takes the first of a name.
            raise FileError("two of its members have one name", where=self.where, remedy=TRUST)
        for name in self.names:
            if "data/aotinductor/" in name:
                self._refuse(name, "compiled code")
            constant = name.partition("data/constants/")[2]
            if constant and not constant.startswith("tensor_") and not constant.endswith((".json", ".pt")):
                self._refuse(name, "a pickled object")
            if name.endswith((".pt", ".pkl", ".pickle")):
                self._check_tensors(name)
        for name in self.names:
            if name.endswith("_config.json"):
                self._check_config(name)
        for name in models:
            self._check_graph(name)

    def _is_other_torch(self) -> bool:
        return any(name.endswith("data.pkl") for name in self.names)

    def _refuse(self, name: str, what: str) -> None:
        raise FileError(f"it holds {what} ({name}), which is not loaded", where=self.where, remedy=TRUST)

    def _check_tensors(self, name: str) -> None:
        """Raises unless a member that torch unpickles holds tensors and plain values only."""
        content = self.archive.read(name)
        if not content:
            return
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
        except Exception:
            self._refuse(name, "a pickled object")

    def _check_config(self, name: str) -> None:
        folder = name.rpartition("/")[0]
        payloads = self._json(name).get("config", {})
        for payload in payloads.values() if isinstance(payloads, dict) else ():
            if isinstance(payload, dict) and payload.get("use_pickle"):
                member = f"{folder}/{payload.get('path_name')}"
                if member not in self.names:
                    raise FileError(f"it is damaged: it has no {member}", where=self.where, remedy=ORIGIN)
                self._check_tensors(member)

    def _check_graph(self, name: str) -> None:
        for key, value in _strings(self._json(name)):
            if key == "target" and ("." in value or value.startswith("#")) and TARGET.fullmatch(value) is None:
                self._refuse(name, f"a call of {value[:60]!r}")
            if key == "expr_str" and not _is_formula(value):
                self._refuse(name, f"the formula {value[:60]!r}")

    def _json(self, name: str) -> Any:
        if self.archive.getinfo(name).file_size > MAX_JSON:
            raise FileError(f"its {name} is larger than {MAX_JSON:,} bytes", where=self.where)
        try:
            return json.loads(self.archive.read(name))
        except ValueError as error:
            raise FileError(f"it is damaged: {name} is no JSON", where=self.where, remedy=ORIGIN) from error


def _is_formula(text: str) -> bool:
    """True for sums, products and known functions of sizes; sympy evaluates a formula as Python."""
    return "__" not in text and FORMULA.fullmatch(text) is not None and set(CALLED.findall(text)) <= FUNCTIONS


def _strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yields every string of a JSON document with its key."""
    waiting = [(key, value)]
    while waiting:
        name, current = waiting.pop()
        if isinstance(current, str):
            yield name, current
        elif isinstance(current, dict):
            waiting.extend(current.items())
        elif isinstance(current, list):
            waiting.extend((name, item) for item in current)
