"""The HTML report: what it holds, what it keeps out, and that it works in a browser without a network."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

import zeropoint as zp
from tests.models import Applied, export
from tests.report.browser import CHROMIUM, Browser
from zeropoint.backends.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config
from zeropoint.core.errors import CalibrationError, CaptureError, FileError, MissingExtraError, SpecError
from zeropoint.report.compare.convergence import Convergence
from zeropoint.report.compare.site_table import Comparison, SiteRow
from zeropoint.report.page.page import _json
from zeropoint.report.speed.benchmark import Benchmark, FileFigures
from zeropoint.report.speed.borders import borders_of
from zeropoint.report.speed.work import node_work

pytest.importorskip("jinja2")
pytest.importorskip("plotly")

INT8 = get_symmetric_quantization_config(is_per_channel=True)
NASTY = "</script><img src=x onerror=alert(1)>&'\""


@pytest.fixture(scope="module")
def model():
    def forward(m, x):
        return m.end(torch.nn.functional.gelu(m.first(x)) + m.second(x))

    torch.manual_seed(0)
    layers = {"first": nn.Conv2d(3, 8, 3), "second": nn.Conv2d(3, 8, 3), "end": nn.Conv2d(8, 2, 1)}
    module, inputs = Applied(forward, **layers).eval(), (torch.randn(1, 3, 8, 8),)
    with torch.no_grad():
        prepared = zp.prepare_pt2e(export(module, *inputs), XNNPACKQuantizer().set_global(INT8))
        prepared(*inputs)
    return zp.convert_pt2e(prepared)


def site(name: str, kind: str, noise: float, why: str = "few steps") -> SiteRow:
    return SiteRow(name, kind, "conv2d", "first", "net.py:3", (1, 8), (0.02, 0.03), (0, 1), 30.5, float("inf"), 0.99,
                   0.5, 0.6, 0.01, float("nan"), noise, 0.1, why)  # fmt: skip


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    rows = (site("conv2d.weight", "weight", 0.6, NASTY), site("gelu", "activation", 0.3))
    return Comparison(
        sites=rows, nodes=(), outputs_sqnr_db=(31.0,), sqnr_db=31.0, cures=(), gain_db=math.nan,
        convergence=Convergence(3, ()), batches=3,
    )  # fmt: skip


@pytest.fixture(scope="module")
def benchmark(model) -> Benchmark:
    figures = FileFigures(4000, (0.01, 0.02, 0.03), None, 1, ())
    ours = replace(figures, size=1000, seconds=(0.005, 0.01, 0.015))
    return Benchmark(figures, ours, 5, 2, "", node_work(model), borders_of(model))


@pytest.fixture(scope="module")
def written(model, comparison, benchmark, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "full.html"
    data = [(torch.randn(1, 3, 8, 8),) for _ in range(3)]
    return zp.write_report(model, path, comparison=comparison, benchmark=benchmark, data=data, title=NASTY)


class Addresses(HTMLParser):
    """Collects what a page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        names = ("src", "href", "data", "action", "poster", "srcset")
        self.found += [value for name, value in attrs if name in names and not (value or "").startswith(("#", "data:"))]


def test_nothing_is_loaded_from_elsewhere(written):
    parser = Addresses()
    parser.feed(written.read_text())
    assert parser.found == []
    assert {"link", "iframe", "object", "embed"}.intersection(parser.tags) == {"link"}  # An icon of no bytes.
    style = re.search(r"<style>(.*?)</style>", written.read_text(), re.DOTALL)
    assert style is not None
    assert "url(" not in style[1]
    assert "@import" not in style[1]


def test_texts_of_users_stay_texts(written):
    text = written.read_text()
    assert "onerror=alert(1)>" not in text.replace("onerror=alert(1)&gt;", "")
    assert "&lt;/script&gt;&lt;img src=x" in text
    assert text.count("<script") == text.count("</script>") == 4


def test_data_of_the_charts(written, model):
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', written.read_text(), re.DOTALL)
    assert found is not None
    data = json.loads(found[1])
    assert [each["why"] for each in data["sites"]] == [NASTY, "few steps"]
    assert data["sites"][0]["own"] is None
    assert data["times"]["float"] == [0.01, 0.02, 0.03]
    assert {name["name"] for name in data["weights"]} == {"first.weight", "second.weight", "end.weight"}
    assert [sum(each["counts"]) for each in data["ranges"]] == [each["total"] for each in data["ranges"]]
    assert data["ranges"][0]["total"] == 3 * 3 * 64
    assert [each["macs"] for each in data["work"]] == [each.multiply_accumulates for each in node_work(model)]


def test_cells_that_are_no_numbers_sort_last(written):
    text = written.read_text()
    assert '<td class="number" data-key="Infinity">exact</td>' in text  # An SQNR of what is equal bit for bit.
    assert '<td class="number" data-key="">–</td>' in text  # Unused codes of a type that has too many.
    assert '<td class="number" data-key="0.03">0.02 … 0.03</td>' in text


