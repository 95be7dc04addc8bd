"""The folder of a run: its files flags.txt, metrics.jsonl and result.json, and its lock.

Of several processes that share a run, all read the folder, and only the first writes to it.
"""

import errno
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

import metajax
from experiments.settings import as_text

try:
  import fcntl
  import resource
except ImportError:  # not on Windows
  fcntl = None  # type: ignore[assignment]
  resource = None  # type: ignore[assignment]

Line = dict[str, Any]
METRICS = "metrics.jsonl"


class InUseError(ValueError):
  """Another process is writing in the folder."""


def writes() -> bool:
  """Whether this process is the one that writes files, draws figures and prints."""
  return jax.process_index() == 0


class RunFolder:
  """The files of a run. A folder belongs to the settings with which its run was begun."""

  def __init__(
    self,
    out: str | os.PathLike,
    settings: dict[str, Any],
    *,
    free: Collection[str] = (),
    defaults: Mapping[str, Any] | None = None,
  ) -> None:
    """Opens the folder, which may hold a run that was begun with the same settings.

    Args:
      out: the path of the folder. It need not exist, and nothing is written yet.
      settings: names and values.
      free: names of settings that may differ from those the run was begun with.
      defaults: what settings were if the run was begun by a version that did not have them yet.

    Raises:
      ValueError: if the folder holds a run with other settings.
    """
    self.path = Path(out).absolute()
    self._flags = self.path / "flags.txt"
    self._lines = [f"--{name}={as_text(value)}" for name, value in sorted(settings.items())]
    self._free = free
    self._defaults = {f"--{name}={as_text(value)}" for name, value in (defaults or {}).items()}
    if self.begun():
      self._compare([line for line in self._before() if line.startswith("--")])

  def _before(self) -> list[str]:
    return self._flags.read_text().splitlines()

  def _compare(self, before: list[str]) -> None:
    name = lambda line: line[2:].split("=")[0]
    known = {name(line) for line in before}
    counts = lambda line: name(line) not in self._free
    as_before = lambda line: line in before or (line in self._defaults and name(line) not in known)
    then = " ".join(line for line in before if counts(line) and line not in self._lines)
    now = " ".join(line for line in self._lines if counts(line) and not as_before(line))
    if then or now:
      raise ValueError(
        f"{self.path} holds another run (then {then or 'no such flag'}; now {now or 'none'}): "
        "go on as it began, choose another --out, or start over with --fresh"
      )

  def begun(self) -> bool:
    """Whether a run was begun here."""
    return self._flags.is_file()

  def check(self, *conditions: str) -> None:
    """Checks further conditions that must not change, such as a checksum of the data.

    Raises:
      ValueError: if the run was begun under other conditions.
    """
    self._lines += [f"# {condition}" for condition in conditions]
    if self.begun():
      self._compare(self._before())

  def begin(self, *conditions: str) -> None:
    """Checks the conditions, makes the folder, and writes flags.txt with conditions as comments.

    Raises:
      ValueError: if the folder cannot be written, another process writes in it, or the run was
        begun under other conditions.
    """
    self.check(*conditions)
    if not writes():
      return
    try:
      self.path.mkdir(parents=True, exist_ok=True)
      with alone(self.path):
        replace_file(self._flags, "\n".join(self._lines) + "\n")
    except OSError as error:
      raise ValueError(
        f"--out={self.path} cannot be written ({error.strerror}): choose another folder"
      ) from error

  def check_seeds(self, seeds: int, *, all_of_them: bool = True) -> None:
    """Checks that a result over seeds is not replaced by one that says less.

    Args:
      seeds: the number of seeds of the new result.
      all_of_them: whether the new result has all curves, methods or panels that there are.

    Raises:
      ValueError: if the folder has a result of more seeds; or one of fewer, and the new result does
        not have all of them.
    """
    before = (self.result() or {}).get("seeds", seeds)
    if before > seeds or (before < seeds and not all_of_them):
      raise ValueError(
        f"{self.path} holds a result of {before} seeds, which one of {seeds} would replace: use "
        f"--seeds={before}, or choose another --out"
      )

  def lines(self, name: str = METRICS) -> list[Line]:
    """The parsed lines of a file of the folder."""
    return read_lines(self.path, name)

  def keep(
    self, counts: Callable[[Line], bool] = lambda line: True, name: str = METRICS
  ) -> list[Line]:
    """Deletes the lines that do not count, and an incomplete last line; returns the others."""
    kept = [line for line in self.lines(name) if counts(line)]
    if writes():
      replace_file(self.path / name, "".join(json.dumps(line) + "\n" for line in kept))
    return kept

  def append(self, content: Line, name: str = METRICS) -> None:
    """Appends a line. If that fails, the file stays as it was."""
    if not writes():
      return
    line = json.dumps(content).encode() + b"\n"
    with (self.path / name).open("ab", buffering=0) as file:
      size = file.seek(0, os.SEEK_END)
      try:
        if file.write(line) < len(line):
          raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(file.fileno())
      except OSError as error:
        file.truncate(size)
        raise OSError(
          f"{self.path / name} cannot be written ({error.strerror}): make room, and the same "
          "command goes on from what is saved"
        ) from error

  def result(self) -> Line | None:
    """The content of result.json, or None if the run is not complete."""
    return finished(self.path) if (self.path / "result.json").exists() else None

  def earlier(self, part: str, seeds: int) -> Any:
    """A part of the result that is there, to be added to; None if it is not of as many seeds."""
    before = self.result() or {}
    return before[part] if before.get("seeds") == seeds else None

  def finish(self, result: Line) -> None:
    """Writes result.json, which marks the run as complete."""
    if writes():
      write_json(self.path / "result.json", result)


