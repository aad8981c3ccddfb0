"""Quantization as controlled approximation: the numeric core (torch, numpy, standard library)."""

__version__ = "0.1.0"
