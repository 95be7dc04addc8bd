"""The loop that trains and judges, where it runs, and how it is stopped."""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from functools import partial
from queue import SimpleQueue
from typing import Any, NamedTuple, TypeVar

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import metajax
from experiments import folders
from experiments.folders import Record, RunFolder
from metajax.checkpoint import checkpoints

T = TypeVar("T")
SampleTask = Callable[[jax.Array], metajax.Task]
MakeEpisode = Callable[[jax.Array, metajax.Task], metajax.Episode]
_STOPPING = threading.Event()  # set by a signal, or when one of several runs fails


class StoppedError(RuntimeError):
  """A run that was asked to stop; what it has done is saved."""


class DivergedError(RuntimeError):
  """A run whose parameters are no longer finite."""


def on_mesh(tree: Any, mesh: jax.sharding.Mesh) -> Any:
  """A copy on each device of the mesh; what is spread over them stays."""

  everywhere = jax.NamedSharding(mesh, jax.P())

  def place(leaf: Any) -> jax.Array:
    if not isinstance(leaf, jax.Array):
      return jax.make_array_from_callback(leaf.shape, everywhere, lambda index: leaf[index])
    if leaf.sharding.device_set == set(mesh.devices.flat):
      return leaf
    if jax.process_count() > 1:  # device_put reaches this process's devices only
      return jax.jit(lambda leaf: leaf, out_shardings=everywhere)(leaf)
    return jax.device_put(leaf, everywhere)

  return jax.tree.map(place, tree)


def compiled(
  function: Callable[..., T], mesh: jax.sharding.Mesh, *arguments: Any, **options: Any
) -> Callable[..., T]:
  """The function, compiled for such arguments, with jit's options but for static arguments.

  Arrays that it closes over become arguments of the program. A data set would else be a constant of
  each program: slow to compile, and written to the compilation cache with it.
  """
  program, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
  constants = on_mesh(program.consts, mesh)

  def with_constants(*arguments: Any, constants: Any) -> T:
    flat = jax.extend.core.jaxpr_as_fun(jax.extend.core.ClosedJaxpr(program.jaxpr, constants))
    return jax.tree.unflatten(jax.tree.structure(shapes), flat(*jax.tree.leaves(arguments)))

  executable = jax.jit(with_constants, **options).lower(*arguments, constants=constants).compile()
  return partial(executable, constants=constants)


class Losses(NamedTuple):
  """The losses of the inner steps, added over meta-steps."""

  meta_steps: int = 0
  totals: Sequence[float] = ()  # the sum of L_i over them, [k]

  def add(self, losses: np.ndarray) -> "Losses":
    """With the losses `[steps, k]` of more meta-steps."""
    totals = losses.astype(np.float64).sum(axis=0)
    before = np.asarray(self.totals) if self.meta_steps else 0.0
    return Losses(self.meta_steps + len(losses), (before + totals).tolist())

  def mean(self) -> list[float]:
    return [total / self.meta_steps for total in self.totals]


def stop() -> None:
  """Asks all runs of this process to save and stop."""
  _STOPPING.set()


def stopping() -> bool:
  """Whether this run is to save and stop; of several processes, if any is asked to."""
  asked = _STOPPING.is_set()
  if jax.process_count() == 1:
    return asked
  by_device = jax.NamedSharding(metajax.task_mesh(), jax.P("tasks"))
  each = jax.make_array_from_callback(
    (jax.device_count(),), by_device, lambda index: np.array([asked])
  )
  return bool(jax.block_until_ready(_any(each)))


_any = jax.jit(jnp.any)


def side_by_side(jobs: Sequence[Callable[[jax.sharding.Mesh], T]]) -> list[T]:
  """The results of jobs that do not need each other, each on a device of its own.

  A job is given a mesh of one device. After an exception in one, the others save and stop.

  Raises:
    ValueError: if several processes share the run.
  """
  if jax.process_count() > 1:
    raise ValueError("several processes can only share a run whose tasks are spread over devices")
  failed: list[BaseException] = []
  free: SimpleQueue[jax.sharding.Mesh] = SimpleQueue()
  for device in jax.devices():
    free.put(metajax.task_mesh([device]))

  def work(job: Callable[[jax.sharding.Mesh], T]) -> T:
    mesh = free.get()
    try:
      if _STOPPING.is_set():
        raise StoppedError("stopped before a run began: the same command goes on")
      with jax.default_device(mesh.devices.flat[0]):
        return job(mesh)
    except BaseException as error:
      failed.append(error)
      _STOPPING.set()
      raise
    finally:
      free.put(mesh)

  with ThreadPoolExecutor(len(jax.devices())) as pool:
    futures = [pool.submit(work, job) for job in jobs]
    try:
      wait(futures, return_when=FIRST_EXCEPTION)
      if failed:
        raise failed[0]  # the cause, not one of those that it stopped
      return [future.result() for future in futures]
    except BaseException:
      _STOPPING.set()
      pool.shutdown(cancel_futures=True)
      raise
    finally:
      _STOPPING.clear()


