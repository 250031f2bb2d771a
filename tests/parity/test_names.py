"""Every name of torchao's PT2E package is where programs look for it, and is called as they call it."""

import importlib
import inspect
import subprocess
import sys
import warnings
from enum import Enum
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchao")
THEIRS, OURS = "torchao.quantization.pt2e", "zeropoint.pt2e"
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    ROOT = Path(importlib.import_module(THEIRS).__file__).parent

USED = {
    "": ["PartialWrapper"],
    "_affine_quantization": [
        "_get_reduction_params", "AffineQuantizedMinMaxObserver", "AffineQuantizedMovingAverageMinMaxObserver",
        "AffineQuantizedPlaceholderObserver", "choose_qparams_affine_with_min_max",
    ],
    "graph_utils": ["get_source_partitions"],
    "observer": ["PartialWrapper"],
    "prepare": ["_is_activation_post_process_node"],
    "qat_utils": ["_fold_conv_bn_qat", "_fuse_conv_bn_qat", "_get_aten_graph_module_for_pattern"],
    "quantizer.quantizer": ["Q_ANNOTATION_KEY"],
    "quantizer.utils": [
        "QuantizationConfig", "OperatorPatternType", "OperatorConfig", "get_input_act_qspec", "get_output_act_qspec",
        "get_weight_qspec", "get_bias_qspec", "annotate_input_qspec_map", "annotate_output_qspec",
        "get_module_name_filter", "is_valid_annotation",
    ],
    "export_utils": ["WrapperModule"],
    "utils": [
        "_filter_sym_size_users", "_get_aten_graph_module_for_pattern", "_is_conv_node", "_is_conv_transpose_node",
        "get_new_attr_name_with_prefix",
    ],
}  # fmt: skip
"""By module: names that backends import besides those of ``__all__``."""

INTERNAL = {
    "convert": "torchao's own steps of convert, which end in modules of FX graph mode",
    "inductor_passes": "Inductor's passes",
    "inductor_passes.lowering": "Inductor's passes",
    "inductor_passes.x86": "Inductor's passes",
    "prepare.prepare": "torchao's own step of prepare, which needs FX graph mode's table of scopes",
}
"""Modules and names that no program but torchao itself uses, with what they are."""

STEPS = ("reset_histogram", "observe_quant_params")
"""Methods that torchao's observers call on themselves, and one that prints: ours are printed as modules are."""


def modules() -> list[str]:
    """Returns the dotted paths of torchao's modules inside of its package; empty for the package itself."""
    paths = (path.relative_to(ROOT).with_suffix("") for path in sorted(ROOT.rglob("*.py")))
    return [".".join(part for part in path.parts if part != "__init__") for path in paths]


def at(package: str, module: str):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(f"{package}.{module}" if module else package)


def full(module: str, name: str) -> str:
    return f"{module}.{name}" if module else name


def promised() -> list[tuple[str, str]]:
    """Returns each ``(module, name)`` that ought to be there."""
    found = []
    for module in modules():
        if module in INTERNAL:
            continue
        names = [*getattr(at(THEIRS, module), "__all__", []), *USED.get(module, [])]
        found += [(module, name) for name in dict.fromkeys(names) if full(module, name) not in INTERNAL]
    return found


def exists(path: str) -> bool:
    """True for a module or a name of ours."""
    module, _, name = path.rpartition(".")
    try:
        at(OURS, path)
    except ModuleNotFoundError:
        try:
            return hasattr(at(OURS, module), name)
        except ModuleNotFoundError:
            return False
    return True


def parameters(function) -> list[str]:
    """Returns the parameters that can be given by position, in order; through ``*args`` those of the next class too."""
    if not inspect.isclass(function):
        return positional(function)[0]
    names: list[str] = []
    for kind in function.__mro__:
        if "__init__" not in vars(kind) or kind in (torch.nn.Module, object):
            continue
        own, goes_on = positional(vars(kind)["__init__"])
        names += [name for name in own if name != "self"]
        if not goes_on:
            break
    return names


def positional(function) -> tuple[list[str], bool]:
    kinds = inspect.Parameter
    found = inspect.signature(function).parameters.values()
    names = [p.name for p in found if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)]
    return names, any(p.kind is kinds.VAR_POSITIONAL for p in found)


def is_called(value) -> bool:
    """True for functions, and for classes that are built."""
    return inspect.isfunction(value) or (inspect.isclass(value) and not issubclass(value, Enum))


@pytest.mark.parametrize(("module", "name"), promised(), ids=lambda part: part or "pt2e")
def test_each_name_is_there_and_is_called_alike(module, name):
    theirs, ours = getattr(at(THEIRS, module), name), getattr(at(OURS, module), name)
    assert name in at(OURS, module).__all__
    assert inspect.isclass(theirs) is inspect.isclass(ours)
    if is_called(theirs):
        wanted = parameters(theirs)
        assert parameters(ours)[: len(wanted)] == wanted


@pytest.mark.parametrize(("module", "name"), promised(), ids=lambda part: part or "pt2e")
def test_each_method_of_a_class_is_there(module, name):
    theirs = getattr(at(THEIRS, module), name)
    if not inspect.isclass(theirs):
        return
    ours = getattr(at(OURS, module), name)
    own = [kind for kind in theirs.__mro__ if kind.__module__.startswith("torchao")]
    methods = {name for kind in own for name, value in vars(kind).items() if callable(value) and name not in STEPS}
    assert not [method for method in sorted(methods) if not method.startswith("_") and not hasattr(ours, method)]


MODULES_IN = """
import importlib, types
package = importlib.import_module("{package}")
print(*[name for name, value in vars(package).items() if isinstance(value, types.ModuleType)])
"""


def modules_in(package: str) -> set[str]:
    """Returns which of the package's modules are its attributes once it alone is imported, in a fresh process."""
    command = [sys.executable, "-c", MODULES_IN.format(package=package)]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


@pytest.mark.parametrize("package", ["", "quantizer"])
def test_each_module_is_an_attribute_once_its_package_is_imported(package):
    named = {module.rpartition(".")[2] for module in modules() if module.rpartition(".")[0] == package}
    theirs, ours = (modules_in(full(root, package) if package else root) for root in (THEIRS, OURS))
    absent = (theirs & named) - ours
    assert theirs & named
    assert not {module for module in absent if full(package, module) not in INTERNAL}


def test_each_module_is_there_or_has_a_reason():
    absent = [module for module in modules() if module and not exists(module)]
    assert not [module for module in absent if module not in INTERNAL]


@pytest.mark.parametrize("path", sorted(INTERNAL))
def test_the_lists_name_what_torchao_has(path):
    module, _, name = path.rpartition(".")
    assert path in modules() or hasattr(at(THEIRS, module), name)
