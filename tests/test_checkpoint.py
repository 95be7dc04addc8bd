import errno
import gc
import re
import shutil
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metajax
from metajax.checkpoint import checkpoints
from tests import problems


def make():
  inner = metajax.carried(optax.adam(0.1, b1=0.0))
  gradient = metajax.reptile(problems.softmax_loss(), inner)
  learner = metajax.meta_learner(gradient, optax.adam(0.1), metajax.vmapped(2))
  return learner, learner.init(problems.weights())


LEARNER, START = make()


@pytest.fixture(scope="module")
def states():
  """The states after 1, 2, 3 and 4 meta-steps."""
  states, step = [START], jax.jit(LEARNER.step)
  for seed in range(4):
    states.append(step(states[-1], problems.episodes((seed, seed + 7), k=2))[0])
  return states[1:]


@pytest.fixture(scope="module")
def of_three(states, tmp_path_factory):
  """A folder with three checkpoints."""
  folder = tmp_path_factory.mktemp("run")
  saved = checkpoints(folder, keep=3)
  for state, score in zip(states[:3], (0.2, 0.3, 0.9), strict=True):
    saved.save(state, {"seconds": 1.0})
    saved.rate(int(state.step), score)
  saved.close()
  return folder


def restored(folder, method="restore", like=START, blank=True):
  """What is found, or the error's message."""
  saved = checkpoints(folder)
  try:
    return getattr(saved, method)(jax.tree.map(jnp.zeros_like, like) if blank else like)
  except ValueError as error:
    return str(error)
  finally:
    saved.close()


def equal(found, state):
  jax.tree.map(np.testing.assert_array_equal, found, state)


def test_runs_side_by_side_save_at_the_same_time(tmp_path, states):
  """Without a lock, one of two threads that start together waits for the other's signals."""
  together = threading.Barrier(4, timeout=120)  # if one fails, so do the others

  def run(number):
    saved = checkpoints(tmp_path / str(number), keep=1)
    for state in 3 * states:
      together.wait()
      saved.save(state._replace(step=state.step + number))
    saved.close()

  with ThreadPoolExecutor(4) as pool:
    list(pool.map(run, range(4)))
  for number in range(4):
    equal(restored(tmp_path / str(number)).state, states[-1]._replace(step=4 + number))


def test_the_newest_state_comes_back_whole_and_old_ones_go(tmp_path, states):
  saved = checkpoints(tmp_path / "run", keep=2)
  assert saved.restore(START) is None
  donating = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf * 0, state), donate_argnums=0)
  for state in states[:3]:
    copy = jax.tree.map(jnp.copy, state)
    saved.save(copy, {"seconds": 1.5})
    donating(copy)  # while it is being written
  saved.close()

  found = restored(tmp_path / "run")
  assert isinstance(found.state, metajax.MetaState) and found.state.step == 3
  equal(found.state, states[2])
  assert found.extra == {"seconds": 1.5}
  assert {path.name for path in (tmp_path / "run").iterdir()} == {"2", "3"}


def test_the_best_is_kept_however_old(tmp_path, states):
  saved = checkpoints(tmp_path, keep=1)
  for state, score in zip(states, (0.2, np.float32(0.9), 0.3, float("nan")), strict=True):
    saved.save(state)
    saved.rate(int(state.step), score)
  saved.close()
  assert {path.name for path in tmp_path.iterdir()} == {"2", "4", "scores.json"}
  equal(restored(tmp_path, "best").state, states[1])
  equal(restored(tmp_path).state, states[3])


def test_scores_are_of_the_checkpoints_that_are_there(tmp_path, states):
  with checkpoints(tmp_path, keep=1) as saved:
    for state, score in zip(states[:3], (0.2, 0.9, None), strict=True):
      saved.save(state)
      saved.rate(int(state.step), score)
  assert {path.name for path in tmp_path.iterdir()} == {"2", "3", "scores.json"}
  found = restored(tmp_path, "best")
  equal(found.state, states[1])
  assert found.rated and restored(tmp_path).rated
  shutil.rmtree(tmp_path / "2")
  shutil.rmtree(tmp_path / "3")
  with checkpoints(tmp_path) as saved:  # goes on from before what is lost
    for state in states[1:3]:
      saved.save(state)
  assert not restored(tmp_path).rated and restored(tmp_path, "best") is None
  (tmp_path / "scores.json").write_text("{")
  equal(restored(tmp_path).state, states[2])


