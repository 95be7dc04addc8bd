"""Bad flags, broken data, misuse of the library: one line says what is wrong and what to change."""

import gzip
import io
import os
import re
import runpy
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from archives import CHARACTERS, jpeg, png, write_omniglot, write_tar
from PIL import Image
from problems import TINY, episode, examples, softmax_loss, weights

import metajax
from experiments import build, cli, combinations, expansions, few_shot, overlap, runs, sine
from experiments.recipes import Recipe
from metajax import models, variants
from metajax.data import DataError, files, glyphs, mini_imagenet, omniglot

ROOT = Path(__file__).resolve().parents[1]
KEY = jax.random.key(0)


def refused(action, pattern, kind=ValueError):
  """The action ends in one line that matches."""
  with pytest.raises(kind) as error:
    action()
  message = str(error.value)
  assert "\n" not in message and len(message) < 400  # folders of a test have long names
  assert re.search(pattern, message), message


def content_of(folder):
  return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def cases(table):
  """Rows `(name, ..., pattern)` as parameters under their names."""
  return [pytest.param(*row, id=name) for name, *row in table]


# Settings of few_shot

SEPARATE, COMBINE = {"tail": "separate"}, {"algorithm": "combine"}
MAML, CHUNKED = {"algorithm": "maml"}, {"execution": "chunked"}
RATES, SGD = {"algorithm": "meta_sgd"}, {"inner_optimizer": "sgd"}
IMAML = {"algorithm": "imaml", "inner_state": "fresh"}
LOSSES = {"algorithm": "multi_step", "inner_optimizer": "sgd"}

FEW_SHOT = [
  ("one way", {"ways": 1}, "--ways=1 must be at least 2"),
  ("no shots", {"eval_shots": (0,)}, "--eval_shots=0 must be at least 1"),
  ("shots twice", {"eval_shots": (1, 1)}, "--eval_shots=1,1 must be different numbers"),
  ("shots in words", {"eval_shots": ("five",)}, "--eval_shots=five must be whole numbers"),
  ("empty shots", {"eval_shots": ()}, "--eval_shots= must be whole numbers separated by"),
  ("half a shot", {"eval_shots": (1.5,)}, "--eval_shots=1.5 must be whole numbers"),
  ("batches for shots", {"eval_batch": (3, 5)}, "--eval_batch=3,5 must be one number, or one"),
  ("an empty minibatch", {"eval_batch": (0,)}, "--eval_batch=0 must be at least 1"),
  ("unknown split", {"curve_splits": ("tset",)}, "--curve_splits=tset must be any of train"),
  ("no split", {"curve_splits": ()}, "--curve_splits= must be names separated by commas"),
  ("no weights", COMBINE, "--weights and --algorithm=combine go together"),
  ("idle weights", {"weights": (1.0, 1.0)}, "--weights and --algorithm=combine go together"),
  ("few weights", {**COMBINE, "weights": (1.0,)}, "1 numbers for --inner_steps=2: give one for"),
  ("infinite weight", {**COMBINE, "weights": (1, float("inf"))}, "--weights=1,inf must be numbers"),
  ("huge weight", {**COMBINE, "weights": (1.0, 1e99)}, "weights must be a vector of finite"),
  ("negative seed", {"seed": -1}, "--seed=-1 must be at least 0"),
  ("seed too large", {"seed": 2**32}, r"--seed=4294967296 must be below 2\^32"),
  ("no meta-steps", {"meta_steps": 0}, "--meta_steps=0 must be at least 1"),
  ("uncountable", {"meta_steps": 2**31}, r"--meta_steps=2147483648 must be below 2\^31"),
  ("uncountable tasks", {"eval_tasks": 2**40}, r"--eval_tasks=\d+ must be below 2\^32"),
  ("no meta-batch", {"meta_batch": 0}, "--meta_batch=0 must be at least 1"),
  ("negative minibatch", {"inner_batch": -3}, "--inner_batch=-3 must be at least 1"),
  ("no inner step", {"inner_steps": 0}, "--inner_steps=0 must be at least 1"),
  ("no training shot", {"train_shots": 0}, "--train_shots=0 must be at least 1"),
  ("no queries", {"eval_queries": 0}, "--eval_queries=0 must be at least 1"),
  ("no evaluation", {"eval_every": 0}, "--eval_every=0 must be at least 1"),
  ("no step a call", {"steps_per_call": 0}, "--steps_per_call=0 must be at least 1"),
  ("one test task", {"eval_tasks": 1}, "--eval_tasks=1 must be at least 2"),
  ("one curve task", {"curve_tasks": 1}, "--curve_tasks=1 must be at least 2"),
  ("rate of zero", {"inner_rate": 0.0}, "--inner_rate=0.0 must be positive and finite"),
  ("negative rate", {"inner_rate": -1e-3}, "--inner_rate=-0.001 must be positive and finite"),
  ("rate not a number", {"outer_rate": float("nan")}, "--outer_rate=nan must be positive"),
  ("infinite in float32", {"outer_rate": 1e40}, r"--outer_rate=1e\+40 must be positive and fin"),
  ("nothing in float32", {"inner_rate": 1e-50}, "--inner_rate=1e-50 must be positive"),
  ("negative clip", {"outer_clip": -1.0}, "--outer_clip=-1.0 must be positive"),
  ("negative end", {"outer_rate_final": -0.5}, "--outer_rate_final=-0.5 must be finite and"),
  ("negative eps", {"inner_eps_root": -1e-8}, "--inner_eps_root=-1e-08 must be finite and"),
  ("all in the tail", {**SEPARATE, "tail_shots": 3}, "leaves none of --train_shots=3 .* raise"),
  ("k = 1 and a tail", {**SEPARATE, "inner_steps": 1}, "only one: use --inner_steps=2 or more"),
  ("joint and a tail", {**SEPARATE, "algorithm": "joint"}, "only one: use --tail=shared$"),
  (
    "more than there is, without duplicates",
    {"minibatches": "replacement", "inner_batch": 10},
    "cannot be drawn without duplicates from 9 .* lower it, or use --minibatches=cycling",
  ),
  (
    "what the tail leaves",
    {"minibatches": "replacement", "inner_batch": 7, **SEPARATE},
    "without duplicates from 6 training examples",
  ),
  ("chunk too large", {**CHUNKED, "chunk": 3}, "--chunk=3 must be from 1 to --meta_batch=2"),
  ("chunk of none", {**CHUNKED, "chunk": 0}, "--chunk=0 must be at least 1"),
  ("idle chunk", {"execution": "vmap", "chunk": 1}, "no use with --execution=vmap: leave it out"),
  ("no filters", {"filters": 0}, "--filters=0 must be at least 1"),
  ("ways > classes", {"ways": 6}, "glyphs is too small: it has 5 test classes: lower --ways=6"),
  ("shots > examples", {"eval_shots": (20,)}, "takes 21 examples .*class 0 has 20: lower --eval"),
  ("MAML through Adam", MAML, "gives NaN .* set --inner_eps_root, say to 1e-8"),
  ("MAML, eps lost", {**MAML, "inner_eps_root": 1e-60}, "gives NaN .* set --inner_eps_root"),
  ("unknown data", {"dataset": "cifar"}, "--dataset=cifar must be one of glyphs, omniglot, mini"),
  ("unknown algorithm", {"algorithm": "mmal"}, "--algorithm=mmal must be one of reptile, fomaml"),
  ("ANIL through Adam", {"algorithm": "anil"}, "=anil through .*=adam gives NaN where a grad"),
  ("rates of Adam", {**RATES, "inner_eps_root": 1e-8}, "learns the rates of SGD: use --inner_opt"),
  ("rates, fixed norm", {**RATES, "inner_optimizer": "sgd", "adapt_norm": False}, "--adapt_norm"),
  ("carried iMAML", {"algorithm": "imaml"}, "with a new state: use --inner_state=fresh"),
  ("no inner loss", {**LOSSES, "inner_steps": 1}, "leaves no inner step: use --inner_steps=2"),
  ("no MAML", {**MAML, **SGD, "inner_steps": 1}, "its tail, .* no inner step: use --inner_steps=2"),
  ("no rates", {**RATES, **SGD, "inner_steps": 1}, "leaves no inner step: use --inner_steps=2"),
  ("prototypes of all", {"algorithm": "prototypical"}, "tail with the other examples: use --tail="),
  ("iMAML, fixed norm", {**IMAML, "adapt_norm": False}, "adapts all parameters: use --adapt_norm"),
  ("context of others", {"algorithm": "cavia", **SGD, "network": "finn"}, "use --network=paper or"),
  ("context, fixed norm", {"algorithm": "cavia", **SGD, "adapt_norm": False}, "leave out --noad"),
  ("strength of others", {"strength": 2.0}, "--strength applies to --algorithm=imaml only: leave"),
  ("no alphabets", {"omniglot_protocol": "alphabets"}, "applies to --dataset=omniglot only: leave"),
  ("shots of joint", {"algorithm": "joint", "least_shots": 1}, "are of no use with .*=joint"),
  ("idle training", {"algorithm": "scratch"}, "learns nothing: use --meta_steps=1"),
  ("idle early steps", {"early_steps": 3}, "--early_steps applies to --algorithm=multi_step and"),
  ("never MAML", {**LOSSES, "early_steps": 4}, "never become MAML: .*=4 must be below .*_steps=4"),
  ("idle tail", {"tail_shots": 2}, "--tail_shots applies to --tail=separate only: use that"),
  ("eps of SGD", {**SGD, "inner_eps_root": 1e-8}, "--inner_eps_root applies to .*=adam only"),
  ("glyphs of a folder", {"data_dir": "there"}, "the library draws itself: name the data, as"),
  ("too many steps", {"least_steps": 2}, "--least_steps=2 is more than the 1 inner steps before"),
  ("too many shots", {"least_shots": 4}, "--least_shots=4 is more than there are: lower it"),
  ("shots of others", {"least_shots": 1, "minibatches": "replacement"}, "or leave --least_sh"),
  ("unknown tail", {"tail": "long"}, "--tail=long must be one of shared, separate"),
  ("no download", {"dataset": "mini_imagenet"}, "cannot be downloaded .* give, as data_dir"),
  ("no folder", {"dataset": "omniglot", "data_dir": "/nowhere"}, "/nowhere is not a folder: give"),
  ("unwritable out", {"out": "/dev/null/run"}, "cannot be written .*: choose another folder"),
]  # fmt: skip


