"""What a 48-cell matrix costs when cells stop early, over evaluating every cell in full.

    make bench-early            (or: python -m benchmarks.early_stopping)

Fashion-MNIST: 5,000 selection examples, six weight formats, two granularities, four calibrators;
the two sweeps run one after the other in one process, training not counted.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import yaml

from audit.store import Store
from flows.conduct import conduct
from flows.config import read_plan

CONFIG = Path(__file__).parent.parent / "configs" / "fashion-mnist.yaml"
FORMATS = ["int8", "int6", "int4", "int3", "int2", "fp4_e2m1"]


def main() -> None:
    config = yaml.safe_load(CONFIG.read_text())
    config["matrix"]["weights"]["format"] = FORMATS
    config.pop("evaluation", None)
    config.pop("mixed_precision", None)
    config.pop("sensitivity", None)
    with tempfile.TemporaryDirectory() as folder:
        store, found = Store(Path(folder)), {}
        for evaluation in ("early", "full"):
            path = Path(folder, f"{evaluation}.yaml")
            path.write_text(yaml.safe_dump(config | {"evaluation": evaluation}))
            found[evaluation] = conduct(read_plan(path), path.read_text(), store, fresh=True)
            seconds = found[evaluation]["seconds"]["cells"]
            print(f"{evaluation}: cells {seconds:.1f} s", file=sys.stderr, flush=True)
    early, full = found["early"], found["full"]
    of = full["tasks"][0]["splits"]["selection"]["examples"]
    seen = [c["stopped"]["examples"] if c["stopped"] else of for c in early["cells"]]
    print(f"{len(seen)} cells, {of} examples each")
    print(f"examples seen early, of all    {sum(seen) / len(seen) / of:.2f}")
    ratio = early["seconds"]["cells"] / full["seconds"]["cells"]
    print(f"seconds of the cells, of all   {ratio:.2f}")
    pairs = list(zip(early["cells"], full["cells"], strict=True))
    same = sum(a["verdict"] == b["verdict"] for a, b in pairs)
    print(f"same verdict                   {same} of {len(pairs)}")
    for a, b in pairs:
        if a["verdict"] != b["verdict"]:
            print(f"  {a['name']}: {a['verdict']} early, {b['verdict']} in full")
    for verdict in ("accept", "reject", "inconclusive"):
        own = [n for n, c in zip(seen, early["cells"], strict=True) if c["verdict"] == verdict]
        if own:
            stopped = sum(n < of for n in own)
            print(
                f"{verdict:<14}{len(own)} cells, {stopped} stopped, mean {sum(own) / len(own):,.0f}"
            )
    print(f"decision: {early['decision']['cell']} early, {full['decision']['cell']} in full")


if __name__ == "__main__":
    main()
