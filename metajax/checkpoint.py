"""Saving and restoring a run. The only module that knows Orbax."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import orbax.checkpoint as ocp

from metajax.meta import MetaState


class Checkpoints(NamedTuple):
  """The checkpoints in a folder.

  Attributes:
    save: `MetaState -> None`, under the state's own step; whole or not at all.
    restore: `MetaState -> MetaState | None`, the newest one, given a state of the same structure
      and shapes; None if there is none.
    close: releases the folder.
  """

  save: Callable[[MetaState], None]
  restore: Callable[[MetaState], MetaState | None]
  close: Callable[[], None]


def checkpoints(folder: str | os.PathLike, *, keep: int = 2) -> Checkpoints:
  """Opens a folder of checkpoints, making it if need be.

  Args:
    folder: where they are, or will be.
    keep: how many of the newest to keep.
  """
  # Saved synchronously: a training step that donates its state may overwrite what is being written.
  options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
  manager = ocp.CheckpointManager(Path(folder).absolute(), options=options)

  def save(state: MetaState) -> None:
    manager.save(int(state.step), args=ocp.args.StandardSave(state), force=True)

  def restore(like: MetaState) -> MetaState | None:
    step = manager.latest_step()
    if step is None:
      return None
    shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    return manager.restore(step, args=ocp.args.StandardRestore(shapes))

  return Checkpoints(save, restore, manager.close)
