"""Saving and restoring a run. The only module that knows Orbax."""

import math
import os
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from metajax.meta import MetaState


class Saved(NamedTuple):
  """A state, and what was saved beside it."""

  state: MetaState
  extra: dict[str, Any]


class Save(Protocol):
  def __call__(
    self, state: MetaState, extra: dict[str, Any] | None = None, *, score: float | None = None
  ) -> None: ...


class Checkpoints(NamedTuple):
  """The checkpoints in a folder.

  Attributes:
    save: `(state, extra=None, *, score=None) -> None`, under the state's own step; whole or not at
      all. It returns before all is written, and the state may be donated then. `extra` is anything
      that JSON holds; a checkpoint without a score is never the best. Raises OSError if this or
      the last one cannot be written.
    restore: `MetaState -> Saved | None`, the newest one, given a state of the same structure,
      shapes and places; None if there is none. A damaged one is passed over with a warning, and
      removed if one before it is whole; ValueError if all are damaged.
    best: the same for the one with the highest score, which need not be among the newest.
    close: waits until all is written and releases the folder. Raises OSError as `save` does.
  """

  save: Save
  restore: Callable[[MetaState], Saved | None]
  best: Callable[[MetaState], Saved | None]
  close: Callable[[], None]


def checkpoints(folder: str | os.PathLike, *, keep: int = 2) -> Checkpoints:
  """Opens a folder of checkpoints, making it if need be; all processes of a run do so together.

  Args:
    folder: where they are, or will be.
    keep: how many of the newest to keep, besides the best.

  Raises:
    ValueError: if `keep` is below 1.
  """
  if keep < 1:
    raise ValueError(f"keep must be at least 1, not {keep}")
  score_of = lambda metrics: metrics["score"]
  highest = BestN(get_metric_fn=score_of, n=1, keep_checkpoints_without_metrics=False)
  options = ocp.CheckpointManagerOptions(
    best_fn=score_of,
    preservation_policy=AnyPreservationPolicy([LatestN(keep), highest]),
    cleanup_tmp_directories=True,
  )
  folder = Path(folder).absolute()
  manager = ocp.CheckpointManager(folder, options=options)

  def save(
    state: MetaState, extra: dict[str, Any] | None = None, *, score: float | None = None
  ) -> None:
    step, copy = int(state.step), _copied(state)
    content = {"checksums": _checksums(state), "extra": extra or {}}
    try:
      manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(copy), content=ocp.args.JsonSave(content)
        ),
        metrics=None if score is None or not math.isfinite(score) else {"score": score},
        force=True,
      )
    except Exception as error:
      raise _unwritten(folder, error) from error

  def load(step: int, like: MetaState) -> Saved:
    shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    found = manager.restore(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardRestore(shapes), content=ocp.args.JsonRestore()
      ),
    )
    if _checksums(found["state"]) != found["content"]["checksums"]:
      raise ValueError("its numbers are not those that were saved")
    return Saved(found["state"], found["content"]["extra"])

  def first_whole(steps: Iterable[int], like: MetaState) -> Saved | None:
    damaged: dict[int, str] = {}
    for step in steps:
      try:
        found = load(step, like)
      except Exception as error:  # whatever a reader makes of a damaged file
        damaged[step] = _first_line(error)
        continue
      for other, why in damaged.items():
        warnings.warn(f"checkpoint {other} of {folder} is damaged and removed: {why}", stacklevel=3)
        manager.delete(other)
      return found
    if damaged:
      why = "; ".join(f"{step}: {why}" for step, why in damaged.items())
      raise ValueError(f"no checkpoint of {folder} can be restored ({why})")
    return None

  def restore(like: MetaState) -> Saved | None:
    return first_whole(sorted(manager.all_steps(), reverse=True), like)

  def best(like: MetaState) -> Saved | None:
    step = manager.best_step()
    return None if step is None else first_whole([step], like)

  def close() -> None:
    try:
      manager.wait_until_finished()
    except Exception as error:
      raise _unwritten(folder, error) from error
    finally:
      manager.close()

  return Checkpoints(save, restore, best, close)


def _unwritten(folder: Path, error: Exception) -> OSError:
  return OSError(f"a checkpoint could not be written in {folder}: {_first_line(error)}")


def _first_line(error: Exception) -> str:
  return (str(error).splitlines() or [type(error).__name__])[0][:200]


@jax.jit
def _copied(state: MetaState) -> MetaState:
  """A training step that donates its state would overwrite what is being written."""
  return jax.tree.map(jnp.copy, state)


def _checksums(state: MetaState) -> list[int]:
  """A number a leaf that is another one if any byte of the leaf is."""
  sums = jax.block_until_ready(_byte_sums(state))  # before another program communicates
  return [int(number) for number in jax.device_get(sums)]


@jax.jit
def _byte_sums(state: MetaState) -> jax.Array:
  def of_leaf(leaf: jax.Array) -> jax.Array:
    leaf = leaf.astype(jnp.uint8) if leaf.dtype == bool else leaf
    content = jax.lax.bitcast_convert_type(leaf, jnp.uint8).astype(jnp.uint32)
    place, stride = jnp.zeros((), jnp.uint32), 1
    for axis in reversed(range(content.ndim)):
      place += jax.lax.broadcasted_iota(jnp.uint32, content.shape, axis) * jnp.uint32(stride)
      stride = stride * content.shape[axis] % 2**32
    # Odd factors: a change of one byte can not vanish modulo 2^32.
    return jnp.sum(content * (2 * place + 1), dtype=jnp.uint32)

  return jnp.stack([of_leaf(leaf) for leaf in jax.tree.leaves(state)])
