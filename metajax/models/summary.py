"""A table of what a network is and costs."""

from typing import Any

import jax
import numpy as np

from metajax.models.adapters import Model


def summary(model: Model, example_inputs: Any) -> str:
  """The parameters of a network, its operations and the memory that a gradient takes, as text.

  Args:
    model: the network.
    example_inputs: inputs `[n, ...]` of the size of a minibatch.

  Returns:
    A line for each part of the parameters, and one for the whole. The last line has the
    floating-point operations of a forward pass, where XLA counts them on this backend (it does not
    on a GPU), and the temporary memory of a gradient, which is compiled for that.
  """
  params = jax.eval_shape(model.init, jax.random.key(0))
  like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype), example_inputs)
  total = lambda params, inputs: sum(
    jax.numpy.sum(leaf) for leaf in jax.tree.leaves(model.apply(params, inputs))
  )
  forward = jax.jit(model.apply).lower(params, like).cost_analysis() or {}
  gradient = jax.jit(jax.grad(total)).lower(params, like).compile().memory_analysis()
  rows = [("part", "shapes", "parameters")]
  for path, part in _parts(params):
    leaves = jax.tree.leaves(part)
    shapes = ", ".join("x".join(map(str, leaf.shape)) or "1" for leaf in leaves)
    rows.append((path, shapes, f"{sum(leaf.size for leaf in leaves):,}"))
  count = sum(leaf.size for leaf in jax.tree.leaves(params))
  rows.append(("all", "", f"{count:,}"))
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = [
    f"{part:{widths[0]}}  {shapes:{widths[1]}}  {number:>{widths[2]}}"
    for part, shapes, number in rows
  ]
  n = len(jax.tree.leaves(example_inputs)[0])
  costs = []
  if "flops" in forward:
    costs.append(f"a forward pass: {forward['flops'] / 1e6:.1f} MFLOP")
  if gradient is not None:
    costs.append(f"a gradient: {gradient.temp_size_in_bytes / 1e6:.1f} MB of temporary memory")
  if costs:
    lines.append(f"minibatch of {n}: {'; '.join(costs)}")
  return "\n".join(lines)


def _parts(params: Any) -> list[tuple[str, Any]]:
  """The entries at the top of a tree with their names, or the tree itself if it is a leaf."""
  top = jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda part: part is not params)
  return [(jax.tree_util.keystr(path, simple=True) or "params", part) for path, part in top]
