import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import metajax
from tests import oracle, problems

LOSS = problems.softmax_loss()
RATE = 0.05


def estimate(meta_gradient, params, episode, state=None):
  state = meta_gradient.init(params) if state is None else state
  return jax.jit(meta_gradient.estimate)(params, state, episode)


def close(actual, expected, rtol=1e-10):
  np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=rtol, atol=1e-12)


# Identities


@pytest.mark.parametrize(
  "optimizer", [optax.sgd(RATE), metajax.carried(optax.adam(0.01, b1=0.0))], ids=["sgd", "adam"]
)
def test_reptile_is_the_sum_of_the_updates(x64, optimizer):
  params, episode = problems.weights(), problems.episode(1, k=4)
  displacement, state, info = estimate(metajax.reptile(LOSS, optimizer), params, episode)
  combined, combined_state, combined_info = estimate(
    metajax.combine(LOSS, optimizer, np.ones(4), of_updates=True), params, episode
  )
  close(combined, displacement)
  jax.tree.map(close, combined_state, state)
  close(combined_info.losses, info.losses)
  assert info.losses.shape == (4,)


def test_reptile_through_sgd_divided_by_its_rate_is_the_sum_of_the_gradients(x64):
  params, episode = problems.weights(), problems.episode(2, k=3)
  sgd = optax.sgd(RATE)
  divided, _, _ = estimate(metajax.reptile(LOSS, sgd, stepsize=RATE), params, episode)
  summed, _, _ = estimate(metajax.combine(LOSS, sgd, [1, 1, 1]), params, episode)
  close(divided, summed)


@pytest.mark.parametrize("tail", [None, 5], ids=["tail of b", "tail of 5"])
def test_the_last_gradient_alone_is_fomaml(x64, tail):
  params, episode = problems.weights(), problems.episode(3, k=4, tail=tail)
  adam = optax.adam(0.01, b1=0.0)
  last, _, _ = estimate(metajax.combine(LOSS, adam, [0, 0, 0, 1]), params, episode)
  first_order, _, info = estimate(metajax.fomaml(LOSS, adam), params, episode)
  close(last, first_order)
  assert info.losses.shape == (4,)


