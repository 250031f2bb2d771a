"""Loading and running ``.pte`` files, and what is said when that fails."""

from __future__ import annotations

import importlib
import math
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.backends.q_dq import qd
from zeropoint.backends.xnnpack import lower_float
from zeropoint.core.errors import FileError, MissingExtraError, RuntimeFailure, SpecError
from zeropoint.numerics.sqnr import sqnr_db
from zeropoint.runtime.child import load_values, run_in_child, save_values
from zeropoint.runtime.executorch import Program

INPUTS = (torch.arange(6.0).reshape(2, 3),)


@pytest.fixture(scope="module")
def layer() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 4).eval()


@pytest.fixture(scope="module")
def pte(layer: nn.Module) -> bytes:
    return lower_float(layer, INPUTS).pte


class PerChannel(nn.Module):
    """Quantizes its input per channel with float32 scales: the portable kernel asserts float64 ones."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scales, zero_points = torch.full((2,), 0.1), torch.zeros(2, dtype=torch.int64)
        return qd.quantize_per_channel(x, scales, zero_points, 0, -128, 127, torch.int8)


class Scaled(nn.Module):
    """Takes a number beside its tensor."""

    def forward(self, x: torch.Tensor, factor: int) -> torch.Tensor:
        return x * factor


@pytest.fixture(scope="module")
def aborting() -> bytes:
    return lower_float(PerChannel(), INPUTS).pte


@torch.no_grad()
def test_program_computes_what_the_model_does(pte: bytes, layer: nn.Module, tmp_path: Path):
    path = tmp_path / "model.pte"
    path.write_bytes(pte)
    (actual,) = Program.load(path)(*INPUTS)
    torch.testing.assert_close(actual, layer(*INPUTS))
    (transposed,) = Program(pte)(INPUTS[0].t().contiguous().t())
    torch.testing.assert_close(transposed, layer(*INPUTS))


def test_outputs_stay_when_the_program_runs_again(pte: bytes):
    program = Program(pte)
    (first,) = program(*INPUTS)
    before = first.clone()
    program(INPUTS[0] * 5)
    assert torch.equal(first, before)


def test_missing_file(tmp_path: Path):
    with pytest.raises(FileError, match=r"nothing\.pte: cannot be read: No such file"):
        Program.load(tmp_path / "nothing.pte")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 an archive of something", b"ET12"])
def test_foreign_file(tmp_path: Path, content: bytes):
    path = tmp_path / "other.pte"
    path.write_bytes(content)
    with pytest.raises(
        FileError, match=r"other\.pte: is no \.pte file: it starts with .*zeropoint or ExecuTorch wrote"
    ):
        Program.load(path)


def test_truncated_file(pte: bytes, tmp_path: Path):
    path = tmp_path / "half.pte"
    for length in (len(pte) // 2, len(pte) // 4, 16):
        path.write_bytes(pte[:length])
        with pytest.raises(
            (FileError, RuntimeFailure), match=r"the runtime did not load it|is no \.pte file|is cut off"
        ):
            Program.load(path)


def test_damaged_file_is_an_error_and_no_crash(pte: bytes):
    """In a child process: what is tested for once ended Python."""
    code = """import sys
from zeropoint.core.errors import RuntimeFailure
from zeropoint.runtime.executorch import Program
pte = open(sys.argv[1], "rb").read()
for start in range(64, 400, 24):
    try:
        Program(pte[:start] + b"\\xff" * 50 + pte[start + 50:])
    except RuntimeFailure as error:
        print(error)
