"""The command: what it writes, what it refuses and with which exit code."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

import zeropoint as zp
from zeropoint.cli.app import app
from zeropoint.cli.cure_rules import rules_of
from zeropoint.cli.schema import read_toml, to_toml
from zeropoint.cli.settings import RuleSettings, Settings
from zeropoint.numerics.sqnr import sqnr_db
from zeropoint.report.compare.cures import Cure

MODULE = """
import time
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    return nn.Sequential(*layers), (torch.randn(1, 3, 8, 8),)

class Classes(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = build()[0]

    def forward(self, x):
        return self.layers(x).argmax(1)

def classes():
    return Classes(), (torch.randn(1, 3, 8, 8),)

def deep():
    return nn.Sequential(*[nn.Linear(8, 8) for _ in range(40)]), (torch.randn(1, 8),)

def broken():
    return {}["images"]

def ending():
    yield (torch.randn(1, 3, 8, 8),)
    raise OSError("no such disk")

def of_a_folder(folder):
    return [folder]

def uneven():
    yield from ((torch.randn(size, 3, 8, 8),) for size in (4, 4, 2))

def batches():
    print("printed by the model's own code")
    for _ in range(6):
        yield (torch.randn(1, 3, 8, 8),)

def slow():
    print("started", flush=True)
    for _ in range(600):
        time.sleep(0.1)
        yield (torch.randn(1, 3, 8, 8),)
"""
RESULTS = ["config.toml", "explain.txt", "model.pte", "summary.json"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of the user's with a module, a .pt2 file and data, in which the command runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "user_model", raising=False)
    Path("user_model.py").write_text(MODULE)
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.LayerNorm(144)).eval()
    torch.export.save(torch.export.export(module, (torch.randn(1, 3, 8, 8),)), "model.pt2")
    np.savez("data.npz", x=np.random.default_rng(0).normal(size=(12, 3, 8, 8)).astype("float32"))
    return tmp_path


def run(*arguments: str, code: int = 0):
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return result


def test_quantize_writes_a_folder_that_is_whole(folder):
    result = run("quantize", "user_model:build", "--data", "user_model:batches", "-o", "out", "--json")
    found = json.loads(result.stdout)
    assert "printed by" in result.stderr
    assert sorted(os.listdir("out")) == RESULTS
    assert Path("out/model.pte").read_bytes()[4:8] == b"ET12"
    assert found["operators"] == {"integer": 5, "float": 0}
    assert found["compared"]["samples"] == 6
    assert found["compared"]["agreement"] >= 0.8
    assert {**json.loads(Path("out/summary.json").read_text()), "out": "out"} == found
    assert read_toml(Path("out/config.toml"), Settings) == Settings()
    assert not [name for name in os.listdir() if name.startswith(".out")]
    run("quantize", "user_model:build", "--data", "user_model:batches", "-o", "out", code=2)
    Path("out/mine.txt").write_text("mine")
    assert "other things: mine.txt" in run(
        "quantize", "user_model:build", "--data", "random", "-o", "out", "--force", code=2
    ).stderr  # fmt: skip


def test_random_data_has_to_be_asked_for_and_is_told(folder):
    assert "there is no data" in run("quantize", "model.pt2", "-o", "out", code=2).stderr
    result = run("quantize", "model.pt2", "-o", "out", "--data", "random", "--min-sqnr", "300", "--json", code=3)
    assert json.loads(result.stdout)["data_is_random"] is True
    assert "the data is random" in result.stderr
    assert "300 dB were asked for" in result.stderr


def test_rules_say_what_they_match_before_anything_is_done(folder):
    result = run("quantize", "model.pt2", "--data", "data.npz", "--dry-run", "--exclude-type", "Conv2d")
    assert "set_module_type(torch.nn.modules.conv.Conv2d, None) matched 1 operators" in result.stdout
    assert "12 samples to measure on" in result.stdout
    assert sorted(os.listdir()) == ["data.npz", "model.pt2", "user_model.py"]
    unmatched = run("quantize", "model.pt2", "--data", "data.npz", "--dry-run", "--exclude-module", "head.*", code=2)
    assert "the rule matches no node" in unmatched.stderr


def test_explain_and_strict(folder):
    found = json.loads(run("explain", "model.pt2", "--json").stdout)
    assert [node["name"] for node in found["nodes"]] == ["conv2d", "relu", "flatten", "layer_norm"]
    assert "conv2d.weight = 0.weight: int8" in run("explain", "model.pt2", "--node", "conv2d").stdout
    assert "layer_norm (layer_norm) [3]" in run("explain", "model.pt2", "--strict", "3", code=3).stderr
    assert "matches no module" in run("explain", "model.pt2", "--strict", "x", code=2).stderr
    assert "range by" in run("explain", "model.pt2", "--data", "data.npz").stdout


def test_check(folder):
    found = json.loads(run("check", "model.pt2", "--json").stdout)
    assert found["is_as_meant"]
    assert [group["nodes"] for group in found["ends"]] == [["layer_norm"]]
    assert found["islands"] == []


def test_backends_doctor_and_config(folder):
    (xnnpack,) = json.loads(run("backends", "--json").stdout)
    assert (xnnpack["name"], xnnpack["version"] is None) == ("xnnpack", False)
    doctor = json.loads(run("doctor", "--json").stdout)
    assert doctor["torch"] == torch.__version__
    assert "integer dot product" in run("doctor").stdout
    Path("c.toml").write_text('scheme = "dynamic"\n[[rules]]\nmodule = "head.*"\n')
    shown = run("config", "--show", "--config", "c.toml", "--exclude-type", "Linear").stdout
    Path("shown.toml").write_text(shown)
    settings = read_toml(Path("shown.toml"), Settings)
    assert (settings.scheme, [rule.module or rule.type for rule in settings.rules]) == ("dynamic", ["head.*", "Linear"])
    assert to_toml(settings) == shown


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[data.image]\nsiez = [8, 8]", r"there is no key 'data.image.siez'. Did you mean 'size'? Allowed here: size,"),
        ('verify = "yes"', 'verify is "yes"; it takes true or false'),
        ("[data]\nsamples = 1.5", "data.samples is 1.5; it takes a whole number"),
        ('accuracy = ["equalise"]', 'accuracy[0] is "equalise"; it takes one of "equalize", "correct_biases"'),
        ("data = 3", "data is 3; it takes a table"),
        ("[data]\nsamples = 0", "data.samples is 0; it takes 1 or more"),
        ("[[rules]]\nscheme = 'float'", "rules[0] has no key that says for what it is"),
        ("verify = ", "it is no TOML"),
    ],
)
def test_a_configuration_that_is_wrong_says_where(folder, content, message):
    Path("c.toml").write_text(content)
    stderr = run("config", "--show", "--config", "c.toml", code=2).stderr
    assert stderr.startswith("zeropoint: c.toml: ")
    assert message in stderr


class Boom:
    def __reduce__(self):
        return os.mkdir, ("boom",)


def rewritten(name: str, change) -> None:
    """Writes model.pt2 again, with a change to its members."""
    with zipfile.ZipFile("model.pt2") as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    change(members)
    with zipfile.ZipFile(name, "w") as archive:
        for member, content in members.items():
            archive.writestr(member, content)


def with_pickle(members):
    (inputs,) = [name for name in members if "sample_inputs" in name]
    Path("p.pt").unlink(missing_ok=True)
    torch.save(Boom(), "p.pt")
    members[inputs] = Path("p.pt").read_bytes()


def with_object(members):
    root = next(iter(members)).partition("/")[0]
    members[f"{root}/data/constants/opaque_obj_0"] = pickle.dumps(Boom())


def with_target(target):
    def change(members):
        name = next(name for name in members if name.endswith("models/model.json"))
        members[name] = members[name].replace(b"torch.ops.aten.relu.default", target.encode())

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_pickle, "it holds a pickled object"),
        (with_object, "it holds a pickled object"),
        (with_target("torch.serialization.os.mkdir"), "it holds a call of 'torch.serialization.os.mkdir'"),
        (with_target("torch.ops.load_library"), "it holds a call of 'torch.ops.load_library'"),
    ],
)
def test_a_program_that_could_run_code_is_refused(folder, change, message):
    rewritten("bad.pt2", change)
    assert message in run("explain", "bad.pt2", code=1).stderr
    assert not Path("boom").exists()


def test_files_that_are_no_programs(folder):
    Path("junk.pt2").write_bytes(b"junk")
    torch.save({"a": 1}, "weights.pt2")
    Path("half.pt2").write_bytes(Path("model.pt2").read_bytes()[:3000])
    for name, message in (("junk", "no .pt2 file"), ("weights", "no exported program"), ("half", "no .pt2 file")):
        assert message in run("explain", f"{name}.pt2", code=1).stderr
    assert "cannot be read" in run("explain", "absent.pt2", code=1).stderr
    assert "no module 'absent'" in run("explain", "absent:build", code=2).stderr
    assert "has no 'biuld'" in run("explain", "user_model:biuld", code=2).stderr


def test_data_that_does_not_fit(folder):
    np.savez("wide.npz", x=np.zeros((4, 3, 9, 9), "float32"))
    np.savez("double.npz", x=np.zeros((4, 3, 8, 8)))
    np.savez("objects.npz", x=np.array([{"a": 1}], dtype=object))
    save_file({"x": torch.randn(4, 3, 8, 8)}, "data.safetensors")
    for name, message in (("wide", "has shape"), ("double", "torch.float64"), ("objects", "pickled objects")):
        stderr = run("quantize", "model.pt2", "--data", f"{name}.npz", "--dry-run", code=1).stderr
        assert message in stderr
    assert "4 samples" in run("quantize", "model.pt2", "--data", "data.safetensors", "--dry-run").stdout


def test_an_index_that_the_model_has_no_row_for(folder):
    """The error names the operator, and says that it may be the data; torch's own traceback is for --debug."""
    module = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4)).eval()
    torch.export.save(torch.export.export(module, (torch.zeros(1, 6, dtype=torch.int64),)), "words.pt2")
    np.savez("words.npz", x=np.arange(24).reshape(4, 6))
    stderr = run("quantize", "words.pt2", "--data", "words.npz", "-o", "out", code=1).stderr
    assert "IndexError: index out of range in self" in stderr
    assert "aten.embedding.default" in stderr
    assert "The model fails on these inputs" in stderr
    assert "traceback" not in stderr
    assert not Path("out").exists()


