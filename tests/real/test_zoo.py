"""The float models reach their known scores: what every comparison with a quantized model rests on."""

from __future__ import annotations

import pytest
import torch

from zoo import architectures, crepe, efficientnet_lite0, minilm, mnist, packages, silero_vad, waifu2x
from zoo.photos import LABELLED_PHOTOS


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Small depthwise convolutions gain little from more threads, and lose much where the cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_waifu2x_reaches_its_psnr_and_beats_bicubic():
    model, _ = waifu2x.load()
    assert waifu2x.metric(model) == pytest.approx(33.59, abs=0.02)
    assert waifu2x.metric(waifu2x.bicubic) == pytest.approx(30.96, abs=0.02)


def test_efficientnet_lite0_reaches_its_accuracy():
    model, _ = efficientnet_lite0.load()
    scores = efficientnet_lite0.metrics(model)
    assert scores.top1 == pytest.approx(0.859, abs=0.003)
    assert scores.top5 == pytest.approx(0.961, abs=0.003)
    assert scores.negative_log_likelihood == pytest.approx(0.640, abs=0.003)
    assert scores.agreement(scores) == 1


def test_crepe_finds_the_pitch():
    model, _ = crepe.load()
    assert crepe.metric(model, count=200) > 0.95


def test_silero_vad_finds_speech():
    model, _ = silero_vad.load()
    assert silero_vad.metric(model) == pytest.approx(0.984, abs=0.002)


def test_minilm_ignores_what_is_masked():
    model, (input_ids, attention_mask) = minilm.load()
    with torch.no_grad():
        expected = model(input_ids, attention_mask)
        other = model(torch.where(attention_mask.bool(), input_ids, 2000), attention_mask)
    assert torch.allclose(expected, other, atol=1e-5)
    assert torch.allclose(expected.norm(dim=1), torch.ones(len(expected)))


@pytest.mark.parametrize("module", [waifu2x, efficientnet_lite0])
def test_calibration_data_is_never_test_data(module):
    batches = module.calibration(2, batch=3)
    assert [batch.shape[0] for (batch,) in batches] == [3, 3]
    tested = waifu2x.TEST_PHOTOS if module is waifu2x else tuple(LABELLED_PHOTOS)
    assert not set(module.CALIBRATION_PHOTOS) & set(tested)


def test_a_batch_that_does_not_divide_the_data_is_refused():
    with pytest.raises(ValueError, match="batch=7 does not divide the 24 test crops"):
        waifu2x.metric(waifu2x.bicubic, batch=7)


def test_side_by_side_writes_a_picture(tmp_path):
    waifu2x.side_by_side(waifu2x.bicubic, waifu2x.bicubic, tmp_path / "new folder" / "picture.png")
    assert (tmp_path / "new folder" / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_architectures_are_reproducible():
    builders = (architectures.resnet18, architectures.mobilenet_v2)
    for build in builders:
        (model, inputs), (again, same) = build(size=64), build(size=64)
        assert torch.equal(inputs[0], same[0])
        assert torch.equal(model(*inputs), again(*same))


def test_a_missing_package_is_named_with_the_line_that_installs_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    command = "pip install --no-deps scikit-image==0.26.0"
    with pytest.raises(packages.PackageMissingError, match=f"skimage: the package is not installed. Run `{command}`"):
        packages.folder("skimage")


def test_digits_to_test_on_are_others_than_those_to_train_on():
    train, test = mnist.digits()
    assert (
        [len(part.pictures) for part in (train, test)] == [len(part.labels) for part in (train, test)] == [4000, 1000]
    )
    assert (train.labels.bincount() + test.labels.bincount()).tolist() == [500] * 10
    assert train.pictures.min() == 0
    assert train.pictures.max() == 1
    pictures = {
        part: {picture.numpy().tobytes() for picture in data.pictures} for part, data in (("a", train), ("b", test))
    }
    assert not pictures["a"] & pictures["b"]


def test_the_network_for_digits_learns():
    train, test = mnist.digits()
    model = mnist.mobile_net()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for pictures, labels in zip(train.pictures.split(50) * 3, train.labels.split(50) * 3, strict=True):
        loss = torch.nn.functional.cross_entropy(model(pictures), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        assert (model.eval()(test.pictures).argmax(1) == test.labels).float().mean() > 0.8
