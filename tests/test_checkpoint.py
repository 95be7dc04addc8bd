import jax
import jax.numpy as jnp
import numpy as np
import optax

import metajax
from metajax.checkpoint import checkpoints
from tests import problems


def make():
  gradient = metajax.batched(metajax.reptile(problems.softmax_loss(), optax.adam(0.1, b1=0.0)), 2)
  learner = metajax.meta_learner(gradient, optax.adam(0.1))
  return learner, learner.init(problems.weights())


def test_the_newest_state_comes_back_whole_and_old_ones_go(tmp_path):
  learner, state = make()
  states = []
  saved = checkpoints(tmp_path / "run", keep=2)
  assert saved.restore(state) is None
  for seed in range(3):
    state, _ = learner.step(state, problems.episodes((seed, seed + 7), k=2))
    saved.save(state)
    states.append(jax.device_get(state))
  saved.close()

  again = checkpoints(tmp_path / "run")
  restored = again.restore(jax.tree.map(jnp.zeros_like, state))
  again.close()
  assert isinstance(restored, metajax.MetaState) and restored.step == 3
  jax.tree.map(np.testing.assert_array_equal, restored, states[-1])
  assert {path.name for path in (tmp_path / "run").iterdir()} == {"2", "3"}
