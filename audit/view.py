"""A view of the runs table for auditors: MLflow itself shows neither params nor metrics at first.

MLflow keeps views that its UI shares as tags of the experiment; the form is not documented, and a
browser test guards it. The view is a convenience, not evidence: readers may change it.
"""

from __future__ import annotations

import base64
import json
import time
import zlib
from collections.abc import Sequence

KEY = "audit"
TAG = f"mlflow.sharedViewState.{KEY}"
PARAMS = (
    "weights.format",
    "weights.granularity",
    "activations.format",
    "activations.calibrator",
    "backend",
)
CHEAPEST_FIRST = "weight_bytes_ratio"
"""Sorting by a metric also shows the children without their parents."""


def cells_view(headlines: Sequence[str], params: Sequence[str] = ()) -> str:
    """Verdict, headline metrics and scheme of each run, the cheapest first.

    Args:
        params: more than the usual ones.
    """
    columns = [
        "tags.`halfstep.verdict`",
        *(f"metrics.`{name}`" for name in dict.fromkeys([*headlines, CHEAPEST_FIRST])),
        *(f"params.`{name}`" for name in (*PARAMS, *params)),
        "tags.`halfstep.signed_off`",
    ]
    return _tag(columns, f"metrics.`{CHEAPEST_FIRST}`", ascending=True)


def ledger_view() -> str:
    """What each entry of the ledger decided, and by whom, the newest first."""
    names = ("verdict", "outcome", "cell", "author", "by", "role", "sweep_id")
    columns = [f"tags.`halfstep.{name}`" for name in names]
    return _tag(columns, "attributes.start_time", ascending=False)


def _tag(columns: Sequence[str], order: str, *, ascending: bool) -> str:
    """The value of the experiment's tag."""
    state = {
        "searchFilter": "",
        "orderByKey": order,
        "orderByAsc": ascending,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "modelVersionFilter": "All Runs",
        "datasetsFilter": [],
        "selectedColumns": list(columns),
        "viewMaximized": True,
        "groupBy": None,
    }
    packed = base64.b64encode(zlib.compress(json.dumps(state).encode())).decode()
    now = round(time.time() * 1000)
    return json.dumps(
        {"name": KEY, "createdAt": now, "updatedAt": now, "state": f"deflate;{packed}"}
    )
