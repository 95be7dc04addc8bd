"""How many faults the tests notice: the core with one mistake at a time, and the tests run on it.

    python tests/mutate.py                          # every module below, hours on two cores
    python tests/mutate.py --sample=25 inner meta   # 25 mistakes in each of two modules

A mistake is a small change of one expression: a comparison turned round, a sum into a difference, a
number one larger, a condition negated, two branches exchanged, a call replaced by its first
argument, a keyword or a statement left out. Texts and annotations stay. A mistake is noticed if one
of the module's tests fails. Those that are not noticed are listed, and the last line is the share
of those that are.

Each mistake is made in a copy of the project; this one stays as it is.
"""

import argparse
import ast
import concurrent.futures
import copy
import os
import queue
import random
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = {  # those that are meant to notice, the quickest first
  "inner": ["test_two_steps", "test_gradients", "test_loss_forms", "test_seams", "test_bad_input"],
  "gradients": [
    "test_two_steps",
    "test_gradients",
    "test_loss_forms",
    "test_seams",
    "test_bad_input",
  ],
  "episodes": ["test_episodes", "test_bad_input", "test_fuzz", "test_seams"],
  "execution": ["test_two_steps", "test_execution", "test_meta", "test_bad_input", "test_seams"],
  "meta": ["test_two_steps", "test_meta", "test_bad_input", "test_evaluation", "test_seams"],
  "evaluation": ["test_evaluation", "test_bad_input", "test_seams", "test_execution"],
  "losses": ["test_losses", "test_bad_input", "test_seams"],
  "variants": ["test_variants", "test_two_steps", "test_loss_forms"],
  "learned": ["test_learned", "test_adapt", "test_bad_input"],
  "models/fast/blocks": ["test_fast", "test_models"],
  "models/fast/convolution": ["test_fast", "test_models"],
  "data/few_shot": ["test_data", "test_bad_input", "test_fuzz"],
  "data/class_folders": ["test_data"],
}
SWAPPED = {
  ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
  ast.Mod: ast.Mult, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
  ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn,
  ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip
NOT_CODE = ("annotation", "returns", "type_params")  # fields that only a type checker reads
# A function in the place of its result, or a field in the place of a tuple, is noticed by anything:
# it would only raise the share.
FUNCTIONS = re.compile(r"lambda|partial\(|(jnp\.\w+|loss_fn|inner_loss|optimizer|\w*step|body)$")
TUPLES = re.compile(r"[A-Z]\w*$")


def mistakes(node):
  """The nodes that may stand in the place of this one."""
  changed = copy.copy(node)
  match node:
    case ast.BinOp(op=op) | ast.BoolOp(op=op) if type(op) in SWAPPED:
      changed.op = SWAPPED[type(op)]()
      yield changed
    case ast.Compare(ops=[op]):
      changed.ops = [SWAPPED[type(op)]()]
      yield changed
    case ast.Compare(ops=[first, *others]):
      changed.ops = [SWAPPED[type(first)](), *others]
      yield changed
    case ast.UnaryOp(operand=operand):
      yield operand
    case ast.Constant(value=bool(value)):
      yield ast.Constant(not value)
    case ast.Constant(value=int(value) | float(value)):
      yield ast.Constant(value + 1)
    case ast.If(test=test):
      changed.test = ast.UnaryOp(ast.Not(), test)
      yield changed
    case ast.IfExp(body=body, orelse=orelse):
      changed.body, changed.orelse = orelse, body
      yield changed
    case ast.Call(args=args, keywords=keywords):
      called = ast.unparse(node.func)
      if args and not (FUNCTIONS.match(ast.unparse(args[0])) or TUPLES.match(called)):
        yield args[0]
      if len(args) == 3 and called in ("jnp.where", "jax.lax.select"):
        changed.args = [args[0], args[2], args[1]]
        yield changed
      for keyword in keywords:
        without = copy.copy(node)
        without.keywords = [other for other in keywords if other is not keyword]
        yield without
    case ast.Expr(value=ast.Call()):
      yield ast.Pass()


def mutants(source):
  """Pairs of a description and the source with one mistake."""
  tree = ast.parse(source)
  found = []

  def visit(parent):
    for field, value in ast.iter_fields(parent):
      if field in NOT_CODE or isinstance(parent, ast.Raise):
        continue
      many = value if isinstance(value, list) else [value]
      for index, node in enumerate(many):
        if not isinstance(node, ast.AST):
          continue
        for mistake in () if isinstance(parent, ast.Expr) else mistakes(node):
          here = [*many[:index], mistake, *many[index + 1 :]]
          setattr(parent, field, here if isinstance(value, list) else mistake)
          text = f"line {getattr(node, 'lineno', '?')}: {shown(node)}  ->  {shown(mistake)}"
          found.append((text, ast.unparse(ast.fix_missing_locations(tree))))
          setattr(parent, field, value)
        visit(node)

  visit(tree)
  return [(text, changed) for text, changed in found if changed != ast.unparse(tree)]


def shown(node):
  return ast.unparse(ast.fix_missing_locations(node)).split("\n")[0][:90]


def passes(folder, tests, seconds):
  """Whether these tests of a copy of the project pass. Too long counts as failing."""
  command = [sys.executable, "-m", "pytest", "-x", "-q", "-n0", "-p", "no:cacheprovider"]
  command += [f"tests/{name}.py" for name in tests]
  environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
  try:
    done = subprocess.run(
      command, cwd=folder, env=environment, capture_output=True, timeout=seconds, check=False
    )
  except subprocess.TimeoutExpired:
    return False
  if done.returncode not in (0, 1, 2):  # passed, failed, or could not be imported
    raise RuntimeError(done.stdout.decode()[-2000:] + done.stderr.decode()[-2000:])
  return done.returncode == 0


def survives(folder, module, changed, seconds):
  """Whether the module's tests pass with this text in its place."""
  path = folder / "metajax" / f"{module}.py"
  original = path.read_text()
  path.write_text(changed)
  try:
    return passes(folder, TESTS[module], seconds)
  finally:
    path.write_text(original)


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("modules", nargs="*", help=f"of {', '.join(TESTS)}; all by default")
  parser.add_argument("--sample", type=int, help="mistakes in each module, drawn with the seed")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--workers", type=int, default=os.cpu_count())
  parser.add_argument("--seconds", type=float, default=900.0, help="limit for one mistake")
  options = parser.parse_args()
  for module in options.modules:
    if module not in TESTS:
      parser.error(f"no module {module!r}: choose from {', '.join(TESTS)}")

  jobs = []
  for module in options.modules or TESTS:
    found = mutants((ROOT / "metajax" / f"{module}.py").read_text())
    if options.sample is not None and options.sample < len(found):
      found = random.Random(options.seed).sample(found, options.sample)
    jobs += [(module, text, changed) for text, changed in found]

  with tempfile.TemporaryDirectory() as scratch:
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{scratch}/compiled")
    copies = queue.Queue()
    for worker in range(options.workers):
      shutil.copytree(
        ROOT, f"{scratch}/{worker}/project", ignore=shutil.ignore_patterns(".*", "__pycache__")
      )
      copies.put(Path(f"{scratch}/{worker}/project"))

    tests = dict.fromkeys(test for module, _, _ in jobs for test in TESTS[module])
    if not passes(copies.queue[0], tests, None):
      raise SystemExit("the tests fail without any mistake")

    def run(job):
      folder = copies.get()
      try:
        return survives(folder, job[0], job[2], options.seconds)
      finally:
        copies.put(folder)

    counts = {module: [0, 0] for module, _, _ in jobs}
    with concurrent.futures.ThreadPoolExecutor(options.workers) as pool:
      for (module, text, _), alive in zip(jobs, pool.map(run, jobs), strict=True):
        counts[module][alive] += 1
        print(f"{'NOT NOTICED' if alive else 'noticed':12}{module} {text}", flush=True)
  for module, (noticed, alive) in counts.items():
    print(f"{module}: {noticed} of {noticed + alive} noticed")
  noticed, total = sum(n for n, _ in counts.values()), len(jobs)
  print(f"{noticed} of {total} noticed, {100 * noticed / total:.1f} %")


if __name__ == "__main__":
  main()
