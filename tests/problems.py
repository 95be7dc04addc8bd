"""Small problems for the tests: softmax regression and quadratics, as losses and episodes, and the
flags of a tiny few-shot run."""

import jax
import jax.numpy as jnp
import numpy as np

import metajax
from metajax.types import Examples

FEATURES, CLASSES = 4, 3
TINY = {
  "ways": 3, "eval_shots": (1,), "train_shots": 3, "filters": 2, "inner_batch": 3,
  "inner_steps": 2, "meta_batch": 2, "meta_steps": 4, "eval_batch": (3,), "eval_steps": 2,
  "eval_tasks": 4, "eval_every": 2, "curve_tasks": 2,
}  # fmt: skip


def softmax_loss(reduction="sum"):
  return metajax.losses.cross_entropy(lambda weights, x: x @ weights, reduction=reduction)


def weights(seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=(FEATURES, CLASSES)))


def examples(seed, n):
  rng = np.random.default_rng(seed)
  return Examples(
    jnp.asarray(rng.normal(size=(n, FEATURES))), jnp.asarray(rng.integers(0, CLASSES, n), jnp.int32)
  )


def episode(seed, k, batch_size=3, n=7, tail=None):
  """An episode of k losses; `tail` examples in the last one."""
  rows = np.random.default_rng(seed + 1000).integers(0, n, (k - 1, batch_size))
  return metajax.Episode(
    examples(seed, n), jnp.asarray(rows, jnp.int32), examples(seed + 2000, tail or batch_size)
  )


def episodes(seeds, k, **options):
  """Episodes stacked along a task axis."""
  several = [episode(seed, k, **options) for seed in seeds]
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *several)


def batches(one):
  """An episode's minibatches for the oracle."""
  inputs, labels = (np.asarray(leaf) for leaf in one.pool)
  drawn = [(inputs[rows], labels[rows]) for rows in np.asarray(one.schedule)]
  return [*drawn, (np.asarray(one.tail.inputs), np.asarray(one.tail.targets))]


def quadratic_loss(phi, examples):
  """Sum of (phi - c)' A (phi - c) / 2 over the batch: inputs are A [b, d, d], targets c [b, d]."""
  away = phi - examples.targets
  return 0.5 * jnp.einsum("bi,bij,bj->", away, examples.inputs, away)


def quadratic_episode(seed, k, dimension=3):
  """k quadratics, one a minibatch, each with a positive definite A."""
  rng = np.random.default_rng(seed)
  roots = rng.normal(size=(k, dimension, dimension))
  pool = Examples(
    jnp.asarray(roots @ roots.swapaxes(1, 2) + np.eye(dimension)),
    jnp.asarray(rng.normal(size=(k, dimension))),
  )
  tail = Examples(pool.inputs[-1:], pool.targets[-1:])
  return metajax.Episode(pool, jnp.arange(k - 1, dtype=jnp.int32)[:, None], tail)
