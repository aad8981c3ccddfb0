"""Images and sounds to what models take."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from halfstep.digest import digest_json
from halfstep.examples import POSITIONAL
from sources.prepared import Row
from sources.processors import feature_extractor
from sources.transforms.base import Chunk, Made, Target


@dataclass(frozen=True)
class Image:
    """A column of images: through a model's own image processor, or resized, scaled to 0..1 and
    normalised as given here. Passed as ``pixel_values`` to models that have a processor, else by
    position."""

    column: str
    preprocessor: str | None = None
    """Whose image processor to use; ``none`` for the steps given here."""
    size: tuple[int, int] | None = None
    """Height and width; images are resized bicubically."""
    grey: bool = False
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    processor: ClassVar[str] = "preprocessor"

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column,)

    @cached_property
    def loaded(self) -> Any:
        if self.preprocessor in (None, "none"):
            return None
        return feature_extractor(self.preprocessor, "image")

    @property
    def identity(self) -> dict[str, object]:
        made = self.loaded
        return {"processor": digest_json(_plain(made.to_dict())) if made is not None else None}

    def rows(self, chunk: Chunk, targets: list[Any], target: Target, told: dict[str, int]) -> Made:
        for i, picture in enumerate(chunk[self.column]):
            if picture is None:
                yield i, "no image"
                continue
            yield i, Row([self._pixels(picture)], target(targets[i]))

    def _pixels(self, picture: Any) -> dict[str, np.ndarray]:
        from PIL import Image as Pictures

        if not isinstance(picture, Pictures.Image):
            picture = Pictures.fromarray(np.asarray(picture, dtype=np.uint8))
        if self.loaded is not None:
            found = self.loaded(picture.convert("RGB"), return_tensors="np")
            return {"pixel_values": np.asarray(found["pixel_values"][0], dtype=np.float32)}
        picture = picture.convert("L" if self.grey else "RGB")
        if self.size is not None:
            picture = picture.resize(self.size[::-1], Pictures.Resampling.BICUBIC)
        pixels = np.asarray(picture, dtype=np.float32) / 255
        pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
        mean, std = (np.array(v, dtype=np.float32)[:, None, None] for v in (self.mean, self.std))
        return {POSITIONAL: (pixels - mean) / std}


@dataclass(frozen=True)
class Audio:
    """A column of waveforms (lists of samples between -1 and 1), through a model's own feature
    extractor."""

    column: str
    sampling_rate: int = 16000
    preprocessor: str | None = None

    processor: ClassVar[str] = "preprocessor"

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column,)

    @cached_property
    def loaded(self) -> Any:
        return feature_extractor(self.preprocessor or "", "audio")

    @property
    def identity(self) -> dict[str, object]:
        return {"processor": digest_json(_plain(self.loaded.to_dict())), **asdict(self)}

    def rows(self, chunk: Chunk, targets: list[Any], target: Target, told: dict[str, int]) -> Made:
        for i, wave in enumerate(chunk[self.column]):
            samples = wave.get("array") if isinstance(wave, dict) else wave
            if samples is None or len(samples) == 0:
                yield i, "no sound"
                continue
            found = self.loaded(
                np.asarray(samples, dtype=np.float32),
                sampling_rate=self.sampling_rate,
                return_tensors="np",
            )
            arrays = {
                k: np.asarray(v[0], dtype=np.float32)
                for k, v in found.items()
                if k in ("input_features", "input_values")
            }
            yield i, Row([arrays], target(targets[i]))


def _plain(value: Any) -> Any:
    """As JSON can hold it."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
