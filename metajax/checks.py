"""Checks of shapes, dtypes and ranges. Each raises a ValueError of one line that says what to do.

Of traced values they read shapes and dtypes only, so that they cost nothing in a compiled program.
"""

import inspect
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import chex
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import optax

from metajax.programs import with_constants, without_sharding
from metajax.types import Examples, LossFn, Params, PRNGKey, Task, leaf_name, num_examples

_OTHER_KEYS = ("rng", "rngs", "rng_key", "prng_key")  # what a key is also called


def at_least_one(**numbers: int) -> None:
  """Checks that the named numbers are whole ones, 1 or more."""
  for name, number in numbers.items():
    if not isinstance(number, int | np.integer):
      raise ValueError(f"{name} must be a whole number, not {number!r:.80}")
    if number < 1:
      raise ValueError(f"{name} must be at least 1, not {number}")


def is_a(kind: type, what: str, value: Any, advice: str) -> None:
  """Checks that a value is of the type that belongs there."""
  if not isinstance(value, kind):
    named = value.__name__ if inspect.isfunction(value) else type(value).__name__
    raise ValueError(f"{what} must be of the type {kind.__name__}, not {named}: {advice}")


def is_optimizer(optimizer: Any) -> None:
  """Checks that an optax transformation was given, and not the function that makes one."""
  if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
    name = getattr(optimizer, "__name__", type(optimizer).__name__)
    raise ValueError(
      f"an optimizer must be an optax transformation, such as optax.sgd(0.1), not {name}"
    )


def with_extra_args(
  optimizer: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
  """Returns the same optimizer, to which all may be offered; it is given the arguments that it has.

  Of `optax.MultiSteps`, which passes such arguments on, optax's own function would drop them.
  """
  if not isinstance(optimizer, optax.MultiSteps):
    optimizer = optax.with_extra_args_support(optimizer)
  known = inspect.signature(optimizer.update).parameters
  takes_all = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in known.values())

  def update(grads: Params, state: Any, params: Params | None = None, **extra: Any) -> Any:
    if not takes_all:  # as that of optax.contrib.sam
      extra = {name: value for name, value in extra.items() if name in known}
    return optimizer.update(grads, state, params, **extra)

  return optax.GradientTransformationExtraArgs(optimizer.init, update)


def chunk_of_tasks(chunk: int | None, num_tasks: int) -> None:
  """Checks the number of tasks that run together."""
  if chunk is not None:
    at_least_one(chunk=chunk)
    if chunk > num_tasks:
      raise ValueError(f"chunk must be between 1 and num_tasks = {num_tasks}, not {chunk}")


def is_apply(apply: Any) -> None:
  """Checks that a function was given where a network's `apply` belongs."""
  if not callable(apply):
    raise ValueError(
      f"apply must be a function (params, inputs) -> outputs, not {type(apply).__name__}: give "
      "model.apply"
    )


def is_task(task: Any) -> None:
  """Checks what a task sampler returned, or what `make_episode` was given as a task."""
  if isinstance(task, int):
    raise ValueError(
      "make_episode was given where a schedule belongs: give the schedule itself, such as "
      "cycling(num_batches, batch_size), without shared_tail or separate_tail"
    )
  wrong = [task]
  if isinstance(task, Task):
    wrong = [part for part in task[:2] if not isinstance(part, Examples)]
  if wrong:
    raise ValueError(
      f"a task must be a metajax.Task of two metajax.Examples, not {type(wrong[0]).__name__}: "
      "return Task(Examples(inputs, targets), Examples(inputs, targets)) from sample_task"
    )


def is_count(n: Any) -> None:
  """Checks that a schedule was given a number of examples."""
  if not isinstance(n, int | np.integer):
    raise ValueError(
      f"a schedule takes a number of examples, not {type(n).__name__}: where make_episode belongs, "
      "give shared_tail(schedule) or separate_tail(schedule)"
    )


def is_key(key: Any) -> None:
  """Checks that a key of random numbers was given."""
  if not isinstance(key, jax.Array):
    raise ValueError(
      f"key must be a key of random numbers, not {key!r:.40}: give jax.random.key(0)"
    )


