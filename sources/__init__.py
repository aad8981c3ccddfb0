"""Where subjects and data come from: one class a source, listed in `SUBJECTS` and `DATASETS`."""

from __future__ import annotations

from sources.arrays import Factory as DataFactory
from sources.hub import Datasets
from sources.idx import Idx
from sources.model_factory import ModelFactory
from sources.sklearn_data import Sklearn
from sources.small_cnn import SmallCnn

SUBJECTS: dict[str, type[SmallCnn] | type[ModelFactory]] = {
    "small_cnn": SmallCnn,
    "factory": ModelFactory,
}

DATASETS: dict[str, type[Sklearn] | type[Idx] | type[Datasets] | type[DataFactory]] = {
    "sklearn": Sklearn,
    "idx": Idx,
    "datasets": Datasets,
    "factory": DataFactory,
}

SubjectSource = SmallCnn | ModelFactory
DataSource = Sklearn | Idx | Datasets | DataFactory
