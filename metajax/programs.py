"""Programs that are compiled once, with the data they use as arguments."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

T = TypeVar("T")


def on_mesh(tree: Any, mesh: Mesh) -> Any:
  """Copies arrays to every device of a mesh. Arrays that are spread over it already stay so."""
  everywhere = NamedSharding(mesh, PartitionSpec())

  def place(leaf: Any) -> jax.Array:
    if not isinstance(leaf, jax.Array):
      leaf = np.asarray(leaf)  # it may be a Python number
      return jax.make_array_from_callback(leaf.shape, everywhere, lambda index: leaf[index])
    if leaf.sharding.device_set == set(mesh.devices.flat):
      return leaf
    if jax.process_count() > 1:  # device_put reaches the devices of this process only
      return jax.jit(lambda leaf: leaf, out_shardings=everywhere)(leaf)
    return jax.device_put(leaf, everywhere)

  return jax.tree.map(place, tree)


def traced(function: Callable[..., T], *arguments: Any) -> tuple[Callable[..., T], list[jax.Array]]:
  """Traces a function for such arguments.

  Returns:
    `(constants, *arguments) -> outputs`, and the arrays that the function closes over, which are
    its constants.
  """
  like = jax.tree.map(without_sharding, arguments)
  program, shapes = jax.make_jaxpr(function, return_shape=True)(*like)
  structure = jax.tree.structure(shapes)

  def call(constants: list[jax.Array], *arguments: Any) -> T:
    flat = with_constants(program, constants)(*jax.tree.leaves(arguments))
    return jax.tree.unflatten(structure, flat)

  return call, program.consts


def with_constants(
  program: jax.extend.core.ClosedJaxpr, constants: list[Any]
) -> Callable[..., list[jax.Array]]:
  """A traced program as a function of flat arguments, with other constants."""
  closed = jax.extend.core.ClosedJaxpr(program.jaxpr, constants)
  return jax.extend.core.jaxpr_as_fun(closed)


def without_sharding(leaf: Any) -> jax.ShapeDtypeStruct:
  """The shape and dtype of an array. What is traced with a sharding runs only where that holds."""
  kind = jax.typeof(leaf)
  return jax.ShapeDtypeStruct(kind.shape, kind.dtype, weak_type=kind.weak_type)


def compiled(
  function: Callable[..., T], mesh: Mesh, *arguments: Any, donate: bool = False, **options: Any
) -> Callable[..., T]:
  """Compiles a function for such arguments, which are on the mesh.

  Arrays that the function closes over, such as a data set, are copied to the mesh and become
  arguments of the program. As constants they would be compiled into it, which takes long and
  writes them to the compilation cache.

  While JAX is debugging, the function is only jitted, so that `jax.disable_jit` and
  `jax_debug_nans` act on it.

  Args:
    function: what to compile.
    mesh: where to run it.
    *arguments: examples of its arguments.
    donate: whether the memory of the first argument may be used for the outputs.
    **options: for `jax.jit`.
  """
  if debugging():  # JAX can run this operation by operation, and not what is compiled ahead
    return jax.jit(function, **options)
  call, constants = traced(function, *arguments)
  constants = on_mesh(constants, mesh)
  jitted = jax.jit(call, donate_argnums=1 if donate else (), **options)
  return partial(jitted.lower(constants, *arguments).compile(), constants)


def debugging() -> bool:
  """Whether JAX runs operations one by one, or may do so to find one that returned NaN."""
  options = ("jax_disable_jit", "jax_debug_nans", "jax_debug_infs")
  return any(getattr(jax.config, option) for option in options)


@jax.jit
def copied(tree: Any) -> Any:
  """Copies arrays, so that a program may be given the memory of the originals."""
  return jax.tree.map(jnp.copy, tree)
