import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

CASES = [
  ["--model=sine", "--algorithms=reptile,fomaml,maml", "--execution=vmap,chunked,serial"],
  ["--model=omniglot,omniglot_pool,mini_imagenet", "--algorithms=fomaml", "--inner_steps=1"],
  ["--model=omniglot", "--algorithms=reptile", "--convolution=patches,xla", "--tail=3"],
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_wall_clock(case, tmp_path):
  sizes = ["--inner_steps=2", "--meta_batch=2", "--batch=2", "--repeats=2"]
  out = tmp_path / "rows.jsonl"
  command = [sys.executable, "-m", "benchmarks.wall_clock", *sizes, *case, f"--out={out}"]
  printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
  rows = [json.loads(line) for line in out.read_text().splitlines()]
  assert len(rows) == printed.count("\n| ") - 1 >= 2
  for row in rows:
    assert 0 < row["run_p10"] <= row["run"] <= row["run_p90"]
    assert row["compile"] > 0 and 0 < row["fraction_of_matmul"] < 1


def test_the_count_of_work():
  """5.31 MFLOP forward an Omniglot image; 76 GFLOP a MAML step of 32 tasks: 5 x 5, then 75."""
  script = """
from benchmarks import wall_clock as w
forward = w.network("omniglot", "patches").flops
assert forward == 2 * (196*9*64 + 49*576*64 + 16*576*64 + 4*576*64 + 256*5) == 5_315_584, forward
maml = w.Case("maml", "omniglot", 6, 32, "vmap", "patches")
assert abs(w.step_flops(maml, forward, 5, 75) / 76.5e9 - 1) < 0.01
assert abs(w.step_flops(maml._replace(algorithm="fomaml"), forward, 5, 75) / 51e9 - 1) < 0.01
"""
  subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)
