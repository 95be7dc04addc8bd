"""Own images from folder to predictions: the binaries, as a user would type them."""

import csv
import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import metajax
from experiments import adapt, build, cli, few_shot
from experiments.recipes import Recipe
from experiments.settings import values_of

SHORT = {
  "dataset": "folder", "network": "conv4", "image_size": 9, "image_mode": "L", "filters": 2,
  "ways": 2, "train_shots": 3, "inner_batch": 3, "inner_steps": 2, "meta_batch": 2,
  "meta_steps": 2, "eval_shots": (2,), "eval_batch": (3,), "eval_steps": 3, "eval_tasks": 2,
  "eval_every": 2, "curve_tasks": 2, "curve_splits": ("test",), "execution": "vmap",
}  # fmt: skip


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
  """Class folders with dark and bright, gray and colored images of several sizes."""
  folder = tmp_path_factory.mktemp("pictures")
  rng = np.random.default_rng(0)
  for number, name in enumerate("abcdefgh"):
    (folder / name).mkdir()
    for i in range(4):
      pixels = rng.integers(0, 30, (10 + i, 9, 3)) + 28 * number
      image = Image.fromarray(pixels.astype(np.uint8)).convert("L" if i % 2 else "RGB")
      image.save(folder / name / f"{i}.png")
  return folder


def train(pictures, out, **changes):
  recipe = Recipe(**SHORT | {"data_dir": str(pictures), "cache_dir": str(out.parent)} | changes)
  few_shot.program(cli.Run(out=str(out)), few_shot.Choice(), recipe)()
  return recipe


@pytest.fixture(scope="module")
def run(pictures, tmp_path_factory):
  out = tmp_path_factory.mktemp("run") / "out"
  train(pictures, out)
  return out


def test_a_learner_of_own_images(pictures, run, tmp_path, capsys):
  learned = metajax.load(run / "learner.safetensors")
  assert learned.recipe.about["data"] == pictures.name
  for part, count in (("labelled/$a_$/", "a"), ("labelled/bright/", "h"), ("others/x/", "abgh")):
    (tmp_path / part).mkdir(parents=True)
    for name in count:
      for file in (pictures / name).iterdir():
        (tmp_path / part / f"{name}{file.name}").write_bytes(file.read_bytes())
  out = tmp_path / "predictions.csv"
  flags = [
    f"--learner={run / 'learner.safetensors'}",
    f"--labelled={tmp_path / 'labelled'}",
    f"--unlabelled={tmp_path / 'others'}",
    f"--out={out}",
  ]
  (settings,) = cli.parse(flags, (adapt.Adaptation(),))
  adapt.program(settings)()
  assert "adapted to 8 images of 2 classes, predicted 16" in capsys.readouterr().out
  with out.open() as file:
    rows = list(csv.DictReader(file))
  assert [row["file"] for row in rows] == [f"x/{name}{i}.png" for name in "abgh" for i in range(4)]
  labelled, others = (
    metajax.data.read_images(tmp_path / part, size=9, mode="L") for part in ("labelled", "others")
  )
  labels = [name.split("/")[0] for name in labelled.names]
  expected = learned.adapt(labelled.images, labels)(others.images)
  assert [row["prediction"] for row in rows] == expected.labels.tolist()
  found = [[float(row[name]) for name in ("$a_$", "bright")] for row in rows]
  np.testing.assert_allclose(found, expected.probabilities, atol=1e-6)
  with Image.open(tmp_path / "predictions.png") as picture:
    assert picture.width > 500 and np.asarray(picture).std() > 10


def test_the_report_names_the_data(pictures, run, capsys):
  train(pictures.parent, run)  # complete already: prints its report, of the data it was trained on
  assert f"{pictures.name}, 2-way, reptile: accuracy over 2" in capsys.readouterr().out
  result = json.loads((run / "result.json").read_text())
  assert set(result["cells"]) == {"2-shot transductive", "2-shot inductive"}


def test_files_that_are_skipped_are_named(pictures, tmp_path, capsys):
  folder = tmp_path / "pictures"
  shutil.copytree(pictures, folder)
  (folder / "a" / "broken.png").write_bytes(b"no image")
  (folder / "f" / "0.png").unlink()
  with pytest.raises(ValueError, match=r"a/broken.png .*, or skip .* .unreadable=skip.$"):
    train(folder, tmp_path / "out")
  build._load_folder.cache_clear()
  recipe = Recipe(
    **SHORT, data_dir=str(folder), cache_dir=str(tmp_path), unreadable="skip", min_examples=4
  )
  splits = build.load(recipe)
  lines = capsys.readouterr().out.splitlines()
  assert lines[0].startswith("warning: images are skipped: a/broken.png in ")
  assert lines[1:] == ["warning: classes with fewer than 4 examples are left out: 'f' has 3"]
  build._load_folder.cache_clear()
  with pytest.raises(ValueError, match="no class has 9 examples"):
    build.load(replace(recipe, min_examples=9))
  assert "warning: images are skipped: a/broken.png in " in capsys.readouterr().out
  names = [name for part in splits if part is not None for name in part.names]
  assert sorted(names) == list("abcdegh")


