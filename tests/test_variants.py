"""The wider family, by its identities and by finite differences in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metajax
from metajax.variants import WithRates, meta_sgd, only, with_rates
from tests import problems

RATE = 0.05
HIDDEN = 3


def loss(params, batch):
  """A network of two layers; the head is the last."""
  logits = jnp.tanh(batch.inputs @ params["body"]["w"]) @ params["head"]["w"] + params["head"]["b"]
  return jnp.sum(optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch.targets))


def start():
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape))
  classes = problems.CLASSES
  return {
    "body": {"w": draw(problems.FEATURES, HIDDEN)},
    "head": {"w": draw(HIDDEN, classes), "b": draw(classes)},
  }


def estimate(gradient, params, episode):
  gradient.init(params)
  return jax.jit(gradient.estimate)(params, (), episode)[0]


def by_finite_differences(objective, params):
  """The gradient, by central differences in float64."""
  flat, unravel = jax.flatten_util.ravel_pytree(params)
  value = jax.jit(lambda flat: objective(unravel(flat)))
  h = 1e-6
  slopes = [
    (value(flat.at[i].add(h)) - value(flat.at[i].add(-h))) / (2 * h) for i in range(flat.size)
  ]
  return unravel(jnp.stack(slopes))


def adapted(params, episode, moves):
  """Plain inner steps in which only the parts named in `moves` take part."""
  for rows in np.asarray(episode.schedule):
    batch = jax.tree.map(lambda leaf, rows=rows: leaf[rows], episode.pool)
    grads = jax.grad(loss)(params, batch)
    params = {
      part: jax.tree.map(lambda p, g: p - RATE * g, params[part], grads[part])
      if part in moves
      else params[part]
      for part in params
    }
  return params


@pytest.mark.parametrize(("name", "part"), [("anil", "head"), ("boil", "body")])
def test_anil_and_boil_adapt_a_part_and_learn_the_whole(x64, name, part):
  params, episode = start(), problems.episode(1, k=4, tail=6)
  inner = only(optax.sgd(RATE), lambda path: path.startswith(part))
  found = estimate(metajax.maml(loss, inner), params, episode)
  objective = lambda params: loss(adapted(params, episode, {part}), episode.tail)
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
  jax.tree.map(close, found, by_finite_differences(objective, params))
  assert all(np.any(np.asarray(leaf) != 0) for leaf in jax.tree.leaves(found))


def test_momentum_of_what_is_not_adapted_does_not_matter(x64):
  params, episode = start(), problems.episode(2, k=4)
  inner = only(optax.sgd(RATE, momentum=0.9), lambda path: path.startswith("head"))
  gradient = metajax.reptile(loss, inner)
  moved = estimate(gradient, params, episode)
  assert not np.any(np.asarray(moved["body"]["w"])) and np.any(np.asarray(moved["head"]["w"]))


def test_a_masked_optimizer_that_adds_raw_gradients_is_refused():
  params = start()
  masked = optax.masked(optax.sgd(RATE), {"body": False, "head": True})
  for make in (metajax.maml, metajax.fomaml, metajax.reptile):
    with pytest.raises(ValueError, match=r"adds the gradient of body/w to it.*variants\.only"):
      make(loss, masked).init(params)
  frozen = optax.chain(
    optax.sgd(RATE), optax.masked(optax.set_to_zero(), {"body": True, "head": False})
  )
  metajax.maml(loss, frozen).init(params)
  with pytest.raises(ValueError, match="no parameter would be adapted: choose some of body/w, he"):
    metajax.maml(loss, only(optax.sgd(RATE), lambda name: "tail" in name)).init(params)


def test_meta_sgd_learns_parameters_and_rates(x64):
  params, episode = start(), problems.episode(3, k=4, tail=6)
  rng = np.random.default_rng(1)
  rates = jax.tree.map(lambda leaf: jnp.asarray(rng.uniform(0.01, 0.1, leaf.shape)), params)
  found = estimate(meta_sgd(loss), WithRates(params, rates), episode)

  def objective(both):
    params, rates = both
    for rows in np.asarray(episode.schedule):
      batch = jax.tree.map(lambda leaf, rows=rows: leaf[rows], episode.pool)
      params = jax.tree.map(lambda p, a, g: p - a * g, params, rates, jax.grad(loss)(params, batch))
    return loss(params, episode.tail)

  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
  jax.tree.map(close, found, by_finite_differences(objective, WithRates(params, rates)))


def test_meta_sgd_with_equal_rates_is_maml_and_shared_rates_add_up(x64):
  params, episode = start(), problems.episode(4, k=3)
  plain = estimate(metajax.maml(loss, optax.sgd(RATE)), params, episode)
  each = estimate(meta_sgd(loss), with_rates(params, RATE), episode)
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)
  jax.tree.map(close, each.params, plain)
  shared = WithRates(params, jax.tree.map(lambda leaf: jnp.float64(RATE), params))
  found = estimate(meta_sgd(loss, mixed_mode=False), shared, episode)
  jax.tree.map(close, found.params, plain)
  jax.tree.map(lambda one, many: close(one, jnp.sum(many)), found.rates, each.rates)


def test_rates_improve_on_those_to_begin_with():
  params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), start())
  task = metajax.Task(problems.examples(0, 9), problems.examples(1, 9))
  task = jax.tree.map(lambda leaf: leaf.astype(jnp.float32) if leaf.dtype == float else leaf, task)
  learner = metajax.meta_learner(meta_sgd(loss), optax.adam(0.01), metajax.vmapped(2))
  make_episode = metajax.separate_tail(metajax.cycling(3, 9))
  many_steps = jax.jit(metajax.run(learner, lambda key: task, make_episode, 60))
  state, infos = many_steps(learner.init(with_rates(params, RATE)), jax.random.key(0))
  assert infos.losses[-1, -1] < 0.7 * infos.losses[0, -1]
  moved = jax.tree.map(lambda rate: bool(np.any(np.abs(rate - RATE) > 0.01)), state.params.rates)
  assert all(jax.tree.leaves(moved))
