"""Saving and restoring the state of a run. This is the only module that uses Orbax."""

import errno
import json
import math
import os
import re
import shutil
import threading
import warnings
import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import (
  PolicyCheckpointInfo,
  PreservationContext,
  PreservationPolicy,
)

from metajax import checks
from metajax.devices import in_any_process
from metajax.meta import MetaState
from metajax.programs import copied
from metajax.spread import resized
from metajax.types import InnerState

# Errors in reading a file that say nothing about what is in it.
_PASSING = (
  errno.EACCES, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EPERM, errno.ESTALE,
)  # fmt: skip
# Orbax numbers the saves of a process, and reads the latest number again and again as it starts
# one: of two that start together in two threads, one would wait for signals that never come.
_STARTING = threading.Lock()
_SCORES = "scores.json"


class Saved(NamedTuple):
  """A restored state.

  Attributes:
    state: the state.
    extra: the extra values that were saved with it.
    rated: whether `rate` was called for it.
  """

  state: MetaState
  extra: dict[str, Any]
  rated: bool = False


class Save(Protocol):
  def __call__(self, state: MetaState, extra: dict[str, Any] | None = None) -> None: ...


class Checkpoints(NamedTuple):
  """The checkpoints in a folder. Used in a `with` statement, it closes itself at the end.

  Attributes:
    save: `(state, extra=None) -> None` saves a state under its own step, completely or not at all.
      It returns before everything is written, and the state may be donated then. `extra` is
      anything that JSON can hold. Raises OSError if this checkpoint or the one before cannot be
      written, and ValueError if the step is saved already or JSON cannot hold `extra`.
    rate: `(step, score) -> None` gives a saved checkpoint its score, or says with None that it has
      none. A checkpoint without a score is never the best; one that is not finite counts as none.
      Raises OSError if the score cannot be written. If several processes share the run, all of
      them call it together.
    restore: `MetaState -> Saved | None` returns the newest checkpoint, or None if there is none.
      Its argument is a state with the same structure, shapes, dtypes and shardings, or only their
      description, `jax.eval_shape(learner.init, params)`. The number of tasks or of devices may be
      another one than when it was saved: places that are added to the meta-batch start from the
      inner state of the last place, and places that are no longer there are left out. A damaged
      checkpoint is passed over with a warning, and the next save removes it. Raises ValueError if
      all are damaged or, where several processes share the run, if the newest one is, and OSError
      if a file cannot be read for a reason that may pass.
    best: the same for the checkpoint with the highest score, which need not be among the newest.
    close: waits until everything is written and releases the folder. Raises OSError as `save`.
  """

  save: Save
  rate: Callable[[int, float | None], None]
  restore: Callable[[MetaState], Saved | None]
  best: Callable[[MetaState], Saved | None]
  close: Callable[[], None]

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()