def test_pictures_in_folders_of_classes(folder):
    from zeropoint.cli.data import load_data
    from zeropoint.cli.settings import DataSettings, ImageSettings

    pixels = np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    for name in ("ant", "bee", "cat"):
        Path("pictures", name).mkdir(parents=True)
        Image.fromarray(pixels).save(f"pictures/{name}/1.png")
    image = ImageSettings(resize="none", mean=(0.5, 0.4, 0.3), std=(0.2,), colors="BGR")
    data = load_data("pictures", (torch.zeros(1, 3, 8, 8),), ["x"], DataSettings(image=image))
    (first, *_) = data.calibration
    expected = (pixels[:, :, ::-1] / 255 - np.array([0.5, 0.4, 0.3])) / 0.2
    torch.testing.assert_close(first[0][0], torch.from_numpy(expected.transpose(2, 0, 1).copy()).float())
    assert data.class_names == ("ant", "bee", "cat")
    assert sorted(label for batch in data.classes for label in batch) == [0, 1, 2]


def test_functions_of_the_user_that_fail_say_what_they_raised(folder):
    found = run("quantize", "user_model:build", "--data", "user_model:broken", "-o", "out", code=2).stderr
    assert "user_model:broken: it raised KeyError: 'images'" in found
    found = run("quantize", "user_model:build", "--data", "user_model:of_a_folder", "-o", "out", code=2).stderr
    assert "it cannot be called without arguments" in found
    found = run("quantize", "user_model:build", "--data", "user_model:ending", "-o", "out", code=2).stderr
    assert "user_model:ending: it raised OSError: no such disk. --debug shows where." in found


