"""OpenVINO on the CPU: the same graph as ONNX Runtime's; its low-precision transformations run a
product of codes in INT8 also where the result stays at full precision."""

from __future__ import annotations

from typing import Any, ClassVar

import openvino
from torch import Tensor, nn

from backends import onnx_runtime
from backends.backend import Artefact, Deployed, NodeRun
from backends.onnx_runtime import ABOUT, MODEL
from halfstep.apply import Treatment
from halfstep.batches import Batch
from halfstep.scheme import Scheme
from halfstep.sites import Sites

ARITHMETIC = ("Convolution", "GroupConvolution", "MatMul", "FullyConnected", "ScaledDotProduct")


class OpenVino:
    """The backend ``openvino``."""

    name: ClassVar[str] = "openvino"
    full_precision: ClassVar[str] = "it multiplies codes where one side is a constant weight"

    def version(self) -> str:
        return str(openvino.__version__)

    def refuses(self, scheme: Scheme, sites: Sites) -> str:
        return onnx_runtime.refuses(scheme, sites)

    def build(
        self, model: nn.Module, sites: Sites, scheme: Scheme, treatment: Treatment, example: Batch
    ) -> Artefact:
        return onnx_runtime.build(model, treatment, example)

    def open(self, artefact: Artefact, model: nn.Module, threads: int) -> Deployed:
        return _Compiled(artefact, threads)


class _Compiled(Deployed):
    def __init__(self, artefact: Artefact, threads: int) -> None:
        super().__init__()
        self._data, self._about = artefact.files[MODEL], artefact.files[ABOUT]
        self._threads = threads
        self._compiled = self._opened()
        self._request = self._compiled.create_infer_request()
        self._inputs = [port.get_any_name() for port in self._compiled.inputs]
        self.eval()

    def _opened(self, **settings: Any) -> Any:
        core = openvino.Core()
        model = core.read_model(model=self._data)
        return core.compile_model(
            model,
            "CPU",
            {
                "INFERENCE_NUM_THREADS": self._threads,
                "NUM_STREAMS": 1,
                "INFERENCE_PRECISION_HINT": "f32",  # of what is not quantized: not bf16
                "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,  # not where the scheme says nothing of it
                "ENABLE_CPU_PINNING": False,
                **settings,
            },
        )

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Any:
        results = self._request.infer(onnx_runtime.feed(self._inputs, args, kwargs))
        return onnx_runtime.returned(self._about, [value.copy() for value in results.values()])

    def nodes(self, batch: Batch) -> list[NodeRun]:
        request = self._opened(PERF_COUNT=True).create_infer_request()
        request.infer(onnx_runtime.feed_batch(self._inputs, batch))
        return [
            NodeRun(info.node_name, info.node_type, _precision(info.node_type, info.exec_type),
                    info.real_time.total_seconds() * 1e6)
            for info in request.profiling_info
            if info.status.name == "EXECUTED"
        ]  # fmt: skip


def _precision(kind: str, executed: str) -> str:
    """``exec_type`` ends in the precision that a kernel ran at: ``brgconv_avx512_I8``."""
    if kind not in ARITHMETIC:
        return "other"
    return "int8" if executed.rpartition("_")[2].upper() in ("I8", "U8") else "fp32"
