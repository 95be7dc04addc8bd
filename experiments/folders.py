"""What a run leaves behind: flags.txt, metrics.jsonl, result.json and checkpoints in its folder.

Of several processes that share a run, all read and only the first writes.
"""

import errno
import importlib.metadata
import json
import os
import platform
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np

import metajax

try:
  import fcntl
except ImportError:  # not on Windows
  fcntl = None  # type: ignore[assignment]

Record = dict[str, Any]
METRICS = "metrics.jsonl"
PROCESSES = ("distributed", "coordinator_address", "num_processes", "process_id")  # flags


class InUseError(ValueError):
  """Another process writes in the folder."""


def writes() -> bool:
  """Whether this process is the one that writes, draws and speaks."""
  return jax.process_index() == 0


class RunFolder:
  """What a run leaves: its flags, a record a line, the result."""

  def __init__(self, out: str | os.PathLike, flags: dict[str, Any]) -> None:
    """Names the folder, which may hold a run that the same flags began.

    Raises:
      ValueError: if it holds a run with other flags.
    """
    self.path = Path(out).absolute()
    self._flags = self.path / "flags.txt"
    self._lines = [f"--{name}={value}" for name, value in sorted(flags.items())]
    if self._flags.is_file():
      self._compare([line for line in self._before() if line.startswith("--")])

  def _before(self) -> list[str]:
    return self._flags.read_text().splitlines()

  def _compare(self, before: list[str]) -> None:
    then = " ".join(line for line in before if line not in self._lines)
    now = " ".join(line for line in self._lines if line not in before)
    if then or now:
      raise ValueError(
        f"{self.path} holds another run (then {then or 'no such flag'}; now {now or 'none'}): "
        "go on as it began, choose another --out, or start over with --fresh"
      )

  def begin(self, *conditions: str) -> None:
    """Makes the folder and writes flags.txt, with what else must not change as comments.

    Raises:
      ValueError: if that cannot be done, or the run was begun under other conditions.
    """
    self._lines += [f"# {condition}" for condition in conditions]
    if self._flags.is_file():
      self._compare(self._before())
    if not writes():
      return
    try:
      self.path.mkdir(parents=True, exist_ok=True)
      replace_file(self._flags, "\n".join(self._lines) + "\n")
    except OSError as error:
      raise ValueError(
        f"--out={self.path} cannot be written ({error.strerror}): choose another folder"
      ) from error

  def records(self, name: str = METRICS) -> list[Record]:
    """The lines of a file of records."""
    return read_records(self.path, name)

  def keep(
    self, counts: Callable[[Record], bool] = lambda record: True, name: str = METRICS
  ) -> list[Record]:
    """Forgets the lines that do not count, and one that is torn; returns the others."""
    kept = [record for record in self.records(name) if counts(record)]
    if writes():
      replace_file(self.path / name, "".join(json.dumps(record) + "\n" for record in kept))
    return kept

  def append(self, record: Record, name: str = METRICS) -> None:
    """Adds a line, whole or not at all."""
    if not writes():
      return
    line = json.dumps(record).encode() + b"\n"
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

  def result(self) -> Record | None:
    """What `finish` wrote, if it has."""
    return finished(self.path) if (self.path / "result.json").exists() else None

  def finish(self, result: Record) -> None:
    """Writes result.json: the run is complete."""
    if writes():
      write_json(self.path / "result.json", result)


def read_records(folder: Path, name: str = METRICS) -> list[Record]:
  """The lines of a run's file; one that was cut off by a power failure is left out."""
  path = folder / name
  if not path.exists():
    return []
  lines = path.read_text().splitlines(keepends=True)
  return [_parsed(path, line) for line in lines if line.endswith("\n")]


def finished(out: str | os.PathLike) -> Record:
  """The result.json of a complete run.

  Raises:
    ValueError: if there is none.
  """
  path = Path(out, "result.json")
  if not path.exists():
    raise ValueError(f"{out} holds no complete run to draw: train it first, without --plot_only")
  return _parsed(path, path.read_text())


def _parsed(path: Path, text: str) -> Record:
  try:
    return json.loads(text)
  except ValueError as error:
    raise ValueError(f"{path} is damaged: mend it, or start over with --fresh") from error


def logged(out: str | os.PathLike) -> list[Record]:
  """What a run has left to draw.

  Raises:
    ValueError: if there is nothing.
  """
  found = read_records(Path(out))
  if not found:
    raise ValueError(f"{out} holds no run to draw: train first, without --plot_only")
  return found


def logs_of_seeds(out: str | os.PathLike) -> list[list[Record]]:
  """What the run of each seed in a folder has left to draw, if there are any."""
  logs = [read_records(log.parent) for log in sorted(Path(out).glob(f"seed*/{METRICS}"))]
  return [records for records in logs if records]


def replace_file(path: Path, text: str) -> None:
  """Writes a file whole, or leaves the one before as it was."""
  beside = path.with_name(path.name + ".partial")
  with beside.open("w") as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  beside.replace(path)


def write_json(path: Path, content: Record) -> None:
  replace_file(path, json.dumps(content, indent=2) + "\n")


def describe(splits: metajax.data.Splits) -> str:
  """One line that tells data sets apart: classes, examples and a checksum of each split."""
  parts = []
  for name, classes in splits._asdict().items():
    if classes is not None:
      inputs, sizes = np.asarray(classes.inputs), np.asarray(classes.sizes)
      checksum = zlib.crc32(inputs.data, zlib.crc32(sizes.data))
      parts.append(f"{name}: {len(sizes)} classes, {len(inputs)} examples, crc32 {checksum:08x}")
  return "; ".join(parts)


def folder_name(name: str, settings: SimpleNamespace) -> str:
  """What --out names, or a new folder."""
  return os.path.expanduser(settings.out or time.strftime(f"runs/{name}-%Y%m%d-%H%M%S"))


def open_folder(settings: SimpleNamespace) -> RunFolder:
  """The folder that --out names, and what is run, not where; nothing is written yet."""
  elsewhere = ("out", "plot_only", "fresh", "seeds", "data_dir", "cache_dir", *PROCESSES)
  given = {
    flag: ",".join(map(str, value)) if isinstance(value, list) else value
    for flag, value in vars(settings).items()
    if value is not None and flag not in elsewhere
  }
  return RunFolder(settings.out, given)


@contextmanager
def alone(out: str | os.PathLike) -> Iterator[None]:
  """While one process writes in a folder, no other may, where the file system has such locks (NFS
  has not). A killed process leaves no lock behind.

  Raises:
    InUseError: if another process does.
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
  """Renames a folder to the first free of NAME.old1, NAME.old2 ..., and returns that.

  Raises:
    InUseError: if another process writes in it.
  """
  number = 1
  while (aside := path.with_name(f"{path.name}.old{number}")).exists():
    number += 1
  with alone(path):
    path.rename(aside)
  return aside


def versions() -> dict[str, str]:
  """What a result depends on besides its flags."""
  packages = ("metajax", "jax", "jaxlib", "flax", "optax", "numpy")
  found = {package: importlib.metadata.version(package) for package in packages}
  return {"python": platform.python_version(), **found, "device": jax.devices()[0].device_kind}
