"""Inductor: torch's own compiler over a graph of quantize and dequantize nodes.

The graph is what PT2E quantization makes (`torch.ops.quantized_decomposed`), with *our* scales and
zero points; inductor's x86 passes turn its products of codes into oneDNN's integer operators and
fuse what stands around them. It needs a C++ compiler.
"""

from __future__ import annotations

import io
import json
import warnings
from collections import OrderedDict
from collections.abc import Callable
from functools import lru_cache
from typing import Any, ClassVar

import torch
import torch._inductor.config as inductor_config
import torch.ao.quantization.fx._decomposed  # registers the operators of the graph
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.profiler_legacy import profile  # the newer one writes to stderr
from torch.export import Dim
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)

from backends.backend import Artefact, Deployed, NodeRun
from backends.called import Called, in_places
from backends.integer_rules import refused_activations, refused_weights
from halfstep.activations import StaticQuantizer
from halfstep.apply import Treatment, exchanged
from halfstep.batches import Batch, forward
from halfstep.errors import first_line
from halfstep.formats import Uniform
from halfstep.intercept import Interception
from halfstep.operators import Operand
from halfstep.scheme import Scheme
from halfstep.sites import Sites

MODEL, ABOUT = "model.pt2", "model.json"
DECOMPOSED = torch.ops.quantized_decomposed
CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", "convolution")
"""In a graph with one of these, inductor's INT8 passes need every size (torch 2.13)."""
KEPT = 4
"""Artefacts that stay compiled in a process: compiling takes longer than most measurements."""

PRODUCTS = {
    "onednn::qconv_pointwise": "int8", "onednn::qlinear_pointwise": "int8",
    "mkldnn::_convolution_pointwise": "fp32", "mkldnn::_linear_pointwise": "fp32",
    "mkl::_mkl_linear": "fp32", "aten::convolution": "fp32",
    "aten::mm": "fp32", "aten::addmm": "fp32", "aten::bmm": "fp32", "aten::baddbmm": "fp32",
}  # fmt: skip
"""The operators that multiply and accumulate, by the arithmetic that they do it in."""


class Inductor:
    """The backend ``inductor``."""

    name: ClassVar[str] = "inductor"
    full_precision: ClassVar[str] = (
        "inductor multiplies codes in convolutions and in products with a constant weight"
    )

    def version(self) -> str:
        return str(torch.__version__)

    def refuses(self, scheme: Scheme, sites: Sites) -> str:
        return (
            refused_weights(scheme, sites)
            or refused_activations(scheme, sites)
            or _refused_convolutions(scheme, sites)
            or no_compiler()
        )

    def build(
        self, model: nn.Module, sites: Sites, scheme: Scheme, treatment: Treatment, example: Batch
    ) -> Artefact:
        names, given = in_places(example)
        tensors = tuple(x.clone() for x in given)  # where a slice begins would be part of the graph
        called = Called(model, names)
        graph = _traced(called, treatment, tensors)
        _quantize_weights(graph, treatment)
        axes = tuple(dict.fromkeys(range(x.dim()) if names else (0,), Dim.DYNAMIC) for x in tensors)
        try:
            exported = torch.export.export(graph, tensors, dynamic_shapes=axes, strict=False)
        except Exception as error:  # the exporter has types of its own
            raise ValueError(f"torch.export cannot express it: {first_line(error)}") from error
        exported.example_inputs = None  # nobody's data; nor where this code lay as it was traced
        for node in exported.graph.nodes:
            node.meta = {"val": node.meta["val"]} if "val" in node.meta else {}
        out = io.BytesIO()
        torch.export.save(exported, out)
        about = {"inputs": names, "outputs": called.outputs}
        return Artefact({MODEL: out.getvalue(), ABOUT: json.dumps(about, sort_keys=True).encode()})

    def open(self, artefact: Artefact, model: nn.Module, threads: int) -> Deployed:
        key = artefact.digest  # it runs on as many threads as torch does
        if key not in _OPEN:
            _OPEN[key] = _Compiled(artefact)
            while len(_OPEN) > KEPT:
                _OPEN.popitem(last=False)
        _OPEN.move_to_end(key)
        return _OPEN[key]


_OPEN: OrderedDict[str, _Compiled] = OrderedDict()


def _refused_convolutions(scheme: Scheme, sites: Sites) -> str:
    for site in sites.activations:
        if site.kind in ("conv1d", "conv3d") and scheme.activation_spec(site, sites) is not None:
            return (
                f"activation {site.name} enters a {site.kind}, and inductor has INT8 convolutions "
                "of two dimensions only; keep it at full precision with sites.overrides"
            )
    return ""


