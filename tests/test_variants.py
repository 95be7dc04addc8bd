"""The wider family, by its identities and by finite differences in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metajax
from metajax.variants import (
  WithContext,
  WithRates,
  cavia,
  imaml,
  meta_sgd,
  multi_step,
  nearest_prototype,
  only,
  prototypical,
  switched,
  towards_start,
  with_rates,
)
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


def test_a_carried_optimizer_that_moves_a_part_is_carried():
  inner = metajax.variants.only(metajax.carried(optax.adam(0.1, b1=0.0)), lambda name: "b" in name)
  gradient = metajax.reptile(lambda params, batch: jnp.sum(params["b"]), inner)
  params = {"a": jnp.ones(2), "b": jnp.ones(3)}
  _, after, _ = gradient.estimate(params, gradient.init(params), problems.episode(0, k=3))
  assert int(optax.tree.get(after, "count")) == 3


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


@pytest.mark.filterwarnings("ignore:sample_task does not use its key")
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


def of_context(both, batch):
  """The network of `loss`, with a context that shifts the hidden units."""
  hidden = jnp.tanh(batch.inputs @ both.params["body"]["w"] + both.context)
  logits = hidden @ both.params["head"]["w"] + both.params["head"]["b"]
  return jnp.sum(optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch.targets))


def test_cavia_adapts_the_context_and_learns_the_rest(x64):
  params, episode = start(), problems.episode(5, k=4, tail=6)
  gradient = cavia(of_context, optax.sgd(RATE), jnp.zeros(HIDDEN))
  found = estimate(gradient, params, episode)

  def context_of(params):
    context = jnp.zeros(HIDDEN)
    for rows in np.asarray(episode.schedule):
      batch = jax.tree.map(lambda leaf, rows=rows: leaf[rows], episode.pool)
      slope = jax.grad(of_context)(WithContext(params, context), batch)
      context = context - RATE * slope.context
    return context

  objective = lambda params: of_context(WithContext(params, context_of(params)), episode.tail)
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
  jax.tree.map(close, found, by_finite_differences(objective, params))
  adapted = gradient.adapt(params, (), episode.pool, episode.schedule, None)
  jax.tree.map(np.testing.assert_array_equal, adapted.params, params)
  np.testing.assert_allclose(adapted.context, context_of(params), rtol=1e-9)
  for like in (jnp.ones(HIDDEN), jax.ShapeDtypeStruct((HIDDEN,), float)):  # it begins at zero
    again = estimate(cavia(of_context, optax.sgd(RATE), like), params, episode)
    jax.tree.map(np.testing.assert_array_equal, again, found)


def test_maml_differentiates_through_what_the_proximal_term_draws_to(x64):
  params, episode = start(), problems.episode(6, k=5, tail=6)
  inner = optax.chain(towards_start(0.8), optax.sgd(RATE))
  found = estimate(metajax.maml(loss, inner), params, episode)

  def objective(start):
    params = start
    for rows in np.asarray(episode.schedule):
      batch = jax.tree.map(lambda leaf, rows=rows: leaf[rows], episode.pool)
      grads = jax.grad(loss)(params, batch)
      params = jax.tree.map(lambda p, s, g: p - RATE * (g + 0.8 * (p - s)), params, start, grads)
    return loss(params, episode.tail)

  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
  jax.tree.map(close, found, by_finite_differences(objective, params))


def quadratic(params, batch):
  """1/2 (p - c)' A (p - c), with A the mean of the batch's inputs and c that of its targets."""
  matrix, centre = jnp.mean(batch.inputs, axis=0), jnp.mean(batch.targets, axis=0)
  return 0.5 * (params - centre) @ matrix @ (params - centre)


def quadratics(n, seed):
  rng = np.random.default_rng(seed)
  roots = rng.normal(size=(n, 4, 4))
  curvatures = roots @ roots.transpose(0, 2, 1) / 4 + np.eye(4)
  return metajax.Examples(jnp.asarray(curvatures), jnp.asarray(rng.normal(size=(n, 4))))


def test_imaml_is_exact_on_quadratics(x64):
  pool, tail = quadratics(5, 0), quadratics(3, 1)
  schedule = jnp.tile(jnp.arange(5, dtype=jnp.int32), (400, 1))  # the whole pool in each step
  episode = metajax.Episode(pool, schedule, tail)
  phi, strength = jnp.asarray(np.random.default_rng(2).normal(size=4)), 0.7
  gradient = imaml(quadratic, optax.sgd(0.1), strength, iterations=4)
  found, _, info = jax.jit(gradient.estimate)(phi, (), episode)
  mean = lambda examples: (np.mean(examples.inputs, axis=0), np.mean(examples.targets, axis=0))
  (matrix, centre), (of_tail, target) = mean(pool), mean(tail)
  inverse = np.linalg.inv(matrix + strength * np.eye(4))
  psi = inverse @ (matrix @ centre + strength * np.asarray(phi))
  np.testing.assert_allclose(found, strength * inverse @ of_tail @ (psi - target), rtol=1e-8)
  np.testing.assert_allclose(info.losses[-1], quadratic(jnp.asarray(psi), tail), rtol=1e-8)
  adapted = gradient.adapt(phi, (), pool, schedule, None)
  np.testing.assert_allclose(adapted, psi, rtol=1e-8)


def test_imaml_minimizes_the_losses_of_the_minibatches(x64):
  """A sum over minibatches that are smaller than the pool: the curvature is that of a minibatch."""
  one, tail = quadratics(1, 3), quadratics(3, 4)
  pool = jax.tree.map(lambda leaf: jnp.repeat(leaf, 6, axis=0), one)  # six equal examples
  total = lambda params, batch: len(batch.inputs) * quadratic(params, batch)
  schedule = jnp.tile(jnp.array([[0, 1], [2, 3], [4, 5]], jnp.int32), (200, 1))
  episode = metajax.Episode(pool, schedule, tail)
  phi, strength = jnp.asarray(np.random.default_rng(5).normal(size=4)), 0.7
  gradient = imaml(total, optax.sgd(0.05), strength, iterations=4)
  matrix, centre = 2 * np.asarray(one.inputs[0]), np.asarray(one.targets[0])
  of_tail = np.mean(tail.inputs, axis=0)
  inverse = np.linalg.inv(matrix + strength * np.eye(4))
  psi = inverse @ (matrix @ centre + strength * np.asarray(phi))
  expected = strength * inverse @ (3 * of_tail) @ (psi - np.mean(tail.targets, axis=0))
  found = jax.jit(gradient.estimate)(phi, (), episode)[0]
  np.testing.assert_allclose(found, expected, rtol=1e-7)
  shorter = jax.jit(gradient.estimate)(phi, (), episode._replace(steps=jnp.int32(450)))[0]
  np.testing.assert_allclose(shorter, expected, rtol=1e-6)


def test_imaml_has_the_mean_curvature_of_its_minibatches(x64):
  pool, tail = quadratics(6, 7), quadratics(3, 8)
  rows = jnp.array([[0, 1], [2, 3], [4, 5]], jnp.int32)
  phi, strength = jnp.ones(4), 0.7
  gradient = imaml(quadratic, optax.sgd(0.05), strength, iterations=4)
  found = jax.jit(gradient.estimate)(phi, (), metajax.Episode(pool, rows, tail))[0]
  psi = gradient.adapt(phi, (), pool, rows, None)
  system = np.eye(4) + np.mean(pool.inputs, axis=0) / strength
  expected = np.linalg.solve(system, jax.grad(quadratic)(psi, tail))
  np.testing.assert_allclose(found, expected, rtol=1e-4)


OUTER = {
  "meta_sgd": lambda **outer: (meta_sgd(loss, **outer), with_rates(start(), RATE)),
  "cavia": lambda **outer: (
    cavia(lambda both, batch: loss(both.params, batch), optax.sgd(RATE), 0.0, **outer),
    start(),
  ),
  "imaml": lambda **outer: (imaml(loss, optax.sgd(RATE), 2.0, **outer), start()),
  "multi_step": lambda **outer: (multi_step(loss, optax.sgd(RATE), [0.4, 0.6], **outer), start()),
}


@pytest.mark.parametrize("name", OUTER)
def test_another_loss_for_the_outer_step(x64, name):
  """One that is twice as large doubles the gradient, and leaves the inner steps as they are."""
  episode, found = problems.episode(4, k=3), []
  of_params = (lambda both, batch: loss(both.params, batch)) if name == "cavia" else loss
  for outer in ({}, {"outer_loss": lambda params, batch: 2 * of_params(params, batch)}):
    gradient, params = OUTER[name](**outer)
    found.append(jax.jit(gradient.estimate)(params, gradient.init(params), episode))
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9)
  jax.tree.map(lambda a, b: close(2 * a, b), found[0][0], found[1][0])
  before, after = found[0][2].losses, found[1][2].losses
  close(before[:-1], after[:-1])
  close(2 * before[-1], after[-1])


def test_imaml_of_convolutions_runs_several_tasks_at_once(x64):
  """Under vmap, the arrays of a gradient have their batch axes in different places."""

  def network(params, images):
    hidden = jax.lax.conv_general_dilated(
      images, params["kernel"], (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return jnp.tanh(hidden.reshape(len(images), -1)) @ params["head"]

  rng = np.random.default_rng(6)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape))
  params = {"kernel": draw(2, 2, 1, 2), "head": draw(8, 3)}
  examples = lambda n: metajax.Examples(draw(2, n, 4, 4, 1), jnp.tile(jnp.arange(n) % 3, (2, 1)))
  schedule = jnp.tile(jnp.arange(6, dtype=jnp.int32), (2, 3, 1))
  episodes = metajax.Episode(examples(6), schedule, examples(3))
  gradient = imaml(metajax.losses.cross_entropy(network, reduction="mean"), optax.sgd(0.1), 2.0)
  lifted = metajax.vmapped(2).lift(gradient)
  found, _, _ = jax.jit(lifted.estimate)(params, lifted.init(params), episodes)
  each = [
    jax.jit(gradient.estimate)(params, (), jax.tree.map(lambda leaf, i=i: leaf[i], episodes))[0]
    for i in range(2)
  ]
  mean = jax.tree.map(lambda a, b: (a + b) / 2, *each)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), found, mean)


def test_imaml_is_refused_what_it_cannot_do():
  params = start()
  with pytest.raises(ValueError, match="this inner optimizer leaves body/w as it is: use maml"):
    imaml(loss, only(optax.sgd(RATE), lambda name: "head" in name), 1.0).init(params)
  with pytest.raises(ValueError, match="begin anew in each task: give the optimizer without"):
    imaml(loss, metajax.carried(optax.sgd(RATE)), 1.0)
  imaml(loss, optax.adam(RATE), 1.0).init(params)
  imaml(loss, optax.sgd(optax.linear_schedule(0.0, RATE, 3)), 1.0).init(params)  # a warm-up
  with pytest.raises(ValueError, match="strength must be positive, not 0"):
    imaml(loss, optax.sgd(RATE), 0.0)


def temporary_bytes(gradient, k):
  params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), start())
  episode = problems.episode(0, k=k)
  return (
    jax.jit(gradient.estimate)
    .lower(params, (), episode)
    .compile()
    .memory_analysis()
    .temp_size_in_bytes
  )


def test_imaml_of_steps_that_diverge_is_nan():
  """Conjugate gradients that begin with NaN or infinity would return the zeros they start from."""
  params, episode = problems.weights(), problems.episode(0, k=3)
  gradient = imaml(problems.softmax_loss(), optax.sgd(1e38), 10.0)
  found, _, _ = jax.jit(gradient.estimate)(params, gradient.init(params), episode)
  assert np.isnan(found).all()
  skips = metajax.skip_nonfinite(gradient)
  _, _, info = jax.jit(skips.estimate)(params, skips.init(params), episode)
  assert float(info.skipped) == 1


def test_imaml_takes_a_strength_of_another_precision():
  params = problems.weights().astype(jnp.bfloat16)
  inner = optax.sgd(0.1, momentum=0.5)
  gradient = imaml(problems.softmax_loss(), inner, jnp.float32(2.0))
  found, _, _ = jax.jit(gradient.estimate)(params, gradient.init(params), problems.episode(0, k=3))
  assert found.dtype == jnp.bfloat16 and jnp.isfinite(found).all()


def test_imaml_needs_no_more_memory_for_more_steps():
  growth = lambda gradient: temporary_bytes(gradient, 200) - temporary_bytes(gradient, 20)
  assert growth(imaml(loss, optax.sgd(RATE), 1.0)) < 4_000  # the losses, and their schedule
  assert growth(metajax.maml(loss, optax.sgd(RATE))) > 4 * growth(imaml(loss, optax.sgd(RATE), 1.0))


def test_multi_step_losses(x64):
  params, episode = start(), problems.episode(7, k=4, tail=6)
  weights, schedule = np.array([0.2, 0.3, 0.5]), np.asarray(episode.schedule)
  for mixed_mode in (True, False):
    found = estimate(
      multi_step(loss, optax.sgd(RATE), weights, mixed_mode=mixed_mode), params, episode
    )

    def objective(params):
      part = lambda i: episode._replace(schedule=schedule[: i + 1])
      moves = {"body", "head"}
      return sum(
        w * loss(adapted(params, part(i), moves), episode.tail) for i, w in enumerate(weights)
      )

    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    jax.tree.map(close, found, by_finite_differences(objective, params))


def test_multi_step_losses_end_in_maml(x64):
  """The weights of MAML++ are annealed to those of the last step."""
  params, episode = start(), problems.episode(8, k=4)
  carried = metajax.carried(optax.adam(0.01, b1=0.0, eps_root=1e-6))
  gradients = multi_step(loss, carried, [0.0, 0.0, 1.0]), metajax.maml(loss, carried)
  found, expected = (
    jax.jit(gradient.estimate)(params, gradient.init(params), episode) for gradient in gradients
  )
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
  jax.tree.map(close, found[:2], expected[:2])
  close(found[2].losses, expected[2].losses)
  with pytest.raises(ValueError, match="2 weights for 3 inner steps: give one for each"):
    multi_step(loss, optax.sgd(RATE), [1.0, 1.0]).estimate(params, (), episode)


def test_first_order_at_first_and_then_second_order():
  """Annealing from FOMAML to MAML: one learner goes on from the state of the other."""
  params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), start())
  learners = [
    metajax.meta_learner(make(loss, optax.sgd(RATE)), optax.adam(0.01), metajax.vmapped(2))
    for make in (metajax.fomaml, metajax.maml)
  ]
  episodes = problems.episodes(range(2), k=3)
  state = learners[0].init(params)
  for learner in learners:
    state, _ = jax.jit(learner.step)(state, episodes)
  between, _ = jax.jit(learners[0].step)(learners[0].init(params), episodes)
  gradient = learners[1].execution.lift(metajax.maml(loss, optax.sgd(RATE))).estimate
  found, _, _ = jax.jit(gradient)(between.params, between.inner, episodes)
  updates, _ = optax.adam(0.01).update(found, between.outer, between.params)
  expected = optax.apply_updates(between.params, updates)
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
  jax.tree.map(close, state.params, expected)

  with pytest.raises(ValueError, match="must log the same"):
    skips = metajax.skip_nonfinite(metajax.fomaml(loss, optax.sgd(RATE)))
    other = metajax.meta_learner(skips, optax.adam(0.01), metajax.vmapped(2))
    switched(other, learners[1], at=1).step(other.init(params), episodes)
  with pytest.raises(ValueError, match="must have the same state"):
    outer = metajax.meta_learner(
      metajax.maml(loss, optax.sgd(RATE)), optax.sgd(0.01), metajax.vmapped(2)
    )
    switched(outer, learners[1], at=1).init(params)
  with pytest.raises(ValueError, match="at must be a number of meta-steps, not -1"):
    switched(*learners, at=-1)
  learner = switched(*learners, at=1)
  both, step = learner.init(params), jax.jit(learner.step)
  for _ in range(2):
    both, _ = step(both, episodes)
  jax.tree.map(close, both, state)


def embed(params, inputs):
  return jnp.tanh(inputs @ params["body"]["w"])


def test_prototypical_networks(x64):
  params, episode = start(), problems.episode(9, k=4, tail=6)
  classes = problems.CLASSES
  found, _, info = jax.jit(prototypical(embed, classes).estimate)(params, (), episode)

  def by_hand(params):
    pool, tail = (np.asarray(part.targets) for part in (episode.pool, episode.tail))
    near, far = embed(params, episode.pool.inputs), embed(params, episode.tail.inputs)
    prototypes = [
      sum(near[i] for i in np.flatnonzero(pool == c)) / np.sum(pool == c) for c in range(classes)
    ]
    logits = jnp.stack([-jnp.sum((far - c) ** 2, axis=1) for c in prototypes], axis=1)
    log = logits - jax.scipy.special.logsumexp(logits, axis=1, keepdims=True)
    return -sum(log[i, label] for i, label in enumerate(tail)) / len(tail)

  np.testing.assert_allclose(info.losses, [by_hand(params)], rtol=1e-10)
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
  jax.tree.map(close, found["body"], by_finite_differences(by_hand, params)["body"])


def test_prototypical_networks_train_and_are_judged():
  params = {"body": {"w": jnp.asarray(start()["body"]["w"], jnp.float32)}}
  labels = np.arange(60) % 6
  inputs = np.random.default_rng(0).normal(size=(60, problems.FEATURES)) + labels[:, None]
  classes = metajax.data.from_arrays(inputs.astype(np.float32), labels)
  task = metajax.data.few_shot.sample_task(classes, ways=3, train_shots=2, test_shots=3)
  learner = metajax.meta_learner(prototypical(embed, 3), optax.adam(0.02), metajax.serial(2))
  make_episode = metajax.separate_tail(metajax.cycling(2, 3))
  many_steps = jax.jit(metajax.run(learner, task, make_episode, 60))
  before = learner.init(params)
  after, infos = many_steps(before, jax.random.key(0))
  assert infos.losses.shape == (60, 1)
  evaluate = metajax.evaluate(learner, metajax.cycling(1, 3), nearest_prototype(embed, 3))
  judge = metajax.judge(evaluate, task, metajax.losses.accuracy, tasks_per_call=50)
  scores = [judge(state, jax.random.key(1), 50).mean() for state in (before, after)]
  assert scores[1] > max(scores[0], 0.6)


def test_all_examples_are_embedded_together_and_an_absent_class_is_never_predicted():
  together = lambda params, inputs: inputs - jnp.mean(inputs, axis=0)
  rng = np.random.default_rng(0)
  train, test = rng.normal(size=(4, 3)), rng.normal(size=(5, 3))
  labels = np.array([0, 2, 0, 2])
  task = metajax.Task(metajax.Examples(train, labels), metajax.Examples(test, None))
  found = np.asarray(nearest_prototype(together, 4)(None, task))
  embedded = np.concatenate([train, test]) - np.concatenate([train, test]).mean(axis=0)
  for label in (0, 2):
    prototype = embedded[:4][labels == label].mean(axis=0)
    expected = -np.sum((embedded[4:] - prototype) ** 2, axis=1)
    np.testing.assert_allclose(found[:, label], expected, rtol=1e-5)
  assert np.all(np.isfinite(found)) and np.all(found[:, [1, 3]] < -1e30)