def test_none_is_the_best_without_scores(tmp_path, states):
  saved = checkpoints(tmp_path)
  saved.save(states[0])
  saved.close()
  assert restored(tmp_path, "best") is None


def test_looking_changes_nothing_and_the_next_save_cleans_up(tmp_path, of_three, states):
  """Another process may be writing: what looks unfinished or damaged to one is not."""
  folder = tmp_path / "run"
  shutil.copytree(of_three, folder)
  (folder / "4.orbax-checkpoint-tmp-1").mkdir()
  before = sorted(folder.rglob("*"))
  equal(restored(folder).state, states[2])
  equal(restored(folder, "best").state, states[2])
  assert sorted(folder.rglob("*")) == before
  saved = checkpoints(folder, keep=3)
  saved.save(states[3])
  saved.close()
  assert {path.name for path in folder.iterdir()} == {"2", "3", "4", "scores.json"}


def test_random_keys_in_a_state_are_saved(tmp_path, states):
  noisy = START._replace(outer={"key": jax.random.key(7), "count": jnp.int32(3)})
  saved = checkpoints(tmp_path)
  saved.save(noisy)
  saved.close()
  found = restored(tmp_path, like=noisy, blank=False).state.outer
  assert found["count"] == 3
  np.testing.assert_array_equal(*map(jax.random.key_data, (found["key"], noisy.outer["key"])))


def test_added_places_have_random_keys_of_their_own(tmp_path):
  keys = lambda number: START._replace(inner=jax.random.split(jax.random.key(7), number))
  with checkpoints(tmp_path) as saved:
    saved.save(keys(2))
  found = jax.random.key_data(restored(tmp_path, like=keys(5), blank=False).state.inner)
  np.testing.assert_array_equal(found[:2], jax.random.key_data(keys(2).inner))
  assert len(np.unique(found, axis=0)) == 5
  found = jax.random.key_data(restored(tmp_path, like=keys(1), blank=False).state.inner)
  np.testing.assert_array_equal(found, jax.random.key_data(keys(2).inner)[:1])


@pytest.fixture
def failed_readings(monkeypatch):
  """A reading that failed leaves others under way, which complain that nobody waits for them."""
  monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: None)
  yield
  time.sleep(0.5)  # until those have ended too
  gc.collect()


def files_of(folder):
  return sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)


