"""Batch normalization by the statistics of the batch, for Equinox."""

import equinox as eqx
import jax
import jax.numpy as jnp


class BatchStatsNorm(eqx.Module):
  """The Equinox twin of `metajax.models.BatchStatsNorm`, in place of `eqx.nn.BatchNorm`.

  As Equinox layers do, it is called with one example, `[channels, ...]`. The statistics are taken
  over the axis `"batch"`, which is what `metajax.models.from_equinox` names the batch.

  Attributes:
    scale: `[channels]`.
    bias: `[channels]`.
    epsilon: added to the variance.
  """

  scale: jax.Array
  bias: jax.Array
  epsilon: float = eqx.field(static=True)

  def __init__(self, num_features: int, *, epsilon: float = 1e-3) -> None:
    self.scale, self.bias, self.epsilon = jnp.ones(num_features), jnp.zeros(num_features), epsilon

  def __call__(self, inputs: jax.Array) -> jax.Array:
    positions = tuple(range(1, inputs.ndim))

    def average(values: jax.Array) -> jax.Array:
      of_example = jnp.mean(values, axis=positions, keepdims=True) if positions else values
      return jax.lax.pmean(of_example, "batch")

    centred = inputs - average(inputs)
    column = lambda values: values.reshape(-1, *(1 for _ in positions))
    inverse = jax.lax.rsqrt(average(jnp.square(centred)) + self.epsilon)
    return centred * inverse * column(self.scale) + column(self.bias)
