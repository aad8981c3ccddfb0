"""Does the memory of an evaluation grow with the number of examples, beyond their outcomes?

    make bench-memory         (or: python -m benchmarks.memory [examples])

Two evaluations of one model on data that lie in a parquet file, the second on ten times as many
examples, each in a process of its own: the largest anonymous memory (``RssAnon``; pages of files,
which the system may drop at any time, do not count) from before the data are read until the metrics
and a paired test are done.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

EXAMPLES, FACTOR, SIDE, CLASSES = 4_000, 10, 48, 10


def main(examples: int) -> None:
    peaks = []
    for count in (examples, FACTOR * examples):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "benchmarks.memory", "one", str(count), folder]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        before, peak = map(float, done.stdout.split())
        size = count * SIDE * SIDE * 4 / 2**20
        print(
            f"{count:>7,} examples ({size:,.0f} MiB of inputs): peak {peak:,.0f} MiB, "
            f"{peak - before:,.0f} over the start"
        )
        peaks.append(peak)
    print(f"ten times the data takes {peaks[1] / peaks[0]:.2f} times the peak")


def one(count: int, folder: Path) -> None:
    """One evaluation; prints the memory before it and its peak, in MiB."""
    write_rows(count, folder / "rows.parquet")
    import torch
    from torch import nn

    from evaluators import Classification
    from evaluators.acceptance import Candidate, Trial, judge
    from evaluators.criterion import Criterion
    from sources.context import Context
    from sources.hub import Datasets
    from sources.transforms import Arrays

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.ReLU(),
        nn.Flatten(), nn.LazyLinear(CLASSES),
    ).eval()  # fmt: skip
    model(torch.zeros(1, 1, SIDE, SIDE))
    before = anonymous()
    with Peak() as peak:
        source = Datasets(
            path="parquet", files={"test": str(folder / "rows.parquet")},
            arrays=Arrays(arguments={"input": "x"}), label="y",
        )  # fmt: skip
        examples = source.load(Context(folder / "cache"))["test"]
        evaluator = Classification()
        evaluator.check("pool 'test'", examples)
        reference = evaluator.run(model, examples, 32)
        with torch.no_grad():
            model[0].weight.mul_(8).round_().div_(8)
        cell = evaluator.run(model, examples, 32)
        evaluator.measure(cell, reference)
        rules = [Criterion("accuracy", "max_drop", 0.01), Criterion("log_loss", "max_increase", 1)]
        judge(
            [Trial("t", [Candidate("c", cell, {})], Candidate("r", reference, {}), rules,
                   evaluator.metrics)]
        )  # fmt: skip
    print(before, peak.most)


def write_rows(count: int, path: Path) -> None:
    """In a process of its own, so that making the data leaves nothing behind."""
    code = (
        "import numpy as np, pyarrow as pa, pyarrow.parquet as pq; g = np.random.default_rng(0)\n"
        f"kind = pa.list_(pa.list_(pa.list_(pa.float32(), {SIDE}), {SIDE}), 1)\n"
        "schema = pa.schema([('x', kind), ('y', pa.int64())])\n"
        f"with pq.ParquetWriter({str(path)!r}, schema) as out:\n"
        f"    for start in range(0, {count}, 500):\n"
        f"        x = g.normal(size=(500, {SIDE * SIDE})).astype(np.float32)\n"
        f"        rows = pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), {SIDE})\n"
        f"        rows = pa.FixedSizeListArray.from_arrays(rows, {SIDE})\n"
        "        rows = pa.FixedSizeListArray.from_arrays(rows, 1)\n"
        f"        y = pa.array(g.integers({CLASSES}, size=500))\n"
        "        out.write_table(pa.Table.from_arrays([rows, y], schema=schema))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def anonymous() -> float:
    """Anonymous resident memory of this process in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    raise OSError("this system does not tell RssAnon")


class Peak:
    """The largest anonymous memory while open, looked at every 5 ms."""

    def __enter__(self) -> Peak:
        self.most, self._open = anonymous(), True
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while self._open:
            self.most = max(self.most, anonymous())
            time.sleep(0.005)

    def __exit__(self, *error: object) -> None:
        self._open = False
        self._thread.join()


if __name__ == "__main__":
    if sys.argv[1:2] == ["one"]:
        one(int(sys.argv[2]), Path(sys.argv[3]))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else EXAMPLES)
