"""metajax: Reptile, first-order MAML and MAML in JAX, as small functions that compose."""

from importlib import metadata

from metajax import convolution, data, losses, models, theory
from metajax.backend import cores_as_devices, task_mesh
from metajax.evaluation import Mean, evaluate, inductive, mean_and_interval, transductive
from metajax.gradients import Info, MetaGradient, combine, fomaml, maml, reptile, stateless
from metajax.inner import LearnerState, Step, inner_step, inner_update
from metajax.meta import MetaLearner, MetaState, Sweep, meta_learner, run, sweep
from metajax.minibatches import cycling, replacement, separate_tail, shared_tail
from metajax.models import Model
from metajax.parallel import (
  batched,
  first_slot,
  map_tasks,
  per_device,
  sample_episodes,
  serial,
  sharded,
)
from metajax.types import Episode, Examples, Task

__version__ = metadata.version("metajax")

__all__ = [
  "Episode",
  "Examples",
  "Info",
  "LearnerState",
  "Mean",
  "MetaGradient",
  "MetaLearner",
  "MetaState",
  "Model",
  "Step",
  "Sweep",
  "Task",
  "batched",
  "combine",
  "convolution",
  "cores_as_devices",
  "cycling",
  "data",
  "evaluate",
  "first_slot",
  "fomaml",
  "inductive",
  "inner_step",
  "inner_update",
  "losses",
  "maml",
  "map_tasks",
  "mean_and_interval",
  "meta_learner",
  "models",
  "per_device",
  "replacement",
  "reptile",
  "run",
  "sample_episodes",
  "separate_tail",
  "serial",
  "sharded",
  "shared_tail",
  "stateless",
  "sweep",
  "task_mesh",
  "theory",
  "transductive",
]