@pytest.mark.parametrize(
    ("weights", "scheme", "observer"),
    [
        ("per_channel", "static", "minmax"), ("per_channel", "static", "histogram"),
        ("per_channel", "dynamic", "minmax"),
        ("per_tensor", "static", "minmax"), ("per_tensor", "static", "histogram"),
    ],
)  # fmt: skip
def test_small_weights_are_not_rounded_away(weights, scheme, observer):
    from zeropoint.cli.quantizers import quantizer_of

    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    with torch.no_grad():
        for parameter in module[2].parameters():
            parameter.mul_(1e-3)
    x = torch.randn(64, 16)
    quantizer = quantizer_of(Settings(weights=weights, scheme=scheme, observer=observer))
    prepared = zp.prepare_pt2e(torch.export.export(module, (x,)).module(), quantizer)
    prepared(x)
    assert sqnr_db(module(x), zp.convert_pt2e(prepared)(x)) > 30


def test_a_cure_keeps_the_scheme_of_the_rule_around():
    rule = RuleSettings(module="encoder*", scheme="dynamic", weights="per_tensor")
    cure = Cure("per_channel", ("encoder.0", "head"), (), 1.0, 0, 1.0)
    assert [(each.module, each.scheme) for each in rules_of([cure], Settings(rules=(rule,)))] == [
        ("encoder.0", "dynamic"), ("head", "static"),
    ]  # fmt: skip


