import re
from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"


def test_the_examples_run():
  """The README's Python blocks, from the first to the last, in one namespace."""
  blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
  assert len(blocks) >= 2
  namespace = {}
  for block in blocks:
    exec(compile(block, README.name, "exec"), namespace)
  assert 0.2 < namespace["mean"] <= 1.0
