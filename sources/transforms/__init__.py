"""Transforms: from the rows of a table to what a model takes, as a config declares it."""

from __future__ import annotations

from sources.transforms.arrays import Arrays, Values
from sources.transforms.language import Language
from sources.transforms.search import Search
from sources.transforms.signals import Audio, Image
from sources.transforms.text import Text, Words

Transform = Text | Words | Language | Search | Image | Audio | Values | Arrays

__all__ = [
    "Arrays", "Audio", "Image", "Language", "Search", "Text", "Transform", "Values", "Words",
]  # fmt: skip
