"""The settings of a few-shot run, and recipes for all cells of the paper's Tables 1 and 2."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from experiments.settings import Settings, as_text, in_float32, option


# fmt: off
@dataclass(frozen=True, kw_only=True)
class Training(Settings):
  """What is trained and how. A run folder belongs to one choice of these."""

  dataset: Literal[
    "glyphs", "omniglot", "mini_imagenet", "cifar_fs", "fc100", "folder"] = option("glyphs",
    "Where the tasks come from. The library draws glyphs itself, so they need no data. folder is "
    "your own images: --data_dir holds a folder for each class.")
  image_size: int | None = option(None,
    "Height and width in pixels to which the images of --dataset=folder are resized.", at_least=1)
  image_mode: Literal["L", "RGB"] | None = option(None,
    "Whether the images of --dataset=folder are read as gray (L) or, by default, RGB.")
  min_examples: int | None = option(None,
    "Classes of --dataset=folder with fewer images are left out.", at_least=1)
  unreadable: Literal["refuse", "skip"] | None = option(None,
    "What happens if a file of --dataset=folder cannot be read as an image: it is an error "
    "(refuse, the default), or it is skipped (skip).")
  omniglot_protocol: Literal["pooled", "alphabets"] = option("pooled",
    "The paper's random 1200 and 423 characters, or the background and evaluation alphabets.")
  algorithm: Literal["reptile", "fomaml", "maml", "combine", "joint", "scratch", "anil", "boil",
    "meta_sgd", "layer_rates", "multi_step", "annealed", "imaml", "cavia",
    "prototypical"] = option("reptile",
    "combine sums the inner optimizer's updates with --weights. joint is Reptile with one inner "
    "step, which for SGD is joint training on all tasks. scratch learns no parameters. anil adapts "
    "the last layer only, boil all others. meta_sgd learns a rate for each number, layer_rates one "
    "for each array of parameters. multi_step begins with the loss after every inner step, "
    "annealed with FOMAML, and both become MAML. imaml takes implicit gradients, cavia adapts a "
    "context, and prototypical compares with the mean of each class. docs/algorithms.md explains "
    "them.")
  early_steps: int | None = option(None,
    "After how many meta-steps multi_step and annealed become MAML; by default half of all.",
    at_least=0)
  strength: float | None = option(None,
    "lambda, how strongly the inner steps of imaml are drawn towards their start; by default 1.",
    above=0)
  weights: tuple[float, ...] | None = option(None,
    "The weights of combine, one for each of --inner_steps.")
  ways: int = option(5, "Classes in a task.", at_least=2)
  train_shots: int = option(10,
    "Examples of each class in a training task, those of the tail included.", at_least=1)
  tail: Literal["shared", "separate"] = option("shared",
    "Whether the last minibatch is drawn like the others (shared), or consists of --tail_shots "
    "examples of each class that are held back (separate).")
  tail_shots: int = option(1,
    "Examples of each class that are held back for a separate tail.", at_least=1)
  minibatches: Literal["cycling", "replacement"] = option("cycling",
    "How training minibatches are drawn: cycling uses every example once before any is used again, "
    "and replacement draws each minibatch independently.")
  inner_optimizer: Literal["adam", "sgd"] = option("adam", "Adam has beta1 = 0, beta2 = 0.999.")
  inner_rate: float = option(1e-3,
    "The inner learning rate alpha; with meta_sgd and layer_rates, the one that learning begins "
    "with.", above=0)
  inner_eps_root: float = option(0.0,
    "Adam's eps_root. MAML through Adam needs one above 0.", not_below=0)
  inner_state: Literal["carried", "fresh"] = option("carried",
    "Whether the inner optimizer's state is carried from task to task. SGD has none.")
  inner_batch: int = option(10, "Examples in an inner minibatch.", at_least=1)
  inner_steps: int = option(5,
    "k, the number of minibatches of a training task. reptile takes an inner step on each; fomaml, "
    "maml and their like take k - 1, and use the last minibatch, the tail, for the outer loss.",
    at_least=1)
  least_steps: int | None = option(None,
    "If it is given, training tasks take different numbers of inner steps, from this one up to all "
    "that come before the tail. (reptile and combine take one more, on the tail.)", at_least=1)
  least_shots: int | None = option(None,
    "If it is given, training tasks adapt to different numbers of examples of each class, from "
    "this one up to all that are not in a separate tail.", at_least=1)
  loss_reduction: Literal["sum", "mean"] = option("sum",
    "Whether the loss is the sum or the mean over the examples of a minibatch. This scales the "
    "steps of SGD, and hardly those of Adam.")
  outer_optimizer: Literal["sgd", "adam"] = option("sgd",
    "Its gradient is, for reptile and joint, the parameters before the inner steps minus those "
    "after them; for fomaml and maml that of the last loss, and for combine the weighted sum.")
  outer_rate: float = option(1.0,
    "The outer learning rate at the start. It changes to --outer_rate_final, which recipes set "
    "too.", above=0)
  outer_rate_final: float = option(0.0,
    "The outer learning rate at the end.", not_below=0)
  outer_schedule: Literal["linear", "cosine"] = option("linear",
    "How the outer learning rate changes from the first to the last.")
  outer_clip: float | None = option(None,
    "Clips every entry of the outer gradient to [-outer_clip, outer_clip].", above=0)
  meta_batch: int = option(5, "T, the tasks of a meta-step.", at_least=1)
  meta_steps: int = option(600, "The number of meta-steps.", at_least=1)
  execution: Literal["sharded", "vmap", "serial", "chunked"] = option("sharded",
    "How the tasks of a meta-batch run: spread over all devices, or on one device all at once, one "
    "after another, or --chunk at a time. With serial, one carried inner state serves all tasks; "
    "otherwise each place in the meta-batch has its own.")
  network: Literal["paper", "finn", "conv4", "resnet12"] = option("paper",
    "The paper's network for the data set, or that of Finn et al. (2017). conv4 and resnet12 take "
    "images of any size; cifar_fs, fc100 and folder need one of them.")
  filters: int | None = option(None,
    "Filters of every convolution; by default those of the paper, or 64 in conv4.", at_least=1)
  adapt_norm: bool = option(True,
    "Whether inner steps move the scales and offsets of batch normalization. In Finn et al., where "
    "there are offsets only, they do not. Reptile never learns what they do not move.")
  seed: int = option(0, "Determines everything random.", at_least=0)
  data_seed: int | None = option(None,
    "Determines the split of the data and the tasks that learners are judged on; by default "
    "--seed. If it is given, several --seeds differ only in initialization and training.",
    at_least=0)
  eval_every: int = option(200,
    "Meta-steps between two points of the learning curve. The state is saved at each.", at_least=1)
  curve_tasks: int = option(50, "Tasks of each split at each point of the curve.", at_least=2)
  curve_splits: tuple[str, ...] = option(("train", "test"),
    "The tasks that the learning curve is measured on: one or more of train, validation and test, "
    "separated by commas. The best checkpoint is chosen on validation tasks, or without them on "
    "training tasks. It is never chosen on test tasks, so that with test alone there is none.",
    among=("train", "validation", "test"))


@dataclass(frozen=True, kw_only=True)
class Judging(Settings):
  """How a learner is judged. With --judge, it is judged again with other values of these."""

  eval_shots: tuple[int, ...] = option((5,),
    "Examples of each class to adapt on. Several numbers are judged one by one.", at_least=1)
  eval_batch: tuple[int, ...] = option((5,),
    "Examples in a minibatch: one number, or one for each of --eval_shots.", at_least=1)
  eval_steps: int = option(50,
    "The inner steps by which a learner adapts when it is judged.", at_least=1)
  eval_queries: int = option(1, "Test examples of each class.", at_least=1)
  eval_tasks: int = option(300, "Test tasks of the final result.", at_least=2)


@dataclass(frozen=True, kw_only=True)
class Cost(Settings):
  """What changes only where and how fast a run computes; it may differ when a run is resumed."""

  data_dir: str | None = option(None,
    "Folder with the archives or the images of the data set. Without it, Omniglot is downloaded.")
  cache_dir: str | None = option(None,
    "Where prepared data is kept; by default $METAJAX_CACHE, or metajax in $XDG_CACHE_HOME or "
    "~/.cache.")
  chunk: int | None = option(None,
    "Tasks that run at once: with chunked, by default one; with sharded on each device, by default "
    "one on CPU and all elsewhere.", at_least=1)
  convolution: Literal["cpu", "patches", "xla"] | None = option(None,
    "How to convolve; by default whichever is faster on this backend.")
  steps_per_call: int = option(25,
    "Meta-steps in one call of the compiled loop, between two updates of the progress bar.",
    at_least=1)
  track: tuple[str, ...] | None = option(None,
    "tensorboard, wandb or both: the learning curve and the images of a task are sent there as "
    "well. TensorBoard's files are in OUT/tensorboard.", among=("tensorboard", "wandb"))
# fmt: on


@dataclass(frozen=True, kw_only=True)
class Recipe(Training, Judging, Cost):
  """One few-shot run."""

  def __post_init__(self) -> None:
    super().__post_init__()
    for name in ("meta_steps", "eval_tasks", "curve_tasks"):
      if getattr(self, name) >= 2**31:
        raise ValueError(f"--{name}={getattr(self, name)} must be below 2^31, to be counted")
    self.shots_and_batches  # noqa: B018, raises what is wrong with them
    self._check_data()
    self._check_inner_loop()
    if self.chunk is not None and self.execution not in ("chunked", "sharded"):
      raise ValueError(
        f"--chunk is of no use with --execution={self.execution}: leave it out, or use "
        "--execution=chunked"
      )
    if self.chunk is not None and self.chunk > self.meta_batch:
      raise ValueError(f"--chunk={self.chunk} must be from 1 to --meta_batch={self.meta_batch}")

  def _check_data(self) -> None:
    any_size = self.network in ("conv4", "resnet12")
    if self.dataset == "folder" and not (any_size and self.image_size):
      raise ValueError(
        "--dataset=folder needs --data_dir, --image_size, such as 28 or 84, and --network=conv4 or "
        "--network=resnet12"
      )
    if self.dataset not in ("glyphs", "omniglot", "mini_imagenet") and not any_size:
      raise ValueError(f"--dataset={self.dataset} needs --network=conv4 or --network=resnet12")
    if self.network == "resnet12" and self.filters is not None:
      raise ValueError("--filters is of no use with --network=resnet12: leave it out")
    if self.dataset == "glyphs" and self.data_dir is not None:
      raise ValueError(
        "--data_dir is of no use with --dataset=glyphs, which the library draws itself: name the "
        "data, as --dataset=omniglot or --dataset=folder, or leave --data_dir out"
      )
    if self.omniglot_protocol != "pooled" and self.dataset != "omniglot":
      raise ValueError("--omniglot_protocol applies to --dataset=omniglot only: leave it out")
    if self.dataset == "folder":
      return
    for name in ("image_size", "image_mode", "min_examples", "unreadable"):
      if getattr(self, name) is not None:
        raise ValueError(f"--{name} applies to --dataset=folder only: leave it out")

  @property
  def data_name(self) -> str:
    """What the data is called in results."""
    return Path(self.data_dir or "").resolve().name if self.dataset == "folder" else self.dataset

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """Height, width and channels of the images."""
    if self.image_size is not None:
      return self.image_size, self.image_size, 1 if self.image_mode == "L" else 3
    sizes = {"mini_imagenet": (84, 84, 3), "cifar_fs": (32, 32, 3), "fc100": (32, 32, 3)}
    return sizes.get(self.dataset, (28, 28, 1))

  def _check_inner_loop(self) -> None:
    if (self.algorithm == "combine") != (self.weights is not None):
      raise ValueError("--weights and --algorithm=combine go together")
    if self.weights is not None:
      if not all(math.isfinite(weight) for weight in self.weights):
        raise ValueError(f"--weights={as_text(self.weights)} must be numbers separated by commas")
      if len(self.weights) != self.inner_steps:
        raise ValueError(
          f"--weights has {len(self.weights)} numbers for --inner_steps={self.inner_steps}: "
          "give one for each"
        )
    if self.tail == "shared" and self.tail_shots != 1:
      raise ValueError(
        "--tail_shots applies to --tail=separate only: use that, or leave --tail_shots out"
      )
    if self.held_back >= self.train_shots:
      raise ValueError(
        f"--tail_shots={self.held_back} leaves none of --train_shots={self.train_shots} to adapt "
        "on: raise --train_shots"
      )
    if self.tail == "separate" and (self.inner_steps < 2 or self.algorithm == "joint"):
      raise ValueError(
        "--tail=separate takes the last of --inner_steps minibatches, and there is only one: "
        + ("" if self.algorithm == "joint" else "use --inner_steps=2 or more, or ")
        + "use --tail=shared"
      )
    examples = self.ways * (self.train_shots - self.held_back)
    if self.minibatches == "replacement" and self.inner_batch > examples:
      raise ValueError(
        f"--inner_batch={self.inner_batch} cannot be drawn without duplicates from {examples} "
        "training examples: lower it, or use --minibatches=cycling"
      )
    self._check_algorithm()

  def _check_algorithm(self) -> None:
    given = f"--algorithm={self.algorithm}"
    if self.inner_eps_root and self.inner_optimizer != "adam":
      raise ValueError("--inner_eps_root applies to --inner_optimizer=adam only: leave it out")
    through_adam = self.algorithm in _SECOND_ORDER and self.inner_optimizer == "adam"
    if through_adam and in_float32(self.inner_eps_root) == 0:
      raise ValueError(
        f"{given} through --inner_optimizer=adam gives NaN where a gradient is 0: "
        "set --inner_eps_root, say to 1e-8, or use --inner_optimizer=sgd"
      )
    plain_sgd = self.inner_optimizer == "sgd" and self.adapt_norm
    if self.algorithm in ("meta_sgd", "layer_rates") and not plain_sgd:
      raise ValueError(
        f"{given} learns the rates of SGD: use --inner_optimizer=sgd and --adapt_norm"
      )
    if self.algorithm == "imaml" and self.inner_state != "fresh":
      raise ValueError(f"{given} begins each task with a new state: use --inner_state=fresh")
    if self.algorithm == "imaml" and not self.adapt_norm:
      raise ValueError(f"{given} adapts all parameters: use --adapt_norm")
    if self.algorithm in ("cavia", "prototypical") and not self.adapt_norm:
      raise ValueError(f"{given} adapts no parameters: leave out --noadapt_norm")
    if self.algorithm == "cavia" and self.network in ("resnet12", "finn"):
      raise ValueError(
        f"{given} scales and shifts the third of four layers: use --network=paper or conv4"
      )
    if self.inner_steps < 2 and self.algorithm not in _OF_ONE_STEP:
      raise ValueError(
        f"{given} takes the last of --inner_steps minibatches as its tail, which leaves no inner "
        "step: use --inner_steps=2 for one inner step"
      )
    if self.algorithm == "prototypical" and self.tail == "shared":
      raise ValueError(f"{given} compares the tail with the other examples: use --tail=separate")
    if self.algorithm == "scratch" and self.meta_steps > 1:
      raise ValueError(f"{given} learns nothing: use --meta_steps=1")
    if self.early_steps is not None and self.algorithm not in ("multi_step", "annealed"):
      raise ValueError(
        "--early_steps applies to --algorithm=multi_step and annealed only: leave it out"
      )
    if self.early_steps is not None and self.early_steps >= self.meta_steps:
      raise ValueError(
        f"{given} would never become MAML: --early_steps={self.early_steps} must be below "
        f"--meta_steps={self.meta_steps}"
      )
    if (self.least_steps or self.least_shots) and self.algorithm in ("joint", "prototypical"):
      raise ValueError(
        f"--least_steps and --least_shots are of no use with {given}: leave them out"
      )
    if self.strength is not None and self.algorithm != "imaml":
      raise ValueError("--strength applies to --algorithm=imaml only: leave it out")
    if self.least_steps is not None and self.least_steps > self.inner_steps - 1:
      raise ValueError(
        f"--least_steps={self.least_steps} is more than the {self.inner_steps - 1} inner steps "
        "before the tail: lower it, or raise --inner_steps"
      )
    if self.least_shots is not None:
      if self.minibatches != "cycling":
        raise ValueError(
          "--least_shots needs --minibatches=cycling: change that, or leave --least_shots out"
        )
      if self.least_shots > self.train_shots - self.held_back:
        raise ValueError(f"--least_shots={self.least_shots} is more than there are: lower it")

  @property
  def switch_at(self) -> int:
    """The meta-steps after which multi_step and annealed become MAML."""
    return self.meta_steps // 2 if self.early_steps is None else self.early_steps

  @property
  def held_back(self) -> int:
    """Examples of each class that only the tail sees."""
    return self.tail_shots if self.tail == "separate" else 0

  @property
  def seed_of_data(self) -> int:
    return self.seed if self.data_seed is None else self.data_seed

  @property
  def shots_and_batches(self) -> list[tuple[int, int]]:
    """For every evaluation, the examples of each class and those of a minibatch."""
    shots, batches = self.eval_shots, self.eval_batch
    if len(set(shots)) < len(shots):
      raise ValueError(f"--eval_shots={as_text(shots)} must be different numbers")
    if len(batches) not in (1, len(shots)):
      raise ValueError(
        f"--eval_batch={as_text(batches)} must be one number, or one for each of "
        f"--eval_shots={as_text(shots)}"
      )
    return list(zip(shots, batches * len(shots) if len(batches) == 1 else batches, strict=True))


_OF_ONE_STEP = ("reptile", "combine", "joint", "scratch")  # which can do without inner steps
_SECOND_ORDER = ("maml", "anil", "boil", "meta_sgd", "layer_rates", "multi_step", "annealed",
  "cavia")  # fmt: skip


def _reptile(dataset: Any, ways: int, **changes: Any) -> Recipe:
  """A row of Nichol et al., Appendix A."""
  return Recipe(
    dataset=dataset,
    ways=ways,
    eval_shots=(1, 5),
    eval_every=2_000,
    eval_tasks=10_000,
    curve_tasks=100,
    **changes,
  )


def _finn(
  dataset: Any, ways: int, shots: int, algorithm: Any, queries: int, clip: float | None, **row: Any
) -> Recipe:
  """A row of Finn et al. (2017) and their code, with these differences of convention.

  Their loss is `ways` times the mean over a minibatch, so that the rate on the mean is larger by as
  much. Each of their updates takes the whole support set, and then comes the loss on the queries: k
  is their number of updates plus 1. They clip the gradient of a loss that is the sum over the
  queries, divided by the shots.
  """
  return Recipe(
    dataset=dataset,
    ways=ways,
    algorithm=algorithm,
    train_shots=shots + queries,
    tail="separate",
    tail_shots=queries,
    inner_optimizer="sgd",
    inner_batch=ways * shots,
    loss_reduction="mean",
    outer_optimizer="adam",
    outer_rate=1e-3,
    outer_rate_final=1e-3,
    outer_clip=None if clip is None else round(clip * shots / (ways * queries), 6),
    network="finn",
    adapt_norm=False,
    meta_steps=60_000,
    eval_shots=(shots,),
    eval_batch=(ways * shots,),
    eval_queries=shots,
    eval_tasks=600,
    eval_every=2_000,
    curve_tasks=100,
    **row,
  )


_ALL_SPLITS = ("train", "validation", "test")  # of mini-ImageNet

# fmt: off
_REPTILE = {
  "omniglot_5way": _reptile("omniglot", 5, meta_steps=100_000),
  "omniglot_20way": _reptile("omniglot", 20, meta_steps=200_000,
    inner_batch=20, inner_steps=10, inner_rate=5e-4, eval_batch=(10,)),
  "mini_imagenet_5way": _reptile("mini_imagenet", 5, meta_steps=100_000,
    train_shots=15, inner_steps=8, eval_batch=(5, 15), steps_per_call=5, curve_splits=_ALL_SPLITS),
}
_OMNIGLOT_5WAY = {"inner_rate": 2.0, "inner_steps": 2, "eval_steps": 3, "meta_batch": 32}
_OMNIGLOT_20WAY = {"inner_rate": 2.0, "inner_steps": 6, "eval_steps": 5, "meta_batch": 16}
_MINI_IMAGENET = {"inner_rate": 0.05, "inner_steps": 6, "eval_steps": 10, "steps_per_call": 10,
  "curve_splits": _ALL_SPLITS}
_FINN = {
  f"{dataset}_{shots}shot_{ways}way_{algorithm}":
    _finn(dataset, ways, shots, algorithm, queries, clip, **row)
  for dataset, ways, shots, queries, clip, row in (
    ("omniglot", 5, 1, 1, None, _OMNIGLOT_5WAY),
    ("omniglot", 5, 5, 5, None, _OMNIGLOT_5WAY),
    ("omniglot", 20, 1, 1, None, _OMNIGLOT_20WAY),
    ("omniglot", 20, 5, 5, None, _OMNIGLOT_20WAY),
    ("mini_imagenet", 5, 1, 15, 10.0, {**_MINI_IMAGENET, "meta_batch": 4}),
    ("mini_imagenet", 5, 5, 15, 10.0, {**_MINI_IMAGENET, "meta_batch": 2}),
  )
  for algorithm in ("maml", "fomaml")
}
# fmt: on

# Plain SGD inside and out, a task at a time: the setting of Figures 3 and 4.
PLAIN_SGD = Recipe(
  dataset="omniglot",
  algorithm="combine",
  weights=(1.0,),
  inner_optimizer="sgd",
  inner_rate=0.003,
  inner_steps=1,
  outer_rate=0.25,
  meta_batch=1,
  meta_steps=40_000,
  execution="serial",
  steps_per_call=50,
  eval_batch=(25,),
  eval_steps=5,
  eval_tasks=1_000,
  curve_splits=("test",),
)


def _of_family(algorithm: Any, **changes: Any) -> Recipe:
  """5-way 1-shot Omniglot with the paper's network, by 16 gradients of losses in each meta-step.

  Unless `changes` say otherwise, a task has three inner steps on its five examples, and the loss of
  five others.
  """
  settings: dict[str, Any] = {
    "train_shots": 2,
    "tail": "separate",
    "tail_shots": 1,
    "inner_optimizer": "sgd",
    "inner_rate": 0.1,
    "inner_state": "fresh",
    "inner_batch": 5,
    "inner_steps": 4,
    "loss_reduction": "mean",
    "outer_optimizer": "adam",
    "outer_rate": 1e-3,
    "outer_schedule": "cosine",
    "meta_batch": 4,
    "meta_steps": 5_000,
    "eval_steps": 3,
  }
  return Recipe(
    dataset="omniglot",
    algorithm=algorithm,
    execution="serial",
    eval_shots=(1,),
    eval_every=500,
    eval_tasks=1_000,
    curve_tasks=100,
    **settings | changes,
  )


_AS_REPTILE = {
  "train_shots": 10,
  "tail": "shared",
  "inner_optimizer": "adam",
  "inner_rate": 1e-3,
  "inner_state": "carried",
  "inner_batch": 10,
  "loss_reduction": "sum",
  "outer_optimizer": "sgd",
  "outer_rate": 1.0,
  "outer_schedule": "linear",
  "eval_steps": 50,
}
FAMILY: dict[str, Recipe] = {
  "reptile": _of_family("reptile", **_AS_REPTILE),
  "fomaml": _of_family("fomaml"),
  "maml": _of_family("maml"),
  "annealed": _of_family("annealed"),
  "multi_step": _of_family("multi_step"),
  "meta_sgd": _of_family("meta_sgd"),
  "layer_rates": _of_family("layer_rates"),
  "anil": _of_family("anil"),
  "boil": _of_family("boil"),
  "cavia": _of_family("cavia", inner_rate=10.0),
  "imaml": _of_family("imaml"),
  "prototypical": _of_family("prototypical", meta_batch=16),
  "joint": _of_family("joint", **_AS_REPTILE | {"meta_batch": 16}),
  "scratch": _of_family("scratch", **_AS_REPTILE | {"meta_steps": 1}),
}

PRESETS: dict[str, Recipe] = {
  "glyphs_5way_reptile": Recipe(),
  **{f"{name}_reptile": recipe for name, recipe in _REPTILE.items()},
  **_FINN,
  **{f"family_{name}": recipe for name, recipe in FAMILY.items()},
}
