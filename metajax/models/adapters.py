"""The type `Model`, and adapters that make a model from a Flax or Equinox module."""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import jax
from flax import errors
from flax import linen as nn

from metajax.types import Apply, Params, PRNGKey, leaf_name

_NO_DROPOUT = (
  "a model draws no random numbers, and this one has dropout: make it deterministic here, for "
  "predictions, and train with a loss (params, batch, key) that gives the module its key"
)
_MISFITS = (
  errors.ScopeCollectionNotFound,
  errors.ScopeParamNotFoundError,
  errors.ScopeParamShapeError,
)


class Model(NamedTuple):
  """A network as two pure functions. `Model(init, apply)` makes one of any such functions.

  Attributes:
    init: `key -> params`.
    apply: `(params, inputs [n, ...]) -> outputs [n, ...]`.
    spec: for the networks of `metajax.models`, the function that makes the model and its arguments,
      as `{"name": "omniglot", "ways": 5, ...}`, with which it is made again from a file; else None.
  """

  init: Callable[[PRNGKey], Params]
  apply: Apply
  spec: dict[str, Any] | None = None


def from_linen(module: nn.Module, example_inputs: Any) -> Model:
  """Makes a model from a Flax Linen module that has parameters and no other variables.

  Args:
    module: called with one argument, the inputs.
    example_inputs: an array (or a pytree of arrays) of the inputs' shape, `[n, ...]`.

  Raises:
    ValueError: if it is no module; in `init`, if it has state, such as `nn.BatchNorm`'s running
      statistics; in `apply`, if it draws random numbers, as dropout does while it trains, or if the
      parameters or the inputs do not have the shapes that the module expects.
  """

  if not isinstance(module, nn.Module):
    raise ValueError(f"from_linen takes a module such as MyNetwork(), not {module!r:.80}")

  def init(key: PRNGKey) -> Params:
    variables = module.init(key, example_inputs)
    if set(variables) - {"params"}:
      raise ValueError(
        f"a model has parameters only, and this one has {sorted(set(variables) - {'params'})}: "
        "use metajax.models.BatchStatsNorm in place of nn.BatchNorm"
      )
    return variables.get("params", {})

  def apply(params: Params, inputs: Any) -> Any:
    try:
      return module.apply({"params": params}, inputs)
    except errors.InvalidRngError as error:
      raise ValueError(_NO_DROPOUT) from error
    except _MISFITS as error:
      shapes = ", ".join(str(leaf.shape) for leaf in jax.tree.leaves(inputs))
      raise ValueError(
        f"inputs {shapes} and the parameters do not fit each other: give inputs of the size that "
        "the model was made for, and the parameters that its init returned"
      ) from error

  return Model(init, apply)


def from_nnx(make: Callable[[Any], Any]) -> Model:
  """Makes a model from a Flax NNX module that has parameters and no other variables.

  Args:
    make: a function from `nnx.Rngs` to a module. The module is called with one argument, the
      inputs.

  Raises:
    ValueError: if `make` is a module itself; in `init`, if the module has state besides parameters.
  """
  from flax import nnx

  if isinstance(make, nnx.Module):
    raise ValueError(
      "from_nnx takes a function that makes the module, not the module itself: give "
      "lambda rngs: MyModule(rngs=rngs)"
    )

  def split(module: Any) -> tuple[Any, Any, Any]:
    graph, *states = nnx.split(module, nnx.Param, nnx.RngState, ...)
    params, keys, rest = states
    if jax.tree.leaves(keys):
      raise ValueError(
        "a model draws no random numbers, and this NNX module keeps a key for them: make its "
        "dropout without rngs, as nnx.Dropout(rate, deterministic=True), and train with a loss "
        "(params, batch, key) that gives it rngs"
      )
    if jax.tree.leaves(rest):
      names = ", ".join(".".join(map(str, path)) for path, _ in nnx.to_flat_state(rest))
      raise ValueError(
        f"a model has parameters only, and this NNX module keeps {names} too: make constant arrays "
        "in __call__, and use metajax.models.nnx.BatchStatsNorm in place of nnx.BatchNorm"
      )
    return graph, params, rest

  @cache
  def structure() -> tuple[Any, Any, Any]:
    """The module without numbers; it is made once, not at every call of `apply`."""
    made = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    return split(made)

  def init(key: PRNGKey) -> Params:
    return nnx.to_pure_dict(split(make(nnx.Rngs(key)))[1])

  def apply(params: Params, inputs: Any) -> Any:
    graph, like, rest = structure()
    like = jax.tree.map(lambda leaf: leaf, like)
    nnx.replace_by_pure_dict(like, params)
    return nnx.merge(graph, like, rest)(inputs)

  return Model(init, apply)


def from_equinox(make: Callable[[PRNGKey], Any]) -> Model:
  """Makes a model from an Equinox module that takes one example; the model vmaps it.

  The vmapped axis is named `"batch"`, for layers such as `metajax.models.equinox.BatchStatsNorm`.

  Args:
    make: a function from a key to a module.

  Raises:
    ValueError: if `make` is no function; in `init`, if the module has arrays that are not floating
      point.
  """
  import equinox as eqx

  if isinstance(make, eqx.Module):
    raise ValueError(
      "from_equinox takes a function that makes the module, not the module itself: give "
      "lambda key: MyModule(key=key)"
    )

  def init(key: PRNGKey) -> Params:
    params, rest = eqx.partition(make(key), eqx.is_inexact_array)
    if any(map(eqx.is_array, jax.tree.leaves(rest))):
      raise ValueError(
        "a model has parameters only, and this Equinox module has integer arrays too: make them "
        "Python numbers or NumPy constants in __call__, and for batch normalization use "
        "metajax.models.equinox.BatchStatsNorm"
      )
    return params

  @cache
  def structure() -> tuple[Any, Any]:
    """The module without numbers; it is made once, not at every call of `apply`."""
    shapes = eqx.filter_eval_shape(make, jax.random.key(0))
    return eqx.partition(shapes, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))

  def apply(params: Params, inputs: Any) -> Any:
    like, rest = structure()
    names, expected = (
      [leaf_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
      for tree in (params, like)
    )
    if names != expected:
      raise ValueError("these are not the parameters of this module: give those that init returned")
    # Functions that the module keeps are other objects each time it is made.
    params = jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(params))
    try:
      return jax.vmap(eqx.combine(params, rest), axis_name="batch")(inputs)
    except RuntimeError as error:
      if "requires a key" in str(error):
        raise ValueError(_NO_DROPOUT) from error
      raise

  return Model(init, apply)