@pytest.mark.parametrize("inner", [optax.sgd(RATE), optax.sgd(RATE, momentum=0.9)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_parameters_may_be_narrower_than_the_loss(x64, dtype, inner):
  """The loss is float64; each parameter's gradient has the dtype of the parameter."""
  params, episode = problems.weights().astype(dtype), problems.episode(8, k=3)
  loss = lambda params, batch: LOSS(params.astype(jnp.float64), batch)
  mixed, reverse = (
    estimate(metajax.maml(loss, inner, mixed_mode=mode), params, episode)[0]
    for mode in (True, False)
  )
  assert mixed.dtype == dtype
  eps = float(jnp.finfo(dtype).eps)
  np.testing.assert_allclose(*(np.asarray(g, float) for g in (mixed, reverse)), rtol=8 * eps)


def test_one_step_makes_all_of_them_the_plain_gradient(x64):
  params, episode = problems.weights(), problems.episode(4, k=1)
  sgd = optax.sgd(RATE)
  plain = jax.grad(LOSS)(params, episode.tail)
  for meta_gradient in (
    metajax.reptile(LOSS, sgd, stepsize=RATE),
    metajax.fomaml(LOSS, sgd),
    metajax.maml(LOSS, sgd),
    metajax.combine(LOSS, sgd, [1.0]),
  ):
    close(estimate(meta_gradient, params, episode)[0], plain)


@pytest.mark.parametrize(
  "optimizer",
  [optax.sgd(RATE, momentum=0.9), optax.adam(0.02, b1=0.0, eps_root=1e-8)],
  ids=["momentum", "adam"],
)
@pytest.mark.parametrize("cost", ["remat", "mixed_mode", "both"])
def test_what_maml_keeps_changes_nothing(x64, cost, optimizer):
  params, episode = problems.weights(), problems.episode(5, k=5)
  kept, _, info = estimate(metajax.maml(LOSS, optimizer, mixed_mode=False), params, episode)
  less = metajax.maml(LOSS, optimizer, remat=cost != "mixed_mode", mixed_mode=cost != "remat")
  remade, _, again = estimate(less, params, episode)
  close(remade, kept)
  close(again.losses, info.losses)


@pytest.mark.parametrize("remat", [{}, {"remat": True}], ids=str)
def test_steps_are_recomputed_only_when_asked(remat):
  sgd, params, episode = optax.sgd(RATE), problems.weights(), problems.episode(5, k=3)
  start = metajax.LearnerState(params, sgd.init(params))
  for program in (
    jax.make_jaxpr(metajax.maml(LOSS, sgd, **remat).estimate)(params, (), episode),
    jax.make_jaxpr(
      lambda start: metajax.inner_update(LOSS, sgd, start, episode.pool, episode.schedule, **remat)
    )(start),
  ):
    assert ("remat" in str(program)) == bool(remat)


@pytest.mark.parametrize(
  "optimizer",
  [optax.adam(0.01, b1=0.0), optax.sgd(RATE, momentum=0.9), optax.sgd(lambda step: RATE / 2**step)],
  ids=["adam", "momentum", "schedule"],
)
def test_every_task_starts_from_a_fresh_optimizer_unless_it_is_carried(x64, optimizer):
  params = problems.weights()
  fresh = metajax.reptile(LOSS, optimizer)
  state = fresh.init(params)
  assert state == ()
  first, state, _ = estimate(fresh, params, problems.episode(6, k=3), state)
  again, state, _ = estimate(fresh, params, problems.episode(6, k=3), state)
  assert state == ()
  close(first, again)
  carried = metajax.reptile(LOSS, metajax.carried(optimizer))
  _, inner, _ = estimate(carried, params, problems.episode(6, k=3))
  later, _, _ = estimate(carried, params, problems.episode(6, k=3), inner)
  assert not np.allclose(later, first, rtol=1e-3)


def toward_the_start(rate, strength):
  """Descent on the loss plus strength / 2 ||phi_i - phi||^2; the state is phi itself."""

  def update(grads, start, params):
    pull = jax.tree.map(lambda g, p, s: g + strength * (p - s), grads, params, start)
    return jax.tree.map(lambda leaf: -rate * leaf, pull), start

  return optax.GradientTransformation(lambda params: params, update)


@pytest.mark.parametrize("mixed_mode", [False, True])
def test_maml_differentiates_through_what_a_fresh_state_takes_from_the_parameters(x64, mixed_mode):
  """By finite differences; a state that is carried is a constant, and gives another gradient."""
  params, episode = problems.weights(), problems.episode(18, k=4)
  proximal = toward_the_start(RATE, 2.0)
  maml = metajax.maml(LOSS, proximal, mixed_mode=mixed_mode)
  gradient, _, _ = estimate(maml, params, episode)
  direction = jnp.asarray(np.random.default_rng(0).normal(size=params.shape))
  last_loss = lambda params: maml.estimate(params, (), episode)[2].losses[-1]
  slope = (last_loss(params + 1e-6 * direction) - last_loss(params - 1e-6 * direction)) / 2e-6
  np.testing.assert_allclose(jnp.vdot(gradient, direction), slope, rtol=1e-6)
  constant, _, _ = estimate(metajax.maml(LOSS, metajax.carried(proximal)), params, episode)
  assert not np.allclose(constant, gradient, rtol=1e-2)


# Closed forms


@pytest.mark.parametrize("k", [1, 2, 5])
def test_maml_on_quadratics_is_the_product_of_the_contractions(x64, k):
  episode = problems.quadratic_episode(7, k)
  phi = start = np.array([1.0, -2.0, 0.5])
  product = np.eye(3)
  for matrix, centre in zip(episode.pool.inputs[:-1], episode.pool.targets[:-1], strict=True):
    phi = phi - RATE * matrix @ (phi - centre)
    product = product @ (np.eye(3) - RATE * matrix)
  expected = product @ (episode.pool.inputs[-1] @ (phi - episode.pool.targets[-1]))
  maml = metajax.maml(problems.quadratic_loss, optax.sgd(RATE))
  close(estimate(maml, jnp.asarray(start), episode)[0], expected)


@pytest.mark.parametrize("algorithm", ["maml", "fomaml", "reptile"])
def test_the_papers_expansions_are_of_second_order(x64, algorithm):
  """Equations 24, 26 and 27: what they leave out falls 100 times when alpha falls 10 times."""
  k, phi, episode = 4, problems.weights(), problems.episode(8, k=4)
  minibatches = problems.batches(episode)
  start = np.asarray(phi)
  gbar = [oracle.gradient(start, batch) for batch in minibatches]
  curve = lambda i, vector: oracle.hessian_vector(start, minibatches[i], vector)

  def residual(alpha):
    sgd = optax.sgd(alpha)
    after = lambda i: gbar[i] - alpha * curve(i, sum(gbar[:i], np.zeros_like(start)))
    if algorithm == "maml":
      expected = after(k - 1) - alpha * sum(curve(j, gbar[k - 1]) for j in range(k - 1))
      meta_gradient = metajax.maml(LOSS, sgd)
    elif algorithm == "fomaml":
      expected, meta_gradient = after(k - 1), metajax.fomaml(LOSS, sgd)
    else:
      expected = sum(after(i) for i in range(k))
      meta_gradient = metajax.reptile(LOSS, sgd, stepsize=alpha)
    return np.linalg.norm(estimate(meta_gradient, phi, episode)[0] - expected)

  assert 90 < residual(1e-3) / residual(1e-4) < 110


# The oracle, and finite differences

NUMPY_AND_OPTAX = {
  "sgd": (oracle.sgd(RATE), optax.sgd(RATE)),
  "adam": (oracle.adam(0.02), metajax.carried(optax.adam(0.02, b1=0.0))),
}


@pytest.mark.parametrize("optimizer", NUMPY_AND_OPTAX)
@pytest.mark.parametrize("algorithm", ["reptile", "fomaml"])
def test_first_order_agrees_with_plain_loops(x64, algorithm, optimizer):
  """Three tasks in a row, so that the carried state is compared too."""
  slow, fast = NUMPY_AND_OPTAX[optimizer]
  params = problems.weights()
  tasks = [problems.episode(seed, k=4, tail=5) for seed in (10, 11, 12)]
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *tasks)
  expected, state = oracle.serial(
    getattr(oracle, algorithm),
    np.asarray(params),
    slow[0](np.asarray(params)),
    [problems.batches(task) for task in tasks],
    slow,
  )
  meta_gradient = metajax.serial(3).lift(getattr(metajax, algorithm)(LOSS, fast))
  actual, inner, _ = estimate(meta_gradient, params, stacked)
  close(actual, expected)
  if optimizer == "adam":
    assert inner[0].count == state[0]
    close(inner[0].nu, state[1])


@pytest.mark.parametrize("k", [2, 6])
def test_maml_through_sgd_agrees_with_plain_loops(x64, k):
  params, episode = problems.weights(), problems.episode(13, k=k, tail=5)
  expected = oracle.maml_through_sgd(np.asarray(params), problems.batches(episode), RATE)
  close(estimate(metajax.maml(LOSS, optax.sgd(RATE)), params, episode)[0], expected)


def test_combinations_agree_with_plain_loops(x64):
  params, episode = problems.weights(), problems.episode(14, k=4)
  slow, fast = NUMPY_AND_OPTAX["adam"]
  weights = [0.5, -1.0, 2.0, 0.25]
  start = np.asarray(params)
  _, _, grads, updates = oracle.unroll(start, slow[0](start), problems.batches(episode), slow[1])
  of_gradients, _, _ = estimate(metajax.combine(LOSS, fast, weights), params, episode)
  close(of_gradients, sum(w * g for w, g in zip(weights, grads, strict=True)))
  of_updates, _, _ = estimate(
    metajax.combine(LOSS, fast, weights, of_updates=True), params, episode
  )
  close(of_updates, -sum(w * u for w, u in zip(weights, updates, strict=True)))


class OneBlock(nn.Module):
  """A block of the paper's network, and its last layer."""

  @nn.compact
  def __call__(self, images):
    patches = metajax.models.convolution("cpu")
    hidden = nn.Conv(4, (3, 3), strides=2, padding="SAME", conv_general_dilated=patches)(images)
    hidden = nn.relu(metajax.models.BatchStatsNorm()(hidden))
    return nn.Dense(3)(hidden.reshape(len(images), -1))


@pytest.mark.parametrize(
  "optimizer",
  [optax.sgd(0.02, momentum=0.9), optax.adam(0.02, b1=0.0, eps_root=1e-5)],
  ids=["momentum", "adam"],
)
def test_maml_of_a_convolutional_network_agrees_with_finite_differences(x64, optimizer):
  model = metajax.models.from_linen(OneBlock(), jnp.zeros((1, 8, 8, 1)))
  loss = metajax.losses.cross_entropy(model.apply, reduction="sum")
  rng = np.random.default_rng(0)
  pool = metajax.Examples(
    jnp.asarray(rng.normal(size=(6, 8, 8, 1))), jnp.asarray(rng.integers(0, 3, 6))
  )
  episode = metajax.Episode(pool, jnp.array([[0, 1, 2, 3], [2, 3, 4, 5]]), pool)
  params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), model.init(jax.random.key(0)))
  gradient, _, _ = estimate(metajax.maml(loss, optimizer), params, episode)

  direction = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), params)
  last_loss = lambda params: (
    metajax.reptile(loss, optimizer).estimate(params, (), episode)[2].losses[-1]
  )
  step = 1e-7
  moved = jax.jit(
    lambda size: last_loss(jax.tree.map(lambda p, d: p + size * d, params, direction))
  )
  ahead, behind = moved(step), moved(-step)
  slope = optax.tree.vdot(gradient, direction)
  np.testing.assert_allclose(slope, (ahead - behind) / (2 * step), rtol=1e-6)


