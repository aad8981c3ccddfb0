"""SHA-256 digests of tensors, JSON values and source code: the identity of everything we keep."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def digest_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def digest_file(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_folder(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, by its path from there."""
    return {
        path.relative_to(folder).as_posix(): digest_file(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def digest_json(value: object) -> str:
    """Digest of a JSON value in canonical form: sorted keys, no spaces, no NaN."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return digest_bytes(text.encode())


def digest_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Digest over names, dtypes, shapes and raw bytes, in order of name."""
    import torch  # a second that commands which only read the trail need not pay

    sha = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        sha.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        sha.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def digest_code(roots: Iterable[Path]) -> str:
    """Digest of every Python file below some package folders."""
    sha = hashlib.sha256()
    for root in roots:
        for path in sorted(root.rglob("*.py")):
            sha.update(f"{root.name}/{path.relative_to(root).as_posix()}|".encode())
            sha.update(path.read_bytes())
    return sha.hexdigest()
