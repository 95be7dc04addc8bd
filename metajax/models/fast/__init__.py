"""Convolutions and blocks that are faster than XLA's own.

`convolution` has the implementations to choose from. `blocks` has what comes between two
convolutions. `metajax.devices` says which of them a backend uses by default.
"""

from metajax.models.fast.blocks import normalize, normalize_pool_relu
from metajax.models.fast.convolution import Convolve, Method, convolution

__all__ = ["Convolve", "Method", "convolution", "normalize", "normalize_pool_relu"]
