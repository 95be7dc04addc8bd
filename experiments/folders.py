"""What a run leaves behind: flags.txt, metrics.jsonl, result.json and checkpoints in its folder."""

import importlib.metadata
import json
import os
import platform
import time
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np

import metajax

Record = dict[str, Any]


class RunFolder:
  """What a run leaves: its flags, a record a line, the result."""

  def __init__(self, out: str | os.PathLike, flags: dict[str, Any]) -> None:
    """Names the folder, which may hold a run that the same flags began.

    Raises:
      ValueError: if it holds a run with other flags.
    """
    self.path = Path(out).expanduser().absolute()
    self.metrics = self.path / "metrics.jsonl"
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
        "go on as it began, or choose another --out"
      )

  def begin(self, *conditions: str) -> None:
    """Makes the folder and writes flags.txt, with what else must not change as comments.

    Raises:
      ValueError: if that cannot be done, or the run was begun under other conditions.
    """
    self._lines += [f"# {condition}" for condition in conditions]
    try:
      self.path.mkdir(parents=True, exist_ok=True)
      if self._flags.is_file():
        self._compare(self._before())
      replace_file(self._flags, "\n".join(self._lines) + "\n")
    except OSError as error:
      raise ValueError(
        f"--out={self.path} cannot be written ({error.strerror}): choose another folder"
      ) from error

  def records(self) -> list[Record]:
    return read_records(self.path)

  def truncate(self, step: int) -> None:
    """Forgets the records after a step."""
    kept = [record for record in self.records() if record["step"] <= step]
    replace_file(self.metrics, "".join(json.dumps(record) + "\n" for record in kept))

  def append(self, record: Record) -> None:
    with self.metrics.open("a") as file:
      file.write(json.dumps(record) + "\n")
      file.flush()
      os.fsync(file.fileno())

  def result(self) -> Record | None:
    """What `finish` wrote, if it has."""
    return finished(self.path) if (self.path / "result.json").exists() else None

  def finish(self, result: Record) -> None:
    """Writes result.json: the run is complete."""
    write_json(self.path / "result.json", result)


def read_records(folder: Path) -> list[Record]:
  """The lines of a run's metrics.jsonl; one that was cut off by a kill is left out."""
  path = folder / "metrics.jsonl"
  if not path.exists():
    return []
  lines = path.read_text().splitlines(keepends=True)
  return [json.loads(line) for line in lines if line.endswith("\n")]


def finished(out: str | os.PathLike) -> Record:
  """The result.json of a complete run.

  Raises:
    ValueError: if there is none.
  """
  path = Path(out, "result.json")
  if not path.exists():
    raise ValueError(f"{out} holds no complete run to draw: train it first, without --plot_only")
  return json.loads(path.read_text())


def logged(out: str | os.PathLike) -> list[Record]:
  """What a run has left to draw.

  Raises:
    ValueError: if there is nothing.
  """
  found = read_records(Path(out))
  if not found:
    raise ValueError(f"{out} holds no run to draw: train first, without --plot_only")
  return found


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
  return settings.out or time.strftime(f"runs/{name}-%Y%m%d-%H%M%S")


def open_folder(settings: SimpleNamespace) -> RunFolder:
  """The folder that --out names; nothing is written yet."""
  elsewhere = ("out", "plot_only", "seeds", "data_dir", "cache_dir")  # where, but not what
  given = {
    flag: ",".join(map(str, value)) if isinstance(value, list) else value
    for flag, value in vars(settings).items()
    if value is not None and flag not in elsewhere
  }
  return RunFolder(settings.out, given)


def versions() -> dict[str, str]:
  """What a result depends on besides its flags."""
  packages = ("metajax", "jax", "jaxlib", "flax", "optax", "numpy")
  found = {package: importlib.metadata.version(package) for package in packages}
  return {"python": platform.python_version(), **found, "device": jax.devices()[0].device_kind}
