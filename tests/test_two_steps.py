"""Two meta-steps of algorithms with every kind of inner optimizer and execution, against NumPy.

Compared are the parameters, the outer state, what is carried, and the logged losses. The plain
loops share no code with the library; MAML's gradient is that of finite differences.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metajax
from tests import oracle, problems

NUM_TASKS, K, WEIGHTS = 3, 3, (0.5, -1.0, 2.0)
RATE, DECAY = 0.02, 0.9
LOSS = problems.softmax_loss()


def falling(count):
  """The schedule's rate at a step: RATE at first, falling to half of it over 4 steps."""
  return RATE * (1 - 0.5 * np.minimum(count, 4) / 4)


# Inner optimizers in NumPy: a state by the names that optax gives its parts, and an update.


def sgd(state, gradient):
  return state, -RATE * gradient


def momentum(state, gradient):
  trace = state["trace"] * DECAY + gradient
  return {"trace": trace}, -RATE * trace


def sign(state, gradient):
  return state, -RATE * np.sign(gradient)


def adam(state, gradient, beta1=0.0):
  count = state["count"] + 1
  mu = beta1 * state["mu"] + (1 - beta1) * gradient
  nu = 0.999 * state["nu"] + 0.001 * gradient**2
  scaled = mu / (1 - beta1**count) / np.sqrt(nu / (1 - 0.999**count) + 1e-6)
  return {"count": count, "mu": mu, "nu": nu}, -RATE * scaled


def adam_with_momentum(state, gradient):
  return adam(state, gradient, beta1=0.9)


def schedule(state, gradient):
  return {"count": state["count"] + 1}, -falling(state["count"]) * gradient


ZERO = np.zeros((problems.FEATURES, problems.CLASSES))
MOMENTS = {"count": 0, "mu": ZERO, "nu": ZERO}
OPTIMIZERS = {
  "sgd": ({}, sgd, optax.sgd(RATE)),
  "sign": ({}, sign, optax.sign_sgd(RATE)),
  "momentum": ({"trace": ZERO}, momentum, optax.sgd(RATE, momentum=DECAY)),
  "adam": (MOMENTS, adam, optax.adam(RATE, b1=0.0, eps=0.0, eps_root=1e-6)),
  "adam with momentum": (MOMENTS, adam_with_momentum, optax.adam(RATE, eps=0.0, eps_root=1e-6)),
  "schedule": ({"count": 0}, schedule, optax.sgd(optax.linear_schedule(RATE, RATE / 2, 4))),
}
ALGORITHMS = {
  "reptile": metajax.reptile,
  "fomaml": metajax.fomaml,
  "maml": metajax.maml,
  "combine": lambda loss, inner: metajax.combine(loss, inner, WEIGHTS),
}
# Outer optimizers, with the same functions.
OUTER_RATE = 0.5 / RATE
OUTERS = {
  "momentum": optax.sgd(0.5, momentum=DECAY),
  "adam": optax.chain(optax.adam(RATE, b1=0.0, eps=0.0, eps_root=1e-6), optax.scale(OUTER_RATE)),
  "schedule": optax.sgd(optax.linear_schedule(0.5, 0.25, 4)),
}
EXECUTIONS = {
  "vmapped": metajax.vmapped(NUM_TASKS),
  "chunked": metajax.vmapped(NUM_TASKS, chunk=2),
  "serial": metajax.serial(NUM_TASKS),
  "sharded": metajax.sharded(NUM_TASKS),
}


def unroll(phi, state, batches, update):
  """Losses, gradients and states of the steps, and where they lead."""
  losses, gradients, states = [], [], [state]
  for batch in batches:
    losses.append(oracle.loss(phi, batch))
    gradients.append(oracle.gradient(phi, batch))
    state, step = update(state, gradients[-1])
    states.append(state)
    phi = phi + step
  return losses, gradients, states, phi


def estimate(algorithm, phi, state, batches, update):
  """Gradient, the state that is handed on, and the losses of one task."""
  losses, gradients, states, adapted = unroll(phi, state, batches, update)
  if algorithm == "reptile":
    return phi - adapted, states[K], losses
  if algorithm == "combine":
    return sum(w * g for w, g in zip(WEIGHTS, gradients, strict=True)), states[K], losses
  if algorithm == "fomaml":
    return gradients[-1], states[K - 1], losses
  last = lambda phi: unroll(phi, state, batches, update)[0][-1]
  gradient, step = np.zeros_like(phi), 1e-5
  for entry in np.ndindex(phi.shape):
    change = np.zeros_like(phi)
    change[entry] = step
    gradient[entry] = (last(phi + change) - last(phi - change)) / (2 * step)
  return gradient, states[K - 1], losses


def plain_meta_steps(algorithm, optimizer, in_turn, carried, meta_batches, outer):
  """The meta-steps of the meta-batches, with an outer optimizer of rate 0.5."""
  start, update, _ = OPTIMIZERS[optimizer]
  phi, (outer_state, outer_update, _) = np.asarray(problems.weights()), OPTIMIZERS[outer]
  states, logged = [start] * NUM_TASKS, []
  for tasks in meta_batches:
    total, losses = np.zeros_like(phi), np.zeros(K)
    for place, batches in enumerate(tasks):
      place = 0 if in_turn else place
      gradient, after, of_task = estimate(
        algorithm, phi, states[place] if carried else start, batches, update
      )
      states[place] = after
      total, losses = total + gradient, losses + np.asarray(of_task)
    outer_state, step = outer_update(outer_state, total / NUM_TASKS)
    phi = phi + OUTER_RATE * step
    logged.append(losses / NUM_TASKS)
  return phi, outer_state, states, np.array(logged)