def read_lines(folder: Path, name: str = METRICS) -> list[Line]:
  """The parsed lines of a run's file, without an incomplete one that a power failure cut off."""
  path = folder / name
  if not path.exists():
    return []
  lines = path.read_text().splitlines(keepends=True)
  return [_parsed(path, line) for line in lines if line.endswith("\n")]


def finished(out: str | os.PathLike, holding: str | None = None) -> Line:
  """The result.json of a complete run.

  Args:
    out: the folder of the run.
    holding: a name that the results of the experiment contain, and those of others do not.

  Raises:
    ValueError: if there is no result, or it is of another experiment.
  """
  path = Path(out, "result.json")
  if not path.exists():
    raise ValueError(f"{out} holds no complete run to draw: train it first, without --plot_only")
  result = _parsed(path, path.read_text())
  if holding is not None and holding not in result:
    raise ValueError(f"{out} holds a run of another experiment: give the --out of one of this kind")
  return result


def _parsed(path: Path, text: str) -> Line:
  try:
    return json.loads(text)
  except ValueError as error:
    raise ValueError(f"{path} is damaged: mend it, or start over with --fresh") from error


def logged(out: str | os.PathLike) -> list[Line]:
  """The lines of a run's metrics.jsonl, to draw.

  Raises:
    ValueError: if there are none.
  """
  found = read_lines(Path(out))
  if not found:
    raise ValueError(f"{out} holds no run to draw: train first, without --plot_only")
  return found


def logs_of_seeds(out: str | os.PathLike) -> list[list[Line]]:
  """The lines of metrics.jsonl of each seed's run in a folder; runs without lines are left out."""
  logs = [read_lines(path) for path in seeds_in(out)]
  return [lines for lines in logs if lines]


def seeds_in(out: str | os.PathLike) -> list[Path]:
  """The folders of the runs of several seeds, in order; those that were set aside are left out."""
  found = [path for path in Path(out).glob("seed*") if path.name[4:].isdecimal()]
  return sorted(found, key=lambda path: int(path.name[4:]))


def replace_file(path: Path, text: str) -> None:
  """Replaces a file atomically: if writing fails, the old file is unchanged."""
  beside = path.with_name(path.name + ".partial")
  with beside.open("w") as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  beside.replace(path)


def write_json(path: Path, content: Line) -> None:
  replace_file(path, json.dumps(content, indent=2) + "\n")


