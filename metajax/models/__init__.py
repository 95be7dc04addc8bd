"""Networks, and adapters for Flax and Equinox modules. A model is two functions, init and apply."""

import importlib
from types import ModuleType

from metajax.models.adapters import Model, from_equinox, from_linen, from_nnx
from metajax.models.fast import convolution
from metajax.models.fast.blocks import max_pool
from metajax.models.networks import (
  MLP,
  BatchStatsNorm,
  ConvNet,
  ResNet,
  conv4,
  finn_mini_imagenet,
  finn_omniglot,
  from_spec,
  mini_imagenet,
  mlp,
  omniglot,
  resnet12,
  sine,
)
from metajax.models.summary import summary


def __getattr__(name: str) -> ModuleType:
  """Imports what needs Flax NNX or Equinox when it is first used."""
  if name in ("nnx", "equinox"):
    return importlib.import_module(f"metajax.models.{name}")
  raise AttributeError(f"module 'metajax.models' has no attribute {name!r}")


__all__ = [
  "MLP",
  "BatchStatsNorm",
  "ConvNet",
  "Model",
  "ResNet",
  "conv4",
  "convolution",
  "finn_mini_imagenet",
  "finn_omniglot",
  "from_equinox",
  "from_linen",
  "from_nnx",
  "from_spec",
  "max_pool",
  "mini_imagenet",
  "mlp",
  "omniglot",
  "resnet12",
  "sine",
  "summary",
]