def checkpoints(folder: str | os.PathLike, *, keep: int = 2) -> Checkpoints:
  """Opens a folder of checkpoints, which need not exist.

  If several processes share a run, all of them call this together. Nothing changes before the first
  save, which creates the folder, or the first score; so it can be opened for reading while a run
  writes to it.

  Args:
    folder: the folder of the checkpoints.
    keep: how many of the newest checkpoints to keep, besides the best one.

  Raises:
    ValueError: if `keep` is below 1.
  """
  checks.at_least_one(keep=keep)
  folder = Path(folder).expanduser().absolute()
  rated = _read_scores(folder)
  options = ocp.CheckpointManagerOptions(
    preservation_policy=_NewestAndBest(keep, rated), create=False
  )
  manager = ocp.CheckpointManager(folder, options=options)
  damaged: dict[int, str] = {}
  saving = False

  def begin() -> None:
    """Makes the folder, and removes what an earlier process was writing when it ended."""
    folder.mkdir(parents=True, exist_ok=True)
    if jax.process_index() == 0:
      for unfinished in folder.glob("*.orbax-checkpoint-tmp*"):
        shutil.rmtree(unfinished, ignore_errors=True)

  def save(state: MetaState, extra: dict[str, Any] | None = None) -> None:
    nonlocal saving
    step, copy = int(state.step), copied(state)
    try:
      beside_state = {"checksums": _checksums(state), "extra": extra or {}}
      beside_state["leaves"] = _described(state)
      text = json.dumps(beside_state, default=lambda number: number.item())
    except (TypeError, ValueError, AttributeError) as error:
      raise ValueError(
        f"extra must be numbers, strings, lists and dicts of them ({error})"
      ) from error
    beside = {"text": text, "crc32": zlib.crc32(text.encode())}
    try:
      if not saving:
        begin()
        saving = True
      for other in damaged:
        manager.delete(other)
      damaged.clear()
      if step in manager.all_steps():
        raise FileExistsError(f"there is a checkpoint of step {step} already")
      gone = [other for other in rated if other >= step and other not in manager.all_steps()]
      if gone:  # checkpoints that were damaged
        for other in gone:
          del rated[other]
        _write_scores(folder, rated)
      with _STARTING:
        manager.save(
          step,
          args=ocp.args.Composite(
            state=ocp.args.StandardSave(copy), content=ocp.args.JsonSave(beside)
          ),
          force=True,
        )
    except FileExistsError as error:
      if not folder.is_dir():  # a file
        raise _unwritten(folder, error) from error
      raise ValueError(f"{error} in {folder}: choose another folder") from None
    except Exception as error:
      raise _unwritten(folder, error) from error

  def rate(step: int, score: float | None) -> None:
    rated[step] = float(score) if score is not None and math.isfinite(score) else None
    failure = None
    try:
      _write_scores(folder, rated)
    except OSError as error:
      failure = error
    # The others wait for the first process: whoever opens the folder next must find the score.
    if in_any_process(failure is not None):
      raise _unwritten(folder, failure or OSError("the first process says why")) from failure

  def load(step: int, like: MetaState) -> Saved:
    found = manager.restore(step, args=ocp.args.Composite(content=ocp.args.JsonRestore()))
    text, checksum = found["content"]["text"], found["content"]["crc32"]
    if zlib.crc32(text.encode()) != checksum:
      raise ValueError("its extra values are not those that were saved")
    beside = json.loads(text)
    leaves = {name: kind.lstrip("~") for name, kind in beside["leaves"].items()}  # of older files
    as_saved = _with_places(leaves, like)
    _check_leaves(leaves, _described(as_saved))
    shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, as_saved)
    found = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(shapes)))[
      "state"
    ]
    if _checksums(found) != beside["checksums"]:
      raise ValueError("its numbers are not those that were saved")
    if as_saved is not like:
      found = found._replace(inner=_for_places(found.inner, like.inner))
    return Saved(found, beside["extra"], step in rated)

  def first_whole(steps: Iterable[int], like: MetaState) -> Saved | None:
    passed: dict[int, str] = {}
    for step in steps:
      try:
        found = load(step, like)
      except Exception as error:
        passed[step] = _first_line(error)
        if _may_pass(error):
          raise OSError(
            f"checkpoint {step} of {folder} cannot be read now ({passed[step]}), and may be whole: "
            "nothing was changed, try again"
          ) from error
        if jax.process_count() > 1:  # the others may have read it, and would go on without this one
          raise ValueError(
            f"process {jax.process_index()} cannot restore checkpoint {step} of {folder} "
            f"({passed[step]}): remove it, and start all processes again"
          ) from error
        continue
      for other, why in passed.items():
        warnings.warn(
          f"checkpoint {other} of {folder} cannot be restored and is passed over ({why}); the next "
          "save removes it",
          stacklevel=3,
        )
      damaged.update(passed)
      return found
    if passed:
      why = "; ".join(f"{step}: {why}" for step, why in passed.items())
      raise ValueError(
        f"no checkpoint of {folder} can be restored ({why}): see that the model and the optimizers "
        "are those that it was saved with"
      )
    return None

  def restore(like: MetaState) -> Saved | None:
    return first_whole(sorted(manager.all_steps(), reverse=True), like)

  def best(like: MetaState) -> Saved | None:
    return first_whole(_by_score(manager.all_steps(), rated), like)

  def close() -> None:
    try:
      manager.wait_until_finished()
    except Exception as error:
      with suppress(Exception):  # the same again
        manager.close()
      raise _unwritten(folder, error) from error
    manager.close()

  return Checkpoints(save, rate, restore, best, close)


def _by_score(steps: Iterable[int], rated: dict[int, float | None]) -> list[int]:
  """Those of the steps that have a score, the best first."""
  scores = {step: score for step in steps if (score := rated.get(step)) is not None}
  return sorted(scores, key=scores.__getitem__, reverse=True)


def _read_scores(folder: Path) -> dict[int, float | None]:
  """What `rate` said of each step; nothing if the file is not there or damaged."""
  try:
    return {int(step): score for step, score in json.loads((folder / _SCORES).read_text()).items()}
  except (OSError, ValueError, AttributeError):
    return {}


def _write_scores(folder: Path, rated: dict[int, float | None]) -> None:
  if jax.process_index() == 0:
    beside = folder / f"{_SCORES}.partial"
    beside.write_text(json.dumps(rated))
    beside.replace(folder / _SCORES)


