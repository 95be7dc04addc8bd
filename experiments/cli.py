"""The command line of the experiments: flags made from settings, processes, and signals."""

import inspect
import os
import signal
import sys
import textwrap
import typing
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import Field, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, NoReturn

import jax
from absl import flags, logging

import metajax
from experiments import folders, jobs
from experiments.processes import Processes, join
from experiments.settings import Settings, as_text, kind_of, option

Program = Callable[..., Callable[[], Any]]


# fmt: off
@dataclass(frozen=True, kw_only=True)
class Run(Settings):
  """Where the runs of a command are kept, and what is done there."""

  out: str | None = option(None, "The run folder; by default a new one under runs/.")
  seeds: int = option(1,
    "Number of runs, with the seeds from --seed on. The result is their mean, with the deviation "
    "between them.", at_least=1)
  plot_only: bool = option(False, "Trains nothing, and draws again what --out holds.")
  fresh: bool = option(False, "Starts over. What --out holds is renamed to OUT.old1, or to "
    "the next number that is free.")

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.plot_only and not self.out:
      raise ValueError("--plot_only draws what --out holds: give an --out")
    if self.plot_only and self.fresh:
      raise ValueError("--plot_only draws what --out holds, --fresh starts over: give one of them")


# fmt: on


def main(
  program: Program,
  *groups: Settings,
  leave_out: Sequence[str] = (),
  implied: Callable[[dict[str, Any]], list[str]] | None = None,
) -> None:
  """Runs an experiment from the command line; what is wrong with a flag is said in one line.

  Args:
    program: given `Run` and the groups with the values of the flags, it checks everything that can
      be checked beforehand and returns what to run. The docstring of its module heads the text of
      `--help`.
    *groups: settings with their default values.
    leave_out: settings that have no flag, since the experiment decides them.
    implied: a function from the flags that were given to further ones. A given flag overrides
      them.
  """
  name = Path(sys.argv[0]).stem
  try:
    *settings, run, processes = parse(
      sys.argv[1:],
      (*groups, Run(), Processes()),
      about=sys.modules["__main__"].__doc__ or "",
      leave_out=leave_out,
      implied=implied,
    )
    logging.set_verbosity(logging.FATAL)  # Orbax logs some forty lines a save; errors are raised
    # Run folders compare the flags, which know what may change, such as the way to convolve, and
    # the data. The algorithm "scratch" leaves all parameters as they are.
    for message in ("a meta-step computes", "the data is not what", "no parameter has changed"):
      warnings.filterwarnings("ignore", message=message)
    metajax.cores_as_devices()
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
      cache = metajax.data.cache_directory() / "compiled"
      jax.config.update("jax_compilation_cache_dir", str(cache))
    _ask_for_precision()
    join(processes)
    if not folders.writes():
      _silence(1)  # one process speaks
    action = _prepared(name, run, lambda run: program(run, *settings))
  except (ValueError, OSError) as error:
    _end(f"{name}: {error}", 1)
  caught: list[int] = []

  def stop(number: int, _: Any) -> None:
    caught.append(number)
    if len(caught) > 1:  # asked again
      os._exit(128 + number)
    jobs.stop()
    try:
      print(
        "\nstopping as soon as possible; press Ctrl-C again to stop at once, and lose what is not "
        "saved",
        file=sys.stderr,
      )
    except OSError:  # the same Ctrl-C ended what this is piped into
      _silence(1, 2)

  # A checkpoint that fails leaves others of its files under way; their complaints say nothing more.
  sys.unraisablehook = lambda unraisable: None
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, stop)
  try:
    action()
  except (jobs.StoppedError, jobs.DivergedError) as error:  # in all processes together
    print(f"{name}: {error}", file=sys.stderr)
    sys.exit(128 + caught[0] if caught else 1)
  except (ValueError, OSError) as error:
    _end(f"{name}: {error}", 1)
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" in str(error):
      _end(
        f"{name}: a device has too little memory ({str(error).splitlines()[0]}): let fewer tasks "
        "run at once, as with --execution=chunked or --chunk, or make the tasks or the network "
        "smaller, in another --out",
        1,
      )
    if jax.process_count() == 1:
      raise
    _end(
      f"{name}: process {jax.process_index()} ended, perhaps since another one did: start all "
      f"again with the same command ({str(error).splitlines()[0]})",
      1,
    )


def main_without_folder(program: Program, *groups: Settings, positional: bool = False) -> None:
  """Runs a program that has no run folder; what is wrong is said in one line.

  Args:
    program: given the groups with the values of the flags, it checks everything that can be checked
      beforehand and returns what to run.
    *groups: settings with their default values.
    positional: whether the program is also given a list of the arguments that are no flags.
  """
  try:
    rest: list[str] = []
    about = sys.modules["__main__"].__doc__ or ""
    settings = parse(sys.argv[1:], groups, about=about, rest=rest if positional else None)
    _ask_for_precision()
    program(*settings, *([rest] if positional else []))()
  except (ValueError, OSError) as error:
    _end(f"{Path(sys.argv[0]).stem}: {error}", 1)


def _ask_for_precision() -> None:
  """Makes matrix products as precise as float32 on all devices.

  By default, JAX rounds their factors on GPUs and TPUs to 10 bits or fewer, which can change MAML's
  gradient through large inner steps by as much as its size.
  """
  jax.config.update("jax_default_matmul_precision", "float32")


