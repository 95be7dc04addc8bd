"""What the experiment binaries share: flags, the loop that trains and judges, runs side by side."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any, TypeVar

import jax
import numpy as np
from absl import flags, logging
from tqdm import tqdm

import metajax
from experiments.folders import Record, RunFolder
from metajax.checkpoint import checkpoints

# A data set that a program closes over becomes an argument of it, not a constant copied into it.
jax.config.update("jax_use_simplified_jaxpr_constants", True)

T = TypeVar("T")
_STOPPING = threading.Event()  # set when one of several runs fails


# fmt: off
_SHARED_FLAGS = (
  flags.DEFINE_integer("meta_steps", None, "Outer iterations; each experiment has its default."),
  flags.DEFINE_integer("eval_tasks", None,
    "Test tasks of the final result; each experiment has its default."),
  flags.DEFINE_integer("seed", 0, "Of everything random."),
  flags.DEFINE_integer("seeds", 1,
    "Runs, from --seed on; the result is their mean, with the deviation between them."),
  flags.DEFINE_string("out", None, "Run folder; by default a new one under runs/."),
  flags.DEFINE_bool("plot_only", False, "Train nothing: draw anew what --out holds."),
)
# fmt: on


def defaults(own_flags: Iterable[flags.FlagHolder], **changes: Any) -> SimpleNamespace:
  """The flags' default values, but for `changes`.

  Raises:
    ValueError: if a change names no flag.
  """
  values = {flag.name: flag.default for flag in (*_SHARED_FLAGS, *own_flags)}
  unknown = sorted(set(changes) - set(values))
  if unknown:
    raise ValueError(f"there is no flag --{unknown[0]}")
  return SimpleNamespace(**{**values, **changes})


def main(
  name: str,
  argv: list[str],
  own_flags: Iterable[flags.FlagHolder],
  own_defaults: dict[str, Any],
  prepare: Callable[[SimpleNamespace], Callable[[], Any]],
) -> None:
  """A binary: `prepare` checks everything and returns what to run; its complaints are one line."""
  if len(argv) > 1:
    sys.exit(f"{name}: unexpected argument {argv[1]!r}: flags start with --")
  if not flags.FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)  # every save would log some forty lines
  metajax.cores_as_devices()
  jax.config.update("jax_compilation_cache_dir", str(metajax.data.cache_directory() / "compiled"))
  present = lambda flag: flags.FLAGS[flag.name].present
  given = {
    flag.name: flag.value if present(flag) else own_defaults.get(flag.name, flag.default)
    for flag in (*_SHARED_FLAGS, *own_flags)
  }
  try:
    run = prepare(SimpleNamespace(**given))
  except (ValueError, OSError) as error:
    sys.exit(f"{name}: {error}")
  run()


def changed(settings: SimpleNamespace, **changes: Any) -> SimpleNamespace:
  return SimpleNamespace(**{**vars(settings), **changes})


def of_each_seed(settings: SimpleNamespace) -> list[SimpleNamespace]:
  """The settings of `--seeds` runs, each in a folder of its own inside `--out`."""
  seeds = range(settings.seed, settings.seed + settings.seeds)
  return [
    changed(settings, seed=seed, seeds=1, out=os.path.join(settings.out, f"seed{seed}"))
    for seed in seeds
  ]


def on_mesh(tree: Any, mesh: jax.sharding.Mesh) -> Any:
  """A copy on each device of the mesh; what is spread over them stays."""

  def place(leaf: jax.Array) -> jax.Array:
    there = leaf.sharding.device_set == set(mesh.devices.flat)
    return leaf if there else jax.device_put(leaf, jax.NamedSharding(mesh, jax.P()))

  return jax.tree.map(place, tree)


def side_by_side(jobs: Sequence[Callable[[jax.sharding.Mesh], T]]) -> list[T]:
  """The results of jobs that do not need each other, each on a device of its own.

  A job is given a mesh of one device. After an exception in one, the others end at their next call
  of `train`'s compiled loop.
  """
  failed: list[BaseException] = []
  free: SimpleQueue[jax.sharding.Mesh] = SimpleQueue()
  for device in jax.devices():
    free.put(metajax.task_mesh([device]))

  def work(job: Callable[[jax.sharding.Mesh], T]) -> T:
    mesh = free.get()
    try:
      if _STOPPING.is_set():
        raise RuntimeError("another run failed")
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


def check_numbers(settings: SimpleNamespace, *at_least_one: str) -> None:
  """Refuses shared flags, and others that count something, if they are out of range."""
  for name in ("meta_steps", "seeds", *at_least_one):
    if getattr(settings, name) < 1:
      raise ValueError(f"--{name}={getattr(settings, name)} must be at least 1")
  if settings.eval_tasks is not None and settings.eval_tasks < 2:
    raise ValueError(f"--eval_tasks={settings.eval_tasks} must be at least 2")
  if not 0 <= settings.seed <= 2**32 - settings.seeds:
    raise ValueError(f"--seed={settings.seed} must be from 0 to 2^32 - 1")
  if settings.plot_only and settings.out is None:
    raise ValueError("--plot_only draws what --out holds: give an --out")


def refuse(settings: SimpleNamespace, *decided: str) -> None:
  """Flags that an experiment decides by itself, or has no use for.

  Raises:
    ValueError: if one is given.
  """
  for name in decided:
    if getattr(settings, name) is not None:
      raise ValueError(f"--{name} is not for this experiment to be given: leave it out")


def train(
  learner: metajax.MetaLearner,
  sample_episodes: Callable[[jax.Array], metajax.Episode],
  state: metajax.MetaState,
  key: jax.Array,
  *,
  meta_steps: int,
  eval_every: int,
  evaluate: Callable[[metajax.MetaState], Record],
  summary: Callable[[Record], str],
  folder: RunFolder,
  steps_per_call: int,
  mesh: jax.sharding.Mesh,
  label: str = "meta-training",
) -> tuple[metajax.MetaState, float]:
  """Trains to `meta_steps` from what the folder holds; judges and saves every `eval_every`.

  Args:
    learner: what to train.
    sample_episodes: of a meta-step.
    state: where to start if the folder holds no checkpoint.
    key: of all sampling.
    meta_steps: where to stop.
    eval_every: meta-steps between two records.
    evaluate: the record of a state.
    summary: the record as a line.
    folder: gets records and checkpoints.
    steps_per_call: meta-steps in one call of the compiled loop.
    mesh: where the state lives.
    label: of the progress bar.

  Returns:
    The last state, and the seconds spent in compiled training steps, earlier sittings included.
  """
  saved = checkpoints(folder.path / "checkpoints")
  restored = saved.restore(state)
  state, key = on_mesh((state if restored is None else restored, key), mesh)
  step = int(state.step)
  folder.truncate(step)
  records = folder.records()
  seconds = records[-1]["seconds"] if records else 0.0
  if restored is not None:
    tqdm.write(f"going on from meta-step {step} of {folder.path}")

  programs: dict[int, Callable[..., Any]] = {}  # by number of steps
  if not records:
    record = {"step": step, "seconds": 0.0, **evaluate(state)}
    folder.append(record)
    tqdm.write(f"{label}: {summary(record)}")
  with progress(total=meta_steps, initial=step, unit="step", desc=label, mesh=mesh) as bar:
    while step < meta_steps:
      if _STOPPING.is_set():
        raise RuntimeError(f"{folder.path} stopped at meta-step {step}, since another run failed")
      until_evaluation = min(meta_steps, (step // eval_every + 1) * eval_every) - step
      steps = min(steps_per_call, until_evaluation)
      if steps not in programs:
        many_steps = metajax.run(learner, sample_episodes, steps)
        programs[steps] = jax.jit(many_steps, donate_argnums=0).lower(state, key).compile()
      start = time.perf_counter()
      with jax.transfer_guard("disallow"):  # all of it on the device, sampling included
        state, infos = jax.block_until_ready(programs[steps](state, key))
      seconds += time.perf_counter() - start
      step += steps
      losses = np.asarray(infos.losses).mean(axis=0)
      bar.update(steps)
      bar.set_postfix_str(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
      if steps == until_evaluation:
        record = {"step": step, "seconds": round(seconds, 3), "losses": losses.tolist()}
        record |= evaluate(state)
        folder.append(record)
        saved.save(state)
        tqdm.write(f"{label}: {summary(record)}")
  saved.close()
  return state, seconds


def progress(*, mesh: jax.sharding.Mesh, **options: Any) -> tqdm:
  """A progress bar; runs side by side have a line each."""
  line = mesh.devices.flat[0].id if mesh.size == 1 else 0
  return tqdm(**options, position=line, leave=False, smoothing=0.1)
