"""What all experiment binaries share: flags, checks, processes and signals."""

import os
import re
import signal
import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import jax
from absl import flags, logging
from jax.experimental import multihost_utils

import metajax
from experiments import folders, training

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
  """The default values of the flags, with some `changes`.

  Raises:
    ValueError: if a change names no flag.
  """
  values = {flag.name: flag.default for flag in (*_SHARED_FLAGS, *own_flags)}
  unknown = sorted(set(changes) - set(values))
  if unknown:
    raise ValueError(f"there is no flag --{unknown[0]}")
  return SimpleNamespace(**{**values, **changes})


def parse_flags(argv: list[str]) -> list[str]:
  """As absl does, but what is wrong is one line, and --help lists the shared flags as well."""
  for flag in _SHARED_FLAGS:
    flags.FLAGS.register_key_flag_for_module(argv[0], flags.FLAGS[flag.name])
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
    training.stop()
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
  except (training.StoppedError, training.DivergedError) as error:  # in all processes together
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


def check_numbers(settings: SimpleNamespace, *at_least_one: str) -> None:
  """Refuses shared flags, and others that count something, if they are out of range."""
  for name in ("meta_steps", "seeds", *at_least_one):
    if getattr(settings, name) < 1:
      raise ValueError(f"--{name}={getattr(settings, name)} must be at least 1")
  if settings.eval_tasks is not None and settings.eval_tasks < 2:
    raise ValueError(f"--eval_tasks={settings.eval_tasks} must be at least 2")
  if not 0 <= settings.seed <= 2**32 - settings.seeds:
    raise ValueError(f"--seed={settings.seed} must be from 0 to 2^32 - {settings.seeds}")
  if settings.plot_only and settings.out is None:
    raise ValueError("--plot_only draws what --out holds: give an --out")
  if settings.plot_only and settings.fresh:
    raise ValueError("--plot_only draws what --out holds, --fresh starts over: give one of them")


def refuse(settings: SimpleNamespace, *decided: str, **fixed: Any) -> None:
  """Refuses values for flags that an experiment sets itself.

  Raises:
    ValueError: if a flag in `decided` is given, or one in `fixed` has another value.
  """
  for name, value in {**dict.fromkeys(decided), **fixed}.items():
    if getattr(settings, name) != value:
      raise ValueError(f"--{name} is set by this experiment and cannot be overridden: remove it")
