"""What the experiment binaries share: flags, the loop that trains and judges, runs side by side."""

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import nullcontext
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any, NoReturn, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags, logging
from jax.experimental import multihost_utils
from tqdm import tqdm

import metajax
from experiments import folders
from experiments.folders import Record, RunFolder
from metajax.checkpoint import checkpoints

# A data set that a program closes over becomes an argument of it, not a constant copied into it.
jax.config.update("jax_use_simplified_jaxpr_constants", True)

T = TypeVar("T")
_STOPPING = threading.Event()  # set by a signal, or when one of several runs fails


class StoppedError(RuntimeError):
  """A run that was asked to stop; what it has done is saved."""


class DivergedError(RuntimeError):
  """A run whose parameters are no longer finite."""


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
  flags.DEFINE_bool("fresh", False, "Start over: what --out holds is renamed to OUT.old1."),
  flags.DEFINE_bool("distributed", False,
    "One of several processes, as Slurm or a cloud TPU tells it; or name them by the next three."),
  flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0."),
  flags.DEFINE_integer("num_processes", None, "How many processes share the run."),
  flags.DEFINE_integer("process_id", None, "Which of them this is, from 0."),
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


def parse_flags(argv: list[str]) -> list[str]:
  """As absl does, but what is wrong is one line."""
  try:
    return flags.FLAGS(argv)
  except flags.Error as error:
    sys.exit(f"{Path(argv[0]).stem}: {' '.join(str(error).split())}")


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
    logging.set_verbosity(logging.FATAL)  # a save logs some forty lines; what fails is raised
  present = lambda flag: flags.FLAGS[flag.name].present
  settings = SimpleNamespace(
    **{
      flag.name: flag.value if present(flag) else own_defaults.get(flag.name, flag.default)
      for flag in (*_SHARED_FLAGS, *own_flags)
    }
  )
  metajax.cores_as_devices()
  jax.config.update("jax_compilation_cache_dir", str(metajax.data.cache_directory() / "compiled"))
  try:
    join(settings)
    if not folders.writes():
      _silence(1)  # one process speaks
    run = _checked(name, settings, prepare)
  except (ValueError, OSError) as error:
    _end(f"{name}: {error}", 1)
  caught: list[int] = []

  def stop(number: int, _: Any) -> None:
    caught.append(number)
    if len(caught) > 1:  # asked again
      os._exit(128 + number)
    _STOPPING.set()
    try:
      print("\nstopping; once more to stop at once and lose what is not saved", file=sys.stderr)
    except OSError:  # the same Ctrl-C ended what this is piped into
      _silence(1, 2)

  # A checkpoint that fails leaves others of its files under way; their complaints say nothing more.
  sys.unraisablehook = lambda unraisable: None
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, stop)
  try:
    with nullcontext() if settings.plot_only else folders.alone(settings.out):
      run()
  except (StoppedError, DivergedError) as error:  # in all processes together
    print(f"{name}: {error}", file=sys.stderr)
    sys.exit(128 + caught[0] if caught else 1)
  except (ValueError, OSError) as error:
    _end(f"{name}: {error}", 1)
  except jax.errors.JaxRuntimeError as error:
    if jax.process_count() == 1:
      raise
    _end(
      f"{name}: process {jax.process_index()} ended, perhaps since another one did: start all "
      f"again with the same command ({str(error).splitlines()[0]})",
      1,
    )


def _silence(*streams: int) -> None:
  """What is written to these goes nowhere from now on, 1 being the output and 2 the errors."""
  nowhere = os.open(os.devnull, os.O_WRONLY)
  for stream in streams:
    os.dup2(nowhere, stream)


def _end(message: str, code: int) -> NoReturn:
  """Ends this process; to end in good order, one of several would wait for the others."""
  print(message, file=sys.stderr, flush=True)
  if jax.distributed.is_initialized():
    os._exit(code)
  sys.exit(code)


def join(settings: SimpleNamespace) -> None:
  """Makes this process one of several that share a run, if the flags say so.

  Raises:
    ValueError: if they contradict each other.
  """
  names = ("coordinator_address", "num_processes", "process_id")
  given = [getattr(settings, name) for name in names]
  if all(value is None for value in given):
    if settings.distributed:
      _initialize()
    return
  address, number, this = given
  if settings.distributed or address is None or number is None or this is None:
    raise ValueError(
      "--coordinator_address, --num_processes and --process_id go together, without --distributed"
    )
  if not re.fullmatch(r".+:\d+", address):
    raise ValueError(f"--coordinator_address={address} must be HOST:PORT")
  if not 0 <= this < number:
    raise ValueError(f"--process_id={this} must be from 0 to --num_processes={number} less 1")
  _initialize(address, number, this)


def _initialize(*arguments: Any) -> None:
  try:
    jax.distributed.initialize(*arguments)
  except RuntimeError as error:
    why = str(error).splitlines()[0]
    raise ValueError(
      f"the processes do not find each other ({why}): see that the coordinator's address is right "
      "and its port free"
    ) from error


def _checked(
  name: str,
  settings: SimpleNamespace,
  prepare: Callable[[SimpleNamespace], Callable[[], Any]],
) -> Callable[[], Any]:
  """What to run. With --fresh the earlier run is put aside, and back if a flag is no good."""
  if settings.out is None and jax.process_count() > 1:
    raise ValueError("processes that share a run need the same --out, in a folder that all see")
  if settings.out is not None or not settings.plot_only:
    settings.out = folders.folder_name(name, settings)
  path, aside = Path(settings.out or "").absolute(), None
  if settings.fresh and not settings.plot_only and folders.writes() and path.exists():
    aside = folders.set_aside(path)
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices("earlier run put aside")
  try:
    run = prepare(settings)
  except BaseException:
    if aside is not None and not path.exists():
      aside.rename(path)
    raise
  if aside is not None:
    print(f"the earlier run is in {aside}")
  return run


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
  if settings.plot_only and settings.fresh:
    raise ValueError("--plot_only draws what --out holds, --fresh starts over: give one of them")


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
  score: Callable[[Record], float],
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
    if found is not None:
      state, seconds = found.state, found.extra["seconds"]
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
            saved.save(state, {"seconds": seconds})
          raise StoppedError(
            f"stopped at meta-step {step} of {folder.path}: the same command goes on from there"
          )
        until_evaluation = min(meta_steps, (step // eval_every + 1) * eval_every) - step
        steps = min(steps_per_call, until_evaluation)
        if steps not in programs:
          many_steps = _checking_parameters(metajax.run(learner, sample_episodes, steps))
          programs[steps] = jax.jit(many_steps, donate_argnums=0).lower(state, key).compile()
        start = time.perf_counter()
        with jax.transfer_guard("disallow"):  # all of it on the device, sampling included
          state, infos, finite = jax.block_until_ready(programs[steps](state, key))
        seconds += time.perf_counter() - start
        losses = np.asarray(infos.losses)
        if not finite:
          bad = np.flatnonzero(~np.isfinite(losses).all(axis=1))
          where = step + 1 + int(bad[0] if len(bad) else steps - 1)
          kept = f"meta-step {last_saved} is saved" if last_saved else "nothing was saved before"
          raise DivergedError(
            f"{folder.path} diverged at meta-step {where}, its parameters are not finite: "
            f"lower the inner or the outer rate ({kept})"
          )
        step += steps
        losses = losses.mean(axis=0)
        bar.update(steps)
        bar.set_postfix_str(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
        if steps == until_evaluation:
          record = {"step": step, "seconds": round(seconds, 3), "losses": losses.tolist()}
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
