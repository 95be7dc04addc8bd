"""Networks, and adapters for Flax and Equinox modules. A model is a pair `(init, apply)`."""

from metajax.models.adapters import Model, from_equinox, from_linen, from_nnx
from metajax.models.fast import convolution
from metajax.models.fast.blocks import max_pool
from metajax.models.networks import (
  MLP,
  BatchStatsNorm,
  ConvNet,
  finn_mini_imagenet,
  finn_omniglot,
  mini_imagenet,
  omniglot,
  sine,
)

__all__ = [
  "MLP",
  "BatchStatsNorm",
  "ConvNet",
  "Model",
  "convolution",
  "finn_mini_imagenet",
  "finn_omniglot",
  "from_equinox",
  "from_linen",
  "from_nnx",
  "max_pool",
  "mini_imagenet",
  "omniglot",
  "sine",
]
