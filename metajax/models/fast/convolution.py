"""Implementations of convolution with the same signature, parameters and results.

XLA's own convolution is fast on CPU, but the derivatives that JAX writes for it are not: inside a
scan they take nine times as long, and where `vmap` gives every task its own kernel they become
grouped convolutions, which are slow too. `cpu` avoids both. On a GPU, grouped convolutions are
slow as well, and `patches` avoids them. `benchmarks/README.md` has the measurements.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from metajax import devices

Method = Literal["cpu", "patches", "xla"]
Convolve = Callable[..., jax.Array]
Pads = tuple[tuple[int, int], tuple[int, int]]

_LAYOUT = ("NHWC", "HWIO", "NHWC")


def convolution(method: Method | None = None) -> Convolve:
  """Returns a convolution for `flax.linen.Conv(conv_general_dilated=...)`.

  Args:
    method: `"cpu"`, `"patches"`, `"xla"`, or None for the fastest on the default backend.

  Returns:
    A function with the arguments of `jax.lax.conv_general_dilated`; inputs are
    `[n, height, width, channels]`, kernels `[height, width, channels, features]`.

  Raises:
    ValueError: for any other method.
  """
  if method is None:
    return _METHODS[devices.defaults().convolution]
  if method not in _METHODS:
    raise ValueError(f"convolution must be 'cpu', 'patches' or 'xla', not {method!r}")
  return _METHODS[method]


def cpu(
  inputs: jax.Array,
  kernel: jax.Array,
  window_strides: Sequence[int],
  padding: str | Sequence[tuple[int, int]],
  **options: Any,
) -> jax.Array:
  """`jax.lax.conv_general_dilated` on NHWC images, in the form that is fastest on CPU.

  With strides of 1 and operands of one dtype, this is XLA's convolution with derivatives of its
  own. In all other cases it is `patches`.

  With mirror(w)[i, j, f, c] = w[-i, -j, c, f], and x * w the convolution of stride 1, the
  derivatives of y = x * w in the direction of a cotangent g are

  - by the inputs: g * mirror(w), with the rest of the padding that a full convolution has;
  - by the kernel: the sum over images of patches(x)^T g.

  Both are bilinear again, and each one's derivatives are the other and the convolution. So
  derivatives of any order, in forward and in reverse mode, consist of these two products only. The
  second one goes through the images one by one, so that an image's patches stay in the cache.

  Args:
    inputs: `[n, height, width, channels]`.
    kernel: `[kernel_height, kernel_width, channels, features]`.
    window_strides: the strides along height and width.
    padding: `"SAME"`, `"VALID"` or `[(low, high), (low, high)]`.
    **options: the other arguments of `conv_general_dilated`. `precision` counts in `patches` only;
      a CPU computes in the precision of the operands anyway.

  Returns:
    `[n, out_height, out_width, features]`.

  Raises:
    ValueError: if the options ask for dilation, groups or another layout.
  """
  element_type = options.get("preferred_element_type")
  mixed = {inputs.dtype, kernel.dtype, jnp.dtype(element_type or inputs.dtype)} != {inputs.dtype}
  if tuple(window_strides) != (1, 1) or mixed:
    return patches(inputs, kernel, window_strides, padding, **options)
  _refuse_unsupported(options)
  return _product.bind(inputs, kernel, pads=_pads(inputs, kernel, (1, 1), padding))


def patches(
  inputs: jax.Array,
  kernel: jax.Array,
  window_strides: Sequence[int],
  padding: str | Sequence[tuple[int, int]],
  **options: Any,
) -> jax.Array:
  """`jax.lax.conv_general_dilated` on NHWC images as shifted slices and one matrix multiplication.

  The arguments, the result and the errors are those of `cpu`.
  """
  _refuse_unsupported(options)
  rows, columns, channels, features = kernel.shape
  pads = _pads(inputs, kernel, window_strides, padding)
  inputs = _pad(inputs, pads)
  out = [
    (size - window) // stride + 1
    for size, window, stride in zip(inputs.shape[1:3], (rows, columns), window_strides, strict=True)
  ]
  # Matrices of two axes rather than four: on CPU, the matrix products of the backward pass are then
  # 1.5 times as fast.
  outputs = jnp.matmul(
    jnp.concatenate(_shifted(inputs, (rows, columns), out, window_strides), axis=-1).reshape(
      -1, rows * columns * channels
    ),
    kernel.reshape(-1, features),
    precision=options.get("precision"),
    preferred_element_type=options.get("preferred_element_type"),
  )
  return outputs.reshape(inputs.shape[0], *out, features)


_METHODS: dict[str, Convolve] = {
  "cpu": cpu,
  "patches": patches,
  "xla": lax.conv_general_dilated,
}


def _pads(
  inputs: jax.Array,
  kernel: jax.Array,
  strides: Sequence[int],
  padding: str | Sequence[tuple[int, int]],
) -> Pads:
  if isinstance(padding, str):
    padding = lax.padtype_to_pads(inputs.shape[1:3], kernel.shape[:2], strides, padding)
  (top, bottom), (left, right) = padding
  return (int(top), int(bottom)), (int(left), int(right))


def _pad(images: jax.Array, pads: Pads) -> jax.Array:
  """Pads height and width with zeros; negative numbers cut off rows or columns."""
  zero = jnp.zeros((), images.dtype)
  return lax.pad(images, zero, ((0, 0, 0), *((*pad, 0) for pad in pads), (0, 0, 0)))


def _shifted(
  images: jax.Array, window: Sequence[int], out: Sequence[int], strides: Sequence[int]
) -> list[jax.Array]:
  """What each position of the window sees: a list of `[n, out_height, out_width, channels]`."""
  (height, width), (down, right), (n, channels) = out, strides, (len(images), images.shape[-1])
  return [
    lax.slice(
      images,
      (0, i, j, 0),
      (n, i + (height - 1) * down + 1, j + (width - 1) * right + 1, channels),
      (1, down, right, 1),
    )
    for i in range(window[0])
    for j in range(window[1])
  ]


def _refuse_unsupported(options: dict[str, Any]) -> None:
  dilations = (*(options.get("lhs_dilation") or ()), *(options.get("rhs_dilation") or ()))
  groups = options.get("feature_group_count", 1) * options.get("batch_group_count", 1)
  layout = options.get("dimension_numbers")
  specs = ((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))  # the same as numbers
  if math.prod(dilations) != 1 or groups != 1:
    raise ValueError("only convolution('xla') has dilation and feature groups: use it for these")
  if layout is None or tuple(layout) not in (specs, _LAYOUT):
    raise ValueError(f"images and kernels must be {_LAYOUT}, not {layout}, or use 'xla'")


# The two bilinear products of `cpu`, as primitives of JAX: a `jax.custom_vjp` would have no forward
# mode, and its derivatives would be differentiated by JAX's own rules again.


def _convolve(images: jax.Array, kernel: jax.Array, *, pads: Pads) -> jax.Array:
  return lax.conv_general_dilated(images, kernel, (1, 1), pads, dimension_numbers=_LAYOUT)


def _correlate(images: jax.Array, g: jax.Array, *, pads: Pads) -> jax.Array:
  """The kernel `[height, width, channels, features]`: sum over images of patches^T g."""
  out, features, channels = g.shape[1:3], g.shape[-1], images.shape[-1]
  window = [
    size + sum(pad) - o + 1 for size, pad, o in zip(images.shape[1:3], pads, out, strict=True)
  ]

  def add(total: jax.Array, one: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
    image, g = one
    columns = jnp.concatenate(_shifted(_pad(image[None], pads), window, out, (1, 1)), -1)
    return total + g.reshape(-1, features).T @ columns.reshape(-1, columns.shape[-1]), None

  zeros = jnp.zeros((features, math.prod(window) * channels), images.dtype)
  total, _ = lax.scan(add, zeros, (images, g))
  return total.reshape(features, *window, channels).transpose(1, 2, 3, 0)


def _primitive(name: str, function: Callable[..., jax.Array]) -> Primitive:
  """A primitive of two arrays that computes a function; a mapped axis becomes a loop."""
  primitive = Primitive(name)
  primitive.def_impl(jax.jit(function, static_argnames="pads"))
  mlir.register_lowering(primitive, mlir.lower_fun(function, multiple_results=False))

  @primitive.def_abstract_eval
  def _(*arguments: Any, pads: Pads) -> Any:
    result = jax.eval_shape(partial(function, pads=pads), *arguments)
    return jax.core.ShapedArray(result.shape, result.dtype)

  def over_axis(arguments: Any, axes: Any, *, pads: Pads) -> tuple[jax.Array, int]:
    mapped = [
      None if axis is None else jnp.moveaxis(argument, axis, 0)
      for argument, axis in zip(arguments, axes, strict=True)
    ]

    def one(parts: list[Any]) -> jax.Array:
      return primitive.bind(
        *(a if part is None else part for a, part in zip(arguments, parts, strict=True)), pads=pads
      )

    return lax.map(one, mapped), 0

  batching.primitive_batchers[primitive] = over_axis
  return primitive


_product = _primitive("convolution_of_stride_1", _convolve)
_by_kernel = _primitive("convolution_of_stride_1_by_kernel", _correlate)


def _by_inputs(g: jax.Array, kernel: jax.Array, pads: Pads) -> jax.Array:
  """g * mirror(kernel), padded to the size of the inputs."""
  rest = tuple(
    (size - 1 - low, size - 1 - high)
    for size, (low, high) in zip(kernel.shape[:2], pads, strict=True)
  )
  return _product.bind(g, kernel[::-1, ::-1].swapaxes(2, 3), pads=rest)


# The transposes of `_product(x, w)` and of `_by_kernel(x, g)`, by the first and second argument.
ad.defbilinear(
  _product,
  lambda g, _, kernel, *, pads: _by_inputs(g, kernel, pads),
  lambda g, images, _, *, pads: _by_kernel.bind(images, g, pads=pads),
)
ad.defbilinear(
  _by_kernel,
  lambda kernel, _, g, *, pads: _by_inputs(g, kernel, pads),
  lambda kernel, images, _, *, pads: _product.bind(images, kernel, pads=pads),
)