@pytest.mark.parametrize(("bad", "pattern"), cases(FEW_SHOT))
def test_bad_flags_are_refused_before_anything_is_written(
  bad, pattern, tmp_path, splits, monkeypatch
):
  if "dataset" not in bad:
    monkeypatch.setattr(build, "load", lambda recipe: splits)

  def prepare(out):
    changes = {name: value for name, value in bad.items() if name != "out"}
    runs.prepare(Recipe(**{**TINY, **changes}), bad.get("out", out))

  refused(lambda: prepare(tmp_path / "run"), pattern)
  assert not (tmp_path / "run").exists()

  there = tmp_path / "there"
  runs.open_folder(Recipe(**TINY), there).begin("data")
  (there / "result.json").write_text("{}")
  before = content_of(there)
  with pytest.raises(ValueError):
    prepare(there)
  assert content_of(there) == before


# Arguments of the binaries

GROUPS = {
  few_shot: (few_shot.Choice(), Recipe()),
  combinations: (combinations.Curves(), combinations.FIGURE),
  overlap: (overlap.Panels(), overlap.FIGURE),
  expansions: (expansions.Measurement(),),
  sine: (sine.Waves(),),
}
PLOT = "--plot_only"
BINARIES = [
  ("no seeds", few_shot, ["--seeds=0"], "--seeds=0 must be at least 1"),
  ("last seed", few_shot, ["--seed=4294967295", "--seeds=2"], r"=4294967296 must be below 2\^32"),
  ("draw and train", few_shot, [PLOT, "--fresh"], "--plot_only draws what .* give one of them"),
  (
    "judge and track",
    few_shot,
    ["--judge=newest", "--track=wandb"],
    "--judge trains nothing: leave",
  ),
  ("judge nothing", few_shot, ["--judge=newest"], "holds no checkpoints to judge: give the --out"),
  ("unknown curve", combinations, ["--curves=g9"], "--curves=g9 must be any of g1, mean2"),
  ("no curve", combinations, ["--curves="], "--curves= must be"),
  ("no test curve", combinations, ["--curve_splits=train"], "--curve_splits must have test"),
  ("draw what", combinations, [PLOT, "--out="], "give an --out"),
  ("no curve drawn", combinations, [PLOT], "holds no run to draw: train first"),
  ("no ways", combinations, ["--ways=0"], "--ways=0 must be at least"),
  ("empty minibatch", combinations, ["--inner_batch=0"], "--inner_batch=0 must be at least 1"),
  ("no panels", overlap, ["--panels="], "--panels= must be"),
  ("a panel twice", overlap, ["--panels=a,a"], "--panels=a,a must be any of .* each once"),
  ("nothing to draw", overlap, [PLOT], "holds no complete run to draw: train it"),
  ("negative rate", overlap, ["--outer_rate=-1"], "--outer_rate=-1.0 must be positive"),
  ("few examples", overlap, ["--train_shots=10"], "--panels=b has .* raise --train_shots, or"),
  ("no waves", expansions, ["--waves=0"], "--waves=0 must be at least 1"),
  ("no points", expansions, ["--points=-1"], "--points=-1 must be at least 1"),
  ("no meta-steps", sine, ["--meta_steps=0"], "--meta_steps=0 must be at least 1"),
  ("one task", sine, ["--eval_tasks=1"], "--eval_tasks=1 must be at least 2"),
  ("no wave drawn", sine, [PLOT], "holds no complete run to draw: train it first"),
  ("unwritable", sine, ["--out=/dev/null/x"], "cannot be written .*: choose another folder"),
]


