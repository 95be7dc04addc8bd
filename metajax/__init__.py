"""metajax: Reptile, first-order MAML and MAML in JAX, as small functions that compose.

In all docstrings, sections, equations and "the paper" are those of "On First-Order Meta-Learning
Algorithms" by Nichol, Achiam and Schulman (2018), arXiv:1803.02999.
"""

import importlib
from importlib import metadata
from types import ModuleType

from metajax import data, devices, losses, models, programs, theory, training, variants
from metajax.devices import cores_as_devices, task_mesh
from metajax.episodes import (
  cycling,
  replacement,
  separate_tail,
  shared_tail,
  varying_shots,
  varying_steps,
)
from metajax.evaluation import Mean, evaluate, inductive, judge, mean_and_interval, transductive
from metajax.execution import Execution, serial, sharded, vmapped
from metajax.gradients import Info, MetaGradient, combine, fomaml, maml, reptile, skip_nonfinite
from metajax.inner import LearnerState, Step, carried, inner_step, inner_update
from metajax.learned import Learned, Predictions, load, save
from metajax.learner_file import Recipe
from metajax.meta import MetaLearner, MetaState, Sweep, meta_learner, run, sweep
from metajax.models import Model
from metajax.spread import map_tasks
from metajax.training import Record, train
from metajax.types import Episode, Examples, Task


def __getattr__(name: str) -> ModuleType:
  """Imports `metajax.checkpoint` when it is first used, since Orbax takes seconds to import."""
  if name == "checkpoint":
    return importlib.import_module("metajax.checkpoint")
  raise AttributeError(f"module 'metajax' has no attribute {name!r}")


__version__ = metadata.version("metajax")

__all__ = [
  "Episode",
  "Examples",
  "Execution",
  "Info",
  "Learned",
  "LearnerState",
  "Mean",
  "MetaGradient",
  "MetaLearner",
  "MetaState",
  "Model",
  "Predictions",
  "Recipe",
  "Record",
  "Step",
  "Sweep",
  "Task",
  "carried",
  "combine",
  "cores_as_devices",
  "cycling",
  "data",
  "devices",
  "evaluate",
  "fomaml",
  "inductive",
  "inner_step",
  "inner_update",
  "judge",
  "load",
  "losses",
  "maml",
  "map_tasks",
  "mean_and_interval",
  "meta_learner",
  "models",
  "programs",
  "replacement",
  "reptile",
  "run",
  "save",
  "separate_tail",
  "serial",
  "sharded",
  "shared_tail",
  "skip_nonfinite",
  "sweep",
  "task_mesh",
  "theory",
  "train",
  "training",
  "transductive",
  "variants",
  "varying_shots",
  "varying_steps",
  "vmapped",
]
