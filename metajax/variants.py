"""Further algorithms of the family, as compositions of meta-gradients and inner optimizers."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metajax import checks
from metajax.gradients import MetaGradient, maml
from metajax.types import Examples, LossFn, Params, PRNGKey


def only(
  optimizer: optax.GradientTransformation, adapted: Callable[[str], bool]
) -> optax.GradientTransformation:
  """An inner optimizer that moves some of the parameters and leaves the others as they are.

  With it, `maml` becomes ANIL (Raghu et al. 2020), which adapts the last layer only, and BOIL (Oh
  et al. 2021), which adapts everything else. All parameters are still meta-learned:

  >>> anil = metajax.maml(loss_fn, only(optax.sgd(0.1), lambda name: "Dense" in name))
  >>> boil = metajax.maml(loss_fn, only(optax.sgd(0.1), lambda name: "Dense" not in name))

  `optax.masked(optimizer, mask)` is not the same: it passes the gradient of the other parameters
  through, which would then be added to them.

  Args:
    optimizer: moves the adapted parameters.
    adapted: from the name of a parameter, such as `Dense_0/kernel`, to whether it is adapted.

  Raises:
    ValueError: when a state is made, if no parameter is adapted.
  """

  def labels(params: Params) -> Any:
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    chosen = jax.tree.map_with_path(lambda path, _: bool(adapted(name(path))), params)
    if not any(jax.tree.leaves(chosen)):
      names = ", ".join(name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params))
      raise ValueError(f"no parameter would be adapted: choose some of {names}")
    return chosen

  return optax.partition({True: optimizer, False: optax.set_to_zero()}, labels)


class WithRates(NamedTuple):
  """The parameters of a learner that also learns its inner rates.

  Attributes:
    params: phi.
    rates: alpha, a rate for each number in phi, or any array for a parameter that it broadcasts to.
  """

  params: Params
  rates: Any


def with_rates(params: Params, rate: float) -> WithRates:
  """Parameters with equal rates, one for each number, to begin Meta-SGD with."""
  return WithRates(params, jax.tree.map(lambda leaf: jnp.full_like(leaf, rate), params))


def meta_sgd(loss_fn: LossFn, *, outer_loss: LossFn | None = None, **options: bool) -> MetaGradient:
  """Meta-SGD (Li et al. 2017): MAML that also learns the rate of each parameter.

  The inner step is phi_{i+1} = phi_i - alpha * L_i'(phi_i), elementwise, and the meta-gradient is
  that of L_k(phi_k) with respect to both phi and alpha. Rates of another shape are shared: with
  scalars, one for each parameter of the network, these are the learned rates of Antoniou et al.
  (2019) for each layer.

  Args:
    loss_fn: as for `maml`, a function of phi.
    outer_loss: L_k, if it is another function than the loss of the inner steps.
    **options: of `maml`.

  Returns:
    An estimator of the gradient of `WithRates`. For its evaluations, `params.params` is what the
    network takes: `lambda params, inputs: model.apply(params.params, inputs)`.
  """

  def init(params: WithRates) -> tuple[()]:
    return ()

  def update(
    grads: WithRates, state: tuple[()], params: WithRates | None = None
  ) -> tuple[WithRates, tuple[()]]:
    if params is None:
      raise ValueError("the update needs the parameters, which hold the rates")
    steps = jax.tree.map(lambda rate, grad: -rate * grad, params.rates, grads.params)
    return WithRates(steps, jax.tree.map(jnp.zeros_like, params.rates)), state

  def of_params(loss_fn: LossFn) -> LossFn:
    checked = checks.loss(loss_fn)

    def loss(params: WithRates, batch: Examples, key: PRNGKey | None = None) -> Any:
      return checked(params.params, batch, key)

    return loss

  optimizer = optax.GradientTransformation(init, update)
  return maml(of_params(loss_fn), optimizer, outer_loss=of_params(outer_loss or loss_fn), **options)
