"""Tiny models of the hub's architectures, with tokenizers and processors, made on the spot."""

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = [
    "the",
    "a",
    "of",
    "in",
    "on",
    "and",
    "to",
    "is",
    "was",
    "film",
    "movie",
    "plot",
    "actor",
    "good",
    "bad",
    "great",
    "awful",
    "dull",
    "bright",
    "story",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "not",
    "very",
    "quite",
    "never",
    "always",
]
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def tokenizer(folder, *, words=WORDS, ends=True):
    """A tokenizer of whole words, saved."""
    vocabulary = {word: i for i, word in enumerate((*SPECIAL, *words))}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    if ends:
        made.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
        )  # fmt: skip
    names = dict(zip(("pad", "unk", "cls", "sep", "mask"), SPECIAL, strict=True))
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, **{f"{k}_token": v for k, v in names.items()}
    )
    fast.save_pretrained(folder)
    return len(vocabulary)


def _saved(model, folder):
    model.eval().save_pretrained(folder)
    return str(folder)


def bert(folder, head="SequenceClassification", labels=2, **options):
    size = tokenizer(folder)
    config = transformers.BertConfig(
        vocab_size=size, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=64, num_labels=labels, **options,
    )  # fmt: skip
    torch.manual_seed(0)
    return _saved(getattr(transformers, f"Bert{'For' if head != 'Model' else ''}{head}")(config),
                  folder)  # fmt: skip


def vit(folder):
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        image_size=32, patch_size=8, num_labels=3,
    )  # fmt: skip
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    torch.manual_seed(0)
    return _saved(transformers.ViTForImageClassification(config), folder)


def resnet(folder):
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3, layer_type="basic"
    )
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    torch.manual_seed(0)
    model = transformers.ResNetForImageClassification(config)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return _saved(model, folder)


def llama(folder):
    size = tokenizer(folder, ends=False)
    config = transformers.LlamaConfig(
        vocab_size=size, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=128, max_position_embeddings=512,
    )  # fmt: skip
    torch.manual_seed(0)
    return _saved(transformers.LlamaForCausalLM(config), folder)


def gpt2(folder):
    size = tokenizer(folder, ends=False)
    config = transformers.GPT2Config(
        vocab_size=size, n_embd=32, n_layer=2, n_head=2, n_positions=512,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return _saved(transformers.GPT2LMHeadModel(config), folder)


def whisper(folder):
    config = transformers.WhisperConfig(
        d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, num_mel_bins=16,
        max_source_positions=50, vocab_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1,
    )  # fmt: skip
    transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=1).save_pretrained(folder)
    torch.manual_seed(0)
    return _saved(transformers.WhisperForConditionalGeneration(config), folder)


def texts(n, seed=0, longest=14):
    """Sentences of different lengths, and whether each says "good" more often than "bad"."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(n):
        length = int(torch.randint(3, longest, (1,), generator=generator))
        index = torch.randint(0, len(WORDS), (length,), generator=generator).tolist()
        made.append(" ".join(WORDS[i] for i in index))
    return made
