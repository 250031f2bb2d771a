"""What users ask of a quantization tool, and what explain, compare, bench, the report and the command answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner, Result

import zeropoint as zp
from zeropoint.backends.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config
from zeropoint.cli.app import app
from zeropoint.core.errors import RuleError, StaysFloatError

PATHS = ("conv", "head.*", "norm", "act")


class Mixed(nn.Module):
    """Layers that are integer, and some that XNNPACK computes in float."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.act = nn.Conv2d(3, 8, 3, padding=1), nn.GELU()
        self.norm, self.head = nn.LayerNorm(8), nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.act(self.conv(x)).mean((2, 3))))


def quantizer() -> XNNPACKQuantizer:
    return XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))


def pictures(count: int = 4) -> list[tuple[torch.Tensor]]:
    draw = torch.Generator().manual_seed(1)
    return [(torch.randn(2, 3, 8, 8, generator=draw),) for _ in range(count)]


def calibrated(model: nn.Module, batches: list[Any], rules: XNNPACKQuantizer | None = None) -> torch.fx.GraphModule:
    prepared = zp.prepare_pt2e(torch.export.export(model, batches[0]).module(), rules or quantizer())
    for batch in batches:
        prepared(*batch)
    return prepared


def command(*words: str | Path) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model as a file, and samples for it."""
    at = tmp_path_factory.mktemp("answers")
    torch.export.save(torch.export.export(Mixed().eval(), (torch.randn(1, 3, 8, 8),)), at / "model.pt2")
    samples = np.random.default_rng(0).normal(size=(16, 3, 8, 8)).astype("float32")
    np.savez(at / "samples.npz", x=samples)
    return at


# 1. An operator that stays float says so, with the reason; and where none may, it is an error.


def test_1_what_stays_float_has_a_reason():
    found = zp.explain(Mixed().eval(), quantizer(), pictures()[0])
    floats = {node.operator: node.reason for node in found if not node.is_quantized}
    assert {"gelu", "layer_norm"} <= set(floats)
    assert all(floats.values())
    assert {"conv2d", "linear"} <= {node.operator for node in found if node.is_quantized}


@pytest.mark.parametrize(("path", "fails"), [("head.*", False), ("norm", True), ("*", True)])
def test_1_strict_modules(path: str, fails: bool):
    if not fails:
        assert zp.explain(Mixed().eval(), quantizer(), pictures()[0], strict=[path]).nodes
        return
    with pytest.raises(StaysFloatError, match="norm"):
        zp.explain(Mixed().eval(), quantizer(), pictures()[0], strict=[path])


def test_1_the_command_ends_with_a_code(folder: Path):
    assert command("explain", folder / "model.pt2").exit_code == 0
    assert command("explain", folder / "model.pt2", "--strict", "norm").exit_code != 0


# 4. One call ranks what destroys accuracy, as text, as data, and as one HTML file.


def test_4_the_spoiled_channel_is_first(tmp_path: Path):
    model = Mixed().eval()
    with torch.no_grad():
        model.conv.weight[2] *= 100
        model.act = nn.ReLU()
        model.norm = nn.Identity()
        model.head[0].weight[:, 2] /= 100
    batches = pictures()
    result = zp.quantize(model, batches[0], batches, accuracy=())
    found = zp.compare(model, result.model, batches)
    assert found.worst.operator in ("relu", "mean")  # Both hold the channel, up to where the head undoes it.
    assert found.worst.gain_db == max(row.gain_db for row in found.sites)
    row = json.loads(found.to_json())["sites"][0]
    assert {"sqnr_db", "cosine", "clipped", "gain_db"} <= set(row)
    page = result.report(tmp_path / "report.html", comparison=found).read_text()
    assert found.worst.site in page
    assert "http://" not in page.split("</head>")[0]


# 5. Whether the backend takes what was quantized is known before calibration.


def test_5_checked_before_calibration(folder: Path):
    checked = zp.check_backend(Mixed().eval(), quantizer(), pictures()[0])
    assert checked.is_as_meant
    assert not checked.ranges_are_known
    assert {name for island in checked.islands for name in island.nodes}
    done = command("check", folder / "model.pt2", "--json")
    assert done.exit_code == 0
    assert json.loads(done.stdout)["is_as_meant"]


def test_5_what_is_computed_in_float_is_named():
    class Everything(zp.Quantizer):
        """Quantizes GELU, which XNNPACK computes in float."""

        def annotate(self, model: torch.fx.GraphModule) -> torch.fx.GraphModule:
            spec = get_symmetric_quantization_config().input_activation
            for node in model.graph.nodes:
                if node.target is torch.ops.aten.gelu.default:
                    node.meta["quantization_annotation"] = zp.QuantizationAnnotation(
                        {node.args[0]: spec}, spec, _annotated=True
                    )
            return model

        def validate(self, model: torch.fx.GraphModule) -> None:
            del model

    checked = zp.check_backend(Mixed().eval(), Everything(), pictures()[0])
    assert not checked.is_as_meant
    assert any("gelu" in str(finding) for finding in checked.unfolded)


# 6. Is it faster? Measured on the runtime, with what is computed in integers and what is not.


def test_6_speed_is_measured_and_counted():
    batches = pictures()
    result = zp.quantize(Mixed().eval(), batches[0], batches)
    measured = zp.bench(Mixed().eval(), result, runs=3)
    conv, linear = 2 * 8 * 8 * 8 * 27, 2 * (8 * 8 + 8 * 4)
    assert (measured.integer_macs, measured.float_macs) == (conv + linear, 0)
    assert measured.ratio > 0
    assert measured.ratio < 0.9 or measured.why
    assert {"latency", "file", "memory", "work", "borders"} <= {line.split()[0] for line in str(measured).splitlines()}


# 15. Rules say how much they match, before anything is done; one that matches nothing is an error.


def test_15_rules_count_what_they_match():
    rules = quantizer().set_module_name("head.*", None)
    (rule,) = zp.explain(Mixed().eval(), rules, pictures()[0]).rules
    assert "head" in rule.rule
    assert rule.matched == 3
    with pytest.raises(RuleError, match="tail"):
        zp.explain(Mixed().eval(), quantizer().set_module_name("tail", None), pictures()[0])


def test_15_a_dry_run_writes_nothing(folder: Path):
    words = ("quantize", folder / "model.pt2", "--data", folder / "samples.npz")
    done = command(*words, "--exclude-module", "head.*", "--dry-run")
    assert done.exit_code == 0
    assert "matched 3 operators" in done.stdout
    assert sorted(each.name for each in folder.iterdir()) == ["model.pt2", "samples.npz"]
    assert command(*words, "--exclude-module", "tail.*", "--dry-run").exit_code != 0


# 27. The file shrinks, and which weights became how many bytes is said.


def test_27_bytes_before_and_after():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256)).eval()
    batches = [(torch.randn(4, 256),) for _ in range(2)]
    result = zp.quantize(model, batches[0], batches)
    assert len(result.pte) < 0.3 * 4 * 2 * 256 * 256
    assert {name: tensor.dtype for name, tensor in result.tensors().items()} == {
        "0.weight": torch.int8,
        "2.weight": torch.int8,
    }
    assert "weights   " in str(result)


# 30. One command on a model and samples; random data is refused; whether the samples were enough is said.


def test_30_one_command(folder: Path, tmp_path: Path):
    done = command(
        "quantize", folder / "model.pt2", "--data", folder / "samples.npz", "-o", tmp_path / "out", "--report"
    )
    assert done.exit_code == 0, done.output
    assert {"model.pte", "summary.json", "report.html", "config.toml"} <= {p.name for p in (tmp_path / "out").iterdir()}
    assert "samples" in done.output


def test_30_no_data_is_refused_in_words(folder: Path, tmp_path: Path):
    done = command("quantize", folder / "model.pt2", "-o", tmp_path / "out")
    assert done.exit_code != 0
    assert "--data" in done.output
    assert not (tmp_path / "out").exists()
