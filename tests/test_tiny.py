"""The README's programs, run as they stand. The first is the smallest whole use of the product."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))


def programs(path: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", path.read_text(), flags=re.DOTALL)


@pytest.fixture(scope="module")
def readme(tmp_path_factory):
    """Returns the names that the README's programs define, run one after the other in a folder of their own."""
    names: dict[str, object] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("readme"))
        for program in programs(README):
            exec(compile(program, str(README), "exec"), names)
        names["saved"] = Path("model.pte").read_bytes()
    return names


def test_one_call(readme):
    result = readme["result"]
    assert readme["saved"] == result.pte
    assert all(row.is_quantized for row in result.coverage)
    assert result.delegates == 1
    assert result.outside == ()
    assert result.runtime_sqnr_db >= 55
    assert result.float_sqnr_db >= 30
    assert "integer   3 of 3 operators: conv2d 2, hardtanh 1" in str(result)


def test_step_by_step_is_the_same_workflow(readme):
    (inputs,) = readme["example_inputs"]
    expected = readme["model"](inputs)
    error = readme["quantized"](inputs) - expected
    assert 10 * torch.log10(expected.square().sum() / error.square().sum()) >= 30
    assert readme["pte"][4:8] == b"ET12"


def test_rules_of_the_readme(readme):
    assert readme["quantizer"].rules.by_module_name == {"3": None}


def test_language_model_of_the_readme(readme):
    result = readme["language"]
    assert len(result.pte) < 0.45 * sum(4 * p.numel() for p in readme["encoder"].parameters())
    assert {row.operator for row in result.coverage if row.is_quantized} == {"linear"}
    assert result.runtime_sqnr_db > 60


@pytest.mark.filterwarnings("ignore")  # ExecuTorch and torchao warn where they are imported.
@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_programs_of_the_docs_run(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for program in programs(path):
        if "import lightning" in program and importlib.util.find_spec("lightning") is None:
            pytest.skip(
                "the programs before were run; lightning, for this one, is not installed: pip install lightning"
            )
        exec(compile(program, str(path), "exec"), names)
