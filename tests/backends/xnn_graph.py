"""What a ``.pte`` file holds, read from its bytes: the nodes of each XNNPACK delegate and the operators outside."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DATATYPES = {
    "xnn_datatype_fp32": "fp32",
    "xnn_datatype_qint8": "q8",
    "xnn_datatype_qint32": "q32",
    "xnn_datatype_qcint8": "qc8",
    "xnn_datatype_qcint32": "qc32",
    "xnn_datatype_qcint4": "qc4",
    "xnn_datatype_qbint4": "qb4",
    "xnn_datatype_qdint8": "qd8",
}
EXTERNAL_INPUT = 1


@dataclass(frozen=True)
class XnnNode:
    """One node of a delegate: ``FullyConnected``, the datatypes it reads and writes, and the bounds fused into it."""

    kind: str
    reads: tuple[str, ...]
    writes: str
    bounds: tuple[float, float] | None

    @property
    def is_integer(self) -> bool:
        return all(datatype.startswith("q") for datatype in (*self.reads, self.writes))

    def __str__(self) -> str:
        bounds = f"[{self.bounds[0]:g},{self.bounds[1]:g}]" if self.bounds else ""
        return f"{self.kind}({','.join(self.reads)}->{self.writes}){bounds}"


@dataclass(frozen=True)
class XnnGraph:
    """A delegate as pieces that share no tensor: for each the program's inputs that it reads, and its nodes."""

    pieces: tuple[tuple[tuple[int, ...], tuple[XnnNode, ...]], ...]

    @property
    def nodes(self) -> tuple[XnnNode, ...]:
        return tuple(node for _, nodes in self.pieces for node in nodes)

    def of_input(self, position: int) -> tuple[XnnNode, ...]:
        """Returns the nodes of the piece that reads the program's input at this position."""
        return next(nodes for inputs, nodes in self.pieces if position in inputs)


def operators_outside(pte: bytes) -> list[str]:
    """Returns the operators that the portable kernels compute."""
    plan = _program(pte).execution_plan[0]
    instructions = [i.instr_args for chain in plan.chains for i in chain.instructions]
    calls = [plan.operators[i.op_index] for i in instructions if type(i).__name__ == "KernelCall"]
    return [f"{call.name}.{call.overload}" for call in calls]


def delegates(pte: bytes) -> list[XnnGraph]:
    """Returns the XNNPACK graphs of a file."""
    program = _program(pte)
    plan = program.execution_plan[0]
    calls = [i.instr_args for chain in plan.chains for i in chain.instructions]
    arguments = {c.delegate_index: c.args for c in calls if type(c).__name__ == "DelegateCall"}
    positions = {value: position for position, value in enumerate(plan.inputs)}
    return [
        _graph(bytes(program.backend_delegate_data[d.processed.index].data), [positions.get(a) for a in arguments[i]])
        for i, d in enumerate(plan.delegates)
        if d.id == "XnnpackBackend"
    ]


def integer_kinds(nodes: tuple[XnnNode, ...]) -> list[str]:
    """Returns the kinds of the nodes that compute in integers; conversions at the ends are left out."""
    return [node.kind for node in nodes if node.kind != "Convert" and node.is_integer]


def float_nodes(nodes: tuple[XnnNode, ...]) -> list[str]:
    """Returns the nodes that compute in float."""
    return [str(node) for node in nodes if node.kind != "Convert" and not node.is_integer]


def _program(pte: bytes) -> Any:
    from executorch.exir._serialize._program import deserialize_pte_binary

    program = deserialize_pte_binary(pte)
    return getattr(program, "program", program)


def _decompiled(blob: bytes) -> Any:
    from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import XNNHeader, _get_schema_bytes
    from executorch.exir._serialize._flatbuffer import _flatc_decompile

    header = XNNHeader.from_bytes(blob[: XNNHeader.EXPECTED_LENGTH])
    with tempfile.TemporaryDirectory() as folder:
        schema, binary = Path(folder, "schema.fbs"), Path(folder, "g.bin")
        schema.write_bytes(_get_schema_bytes())
        binary.write_bytes(blob[header.flatbuffer_offset : header.flatbuffer_offset + header.flatbuffer_size])
        _flatc_decompile(folder, str(schema), str(binary), ["--raw-binary"])
        return json.loads(Path(folder, "g.json").read_text().replace("inf", "1e999"))


def _graph(blob: bytes, positions: list[int | None]) -> XnnGraph:
    content = _decompiled(blob)
    values = {}
    for entry in content["xvalues"]:
        union = entry["xvalue_union"]
        tensor = union.get("tensor_value", union)
        values[tensor.get("id_out", 0)] = tensor
    pieces: list[tuple[set[int], list[XnnNode]]] = []
    for entry in content["xnodes"]:
        ids, node = _node(entry, values)
        joined = [piece for piece in pieces if piece[0] & ids]
        merged = (ids.union(*(p[0] for p in joined)), [n for p in joined for n in p[1]] + [node])
        pieces = [piece for piece in pieces if piece not in joined] + [merged]
    inputs = {i: positions[v.get("external_id", 0)] for i, v in values.items() if v.get("flags", 0) & EXTERNAL_INPUT}
    return XnnGraph(tuple((tuple(sorted(_known(inputs, ids))), tuple(nodes)) for ids, nodes in pieces))


def _known(inputs: dict[int, int | None], ids: set[int]) -> list[int]:
    return [position for i in ids if (position := inputs.get(i)) is not None]


def _node(entry: dict[str, Any], values: dict[int, Any]) -> tuple[set[int], XnnNode]:
    union, kind = entry["xnode_union"], entry["xnode_union_type"].removeprefix("XNN").strip("_")
    read = [union[k] for k in union if k.endswith("_id") and k != "output_id" and union[k] in values]
    written = union.get("output_id", 0)
    bounds = entry.get("output_min_max")
    node = XnnNode(
        kind,
        tuple(_datatype(values[i]) for i in read) or (_datatype(values[0]),),
        _datatype(values[written]),
        (float(bounds.get("output_min", 0)), float(bounds.get("output_max", 0))) if bounds else None,
    )
    changing = {i for i in (*(read or [0]), written) if not values[i].get("constant_buffer_idx")}
    return changing, node


def _datatype(value: dict[str, Any]) -> str:
    name = value.get("datatype", "xnn_datatype_fp32")
    return DATATYPES.get(name, name) + ("c" if value.get("constant_buffer_idx") else "")