@pytest.mark.usefixtures("failed_readings")
@pytest.mark.parametrize("damage", ["truncated", "bit flipped", "emptied", "removed"])
def test_a_damaged_newest_checkpoint_is_noticed_and_the_one_before_used(
  damage, tmp_path, of_three, states
):
  """Each file in turn: the state is the right one, or the one before."""
  names = [path.relative_to(of_three / "3") for path in files_of(of_three / "3")]
  passed_over = 0
  for number, name in enumerate(names):
    folder = tmp_path / str(number)
    shutil.copytree(of_three, folder)
    file = folder / "3" / name
    content = bytearray(file.read_bytes())
    if damage == "bit flipped":
      content[len(content) // 2] ^= 1
      file.write_bytes(content)
    elif damage == "removed":
      file.unlink()
    else:
      file.write_bytes(content[: len(content) // 2 if damage == "truncated" else 0])
    with warnings.catch_warnings(record=True) as caught:
      warnings.simplefilter("always")
      found = restored(folder)
    equal(found.state, states[int(found.state.step) - 1])
    if found.state.step == 2:
      passed_over += 1
      said = [str(one.message) for one in caught if "is passed over" in str(one.message)]
      assert len(said) == 1 and "\n" not in said[0] and "checkpoint 3 of" in said[0]
    else:
      assert found.state.step == 3  # a file that the numbers do not come from
  assert passed_over >= 2


PASSING = [  # as the system raises them, and as TensorStore says the same
  OSError(errno.EMFILE, "Too many open files"),
  ValueError("RESOURCE_EXHAUSTED: Error opening x: Too many open files [os_error_code='24']"),
  ValueError("INTERNAL: Error reading x [os_error_code='5'] [source locations='...']"),
  MemoryError(),
]


@pytest.mark.parametrize("error", PASSING, ids=["system", "open", "read", "memory"])
def test_what_cannot_be_read_now_is_not_called_damaged(
  tmp_path, of_three, states, monkeypatch, error
):
  shutil.copytree(of_three, tmp_path / "run")

  def too_many(state):
    raise error

  with checkpoints(tmp_path / "run") as saved:
    with monkeypatch.context() as patched:
      patched.setattr(metajax.checkpoint, "_checksums", too_many)
      with pytest.raises(OSError, match=r"checkpoint 3 of .* cannot be read now .*try again"):
        saved.restore(START)
    saved.save(states[3])
  assert {"3", "4"} <= {path.name for path in (tmp_path / "run").iterdir()}


@pytest.mark.usefixtures("failed_readings")
def test_what_turns_out_to_be_damaged_after_a_save_is_replaced_by_the_next(tmp_path, states):
  with checkpoints(tmp_path) as saved:
    saved.save(states[0])
    saved.save(states[1])
    deadline = time.monotonic() + 30
    while not (tmp_path / "2").exists():  # it is written meanwhile
      assert time.monotonic() < deadline
      time.sleep(0.01)
    for file in files_of(tmp_path / "2"):
      file.write_bytes(b"")
    with pytest.warns(UserWarning, match="checkpoint 2 of .* is passed over"):
      equal(saved.restore(START).state, states[0])
    saved.save(states[1])
  equal(restored(tmp_path).state, states[1])


@pytest.mark.usefixtures("failed_readings")
def test_if_all_are_damaged_none_is_removed(tmp_path, of_three):
  shutil.copytree(of_three, tmp_path / "run")
  for file in files_of(tmp_path / "run"):
    file.write_bytes(b"")
  assert re.match("no checkpoint of .* can be restored", restored(tmp_path / "run"))
  assert {path.name for path in (tmp_path / "run").glob("?")} == {"1", "2", "3"}


@pytest.mark.usefixtures("failed_readings")
def test_a_state_of_another_shape_is_refused_and_nothing_removed(tmp_path, of_three):
  shutil.copytree(of_three, tmp_path / "run")
  other = START._replace(params=jnp.zeros(3))
  message = restored(tmp_path / "run", like=other)
  assert re.match("no checkpoint of .* can be restored", message) and "\n" not in message
  assert "its params is float32[4,3], and float32[3] is expected: restore it with" in message
  assert {path.name for path in (tmp_path / "run").glob("?")} == {"1", "2", "3"}


def test_at_least_one_is_kept(tmp_path):
  with pytest.raises(ValueError, match="keep must be at least 1"):
    checkpoints(tmp_path, keep=0)


def test_a_folder_is_not_made_before_something_is_saved(tmp_path, states):
  assert restored(tmp_path / "a" / "run") is None and not (tmp_path / "a").exists()
  with checkpoints(tmp_path / "a" / "run") as saved:
    saved.save(states[0])
  equal(restored(tmp_path / "a" / "run").state, states[0])


def test_a_step_is_saved_once(tmp_path, states):
  with checkpoints(tmp_path) as saved:
    saved.save(states[0])
    with pytest.raises(ValueError, match=r"there is a checkpoint of step 1 already in .*: choose"):
      saved.save(states[0])
  equal(restored(tmp_path).state, states[0])


def test_extra_may_hold_numpy_scalars_and_nothing_that_json_does_not(tmp_path, states):
  with checkpoints(tmp_path) as saved:
    saved.save(states[0], {"loss": np.float32(0.5), "count": np.int64(3)})
    with pytest.raises(ValueError, match="extra must be numbers, strings, lists and dicts"):
      saved.save(states[1], {"state": object()})
  assert restored(tmp_path).extra == {"loss": 0.5, "count": 3}


def test_leaving_a_with_statement_waits_until_all_is_written(tmp_path, states):
  with metajax.checkpoint.checkpoints(tmp_path) as saved:
    saved.save(states[0], {"seconds": 2.0})
  assert {path.name for path in tmp_path.iterdir()} == {"1"}
  equal(restored(tmp_path).state, states[0])


def test_a_file_in_place_of_the_folder_is_an_error_of_one_line(tmp_path, states):
  (tmp_path / "run").write_text("")
  line = r"a checkpoint could not be written in .*File exists"
  with pytest.raises(OSError, match=line), checkpoints(tmp_path / "run") as saved:
    saved.save(states[0])


def test_the_score_of_a_later_checkpoint_stays(tmp_path, states):
  with checkpoints(tmp_path, keep=3) as saved:
    saved.save(states[2])
    saved.rate(3, 0.9)
    saved.save(states[0])
    equal(saved.best(START).state, states[2])


def _shapes(state):
  return jax.eval_shape(lambda: state)


def test_a_state_may_be_described_by_its_shapes(of_three, states):
  with checkpoints(of_three) as saved:
    equal(saved.restore(_shapes(START)).state, states[2])


@pytest.mark.parametrize("given", [lambda state: state, _shapes, jax.device_get])
@pytest.mark.parametrize("before, after", [(1, 4), (4, 1), (4, 2)])
def test_a_state_goes_on_on_another_number_of_devices(tmp_path, before, after, given):
  """Of 3 tasks on 1, 2 and 4 devices: in 3, 4 and 4 places, one of which does not count."""
  inner = metajax.carried(optax.adam(0.1, b1=0.0))
  gradient = metajax.reptile(problems.softmax_loss(), inner)
  first, second = (problems.episodes((seed, seed + 7, seed + 8), k=2) for seed in (0, 1))

  def learner_on(devices):
    mesh = metajax.task_mesh(jax.devices()[:devices])
    learner = metajax.meta_learner(gradient, optax.sgd(1.0), metajax.sharded(3, mesh))
    return learner, metajax.programs.on_mesh(learner.init(problems.weights()), mesh)

  learner, state = learner_on(before)
  state, _ = jax.jit(learner.step)(state, first)
  with checkpoints(tmp_path) as saved:
    saved.save(state)
  expected, _ = jax.jit(learner.step)(state, second)

  learner, like = learner_on(after)
  found = restored(tmp_path, like=given(like), blank=False)
  places_of = lambda state: [np.asarray(leaf)[:3] for leaf in jax.tree.leaves(state.inner)]
  equal(places_of(found.state), places_of(state))
  for leaf, saved in zip(*map(jax.tree.leaves, (found.state.inner, state.inner)), strict=True):
    assert all(np.array_equal(added, saved[-1]) for added in leaf[len(saved) :])
  if given(like) is like:  # it is also where the learner needs it
    for there, leaf in zip(jax.tree.leaves(found.state), jax.tree.leaves(like), strict=True):
      assert there.sharding.is_equivalent_to(leaf.sharding, leaf.ndim)
    went_on, _ = jax.jit(learner.step)(found.state, second)
    close = lambda found, expected: np.testing.assert_allclose(found, expected, rtol=1e-5)
    jax.tree.map(close, went_on.params, expected.params)
    jax.tree.map(close, places_of(went_on), places_of(expected))


@pytest.mark.parametrize("inner", [START.inner, jnp.zeros(2, jnp.int32)])
def test_a_state_of_another_execution_is_refused(tmp_path, inner):
  with checkpoints(tmp_path) as saved:
    saved.save(START._replace(inner=inner))
  one = jax.tree.map(lambda leaf: leaf[0], inner)  # as `serial` has it
  message = restored(tmp_path, like=START._replace(inner=one))
  assert re.search(r"its inner\S* is \w+\[2.*\], .* and the execution that it was saved", message)


@pytest.mark.parametrize("failing", ["save", "wait_until_finished", "_write_scores"])
def test_a_full_disk_is_an_error_of_one_line(tmp_path, states, monkeypatch, failing):
  def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")

  manager = metajax.checkpoint.ocp.CheckpointManager
  monkeypatched = metajax.checkpoint if failing.startswith("_") else manager
  line = r"could not be written in .* before are whole: .*No space left"
  with pytest.raises(OSError, match=line), checkpoints(tmp_path) as saved:
    saved.save(states[0])
    monkeypatch.setattr(monkeypatched, failing, full)
    saved.rate(1, 0.5)
    saved.save(states[1])
