"""The templates for hub models, planned against tiny local models of the same architecture."""

import numpy as np
import pytest
import yaml
from tiny_models import bert, gpt2, llama, resnet, texts, vit, whisper

from audit.store import Store
from flows.config import read_plan
from flows.forecast import forecast

pytestmark = pytest.mark.filterwarnings("ignore")


def labelled(tmp_path, columns):
    """Three parquet files with these columns, made from a row number."""
    import datasets

    files = {}
    for s, name in enumerate(("train", "validation", "test")):
        n = 320 if name == "train" else 40
        rows = [{k: make(1000 * s + i) for k, make in columns.items()} for i in range(n)]
        path = tmp_path / f"{name}.parquet"
        datasets.Dataset.from_list(rows).to_parquet(path)
        files[name] = str(path)
    return files


def sentence(i):
    return texts(1, i)[0] + " " + " ".join(texts(2, i + 7))


def text_table(tmp_path, data):
    data.update(path="parquet", files=labelled(
        tmp_path, {"sentence": sentence, "label": lambda i: i % 2}))  # fmt: skip
    data["carve"] = {"held_out": 40}


def long_text(tmp_path, data):
    data["files"] = labelled(tmp_path, {"text": lambda i: " ".join(texts(80, i, longest=30))})


def sounds(tmp_path, data):
    generator = np.random.default_rng(0)
    wave = lambda i: (0.1 * generator.normal(size=8000)).astype(np.float32).tolist()  # noqa: E731
    data["files"] = labelled(tmp_path, {"audio": wave})


def pictures(tmp_path, data):
    from PIL import Image

    generator = np.random.default_rng(0)
    for split, n in (("train", 90), ("validation", 9), ("test", 9)):
        for kind in ("a", "b", "c"):
            folder = tmp_path / "images" / split / kind
            folder.mkdir(parents=True)
            for i in range(n):
                pixels = generator.integers(0, 256, (20, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    data["folder"] = str(tmp_path / "images")


def pairs(tmp_path, data):
    import datasets

    for name in ("train", "validation", "test"):
        seed = len(name)
        rows = [{"sentence1": a, "sentence2": b, "score": float(i % 6)} for i, (a, b) in
                enumerate(zip(texts(200, seed), texts(200, seed + 50), strict=True))]  # fmt: skip
        data["files"][name] = str(tmp_path / f"{name}.csv")
        datasets.Dataset.from_list(rows).to_csv(data["files"][name])


TEMPLATES = {
    "bert-classification": (bert, text_table, "classifier"),
    "vit-image-classification": (vit, pictures, "classifier"),
    "resnet-image-classification": (resnet, pictures, "classifier.1"),
    "llama-language-model": (llama, long_text, "model.layers.1.mlp.down_proj"),
    "gpt2-language-model": (gpt2, long_text, "transformer.h.1.mlp.c_proj"),
    "whisper-encoder": (whisper, sounds, "layers.1.fc2"),
    "minilm-stsb": (lambda f: bert(f, "Model"), pairs, "encoder.encoder.layer.1.output.dense"),
}


def test_every_template_is_planned_here(request):
    folder = request.config.rootpath / "configs" / "templates"
    assert {path.stem for path in folder.glob("*.yaml")} == set(TEMPLATES)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_plans_on_a_tiny_model_of_its_architecture(request, tmp_path, name):
    make, provide, last = TEMPLATES[name]
    path = request.config.rootpath / "configs" / "templates" / f"{name}.yaml"
    config = yaml.safe_load(path.read_text())
    config["subject"]["path"] = make(tmp_path / "model")
    data = config["tasks"][0]["data"]
    provide(tmp_path, data)
    for kind in ("text", "language"):
        if kind in data:
            data[kind].pop("block", None)
            data[kind] |= {"block": 32} if kind == "language" else {"max_length": 32}
    local = tmp_path / "config.yaml"
    local.write_text(yaml.safe_dump(config, sort_keys=False))
    found = forecast(read_plan(local), Store(tmp_path / "mlruns"))
    names = [site["name"] for site in found["sites"]["weights"]]
    assert names[-1] == last or last in names
    assert len(found["cells"]) >= 2
    assert not (tmp_path / "mlruns").exists()
    unknown = [row for row in found["coverage"] if "does not quantize" in row["reason"]]
    assert unknown == []
    assert not any("could not be folded" in note for note in found["notes"])
