"""The library's own training loop, as a user's program calls it."""

import contextlib
import functools
import io
import itertools
import json
import os
import signal
import threading
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tqdm import tqdm

import metajax
from experiments import jobs
from metajax import programs, training
from metajax.checkpoint import checkpoints
from tests import problems

POOL = problems.examples(3, 40)
KEY = jax.random.key(5)
MAKE_EPISODE = metajax.shared_tail(metajax.cycling(3, 4))


def sample_task(key):
  rows = jax.random.permutation(key, 40)
  part = lambda rows: jax.tree.map(lambda leaf: leaf[rows], POOL)
  return metajax.Task(part(rows[:8]), part(rows[8:13]))


def learner_of(execution):
  inner = metajax.carried(optax.adam(0.05, b1=0.0))
  gradient = metajax.reptile(problems.softmax_loss(), inner)
  return metajax.meta_learner(gradient, optax.sgd(0.5), execution)


LEARNER = learner_of(metajax.vmapped(2))
START = LEARNER.init(problems.weights())


def train(learner=LEARNER, start=START, **options):
  options = {"num_steps": 7, "report_every": 3, "steps_per_call": 1, **options}
  return metajax.train(learner, sample_task, MAKE_EPISODE, start, KEY, **options)


def equal(found, expected):
  jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.fixture(scope="module")
def expected():
  """The states after 0 ... 7 meta-steps, and the losses of each, by single steps."""
  sample = LEARNER.execution.sample(sample_task, MAKE_EPISODE)
  step = jax.jit(lambda state: LEARNER.step(state, sample(jax.random.fold_in(KEY, state.step))))
  states, losses = [START], []
  for _ in range(7):
    state, info = step(states[-1])
    states.append(state)
    losses.append(np.asarray(info.losses))
  return states, np.array(losses)


def test_it_reports_the_states_and_the_mean_losses_between_reports(expected):
  states, losses = expected
  records = []
  last = train(report=records.append)
  assert [record.step for record in records] == [0, 3, 6, 7]
  assert last is records[-1] and not any(record.restored for record in records)
  assert records[0].losses == [] and records[0].seconds == 0 < last.seconds
  for before, record in itertools.pairwise(records):
    mean = losses[before.step : record.step].mean(axis=0)
    np.testing.assert_allclose(record.losses, mean, rtol=1e-6)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, record.state, states[record.step])
  equal(START.params, problems.weights())  # the caller's arrays are still there


def test_the_bar_shows_the_pace_of_training_alone():
  bars = []

  def progress(**options):
    bars.append(tqdm(**options, file=io.StringIO()))
    return bars[0]

  train(report=lambda record: time.sleep(0.5), progress=progress)  # after the start, three times
  assert time.time() - bars[0].start_t < 1.0
  assert "loss" in bars[0].postfix and "adapted" in bars[0].postfix


def test_what_was_interrupted_anywhere_ends_with_the_same_bits(tmp_path):
  whole = train(folder=tmp_path / "whole")
  for step in (2, 3):  # between two reports, and at one
    out, asked = tmp_path / str(step), iter([False] * step + [True])
    with pytest.raises(training.StoppedError, match=f"at meta-step {step}, which is saved in "):
      train(folder=out, should_stop=lambda asked=asked: next(asked))
    records = []
    resumed = train(folder=out, report=records.append)
    assert records[0].restored and records[0].step == step
    equal(resumed.state, whole.state)
    np.testing.assert_allclose(resumed.losses, whole.losses, rtol=1e-12)
  again = train(folder=tmp_path / "whole")
  assert again.restored and again.step == 7 and again.seconds > 0 and again.losses == whole.losses
  equal(again.state, whole.state)