"""
    with tempfile.NamedTemporaryFile(suffix=".pte") as file:
        Path(file.name).write_bytes(pte)
        done = subprocess.run([sys.executable, "-c", code, file.name], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "the runtime did not load it: the file is damaged" in done.stdout
    assert "Copy or write the file again." in done.stdout


@pytest.mark.parametrize("content", [None, "model.pte", Path("model.pte"), 5])
def test_what_is_no_bytes(content: object):
    with pytest.raises(SpecError, match=r"program: pte is \w+, not bytes\. Give the bytes.*Program\.load"):
        Program(content)


def test_other_kinds_of_bytes(pte: bytes):
    assert torch.equal(Program(bytearray(pte))(*INPUTS)[0], Program(memoryview(pte))(*INPUTS)[0])


@pytest.mark.parametrize("x", [torch.zeros(2, 5), torch.zeros(3), torch.zeros(2, 3, dtype=torch.int32)])
def test_wrong_input_is_named_with_what_the_program_takes(pte: bytes, x: torch.Tensor):
    words = f"program: input 0 is {x.dtype} of shape {tuple(x.shape)}, the program takes torch.float32 of shape (2, 3)."
    with pytest.raises(RuntimeFailure, match=re.escape(words)):
        Program(pte)(x)


@pytest.mark.parametrize(("x", "text"), [(torch.zeros(1, 3), r"torch.float32 of shape (1, 3)"), (2.5, "2.5")])
def test_input_that_the_runtime_refuses(pte: bytes, x: object, text: str):
    words = f"the runtime failed on inputs {text}, where the program takes torch.float32 of shape (2, 3): "
    with pytest.raises(RuntimeFailure, match=re.escape(words)):
        Program(pte)(x)


def test_longer_rows_of_a_varying_number_are_refused(layer: nn.Module):
    """The runtime would take them: there are not more elements than there may be."""
    count = torch.export.Dim("count", min=1, max=9)
    program = Program(lower_float(layer, INPUTS, dynamic_shapes=({0: count},)).pte)
    assert program(torch.zeros(5, 3))[0].shape == (5, 4)
    with pytest.raises(RuntimeFailure, match=r"input 0 is .*\(2, 4\), the program takes .*\(9, 3\)\. .*may vary"):
        program(torch.zeros(2, 4))


def test_wrong_number_of_inputs(pte: bytes):
    with pytest.raises(RuntimeFailure, match=r"program: 2 inputs were given, the program takes 1"):
        Program(pte)(INPUTS[0], INPUTS[0])


def test_numbers_are_no_tensors():
    program = Program(lower_float(Scaled(), (INPUTS[0], 2)).pte)
    assert torch.equal(program(INPUTS[0], 2)[0], INPUTS[0] * 2)


def test_child_runs_each_batch(pte: bytes, layer: nn.Module):
    batches = [INPUTS, (INPUTS[0] * -2,)]
    outputs = run_in_child(pte, batches)
    assert [len(each) for each in outputs] == [1, 1]
    for (actual,), inputs in zip(outputs, batches, strict=True):
        torch.testing.assert_close(actual, layer(*inputs).detach())


def test_aborting_kernel_kills_the_child_only(aborting: bytes):
    with pytest.raises(RuntimeFailure, match=r"the runtime died of signal 6 \(SIGABRT\)"):
        run_in_child(aborting, [INPUTS])


def test_failure_in_the_child_is_said_without_a_traceback(pte: bytes):
    with pytest.raises(RuntimeFailure, match=r"input 0 is torch\.float32 of shape \(2, 5\)") as caught:
        run_in_child(pte, [(torch.zeros(2, 5),)])
    assert "Traceback" not in str(caught.value)
    assert "^^^" not in str(caught.value)


def test_child_out_of_time(pte: bytes):
    with pytest.raises(RuntimeFailure, match=r"did not answer in 0\.01 s"):
        run_in_child(pte, [INPUTS], timeout=0.01)


def test_values_on_disk(tmp_path: Path):
    path = tmp_path / "values.npz"
    tensors = (torch.tensor([True, False]), torch.arange(3), torch.zeros(2, 0), torch.tensor(4))
    values = (None, *tensors[:2], 2.5, *tensors[2:], 3, True, math.inf)
    save_values(path, values)
    for loaded, value in zip(load_values(path), values, strict=True):
        assert_same(loaded, value)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.uint8, torch.int16, torch.uint16]
)
def test_tensors_on_disk_keep_their_dtype(dtype: torch.dtype, tmp_path: Path):
    values = (torch.arange(6).reshape(2, 3).to(dtype).t(), torch.tensor(3).to(dtype))
    save_values(tmp_path / "values.npz", values)
    for loaded, value in zip(load_values(tmp_path / "values.npz"), values, strict=True):
        assert_same(loaded, value)


def assert_same(loaded: object, value: object) -> None:
    assert type(loaded) is type(value)
    if isinstance(value, torch.Tensor):
        torch.testing.assert_close(loaded, value, rtol=0, atol=0)
    else:
        assert loaded == value


@pytest.fixture
def without_executorch(monkeypatch: pytest.MonkeyPatch) -> None:
    original = importlib.import_module

    def fail(name: str, package: str | None = None):
        if name.startswith("executorch"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return original(name, package)

    monkeypatch.setattr(importlib, "import_module", fail)


def test_missing_extra(without_executorch: None, pte: bytes, layer: nn.Module):
    words = r"the package 'executorch' is not installed. Install it with: pip install 'zeropoint\[executorch\]'"
    with pytest.raises(MissingExtraError, match=words):
        Program(pte)
    with pytest.raises(MissingExtraError, match=words):
        lower_float(layer, INPUTS)


def test_importing_zeropoint_imports_no_extra():
    code = "import sys, zeropoint.backends.xnnpack; print([m for m in ('executorch', 'torchao') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_sqnr():
    reference = torch.tensor([3.0, 4.0])
    assert sqnr_db(reference, reference.clone()) == math.inf
    assert sqnr_db(reference, torch.tensor([3.0, 4.5])) == pytest.approx(10 * math.log10(25 / 0.25))
    assert sqnr_db(reference, torch.zeros(2)) == 0.0
    assert sqnr_db(torch.zeros(2), torch.ones(2)) == -math.inf
    assert sqnr_db(torch.zeros(2), torch.zeros(2)) == math.inf
    assert sqnr_db(reference, torch.zeros(3)) == -math.inf
    assert sqnr_db(reference, torch.tensor([math.nan, 4.0])) == -math.inf
    assert sqnr_db(reference, torch.tensor([3.0, math.inf])) == -math.inf
    assert sqnr_db(torch.arange(4), torch.tensor([0, 1, 2, 4])) == pytest.approx(10 * math.log10(14))


def test_sqnr_of_values_that_are_not_finite():
    odd = torch.tensor([3.0, -math.inf, 4.0, math.inf, math.nan])
    assert sqnr_db(odd, odd.clone()) == math.inf
    near = torch.tensor([3.0, -math.inf, 4.5, math.inf, math.nan])
    assert sqnr_db(odd, near) == pytest.approx(10 * math.log10(25 / 0.25))
    assert sqnr_db(odd, -odd) == -math.inf
    assert sqnr_db(odd, torch.zeros(5)) == -math.inf
    assert sqnr_db(torch.zeros(2), torch.tensor([0.0, math.nan])) == -math.inf