def train(
  learner: metajax.MetaLearner,
  sample_task: SampleTask,
  make_episode: MakeEpisode,
  state: metajax.MetaState,
  key: jax.Array,
  *,
  meta_steps: int,
  eval_every: int,
  evaluate: Callable[[metajax.MetaState], Record],
  summary: Callable[[Record], str],
  score: Callable[[Record], float],
  folder: RunFolder,
  steps_per_call: int,
  mesh: jax.sharding.Mesh,
  label: str = "meta-training",
) -> tuple[metajax.MetaState, float]:
  """Trains to `meta_steps` from what the folder holds; judges and saves every `eval_every`.

  Args:
    learner: what to train.
    sample_task: `key -> Task`.
    make_episode: `(key, Task) -> Episode`.
    state: where to start if the folder holds no checkpoint.
    key: of all sampling.
    meta_steps: where to stop.
    eval_every: meta-steps between two records.
    evaluate: the record of a state.
    summary: the record as a line.
    score: of a record, the higher the better; the best state is kept beside the newest.
    folder: gets records and checkpoints.
    steps_per_call: meta-steps in one call of the compiled loop.
    mesh: where the state lives.
    label: of the progress bar.

  Returns:
    The last state, and the seconds spent in compiled training steps, earlier sittings included.

  Raises:
    StoppedError: if asked to stop; the state is saved.
    DivergedError: if the parameters are no longer finite; states saved before are kept.
    OSError: if something cannot be written; states saved before are kept.
  """
  state, key = on_mesh((state, key), mesh)
  saved = checkpoints(folder.path / "checkpoints")
  try:
    found = saved.restore(state)
    seconds = 0.0
    recent = Losses()  # since the last record
    if found is not None:
      state, seconds = found.state, found.extra["seconds"]
      recent = Losses(*found.extra.get("losses", ()))
    step = last_saved = int(state.step)
    folder.keep(lambda record: found is not None and record["step"] <= step)
    if found is None:
      record = {"step": 0, "seconds": 0.0, **evaluate(state)}
      folder.append(record)
      tqdm.write(f"{label}: {summary(record)}")
    else:
      tqdm.write(f"going on from meta-step {step} of {folder.path}")

    programs: dict[int, Callable[..., Any]] = {}  # by number of steps
    with progress(total=meta_steps, initial=step, unit="step", desc=label, mesh=mesh) as bar:
      while step < meta_steps:
        if stopping():
          if step > last_saved:
            saved.save(state, {"seconds": seconds, "losses": recent})
          raise StoppedError(
            f"stopped at meta-step {step} of {folder.path}: the same command goes on from there"
          )
        until_evaluation = min(meta_steps, (step // eval_every + 1) * eval_every) - step
        steps = min(steps_per_call, until_evaluation)
        if steps not in programs:
          many_steps = _checking_parameters(metajax.run(learner, sample_task, make_episode, steps))
          programs[steps] = compiled(many_steps, mesh, state, key, donate_argnums=0)
        start = time.perf_counter()
        with jax.transfer_guard("disallow"):  # all of it on the device, sampling included
          state, infos, finite = jax.block_until_ready(programs[steps](state, key))
        seconds += time.perf_counter() - start
        losses = np.asarray(infos.losses)
        if not finite:
          where = step + _diverging_step(losses)
          kept = f"meta-step {last_saved} is saved" if last_saved else "nothing was saved before"
          raise DivergedError(
            f"{folder.path} diverged at meta-step {where}, its parameters are not finite: "
            f"lower the inner or the outer rate ({kept})"
          )
        step += steps
        recent = recent.add(losses)
        losses = losses.mean(axis=0)
        bar.update(steps)
        bar.set_postfix_str(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
        if steps == until_evaluation:
          record = {"step": step, "seconds": round(seconds, 3), "losses": recent.mean()}
          recent = Losses()
          record |= evaluate(state)
          folder.append(record)
          saved.save(state, {"seconds": seconds}, score=score(record))
          last_saved = step
          tqdm.write(f"{label}: {summary(record)}")
  except jax.errors.JaxRuntimeError:
    raise  # to close would wait for a process that may be lost
  except BaseException:
    saved.close()
    raise
  saved.close()
  return state, seconds


def _diverging_step(losses: np.ndarray) -> int:
  """Which of these meta-steps, from 1, made the parameters infinite, by its losses `[steps, k]`.

  If L_1 of a meta-step is not finite, it started from such parameters: the one before made them.
  """
  bad = np.flatnonzero(~np.isfinite(losses).all(axis=1))
  if not len(bad):
    return len(losses)
  inherited = not np.isfinite(losses[bad[0], 0])
  return max(1, int(bad[0]) + (0 if inherited else 1))


def _checking_parameters(run: Callable[..., Any]) -> Callable[..., Any]:
  """The same, returning besides whether all parameters are finite."""

  def checked(state: metajax.MetaState, key: jax.Array) -> tuple[Any, Any, jax.Array]:
    state, infos = run(state, key)
    finite = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params)]
    return state, infos, jnp.stack(finite).all()

  return checked


def progress(*, mesh: jax.sharding.Mesh, **options: Any) -> tqdm:
  """A progress bar; runs side by side have a line each."""
  line = mesh.devices.flat[0].id if mesh.size == 1 else 0
  silent = not folders.writes()
  return tqdm(**options, position=line, leave=False, smoothing=0.1, disable=silent)