def test_a_reader_that_has_enough_ends_it_without_a_word(folder):
    with started("explain", "user_model:deep", "--json") as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""
    assert process.returncode == 1


def test_samples_of_batches_of_several_sizes_are_counted(folder):
    from zeropoint.cli.data import load_data
    from zeropoint.cli.settings import DataSettings

    data = load_data("user_model:uneven", None, ["x"], DataSettings())
    assert (data.calibration.samples, data.evaluation.samples) == (10, 10)
    assert "10 samples to measure on, 10 the same to compare on" in data.describe()


def test_pictures_of_16_bits_are_refused(folder):
    Path("pictures").mkdir()
    Image.fromarray(np.full((8, 8), 1000, dtype=np.uint16)).save("pictures/1.png")
    message = run("quantize", "model.pt2", "--data", "pictures", "-o", "out", code=1).stderr
    assert "its values are no bytes (mode I;16)" in message


def test_an_accuracy_that_cannot_be_measured_is_not_reached(folder):
    arguments = ("quantize", "user_model:classes", "--data", "user_model:batches", "-o", "out", "--min-sqnr", "20")
    assert "the model has no float output" in run(*arguments, code=3).stderr
    assert "no float output" in run(*arguments[:-2], "--force").stdout


def test_a_program_that_was_exported_in_train_mode_is_compared_in_eval_mode(folder):
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(144, 3)
    module, x = nn.Sequential(*layers), torch.randn(2, 3, 8, 8)
    torch.export.save(torch.export.export(module.train(), (x,)), "trained.pt2")
    found = json.loads(run("quantize", "trained.pt2", "--data", "data.npz", "-o", "out", "--json").stdout)
    assert found["compared"]["sqnr_db"] > 25


@pytest.mark.parametrize("fails_at", [1, 2])
def test_an_interruption_between_two_renames_keeps_the_old_folder(folder, monkeypatch, fails_at):
    from zeropoint.cli.output_folder import written_whole

    Path("out").mkdir()
    Path("out/model.pte").write_text("old")
    rename, calls = Path.rename, []

    def interrupted(path, target):
        calls.append(path)
        if len(calls) == fails_at:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), written_whole(Path("out")) as temporary:
        (temporary / "model.pte").write_text("new")
    assert Path("out/model.pte").read_text() == "old"
    assert [name for name in os.listdir() if "out" in name] == ["out"]


def hear() -> None:
    """Lets a process be interrupted: one that is started by a run in the background is deaf to that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def started(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "zeropoint", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=hear)


@pytest.mark.parametrize(
    ("sent", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_an_interruption_leaves_nothing(folder, sent, code, word):
    process = started("quantize", "user_model:build", "--data", "user_model:slow", "-o", "out")
    assert process.stderr is not None
    while "started" not in process.stderr.readline():
        assert process.poll() is None
    time.sleep(0.2)
    process.send_signal(sent)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code
    assert f"{word}; nothing is left half written" in stderr
    assert "Traceback" not in stderr
    assert not [name for name in os.listdir() if "out" in name]


def test_python_m_zeropoint_without_its_packages(folder):
    process = started("--version")
    assert process.communicate(timeout=120)[0].strip() == "0.1.0"
    code = "import sys; sys.modules['typer'] = None; import zeropoint.cli as c; c.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "pip install 'zeropoint[cli]'" in done.stderr
