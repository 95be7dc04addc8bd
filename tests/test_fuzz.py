"""Whatever the bytes and the numbers: something valid, or one line that says what is wrong."""

import gzip
import io

import jax
import numpy as np
import pytest
from archives import CHARACTERS, jpeg, png, write_omniglot, write_tar
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

import metajax
from experiments import build, cli
from experiments.recipes import Recipe
from experiments.settings import as_text
from metajax.data import DataError, class_folders, files, mini_imagenet, omniglot

RNG = np.random.default_rng(0)
SIZES = {"L": (105, 105), "RGB": (84, 84)}


def fuzz(examples):
  """The same examples in every run: a failure is one of the change at hand."""
  return settings(
    max_examples=examples,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
  )


def one_line(error):
  assert str(error) and "\n" not in str(error) and len(str(error)) < 400


# A mutation is a place, as a fraction of the whole, and what happens there.
MUTATIONS = st.lists(
  st.tuples(
    st.floats(0, 1, exclude_max=True),
    st.one_of(
      st.tuples(st.just("flip"), st.integers(1, 255)),
      st.tuples(st.just("write"), st.binary(min_size=1, max_size=12)),
      st.tuples(st.just("insert"), st.binary(min_size=1, max_size=12)),
      st.tuples(st.just("remove"), st.integers(1, 600)),
      st.tuples(st.just("cut"), st.none()),
    ),
  ),
  min_size=1,
  max_size=3,
)


def mutated(content, mutations):
  content = bytearray(content)
  for place, (kind, what) in mutations:
    at = int(place * len(content))
    if kind == "flip" and content:
      content[at] ^= what
    elif kind == "write":
      content[at : at + len(what)] = what
    elif kind == "insert":
      content[at:at] = what
    elif kind == "remove":
      del content[at : at + what]
    elif kind == "cut":
      del content[at:]
  return bytes(content)


def mutations_of(content):
  return MUTATIONS.map(lambda changes: mutated(content, changes))


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
  """Sound archives of either kind, the tar also without its gzip."""
  folder = tmp_path_factory.mktemp("sound")
  write_omniglot(folder, {"train": ("a.zip", 2)}, drawings=2)
  write_tar(folder / "a.tar.gz", {f"train/n0{i}/{i}.jpg": bytes([i]) * 700 for i in range(4)})
  packed = {name: (folder / name).read_bytes() for name in ("a.zip", "a.tar.gz")}
  return {**packed, "a.tar": gzip.decompress(packed["a.tar.gz"])}


@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz", "a.tar"])
def test_any_archive_is_read_or_refused(name, archives, tmp_path):
  sound = archives[name]
  path = tmp_path / name

  @fuzz(250)
  @given(mutations_of(sound) | st.binary(max_size=2000))
  def check(content):
    path.write_bytes(content)
    try:
      found = list(files.read_archive(path, (".png", ".jpg")))
    except DataError as error:
      one_line(error)
    else:
      assert all(not inside.is_absolute() and ".." not in inside.parts for inside, _ in found)

  check()


@pytest.mark.parametrize(("mode", "sound"), [("L", png(RNG)), ("RGB", jpeg(RNG))])
def test_any_image_is_decoded_or_refused(mode, sound):
  @fuzz(300)
  @given(mutations_of(sound) | st.binary(max_size=300))
  def check(content):
    try:
      image = files.decode_image(content, "it", size=SIZES[mode], mode=mode)
    except DataError as error:
      one_line(error)
    else:
      assert image.dtype == np.uint8 and image.shape[:2] == SIZES[mode][::-1]

  check()


def test_any_omniglot_archive_has_all_its_drawings_or_none(tmp_path, monkeypatch):
  few = {"train": (CHARACTERS["train"][0], 1)}
  monkeypatch.setattr(omniglot, "ARCHIVES", few)
  path = write_omniglot(tmp_path / "zips", few) / few["train"][0]
  sound = path.read_bytes()

  @fuzz(100)
  @given(MUTATIONS)
  def check(changes):
    path.write_bytes(mutated(sound, changes))
    try:
      records = list(omniglot._read_records("train", path))
    except DataError as error:
      one_line(error)
    else:
      ((_, record),) = records
      assert record["drawings"].shape == (omniglot.DRAWINGS, 28, 28)

  check()


def test_any_cache_is_loaded_or_refused(tmp_path):
  file, path = io.BytesIO(), tmp_path / "cache.npz"
  images, labels = np.zeros((2, 84, 84, 3), np.uint8), np.array(["a", "b"])
  parts = {
    f"{part}_{what}": array
    for part in ("train", "test")
    for what, array in (("images", images), ("labels", labels), ("unreadable", labels[:0]))
  }
  np.savez(file, **parts)
  # Mutations at the edges, where names and shapes are: the middle is pixels, and has a checksum.
  sound = file.getvalue()

  @fuzz(150)
  @given(MUTATIONS, st.booleans())
  def check(changes, at_the_end):
    cut = len(sound) - 1500 if at_the_end else 400
    head, tail = sound[:cut], sound[cut:]
    path.write_bytes(head + mutated(tail, changes) if at_the_end else mutated(head, changes) + tail)
    try:
      found = class_folders.load_cache(path, mini_imagenet.FORMAT)
    except DataError as error:
      one_line(error)
    else:
      assert found["train"].pixels.shape == found["test"].pixels.shape == images.shape

  check()


LABEL = st.integers(-(2**63), 2**63 - 1)
NUMBER = st.one_of(st.floats(), st.integers(-(2**63), 2**63 - 1))


