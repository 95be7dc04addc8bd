"""Training in a run folder, several jobs side by side, and how they are stopped."""

import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar

import jax
from tqdm import tqdm

import metajax
from experiments import folders
from experiments.folders import Line, RunFolder
from metajax.training import DivergedError, StoppedError

T = TypeVar("T")
_LINE_SECONDS = 30  # between two lines of progress
_ASKED = threading.Event()  # to stop, by a signal
_FAILED = threading.Event()  # one of several runs; the others save and stop


def train(
  folder: RunFolder,
  learner: metajax.MetaLearner,
  *arguments: Any,
  evaluate: Callable[[metajax.MetaState], Line],
  summary: Callable[[Line], str],
  score: Callable[[Line], float | None],
  mesh: jax.sharding.Mesh,
  label: str,
  track: Callable[[Line], None] = lambda line: None,
  **options: Any,
) -> metajax.Record:
  """Trains as `metajax.train` does, with a line in metrics.jsonl for each report.

  Args:
    folder: of the run; its checkpoints are inside.
    learner: what to train.
    *arguments: the further arguments of `metajax.train`.
    evaluate: from a state to what the line says of it, besides step, seconds and losses.
    summary: from the line to what is printed.
    score: from the line to the score of the checkpoint.
    mesh: where to train.
    label: names the run beside its progress bar.
    track: is given each line as well.
    **options: of `metajax.train`.
  """

  def report(record: metajax.Record) -> float | None:
    if record.restored:
      folder.keep(lambda line: line["step"] <= record.step)
      return None
    folder.keep(lambda line: line["step"] < record.step)  # perhaps it was interrupted
    line: Line = {"step": record.step, "seconds": round(record.seconds, 3)}
    if record.losses:
      line["losses"] = record.losses
      line |= record.metrics
    line |= evaluate(record.state)
    folder.append(line)
    track(line)
    tqdm.write(f"{label}: {summary(line)}")
    return score(line)

  try:
    return metajax.train(
      learner,
      *arguments,
      report=report,
      folder=folder.path / "checkpoints",
      mesh=mesh,
      should_stop=stopping,
      progress=partial(progress, mesh=mesh, desc=label),
      **options,
    )
  except StoppedError as error:
    raise StoppedError(f"{error}: the same command goes on from there") from error
  except DivergedError as error:
    raise DivergedError(f"{folder.path}: {error}") from error


class _Lines(tqdm):
  """Progress for an output that is not a terminal: a line every half minute, and no bar."""

  def __init__(self, **options: Any) -> None:
    self._said = time.monotonic()
    super().__init__(**options, ncols=0)

  def display(self, msg: str | None = None, pos: int | None = None) -> None:
    """Prints where it is, unless it has done so a short while ago."""
    if msg is None and time.monotonic() - self._said >= _LINE_SECONDS:
      self._said = time.monotonic()
      print(self, file=self.fp, flush=True)

  def clear(self, nolock: bool = False) -> None:
    """What was printed stays."""


def progress(*, mesh: jax.sharding.Mesh, **options: Any) -> tqdm:
  """A progress bar; runs side by side have a line each."""
  options |= {"leave": False, "smoothing": 0.1, "disable": not folders.writes()}
  if not sys.stderr.isatty():
    return _Lines(**options)
  return tqdm(**options, position=mesh.devices.flat[0].id if mesh.size == 1 else 0)


def stop() -> None:
  """Asks all runs of this process to save and stop."""
  _ASKED.set()


def stopping() -> bool:
  """Whether this process is to save and stop."""
  return _ASKED.is_set() or _FAILED.is_set()


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
      if _ASKED.is_set() or _FAILED.is_set():
        raise StoppedError("stopped before a run began: the same command goes on")
      with jax.default_device(mesh.devices.flat[0]):
        return job(mesh)
    except BaseException as error:
      failed.append(error)
      _FAILED.set()
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
      _FAILED.set()
      pool.shutdown(cancel_futures=True)
      raise
    finally:
      _FAILED.clear()
