"""Variant: the quantized model itself, as safetensors and a scheme; no pickle."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import Tensor

from audit import encode, spool
from audit.spool import Record
from audit.store import SweepFolder
from halfstep.apply import exchanged
from halfstep.digest import digest_tensors
from halfstep.scheme import Scheme
from halfstep.treatments import Treatments, code_tensors, qparams_tensors
from tasks.deployed import artefact
from tasks.load import Loaded

WEIGHTS, QUANTIZATION = "model.safetensors", "quantization.safetensors"
DEPLOYED = "deployed"
"""Folder of what a backend loads."""


def make_variant(
    loaded: Loaded, treatments: Treatments, scheme: Scheme, sweep: SweepFolder
) -> tuple[Record, Path]:
    """Commits what is registered once a scheme was chosen.

    ``model.safetensors`` holds every parameter and buffer as the cell was evaluated (float32; the
    quantized ones lie on their grids), for the model with its batch norms folded.
    ``quantization.safetensors`` holds codes, scales and zero points: what a deployment packs.
    ``deployed/`` holds the backend's own files, where a backend runs the scheme; their digest is
    that of the cell.
    """
    key = loaded.key(kind="variant", scheme=scheme.to_json())
    folder = sweep.place("variant", key)
    record = spool.recall(folder)
    if record is not None:
        return record, folder
    started = time.time()
    treated = treatments.for_scheme(scheme)
    with exchanged(loaded.model, treated.parameters):
        # Copies: safetensors holds neither tied weights, which share memory, nor strides.
        state = {
            name: tensor.detach().clone(memory_format=torch.contiguous_format)
            for name, tensor in loaded.model.state_dict().items()
            if isinstance(tensor, Tensor)
        }
    about: dict[str, object] = {
        "scheme": scheme.to_json(),
        "name": scheme.name,
        "subject_digest": loaded.subject.digest,
        "protocol_digest": loaded.protocol_digest,
        "weights_digest": digest_tensors(state),
        "batch_norm_folded": list(loaded.folding.folded),
        "architecture": str(loaded.model).splitlines(),
    }
    files = {
        WEIGHTS: encode.safetensors_bytes(state),
        QUANTIZATION: encode.safetensors_bytes(
            {**code_tensors(treated), **qparams_tensors(treated)}
        ),
        "scheme.json": encode.json_bytes(scheme.to_json()),
        "variant.json": encode.json_bytes(about),
    }
    if scheme.deployed:
        made = artefact(loaded, treatments, scheme)
        about["artefact"] = {"backend": scheme.backend, "digest": made.digest,
                             "files": sorted(made.files)}  # fmt: skip
        files |= {f"{DEPLOYED}/{name}": data for name, data in made.files.items()}
        files["variant.json"] = encode.json_bytes(about)
    record = Record("variant", key, scheme.name, detail=about, started=started)
    return spool.commit(folder, record, files), folder
