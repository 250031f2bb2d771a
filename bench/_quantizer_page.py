"""The figures of ``bench/quantizers.py`` as they are printed, and as the page ``docs/quantizers.md``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from bench._quantizer_policies import POLICIES

Row = dict[str, Any]
INTRODUCTION = """# Quantizers of ExecuTorch

Every quantizer class that is found in the installed ExecuTorch package (1.4.1), unchanged, through zeropoint: two
small networks, annotated, prepared, calibrated with eight pictures, converted; beside torchao's own prepare and convert
of the same exported network and data; and lowered, and run, where that works from packages alone. This page is
written by

    python -m bench.quantizers --json plain.json                                     # packages of constraints.txt
    python -m bench.quantizers --as-installed plain.json --write docs/quantizers.md  # vendors' packages too

and `tests/parity/test_executorch_quantizers.py` compares it with what the script gives. SQNR is in dB.
"""
CLASSES = """
## The classes

"As installed" is with the packages of `constraints.txt` alone. The packages that the other column adds: tosa-tools
2026.5.0, ml_dtypes 0.5.1, ethos-u-vela 5.1.0, ai_ml_sdk_model_converter 0.9.0, openvino 2025.4.1, nncf 3.1.0,
py-cpuinfo 9.0.0. What MediaTek's and NXP's need is on no package index. `QNN_SDK_ROOT` names a folder that does not
exist: else Qualcomm's package downloads an SDK when it is imported. Classes of ExecuTorch's own tests are left out.
"""
WANTS = """
## What each backend wants

One row of `bench/_quantizer_policies.py` each. The type of the biases is checked against the converted network:
int32 ones have the product of the scales of activation and weight (a derived spec).
"""
RESULTS = """
## The network of {network}

How many nodes are annotated, how many observers there are, and quantize and dequantize operators (q + dq); SQNR to the
float network. Then torchao: its q + dq, how far its scales are from ours, SQNR between the two. Where scales differ by
the last bits of a float, it is because zeropoint folds batch norm in double precision; a few values that then round to
the next integer make 40 to 60 dB. Where a quantizer annotates nothing of a network, both return the float network, and
zeropoint warns; one that is composed of none (`CadenceNopQuantizer`) asks for a float network.
"""
LOWERED = """
## Lowered and run

The network of convolutions, as zeropoint converted it. SQNR is between that in PyTorch and what the backend computed:
XNNPACK and OpenVINO on ExecuTorch's runtime, TOSA in Arm's reference model, Cortex-M in ExecuTorch's operators in
PyTorch. Ethos-U is compiled by Vela.
"""


def number(value: float | None) -> str:
    """Returns a figure in dB, "equal" for no difference, nothing where there is none."""
    if value is None:
        return ""
    return "equal" if value == math.inf else f"{value:.0f}"


def scales(value: float) -> str:
    """Returns how far scales are apart, in a power of ten."""
    if math.isnan(value):
        return "other sites"
    return "equal" if value == 0 else f"1e{math.ceil(math.log10(value))}"


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Returns a table of markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "/") for cell in line) + " |" for line in lines) + "\n"


def line(text: object) -> str:
    """Returns the first sentence of a text."""
    return str(text).split("\n")[0].split(". ")[0]


def imported(row: Row) -> str:
    return "yes" if "import" in row else line(row["error"])


def class_rows(rows: Sequence[Row], plain: Sequence[Row]) -> Iterator[list[str]]:
    """Gives name, module, and how the import went without and with vendors' packages."""
    before = {row["quantizer"]: imported(row) for row in plain}
    for name, row in {row["quantizer"]: row for row in rows}.items():
        now = "no" if imported(row) == before.get(name) != "yes" else imported(row)
        yield [f"`{name}`", f"`{row['module'].removeprefix('executorch.')}`", before.get(name, ""), now]


def policy_rows() -> Iterator[list[str]]:
    for policy in POLICIES:
        folded, strict = ("yes" if flag else "no" for flag in (policy.folded, policy.strict))
        cells = [policy.bias, folded, policy.layout, strict, policy.lower or ""]
        yield [f"`{policy.quantizer}`", policy.configuration, *cells]


def result_rows(rows: Iterable[Row]) -> Iterator[list[str]]:
    """Gives the cells of each row whose quantizer could be made."""
    for row in rows:
        if "construct" not in row:
            continue
        ours = [row.get("annotate", ""), row.get("prepare", ""), row.get("convert", ""), number(row.get("sqnr"))]
        beside = row.get("beside")
        distance = [scales(beside["scales"]), number(beside["sqnr"])] if beside else ["", ""]
        theirs, stopped = line(row.get("torchao", "")), "" if "sqnr" in row else line(row["error"])
        yield [f"`{row['quantizer']}`", row["configuration"], *ours, theirs, *distance, stopped]


def lowered_rows(rows: Iterable[Row]) -> Iterator[list[str]]:
    """Gives the cells of each row that has a lowering."""
    to = {(policy.quantizer, policy.configuration): policy.lower for policy in POLICIES}
    for row in rows:
        backend = to.get((row["quantizer"], row.get("configuration", "")))
        if backend is None or "sqnr" not in row or row["network"] != "convolutions":
            continue
        found = row.get("lower", {})
        integer = f"{found['custom']} `cortex_m` operators" if found.get("custom") else found.get("delegates", "")
        size = f"{found['size']:,}" if found.get("size") else ""
        result = (
            line(row["error"]) if "error" in row else number(row["run"]) if "run" in row else "nothing here runs it"
        )
        yield [f"`{row['quantizer']}`", row["configuration"], backend, integer, found.get("outside", ""), size, result]


def page(rows: Sequence[Row], plain: Sequence[Row]) -> str:
    """Returns the page: ``rows`` with vendors' packages, ``plain`` as installed."""
    parts = [
        INTRODUCTION,
        CLASSES,
        table(["class", "module", "imports as installed", "with packages"], class_rows(rows, plain)),
    ]
    wants = ["class", "configuration", "bias", "weights folded", "layout", "strict export", "lowering"]
    parts += [WANTS, table(wants, policy_rows())]
    heads = [
        "class",
        "configuration",
        "annotated",
        "observers",
        "q + dq",
        "SQNR",
        "torchao",
        "scales",
        "SQNR",
        "stopped by",
    ]
    for network in dict.fromkeys(row["network"] for row in rows if "network" in row):
        found = [row for row in rows if row.get("network") == network]
        parts += [RESULTS.format(network=network), table(heads, result_rows(found))]
    heads = ["class", "configuration", "lowered to", "delegates", "operators outside", "bytes", "SQNR of the run"]
    return "\n".join([*parts, LOWERED, table(heads, lowered_rows(rows))])


def print_rows(rows: Iterable[Row]) -> Iterator[Row]:
    """Prints each row as it comes, and gives it on."""
    heads = f"{'q + dq':>8}{'SQNR':>7}{'torchao':>9}{'SQNR':>7}{'run':>7}{'s':>6}  stopped by"
    print(f"{'quantizer':<44}{'network':<15}{heads}")
    for row in rows:
        beside = row.get("beside", {})
        figures = f"{row.get('convert', ''):>8}{number(row.get('sqnr')):>7}{line(row.get('torchao', ''))[:7]:>9}"
        figures += f"{number(beside.get('sqnr')):>7}{number(row.get('run')):>7}{row.get('seconds', 0.0):>6.1f}"
        print(f"{row['quantizer']:<44}{row.get('network', ''):<15}{figures}  {line(row.get('error', ''))}", flush=True)
        yield row