# Contracts


def temporary_bytes(meta_gradient, k):
  params, episode = (
    problems.weights().astype(jnp.float32),
    problems.episode(15, k=k, n=64, batch_size=64),
  )
  compiled = (
    jax.jit(meta_gradient.estimate).lower(params, meta_gradient.init(params), episode).compile()
  )
  return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("algorithm", ["reptile", "fomaml", "combine"])
def test_first_order_memory_does_not_grow_with_k(algorithm):
  def bytes_at(k):
    weights = {"weights": np.ones(k)} if algorithm == "combine" else {}
    return temporary_bytes(getattr(metajax, algorithm)(LOSS, optax.sgd(RATE), **weights), k)

  assert bytes_at(40) - bytes_at(4) < 4 * 36 * 8  # losses and weights, at most two words a step


def test_mixed_mode_keeps_parameters_and_minibatches_and_no_activations():
  def growth(**options):
    few, many = (
      temporary_bytes(metajax.maml(LOSS, optax.sgd(RATE), **options), k) for k in (4, 40)
    )
    return (many - few) / 36

  parameters = 4 * problems.CLASSES * problems.FEATURES  # bytes
  minibatch = 64 * 4 * (problems.FEATURES + 1)
  logits = 64 * 4 * problems.CLASSES
  assert growth(mixed_mode=False) > parameters + minibatch + logits
  assert growth() < parameters + minibatch + 16


