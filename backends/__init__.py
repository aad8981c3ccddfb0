"""Backends: what runs a scheme for real. Each is an extra; one file each.

``simulated`` is halfstep's own arithmetic, always there. The others export an artefact in their own
format and run it with their own kernels.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping
from importlib.util import find_spec

from backends.backend import Artefact, Backend, Deployed, NodeRun
from halfstep.errors import UserError
from halfstep.scheme import SIMULATED

_WHERE: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "inductor": ("backends.inductor:Inductor", ("torch",)),
    "onnxruntime": ("backends.onnx_runtime:OnnxRuntime", ("onnxruntime", "onnx")),
    "openvino": ("backends.open_vino:OpenVino", ("openvino", "onnx")),
    "torchao": ("backends.torch_ao:TorchAo", ("torchao",)),
}
"""Where each is defined, and the packages that its extra brings."""

BACKENDS = (SIMULATED, *_WHERE)
"""Every name that a config may give."""


def backend(name: str) -> Backend:
    """The backend of some name.

    Raises:
        UserError: its extra is not installed.
    """
    where, packages = _WHERE[name]
    module, _, kind = where.partition(":")
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise UserError(
            f"backend {name!r} needs {' and '.join(missing)}, which is not installed: "
            f"pip install 'halfstep[{name}]'"
        )
    already = logging.root.manager.disable
    logging.disable(logging.WARNING)  # some tell of optional parts that they did not find
    try:
        made: Backend = getattr(importlib.import_module(module), kind)()
    finally:
        logging.disable(already)
    return made


def installed(name: str) -> bool:
    return name == SIMULATED or all(find_spec(p) is not None for p in _WHERE[name][1])


__all__ = ["BACKENDS", "Artefact", "Backend", "Deployed", "NodeRun", "backend", "installed"]
