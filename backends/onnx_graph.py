"""ONNX: a model and what a scheme does to it, as a graph of quantize and dequantize nodes.

The graph is traced by torch's exporter while every activation that enters a product passes through
a marker; then markers become QuantizeLinear and DequantizeLinear with *our* scales and zero points,
and quantized weights become their int8 codes with a DequantizeLinear behind them. No calibration
of the backend's own takes part.
"""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn

from backends.called import Called, in_places
from halfstep.activations import StaticQuantizer
from halfstep.apply import Treatment, exchanged
from halfstep.batches import Batch
from halfstep.intercept import Interception
from halfstep.operators import TERMS, Operand

OPSET = 17
DOMAIN = "halfstep"
SITES = "halfstep.sites"
"""Key of the graph's metadata that says which tensor holds a site's codes."""


@dataclass(frozen=True)
class Exported:
    """A graph, and what it is called with."""

    model: ModelProto
    outputs: tuple[str, ...] | None
    """Names of what the model returns, where it returns several; None for one tensor."""


class _Marker(torch.autograd.Function):
    """Leaves a node of its own in the traced graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, site: str) -> Tensor:
        return x.clone()

    @staticmethod
    def symbolic(g: Any, x: Any, site: str) -> Any:
        return g.op(f"{DOMAIN}::Activation", x, site_s=site).setType(x.type())


def export(model: nn.Module, treatment: Treatment, example: Batch) -> Exported:
    """The graph of a model under a treatment.

    Args:
        example: two examples or more; every axis of inputs called by name may change, of one
            tensor only the first.

    Raises:
        ValueError: something in the model or the treatment has no place in the graph; says what.
    """
    names, tensors = in_places(example)
    inputs = names or ("input",)
    axes = {
        name: {d: f"{name}_{d}" for d in (range(x.dim()) if names else (0,))}
        for name, x in zip(inputs, tensors, strict=True)
    }
    for several in axes.values():
        several[0] = "batch"
    called, target = Called(model, names), io.BytesIO()

    def mark(site: str, operand: Operand, x: Tensor) -> Tensor:
        treated = treatment.activations.get(site)
        if treated is None:
            return x
        x = treated.divided(x)
        return x if treated.quantizer is None else _Marker.apply(x, site)  # type: ignore[no-any-return, no-untyped-call]

    mode = Interception(mark, alters=True)
    with (
        torch.no_grad(),
        exchanged(model, treatment.parameters),
        mode.over(model),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter(
            "ignore"
        )  # the exporter's word on itself, and on every shape it reads
        called(*tensors)  # what it returns
        torch.onnx.export(
            called,
            tensors,
            target,
            dynamo=False,  # the new exporter cannot follow an interception
            opset_version=OPSET,
            input_names=list(inputs),
            output_names=list(called.outputs or ("output",)),
            dynamic_axes=axes | {name: {0: "batch"} for name in called.outputs or ("output",)},
            do_constant_folding=False,
        )
    graph = onnx.load_from_string(target.getvalue())
    _quantize_activations(graph, treatment)
    _quantize_weights(graph, treatment)
    _sort(graph)
    _prune(graph)
    graph.producer_name, graph.producer_version = "halfstep", ""
    graph.doc_string = ""
    onnx.checker.check_model(graph)
    return Exported(graph, called.outputs)


def to_bytes(graph: ModelProto) -> bytes:
    """The same bytes for the same graph."""
    return graph.SerializeToString(deterministic=True)


def site_tensors(graph: ModelProto) -> dict[str, str]:
    """For every quantized activation the tensor that holds its codes."""
    found = next((p.value for p in graph.metadata_props if p.key == SITES), "{}")
    sites: dict[str, str] = json.loads(found)
    return sites


def _quantize_activations(graph: ModelProto, treatment: Treatment) -> None:
    """Markers become a pair of nodes; those with the same input and qparams share one."""
    pairs: dict[tuple[str, float, int], tuple[str, str]] = {}
    tensors: dict[str, str] = {}
    nodes: list[NodeProto] = []
    renamed: dict[str, str] = {}
    written: set[str] = set()
    for node in graph.graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = renamed.get(name, name)
        if node.op_type == "Expand" and node.input[0] in written:
            # A sum that writes to its first term: traced as an expansion to the shape it has.
            renamed[node.output[0]] = node.input[0]
            continue
        if node.domain != DOMAIN:
            nodes.append(node)
            continue
        site = helper.get_node_attr_value(node, "site").decode()
        quantizer = treatment.activations[site].quantizer
        assert isinstance(quantizer, StaticQuantizer)
        key = (node.input[0], quantizer.scale, quantizer.unsigned_zero_point)
        if key not in pairs:
            scale = _constant(graph, f"{site}.scale", np.float32(key[1]))
            zero_point = _constant(graph, f"{site}.zero_point", np.uint8(key[2]))
            codes, values = f"{site}.codes", f"{site}.values"
            nodes += [
                helper.make_node("QuantizeLinear", [key[0], scale, zero_point], [codes],
                                 f"{site}.quantize"),
                helper.make_node("DequantizeLinear", [codes, scale, zero_point], [values],
                                 f"{site}.dequantize"),
            ]  # fmt: skip
            pairs[key] = (codes, values)
        tensors[site], renamed[node.output[0]] = pairs[key]
        if site.endswith(TERMS[0]):
            written.add(pairs[key][1])
    del graph.graph.node[:]
    graph.graph.node.extend(nodes)
    for output in graph.graph.output:
        if output.name in renamed:
            raise ValueError("an activation that is quantized is returned as it is")
    helper.set_model_props(graph, {SITES: json.dumps(tensors)})
    kept = [o for o in graph.opset_import if o.domain != DOMAIN]
    del graph.opset_import[:]
    graph.opset_import.extend(kept)


def _quantize_weights(graph: ModelProto, treatment: Treatment) -> None:
    """Each quantized weight becomes codes and a DequantizeLinear, one for each way it is read."""
    held = {tensor.name: tensor for tensor in graph.graph.initializer}
    for site, weight in treatment.weights.items():
        names = [n for n, p in treatment.parameters.items() if p is weight.values]
        found = next((f"model.{n}" for n in names if f"model.{n}" in held), None)
        if found is None:
            raise ValueError(f"weight {site} is not in the traced graph under a name of its own")
        rows = weight.by_row()
        if rows is None:
            raise ValueError(f"weight {site} has scales that do not belong to its first axis")
        codes, scale = rows[0].numpy(), rows[1].numpy()
        if weight.qparams.scale.numel() == 1:
            scale = scale[0]
        made: dict[str, str] = {}
        for node in list(graph.graph.node):
            for i, name in enumerate(node.input):
                if name == found:
                    _read_codes(graph, node, i, site, codes, scale, made)
        graph.graph.initializer.remove(held[found])


def _read_codes(
    graph: ModelProto,
    node: NodeProto,
    place: int,
    site: str,
    codes: np.ndarray,
    scale: np.ndarray,
    made: dict[str, str],
) -> None:
    """Gives one reader of a weight its codes."""
    if node.op_type == "Gather":
        _gather_codes(graph, node, site, codes, scale)
        return
    if node.op_type == "MatMul" and np.ndim(scale):
        # Its scales belong to the axis that is summed over: no product of codes has a place for
        # them, and ONNX Runtime would take them for those of the other axis.
        values = codes * scale.reshape(-1, *[1] * (codes.ndim - 1))
        node.input[place] = _constant(graph, f"{site}.weight.plain", values.astype(np.float32))
        return
    transposed = node.op_type == "Transpose" and codes.ndim == 2
    way = ".T" if transposed else ""
    if way not in made:
        own, axis = (codes.T, 1) if transposed else (codes, 0)
        held = _constant(graph, f"{site}.weight{way}.codes", np.ascontiguousarray(own))
        by = _constant(graph, f"{site}.weight.scale", np.asarray(scale))
        zero = np.zeros(np.shape(scale), np.int8)
        zero_point = _constant(graph, f"{site}.weight.zero_point", zero)
        made[way] = f"{site}.weight{way}.values"
        attributes = {"axis": axis} if np.ndim(scale) else {}
        graph.graph.node.append(
            helper.make_node(
                "DequantizeLinear", [held, by, zero_point], [made[way]],
                f"{site}.weight{way}.dequantize", **attributes,
            )
        )  # fmt: skip
    if transposed:
        _rename(graph, node.output[0], made[way])
        graph.graph.node.remove(node)
    else:
        node.input[place] = made[way]


def _gather_codes(
    graph: ModelProto, node: NodeProto, site: str, codes: np.ndarray, scale: np.ndarray
) -> None:
    """A table of codes: only the rows that are looked up are dequantized."""
    held = _constant(graph, f"{site}.weight.codes", codes)
    by = _constant(graph, f"{site}.weight.scale", np.asarray(scale))
    indices, output = node.input[1], node.output[0]
    picked, plain = f"{output}.codes", f"{output}.grid"
    nodes = [
        helper.make_node("Gather", [held, indices], [picked], f"{site}.lookup", axis=0),
        helper.make_node("Cast", [picked], [plain], f"{site}.cast", to=TensorProto.FLOAT),
    ]
    if np.ndim(scale):
        own, axes = f"{output}.scale", _constant(graph, f"{site}.weight.axes", np.array([-1]))
        nodes += [
            helper.make_node("Gather", [by, indices], [f"{own}.flat"], f"{site}.scales", axis=0),
            helper.make_node("Unsqueeze", [f"{own}.flat", axes], [own], f"{site}.column"),
        ]
        by = own
    nodes.append(helper.make_node("Mul", [plain, by], [output], f"{site}.values"))
    graph.graph.node.remove(node)
    graph.graph.node.extend(nodes)


def _constant(graph: ModelProto, name: str, value: Any) -> str:
    if all(held.name != name for held in graph.graph.initializer):
        graph.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    return name


def _rename(graph: ModelProto, old: str, new: str) -> None:
    for node in graph.graph.node:
        for i, name in enumerate(node.input):
            if name == old:
                node.input[i] = new


def _sort(graph: ModelProto) -> None:
    """Nodes in an order in which each comes after what it reads."""
    ready = {i.name for i in graph.graph.input} | {t.name for t in graph.graph.initializer} | {""}
    waiting, order = list(graph.graph.node), []
    while waiting:
        runnable = [n for n in waiting if all(name in ready for name in _reads(n))]
        if not runnable:
            raise ValueError("the graph is not a graph without cycles")
        for node in runnable:
            order.append(node)
            ready.update(node.output)
        taken = {id(n) for n in runnable}
        waiting = [n for n in waiting if id(n) not in taken]
    del graph.graph.node[:]
    graph.graph.node.extend(order)


def _prune(graph: ModelProto) -> None:
    """Leaves out what nothing reads: as a reader, it would keep kernels from being fused."""
    wanted = {output.name for output in graph.graph.output}
    kept = []
    for node in reversed(graph.graph.node):
        if wanted.intersection(node.output):
            wanted.update(_reads(node))
            kept.append(node)
    del graph.graph.node[:]
    graph.graph.node.extend(reversed(kept))
    initializers = [held for held in graph.graph.initializer if held.name in wanted]
    del graph.graph.initializer[:]
    graph.graph.initializer.extend(initializers)


def _reads(node: NodeProto) -> Iterator[str]:
    """What a node reads, from within subgraphs too."""
    yield from node.input
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            inner = attribute.g
            own = {t.name for t in inner.initializer} | {o for n in inner.node for o in n.output}
            own |= {i.name for i in inner.input}
            for child in inner.node:
                yield from (name for name in _reads(child) if name not in own)
