"""How many bits stand beside the codes of one block."""

SCALE_BITS = 32
"""A scale is kept as float32."""
ZERO_POINT_BITS = 8
"""A zero point is kept as one byte."""
