"""Models through transformers: real loading code on tiny models of the hub's architectures."""

import json

import numpy as np
import pytest
import torch
import transformers
from tasks_config import refused, serve
from tiny_models import bert, gpt2, llama, resnet, texts, tokenizer, vit, whisper

from evaluators import Classification, SentenceSimilarity
from halfstep.apply import applied
from halfstep.digest import digest_tensors
from halfstep.errors import UserError
from halfstep.fold import WATCHED, fold_batch_norm
from halfstep.formats import FORMATS
from halfstep.granularity import PerAxis, PerTensor
from halfstep.observe import calibrate, canonical
from halfstep.scheme import Scheme, Spec
from halfstep.sites import discover
from halfstep.treatments import Calibration, Treatments
from sources.context import Context
from sources.data_factory import Factory
from sources.huggingface import HuggingFace
from sources.processors import locate
from sources.transforms import Text


@pytest.fixture
def context(tmp_path):
    return Context(tmp_path / "cache")


def sentences(n=40):
    return {"train": [{"text": t, "label": i % 2} for i, t in enumerate(texts(n))]}


def examples_of(folder, context, rows, **settings):
    serve(rows)
    text = Text(tokenizer=str(folder), **settings)
    return Factory(target="subjects:rows", text=text, label="label").load(context)["train"]


def test_the_weights_are_the_checkpoints_and_the_digest_is_of_them(tmp_path, context):
    folder = bert(tmp_path / "a")
    subject = HuggingFace(folder, "sequence_classification").load({}, context)
    theirs = transformers.BertForSequenceClassification.from_pretrained(folder)
    assert digest_tensors(subject.model.state_dict()) == digest_tensors(theirs.state_dict())
    (tmp_path / "elsewhere").symlink_to(folder)
    moved = HuggingFace(str(tmp_path / "elsewhere"), "sequence_classification").load({}, context)
    assert moved.digest == subject.digest
    assert HuggingFace(folder, "token_classification", trust_remote_code=False).processor == folder