@pytest.mark.parametrize("algorithm", ["reptile", "fomaml", "maml"])
def test_the_loss_is_traced_as_often_for_any_k(algorithm):
  def traces(k):
    calls = []

    def loss(params, batch):
      calls.append(None)
      return LOSS(params, batch)

    meta_gradient = getattr(metajax, algorithm)(loss, optax.sgd(RATE))
    params, episode = problems.weights(), problems.episode(16, k=k)
    jax.jit(meta_gradient.estimate).lower(params, meta_gradient.init(params), episode)
    return len(calls)

  assert traces(3) == traces(30) <= 4


def test_maml_refuses_an_optimizer_without_a_second_derivative():
  params = problems.weights()
  with pytest.raises(ValueError, match="eps_root > 0"):
    metajax.maml(LOSS, optax.adam(0.01)).init(params)
  with pytest.raises(ValueError, match="eps_root > 0"):
    jax.jit(metajax.maml(LOSS, metajax.carried(optax.adam(0.01))).init)(params)
  metajax.maml(LOSS, optax.adam(0.01, eps_root=1e-8)).init(params)
  metajax.maml(LOSS, optax.sgd(0.01, momentum=0.9)).init(params)
  clipped = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.01))
  metajax.maml(LOSS, clipped).init({"w": jnp.zeros(1), "b": jnp.zeros(())})  # one number each