def uses_key(sample_task: Callable[[PRNGKey], Any], key: PRNGKey) -> None:
  """Warns if a task sampler draws nothing from its key."""
  program = jax.make_jaxpr(sample_task)(without_sharding(key)).jaxpr
  used = {id(value) for equation in program.eqns for value in equation.invars}
  if not any(id(value) in used for value in program.invars):
    warnings.warn(
      "sample_task does not use its key, so all tasks are the same: draw with jax.random from the "
      "key. What NumPy draws is drawn only once, when the program is compiled",
      stacklevel=2,
    )


def one_axis(mesh: jax.sharding.Mesh) -> None:
  """Checks that a mesh can be used for tasks."""
  is_a(jax.sharding.Mesh, "mesh", mesh, "give metajax.task_mesh(devices)")
  if len(mesh.axis_names) != 1:
    raise ValueError(f"the mesh must have one axis, not {mesh.axis_names}: use task_mesh()")
  if mesh.axis_types != (jax.sharding.AxisType.Auto,):  # as jax.make_mesh makes it by default
    raise ValueError(
      f"the axis of the mesh must be of the type Auto, not {mesh.axis_types[0].name}: use "
      "metajax.task_mesh(devices)"
    )


def leading_axis(what: str, tree: Any, size: int) -> None:
  """Checks that all leaves are `[size, ...]`."""
  try:
    chex.assert_tree_shape_prefix(_abstract(tree), (size,))
  except AssertionError as error:
    found = sorted({jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(tree)} - {(size,)})
    raise ValueError(
      f"{what} must have a leading axis of {size}, not {found}: give as many tasks as the "
      "meta-batch, and a state that init of this learner returned, on as many devices"
    ) from error


def gradient_like(params: Params, gradient: Params) -> None:
  """Checks that a gradient has the structure and the shapes of the parameters."""
  message = "the gradient is not like the parameters: return one array for each, of its shape"
  _like(params, gradient, message)


def state_of(which: str, expected: Any, state: Any) -> None:
  """Checks that the state of an optimizer has the structure and the shapes that it should have."""
  message = (
    f"the {which} state is not that of this optimizer for these parameters: start from what `init` "
    "returns for them"
  )
  _like(expected, state, message)


def _like(expected: Any, found: Any, message: str) -> None:
  try:
    chex.assert_trees_all_equal_shapes(_abstract(expected), _abstract(found))
  except AssertionError as error:
    raise ValueError(message) from error


def _update(
  optimizer: optax.GradientTransformation, grads: Params, state: Any, params: Params
) -> tuple[Params, Any]:
  """An update, with all that an optimizer may ask for beside the gradient."""
  one = jnp.ones(())
  return with_extra_args(optimizer).update(
    grads, state, params, grad=grads, value=one, value_fn=lambda params: one
  )


def _abstract(tree: Any) -> Any:
  """The shapes and dtypes of a tree, whose leaves may be Python numbers."""
  return jax.eval_shape(lambda tree: tree, tree)