def test_logits_equal_transformers_own_with_padding(tmp_path, context):
    """Batches hold texts of one length; transformers' own way is to pad and to mask."""
    folder = bert(tmp_path / "a")
    rows = sentences()["train"]
    examples = examples_of(folder, context, rows, columns=("text",))
    subject = HuggingFace(folder, "sequence_classification").load({}, context)
    found = Classification().run(subject.model, examples, 8)
    made = transformers.AutoTokenizer.from_pretrained(folder)
    padded = made([row["text"] for row in rows], padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = subject.model(**padded).logits
    assert np.allclose(found["log_p"], torch.log_softmax(logits.double(), 1), atol=1e-5)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("head", ["SequenceClassification", "Model"])
def test_batch_size_does_not_change_results(tmp_path, context, quantized, head):
    folder = bert(tmp_path / "a", head)
    kind = "sentence_embedding" if head == "Model" else "sequence_classification"
    subject = HuggingFace(folder, kind).load({}, context)
    rows = [{"text": a, "other": b, "label": i % 3 % 2}
            for i, (a, b) in enumerate(zip(texts(40), texts(40, 1), strict=True))]  # fmt: skip
    columns = ("text", "other") if head == "Model" else ("text",)
    examples = examples_of(folder, context, rows, columns=columns)
    evaluator = SentenceSimilarity() if head == "Model" else Classification()
    column = "cosine" if head == "Model" else "log_p"

    def outcomes(model):
        return [evaluator.run(model, examples, size)[column] for size in (1, 5, 64)]

    if not quantized:
        found = outcomes(subject.model)
    else:
        inputs = examples.inputs
        sites = discover(subject.model, inputs.sample(1))
        batches = [inputs.batch(rows) for rows in canonical(inputs)]
        observed = calibrate(subject.model, sites.activations, batches)
        calibration = Calibration(lambda: batches, len(inputs), observed)
        treatments = Treatments(subject.model, sites, calibration, inputs.sample(16))
        weights = Spec(FORMATS["int8"], PerAxis(), "minmax")
        scheme = Scheme(weights, Spec(FORMATS["int8"], PerTensor(), "minmax"))
        with applied(subject.model, treatments.for_scheme(scheme)) as model:
            found = outcomes(model)
    for other in found[1:]:
        # Sums of another order may round another way; a value at a rounding edge may then flip.
        assert np.allclose(found[0], other, atol=2e-3 if quantized else 1e-6)
        assert np.mean(np.abs(found[0] - other)) < (2e-4 if quantized else 1e-6)


def test_fixed_padding_is_the_models_business_and_masked(tmp_path, context):
    folder = bert(tmp_path / "a", "Model")
    rows = sentences()["train"]
    ragged = examples_of(folder, context, rows, columns=("text",))
    padded = examples_of(folder, context, rows, columns=("text",), pad_to=24)
    assert padded.inputs.columns["input_ids"].shape == (24,)
    model = HuggingFace(folder, "sentence_embedding").load({}, context).model
    from evaluators.embeddings import embed

    one, other = (embed(model, e, 8, lambda n: None) for e in (ragged, padded))
    assert np.allclose(one, other, atol=1e-5)


ARCHITECTURES = {
    "sequence_classification": lambda f: bert(f),
    "token_classification": lambda f: bert(f, "TokenClassification", labels=5),
    "masked_lm": lambda f: bert(f, "MaskedLM"),
    "sentence_embedding": lambda f: bert(f, "Model"),
    "image_classification": lambda f: vit(f),
    "causal_lm": lambda f: gpt2(f),
    "encoder": lambda f: whisper(f),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_loads_and_has_the_structure_of_its_config(
    tmp_path, context, architecture
):
    folder = ARCHITECTURES[architecture](tmp_path / "model")
    source = HuggingFace(folder, architecture)
    subject, structure = source.load({}, context), source.structure({}, context)
    shapes = {n: p.shape for n, p in subject.model.named_parameters()}
    assert shapes == {n: p.shape for n, p in structure.named_parameters()}
    assert all(p.dtype == torch.float32 for p in subject.model.parameters())
    assert not subject.model.training


def test_a_head_that_the_checkpoint_lacks_is_refused(tmp_path, context):
    folder = bert(tmp_path / "a", "Model")
    with pytest.raises(UserError, match=r"no weights for classifier.bias.* would be random"):
        HuggingFace(folder, "sequence_classification").load({}, context)


def test_code_that_comes_with_a_model_is_not_run(tmp_path, context):
    folder = bert(tmp_path / "a")
    path = tmp_path / "a" / "config.json"
    config = json.loads(path.read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config",
                          "AutoModelForSequenceClassification": "evil.Model"}  # fmt: skip
    config["model_type"] = "evil"
    path.write_text(json.dumps(config))
    trap = tmp_path / "sprung"
    (tmp_path / "a" / "evil.py").write_text(f"open({str(trap)!r}, 'w')\n")
    with pytest.raises(UserError, match=r"trust_remote_code|code of its own"):
        HuggingFace(folder, "sequence_classification").load({}, context)
    assert not trap.exists()


def test_a_hub_that_cannot_be_reached_says_how_to_work_offline(context, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"nobody/nothing cannot be loaded .*To work offline"):
        HuggingFace("nobody/nothing", "causal_lm").load({}, context)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("./missing", "model folder ./missing does not exist"),
        ("/a/b.gguf", "GGUF file /a/b.gguf does not exist"),
        ("package:nowhere:path", "Install the package that ships the model"),
    ],
)
def test_a_place_that_is_not_there_is_named(path, message):
    with pytest.raises(UserError, match=message):
        locate(path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architecture": "causal"}, "unknown 'causal'.*did you mean 'causal_lm'"),
        ({"architecture": "encoder", "pooling": "max"}, "unknown 'max'; allowed: mean, cls, last"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        HuggingFace("x", **settings)


def test_batch_norms_of_a_model_that_cannot_be_traced_are_folded(tmp_path, context):
    subject = HuggingFace(resnet(tmp_path / "r"), "image_classification").load({}, context)
    x = {"pixel_values": torch.randn(2, 3, 32, 32)}
    found = fold_batch_norm(subject.model, x)
    norms = sum(isinstance(m, torch.nn.BatchNorm2d) for m in subject.model.modules())
    assert len(found.folded) == norms > 3
    assert found.max_relative_difference < 1e-5
    assert [note.startswith(WATCHED) for note in found.notes] == [True]


@pytest.mark.filterwarnings("ignore")
def test_a_gguf_file_is_dequantized_and_says_so(tmp_path, context):
    gguf = pytest.importorskip("gguf")
    folder = llama(tmp_path / "llama")
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder)
    path = tmp_path / "tiny.gguf"
    written = write_gguf(gguf, theirs, path)
    subject = HuggingFace(str(path), "causal_lm").load({}, context)
    assert "dequantized from GGUF" in subject.notes[0]
    ours = dict(subject.model.named_parameters())
    for name in ("model.layers.0.mlp.gate_proj.weight", "model.norm.weight"):
        original = dict(theirs.named_parameters())[name]
        step = original.abs().max() / 127 if name in written else 1e-7
        assert (ours[name] - original).abs().max() <= step
    assert not torch.equal(
        ours["model.layers.0.mlp.gate_proj.weight"],
        theirs.model.layers[0].mlp.gate_proj.weight,
    )


def write_gguf(gguf, model, path):
    """A Llama as Q8_0 blocks, and norms as float32. Returns the names of what is quantized."""
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    quantized = []
    for name, tensor in model.state_dict().items():
        to = names.get_name(name, try_suffixes=(".weight", ".bias"))
        data = tensor.numpy().astype(np.float32)
        if "q_proj" in name or "k_proj" in name:
            heads = config.num_attention_heads if "q_" in name else config.num_key_value_heads
            data = data.reshape(heads, 2, -1, data.shape[1]).swapaxes(1, 2).reshape(data.shape)
        if data.ndim == 2 and data.shape[1] % 32 == 0 and "embed" not in name:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(to, gguf.quants.quantize(data, kind), raw_dtype=kind)
            quantized.append(name)
        else:
            writer.add_tensor(to, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return quantized


def test_a_tokenizer_of_another_model_does_not_fit(tmp_path, tiny, store):
    folder = bert(tmp_path / "a")
    tokenizer(tmp_path / "other", words=[f"w{i}" for i in range(500)])
    rows = [{"text": f"w{i} w{i + 1} w499", "label": i % 2} for i in range(60)]
    message = r"token 504, the model knows tokens 0 to \d+: the tokenizer does not fit the model"
    refused(tmp_path, folder, store, rows, tmp_path / "other", message)
