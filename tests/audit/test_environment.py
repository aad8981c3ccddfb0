"""The environment record and the digests everything hangs on."""

import json

import pytest
import torch

from audit.environment import capture, fact, without_credentials
from halfstep.digest import digest_code, digest_json, digest_tensors


def test_what_cannot_be_read_is_null_with_the_reason():
    def missing():
        raise FileNotFoundError("no such sensor")

    assert fact(missing) == {"value": None, "reason": "no such sensor"}
    assert fact(lambda: "") == {"value": None, "reason": "not reported by this system"}
    assert fact(lambda: 0) == {"value": 0}


def test_the_capture_names_the_software_that_moves_bits():
    found = capture()
    assert set(found) == {"host", "accelerator", "software", "determinism", "provenance"}
    assert found["software"]["distributions"]["value"]["torch"].startswith("2.13")
    assert found["determinism"]["torch_threads"]["value"] == torch.get_num_threads()
    json.dumps(found)


def test_only_allowed_variables_and_no_home_are_kept(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-1")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("HOME", "/home/canary-2")
    monkeypatch.setattr(
        "sys.argv", ["/home/canary-2/bin/halfstep", "sweep", "/home/canary-2/c.yaml"]
    )
    text = json.dumps(capture())
    assert "canary" not in text
    assert '"OMP_NUM_THREADS": "3"' in text
    assert "~/c.yaml" in text


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://user:token@host/x.git", "https://host/x.git"),
        ("https://host/x.git", "https://host/x.git"),
        ("git@host:x.git", "git@host:x.git"),
    ],
)
def test_credentials_are_taken_out_of_urls(url, shown):
    assert without_credentials(url) == shown


def test_tensor_digests_see_names_types_shapes_and_bits():
    x = torch.arange(6.0)
    digests = {
        digest_tensors({"x": x}),
        digest_tensors({"y": x}),
        digest_tensors({"x": x.reshape(2, 3)}),
        digest_tensors({"x": x.int()}),
        digest_tensors({"x": torch.nextafter(x, x + 1)}),
    }
    assert len(digests) == 5
    assert digest_tensors({"a": x, "b": -x}) == digest_tensors({"b": -x, "a": x})


def test_json_digests_refuse_nan_and_ignore_order():
    assert digest_json({"a": 1, "b": [2]}) == digest_json({"b": [2], "a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        digest_json({"a": float("nan")})


def test_code_digests_follow_the_code(tmp_path):
    (tmp_path / "m.py").write_text("x = 1\n")
    before = digest_code([tmp_path])
    (tmp_path / "notes.txt").write_text("not code")
    assert digest_code([tmp_path]) == before
    (tmp_path / "m.py").write_text("x = 2\n")
    assert digest_code([tmp_path]) != before
