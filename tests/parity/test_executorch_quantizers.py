"""Every quantizer class of the installed ExecuTorch package, beside what ``docs/quantizers.md`` says of it."""

import re
from pathlib import Path

import pytest

pytest.importorskip("executorch")
from bench import quantizers as script
from bench._quantizer_classes import find_classes
from bench._quantizer_page import imported, policy_rows, result_rows
from bench._quantizer_policies import POLICIES

PAGE = Path(__file__).parents[2] / "docs" / "quantizers.md"
SLOW = {"CoreMLQuantizer"}
"""Its annotate exports and compiles a hundred patterns: minutes."""
LIMIT = 120.0


def section(title: str) -> list[list[str]]:
    """Returns the cells of the table under a title of the page."""
    _, _, rest = PAGE.read_text().partition(f"\n## {title}\n")
    rows = [row for row in re.split(r"\n## ", rest)[0].splitlines() if row.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


@pytest.fixture(scope="module")
def rows():
    """Returns what the script gives for each policy whose quantizer takes seconds: through convert, in zeropoint."""
    waiting = [job for job in script.jobs(networks=("convolutions",), stages=()) if job.quantizer not in SLOW]
    return list(script.run_apart(waiting, LIMIT))


def test_the_page_has_every_class_of_the_package():
    classes = [
        [f"`{name}`", f"`{module.removeprefix('executorch.')}`"] for name, module in find_classes("executorch").items()
    ]
    assert [row[:2] for row in section("The classes")] == classes


def test_every_class_has_a_policy():
    assert set(find_classes("executorch")) == {policy.quantizer for policy in POLICIES}


def test_the_page_has_the_policies():
    assert section("What each backend wants") == [list(map(str, row)) for row in policy_rows()]


def test_what_imports_is_what_the_page_says(rows):
    said = {name.strip("`"): cells for name, _, *cells in section("The classes")}
    for row in rows:
        found = imported(row)
        assert found == "yes" or found in said[row["quantizer"]], row


def test_every_stage_gives_what_the_page_says(rows):
    said = {tuple(cells[:2]): cells for cells in section("The network of convolutions")}
    checked = [row for row in rows if "construct" in row]
    assert len(checked) >= 15
    for row, cells in zip(checked, result_rows(checked), strict=True):
        name, configuration, *stages, sqnr, _, _, _, stopped = map(str, cells)
        page = said[name, configuration]
        assert [*page[2:5], page[-1]] == [*stages, stopped], row
        assert (sqnr == page[5] == "") or abs(float(sqnr) - float(page[5])) < 6, row


def test_a_module_that_hangs_or_ends_its_process_leaves_the_others(monkeypatch, tmp_path):
    (tmp_path / "that_ends.py").write_text("import os\nos._exit(7)\n")
    (tmp_path / "that_hangs.py").write_text("import time\ntime.sleep(1000)\n")
    monkeypatch.syspath_prepend(tmp_path)
    broken = [script.Job("Any", module, 0, "convolutions", ()) for module in ("that_ends", "that_hangs", "nowhere")]
    ended, hung, missing = script.run_apart(broken, 5.0)
    assert ended["error"] == "its process ended with 7"
    assert hung["error"] == "took longer than 5 s"
    assert "No module named 'nowhere'" in missing["error"]
