"""Where subjects and data come from: one class a source, listed in `SUBJECTS` and `DATASETS`."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import nn

from halfstep.plugins import Known
from halfstep.subject import Subject
from sources.beir import Beir
from sources.context import Context, Pools
from sources.data_factory import Factory as DataFactory
from sources.documentation import Documentation
from sources.exported import Exported
from sources.hub import Datasets
from sources.huggingface import HuggingFace
from sources.idx import Idx
from sources.mlflow_model import MlflowModel
from sources.model_factory import ModelFactory
from sources.sklearn_data import Sklearn
from sources.small_cnn import SmallCnn
from sources.small_lm import SmallLm
from sources.small_mlp import SmallMlp


@runtime_checkable
class SubjectSource(Protocol):
    """Where a model comes from: a frozen dataclass, whose fields are what a config may say."""

    def structure(self, pools: Pools, context: Context) -> nn.Module:
        """The model, in evaluation mode; its weights need not be the real ones."""
        ...

    def load(self, pools: Pools, context: Context) -> Subject:
        """The subject; raises UserError where it cannot be had."""
        ...


@runtime_checkable
class DataSource(Protocol):
    """Where examples come from: a frozen dataclass, whose fields are what a config may say."""

    def load(self, context: Context) -> Pools:
        """Examples by pool; raises UserError where they cannot be had."""
        ...


SUBJECTS: Known[type[SubjectSource]] = Known(
    {
        "small_cnn": SmallCnn,
        "small_mlp": SmallMlp,
        "small_lm": SmallLm,
        "huggingface": HuggingFace,
        "mlflow": MlflowModel,
        "factory": ModelFactory,
        "exported": Exported,
    },
    "halfstep.subjects",
    SubjectSource,
)

DATASETS: Known[type[DataSource]] = Known(
    {
        "sklearn": Sklearn,
        "idx": Idx,
        "datasets": Datasets,
        "documentation": Documentation,
        "beir": Beir,
        "factory": DataFactory,
    },
    "halfstep.datasets",
    DataSource,
)

__all__ = ["DATASETS", "SUBJECTS", "Context", "DataSource", "Pools", "SubjectSource"]