def floating_point(params: Params) -> None:
  """Checks that all parameters can be trained."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
    if not jnp.issubdtype(dtype, jnp.floating):
      name = leaf_name(path) or "the parameter"
      raise ValueError(
        f"parameters must be floating point, and {name} is {dtype}: convert it, or leave it out"
      )


def loss(loss_fn: LossFn) -> Callable[..., tuple[jax.Array, dict[str, jax.Array]]]:
  """Returns the same loss with checks, in the form `(params, batch, key=None) -> (loss, metrics)`.

  Raises:
    ValueError: when called, if there is no example, a key is missing, the loss is not one
      floating-point number, or the metrics are not a dict of real arrays.
  """
  asks = asks_for_key(loss_fn)

  def checked(
    params: Params, batch: Examples, key: PRNGKey | None = None
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    if num_examples(batch) == 0:
      raise ValueError("a minibatch has no example: raise the batch size or the shots")
    if asks == "always" and key is None:
      raise ValueError(
        "the loss asks for a key, and was given none: give the argument key, or make episodes with "
        "shared_tail or separate_tail, or give yours a key"
      )
    found = loss_fn(params, batch, key=key) if asks and key is not None else loss_fn(params, batch)
    loss, metrics = found if isinstance(found, tuple) and len(found) == 2 else (found, {})
    types = [jax.typeof(leaf) for leaf in jax.tree.leaves(loss)]
    if not jax.tree_util.all_leaves([loss]) or not (
      types[0].shape == () and jnp.issubdtype(types[0].dtype, jnp.floating)
    ):
      shown = ", ".join(map(str, types)) or "nothing"
      raise ValueError(
        f"the loss must be one floating-point number, not {shown}: return the sum or the mean over "
        "the minibatch, and if you like, beside it, a dict of metrics"
      )
    return loss, _metrics(metrics)

  return checked


def asks_for_key(loss_fn: LossFn) -> Literal["always", "if there is one", ""]:
  """Whether a loss has a parameter named key after the first two, and whether it needs one."""
  if isinstance(loss_fn, partial) and "key" in loss_fn.keywords:  # the user's own key
    return ""
  try:
    parameters = list(inspect.signature(loss_fn).parameters.values())
  except (TypeError, ValueError):  # of some built-in functions
    return ""
  if len(parameters) < 3:
    return ""
  third, empty = parameters[2], inspect.Parameter.empty
  variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
  required = third.default is empty and third.kind not in variable
  by_keyword = third.kind is inspect.Parameter.KEYWORD_ONLY
  if required and third.name != "key" and not by_keyword:
    raise ValueError(
      f"the third parameter of a loss is the key of random numbers, and here it is {third.name}: "
      "name it key, or fill it in with functools.partial"
    )
  filled_in = loss_fn.keywords if isinstance(loss_fn, partial) else {}
  for parameter in parameters[2:]:
    if parameter.name == "key":
      return "always" if parameter.default is empty else "if there is one"
    if parameter.name in _OTHER_KEYS and parameter.name not in filled_in:
      raise ValueError(
        "a loss is given its key of random numbers as key, and here "
        f"{parameter.name} would never be given one: name it key, or fill it in with "
        "functools.partial"
      )
  return ""


def _metrics(metrics: Any) -> dict[str, jax.Array]:
  if (
    not isinstance(metrics, dict) or "losses" in metrics or not all(map(_is_real, metrics.values()))
  ):
    raise ValueError(
      "beside its value, a loss may return a dict of real arrays by name, which is not 'losses', "
      f"not {metrics!r:.80}"
    )
  return {
    name: jnp.asarray(leaf, jnp.result_type(leaf, jnp.float32)) for name, leaf in metrics.items()
  }


def _is_real(leaf: Any) -> bool:
  if not isinstance(leaf, jax.Array | np.ndarray | np.generic | int | float):
    return False
  dtype = leaf.dtype if hasattr(leaf, "dtype") else np.dtype(type(leaf))
  return any(jnp.issubdtype(dtype, kind) for kind in (jnp.bool_, jnp.integer, jnp.floating))


def finite_vector(weights: Any) -> jax.Array | np.ndarray:
  """Returns the weights of `combine` as an array, if they are a vector of finite real numbers.

  The values of traced weights, as in a `sweep`, are not known and not checked.
  """
  try:
    traced = isinstance(weights, jax.core.Tracer)
    vector = weights if traced else np.asarray(weights)
    real = vector.dtype != bool and not jnp.issubdtype(vector.dtype, jnp.complexfloating)
    if real and vector.ndim == 1 and vector.size and (traced or _representable(vector)):
      return vector
  except (TypeError, ValueError):  # not numbers, or a ragged list of lists
    pass
  raise ValueError(
    f"weights must be a vector of finite numbers, not {weights!r:.80}: give one for each loss "
    "(combine) or for each inner step (multi_step)"
  )


def _representable(vector: np.ndarray) -> bool:
  """Whether JAX can hold the numbers: floats finite, and integers unchanged."""
  with np.errstate(over="ignore"):
    stored = vector.astype(jax.dtypes.canonicalize_dtype(vector.dtype))
  if np.issubdtype(vector.dtype, np.integer):
    return bool(np.array_equal(stored, vector))
  return bool(np.isfinite(stored).all())


def without_keys(state: Any) -> None:
  """Checks that a state, which every task starts with afresh, holds no key of random numbers."""
  if any(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in jax.tree.leaves(state)):
    raise ValueError(
      "a fresh inner optimizer would draw the same random numbers for every task: hand its state "
      "from task to task with metajax.carried(optimizer)"
    )


def no_raw_gradients(
  loop: Literal["inner", "outer"], optimizer: optax.GradientTransformation, params: Params
) -> None:
  """Checks that the optimizer does not return a gradient as it is, which would be added.

  `optax.masked` does so with the parameters that it leaves out.
  """
  like = _abstract(params)

  def update(grads: Params, params: Params) -> Params:
    return _update(optimizer, grads, optimizer.init(params), params)[0]

  program = jax.make_jaxpr(update)(like, like).jaxpr
  paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(like)]
  for path, given, returned in zip(paths, program.invars, program.outvars, strict=False):
    if given is returned:
      name = leaf_name(path) or "the parameter"
      raise ValueError(
        f"this {loop} optimizer adds the gradient of {name} to it: optax.masked passes on what it "
        "leaves out, so use metajax.variants.only to leave parameters as they are"
      )


def moves_everything(optimizer: optax.GradientTransformation, params: Params) -> None:
  """Checks that one of the first two updates changes every parameter, for gradients of 1.

  Rates that are traced count as 1.
  """
  like = _abstract(params)

  def moved() -> Params:
    ones = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), like)
    first, state = _update(optimizer, ones, optimizer.init(ones), ones)
    second, _ = _update(optimizer, ones, state, ones)  # a rate may begin at 0
    return jax.tree.map(lambda a, b: jnp.any((a != 0) | (b != 0)), first, second)

  with jax.ensure_compile_time_eval():
    flat = jax.jit(_traced_as_ones(jax.make_jaxpr(moved)()))()
    for (path, _), changes in zip(jax.tree_util.tree_leaves_with_path(like), flat, strict=True):
      if not bool(changes):
        raise ValueError(
          "imaml solves for all parameters, and this inner optimizer leaves "
          f"{leaf_name(path)} as it is: use maml, or an optimizer that moves everything"
        )


def _traced_as_ones(program: jax.extend.core.ClosedJaxpr) -> Callable[..., list[jax.Array]]:
  """The program as a function of flat arguments, with ones for the traced values it closes over."""
  known = [
    jnp.ones(jnp.shape(const), const.dtype) if isinstance(const, jax.core.Tracer) else const
    for const in program.consts
  ]
  return with_constants(program, known)


def twice_differentiable(optimizer: optax.GradientTransformation, params: Params) -> None:
  """Checks that the optimizer's update has a finite derivative where entries of a gradient are 0.

  It differentiates one update as MAML does, in reverse mode and with the shapes of the parameters,
  for a fresh state and for the state after a step. Rates that are traced count as 1. Optimizers
  that fail only where a whole parameter has no gradient, such as muon, pass.
  """
  like = _abstract(params)
  filled = lambda value: jax.tree.map(lambda leaf: jnp.full(leaf.shape, value, leaf.dtype), like)

  def slopes(grads: Params) -> list[Params]:
    ones, states = filled(1.0), [optimizer.init(filled(1.0))]
    states.append(_update(optimizer, ones, states[0], ones)[1])
    found = []
    for state in states:
      update = lambda g, state=state: _update(optimizer, g, state, ones)[0]
      _, pull_back = jax.vjp(update, grads)
      found.append(pull_back(ones)[0])
    return found

  with jax.ensure_compile_time_eval():
    try:
      program = jax.make_jaxpr(slopes)(filled(0.0))
    except ValueError as error:  # JAX's, such as for the while loop of a line search
      raise ValueError(
        f"maml cannot differentiate through this inner optimizer: use optax.sgd ({error})"
      ) from error
    flat = _traced_as_ones(program)
    # As dead units make them: every second entry is 0.
    leaves, first = [], 0
    for leaf in jax.tree.leaves(filled(1.0)):
      entries = jnp.arange(first, first + leaf.size) % 2
      leaves.append(leaf * entries.reshape(leaf.shape).astype(leaf.dtype))
      first += leaf.size
    finite = all(bool(jnp.isfinite(slope).all()) for slope in jax.jit(flat)(*leaves))
  if not finite:
    adam = "ScaleByAdamState" in str(jax.tree.structure(jax.eval_shape(optimizer.init, like)))
    advice = "give its Adam an eps_root > 0 (say 1e-8)" if adam else "choose another one"
    raise ValueError(
      "maml needs an inner optimizer whose update has a finite derivative where entries of a "
      f"gradient are zero, and here it is NaN: {advice}, or use optax.sgd"
    )