def test_what_is_interrupted_in_compiling_is_saved(tmp_path, monkeypatch):
  """After three calls of two meta-steps, the last one needs another program, of one."""
  compiled, calls = training.compiled, []

  def interrupted(*arguments, **options):
    calls.append(arguments)
    if len(calls) == 2:
      raise KeyboardInterrupt
    return compiled(*arguments, **options)

  monkeypatch.setattr(training, "compiled", interrupted)
  with pytest.raises(KeyboardInterrupt):
    train(folder=tmp_path, report_every=7, steps_per_call=2)
  assert checkpoints(tmp_path).restore(START).state.step == 6


@pytest.mark.parametrize("step", [3, 7])
def test_what_is_interrupted_in_a_report_was_saved_before(step, tmp_path):
  reports, interrupted = [], []

  def report(record):
    reports.append((record.step, record.restored))
    if record.step == step and not interrupted:
      interrupted.append(record)
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    train(folder=tmp_path, report=report)
  reports.clear()
  train(folder=tmp_path, report=report)
  assert reports == [(step, True), *[(later, False) for later in (3, 6, 7) if later >= step]]


@pytest.fixture
def interruptible():
  """A shell has processes in the background ignore SIGINT."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


def test_what_is_interrupted_by_the_keyboard_is_saved(tmp_path, interruptible):
  """In a program's main thread, as in a notebook."""
  pressed = []

  def press(drawn):
    if not pressed and drawn is not None:
      pressed.append(os.kill(os.getpid(), signal.SIGINT))
      time.sleep(0.1)

  def sample(key):
    jax.debug.callback(press, key)
    return sample_task(key)

  assert threading.current_thread() is threading.main_thread()
  handler, options = signal.getsignal(signal.SIGINT), {"steps_per_call": 2, "report_every": 7}
  run = functools.partial(metajax.train, LEARNER, sample, MAKE_EPISODE, START, KEY, folder=tmp_path)
  with pytest.raises(KeyboardInterrupt):
    run(num_steps=7, **options)
  assert signal.getsignal(signal.SIGINT) is handler
  records = []
  run(num_steps=2, report=records.append)
  assert records[0].restored and records[0].step == 2


class InterruptedBar(tqdm):
  """As if Ctrl-C were pressed when the bar is updated for the third time."""

  updates = 0

  def update(self, n=1):
    self.updates += 1
    if self.updates == 3:
      raise KeyboardInterrupt
    super().update(n)


def test_what_is_interrupted_between_two_calls_is_saved(tmp_path):
  asked = []

  def interrupted():
    asked.append(None)
    if len(asked) == 3:
      raise KeyboardInterrupt

  options = {"report_every": 7, "steps_per_call": 2}
  for name, step, more in (
    ("before", 4, {"should_stop": interrupted}),
    ("after", 6, {"progress": InterruptedBar}),
  ):
    with pytest.raises(KeyboardInterrupt):
      train(folder=tmp_path / name, **options, **more)
    assert checkpoints(tmp_path / name).restore(START).state.step == step


def test_an_interrupt_within_a_call_by_a_handler_of_the_program_s_own(tmp_path, monkeypatch):
  """The memory of the state is in use then, so that it cannot be saved."""

  compiled, calls = training.compiled, []

  def interrupted(*arguments, **options):
    program = compiled(*arguments, **options)

    def call(state, key):
      calls.append(None)
      found = program(state, key)  # deletes the state that it was given
      if len(calls) == 2:
        raise KeyboardInterrupt
      return found

    return call

  monkeypatch.setattr(training, "compiled", interrupted)
  with pytest.raises(KeyboardInterrupt):
    train(folder=tmp_path)
  assert checkpoints(tmp_path).restore(START) is None


def test_a_run_goes_on_from_numbers_of_a_weak_type(tmp_path):
  """`jnp.array(0.1)` has one, and what a meta-step makes of it does not."""
  squares = lambda params, batch: jnp.mean((batch.inputs @ params["w"] - params["b"]) ** 2)
  inner = metajax.carried(optax.adam(0.1, b1=0.0))
  learner = metajax.meta_learner(
    metajax.reptile(squares, inner), optax.sgd(0.5), metajax.sharded(2)
  )
  start = learner.init({"w": problems.weights(), "b": jnp.array(0.1)})
  assert start.params["b"].weak_type
  whole = train(learner, start)
  train(learner, start, num_steps=3, folder=tmp_path)
  equal(train(learner, start, folder=tmp_path).state.params, whole.state.params)