@pytest.mark.parametrize(("module", "bad", "pattern"), cases(BINARIES))
def test_bad_arguments_are_refused_before_anything_is_written(module, bad, pattern, tmp_path):
  def program():
    arguments = [f"--out={tmp_path / 'run'}", *bad]
    *settings, run = cli.parse(arguments, (*GROUPS[module], cli.Run()))
    action = module.program(run, *settings)
    if isinstance(settings[0], few_shot.Choice) and settings[0].judge:
      action()

  refused(program, pattern)
  assert not (tmp_path / "run").exists()


LINES = [
  ("few_shot", "--ways=1", "few_shot: --ways=1 must be at least 2"),
  ("sine", "10", "sine: unexpected argument '10': flags start with --"),
  (
    "few_shot",
    "--dataset=cifar",
    "few_shot: flag --dataset=cifar: value should be one of "
    "<glyphs|omniglot|mini_imagenet|cifar_fs|fc100|folder>",
  ),
  ("overlap", "--outer_rate=0", "overlap: --outer_rate=0.0 must be positive and finite"),
  (
    "combinations",
    "--weights=1",
    "combinations: --weights is set by this experiment and cannot be overridden: remove it",
  ),
  (
    "family",
    "--chunk=1",
    "family: --chunk is set by this experiment and cannot be overridden: remove it",
  ),
  (
    "few_shot",
    "--judge=best --seeds=2",
    "few_shot: --judge reads how a run was trained: leave out --recipe, --seed and --seeds",
  ),
  *(
    (
      "few_shot",
      f"--algorithm=prototypical --tail=separate --{flag}=5",
      f"few_shot: --{flag} is of no use with --algorithm=prototypical, which has no inner steps "
      "and takes the mean loss: leave it out",
    )
    for flag in ("eval_steps", "eval_batch")
  ),
  (
    "few_shot",
    "--recipe=family_anil --noadapt_norm",
    "few_shot: --adapt_norm is of no use with --algorithm=anil, which moves the last layer only: "
    "leave it out",
  ),
  (
    "few_shot",
    "--algorithm=scratch --meta_steps=1 --outer_rate=2",
    "few_shot: --outer_rate is of no use with --algorithm=scratch, which learns no parameters: "
    "leave it out",
  ),
  (
    "few_shot",
    "--recipe=family_joint --inner_steps=3",
    "few_shot: --inner_steps is of no use with --algorithm=joint, which takes one inner step: "
    "leave it out",
  ),
  ("few_shot", "--judge=best", "few_shot: --judge judges a run: give its folder as --out"),
]


