"""Artifacts as bytes: tables, parquet, JSON, safetensors. Equal content gives equal bytes."""

from __future__ import annotations

import csv
import io
import json
import math
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
    """A table of arrays ``[rows, …]``; those of more axes are lists of one length each."""
    fields, arrays = [], []
    for name, values in columns.items():
        array = pa.array(values.reshape(-1))
        shape = values.shape[1:]
        if shape:
            array = pa.FixedSizeListArray.from_arrays(array, math.prod(shape))
        kept = {"shape": json.dumps(shape)} if shape else None
        fields.append(pa.field(name, array.type, metadata=kept))
        arrays.append(array)
    out = io.BytesIO()
    pq.write_table(pa.Table.from_arrays(arrays, schema=pa.schema(fields)), out)  # type: ignore[no-untyped-call]
    return out.getvalue()


def read_parquet(data: bytes) -> dict[str, np.ndarray]:
    """The arrays of `parquet_bytes`, equal in values, types and shapes."""
    table = pq.read_table(io.BytesIO(data))  # type: ignore[no-untyped-call]
    found = {}
    for field in table.schema:
        values = table[field.name].combine_chunks()
        shape = json.loads((field.metadata or {}).get(b"shape", b"[]"))
        if shape:
            values = values.flatten()
        array = values.to_numpy(zero_copy_only=False)
        # Arrow's own memory is read-only; what was measured here is not.
        array = array.astype(str) if array.dtype == object else np.require(array, requirements="W")
        found[field.name] = array.reshape(len(table), *shape)
    return found


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
