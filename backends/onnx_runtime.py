"""ONNX Runtime on the CPU: a graph of quantize and dequantize nodes that it fuses into its INT8
kernels, as its documentation on quantization describes (QDQ format, U8S8)."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from backends import onnx_graph
from backends.backend import Artefact, Deployed, NodeRun
from backends.integer_rules import refused_activations, refused_weights
from halfstep.apply import Treatment
from halfstep.batches import Batch
from halfstep.scheme import Scheme
from halfstep.sites import Sites

MODEL, ABOUT = "model.onnx", "model.json"
INTEGER = ("Integer", "QLinearConv", "QLinearMatMul", "QGemm", "DynamicQuantizeMatMul",
           "QAttention", "MatMulNBits")  # fmt: skip
"""In the names of operators that multiply codes."""
ARITHMETIC = ("Conv", "MatMul", "Gemm", "Attention", "Einsum")
"""In the names of operators that multiply and accumulate."""


def refuses(scheme: Scheme, sites: Sites) -> str:
    """Why a graph of quantize and dequantize nodes cannot hold a scheme."""
    return refused_weights(scheme, sites) or refused_activations(scheme, sites)


def build(model: nn.Module, treatment: Treatment, example: Batch) -> Artefact:
    """The graph as bytes, and the names of what it returns."""
    exported = onnx_graph.export(model, treatment, example)
    about = {"outputs": list(exported.outputs) if exported.outputs else None}
    return Artefact(
        {
            MODEL: onnx_graph.to_bytes(exported.model),
            ABOUT: json.dumps(about, sort_keys=True).encode(),
        }
    )


def feed(inputs: list[str], args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> dict[str, Any]:
    """Tensors by the graph's names for its inputs."""
    given = kwargs or dict(zip(inputs, args, strict=True))
    return {name: given[name].numpy() for name in inputs}


def feed_batch(inputs: list[str], batch: Batch) -> dict[str, Any]:
    """A batch by the graph's names for its inputs."""
    return (
        feed(inputs, (batch,), {}) if isinstance(batch, Tensor) else feed(inputs, (), dict(batch))
    )


def returned(about: bytes, values: list[np.ndarray]) -> Any:
    """What the model returns: one tensor, or several by name."""
    names = json.loads(about)["outputs"]
    tensors = [torch.from_numpy(v) for v in values]
    return tensors[0] if names is None else dict(zip(names, tensors, strict=True))


class OnnxRuntime:
    """The backend ``onnxruntime``."""

    name: ClassVar[str] = "onnxruntime"
    full_precision: ClassVar[str] = (
        "its convolution and 2-D product take codes only where their result is quantized too"
    )

    def version(self) -> str:
        return str(onnxruntime.__version__)

    def refuses(self, scheme: Scheme, sites: Sites) -> str:
        return refuses(scheme, sites)

    def build(
        self, model: nn.Module, sites: Sites, scheme: Scheme, treatment: Treatment, example: Batch
    ) -> Artefact:
        return build(model, treatment, example)

    def open(self, artefact: Artefact, model: nn.Module, threads: int) -> Deployed:
        return _Session(artefact, threads)


class _Session(Deployed):
    def __init__(self, artefact: Artefact, threads: int) -> None:
        super().__init__()
        self._data, self._about = artefact.files[MODEL], artefact.files[ABOUT]
        self._threads = threads
        self._session = self._opened(self._data)
        self._inputs = [i.name for i in self._session.get_inputs()]
        self.eval()

    def _opened(self, data: bytes, profile: str = "") -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.use_deterministic_compute = True
        if profile:
            options.enable_profiling, options.profile_file_prefix = True, profile
        return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Any:
        return returned(self._about, self._session.run(None, feed(self._inputs, args, kwargs)))

    def nodes(self, batch: Batch) -> list[NodeRun]:
        with tempfile.TemporaryDirectory() as folder:
            session = self._opened(self._data, str(Path(folder, "profile")))
            session.run(None, feed_batch(self._inputs, batch))
            events = json.loads(Path(session.end_profiling()).read_text())
        return [
            NodeRun(e["name"].removesuffix("_kernel_time"), e["args"]["op_name"],
                    _precision(e["args"]["op_name"]), float(e["dur"]))
            for e in events
            if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")
        ]  # fmt: skip

    def codes(self, batch: Batch) -> dict[str, Tensor]:
        graph = onnx.load_from_string(self._data)
        sites = onnx_graph.site_tensors(graph)
        shown = list(dict.fromkeys(sites.values()))
        graph.graph.output.extend(
            helper.make_tensor_value_info(name, TensorProto.UINT8, None) for name in shown
        )
        session = self._opened(graph.SerializeToString())
        values = session.run(shown, feed_batch(self._inputs, batch))
        found = dict(zip(shown, values, strict=True))
        return {site: torch.from_numpy(found[name]) for site, name in sites.items()}


def _precision(kind: str) -> str:
    if any(word in kind for word in INTEGER):
        return "int8"
    return "fp32" if any(word in kind for word in ARITHMETIC) else "other"