def parse(
  arguments: Sequence[str],
  groups: Sequence[Settings],
  *,
  about: str = "",
  leave_out: Sequence[str] = (),
  implied: Callable[[dict[str, Any]], list[str]] | None = None,
  rest: list[str] | None = None,
) -> list[Any]:
  """Returns the groups with the values of the flags in the arguments; see `main`.

  The flags belong to this call: absl's global ones, which may be a notebook's, stay as they are.
  Arguments that are no flags are added to `rest`, or are an error without it.

  Raises:
    ValueError: if a flag is unknown or its value is no good.
    SystemExit: after `--help`.
  """
  given = _values(arguments, groups, leave_out, rest)
  if given.pop("help", False):
    print(_help(about, groups, leave_out))
    sys.exit(0)
  if implied is not None:
    given = _values([*implied(given), *arguments], groups, leave_out)
  return [
    replace(group, **{one.name: given[one.name] for one in fields(group) if one.name in given})
    for group in groups
  ]


def _settings(
  groups: Sequence[Settings], leave_out: Sequence[str]
) -> Iterator[tuple[Settings, Field, Any]]:
  """Every setting that has a flag, with its group and its type without None."""
  for group in groups:
    hints = typing.get_type_hints(type(group))
    for setting in fields(group):
      if setting.name not in leave_out:
        yield group, setting, kind_of(hints[setting.name])[0]


_DEFINE: dict[type, Callable[..., Any]] = {
  bool: flags.DEFINE_bool,
  int: flags.DEFINE_integer,
  float: flags.DEFINE_float,
  str: flags.DEFINE_string,
}


def _values(
  arguments: Sequence[str],
  groups: Sequence[Settings],
  leave_out: Sequence[str],
  positional: list[str] | None = None,
) -> dict[str, Any]:
  """The values of the flags that are among the arguments."""
  values = flags.FlagValues()
  flags.DEFINE_bool("help", False, "", short_name="h", flag_values=values)
  kinds = {}
  for _, setting, kind in _settings(groups, leave_out):
    kinds[setting.name] = kind
    if typing.get_origin(kind) is Literal:
      flags.DEFINE_enum(setting.name, None, typing.get_args(kind), "", flag_values=values)
    else:
      define: Callable[..., Any] = _DEFINE.get(kind, flags.DEFINE_list)
      define(setting.name, None, "", flag_values=values)
  values.set_gnu_getopt(positional is not None)  # flags may follow other arguments
  try:
    rest = values(["", *arguments])
  except flags.UnrecognizedFlagError as error:
    if error.flagname in leave_out:
      raise ValueError(
        f"--{error.flagname} is set by this experiment and cannot be overridden: remove it"
      ) from error
    raise ValueError(str(error)) from error
  except flags.Error as error:
    raise ValueError(" ".join(str(error).split())) from error
  if positional is not None:
    positional += rest[1:]
  elif len(rest) > 1:
    raise ValueError(f"unexpected argument {rest[1]!r}: flags start with --")
  given: dict[str, Any] = {name: values[name].value for name in kinds if values[name].present}
  for name, value in given.items():
    if typing.get_origin(kinds[name]) is tuple:
      given[name] = _entries(typing.get_args(kinds[name])[0], value)
  return given | ({"help": True} if values.help else {})


def _entries(kind: type, texts: list[str]) -> tuple[Any, ...]:
  try:
    return tuple(kind(text) for text in texts)
  except ValueError:
    return tuple(texts)  # the group says what is wrong with them


def _help(about: str, groups: Sequence[Settings], leave_out: Sequence[str]) -> str:
  lines, titled = [about.strip()], None
  for group, setting, kind in _settings(groups, leave_out):
    # The class that has the setting, which may be a base of the group's class.
    bases = reversed(type(group).__mro__)
    home = next(base for base in bases if setting.name in inspect.get_annotations(base))
    if home is not titled:
      lines += ["", (home.__doc__ or "").splitlines()[0]]
      titled = home
    default = getattr(group, setting.name)
    shown = f"  --[no]{setting.name}" if kind is bool else f"  --{setting.name}"
    if typing.get_origin(kind) is Literal:
      shown += f"=<{'|'.join(typing.get_args(kind))}>"
    if default is not None:
      shown += f" (default: {as_text(default)})"
    if len(shown) > 100:  # many choices
      wrapped = textwrap.wrap(shown.replace("|", "| "), 100, subsequent_indent="      ")
      shown = "\n".join(wrapped).replace("| ", "|")
    lines += [shown, textwrap.fill(setting.metadata["help"], 96, initial_indent="      ",
      subsequent_indent="      ")]  # fmt: skip
  return "\n".join(lines)


def _silence(*streams: int) -> None:
  """What is written to these goes nowhere from now on, 1 being the output and 2 the errors."""
  nowhere = os.open(os.devnull, os.O_WRONLY)
  for stream in streams:
    os.dup2(nowhere, stream)


def _end(message: str, code: int) -> NoReturn:
  """Ends this process at once; to end in good order, one of several would wait for the others."""
  print(message, file=sys.stderr, flush=True)
  if jax.distributed.is_initialized():
    os._exit(code)
  sys.exit(code)


def _prepared(
  name: str, run: Run, program: Callable[[Run], Callable[[], Any]]
) -> Callable[[], Any]:
  """What to run. With --fresh the earlier run is put aside, and back if a flag is no good."""
  if run.out is None and jax.process_count() > 1:
    raise ValueError("processes that share a run need the same --out, in a folder that all see")
  if run.out is None and run.fresh:
    raise ValueError("--fresh puts the earlier run in --out aside: give --out too, or leave it out")
  path = folders.path_of(name, run.out)
  run = replace(run, out=str(path))
  aside = None
  if run.fresh and folders.writes() and path.exists():
    aside = folders.set_aside(path)
  metajax.devices.wait_for_all("earlier run put aside")
  try:
    action = program(run)
  except BaseException:
    if aside is not None and not path.exists():
      aside.rename(path)
    raise
  if aside is not None:
    print(f"the earlier run is in {aside}")
  return action
