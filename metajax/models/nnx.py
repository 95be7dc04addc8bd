"""Batch normalization by the statistics of the batch, for Flax NNX."""

import jax
import jax.numpy as jnp
from flax import nnx

from metajax.models.fast.blocks import normalize


class BatchStatsNorm(nnx.Module):
  """The NNX twin of `metajax.models.BatchStatsNorm`, in place of `nnx.BatchNorm`.

  Args:
    num_features: the number of channels, the last axis of the inputs.
    epsilon: added to the variance.
    use_scale: whether to learn scales; offsets are always learned.
    rngs: not needed, since scales start at 1 and offsets at 0; other NNX layers take it too.
  """

  def __init__(
    self,
    num_features: int,
    *,
    epsilon: float = 1e-3,
    use_scale: bool = True,
    rngs: nnx.Rngs | None = None,
  ) -> None:
    self.epsilon = epsilon
    self.scale = nnx.Param(jnp.ones(num_features)) if use_scale else None
    self.bias = nnx.Param(jnp.zeros(num_features))

  def __call__(self, inputs: jax.Array) -> jax.Array:
    scale = 1.0 if self.scale is None else self.scale[...]
    return normalize(inputs, scale, self.bias[...], self.epsilon)