CASES = [
  *(
    (algorithm, optimizer, "vmapped", carried, "momentum")
    for algorithm in ALGORITHMS
    for optimizer in OPTIMIZERS
    for carried in ((False, True) if OPTIMIZERS[optimizer][0] else (False,))
  ),
  *(
    (algorithm, "adam", execution, True, "momentum")
    for algorithm in ALGORITHMS
    for execution in EXECUTIONS
    if execution != "vmapped"
  ),
  *(
    (algorithm, "sgd", "vmapped", False, outer)
    for algorithm in ("reptile", "maml")
    for outer in ("adam", "schedule")
  ),
]


@pytest.mark.parametrize(("algorithm", "optimizer", "execution", "carried", "outer"), CASES)
def test_two_meta_steps_are_those_of_plain_loops(
  x64, algorithm, optimizer, execution, carried, outer
):
  inner = OPTIMIZERS[optimizer][2]
  gradient = ALGORITHMS[algorithm](LOSS, metajax.carried(inner) if carried else inner)
  learner = metajax.meta_learner(gradient, OUTERS[outer], EXECUTIONS[execution])
  step, state, logged, meta_batches = (
    jax.jit(learner.step),
    learner.init(problems.weights()),
    [],
    [],
  )
  for meta_step in range(2):
    tasks = [problems.episode(10 * meta_step + task, k=K, tail=5) for task in range(NUM_TASKS)]
    meta_batches.append([problems.batches(task) for task in tasks])
    state, info = step(state, jax.tree.map(lambda *leaves: jnp.stack(leaves), *tasks))
    logged.append(info.losses)

  in_turn = execution == "serial"
  phi, outer_state, states, losses = plain_meta_steps(
    algorithm, optimizer, in_turn, carried, meta_batches, outer
  )
  close = lambda found, expected: np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
  close(state.params, phi)
  for name, expected in outer_state.items():
    close(optax.tree.get(state.outer, name), expected)
  close(np.stack(logged), losses)
  assert int(state.step) == 2
  if not carried:
    assert jax.tree.leaves(state.inner) == []
    return
  for name in OPTIMIZERS[optimizer][0]:
    found = np.asarray(optax.tree.get(state.inner, name))
    close(
      found if in_turn else found[:NUM_TASKS],
      states[0][name] if in_turn else [s[name] for s in states],
    )


def test_a_step_that_is_not_taken_cannot_spoil_a_gradient(x64):
  """It sees an example that would make its loss NaN."""
  episode = problems.episode(0, k=3, batch_size=2)
  rows = jnp.array([[0, 1], [2, 3]], jnp.int32)
  inputs = episode.pool.inputs.at[2].set(jnp.nan)
  episode = episode._replace(
    pool=episode.pool._replace(inputs=inputs), schedule=rows, steps=jnp.int32(1)
  )
  gradient = metajax.maml(LOSS, optax.sgd(RATE))
  found, _, info = jax.jit(gradient.estimate)(problems.weights(), (), episode)
  shorter = episode._replace(schedule=rows[:1], steps=None)
  np.testing.assert_allclose(
    found, jax.jit(gradient.estimate)(problems.weights(), (), shorter)[0], rtol=1e-9
  )
  assert np.all(np.isfinite(info.losses))


SHORTER = {
  "reptile": lambda steps: metajax.reptile,
  "fomaml": lambda steps: metajax.fomaml,
  "maml": lambda steps: metajax.maml,
  "combine": lambda steps: (
    lambda loss, inner: metajax.combine(loss, inner, [*WEIGHTS[:steps], WEIGHTS[-1]])
  ),
  "imaml": lambda steps: lambda loss, inner: metajax.variants.imaml(loss, inner, 0.5),
  "multi_step": lambda steps: (
    lambda loss, inner: metajax.variants.multi_step(
      loss, inner, [*WEIGHTS[: steps - 1], sum(WEIGHTS[steps - 1 : K - 1])]
    )
  ),
}


@pytest.mark.parametrize("optimizer", ["momentum", "adam with momentum", "schedule"])
@pytest.mark.parametrize("algorithm", SHORTER)
def test_steps_that_are_not_taken_are_those_of_a_shorter_loop(x64, algorithm, optimizer):
  """One task takes one step, one takes them all; loops of these lengths give the same."""
  inner = metajax.carried(OPTIMIZERS[optimizer][2])
  if algorithm == "imaml":
    inner = OPTIMIZERS[optimizer][2]
  whole = SHORTER[algorithm](K - 1)(LOSS, inner)
  tasks = [problems.episode(task, k=K, tail=5) for task in range(2)]
  several = jax.tree.map(lambda *leaves: jnp.stack(leaves), *tasks)._replace(
    steps=jnp.array([1, K - 1])
  )
  params = problems.weights()
  state = whole.init(params)
  together = jax.jit(jax.vmap(whole.estimate, in_axes=(None, None, 0)))
  found = together(params, state, several)
  for place, (task, steps) in enumerate(zip(tasks, [1, K - 1], strict=True)):
    shorter = SHORTER[algorithm](steps)(LOSS, inner)
    episode = task._replace(schedule=task.schedule[:steps])
    gradient, after, info = jax.jit(shorter.estimate)(params, state, episode)
    close = lambda a, b, place=place: np.testing.assert_allclose(a[place], b, rtol=1e-9, atol=1e-12)
    jax.tree.map(close, found[:2], (gradient, after))
    losses = found[2].losses[place]
    np.testing.assert_allclose(losses[:steps], info.losses[:steps], rtol=1e-9)
    np.testing.assert_allclose(losses[-1], info.losses[-1], rtol=1e-9)
