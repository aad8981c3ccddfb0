"""Artifacts as bytes: tables, parquet, JSON, safetensors. Equal content gives equal bytes."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.torch import save
from torch import Tensor

from halfstep.digest import digest_bytes


def json_bytes(value: object) -> bytes:
    return (json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n").encode()


def csv_bytes(rows: Sequence[Mapping[str, object]]) -> bytes:
    """A table with a header; the MLflow UI shows it as one. No rows give an empty file."""
    if not rows:
        return b""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def parquet_bytes(columns: Mapping[str, np.ndarray]) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table({k: pa.array(v) for k, v in columns.items()}), out)  # type: ignore[no-untyped-call]
    return out.getvalue()


def read_parquet(data: bytes) -> dict[str, np.ndarray]:
    table = pq.read_table(io.BytesIO(data))  # type: ignore[no-untyped-call]
    return {name: table[name].to_numpy(zero_copy_only=False) for name in table.column_names}


def safetensors_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    return save(dict(tensors))


def columns_digest(columns: Mapping[str, np.ndarray]) -> str:
    """Digest over the values of a table, independent of how a file encodes them."""
    parts: Iterable[bytes] = (
        f"{name}|{column.dtype.str}|{column.shape}|".encode()
        + np.ascontiguousarray(column).tobytes()
        for name, column in sorted(columns.items())
    )
    return digest_bytes(b"".join(parts))