class _NewestAndBest(PreservationPolicy):
  """Keeps the newest checkpoints and the one with the highest score.

  Orbax's own policies keep the scores as metrics in a file without a checksum. If one such file is
  damaged, Orbax cannot open the folder at all, so the scores are kept beside it here.
  """

  def __init__(self, keep: int, rated: dict[int, float | None]) -> None:
    self._keep = keep
    self._rated = rated

  def should_preserve(
    self, checkpoints: Sequence[PolicyCheckpointInfo], *, context: PreservationContext
  ) -> Sequence[bool]:
    steps = [checkpoint.step for checkpoint in checkpoints]
    stay = {*steps[-self._keep :], *_by_score(steps, self._rated)[:1]}
    return [step in stay for step in steps]


def _unwritten(folder: Path, error: Exception) -> OSError:
  return OSError(
    f"a checkpoint could not be written in {folder}, those before are whole: {_first_line(error)}"
  )


def _first_line(error: Exception) -> str:
  return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _may_pass(error: BaseException) -> bool:
  """Whether an error in reading says nothing about what is in the file.

  Arrays are read by TensorStore, whose errors have the number or the kind of the cause in the text.
  """
  number = re.search(r"os_error_code='(\d+)'", str(error))
  return (
    isinstance(error, MemoryError)
    or (int(number[1]) if number else getattr(error, "errno", None)) in _PASSING
    or bool(re.search("RESOURCE_EXHAUSTED|UNAVAILABLE|DEADLINE_EXCEEDED", str(error)))
  )


def _described(state: MetaState) -> dict[str, str]:
  """The shape and dtype of every leaf, by its name in the state."""

  def described(leaf: Any) -> str:
    kind = jax.typeof(leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jnp.asarray(leaf))
    return str(kind).lstrip("~")  # it marks a weak type, which a meta-step may make strong

  leaves = jax.tree_util.tree_leaves_with_path(state)
  return {jax.tree_util.keystr(path).lstrip("."): described(leaf) for path, leaf in leaves}


def _with_places(saved: dict[str, str], like: MetaState) -> MetaState:
  """A state like this one with as many inner states as were saved, if nothing else is different.

  There is one for each place in the meta-batch, whose number depends on the number of devices.
  """
  of_inner = next((saved[name] for name in saved if name.startswith("inner")), "")
  places = re.search(r"\[(\d+)", of_inner)
  by_place = all(leaf.ndim for leaf in jax.tree.leaves(like.inner))
  if saved == _described(like) or not places or not by_place:
    return like

  def as_saved(leaf: Any) -> jax.ShapeDtypeStruct:
    shape = (int(places[1]), *leaf.shape[1:])
    return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=_sharding(like.step))

  other = like._replace(inner=jax.tree.map(as_saved, like.inner))
  return other if saved == _described(other) else like


def _for_places(inner: InnerState, expected: InnerState) -> InnerState:
  """The inner states for the expected number of places, where they are expected to be."""
  slots = jax.tree.leaves(expected)[0].shape[0]
  shardings = jax.tree.map(_sharding, expected)
  return jax.jit(partial(resized, slots=slots), out_shardings=shardings)(inner)


def _sharding(leaf: Any) -> jax.sharding.Sharding | None:
  """Where an array or its description is; NumPy's arrays do not say."""
  return getattr(leaf, "sharding", None)


def _check_leaves(saved: dict[str, str], expected: dict[str, str]) -> None:
  """Says how a saved state differs from the expected one, before Orbax fails to read it."""
  if saved == expected:
    return
  name = next(n for n in {**expected, **saved} if saved.get(n) != expected.get(n))
  raise ValueError(
    f"its {name} is {saved.get(name, 'missing')}, and {expected.get(name, 'nothing')} is expected: "
    "restore it with the model, the optimizers and the execution that it was saved with"
  )


def _checksums(state: MetaState) -> list[int]:
  """One checksum for each leaf, which changes if any single byte of the leaf changes."""
  sums = jax.block_until_ready(_byte_sums(state))  # before another program communicates
  return [int(number) for number in jax.device_get(sums)]


@jax.jit
def _byte_sums(state: MetaState) -> jax.Array:
  def of_leaf(leaf: jax.Array) -> jax.Array:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      leaf = jax.random.key_data(leaf)
    leaf = leaf.astype(jnp.uint8) if leaf.dtype == bool else leaf
    content = jax.lax.bitcast_convert_type(leaf, jnp.uint8).astype(jnp.uint32)
    place, stride = jnp.zeros((), jnp.uint32), 1
    for axis in reversed(range(content.ndim)):
      place += jax.lax.broadcasted_iota(jnp.uint32, content.shape, axis) * jnp.uint32(stride)
      stride = stride * content.shape[axis] % 2**32
    # Odd factors: a change of one byte can not vanish modulo 2^32.
    return jnp.sum(content * (2 * place + 1), dtype=jnp.uint32)

  return jnp.stack([of_leaf(leaf) for leaf in jax.tree.leaves(state)])
