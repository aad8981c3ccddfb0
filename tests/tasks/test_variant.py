"""The registered variant: what was evaluated, in safetensors, with codes for a deployment."""

import json

import pytest
import torch
from recorded import small_config
from safetensors.torch import load

from audit import spool
from audit.encode import safetensors_bytes
from audit.store import Store
from flows.config import read_plan
from halfstep.apply import Treatment, applied
from halfstep.batches import forward
from halfstep.digest import digest_tensors
from halfstep.formats import FORMATS
from halfstep.granularity import PerAxis
from halfstep.quantize import dequantize
from halfstep.scheme import Spec
from halfstep.treatments import code_tensors, qparams_tensors
from halfstep.weights import quantize_weight
from tasks.calibrate import run_calibration
from tasks.load import load as load_plan
from tasks.reference import measure_reference
from tasks.variant import make_variant


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("variant")
    store = Store(folder / "mlruns")
    loaded = load_plan(read_plan(small_config(folder)), store)
    sweep = store.sweep(loaded.sweep_key, False)
    reference = measure_reference(loaded, "digits", "selection", sweep, lambda n: None)
    calibrated = run_calibration(loaded, {"digits": reference}, sweep, lambda n: None)
    scheme = loaded.plan.schemes[1]
    record, place = make_variant(loaded, calibrated.treatments, scheme, sweep)
    return loaded, calibrated.treatments, scheme, record, place / spool.FILES, sweep


def test_its_weights_are_those_that_were_evaluated(made):
    loaded, treatments, scheme, _, files, _ = made
    state = load((files / "model.safetensors").read_bytes())
    batch = loaded.split("digits", "selection").inputs.sample(8)
    treated = treatments.for_scheme(scheme)
    original = {name: t.clone() for name, t in loaded.model.state_dict().items()}
    with torch.no_grad(), applied(loaded.model, treated) as model:
        wanted = forward(model, batch)
    weights_only = type(treated)({}, treated.activations, {}, treated.known)
    loaded.model.load_state_dict(state)
    with torch.no_grad(), applied(loaded.model, weights_only) as model:
        found = forward(model, batch)
    loaded.model.load_state_dict(original)
    assert torch.equal(wanted, found)
    assert json.loads((files / "variant.json").read_text())["weights_digest"] == digest_tensors(
        state
    )


def test_its_codes_give_its_weights(made):
    _, treatments, scheme, _, files, _ = made
    tensors = load((files / "quantization.safetensors").read_bytes())
    state = load((files / "model.safetensors").read_bytes())
    checked = 0
    for name, weight in treatments.for_scheme(scheme).weights.items():
        codes = tensors[f"{name}.weight.codes"]
        assert codes.dtype == torch.int8
        assert codes.unique().numel() <= 4, "two bits"
        values = dequantize(codes, weight.broadcast())
        assert torch.equal(values, weight.rounded)
        held = state[f"{name}.weight"]
        assert torch.equal(values.reshape(held.shape), held)
        checked += 1
    assert checked == 5


def test_nothing_in_it_is_a_pickle(made):
    _, _, _, record, files, _ = made
    assert {p.name for p in files.iterdir()} == {
        "model.safetensors", "quantization.safetensors", "scheme.json", "variant.json"
    }  # fmt: skip
    assert set(record.files) == {p.name for p in files.iterdir()}


def test_making_it_again_makes_nothing(made):
    loaded, treatments, scheme, record, _, sweep = made
    again, _ = make_variant(loaded, treatments, scheme, sweep)
    assert again.ended == record.ended


@pytest.mark.parametrize("fmt", list(FORMATS))
def test_codes_of_every_format_can_be_kept(fmt):
    """A format whose codes could not be written would end a sweep at its last step."""
    torch.manual_seed(0)
    spec = Spec(FORMATS[fmt], PerAxis(), "minmax")
    weight = quantize_weight(torch.randn(8, 64), spec)
    treated = Treatment(weights={"site": weight})
    data = safetensors_bytes({**code_tensors(treated), **qparams_tensors(treated)})
    codes = load(data)["site.weight.codes"]
    assert torch.equal(dequantize(codes, weight.broadcast()), weight.rounded)