@lru_cache(maxsize=1)
def no_compiler() -> str:
    """Why inductor cannot compile here; empty where it can."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception as error:  # of a type that torch has moved before
        return f"inductor needs a C++ compiler (g++ or clang++): {first_line(error)}"
    return ""


class _Tracing(Interception):
    """An interception of tensors without data, of which none is a parameter."""

    def weight_names(self, x: Tensor) -> list[str]:
        return [] if isinstance(x, FakeTensor) else super().weight_names(x)


def _traced(called: Called, treatment: Treatment, tensors: tuple[Tensor, ...]) -> fx.GraphModule:
    """The operators that run, with a pair of nodes for each quantized activation."""

    def mark(site: str, operand: Operand, x: Tensor) -> Tensor:
        treated = treatment.activations.get(site)
        if treated is None:
            return x
        x = treated.divided(x)
        if treated.quantizer is None:
            return x
        assert isinstance(treated.quantizer, StaticQuantizer)
        scale, zero_point = treated.quantizer.scale, treated.quantizer.unsigned_zero_point
        fmt = treated.quantizer.qparams.format
        assert isinstance(fmt, Uniform)
        shift = treated.quantizer.unsigned_shift
        limits = fmt.quant_min + shift, fmt.quant_max + shift
        codes = DECOMPOSED.quantize_per_tensor(x, scale, zero_point, *limits, torch.uint8)
        return DECOMPOSED.dequantize_per_tensor(  # type: ignore[no-any-return]
            codes, scale, zero_point, *limits, torch.uint8
        )

    mode = _Tracing(mark, alters=True)
    with torch.no_grad(), exchanged(called.model, treatment.parameters):
        called(*tensors)  # what it returns
        fake = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
        stand_ins = [
            fake.from_tensor(
                x,
                symbolic_context=StatelessSymbolicContext(
                    dynamic_sizes=[
                        DimDynamic.DYNAMIC if d == 0 or called.names else DimDynamic.STATIC
                        for d in range(x.dim())
                    ]
                ),
            )
            for x in tensors
        ]
        try:
            with mode.over(called.model), fake:
                # Before dispatch: passes over whole products come first, then these are taken apart
                return make_fx(called, pre_dispatch=True)(*stand_ins)  # type: ignore[no-any-return]
        except Exception as error:  # whatever the model does with a tensor that has no data
            raise ValueError(f"it cannot be traced: {first_line(error)}") from error


def _quantize_weights(graph: fx.GraphModule, treatment: Treatment) -> None:
    """Each quantized weight becomes its codes and a node that dequantizes them."""
    held: dict[int, list[fx.Node]] = {}
    for node in graph.graph.find_nodes(op="get_attr"):
        value = getattr(graph, str(node.target))
        if isinstance(value, Tensor):
            held.setdefault(value.data_ptr(), []).append(node)
    for number, (site, weight) in enumerate(treatment.weights.items()):
        nodes = held.get(weight.values.data_ptr(), [])
        if not nodes:
            raise ValueError(f"weight {site} is not in the traced graph under a name of its own")
        rows = weight.by_row()
        if rows is None:
            raise ValueError(f"weight {site} has scales that do not belong to its first axis")
        codes, scale = rows
        parts = {"codes": codes, "scale": scale, "zero_point": torch.zeros(len(codes)).long()}
        for name, value in parts.items():
            graph.register_buffer(f"weight_{number}_{name}", value)
        for node in nodes:
            with graph.graph.inserting_before(node):
                own = [graph.graph.get_attr(f"weight_{number}_{name}") for name in parts]
                values = graph.graph.call_function(
                    DECOMPOSED.dequantize_per_channel.default, (*own, 0, -128, 127, torch.int8)
                )
            node.replace_all_uses_with(values)
            graph.graph.erase_node(node)
    read = {str(node.target) for node in graph.graph.find_nodes(op="get_attr")}
    for name in [*dict(graph.named_parameters()), *dict(graph.named_buffers())]:
        if name not in read:  # the weights' fake-quantized values
            delattr(graph, name)
    graph.graph.lint()
    graph.recompile()


class _Compiled(Deployed):
    def __init__(self, artefact: Artefact) -> None:
        super().__init__()
        about = json.loads(artefact.files[ABOUT])
        self._names, self._outputs = about["inputs"], about["outputs"]
        self._exported = torch.export.load(io.BytesIO(artefact.files[MODEL]))
        self._by_shape = any(
            any(kind in str(node.target) for kind in CONVOLUTIONS)
            for node in self._exported.graph.nodes
        )
        self._compiled: dict[object, Callable[..., Any]] = {}
        self.eval()

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Any:
        tensors = args if self._names is None else tuple(kwargs[name] for name in self._names)
        # What is compiled into the code, or would have it compiled anew.
        key: tuple[object, ...] = (
            torch.get_num_threads(),
            torch.are_deterministic_algorithms_enabled(),
        )
        if self._by_shape:
            key = (*key, *(x.shape for x in tensors))
        compiled = self._compiled[key] if key in self._compiled else self._compile(key)
        # Weights become constants of the code: without, no product of codes is found. At every
        # call: torch compiles anew whenever something about it has changed.
        before, inductor_config.freezing = inductor_config.freezing, True
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the compiler's word on its own internals
                returned = compiled(*tensors)
        finally:
            inductor_config.freezing = before
        if self._outputs is None:
            return returned
        return dict(zip(self._outputs, returned, strict=True))

    def _compile(self, key: object) -> Callable[..., Any]:
        options = None
        if self._by_shape:
            # Shapes are told apart here already; to look at every constant takes longer than a
            # small model's products.
            options = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
        self._compiled[key] = torch.compile(
            # Its own code: torch counts how often one code is compiled, and gives up.
            self._exported.module(check_guards=False),
            dynamic=not self._by_shape,
            fullgraph=True,
            options=options,
        )
        return self._compiled[key]

    def nodes(self, batch: Batch) -> list[NodeRun]:
        forward(self, batch)  # compiles
        with profile() as seen:
            forward(self, batch)
        found: list[NodeRun] = []
        for event in seen.function_events:
            outermost = event.cpu_parent is None or "::" not in event.cpu_parent.name
            if "::" not in event.name or not outermost:
                continue
            number = sum(node.kind == event.name for node in found) + 1
            precision = PRODUCTS.get(event.name, "other")
            found.append(
                NodeRun(f"{event.name}#{number}", event.name, precision, event.cpu_time_total)
            )
        return found