@pytest.mark.parametrize("lift", [lambda function: function, jax.jit], ids=["plain", "jit"])
def test_mixed_mode_refuses_derivatives_of_anything_but_the_parameters(x64, lift):
  """With respect to a weight of the inner loss, which it closes over, they would be 0."""
  params, episode = problems.weights(), problems.episode(18, k=3)

  def last_loss(weight, mixed_mode):
    inner = lambda params, batch: weight * LOSS(params, batch)
    gradient = metajax.maml(inner, optax.sgd(RATE), outer_loss=LOSS, mixed_mode=mixed_mode)
    return gradient.estimate(params, (), episode)[2].losses[-1]

  with pytest.raises(ValueError, match="what the loss closes over: use mixed_mode=False"):
    lift(jax.grad(lambda weight: last_loss(weight, True)))(1.0)
  slope = (last_loss(1.0 + 1e-6, True) - last_loss(1.0 - 1e-6, True)) / 2e-6
  close(lift(jax.grad(lambda weight: last_loss(weight, False)))(1.0), slope, rtol=1e-6)


@pytest.mark.parametrize("algorithm", ["reptile", "fomaml", "maml", "combine"])
def test_one_loss_without_jit(algorithm):
  """With k = 1 no step comes before the tail, and JAX refuses such a scan without jit."""
  loss, more = problems.softmax_loss(), ([1.0],) if algorithm == "combine" else ()
  gradient, params = getattr(metajax, algorithm)(loss, optax.sgd(0.1), *more), problems.weights()
  estimate = lambda: gradient.estimate(params, (), problems.episode(0, k=1))[0]
  with jax.disable_jit():
    found = estimate()
  np.testing.assert_allclose(found, jax.jit(estimate)(), rtol=1e-5, atol=1e-7)


def test_maml_through_adam_is_finite_where_a_gradient_is_zero():
  params, episode = problems.weights(), problems.episode(17, k=3)
  silent = episode._replace(
    pool=episode.pool._replace(inputs=episode.pool.inputs.at[:, 0].set(0.0))
  )
  unchecked = metajax.maml(LOSS, optax.adam(0.01, b1=0.0))
  without, _, _ = unchecked.estimate(params, (), silent)
  assert np.isnan(without).any()  # what the refusal above is for
  within, _, _ = estimate(
    metajax.maml(LOSS, optax.adam(0.01, b1=0.0, eps_root=1e-8)), params, silent
  )
  assert np.isfinite(within).all()


@pytest.mark.parametrize("weights", [[], [[1.0]], [1.0, np.nan]])
def test_combine_refuses_weights_that_are_no_vector(weights):
  with pytest.raises(ValueError, match="vector of finite numbers"):
    metajax.combine(LOSS, optax.sgd(RATE), weights)


def test_combine_refuses_the_wrong_number_of_weights():
  with pytest.raises(ValueError, match=r"2 weights for an episode of k = 3 losses: give 3"):
    estimate(
      metajax.combine(LOSS, optax.sgd(RATE), [1, 1]), problems.weights(), problems.episode(0, k=3)
    )


@pytest.mark.parametrize("stepsize", [0.0, -1.0, float("nan")])
def test_reptile_refuses_a_stepsize_that_is_not_positive(stepsize):
  with pytest.raises(ValueError, match="stepsize must be positive"):
    metajax.reptile(LOSS, optax.sgd(RATE), stepsize=stepsize)
