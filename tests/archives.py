"""Small data sets in the official layouts, made on the spot, and what may be wrong with them."""

import io
import tarfile
import zipfile

import numpy as np
from PIL import Image

CHARACTERS = {"train": ("images_background.zip", 4), "test": ("images_evaluation.zip", 3)}


def png(rng, size=(105, 105)):
  file = io.BytesIO()
  ink = Image.fromarray((rng.random(size[::-1]) < 0.8).astype(np.uint8) * 255)
  ink.convert("1").save(file, "PNG")
  return file.getvalue()


def write_omniglot(folder, characters=CHARACTERS, drawings=20, change=None):
  """Both zips in the official layout; `change(split, name, content)` may spoil a file."""
  folder.mkdir(exist_ok=True)
  rng, label = np.random.default_rng(0), 0
  for split, (archive, count) in characters.items():
    with zipfile.ZipFile(folder / archive, "w") as file:
      file.writestr(f"images_{split}/", b"")
      file.writestr("__MACOSX/images/._0001_01.png", b"junk")
      file.writestr(f"images_{split}/@eaDir/0001_01.png", b"junk")
      for character in range(count):
        label += 1
        for drawing in range(drawings):
          where = f"images_{split}/Alphabet_{label % 2}/character{character:02d}"
          name = f"{where}/{label:04d}_{drawing + 1:02d}.png"
          content = png(rng)
          if change is not None:
            name, content = change(split, name, content)
          file.writestr(name, content)
  return folder


def jpeg(rng, size=(84, 84)):
  file = io.BytesIO()
  Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), np.uint8)).save(file, "JPEG")
  return file.getvalue()


def write_tar(path, members):
  with tarfile.open(path, "w:gz") as archive:
    for name, content in members.items():
      info = tarfile.TarInfo(name)
      info.size = len(content)
      archive.addfile(info, io.BytesIO(content))


def members(split, classes, seed=0, first=0):
  rng = np.random.default_rng(seed)
  return {
    f"{split}/{name}/{name}{first + i:08d}.jpg": jpeg(rng)
    for name, count in classes.items()
    for i in range(count)
  }