def test_json_that_a_script_element_may_hold():
    value = {"a": [NASTY, "\u2028<!--", float("nan")], "b": float("-inf")}
    text = _json(value)
    assert not set("<>&\u2028").intersection(text)
    assert json.loads(text) == {"a": [NASTY, "\u2028<!--", None], "b": None}


def test_what_is_not_known_is_left_out(model, tmp_path):
    text = zp.write_report(model, tmp_path / "plain.html").read_text()
    assert text.count("not measured") == 2
    assert 'id="chart-sqnr"' not in text
    assert 'id="chart-range"' not in text
    assert 'id="chart-work"' in text
    assert "the XNNPACK delegate computes it in float only" in text


def test_errors(model, tmp_path, monkeypatch):
    path = tmp_path / "page.html"
    with pytest.raises(CaptureError, match="got Linear, not an exported graph module"):
        zp.write_report(nn.Linear(2, 2), path)
    prepared = zp.prepare_pt2e(export(nn.Linear(2, 2).eval(), torch.randn(1, 2)), XNNPACKQuantizer().set_global(INT8))
    with pytest.raises(CaptureError, match="the model is prepared, not converted"):
        zp.write_report(prepared, path)
    with pytest.raises(SpecError, match=r"comparison is int, not Comparison. Give what zeropoint.compare returned"):
        zp.write_report(model, path, comparison=3)
    with pytest.raises(SpecError, match="title is int, not str"):
        zp.write_report(model, path, title=3)
    with pytest.raises(CalibrationError, match="data is Tensor, not an iterable of batches"):
        zp.write_report(model, path, data=torch.randn(1, 3, 8, 8))
    with pytest.raises(CalibrationError, match="batch 1, input 'inputs_0': has shape"):
        zp.write_report(model, path, data=[torch.randn(1, 3, 8, 8), torch.randn(1, 3, 8, 9)])
    with pytest.raises(FileError, match="cannot be written"):
        zp.write_report(model, tmp_path / "none" / "page.html")
    monkeypatch.setitem(__import__("sys").modules, "plotly", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'zeropoint\[report\]'"):
        zp.write_report(model, path)
    assert not path.exists()


# -- in a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("there is no Chromium")
    found = Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 800, 1400])
def test_it_fits_and_asks_for_nothing(browser, written, width, scheme):
    browser.said.clear()
    browser.requests.clear()
    browser.open(written, width, scheme=scheme)
    assert browser.said == []
    assert browser.requests == [written.as_uri()]
    assert browser.value("document.documentElement.scrollWidth") <= width
    assert browser.value("document.querySelectorAll('.chart svg.main-svg').length") > 0
    assert browser.value("document.title") == f"{NASTY} · zeropoint"
    assert browser.value("document.images.length") == 0


def test_sorting_and_filtering(browser, written):
    browser.open(written, 800)
    cells = "Array.from(document.querySelectorAll('#table-operators tbody tr'), r => r.cells[3].textContent)"
    before = browser.value(cells)
    press = "document.querySelectorAll('#table-operators th button')[3].click()"
    browser.value(press)
    ascending = [int(text.replace(",", "")) for text in browser.value(cells)]
    browser.value(press)
    descending = [int(text.replace(",", "")) for text in browser.value(cells)]
    assert ascending == sorted(ascending) == descending[::-1] != [int(text.replace(",", "")) for text in before]
    browser.value(
        "(i => { i.value = 'gelu float'; i.dispatchEvent(new Event('input')); })"
        "(document.querySelector('[data-table=table-operators]'))"
    )
    shown = (
        "Array.from(document.querySelectorAll('#table-operators tbody tr:not([hidden])'), r => r.cells[0].textContent)"
    )
    assert browser.value(shown) == ["gelu"]
    assert browser.value("document.querySelector('[data-count=table-operators]').textContent") == f"1 of {len(before)}"


def test_other_ranges_and_dark_colors(browser, written):
    browser.open(written, 800)
    text = "document.getElementById('text-range').textContent"
    first = browser.value(text)
    browser.value("document.querySelector('#ranges [data-step=\"1\"]').click()")
    assert browser.value(text) != first
    ink = "getComputedStyle(document.querySelector('#chart-range .xtick text')).fill"
    light = browser.value(ink)
    browser.call("Emulation.setEmulatedMedia", media="", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    browser.wait_for(f"{ink} !== '{light}'", 10)


def test_print_is_light_and_whole(browser, written):
    browser.open(written, 800, scheme="dark", media="print")
    assert browser.value("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.value("getComputedStyle(document.querySelector('.scroll')).maxHeight") == "none"
    assert browser.value("getComputedStyle(document.querySelector('nav')).display") == "none"