REFUSALS = [
  ({"image_size": None}, "--dataset=folder needs --data_dir, --image_size, such as 28"),
  ({"network": "paper"}, "--dataset=folder needs .* and --network=conv4 or --network=resnet12"),
  ({"dataset": "fc100", "image_size": None, "image_mode": None, "data_dir": None}, "needs --data_"),
  ({"network": "resnet12"}, "--filters is of no use with --network=resnet12"),
  ({"dataset": "omniglot"}, "--image_size applies to --dataset=folder only: leave it out"),
  ({"data_dir": None}, "--dataset=folder needs --data_dir"),
  (
    {"ways": 3, "eval_shots": (4,), "train_shots": 5, "curve_splits": ("train", "test")},
    r"pictures\d is too small: a task takes 5 examples .* train class 'c' has 4: lower "
    r"--train_shots, and --eval_shots or --eval_queries, or raise --min_examples; it has 2 test "
    "classes: lower --ways=3, or divide .*; a task takes 5 .* test",
  ),
  ({"min_examples": 9}, "no class has 9 examples"),
]


@pytest.mark.parametrize(("changes", "pattern"), REFUSALS)
def test_what_does_not_fit_is_refused(pictures, tmp_path, changes, pattern):
  with pytest.raises(ValueError, match=pattern):
    train(pictures, tmp_path / "out", **changes)
  assert not (tmp_path / "out").exists()


ADAPTATIONS = [
  ({"unlabelled": None}, "give --learner, --labelled and --unlabelled"),
  ({"out": "x.txt"}, r"--out=x.txt must end in .csv, in a folder that exists"),
  ({"learner": "omniglot"}, "omniglot is neither a file nor the name of a learner of metajax"),
  ({"labelled": "{0}/a"}, r"a holds 0.png, which is not CLASS/IMAGE: it should hold"),
  ({"labelled": "/nowhere"}, "/nowhere is not a folder"),
  ({}, "at most 2 classes apart, and there are 8: leave some out"),
]


@pytest.mark.parametrize(("changes", "pattern"), ADAPTATIONS)
def test_adaptations_that_do_not_fit_are_refused(pictures, run, tmp_path, changes, pattern):
  sound = {
    "learner": str(run / "learner.safetensors"),
    "labelled": str(pictures),
    "unlabelled": str(pictures),
    "out": str(tmp_path / "x.csv"),
  }
  changes = {k: v and v.format(pictures) for k, v in changes.items()}
  with pytest.raises(ValueError, match=pattern):
    adapt.program(adapt.Adaptation(**sound | changes))()
  assert not list(tmp_path.iterdir())


def test_a_labelled_folder_is_of_folders_of_images(pictures, run, tmp_path):
  for name in ("a", "b"):
    shutil.copytree(pictures / name, tmp_path / "few" / name)
  shutil.copytree(tmp_path / "few", tmp_path / "above" / "few")
  (tmp_path / "few" / "c").mkdir()
  for labelled, pattern in (
    (tmp_path / "few", "few/c has no image: add images of that class, or remove the folder"),
    (tmp_path / "above", r"few/a/\d.png, which is not CLASS/IMAGE: it should hold a folder"),
    (tmp_path, r"x.csv lies in --labelled=.*, where its picture would be read as an image"),
  ):
    with pytest.raises(ValueError, match=pattern):
      adapt.program(
        adapt.Adaptation(
          learner=str(run / "learner.safetensors"),
          labelled=str(labelled),
          unlabelled=str(pictures),
          out=str(tmp_path / "x.csv"),
        )
      )


def test_flags_of_other_data_sets_do_not_mention_folders():
  assert not {"image_size", "image_mode", "min_examples", "unreadable"} & set(
    values_of(Recipe(), Recipe)
  )


def test_names_in_the_table_need_not_be_unicode(tmp_path):
  name, one = os.fsdecode(b"caf\xe9"), np.ones((1, 1), np.float32)
  found = metajax.Predictions(np.array([name]), one, np.array([name]))
  adapt.write_table(tmp_path / "table.csv", [f"{name}.png"], found)
  assert b"caf\xe9.png,caf\xe9,1.000000" in (tmp_path / "table.csv").read_bytes()