@fuzz(200)
@given(
  st.lists(st.tuples(NUMBER, LABEL), max_size=4)
  | st.lists(st.tuples(NUMBER | st.none() | st.text(max_size=2), LABEL | NUMBER), max_size=4)
)
def test_any_arrays_become_classes_or_are_refused(rows):
  inputs, labels = [one for one, _ in rows], [label for _, label in rows]
  try:
    classes = metajax.data.few_shot.from_arrays(inputs, labels)
  except ValueError as error:
    one_line(error)
  else:
    assert np.all(np.isfinite(classes.inputs)) and np.sum(classes.sizes) == len(inputs)


# Flags

CHOICES = {
  "algorithm": [
    "reptile",
    "fomaml",
    "maml",
    "combine",
    "joint",
    "scratch",
    "multi_step",
    "annealed",
    "meta_sgd",
    "layer_rates",
    "imaml",
    "prototypical",
    "reptil",
  ],
  "tail": ["shared", "separate"],
  "minibatches": ["cycling", "replacement"],
  "inner_optimizer": ["adam", "sgd"],
  "inner_state": ["carried", "fresh"],
  "loss_reduction": ["sum", "mean", "max"],
  "outer_optimizer": ["sgd", "adam"],
  "execution": ["sharded", "vmap", "serial", "chunked"],
  "network": ["paper", "finn"],
}
COUNTS = (
  "ways", "train_shots", "tail_shots", "inner_batch", "inner_steps", "meta_batch", "eval_steps",
  "eval_queries", "eval_every", "curve_tasks", "steps_per_call", "meta_steps", "eval_tasks",
)  # fmt: skip
RATES = ("inner_rate", "inner_eps_root", "outer_rate", "outer_rate_final")
NUMBERS = ["1", "2", "3", "0.5", "-1", "0", "nan", "1e99", "x", "", "99999999999999999999"]
COUNT = st.one_of(st.integers(1, 6), st.integers(-1, 12), st.sampled_from([2**31, 10**30]))
RATE = st.one_of(st.floats(1e-6, 1.0), st.floats())
SEVERAL = st.one_of(st.just(("1",)), st.lists(st.sampled_from(NUMBERS), max_size=4).map(tuple))
FLAGS = st.fixed_dictionaries(
  {},
  optional={
    **{name: st.sampled_from(values) for name, values in CHOICES.items()},
    **{name: COUNT for name in COUNTS},
    **{name: RATE for name in RATES},
    **{name: st.one_of(st.none(), COUNT) for name in ("chunk", "filters")},
    "outer_clip": st.one_of(st.none(), RATE),
    "weights": st.one_of(st.none(), SEVERAL),
    "eval_shots": SEVERAL,
    "eval_batch": SEVERAL,
    "curve_splits": st.lists(st.sampled_from(["train", "test", "validation"]), max_size=3).map(
      tuple
    ),
    "seed": st.integers(),
    "seeds": COUNT,
  },
)


@fuzz(400)
@given(FLAGS)
def test_any_flags_pass_or_are_refused(flags):
  """As the command line has them: each is text."""
  try:
    cli.parse(
      [f"--{name}={as_text(value)}" for name, value in flags.items()], (Recipe(), cli.Run())
    )
  except ValueError as error:
    one_line(error)


# Flags that are more often sound: small numbers, and of choices only those that there are.
SMALL = st.integers(1, 4)
SOUND = st.fixed_dictionaries(
  {
    **{name: st.sampled_from(values[:2]) for name, values in CHOICES.items()},
    "execution": st.sampled_from(CHOICES["execution"]),
    **{name: SMALL for name in ("tail_shots", "inner_batch", "meta_batch", "eval_steps")},
    "ways": st.integers(2, 4),
    "train_shots": st.integers(2, 6),
    "inner_steps": st.integers(1, 3),
    "inner_eps_root": st.sampled_from([1e-8, 0.0]),
    "chunk": st.one_of(st.none(), SMALL),
    "filters": SMALL,
    "eval_batch": SMALL.map(lambda size: (size,)),
  }
)


@pytest.mark.parametrize("algorithm", CHOICES["algorithm"][:-1])
def test_flags_that_pass_can_be_traced(algorithm, linear_network):
  images, labels = np.zeros((80, 28, 28, 1), np.uint8), np.repeat(np.arange(8), 10)
  classes = metajax.data.few_shot.from_arrays(images, labels)
  splits = metajax.data.Splits(classes, None, classes)
  key, mesh = jax.random.key(0), metajax.task_mesh()

  @fuzz(3)  # of those that pass
  @given(SOUND)
  def check(flags):
    if algorithm == "combine":
      flags["weights"] = (-1.0, 0.5, 2.0)[: flags["inner_steps"]]
    if algorithm == "scratch":
      flags["meta_steps"] = 1
    try:
      chosen = Recipe(**flags | {"algorithm": algorithm})
    except ValueError as error:
      one_line(error)
      reject()
    experiment = build.build(chosen, splits, mesh)
    params = jax.eval_shape(experiment.model.init, key)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), params)
    state = experiment.learner.init(params)
    run = metajax.run(experiment.learner, experiment.sample_task, experiment.make_episode, 1)
    jax.eval_shape(run, state, key)
    (evaluation,) = experiment.evaluations["test"].values()
    judge = metajax.evaluation.judge_part(*evaluation, num_tasks=2)
    jax.eval_shape(judge, state, key, np.int32(0))

  check()
