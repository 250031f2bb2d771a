"""The documentation as a site: it builds without a warning, loads nothing from elsewhere, its tables are measured."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench import _tables

ROOT = Path(__file__).parents[1]
LOADED = re.compile(r"""<(?:script|img|iframe|source|link)\b[^>]*?\b(?:src|href)=["']?((?:https?:)?//[^"'\s>]+)""")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(folder)]
    settings = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_page_is_there(site):
    for page in (ROOT / "docs").rglob("*.md"):
        assert (site / page.relative_to(ROOT / "docs")).with_suffix(".html").exists(), page


def test_nothing_is_loaded_from_elsewhere(site):
    found = {link for page in site.rglob("*.html") for link in LOADED.findall(page.read_text())}
    assert found == set()


def test_the_pictures_are_drawn(site):
    page = (site / "arithmetic.html").read_text()
    named = set(re.findall(r'src="images/(\w+)\.svg"', page))
    assert named == {path.stem for path in (site / "images").glob("*.svg")}
    assert all((site / "images" / f"{name}.svg").read_text().count("<path") > 10 for name in named)


def test_every_public_name_is_explained(site):
    import zeropoint as zp

    written = "".join(page.read_text() for page in (site / "api").glob("*.html"))
    assert [name for name in zp.__all__ if f'id="zeropoint.{name}"' not in written] == []


@pytest.mark.parametrize("page", _tables.PAGES, ids=lambda path: path.name)
def test_tables_are_those_of_the_results(page):
    assert _tables.filled(page.read_text()) == page.read_text()
