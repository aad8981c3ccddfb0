"""Data through Hugging Face ``datasets``: hub ids, saved folders, parquet files, image folders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from halfstep.errors import UserError, allowed
from halfstep.subject import Examples
from sources.arrays import Pools, carve, image_examples


@dataclass(frozen=True)
class Datasets:
    """An image data set with an image column and a class column.

    ``path`` is what ``datasets.load_dataset`` takes, or a folder written by ``save_to_disk``.
    Without a ``validation`` split one of ``validation`` examples is carved out of ``train``.
    """

    path: str
    name: str | None = None
    revision: str | None = None
    image: str = "image"
    label: str = "label"
    validation: int = 5000
    seed: int = 0

    def load(self) -> Pools:
        pools = {str(split): self._examples(rows) for split, rows in self._splits().items()}
        if "train" in pools and "validation" not in pools:
            train = pools.pop("train")
            pools |= carve(train, {"validation": self.validation}, rest="train", seed=self.seed)
        return pools

    def _splits(self) -> Mapping[str, Any]:
        import datasets

        datasets.disable_progress_bars()
        try:
            folder = Path(self.path).expanduser()
            if (folder / "dataset_dict.json").is_file():
                return datasets.load_from_disk(str(folder))  # type: ignore[return-value]
            return datasets.load_dataset(self.path, self.name, revision=self.revision)  # type: ignore[return-value]
        except Exception as error:  # the library raises its own, the hub's and the OS's types
            first = str(error).strip().splitlines()
            raise UserError(
                f"data set {self.path!r} cannot be loaded through datasets: "
                f"{first[0] if first else type(error).__name__}"
            ) from error

    def _examples(self, rows: Any) -> Examples:
        for column in (self.image, self.label):
            if column not in rows.column_names:
                raise UserError(
                    f"data set {self.path!r} has no column {column!r}; "
                    f"{allowed(column, rows.column_names)}"
                )
        pixels = np.stack([np.asarray(image) for image in rows[self.image]])
        labels = torch.tensor(rows[self.label])
        return image_examples(pixels, labels.numpy(), 255.0 if pixels.dtype == np.uint8 else 1.0)