def test_a_report_returns_a_number(tmp_path):
  with pytest.raises(ValueError, match="report must return a number or None, and not dict"):
    train(report=lambda record: {"accuracy": 0.5})
  with pytest.raises(ValueError, match="report must return a number or None, and not str"):
    train(report=lambda record: "0.5 or so")


def test_a_folder_that_cannot_be_made_is_refused_before_training(tmp_path):
  (tmp_path / "file").write_text("")
  reports = []
  for folder in (tmp_path / "file", tmp_path / "file" / "below"):
    with pytest.raises(
      OSError, match=r"checkpoints cannot be written to .*: choose another folder"
    ):
      train(folder=folder, report=lambda record: reports.append(record.step))
  assert not reports


def test_a_folder_may_be_below_home(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  train(folder="~/run", num_steps=2)
  assert (tmp_path / "run" / "2").is_dir()
  assert train(folder=tmp_path / "run", num_steps=2).restored


def test_parameters_are_not_a_state():
  with pytest.raises(ValueError, match="state must be of the type MetaState, not"):
    train(start=problems.weights())


def test_a_run_that_goes_on_from_another_state(tmp_path):
  late = START._replace(step=START.step + 5)
  with pytest.raises(ValueError, match="the state has 5 meta-steps already, and num_steps=4 is"):
    train(start=late, num_steps=4)
  with pytest.raises(training.StoppedError, match="at meta-step 5, which is saved in"):
    train(start=late, folder=tmp_path, should_stop=lambda: True)
  with checkpoints(tmp_path) as saved:
    assert int(saved.restore(START).state.step) == 5


@pytest.mark.parametrize("step", [0, 6, 7])
def test_a_report_that_stops_the_run_is_made_again(step, tmp_path):
  made = {name: [] for name in ("whole", "stopped")}

  def report(name, stop, record):
    if record.step == step and not record.restored and stop:
      raise training.StoppedError("in the middle of a report")
    if not record.restored:
      made[name].append((record.step, record.losses, record.state))
    return -abs(record.step - step)

  train(folder=tmp_path / "whole", report=functools.partial(report, "whole", False))
  kept = f", which is saved in {tmp_path}" if step else "$"
  with pytest.raises(training.StoppedError, match=f"^stopped at meta-step {step}{kept}"):
    train(folder=tmp_path / "stopped", report=functools.partial(report, "stopped", True))
  train(folder=tmp_path / "stopped", report=functools.partial(report, "stopped", False))
  train(folder=tmp_path / "stopped", report=functools.partial(report, "stopped", False))
  assert [number for number, *_ in made["whole"]] == [0, 3, 6, 7]
  equal(made["stopped"], made["whole"])
  for name in made:
    with checkpoints(tmp_path / name) as saved:
      assert int(saved.best(START).state.step) == max(step, 3)
      assert saved.restore(START).extra["seconds"] > 0


def test_another_run_is_not_taken_for_this_one(tmp_path, capsys):
  train(folder=tmp_path, num_steps=4)
  assert "going on" not in capsys.readouterr().out
  with pytest.raises(ValueError, match="holds a run with another key: go on as it began, or give"):
    metajax.train(
      LEARNER, sample_task, MAKE_EPISODE, START, jax.random.key(6), num_steps=4, folder=tmp_path
    )
  with pytest.raises(ValueError, match="holds a run with 4 meta-steps, more than num_steps=2"):
    train(folder=tmp_path, num_steps=2)
  train(folder=tmp_path, num_steps=4)
  said = capsys.readouterr().out
  assert f"going on from meta-step 4 of {tmp_path}, the last one: nothing is left to train" in said
  train(folder=tmp_path, num_steps=5)
  assert f"going on from meta-step 4 of {tmp_path}\n" in capsys.readouterr().out


def test_a_state_that_is_ahead_of_the_folder_is_not_dropped(tmp_path):
  train(folder=tmp_path, num_steps=2)
  ahead = train(num_steps=3).state
  with pytest.raises(ValueError, match="the state has 3 meta-steps, and training would go on from"):
    train(start=ahead, folder=tmp_path)
  assert train(start=ahead, folder=tmp_path / "other").step == 7


def test_another_algorithm_or_rate_in_a_folder_is_warned_of(tmp_path):
  inner, loss = metajax.carried(optax.adam(0.05, b1=0.0)), problems.softmax_loss()
  another = metajax.meta_learner(metajax.fomaml(loss, inner), optax.sgd(0.5), metajax.vmapped(2))
  faster = metajax.meta_learner(metajax.reptile(loss, inner), optax.sgd(0.6), metajax.vmapped(2))
  train(folder=tmp_path, num_steps=2)
  train(folder=tmp_path, num_steps=2, report_every=2, steps_per_call=2)  # without a warning
  for learner in (another, faster):
    with pytest.warns(UserWarning, match=f"computes something else than when {tmp_path} was"):
      train(learner, folder=tmp_path, num_steps=2)


def weighed(weights):
  gradient = metajax.combine(problems.softmax_loss(), optax.sgd(0.1), weights)
  return metajax.meta_learner(gradient, optax.sgd(0.5), metajax.vmapped(2))


def test_other_data_or_numbers_in_a_folder_are_warned_of(tmp_path, monkeypatch):
  """They are arrays that the program closes over, and not part of its text."""
  last_alike = ([1.0, 1.0, 1.0], [0.0, 0.0, 1.0])
  learners = [weighed(weights) for weights in last_alike]
  starts = [learner.init(problems.weights()) for learner in learners]
  train(learners[0], starts[0], folder=tmp_path, num_steps=2)
  train(learners[0], starts[0], folder=tmp_path, num_steps=2)  # without a warning
  with pytest.warns(UserWarning, match=f"the data is not what {tmp_path} was trained on, or"):
    train(learners[1], starts[1], folder=tmp_path, num_steps=2)
  plain = metajax.reptile(problems.softmax_loss(), optax.sgd(0.1))  # has no array of weights
  plain = metajax.meta_learner(plain, optax.sgd(0.5), metajax.vmapped(2))
  with pytest.warns(UserWarning, match="a meta-step computes something else than when"):
    train(plain, starts[0], folder=tmp_path, num_steps=2)
  inputs = POOL.inputs.at[7, 1].add(1e-3)
  monkeypatch.setattr(f"{__name__}.POOL", POOL._replace(inputs=inputs))
  with pytest.warns(UserWarning, match=f"the data is not what {tmp_path} was trained on, or"):
    train(learners[0], starts[0], folder=tmp_path, num_steps=2)


def test_a_loss_that_does_not_use_its_parameters_is_warned_of():
  module = problems.weights()
  loss = lambda params, batch: problems.softmax_loss()(module, batch)
  learner = metajax.meta_learner(
    metajax.maml(loss, optax.sgd(0.1)), optax.adam(1e-3), metajax.vmapped(2)
  )
  with pytest.warns(UserWarning, match="no parameter has changed from meta-step 0 to 3: see"):
    train(learner, learner.init(problems.weights()), num_steps=3)


def test_a_report_may_give_the_memory_of_its_state_away():
  give_away = lambda record: jax.tree.map(lambda leaf: leaf.delete(), record.state) and None
  assert train(report=give_away).step == 7


def test_all_tasks_that_were_skipped_are_counted_across_a_restart(tmp_path):
  bad = lambda params, batch: problems.softmax_loss()(params, batch) * jnp.nan
  gradient = metajax.skip_nonfinite(metajax.reptile(bad, optax.sgd(0.1)))
  learner = metajax.meta_learner(gradient, optax.sgd(0.5), metajax.vmapped(2))
  start, asked = learner.init(problems.weights()), iter([False, False, True])
  with pytest.raises(training.StoppedError):
    train(learner, start, folder=tmp_path, should_stop=lambda: next(asked))
  with pytest.warns(UserWarning, match="all tasks of meta-steps 1 to 3 were skipped"):
    train(learner, start, folder=tmp_path, num_steps=3)


def test_a_run_goes_on_with_another_number_of_devices(tmp_path):
  """Where no inner state is carried, of which there is one for each place."""
  gradient = metajax.reptile(problems.softmax_loss(), optax.sgd(0.05))
  mesh = lambda devices: metajax.task_mesh(jax.devices()[:devices])
  records, outer = [], optax.sgd(0.5, momentum=0.9)

  def go(devices, **options):
    learner = metajax.meta_learner(gradient, outer, metajax.sharded(3, mesh(devices)))
    return train(learner, learner.init(problems.weights()), **options)

  whole = go(4)
  go(4, folder=tmp_path, num_steps=3)
  resumed = go(2, folder=tmp_path, report=records.append)
  assert records[0].restored and records[0].step == 3
  np.testing.assert_allclose(resumed.state.params, whole.state.params, rtol=1e-5)


def test_jax_can_debug_what_is_compiled():
  mesh, traced = metajax.task_mesh(jax.devices()[:1]), []

  def double(x):
    traced.append(isinstance(x, jax.core.Tracer))
    return 2 * x

  with jax.disable_jit():
    assert programs.compiled(double, mesh, jnp.ones(()))(jnp.ones(())) == 2
  assert not any(traced)
  infinite = START._replace(params=jax.tree.map(lambda leaf: leaf * jnp.inf, START.params))
  with jax.debug_nans(True), pytest.raises(FloatingPointError):
    train(start=infinite)


def test_a_folder_of_a_loop_of_the_user_s_own_is_gone_on_with(tmp_path, expected):
  with checkpoints(tmp_path) as saved:
    saved.save(expected[0][2])
  records = []
  found = train(folder=tmp_path, num_steps=3, report=records.append).state
  assert records[0].restored and records[0].step == 2
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
  jax.tree.map(close, found, expected[0][3])


@pytest.mark.parametrize("execution", [metajax.vmapped(2), metajax.serial(2), metajax.sharded(2)])
def test_parameters_may_be_python_numbers(execution):
  loss = lambda params, batch: jnp.mean((batch.inputs @ params["w"] + params["b"]) ** 2)
  gradient = metajax.reptile(loss, optax.sgd(0.1))
  learner = metajax.meta_learner(gradient, optax.sgd(0.5), execution)
  weights = jnp.ones(POOL.inputs.shape[1])
  found, expected = (
    train(learner, learner.init({"w": weights, "b": b}), num_steps=2).state.params
    for b in (0.5, jnp.asarray(0.5))
  )
  equal(found, expected)
  episodes = learner.execution.sample(sample_task, MAKE_EPISODE)(KEY)
  learner.step(learner.init({"w": weights, "b": 0.5}), episodes)  # outside of jit


def test_the_state_with_the_highest_score_is_kept(tmp_path):
  scores = {0: 9.0, 1: 0.1, 2: 0.8, 3: 0.2, 4: 0.3, 5: 0.4, 6: 0.5, 7: 0.6}
  states = {}

  def report(record):
    states[record.step] = record.state
    return np.float32(scores[record.step])  # as a mean of accuracies is

  train(folder=tmp_path, report=report, report_every=1)
  with metajax.checkpoint.checkpoints(tmp_path) as saved:
    equal(saved.best(START).state, states[2])
    equal(saved.restore(START).state, states[7])


def test_all_executions_train_alike_and_data_need_not_be_placed():
  """The samplers close over arrays of one device; every execution finds them where it computes."""
  found = []
  for execution in (metajax.vmapped(3), metajax.sharded(3)):
    learner = learner_of(execution)
    found.append(train(learner, learner.init(problems.weights()), num_steps=2).state)
  np.testing.assert_allclose(found[0].params, found[1].params, rtol=1e-5)
  assert len(found[1].params.sharding.device_set) == len(jax.devices()) > 1


def test_divergence_names_the_meta_step_and_keeps_what_was_finite(tmp_path):
  def step(state, episodes):
    """Makes the parameters infinite in meta-step 5."""
    after, info = LEARNER.step(state, episodes)
    return after._replace(params=jnp.where(state.step == 4, jnp.inf, after.params)), info

  with pytest.raises(training.DivergedError, match=r"at meta-step 5, .*meta-step 3 is saved"):
    train(LEARNER._replace(step=step), folder=tmp_path)
  with metajax.checkpoint.checkpoints(tmp_path) as saved:
    assert saved.restore(START).state.step == 3
  with pytest.raises(training.DivergedError, match="nothing is saved"):
    train(LEARNER._replace(step=step))


def test_a_run_whose_first_loss_is_nan_is_told_to_look_at_its_data():
  """Labels of 3 classes for a network of 2 outputs; no rate would help."""
  gradient = metajax.reptile(problems.softmax_loss(), optax.sgd(0.1))
  learner = metajax.meta_learner(gradient, optax.sgd(0.5), metajax.vmapped(2))
  with pytest.raises(training.DivergedError, match=r"at meta-step 1, .* labels are from 0 to the"):
    train(learner, learner.init(problems.weights()[:, :2]))


@pytest.mark.parametrize("skip", [False, True])
def test_divergence_in_the_middle_of_a_call_is_found(skip):
  """Data that is not finite in meta-step 5, and parameters that are not from 5 on."""
  gradient = metajax.reptile(problems.softmax_loss(), optax.sgd(0.05))
  gradient = metajax.skip_nonfinite(gradient) if skip else gradient
  learner = metajax.meta_learner(gradient, optax.sgd(0.5), metajax.vmapped(2))

  def bad_data(state, episodes):
    inputs = jnp.where(state.step == 4, jnp.nan, episodes.pool.inputs)
    return learner.step(state, episodes._replace(pool=episodes.pool._replace(inputs=inputs)))

  def bad_step(state, episodes):
    after, info = learner.step(state, episodes)
    return after._replace(params=jnp.where(state.step == 4, jnp.inf, after.params)), info

  run = functools.partial(train, start=learner.init(problems.weights()), steps_per_call=7)
  with pytest.raises(training.DivergedError, match=r"at meta-step 5, .*finite: lower the inner or"):
    run(learner._replace(step=bad_step), report_every=7)
  if skip:  # a meta-step of which nothing is learned
    assert run(learner._replace(step=bad_data), report_every=7).skipped == pytest.approx(1 / 7)
  else:
    with pytest.raises(
      training.DivergedError, match=r"at meta-step 5, .* see that the inputs .*, or lower the inner"
    ):
      run(learner._replace(step=bad_data), report_every=7)


@pytest.mark.parametrize("name", ["num_steps", "report_every", "steps_per_call"])
def test_numbers_below_one_are_refused(name):
  with pytest.raises(ValueError, match=f"{name} must be at least 1, not 0"):
    train(**{name: 0})


def test_losses_are_added_in_double_precision():
  sums = training.Sums()
  for _ in range(3):
    sums = sums.add(metajax.Info(np.float32([[1.0, 2.0**-24]]), {"a": np.float32([[0.5]])}))
  assert sums.means() == {"losses": [1.0, 2.0**-24], "a": [0.5]}
  half = training.Sums().add(metajax.Info(np.float32([[1.0]]), skipped=np.float32([0.5])))
  assert half.means() == {"losses": [2.0]} and half.skipped == 0.5
  assert training.Sums(*json.loads(json.dumps(sums))).means() == sums.means()


def test_what_a_program_closes_over_is_an_argument_of_it():
  data = jnp.asarray(np.random.default_rng(0).normal(size=50_000))
  look_up = lambda state, rows: (state + 1, jax.lax.map(lambda row: data[row], rows))
  mesh = metajax.task_mesh()
  state, rows = programs.on_mesh((jnp.zeros(3), jnp.array([7, 1])), mesh)
  program = programs.compiled(look_up, mesh, state, rows, donate=True)
  assert program.func.memory_analysis().argument_size_in_bytes >= data.nbytes
  after, found = program(state, rows)
  assert state.is_deleted() and (after == 1).all()
  assert (found == data[jnp.array([7, 1])]).all()


@pytest.mark.parametrize("rate", [0.1, 1e-4])
@pytest.mark.parametrize("execution", [metajax.vmapped(2), metajax.serial(2), metajax.sharded(2)])
def test_steps_that_bfloat16_parameters_lose_are_warned_of(execution, rate, recwarn):
  gradient = metajax.reptile(problems.softmax_loss(), optax.sgd(rate))
  learner = metajax.meta_learner(gradient, optax.sgd(1.0), execution)
  start = learner.init(problems.weights().astype(jnp.bfloat16))
  record = train(learner, start, num_steps=1)
  said = [str(warning.message) for warning in recwarn]
  assert len(said) == (rate < 0.01) and all("rounding changes the direction" in one for one in said)
  assert record.state.params.dtype == jnp.bfloat16


def test_bfloat16_parameters_beside_a_key_that_is_carried(recwarn):
  noisy = optax.chain(optax.add_noise(0.01, 0.55, jax.random.key(3)), optax.sgd(0.1))
  gradient = metajax.reptile(problems.softmax_loss(), metajax.carried(noisy))
  learner = metajax.meta_learner(gradient, optax.sgd(1.0), metajax.vmapped(2))
  start = learner.init(problems.weights().astype(jnp.bfloat16))
  assert train(learner, start, num_steps=1).state.step == 1 and not recwarn.list


def test_bfloat16_parameters_that_go_on_or_begin_slowly_are_no_reason_to_warn(recwarn):
  gradient = metajax.reptile(problems.softmax_loss(), optax.sgd(0.1))
  late = optax.join_schedules([lambda step: 0.0, lambda step: 0.5], [1])
  for outer in (optax.adam(0.05, b1=0.9), optax.sgd(late)):
    learner = metajax.meta_learner(gradient, outer, metajax.vmapped(2))
    record = train(learner, learner.init(problems.weights().astype(jnp.bfloat16)), num_steps=3)
    train(learner, record.state, num_steps=4)
  assert not recwarn.list


def test_progress_is_lines_where_the_output_is_not_a_terminal(monkeypatch, capsys):
  """A line every half minute, which says what is done, and no empty lines."""
  clock = [0.0]
  monkeypatch.setattr(jobs.time, "monotonic", lambda: clock[0])
  monkeypatch.setattr("sys.stderr.isatty", lambda: False, raising=False)
  with jobs.progress(total=100, unit="step", desc="glyphs", mesh=metajax.task_mesh()) as bar:
    for step in range(100):
      clock[0] = step
      bar.set_postfix_str(f"loss {step}")
      bar.update(1)
  lines = capsys.readouterr().err.splitlines()
  assert len(lines) == 3 and all(line.startswith("glyphs: ") for line in lines)
  assert "30/100" in lines[0] and "loss 30" in lines[0] and "60/100" in lines[1]


@pytest.mark.parametrize(("processes", "closed"), [(1, True), (2, False)])
def test_after_an_error_of_jax_checkpoints_are_closed_if_no_process_is_lost(
  processes, closed, monkeypatch
):
  monkeypatch.setattr(jax, "process_count", lambda: processes)
  calls = []
  saved = types.SimpleNamespace(close=lambda: calls.append(None))
  with pytest.raises(jax.errors.JaxRuntimeError), contextlib.ExitStack() as stack:
    stack.push(training._closing(saved))
    raise jax.errors.JaxRuntimeError("out of memory")
  assert bool(calls) == closed
