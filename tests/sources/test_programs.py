"""Subjects from exported programs and from an MLflow store, and what is refused of them."""

import os

import mlflow
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_models import bert
from torch import nn

from audit.registry import fetch
from audit.store import Store
from audit.trail import connect
from halfstep.apply import applied
from halfstep.errors import UserError
from halfstep.formats import FORMATS
from halfstep.granularity import PerAxis, PerTensor
from halfstep.observe import calibrate
from halfstep.scheme import Scheme, Spec
from halfstep.sites import discover
from halfstep.treatments import Calibration, Treatments
from sources.context import Context
from sources.exported import Exported
from sources.mlflow_model import MlflowModel

pytestmark = pytest.mark.filterwarnings("ignore")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv2d(1, 4, 3), nn.Linear(4, 3)
        self.attend = nn.Linear(4, 12)

    def forward(self, x):
        h = torch.relu(self.conv(x)).flatten(2).transpose(1, 2)
        q, k, v = self.attend(h).chunk(3, -1)
        h = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.head(h.mean(1))


def exported(path, dynamic=True):
    x = torch.randn(2, 1, 6, 6)
    shapes = ({0: torch.export.Dim("batch", min=1, max=4096)},) if dynamic else None
    program = torch.export.export(Net().eval(), (x,), dynamic_shapes=shapes)
    torch.export.save(program, path)
    return str(path)


INT8 = Scheme(Spec(FORMATS["int8"], PerAxis(), "minmax"), Spec(FORMATS["int8"], PerTensor(), "mse"))


def quantized(model, x):
    sites = discover(model, x[:1])
    observed = calibrate(model, sites.activations, [x])
    treatments = Treatments(model, sites, Calibration(lambda: [x], len(x), observed), x)
    with torch.no_grad(), applied(model, treatments.for_scheme(INT8)) as treated:
        return sites, treated(x)


def test_an_exported_program_is_quantized_as_its_module_is(tmp_path):
    """Programs call operators of ATen where modules call functions of torch; both are the same
    sites with the same numbers."""
    subject = Exported(exported(tmp_path / "net.pt2")).load({}, Context(tmp_path))
    x = torch.randn(32, 1, 6, 6)
    with torch.no_grad():
        assert torch.equal(subject.model(x), Net().eval()(x))
    ours, found = quantized(subject.model, x)
    theirs, wanted = quantized(Net().eval(), x)
    assert {w.parameters for w in ours.weights} == {w.parameters for w in theirs.weights}
    assert len(ours.activations) == len(theirs.activations)
    assert torch.equal(found, wanted)


def test_a_program_for_one_batch_size_is_refused(tmp_path):
    with pytest.raises(UserError, match="exported for one batch size; export it with a batch axis"):
        Exported(exported(tmp_path / "net.pt2", dynamic=False)).load({}, Context(tmp_path))


def test_what_is_no_program_is_refused(tmp_path):
    (tmp_path / "x.pt2").write_bytes(b"not a program")
    with pytest.raises(UserError, match=r"x.pt2 cannot be read as an exported program"):
        Exported(str(tmp_path / "x.pt2")).load({}, Context(tmp_path))
    with pytest.raises(UserError, match="does not exist"):
        Exported(str(tmp_path / "y.pt2")).load({}, Context(tmp_path))


@pytest.fixture
def logged(store, tmp_path):
    """An MLflow store with a run to log to, and a context that fetches from it."""
    connect(store)
    before = mlflow.get_tracking_uri(), mlflow.get_registry_uri()
    mlflow.set_tracking_uri(store.tracking_uri)
    mlflow.set_registry_uri(store.tracking_uri)
    mlflow.set_experiment("models")
    yield Context(tmp_path / "cache", lambda address: fetch(store, address))
    mlflow.set_tracking_uri(before[0])
    mlflow.set_registry_uri(before[1])
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):  # which setting them exports
        os.environ.pop(name, None)


def test_safetensors_of_a_run_with_the_function_that_makes_the_model(logged, tmp_path):
    import subjects

    model = subjects.model()
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    with mlflow.start_run() as run:
        mlflow.log_artifact(str(tmp_path / "weights.safetensors"), "weights")
    uri = f"runs:/{run.info.run_id}/weights"
    subject = MlflowModel(uri, target="subjects:model").load({}, logged)
    assert torch.equal(subject.model.first.weight, model.first.weight)
    assert subject.origin["uri"] == uri
    with pytest.raises(UserError, match="does not fit subjects:attentive"):
        MlflowModel(uri, target="subjects:attentive").load({}, logged)


def test_a_registered_version_that_mlflow_saved_as_a_program(logged):
    x = np.random.default_rng(0).normal(size=(4, 1, 6, 6)).astype(np.float32)
    with mlflow.start_run():
        mlflow.pytorch.log_model(
            Net().eval(), name="net", registered_model_name="net", serialization_format="pt2",
            input_example=x, pip_requirements=["torch"],
        )  # fmt: skip
    subject = MlflowModel("models:/net/1").load({}, logged)
    with torch.no_grad():
        wanted = Net().eval()(torch.from_numpy(x))
        assert torch.allclose(subject.model(torch.from_numpy(x)), wanted, atol=1e-6)


def test_a_pickled_module_is_refused_with_the_ways_out(logged):
    with mlflow.start_run() as run:
        mlflow.pytorch.log_model(
            nn.Linear(2, 2), name="net", serialization_format="pickle", pip_requirements=["torch"]
        )
        model_id = mlflow.last_logged_model().model_id
    assert run
    with pytest.raises(UserError, match=r"nothing that loads without running code .*pt2"):
        MlflowModel(f"models:/{model_id}").load({}, logged)


def test_a_transformers_model_of_a_run(logged, tmp_path):
    import transformers

    folder = bert(tmp_path / "bert")
    with mlflow.start_run() as run:
        mlflow.log_artifacts(folder, "model/model")
        text = "flavors:\n  transformers:\n    model_binary: model\n"
        (tmp_path / "MLmodel").write_text(text)
        mlflow.log_artifact(str(tmp_path / "MLmodel"), "model")
    uri = f"runs:/{run.info.run_id}/model"
    subject = MlflowModel(uri, architecture="sequence_classification").load({}, logged)
    assert isinstance(subject.model, transformers.BertForSequenceClassification)
    with pytest.raises(UserError, match="say what it is used as: architecture"):
        MlflowModel(uri).load({}, logged)


def test_a_store_that_is_not_there_is_not_made(tmp_path):
    context = Context(tmp_path, lambda address: fetch(Store(tmp_path / "none"), address))
    with pytest.raises(UserError, match="holds no model yet; set MLFLOW_TRACKING_URI"):
        MlflowModel("models:/net/1").load({}, context)
    assert not (tmp_path / "none").exists()


def test_an_address_with_nothing_behind_it_is_named(logged):
    with pytest.raises(UserError, match=r"models:/nothing/1 cannot be fetched from sqlite"):
        MlflowModel("models:/nothing/1").load({}, logged)
    with pytest.raises(UserError, match=r"it starts with models:/ or runs:/"):
        MlflowModel("s3://bucket/model")