def describe(splits: metajax.data.Splits) -> str:
  """Identifies a data set in one line: classes, examples and a checksum of each split."""
  parts = []
  for name, classes in splits._asdict().items():
    if classes is not None:
      inputs, sizes = np.asarray(classes.inputs), np.asarray(classes.sizes)
      checksum = zlib.crc32(inputs.data, zlib.crc32(sizes.data))
      parts.append(f"{name}: {len(sizes)} classes, {len(inputs)} examples, crc32 {checksum:08x}")
  return "; ".join(parts)


@contextmanager
def plain_warnings() -> Iterator[None]:
  """Prints the warnings of the library, as of files that are skipped, as plain lines."""
  try:
    with warnings.catch_warnings(record=True) as caught:
      warnings.simplefilter("always", UserWarning)
      yield
  finally:
    for warning in caught:
      if writes():
        print(f"warning: {warning.message}")


def path_of(name: str, out: str | None) -> Path:
  """The folder that --out names, or a new one under runs/."""
  return Path(out or time.strftime(f"runs/{name}-%Y%m%d-%H%M%S")).expanduser()


def locked(out: str | os.PathLike, action: Callable[[], Any]) -> Callable[[], Any]:
  """Returns a function that does the action under the folder's lock; the folder must exist."""

  def run() -> Any:
    with alone(out):
      return action()

  return run


@contextmanager
def alone(out: str | os.PathLike) -> Iterator[None]:
  """Locks a folder, so that only one process at a time writes in it.

  On file systems without such locks (NFS has none), nothing is locked. A killed process leaves no
  lock behind.

  Raises:
    InUseError: if another process holds the lock.
  """
  if fcntl is None or not writes():
    yield
    return
  folder = os.open(out, os.O_RDONLY)
  try:
    try:
      fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise InUseError(
        f"another process is writing in {out}: wait for it, or choose another --out"
      ) from None
    except OSError:
      pass  # a file system without locks
    yield
  finally:
    os.close(folder)


def set_aside(path: Path) -> Path:
  """Renames a folder to the first free of NAME.old1, NAME.old2 ..., and returns the new path.

  Raises:
    InUseError: if another process writes in it, or in the folder of a run inside.
  """
  number = 1
  while (aside := path.with_name(f"{path.name}.old{number}")).exists():
    number += 1
  with ExitStack() as locks:
    for inside in sorted({path, *(flags.parent for flags in path.rglob("flags.txt"))}):
      locks.enter_context(alone(inside))
    path.rename(aside)
  return aside


def commit() -> str:
  """The commit of this clone, and whether files differ from it; "unknown" if git does not say."""
  described = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
  try:
    found = subprocess.run(described, cwd=Path(__file__).parent, capture_output=True, text=True)
  except OSError:  # git is not installed
    return "unknown"
  return found.stdout.strip() or "unknown"


def versions() -> dict[str, str]:
  """Versions, commit, device and machine, on which a result depends besides its flags."""
  packages = ("metajax", "jax", "jaxlib", "flax", "optax", "numpy")
  found = {package: importlib.metadata.version(package) for package in packages}
  return {
    "python": platform.python_version(),
    **found,
    "commit": commit(),
    "device": jax.devices()[0].device_kind,
    "machine": f"{_processor()}, {os.cpu_count()} cores",
  }


def where(versions: dict[str, str]) -> str:
  """What computed a result: the accelerator, or without one the machine.

  Args:
    versions: those of the result, which may be empty.
  """
  device = versions.get("device", "cpu")
  return versions.get("machine", "") if device == "cpu" else device


def peak_memory() -> int | None:
  """The most memory that this process has had, in MB, as far as it is known."""
  if resource is None:
    return None
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return round(peak / (1e6 if sys.platform == "darwin" else 1e3))


def _processor() -> str:
  """The name of the processor, as far as it is known."""
  information = Path("/proc/cpuinfo")
  lines = information.read_text().splitlines() if information.exists() else []
  names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
  return names[0] if names else platform.processor() or platform.machine()
