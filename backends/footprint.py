"""Memory of an artefact, measured in a process of its own that imports nothing else.

    python footprint.py BACKEND FOLDER THREADS INPUTS.npz

prints JSON: bytes that stay resident once the artefact is opened, and the peak above that while it
runs. Linux only: the peak comes from the kernel's high-water mark.
"""

import json
import sys
from pathlib import Path

import numpy as np


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _onnxruntime(folder: Path, threads: int, inputs: dict[str, np.ndarray]):  # type: ignore[no-untyped-def]
    import onnxruntime

    onnxruntime.InferenceSession  # noqa: B018 - imported whole before anything is counted
    yield
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    session = onnxruntime.InferenceSession(
        str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
    )
    names = [i.name for i in session.get_inputs()]
    given = {name: inputs[name] for name in names}
    yield
    session.run(None, given)
    yield


def _openvino(folder: Path, threads: int, inputs: dict[str, np.ndarray]):  # type: ignore[no-untyped-def]
    import openvino

    core = openvino.Core()
    yield
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
    }
    compiled = core.compile_model(core.read_model(folder / "model.onnx"), "CPU", settings)
    request = compiled.create_infer_request()
    names = [port.get_any_name() for port in compiled.inputs]
    given = {name: inputs[name] for name in names}
    yield
    request.infer(given)
    yield


BACKENDS = {"onnxruntime": _onnxruntime, "openvino": _openvino}


def main(backend: str, folder: str, threads: str, inputs: str) -> None:
    with np.load(inputs) as held:
        given = {name: held[name] for name in held.files}
    steps = BACKENDS[backend](Path(folder), int(threads), given)
    next(steps)
    before = _status("VmRSS")
    next(steps)
    opened = _status("VmRSS")
    _forget_peak()
    next(steps)
    print(json.dumps({"resident": opened - before, "peak": max(_status("VmHWM") - opened, 0)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
