"""A registered model whose versions are weights of `subjects.model`, and its config."""

import copy
from contextlib import suppress
from functools import cache

import subjects
import torch
import yaml
from mlflow.exceptions import MlflowException
from safetensors.torch import save_file

from audit.experiments import open_experiment
from audit.trail import connect

MODEL = "parts"


def trained():
    """The tiny network, fitted in closed form so that it answers well. Fitted once: least squares
    differ in the last bit from call to call."""
    return copy.deepcopy(_trained())


@cache
def _trained():
    model = subjects.model()
    x, y = subjects.data()["train"]
    with torch.no_grad():
        hidden = torch.relu(model.first(x)).double()
        wanted = torch.nn.functional.one_hot(y, 3).double()
        ones = torch.ones(len(hidden), 1, dtype=torch.float64)
        solved = torch.linalg.lstsq(torch.cat([hidden, ones], 1), wanted).solution.float()
        model.last.weight.copy_(6 * solved[:-1].T)
        model.last.bias.copy_(6 * solved[-1])
    return model


def moved(by):
    """The trained network with its head moved a little: other weights, the same behaviour."""
    model = trained()
    model.last.weight.data += by
    return model


def unequal():
    """The same function, with one unit scaled up and its use scaled down: one scale for the whole
    tensor then fits nothing else."""
    model = trained()
    model.first.weight.data[0] *= 4000
    model.first.bias.data[0] *= 4000
    model.last.weight.data[:, 0] /= 4000
    return model


def register(store, model, folder, name=MODEL):
    """Registers the next version; its number."""
    client = connect(store)
    home = open_experiment(client, store, "training", {})
    run = client.create_run(home)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()},
              folder / "weights.safetensors")  # fmt: skip
    client.log_artifact(run.info.run_id, str(folder / "weights.safetensors"), "weights")
    client.set_terminated(run.info.run_id)
    with suppress(MlflowException):
        client.create_registered_model(name)
    source = f"{run.info.artifact_uri}/weights"
    return int(client.create_model_version(name, source, run.info.run_id).version)


def watching_config(folder, change=None, name=MODEL):
    config = {
        "name": "parts-int8",
        "subject": {"source": "mlflow", "uri": f"models:/{name}/1", "target": "subjects:model"},
        "tasks": [
            {
                "name": "signs",
                "evaluator": "image_classification",
                "data": {"source": "factory", "target": "subjects:data"},
                "splits": {"calibration": {"from": "train"}, "selection": {"from": "validation"},
                           "confirmation": {"from": "test"}},
                "criteria": [{"metric": "accuracy", "max_drop": 0.05}],
            }
        ],
        "matrix": {"weights": {"format": ["int8", "int2"], "granularity": "per_tensor"},
                   "activations": {"format": "int8"}},
    }  # fmt: skip
    if change:
        change(config)
    path = folder / "watched.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path
