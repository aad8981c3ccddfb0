"""Tables of every format to examples: transforms, targets, what cannot be used, and the cache."""

import json

import numpy as np
import pytest
import torch
from tasks_config import serve
from tiny_models import texts, tokenizer

from halfstep.errors import UserError
from sources.beir import Beir
from sources.context import Context
from sources.data_factory import Factory
from sources.hub import Datasets
from sources.tabular import Tabular
from sources.transforms import Arrays, Image, Language, Search, Text, Values, Words

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def context(tmp_path):
    return Context(tmp_path / "cache")


@pytest.fixture
def words(tmp_path):
    tokenizer(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


ROWS = [
    {"text": t, "label": i % 3, "score": i / 10, "lang": "de" if i % 4 else "en"}
    for i, t in enumerate(texts(60))
]


def written(tmp_path, kind):
    import datasets

    made = datasets.Dataset.from_list(ROWS)
    path = tmp_path / f"rows.{kind}"
    if kind == "saved":
        datasets.DatasetDict({"train": made, "test": made.select(range(5))}).save_to_disk(path)
        return {"path": str(path)}
    {"parquet": made.to_parquet, "csv": made.to_csv, "json": made.to_json}[kind](path)
    return {"path": kind, "files": {"train": str(path)}}


@pytest.mark.parametrize("kind", ["saved", "parquet", "csv", "json"])
def test_every_format_gives_the_same_examples(tmp_path, context, words, kind):
    given = written(tmp_path, kind)
    text = Text(columns=("text",), tokenizer=words)
    pools = Datasets(**given, text=text, label="label", keep=("lang",)).load(context)
    serve(ROWS)
    wanted = Factory(target="subjects:rows", text=text, label="label", keep=("lang",)).load(context)
    assert pools["train"].digest == wanted["train"].digest
    assert pools["train"].columns["lang"][:5].tolist() == ["en", "de", "de", "de", "en"]
    assert pools["train"].targets.all().tolist() == [row["label"] for row in ROWS]
    first = pools["train"].inputs.columns["input_ids"].row(0)
    assert first[0] == 2
    assert first[-1] == 3
    assert len(first) == len(ROWS[0]["text"].split()) + 2


def test_texts_are_prepared_once_and_read_from_disk(context, words, monkeypatch):
    serve(ROWS)
    source = Factory(target="subjects:rows", text=Text(columns=("text",), tokenizer=words),
                     label="label", carve={"validation": 10, "test": 12})  # fmt: skip
    one = source.load(context)
    assert {name: len(pool) for name, pool in one.items()} == {
        "validation": 10, "test": 12, "train": 38
    }  # fmt: skip
    monkeypatch.setattr("sources.tabular.Writer", None)
    again = source.load(context)
    assert [p.digest for p in one.values()] == [p.digest for p in again.values()]
    monkeypatch.undo()
    serve([{**row, "text": row["text"] + " good"} for row in ROWS])
    assert source.load(context)["train"].digest != one["train"].digest


def test_two_texts_are_a_pair_of_rows_or_one_row_together(context, words):
    rows = [{"a": x, "b": y, "s": i / 4} for i, (x, y) in
            enumerate(zip(texts(20), texts(20, 1), strict=True))]  # fmt: skip
    serve(rows)
    pair = Factory(target="subjects:rows", text=Text(columns=("a", "b"), tokenizer=words),
                   label="s").load(context)["train"]  # fmt: skip
    assert len(pair) == 20
    assert len(pair.inputs) == 40
    assert pair.members.tolist()[3] == [6, 7]
    assert pair.targets.all().dtype == torch.float32
    some = pair.take(np.array([5, 2]))
    assert torch.equal(some.inputs.columns["input_ids"].row(some.members[0, 1]),
                       pair.inputs.columns["input_ids"].row(11))  # fmt: skip
    assert some.digests.tolist() == pair.digests[[5, 2]].tolist()
    together = Factory(
        target="subjects:rows", text=Text(columns=("a", "b"), together=True, tokenizer=words),
        label="s",
    ).load(context)["train"]  # fmt: skip
    assert together.members is None
    lengths = [len(row["a"].split()) + len(row["b"].split()) + 3 for row in rows]
    assert together.inputs.lengths[:, 0].tolist() == lengths


def test_truncation_is_told(context, words):
    serve(ROWS)
    text = Text(columns=("text",), tokenizer=words, max_length=6)
    pool = Factory(target="subjects:rows", text=text, label="label").load(context)["train"]
    long = sum(len(row["text"].split()) + 2 > 6 for row in ROWS)
    assert pool.told == {"texts cut at max_length": long}
    assert max(pool.inputs.lengths[:, 0]) == 6


def test_rows_that_cannot_be_used_are_counted_with_their_reasons(context, words):
    rows = [dict(row) for row in ROWS]
    rows[3]["text"], rows[7]["label"] = None, None
    serve(rows)
    text = Text(columns=("text",), tokenizer=words)
    pool = Factory(target="subjects:rows", text=text, label="label").load(context)["train"]
    assert len(pool) == 58
    assert pool.unusable == ("row 3 of pool 'train': no text",
                             "row 7 of pool 'train': label is missing")  # fmt: skip
    assert pool.targets.all()[3] == ROWS[4]["label"]


def test_words_carry_their_labels_to_the_first_token(context, words):
    rows = [{"tokens": ["good", "unknownword", "film"], "tags": [1, 2, 0]},
            {"tokens": ["bad"], "tags": ["B-X"]}]  # fmt: skip
    serve(rows[:1])
    source = Factory(target="subjects:rows", words=Words(column="tokens", tokenizer=words),
                     label="tags")  # fmt: skip
    assert source.load(context)["train"].targets.row(0).tolist() == [-100, 1, 2, 0, -100]
    serve(rows[1:])
    named = Factory(target="subjects:rows", words=Words(column="tokens", tokenizer=words),
                    label="tags", classes=("O", "B-X"))  # fmt: skip
    assert named.load(context)["train"].targets.row(0).tolist() == [-100, 1, -100]


@pytest.mark.parametrize("kind", ["bytes", "tokens"])
def test_documents_are_cut_into_blocks_and_nothing_is_lost_silently(context, words, kind):
    documents = [
        "the film was good and the plot was not " * 3,
        "two three",
        "one two three four " * 4,
    ]
    serve([{"text": d} for d in documents])
    language = Language(column="text", block=8, tokenizer="bytes" if kind == "bytes" else words)
    pool = Factory(target="subjects:rows", language=language).load(context)["train"]
    tokens = [len(d.encode()) if kind == "bytes" else len(d.split()) for d in documents]
    blocks = [(t - 1) // 8 for t in tokens]
    assert len(pool) == sum(blocks)
    counted = np.bincount(pool.columns["document"], minlength=3)
    assert counted.tolist() == blocks
    left = sum(t - 8 * b for t, b in zip(tokens, blocks, strict=True))
    assert pool.told == {"tokens at the ends of documents left out": left}
    name = "" if kind == "bytes" else "input_ids"
    ids = pool.inputs.columns[name].row(0)
    assert torch.equal(ids[1:], pool.targets.row(0)[:-1])
    if kind == "bytes":
        assert bytes(ids.tolist()).decode() == documents[0][:8]
        assert pool.columns["bytes"].tolist() == [8] * len(pool)


def test_masked_positions_stay_the_same(context, words):
    serve([{"text": " ".join(texts(20))}])
    language = Language(column="text", block=16, tokenizer=words, masked=0.2)
    source = Factory(target="subjects:rows", language=language)
    one, other = (source.load(Context(context.cache / name))["train"] for name in ("a", "b"))
    assert one.digest == other.digest
    hidden = one.inputs.columns["input_ids"].all() == 4  # [MASK]
    assert torch.equal(hidden, one.targets.all() >= 0)
    assert 0.1 < hidden.float().mean() < 0.35


def test_values_are_standardised_by_the_training_pool(context):
    generator = np.random.default_rng(0)
    pools = {
        name: [{"a": float(x), "b": 5.0, "y": float(x > 0)} for x in generator.normal(3, 2, 50)]
        for name in ("train", "test")
    }
    serve(pools)
    source = Factory(target="subjects:rows", values=Values(columns=("a", "b")), label="y")
    found = source.load(context)
    train = found["train"].inputs.tensor
    assert train.mean(0).abs().max() < 1e-6
    assert train.std(0, correction=0).tolist() == pytest.approx([1.0, 0.0])
    raw = np.array([row["a"] for row in pools["train"]])
    wanted = (pools["test"][0]["a"] - raw.mean()) / raw.std()
    assert found["test"].inputs.tensor[0, 0] == pytest.approx(wanted, rel=1e-5)


def test_images_of_a_folder(tmp_path, context):
    from PIL import Image as Pictures

    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        for kind in ("cat", "dog"):
            folder = tmp_path / "images" / split / kind
            folder.mkdir(parents=True)
            for i in range(3):
                pixels = generator.integers(0, 256, (9 + i, 12, 3), dtype=np.uint8)
                Pictures.fromarray(pixels).save(folder / f"{i}.png")
    image = Image(column="image", size=(8, 8), mean=(0.5,), std=(0.5,))
    found = Datasets(path="imagefolder", folder=str(tmp_path / "images"), image=image,
                     label="label").load(context)  # fmt: skip
    assert found["train"].inputs.tensor.shape == (6, 3, 8, 8)
    assert found["train"].targets.all().tolist() == [0, 0, 0, 1, 1, 1]
    assert -1 <= found["train"].inputs.tensor.min() < found["train"].inputs.tensor.max() <= 1
    with pytest.raises(UserError, match=r"bring them to one shape \(images: give a size\)"):
        Datasets(path="imagefolder", folder=str(tmp_path / "images"), image=Image(column="image"),
                 label="label").load(context)  # fmt: skip


def test_arrays_go_to_the_arguments_they_are_named_for(context):
    serve([{"x": [[1.0, 2.0]], "m": [1, 0], "y": 1}] * 4)
    arrays = Arrays(arguments={"features": "x", "mask": "m"})
    pool = Factory(target="subjects:rows", arrays=arrays, label="y").load(context)["train"]
    batch = pool.inputs.batch(slice(0, 2))
    assert {k: tuple(v.shape) for k, v in batch.items()} == {"features": (2, 1, 2), "mask": (2, 2)}


def test_queries_search_the_documents_of_all_pools(context, words):
    pools = {name: [{"q": q, "d": d} for q, d in zip(texts(10, s), texts(10, s + 9), strict=True)]
             for s, name in enumerate(("train", "test"))}  # fmt: skip
    pools["test"][0]["d"] = pools["train"][4]["d"]
    serve(pools)
    search = Search(query="q", document="d", tokenizer=words)
    found = Factory(target="subjects:rows", search=search).load(context)
    documents = len({row["d"] for rows in pools.values() for row in rows})
    assert [len(p.shared) for p in found.values()] == [documents] * 2
    test = found["test"]
    at = int(test.targets.row(0)[0, 0])
    ids = test.inputs.columns["input_ids"].row(test.shared[at])
    assert torch.equal(ids, found["train"].inputs.columns["input_ids"].row(
        found["train"].shared[int(found["train"].targets.row(4)[0, 0])]))  # fmt: skip


def test_retrieval_in_beirs_layout(tmp_path, context, words):
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    corpus, queries = texts(12), texts(5, 3)
    lines = [json.dumps({"_id": f"d{i}", "title": "film", "text": t}) for i, t in enumerate(corpus)]
    (folder / "corpus.jsonl").write_text("\n".join(lines))
    (folder / "queries.jsonl").write_text(
        "\n".join(json.dumps({"_id": f"q{i}", "text": t}) for i, t in enumerate(queries))
    )
    judged = ["query-id\tcorpus-id\tscore", "q0\td3\t2", "q0\td4\t1", "q1\td11\t1", "q2\td0\t0"]
    (folder / "qrels" / "test.tsv").write_text("\n".join(judged))
    text = Text(columns=("text",), tokenizer=words)
    pools = Beir(path=str(folder), text=text).load(context)
    assert sorted(pools) == ["documents", "test"]
    assert pools["test"].targets.row(0).tolist() == [[3.0, 2.0], [4.0, 1.0]]
    assert pools["test"].unusable == ("query q2 of test.tsv: nothing is relevant",)
    assert len(pools["documents"]) == len(pools["test"].shared) == 12
    (folder / "qrels" / "test.tsv").write_text("q0\td3\n")
    with pytest.raises(UserError, match=r"test.tsv, line 1: query, document and gain expected"):
        Beir(path=str(folder), text=text).load(context)


REFUSED = {
    "a missing column": (
        {"text": Text(columns=("txt",)), "label": "label"},
        r"no column 'txt'; allowed: text, label, score, lang \(did you mean 'text'\?\)",
    ),
    "a missing label": (
        {"text": Text(columns=("text",)), "label": "labl"}, r"no column 'labl'.*'label'"),
    "labels that are texts": (
        {"text": Text(columns=("text",)), "label": "lang"},
        r"lang is 'en'; give classes: \[\.\.\.\], in the order of the model's answers"),
    "a class that is not among them": (
        {"text": Text(columns=("text",)), "label": "lang", "classes": ("de", "fr")},
        r"lang is 'en'; allowed: de, fr"),
    "a pool that is there already": (
        {"values": Values(columns=("score",)), "label": "label", "carve": {"train": 5}},
        r"data.carve: there is a pool 'train' already"),
    "numbers that are none": (
        {"values": Values(columns=("text",)), "label": "label"}, r"'text' does not hold numbers"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_bad_tables_are_refused(context, words, case):
    settings, message = REFUSED[case]
    if "text" in settings:
        settings = settings | {"text": Text(columns=settings["text"].columns, tokenizer=words)}
    serve(ROWS)
    with pytest.raises(UserError, match=message):
        Factory(target="subjects:rows", **settings).load(context)


def test_one_transform_is_needed_and_no_more():
    with pytest.raises(UserError, match=r"exactly one of text, words.* none is given"):
        Tabular()
    with pytest.raises(UserError, match="both text and values given"):
        Tabular(text=Text(columns=("a",)), values=Values(columns=("b",)))


def test_files_and_folders_that_are_not_there_are_named(tmp_path, context):
    (tmp_path / "real.csv").write_text("a\n1\n")
    text = Text(columns=("text",))
    with pytest.raises(UserError, match=r"gone.csv does not exist; .* holds real.csv"):
        Datasets(path="csv", files={"train": str(tmp_path / "gone.csv")}, text=text).load(context)
    with pytest.raises(UserError, match=r"data.folder: .* is not a folder"):
        Datasets(path="imagefolder", folder=str(tmp_path / "no"), text=text).load(context)
    with pytest.raises(UserError, match=r"csv needs files \(by pool\) or a folder"):
        Datasets(path="csv", text=text).load(context)


def test_a_hub_data_set_that_cannot_be_reached_says_how_to_work_offline(context, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"data set 'nobody/nothing' cannot be loaded .*offline"):
        Datasets(path="nobody/nothing", text=Text(columns=("text",))).load(context)


def test_a_cut_file_of_the_cache_is_named(context, words):
    serve(ROWS)
    source = Factory(target="subjects:rows", text=Text(columns=("text",), tokenizer=words),
                     label="label")  # fmt: skip
    source.load(context)
    path = next(context.cache.rglob("input-0.bin"))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match=r"input-0.bin is cut short; remove it"):
        _ = source.load(context)["train"].digest