@pytest.mark.parametrize(("module", "bad", "line"), LINES)
def test_a_binary_ends_with_one_line(module, bad, line, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(sys, "argv", [f"{module}.py", f"--out={tmp_path / 'run'}", *bad.split()])
  monkeypatch.setattr(metajax, "cores_as_devices", lambda: None)  # the tests' backend is there
  monkeypatch.delitem(sys.modules, f"experiments.{module}", raising=False)  # or it warns of that
  with pytest.raises(SystemExit) as ended:
    runpy.run_module(f"experiments.{module}", run_name="__main__", alter_sys=True)
  assert ended.value.code == 1
  out, err = capsys.readouterr()
  assert out == "" and err.splitlines() == [line]
  assert not (tmp_path / "run").exists()


def test_a_process_of_a_binary_ends_with_one_line():
  module, bad, line = LINES[-1]
  command = [sys.executable, "-m", f"experiments.{module}", bad]
  ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert ended.returncode == 1 and ended.stdout == ""
  assert ended.stderr.splitlines() == [line]


# Arrays

ARRAYS = [
  ("lengths differ", np.ones((3, 2)), np.zeros(2, int), r"must be \[m, ...\] and \[m\]"),
  ("no example", np.ones((0, 2)), np.zeros(0, int), "with m >= 1"),
  ("a number", np.float32(1), np.zeros(1, int), r"must be \[m, ...\] and \[m\]"),
  ("float labels", np.ones((2, 2)), np.zeros(2), "labels must be integers or strings, not float64"),
  ("not a number", np.array([1.0, np.nan]), np.zeros(2, int), "must be finite .* remove them"),
  ("complex nan", np.array([1j, np.nan]), np.zeros(2, int), "must be finite .* remove them"),
  ("bfloat16", np.array([1, np.inf], jnp.bfloat16), np.zeros(2, int), "must be finite bfloat16"),
  ("too large for float32", np.array([1e300]), np.zeros(1, int), "must be finite float32"),
  ("too large for int32", np.array([2**40]), np.zeros(1, int), "must fit int32: scale them"),
  ("text", np.array(["a"]), np.zeros(1, int), "must be numbers, not <U1: encode them"),
  ("objects", np.array([{}]), np.zeros(1, int), "must be numbers, not object: encode them"),
]


@pytest.mark.parametrize(("inputs", "labels", "pattern"), cases(ARRAYS))
def test_bad_arrays_are_refused(inputs, labels, pattern):
  refused(lambda: metajax.data.few_shot.from_arrays(inputs, labels), pattern)


def classes(sizes):
  labels = np.repeat(np.arange(len(sizes)), sizes)
  return metajax.data.few_shot.from_arrays(np.ones((len(labels), 1)), labels)


def numbers(*three):
  return dict(zip(("ways", "train_shots", "test_shots"), three, strict=True))


UNEQUAL = classes([9, 8, 6, 30, 9])
TASKS = [
  ("ways > classes", UNEQUAL, numbers(6, 1, 1), "there are 5: lower the ways"),
  ("shots > the smallest", UNEQUAL, numbers(5, 4, 3), "class 2 has 6: lower the shots"),
  ("no shots", UNEQUAL, numbers(5, 0, 3), "train_shots must be at least 1"),
  ("negative test", UNEQUAL, numbers(5, 1, -1), "test_shots at least 0"),
  (
    "an empty class",
    UNEQUAL._replace(sizes=jnp.array([9, 8, 6, 0, 9])),
    numbers(2, 1, 1),
    "class 3 has 0",
  ),
  (
    "rows that are not there",
    UNEQUAL._replace(inputs=UNEQUAL.inputs[:50]),
    numbers(2, 1, 1),
    "rows that the inputs lack: make them with from_arrays",
  ),
  ("a split that is not there", None, numbers(2, 1, 1), "such as splits.train, not NoneType"),
  (
    "starts and sizes",
    UNEQUAL._replace(starts=UNEQUAL.starts[:4]),
    numbers(2, 1, 1),
    "make them with from_arrays",
  ),
]


@pytest.mark.parametrize(("source", "wanted", "pattern"), cases(TASKS))
def test_tasks_that_cannot_be_drawn_are_refused(source, wanted, pattern):
  refused(lambda: metajax.data.few_shot.sample_task(source, **wanted), pattern)


# Archives


def rename(target):
  return lambda split, name, content: (
    (target, content) if name.endswith("0001_01.png") else (name, content)
  )


def replace(new):
  return lambda split, name, content: (name, new if name.endswith("0001_01.png") else content)


def blank_image(size, kind):
  file = io.BytesIO()
  Image.new("1", size).save(file, kind)
  return file.getvalue()


RNG = np.random.default_rng(1)
A = "images_train/A/character00"
OMNIGLOT = [
  ("a way out", rename("../../escape.png"), "unsafe name '../../escape.png': get the archive from"),
  ("an absolute name", rename("/absolute.png"), "unsafe name"),
  ("a Windows name", rename("a\\b.png"), "unsafe name"),
  ("two lines", rename(f"{A}/0001\n_01.png"), r"unsafe name .*0001\\n_01"),
  ("a long name", rename(f"{A}/{'1' * 5000}_01.png"), "unsafe name"),
  ("loose", rename("images_train/loose.png"), "not SET/ALPHABET.*: download"),
  ("no number", rename(f"{A}/²_01.png"), "not SET/ALPHABET.*: download"),
  ("label out of range", rename(f"{A}/99999999999999999999_01.png"), "not SET/ALPHABET"),
  ("no image", replace(b"this is no image"), "not a readable image: replace it"),
  ("another kind", replace(blank_image((105, 105), "GIF")), "not a readable image"),
  ("another size", replace(png(RNG, (28, 28))), "28x28 pixels, not 105x105: resize it"),
  ("an image bomb", replace(blank_image((12000, 12000), "PNG")), "12000x12000 pixels, not 105x105"),
  ("a cut image", replace(png(RNG)[:60]), "not a readable image"),
  ("one more class", rename("images_train/A/character99/9999_01.png"), "5 characters, not 4"),
  ("a drawing short", rename(f"{A}/.hidden.png"), "19 drawings of character 0001, not 20"),
  ("unequal classes", rename(f"{A}/0002_21.png"), "21 drawings of character 0002, not 20"),
  ("twice", rename(f"{A}/0001_02.png"), "0001_02.png twice"),
]


@pytest.mark.parametrize(("change", "pattern"), cases(OMNIGLOT))
def test_broken_omniglot_archives_are_refused(tmp_path, small_omniglot, change, pattern):
  folder = write_omniglot(tmp_path / "zips", change=change)
  refused(lambda: omniglot.load(folder, cache_dir=tmp_path / "cache"), pattern, DataError)
  assert not list((tmp_path / "cache").rglob("dataset_info.json"))  # no partial set is left


def cut_in_half(content):
  return content[: len(content) // 2]


def flip_a_bit(content):
  return (
    content[: len(content) // 3]
    + bytes([content[len(content) // 3] ^ 16])
    + content[len(content) // 3 + 1 :]
  )


def bomb(content):
  file = io.BytesIO()
  with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
    for drawing in range(4):
      archive.writestr(f"{A}/0001_{drawing:02d}.png", bytes(10 * 2**20))
  return file.getvalue()


def encrypted(content):
  start = content.index(b"PK\x01\x02")  # of the directory, whose flags are 8 bytes on
  return content[: start + 8] + b"\x01" + content[start + 9 :]


ZIPS = [
  ("truncated", cut_in_half, "is truncated or damaged .*: download it again"),
  ("flipped", flip_a_bit, "is truncated or damaged|is not a readable image|unsafe name"),
  ("nothing", lambda content: b"", "is truncated or damaged"),
  ("a web page", lambda content: b"<html>404</html>", "is truncated or damaged"),
  ("no member", lambda content: b"PK\x05\x06" + bytes(18), "holds 0 characters, not 4: download"),
  ("a bomb", bomb, "would unpack to over 100 times its size"),
  ("encrypted", encrypted, "is encrypted: download the original"),
]


@pytest.mark.parametrize(("spoil", "pattern"), cases(ZIPS))
def test_broken_zips_are_refused(tmp_path, small_omniglot, spoil, pattern):
  path = write_omniglot(tmp_path / "zips") / CHARACTERS["train"][0]
  path.write_bytes(spoil(path.read_bytes()))
  before = content_of(path.parent)
  refused(lambda: omniglot.load(path.parent, cache_dir=tmp_path / "cache"), pattern, DataError)
  assert content_of(path.parent) == before


def test_omniglot_says_which_archive_is_missing(tmp_path, small_omniglot):
  folder, cache = write_omniglot(tmp_path / "zips"), tmp_path / "cache"
  (folder / "images_evaluation.zip").unlink()
  missing = r"has no images_evaluation.zip: download from https"
  refused(lambda: omniglot.load(folder, cache_dir=cache), missing)
  refused(lambda: omniglot.load(tmp_path / "nowhere", cache_dir=cache), "is not a folder: give")
  refused(lambda: omniglot.load(folder, protocol="vinyals"), "'pooled' or 'alphabets'")


def one_image(name, size=(84, 84)):
  return {name: jpeg(np.random.default_rng(0), size)}


MINI = [
  ("no image", {"train/n01/a.jpg": b"no image"}, "n01/a.jpg in .* is not a readable image"),
  ("another size", one_image("train/n01/a.jpg", (64, 84)), "64x84 pixels, not 84x84: resize it"),
  ("a way out", {"../a.jpg": b""}, "unsafe name"),
  ("no class", one_image("train/a.jpg"), "not CLASS/IMAGE: it should hold"),
  ("twice", one_image("train/n02/n0200000000.jpg"), "a second time: keep one of the two"),
  ("a huge file", {"train/n01/a.jpg": b"0" * (files._MAX_FILE_BYTES + 1)}, "over 16 MiB"),
  ("a bomb", {f"train/{i}.txt": bytes(2**23) for i in range(5)}, "over 100 times its size"),
  ("a class in two splits", one_image("train/n09/a.jpg"), "n09 is in train and in test: .* remove"),
]


@pytest.mark.parametrize(("spoil", "pattern"), cases(MINI))
def test_broken_mini_imagenet_archives_are_refused(mini, tmp_path, spoil, pattern):
  write_tar(mini / "train_spoilt.tar.gz", spoil)
  refused(lambda: mini_imagenet.load(mini, cache_dir=tmp_path / "cache"), pattern, DataError)
  assert not list((tmp_path / "cache").glob("*"))  # nothing half-made is left


def in_gzip(change):
  """The tar inside, changed from the header of the third member on."""

  def spoil(content):
    tar = gzip.decompress(content)
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
      header = archive.getmembers()[2].offset
    return gzip.compress(tar[:header] + change(tar[header:]))

  return spoil


def negative_size(tail):
  """A size field in base 256, of a header with the checksum that it should have."""
  header = bytearray(tail[:512])
  header[124:136] = b"\xff" * 12
  header[148:156] = b" " * 8
  header[148:156] = b"%06o\0 " % sum(header)
  return bytes(header) + tail[512:]


def endless_name(tail):
  """A member that declares a name of 2^40 bytes."""
  header = bytearray(tail[:512])
  header[124:136] = b"\x80" + (2**40).to_bytes(11, "big")
  header[156:157] = tarfile.GNUTYPE_LONGNAME
  header[148:156] = b" " * 8
  header[148:156] = b"%06o\0 " % sum(header)
  return bytes(header) + tail[512:]


TARS = [
  *((f"{keep} of it", lambda c, keep=keep: c[: int(keep * len(c))]) for keep in (0.3, 0.9, 0.999)),
  ("nothing", lambda content: b""),
  ("an empty gzip", lambda content: gzip.compress(b"")),
  ("plain text", lambda content: b"hello"),
  # of gzip's checksum, which only the end of the stream tells
  ("a flipped checksum", lambda c: c[:-6] + bytes([c[-6] ^ 1]) + c[-5:]),
  ("cut at a header", in_gzip(lambda tail: b"")),
  ("cut in a header", in_gzip(lambda tail: tail[:100])),
  ("flipped in a header", in_gzip(lambda tail: bytes([tail[0] ^ 1]) + tail[1:])),
  ("a negative size", in_gzip(negative_size)),
  ("an endless name", in_gzip(endless_name)),
  ("more behind the end", in_gzip(lambda tail: tail + b"more")),
]


@pytest.mark.parametrize("spoil", cases(TARS))
def test_broken_tars_are_refused(mini, tmp_path, spoil):
  path = mini / "train.tar.gz"
  path.write_bytes(spoil(path.read_bytes()))
  refused(
    lambda: mini_imagenet.load(mini, cache_dir=tmp_path / "cache"),
    r"train\.tar\.gz is truncated or damaged .*: download it again",
    DataError,
  )


def test_links_in_a_tar_are_refused(mini, tmp_path):
  with tarfile.open(mini / "val.tar.gz", "w:gz") as archive:
    link = tarfile.TarInfo("val/n05/n0500000000.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    archive.addfile(link)
  refused(lambda: mini_imagenet.load(mini, cache_dir=tmp_path), "a link: pack plain files only")


def test_mini_imagenet_says_what_is_missing(tmp_path, mini):
  cache = tmp_path / "cache"
  refused(lambda: mini_imagenet.load(None), "cannot be downloaded .* ILSVRC-2012")
  refused(lambda: mini_imagenet.load(tmp_path), "has no train images: it should hold")
  write_tar(mini / "val.tar.gz", {"val/readme.txt": b"nothing"})
  refused(lambda: mini_imagenet.load(mini, cache_dir=cache), "no image inside: it should hold")
  (mini / "test.tar.gz").unlink()
  refused(lambda: mini_imagenet.load(mini), "has no test images")


def test_half_of_a_division_is_refused(tmp_path):
  """With train and val only, a folder would be classes of folders."""
  for part in ("train", "val"):
    (tmp_path / part / "a").mkdir(parents=True)
    (tmp_path / part / "a" / "0.jpg").write_bytes(jpeg(np.random.default_rng(0), (8, 8)))
  read = lambda: metajax.data.from_folder(tmp_path, size=8, cache_dir=tmp_path / "cache")
  refused(read, "divided into parts, they are train, test and, if you like, val")


def test_class_folders_without_images_are_refused(tmp_path):
  for split in ("train", "test"):
    (tmp_path / split / split).mkdir(parents=True)
    (tmp_path / split / split / "a.jpg").write_bytes(jpeg(RNG))
  read = lambda: mini_imagenet.load(tmp_path, cache_dir=tmp_path / "cache")
  (tmp_path / "train" / "n05").mkdir()
  refused(read, "train/n05 has no image: add .* or remove the folder")
  (tmp_path / "train" / "n05" / "a.jpg").symlink_to("/nowhere")
  refused(read, "a.jpg cannot be read .*: replace it")
  (tmp_path / "train" / "n05" / "a.jpg").unlink()
  (tmp_path / "train" / "n05" / "a.jpg").touch()
  os.truncate(tmp_path / "train" / "n05" / "a.jpg", files._MAX_OWN_BYTES + 1)
  refused(read, "a.jpg is over 1024 MiB")


# The cache

DAMAGE = [
  ("cut", lambda content: content[: len(content) // 2]),
  ("emptied", lambda content: b""),
  ("overwritten", lambda content: b"\xf5" * len(content)),
]


@pytest.mark.parametrize("damage", cases(DAMAGE))
def test_a_damaged_cache_of_omniglot_is_named(tmp_path, small_omniglot, damage):
  folder, cache = write_omniglot(tmp_path / "zips"), tmp_path / "cache"
  read = lambda: omniglot.load(folder, cache_dir=cache)
  whole = read().test.inputs
  for name in ("dataset_info.json", "metajax_omniglot-test.array_record-00000-of-00001"):
    (path,) = cache.rglob(name)
    content = path.read_bytes()
    path.write_bytes(damage(content))
    refused(read, "the cache .* is damaged: delete it, and it is made again", DataError)
    path.write_bytes(content)
  np.testing.assert_array_equal(read().test.inputs, whole)


def with_floats(content):
  file = io.BytesIO()
  arrays = dict(np.load(io.BytesIO(content)))
  np.savez(file, **arrays | {"train_images": arrays["train_images"].astype(float)})
  return file.getvalue()


def no_arrays(content):
  file = io.BytesIO()
  np.savez(file, other=np.ones(3))
  return file.getvalue()


@pytest.mark.parametrize(
  "damage",
  cases([*DAMAGE, ("flipped", flip_a_bit), ("floats", with_floats), ("others", no_arrays)]),
)
def test_a_damaged_cache_of_mini_imagenet_is_named(mini, tmp_path, damage):
  cache = tmp_path / "cache"
  mini_imagenet.load(mini, cache_dir=cache)
  (prepared,) = cache.glob("*.npz")
  prepared.write_bytes(damage(prepared.read_bytes()))
  read = lambda: mini_imagenet.load(mini, cache_dir=cache)
  refused(read, "is damaged: delete it, and it is made again", DataError)
  prepared.unlink()
  assert len(read().test.inputs) == 2


def test_a_cache_that_cannot_be_written_is_named(mini, tmp_path, small_omniglot):
  folder, line = write_omniglot(tmp_path / "zips"), "cannot be written .*: give another cache_dir"
  refused(lambda: mini_imagenet.load(mini, cache_dir="/dev/null/x"), line, DataError)
  refused(lambda: omniglot.load(folder, cache_dir="/dev/null/x"), line, DataError)


# Calls

LOSS, SGD, ADAM = softmax_loss(), optax.sgd(0.1), optax.adam(0.1, eps_root=1e-8)
PHI, EPISODE, BATCH = weights(), episode(0, 3), examples(0, 4)
POOL, TAIL = EPISODE.pool, EPISODE.tail


def vector_loss(params, batch):
  return optax.softmax_cross_entropy_with_integer_labels(batch.inputs @ params, batch.targets)


ESTIMATORS = {
  "reptile": metajax.reptile,
  "fomaml": metajax.fomaml,
  "maml": metajax.maml,
  "mixed maml": lambda loss, inner: metajax.maml(loss, inner, mixed_mode=True),
  "combine": lambda loss, inner: metajax.combine(loss, inner, [1.0, 1.0, 1.0]),
}


def learner(outer=SGD):
  return metajax.meta_learner(metajax.maml(LOSS, SGD), outer, metajax.vmapped(2))


def divided(**parts):
  classes = metajax.data.from_arrays(np.zeros((8, 2), np.float32), np.repeat(np.arange(4), 2))
  return metajax.data.few_shot.split(classes, **{"validation": 0, "test": 1, **parts})


# name, what differs from a sound call, pattern
ESTIMATES = [
  ("a loss for each example", {"loss": vector_loss}, r"not float32\[3\]: return the sum or the"),
  ("a loss and more", {"loss": lambda p, b: (LOSS(p, b), 1)}, "may return a dict of real arrays"),
  ("no loss", {"loss": lambda p, b: None}, "one floating-point number, not nothing"),
  ("an integer loss", {"loss": lambda p, b: jnp.int32(3)}, r"not int32\[\]: return"),
  ("integer parameters", {"params": PHI.astype(int)}, "must be floating point, .*: convert it"),
  (
    "an integer among them",
    {"params": {"w": PHI, "n": jnp.int32(3)}, "loss": lambda p, b: LOSS(p["w"], b)},
    "and n is int32: convert it, or leave it out",
  ),
  ("text among them", {"params": {"w": PHI, "n": "x"}}, "and n is <U1"),
  ("another optimizer's state", {"state": ADAM.init(PHI)}, "not that of this .* `init` returns"),
  (
    "another model's state",
    {"inner": metajax.carried(ADAM), "state": ADAM.init(PHI[1:])},
    "inner state is not that of",
  ),
  ("float rows", {"schedule": EPISODE.schedule.astype(float)}, "an integer array .*: draw them"),
  ("a row", {"schedule": EPISODE.schedule[0]}, r"an integer array .*: draw them"),
  ("fewer targets", {"pool": POOL._replace(targets=POOL.targets[:3])}, "as many targets as inputs"),
  ("no target axis", {"pool": POOL._replace(targets=POOL.targets[0])}, "the same leading axis n"),
  ("a shorter tail", {"tail": TAIL._replace(targets=TAIL.targets[:2])}, "as many targets as input"),
  ("an empty tail", {"tail": jax.tree.map(lambda leaf: leaf[:0], TAIL)}, "no example: raise the"),
]  # fmt: skip


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize(("bad", "pattern"), cases(ESTIMATES))
def test_estimators_refuse_what_does_not_fit(name, bad, pattern):
  bad = dict(bad)
  meta_gradient = ESTIMATORS[name](bad.pop("loss", LOSS), bad.pop("inner", SGD))
  params = bad.pop("params", PHI)

  def estimate():
    state = bad.pop("state") if "state" in bad else meta_gradient.init(params)
    jax.eval_shape(meta_gradient.estimate, params, state, EPISODE._replace(**bad))

  refused(estimate, pattern)


def evaluated(loss, state):
  predict = metajax.transductive(lambda params, inputs: inputs @ params)
  learner = metajax.meta_learner(metajax.reptile(loss, SGD), SGD, metajax.serial(1))
  evaluate = metajax.evaluate(learner, metajax.cycling(2, 3), predict)
  trained = learner.init(PHI)._replace(inner=state)
  return evaluate(trained, KEY, metajax.Task(BATCH, BATCH))


def judged(test):
  sample = lambda key: metajax.Task(jax.tree.map(lambda a: jnp.roll(a, key[0], 0), BATCH), test)
  predict = metajax.transductive(lambda params, inputs: inputs @ params)
  learner = metajax.meta_learner(metajax.reptile(LOSS, SGD), SGD, metajax.serial(1))
  evaluate = metajax.evaluate(learner, metajax.cycling(2, 3), predict)
  judge = metajax.judge(evaluate, sample, metajax.losses.accuracy)
  return judge(learner.init(PHI), jax.random.PRNGKey(0), 2)


def cross_entropy(targets):
  return LOSS(PHI, BATCH._replace(targets=targets))


def squared_error(params, batch):
  return metajax.losses.squared_error(lambda p, x: x @ p, reduction="sum")(params, batch)


def combined(given):
  gradient = metajax.combine(LOSS, SGD, given)
  return gradient.estimate(PHI, gradient.init(PHI), EPISODE)


def omniglot_on(shape, params=None):
  model = models.omniglot(3, filters=2)
  params = jax.eval_shape(model.init, KEY) if params is None else params
  return jax.eval_shape(model.apply, params, jnp.zeros(shape))


def lifted(execution, state=None):
  """Two episodes for a meta-batch of four."""
  gradient = execution(4).lift(metajax.reptile(LOSS, metajax.carried(ADAM)))
  episodes = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), EPISODE)
  gradient.estimate(PHI, gradient.init(PHI) if state is None else state, episodes)


def in_turn():
  episodes = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), EPISODE)
  spoiled = episodes._replace(schedule=episodes.schedule[:1])
  metajax.serial(2).lift(metajax.reptile(LOSS, SGD)).estimate(PHI, (), spoiled)


def learned(gradient, outer=None, execution=metajax.serial):
  one = metajax.reptile(LOSS, SGD)._replace(
    estimate=lambda phi, state, episode: (gradient, state, {})
  )
  learner = metajax.meta_learner(one, optax.sgd(0.1), execution(1))
  state = learner.init(PHI)
  episodes = jax.tree.map(lambda leaf: leaf[None], EPISODE)
  learner.step(state if outer is None else state._replace(outer=outer), episodes)


NO_EXAMPLE = jax.tree.map(lambda leaf: leaf[:0], BATCH)
SHORT = BATCH._replace(inputs=BATCH.inputs[:2])
EPISODE_OF = {
  tail.__name__: lambda train, test=BATCH, k=2, tail=tail: tail(metajax.cycling(k, 3))(
    KEY, metajax.Task(train, test)
  )
  for tail in (metajax.shared_tail, metajax.separate_tail)
}
SHARED, HELD_BACK = EPISODE_OF["shared_tail"], EPISODE_OF["separate_tail"]

CALLS = [
  ("weights: few", lambda: combined([1.0, 1.0]), "2 weights for .* k = 3 losses: give 3"),
  ("weights: none", lambda: combined([]), "vector of finite"),
  ("weights: infinite", lambda: combined([1, 1, np.inf]), "vector of finite"),
  ("weights: infinite in float32", lambda: combined([1, 1, 1e99]), "vector of finite"),
  ("weights: text", lambda: combined(["a", "b", "c"]), "vector of finite"),
  ("weights: complex", lambda: combined([1j, 1, 1]), "vector of finite"),
  ("weights: ragged", lambda: combined([[1], [1, 2]]), "vector of finite"),
  ("weights: not int32", lambda: combined([2**40, 1, 1]), "vector of finite"),
  ("weights: a traced matrix", lambda: jax.jit(combined)(jnp.ones((3, 1))), "vector of finite"),
  ("stepsize: zero", lambda: metajax.reptile(LOSS, SGD, stepsize=0), "must be positive and finite"),
  (
    "stepsize: infinite",
    lambda: metajax.reptile(LOSS, SGD, stepsize=np.inf),
    "must be positive and finite",
  ),
  ("MAML: Adam", lambda: metajax.maml(LOSS, optax.adam(1e-3)).init(PHI), "give its Adam an eps"),
  (
    "fresh optimizer: integers",
    lambda: metajax.reptile(LOSS, SGD).init(PHI.astype(int)),
    "must be floating point",
  ),
  ("minibatches: none", lambda: metajax.cycling(0, 3), "num_batches must be at least 1, not 0"),
  ("minibatches: empty", lambda: metajax.replacement(2, 0), "batch_size must be at least 1, not 0"),
  (
    "a schedule as make_episode",
    lambda: metajax.cycling(2, 3)(KEY, metajax.Task(BATCH, BATCH)),
    "not Task: where make_episode belongs, give shared_tail",
  ),
  (
    "make_episode as a schedule",
    lambda: metajax.separate_tail(metajax.cycling(2, 3))(KEY, 7),
    "give the schedule itself, .* without shared_tail or separate_tail",
  ),
  (
    "loss: another name than key",
    lambda: metajax.reptile(lambda phi, batch, rng: LOSS(phi, batch), SGD).estimate(
      PHI, (), EPISODE
    ),
    "the third parameter of a loss is the key .*, and here it is rng: name it key",
  ),
  (
    "loss: a key with another name and a default",
    lambda: metajax.reptile(lambda phi, batch, rng=None: LOSS(phi, batch), SGD).estimate(
      PHI, (), EPISODE
    ),
    "as key, and here rng would never be given one: name it key, or fill it in",
  ),
  ("run: parameters", lambda: metajax.run(learner(), None, None, 1)(PHI, KEY), "type MetaState, "),
  ("step: parameters", lambda: learner().step(PHI, None), "or record.state after train"),
  (
    "adapt: a function",
    lambda: learner().adapt(learner().init(PHI), BATCH, metajax.cycling(2, 3)),
    "are an integer array .k, b., not function: draw them",
  ),
  (
    "train: a seed",
    lambda: metajax.train(learner(), None, None, learner().init(PHI), 0, num_steps=1),
    "key must be a key of random numbers, not 0: give",
  ),
  ("carried: not called", lambda: metajax.carried(optax.adam), "not adam"),
  ("only: not called", lambda: variants.only(optax.sgd, lambda name: True), "not sgd"),
  ("mesh: devices", lambda: metajax.sharded(2, jax.devices()), "must be of the type Mesh, not l"),
  (
    "task: one part",
    lambda: metajax.shared_tail(metajax.cycling(2, 3))(KEY, metajax.Task(BATCH, None)),
    "of two metajax.Examples, not NoneType: return",
  ),
  ("adapt: parameters", lambda: learner().adapt(PHI, BATCH, None), "give learner.init.params."),
  (
    "learner: not called",
    lambda: metajax.meta_learner(metajax.maml, SGD, metajax.vmapped(2)),
    "must be of the type MetaGradient, not maml: give one, such as",
  ),
  (
    "learner: another order",
    lambda: metajax.meta_learner(metajax.maml(LOSS, SGD), metajax.vmapped(2), SGD),
    "must be an optax transformation, .*, not Execution",
  ),
  (
    "learner: no execution",
    lambda: metajax.meta_learner(metajax.maml(LOSS, SGD), SGD, 4),
    "execution must be of the type Execution, not int",
  ),
  ("optimizer: not called", lambda: metajax.maml(LOSS, optax.sgd).init(PHI), "not sgd"),
  (
    "outer optimizer: masked",
    lambda: learner(optax.masked(SGD, {"a": True, "b": False})).init({"a": PHI, "b": PHI}),
    "this outer optimizer adds the gradient of b to it",
  ),
  ("outer Adam: text", lambda: learner(ADAM).init({"w": PHI, "n": "x"}), "and n is <U1"),
  ("only: a name", lambda: variants.only(SGD, "w"), "must be a function of names, such as"),
  ("meta_sgd: parameters", lambda: variants.meta_sgd(LOSS).init(PHI), "of the type WithRates"),
  ("cycling: half a step", lambda: metajax.cycling(2.5, 3)(KEY, 7), "must be a whole number"),
  ("judging: no test", lambda: judged(NO_EXAMPLE), "no test examples to judge by: raise test_sh"),
  ("replacement: too many", lambda: metajax.replacement(2, 9)(KEY, 7), "from 7 examples: lower"),
  ("cycling: no example", lambda: metajax.cycling(2, 3)(KEY, 0), "from 0 examples: raise the"),
  ("separate tail: k = 1", lambda: HELD_BACK(BATCH, k=1), "use num_batches >= 2, or shared_tail"),
  ("separate tail: no test", lambda: HELD_BACK(BATCH, NO_EXAMPLE), "has none: raise test_shots"),
  (
    "task: a tuple",
    lambda: metajax.shared_tail(metajax.cycling(2, 3))(KEY, (BATCH, BATCH)),
    "must be a metajax.Task of two metajax.Examples, not tuple: return",
  ),
  (
    "task: arrays",
    lambda: metajax.separate_tail(metajax.cycling(2, 3))(KEY, metajax.Task(PHI, PHI)),
    "must be a metajax.Task of two metajax.Examples",
  ),
  ("task: lengths differ", lambda: SHARED(SHORT), "as many targets as inputs"),
  ("task: test lengths differ", lambda: HELD_BACK(BATCH, SHORT), "as many targets as inputs"),
  ("labels: floats", lambda: cross_entropy(jnp.zeros(4)), "integers .* number of its class"),
  ("labels: one-hot", lambda: cross_entropy(jnp.zeros((4, 3), int)), r"must be integers \(4,\)"),
  ("labels: a column", lambda: cross_entropy(jnp.zeros((4, 1), int)), r"must be integers \(4,\)"),
  ("labels: one", lambda: cross_entropy(jnp.zeros(1, int)), r"must be integers \(4,\)"),
  (
    "accuracy: a column",
    lambda: metajax.losses.accuracy(jnp.ones((4, 3)), jnp.zeros((4, 1), int)),
    r"must be integers \(4,\) .*: give each example",
  ),
  ("reduction", lambda: metajax.losses.cross_entropy(LOSS, reduction="average"), "'sum' or 'mean'"),
  ("outputs and targets", lambda: squared_error(PHI, BATCH), "must have the same shape"),
  ("evaluation: no scalar", lambda: evaluated(vector_loss, ()), "return the sum or the mean"),
  ("evaluation: state", lambda: evaluated(LOSS, ADAM.init(PHI)), "is not that of this optimizer"),
  ("interval: no value", lambda: metajax.mean_and_interval([]), "give at least one value"),
  ("apply: a model", lambda: metajax.transductive(models.sine()), "not Model: give model.apply"),
  (
    "loss: a model",
    lambda: metajax.losses.squared_error(models.sine(), reduction="sum"),
    "not Model: give model.apply",
  ),
  ("interval: 95", lambda: metajax.mean_and_interval([1.0], 95), "a confidence between 0 and 1"),
  ("network: no way", lambda: models.omniglot(0), "ways must be at least 1"),
  ("network: no filter", lambda: models.mini_imagenet(5, filters=0), "filters must be at"),
  ("network: head", lambda: models.ConvNet(5, 8, head="max"), "'flatten' or 'mean', not 'max'"),
  (
    "network: padding",
    lambda: models.ConvNet(5, 8, pool_padding="FULL"),
    "'SAME' or 'VALID', not 'FULL'",
  ),
  (
    "network: downsample",
    lambda: models.omniglot(5, downsample="max"),
    "'stride' or 'pool', not 'max'",
  ),
  ("network: method", lambda: models.omniglot(5, method="fast"), "'cpu', 'patches' or 'xla'"),
  ("network: no unit", lambda: models.sine((64, 0, 1)), "at least 1, not"),
  ("network: no layer", lambda: models.sine(()), "at least 1, not"),
  ("network: image size", lambda: omniglot_on((2, 84, 84, 1)), "do not fit .*: give inputs of the"),
  ("network: no channel", lambda: omniglot_on((2, 28, 28)), "images must be .n, height, width"),
  ("network: parameters", lambda: omniglot_on((2, 28, 28, 1), {}), "the parameters that its init"),
  ("sine: no point", lambda: metajax.data.sine.uniform_points(0), "num_points must be at least 1"),
  ("sine: no grid", lambda: metajax.data.sine.grid_points(-1), "num_points must be at least 1"),
  ("glyphs: none", lambda: glyphs.load(train_classes=0), "must each be at least 1"),
  ("mesh: no device", lambda: metajax.task_mesh([]), "at least one device: leave devices out"),
  ("no core", lambda: metajax.cores_as_devices(0), "whole number of at least 1, not 0"),
  ("half a core", lambda: metajax.cores_as_devices(2.5), "whole number of at least 1, not 2.5"),
  (
    "vmapped: chunk",
    lambda: metajax.vmapped(2, chunk=3),
    "chunk must be between 1 and num_tasks = 2",
  ),
  ("vmapped: fewer episodes", lambda: lifted(metajax.vmapped), "episodes must have a leading .* 4"),
  ("sharded: fewer episodes", lambda: lifted(metajax.sharded), "episodes must have a leading .* 4"),
  (
    "vmapped: one task's state",
    lambda: lifted(metajax.vmapped, ADAM.init(PHI)),
    "the inner state must have a leading axis of 4, .* and a state that init of",
  ),
  ("serial: lengths differ", lambda: in_turn(), "episodes must have a leading axis of 2"),
  ("serial: fewer episodes", lambda: lifted(metajax.serial), "episodes must have a leading .* 4"),
  (
    "map_tasks: lengths differ",
    lambda: metajax.map_tasks(lambda s, t: t)(0, (jnp.ones(3), jnp.ones(4))),
    "the same leading axis n",
  ),
  ("serial: gradient of another shape", lambda: learned(PHI[0]), "one array for each, of its shap"),
  (
    "vmapped: gradient of another shape",
    lambda: learned(PHI[0], execution=metajax.vmapped),
    "one array for each, of its shape",
  ),
  (
    "learner: another optimizer's state",
    lambda: learned(PHI, optax.adam(0.1).init(PHI)),
    "the outer state is not that of this optimizer",
  ),
  ("run: no step", lambda: metajax.run(None, None, None, 0), "num_steps must be at least 1"),
  ("serial: no task", lambda: metajax.serial(0), "num_tasks must be at least 1, not 0"),
  ("sharded: no task", lambda: metajax.sharded(0), "num_tasks must be at least 1, not 0"),
  ("vmapped: half a task", lambda: metajax.vmapped(2, chunk=1.0), "chunk must be a whole number"),
  ("varying shots: none", lambda: metajax.varying_shots(0, 1), "num_batches must be at least 1"),
  ("varying shots: no way", lambda: metajax.varying_shots(1, 1, ways=0), "ways must be at least 1"),
  ("varying steps: none", lambda: metajax.varying_steps(SHARED, at_least=0), "at_least must be at"),
  ("split: nothing to test", lambda: divided(test=0), "4 classes cannot be divided into"),
  ("split: nothing to train on", lambda: divided(test=4), "4 classes cannot be divided into"),
  ("split: negative", lambda: divided(validation=-1), "4 classes cannot be divided"),
  (
    "imaml: no iteration",
    lambda: variants.imaml(LOSS, SGD, 1.0, iterations=0),
    "iterations must be at least 1",
  ),
  ("prototypes: no way", lambda: variants.nearest_prototype(LOSS, 0), "ways must be at least 1"),
  ("network: activation", lambda: models.mlp(1, 1, activation="x"), "must be relu, tanh, gelu"),
  (
    "expansion: k = 1",
    lambda: metajax.theory.expansion(LOSS, PHI, jax.tree.map(lambda x: x[None, None], BATCH)),
    "give at least 2 of each task",
  ),
]  # fmt: skip


@pytest.mark.parametrize(("call", "pattern"), cases(CALLS))
def test_misuse_is_refused(call, pattern):
  refused(call, pattern)


def test_sound_calls_are_not_refused():
  """The calls that the tables above spoil."""
  for estimator in ESTIMATORS.values():
    gradient = estimator(LOSS, ADAM)
    assert jax.eval_shape(gradient.estimate, PHI, gradient.init(PHI), EPISODE)[0].shape == PHI.shape
  assert combined([1.0, 1.0, 1.0])[0].shape == cross_entropy(BATCH.targets).shape + PHI.shape
  assert evaluated(LOSS, ()).shape == (4, 3)
  assert len(divided().train.sizes) == 3
  assert omniglot_on((2, 28, 28, 1)).shape == (2, 3)
  assert HELD_BACK(BATCH).schedule.shape == SHARED(BATCH).schedule.shape == (1, 3)


def test_data_errors_are_value_errors():
  assert issubclass(metajax.data.DataError, ValueError)
