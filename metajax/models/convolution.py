"""Two implementations of convolution with the same signature, parameters and results.

On CPU, XLA's own convolution is slow inside a scan, and where vmap gives every task its own kernel
(it becomes a grouped convolution). Computed as shifted slices and one matrix multiplication, a
convolution is nine times as fast there; `benchmarks/README.md` has the measurements.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from metajax import devices

Method = Literal["patches", "xla"]
Convolve = Callable[..., jax.Array]
Padding = str | Sequence[tuple[int, int]]


def convolution(method: Method | None = None) -> Convolve:
  """Returns a convolution for `flax.linen.Conv(conv_general_dilated=...)`.

  Args:
    method: `"patches"`, `"xla"`, or None for the faster one on the default backend.

  Returns:
    A function with the arguments of `jax.lax.conv_general_dilated`; inputs are
    `[n, height, width, channels]`, kernels `[height, width, channels, features]`.

  Raises:
    ValueError: for any other method.
  """
  if method is None:
    return _METHODS[devices.defaults().convolution]
  if method not in _METHODS:
    raise ValueError(f"convolution must be 'patches' or 'xla', not {method!r}")
  return _METHODS[method]


def patches(
  inputs: jax.Array,
  kernel: jax.Array,
  window_strides: Sequence[int],
  padding: Padding,
  **options: Any,
) -> jax.Array:
  """`jax.lax.conv_general_dilated` on NHWC images as shifted slices and one matrix multiplication.

  Args:
    inputs: `[n, height, width, channels]`.
    kernel: `[kernel_height, kernel_width, channels, features]`.
    window_strides: the strides along height and width.
    padding: `"SAME"`, `"VALID"` or `[(low, high), (low, high)]`.
    **options: the other arguments of `conv_general_dilated`.

  Returns:
    `[n, out_height, out_width, features]`.

  Raises:
    ValueError: if the options ask for dilation, groups or another layout.
  """
  _refuse_unsupported(options)
  rows, columns, channels, features = kernel.shape
  height_stride, width_stride = window_strides
  if isinstance(padding, str):
    padding = lax.padtype_to_pads(inputs.shape[1:3], (rows, columns), window_strides, padding)
  inputs = jnp.pad(inputs, ((0, 0), *padding, (0, 0)))
  n, height, width, _ = inputs.shape
  out_height = (height - rows) // height_stride + 1
  out_width = (width - columns) // width_stride + 1
  shifted = [
    lax.slice(
      inputs,
      (0, row, column, 0),
      (
        n,
        row + (out_height - 1) * height_stride + 1,
        column + (out_width - 1) * width_stride + 1,
        channels,
      ),
      (1, height_stride, width_stride, 1),
    )
    for row in range(rows)
    for column in range(columns)
  ]
  # Matrices of two axes rather than four: on CPU, the matrix products of the backward pass are then
  # 1.5 times as fast.
  outputs = jnp.matmul(
    jnp.concatenate(shifted, axis=-1).reshape(-1, rows * columns * channels),
    kernel.reshape(-1, features),
    precision=options.get("precision"),
    preferred_element_type=options.get("preferred_element_type"),
  )
  return outputs.reshape(n, out_height, out_width, features)


_METHODS: dict[str, Convolve] = {"patches": patches, "xla": lax.conv_general_dilated}


def _refuse_unsupported(options: dict[str, Any]) -> None:
  dilations = (*(options.get("lhs_dilation") or ()), *(options.get("rhs_dilation") or ()))
  groups = options.get("feature_group_count", 1) * options.get("batch_group_count", 1)
  layout = options.get("dimension_numbers")
  specs = ((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))  # NHWC, HWIO, NHWC
  named = ("NHWC", "HWIO", "NHWC")
  if math.prod(dilations) != 1 or groups != 1:
    raise ValueError("patches have no dilation and no feature groups: use convolution('xla')")
  if layout is None or tuple(layout) not in (specs, named):
    raise ValueError(f"patches need {named} images and kernels, not {layout}")
