"""The peers of `benchmarks.peers`: meta-gradients in PyTorch and its meta-learning libraries.

Every peer computes the same numbers as metajax, up to rounding, in the memory layouts that PyTorch
prefers: parameters and images are converted once, outside the timed call. Rounding errors are
magnified in two places. If the input of a ReLU is within rounding of 0, the gradient can change by
several per cent. Adam with beta1 = 0 makes full-size steps in the direction of the gradient's sign,
which is noise for the bias of a convolution before normalization. Gradients should therefore be
compared in float64.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.func import grad, vmap
from torch.nn import functional

Tensors = Sequence[torch.Tensor]
Batch = tuple[torch.Tensor, torch.Tensor]  # inputs and targets
Loss = Callable[..., torch.Tensor]  # (params, inputs, targets) -> scalar, or [T] of stacked tasks
Slope = Callable[..., Tensors]  # (params, inputs, targets) -> gradient of the loss
Tree = dict[str, dict[str, np.ndarray]]

_ADAM_RATE, _BETA2, _EPSILON = 1e-3, 0.999, 1e-8
_SGD_RATE = 0.01


class Workload(NamedTuple):
  """The settings of a meta-step."""

  algorithm: str  # reptile, fomaml or maml
  model: str  # omniglot, omniglot_pool, sine or mini_imagenet
  inner_steps: int  # k, the number of losses in an episode, counting the tail's
  meta_batch: int  # T, the number of tasks
  batch: int  # b, the number of examples in an inner minibatch
  tail: int  # m, the number of examples in the tail


class Data(NamedTuple):
  """The episodes of a meta-step; images are NHWC."""

  pool_inputs: np.ndarray  # [T, n, ...]
  pool_targets: np.ndarray  # int [T, n], or float [T, n, 1] for regression
  schedule: np.ndarray  # int [T, k - 1, b]
  tail_inputs: np.ndarray  # [T, m, ...]
  tail_targets: np.ndarray  # [T, m], or [T, m, 1]


class Problem(NamedTuple):
  """A workload in PyTorch: flat parameters in the network's order, and the tasks' data."""

  workload: Workload
  loss: Loss
  params: list[torch.Tensor]
  to_tree: Callable[[Tensors], Tree]
  pool: Batch  # [T, n, ...]
  schedule: torch.Tensor  # [T, k - 1, b]
  tail: Batch  # [T, m, ...]

  def mean_of_tasks(self, gradient: Callable[[list[Batch], Batch], Tensors]) -> Tree:
    """The mean gradient over the tasks, computed one task after another.

    Args:
      gradient: `(batches, tail) -> gradient` of one task.
    """
    parts = []
    for inputs, targets, schedule, *tail in zip(*self.pool, self.schedule, *self.tail, strict=True):
      batches = [(inputs[rows], targets[rows]) for rows in schedule]
      parts.append(gradient(batches, (tail[0], tail[1])))
    return self.to_tree([torch.stack(leaves).mean(0) for leaves in zip(*parts, strict=True)])


Peer = Callable[[Workload, Tree, Data], Callable[[], Tree]]


def problem(
  workload: Workload,
  params: Tree,
  data: Data,
  *,
  channels_last: bool = False,
  elementary: bool = False,
) -> Problem:
  """Converts a workload, its parameters and its data to PyTorch.

  For even sizes and stride 2, SAME padding is (0, 1), whereas PyTorch's `padding=1` amounts to
  (1, 0). The network with stride 2 therefore works on mirrored images with mirrored kernels, which
  needs no further padding.

  Args:
    workload: the settings of the meta-step.
    params: the parameters of the metajax network.
    data: the episodes.
    channels_last: whether kernels and images are stored in the channels-last format.
    elementary: passed on to `convolutional`.
  """
  regression, mirrored = workload.model == "sine", workload.model == "omniglot"
  order = {"Conv": 0, "BatchStatsNorm": 1, "Dense": 0}
  layers = sorted(  # in the order Conv_0, BatchStatsNorm_0, Conv_1, ..., Dense_0, ...
    (name.startswith("Dense"), int(number), order[kind], name)
    for name in params
    for kind, _, number in [name.partition("_")]
  )
  paths = [
    (name, leaf)
    for *_, name in layers
    for leaf in ("kernel", "scale", "bias")
    if leaf in params[name]
  ]
  channels = 0 if regression else params["BatchStatsNorm_0"]["scale"].size
  mirror = slice(None, None, -1 if mirrored else None)

  def spatial(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A kernel's shape as HWIO. The kernel of a dense layer spans the whole image."""
    if len(shape) == 4:
      return shape
    side = math.isqrt(shape[0] // channels) if channels else 1
    return (side, side, shape[0] // side**2, shape[1])

  def to_tensor(leaf: np.ndarray) -> torch.Tensor:
    leaf = np.asarray(leaf)
    if leaf.ndim == 1:
      return torch.tensor(leaf)
    kernel = leaf.reshape(spatial(leaf.shape))[mirror, mirror].transpose(3, 2, 0, 1)
    if leaf.ndim == 2:
      return torch.tensor(kernel.reshape(leaf.shape[::-1]))
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.tensor(kernel.copy()).contiguous(memory_format=layout)

  def to_array(gradient: torch.Tensor, shape: tuple[int, ...]) -> np.ndarray:
    if len(shape) == 1:
      return gradient.numpy()
    height, width, features, outputs = spatial(shape)
    kernel = gradient.numpy().reshape(outputs, features, height, width).transpose(2, 3, 1, 0)
    return kernel[mirror, mirror].reshape(shape)

  def to_tree(gradients: Tensors) -> Tree:
    tree: Tree = {name: {} for name, _ in paths}
    for (name, leaf), gradient in zip(paths, gradients, strict=True):
      tree[name][leaf] = to_array(gradient, params[name][leaf].shape)
    return tree

  def examples(inputs: np.ndarray, targets: np.ndarray) -> Batch:
    if regression:
      return torch.tensor(inputs), torch.tensor(targets)
    images = np.moveaxis(inputs[:, :, mirror, mirror], -1, 2)  # still channels-last in memory
    tensor = torch.tensor(images.copy(order="K" if channels_last else "C"))
    return tensor, torch.tensor(targets, dtype=torch.int64)

  convolutions = partial(convolutional, pool=not mirrored, elementary=elementary)
  forward = perceptron if regression else convolutions
  criterion = functional.mse_loss if regression else functional.cross_entropy

  def loss(params: Tensors, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return criterion(forward(params, inputs), targets)

  return Problem(
    workload,
    loss,
    [to_tensor(params[name][leaf]) for name, leaf in paths],
    to_tree,
    examples(data.pool_inputs, data.pool_targets),
    torch.tensor(data.schedule, dtype=torch.int64),
    examples(data.tail_inputs, data.tail_targets),
  )


def convolutional(
  params: Tensors, inputs: torch.Tensor, *, pool: bool, elementary: bool
) -> torch.Tensor:
  """The logits `[n, ways]` of images `[n, channels, height, width]`.

  Args:
    params: the parameters, as a flat list in the network's order.
    inputs: the images.
    pool: whether max-pooling halves the images; otherwise the strides of the convolutions do.
    elementary: whether batch normalization is built from elementary operations. `batch_norm` is
      faster for a first derivative, but in PyTorch 2.13 it does not compile under vmap, and
      autograd through its vmapped gradient gives wrong results without an error.
  """
  *blocks, weight, bias = params
  hidden = inputs
  for first in range(0, len(blocks), 4):
    kernel, shift, scale, offset = blocks[first : first + 4]
    hidden = functional.conv2d(hidden, kernel, shift, stride=1 if pool else 2, padding=1)
    if elementary:
      variance, mean = torch.var_mean(hidden, (0, 2, 3), correction=0, keepdim=True)
      factor = (variance + 1e-3).rsqrt() * scale[:, None, None]
      hidden = (hidden - mean) * factor + offset[:, None, None]
    else:
      hidden = functional.batch_norm(hidden, None, None, scale, offset, training=True, eps=1e-3)
    hidden = functional.relu(functional.max_pool2d(hidden, 2, ceil_mode=True) if pool else hidden)
  return functional.linear(hidden.flatten(1), weight, bias)


def perceptron(params: Tensors, inputs: torch.Tensor) -> torch.Tensor:
  """The outputs `[n, 1]` of the network for sine waves, for inputs `[n, 1]`."""
  hidden = inputs
  for first in range(0, len(params) - 2, 2):
    hidden = torch.tanh(functional.linear(hidden, *params[first : first + 2]))
  return functional.linear(hidden, *params[-2:])


def adapted(workload: Workload, slope: Slope, params: Tensors, batches: Iterable[Batch]) -> Tensors:
  """The parameters after one inner step for each minibatch.

  The optimizer is Adam with beta1 = 0 for Reptile, and SGD for the other algorithms.
  """
  moments: Tensors = []
  for count, batch in enumerate(batches, 1):
    grads = slope(params, *batch)
    if workload.algorithm != "reptile":
      params = torch._foreach_add(params, grads, alpha=-_SGD_RATE)
      continue
    squares = torch._foreach_mul(torch._foreach_mul(grads, grads), 1 - _BETA2)
    moments = torch._foreach_add(squares, moments, alpha=_BETA2) if moments else squares
    roots = torch._foreach_sqrt(moments)
    torch._foreach_div_(roots, math.sqrt(1 - _BETA2**count))
    torch._foreach_add_(roots, _EPSILON)
    params = torch._foreach_addcdiv(params, grads, roots, value=-_ADAM_RATE)
  return params


def meta_gradient(
  problem: Problem, slope: Slope, loss: Loss, batches: Iterable[Batch], tail: Batch
) -> Tensors:
  """The meta-gradient of one task, or of stacked tasks.

  For stacked tasks, Reptile and FOMAML give one gradient for each task, and MAML gives the gradient
  of the mean loss over the tasks.
  """
  workload, params = problem.workload, problem.params
  if workload.algorithm == "reptile":
    return torch._foreach_sub(params, adapted(workload, slope, params, [*batches, tail]))
  if workload.algorithm == "fomaml":
    return slope(adapted(workload, slope, params, batches), *tail)
  leaves = [leaf.detach().requires_grad_() for leaf in params]
  objective = loss(adapted(workload, slope, leaves, batches), *tail).mean()
  return torch.autograd.grad(objective, leaves)


def func_vmap(
  workload: Workload, params: Tree, data: Data, *, compiled: bool = False
) -> Callable[[], Tree]:
  """All tasks at once under vmap; their convolutions become one convolution with `T` groups."""
  maml = workload.algorithm == "maml"
  given = problem(workload, params, data, elementary=maml or compiled)
  fuse = compile_fully if compiled else lambda function: function
  tasks = torch.arange(workload.meta_batch)[:, None]

  def over_tasks(function: Callable[..., Any]) -> Callable[..., Any]:
    """Maps a function over tasks with stacked parameters, or with parameters that they share.

    Before the first step, all tasks have the same parameters and so share their kernels.
    """
    shared, stacked = (fuse(vmap(function, in_dims=(axis, 0, 0))) for axis in (None, 0))

    def call(leaves: Tensors, *batch: torch.Tensor) -> Any:
      of_phi = leaves[0].ndim == given.params[0].ndim
      return (shared if of_phi else stacked)(list(leaves), *batch)

    return call

  slope, loss = over_tasks(grad(given.loss)), over_tasks(given.loss)

  def call() -> Tree:
    inputs, targets = given.pool
    batches = ((inputs[tasks, rows], targets[tasks, rows]) for rows in given.schedule.unbind(1))
    gradient = meta_gradient(given, slope, loss, batches, given.tail)
    return given.to_tree(gradient if maml else [leaf.mean(0) for leaf in gradient])

  return call


def func_loop(
  workload: Workload,
  params: Tree,
  data: Data,
  *,
  channels_last: bool = False,
  compiled: bool = False,
) -> Callable[[], Tree]:
  """One task after another.

  Unless `compiled`, gradients come from plain autograd, which then costs less than torch.func.
  """
  if channels_last and workload.model == "sine":
    raise NotImplementedError("there are no channels")
  given = problem(workload, params, data, channels_last=channels_last)
  maml = workload.algorithm == "maml"

  def autograd(params: Tensors, *batch: torch.Tensor) -> Tensors:
    leaves = params if maml else [leaf.detach().requires_grad_() for leaf in params]
    return torch.autograd.grad(given.loss(leaves, *batch), leaves, create_graph=maml)

  def traced(params: Tensors, *batch: torch.Tensor) -> Tensors:
    return slope(list(params), *batch)

  slope = compile_fully(grad(given.loss)) if compiled else autograd
  return lambda: given.mean_of_tasks(partial(meta_gradient, given, traced, given.loss))


def sequential(workload: Workload, params: Tree, data: Data) -> Problem:
  """The problem for one task at a time.

  The channels-last format is faster unless the loss is differentiated twice.
  """
  first_order = workload.algorithm != "maml"
  return problem(workload, params, data, channels_last=first_order)


def compile_fully(function: Callable[..., Any]) -> Callable[..., Any]:
  torch._dynamo.config.recompile_limit = 256  # per code object, compiled anew for each workload
  return torch.compile(function, fullgraph=True, dynamic=False)


def func_compiled(workload: Workload, params: Tree, data: Data) -> Callable[[], Tree]:
  """With a compiled gradient of an inner step.

  Networks with max-pooling, whose images are large, are faster one task after another.
  """
  if workload.model in ("omniglot_pool", "mini_imagenet"):
    return func_loop(workload, params, data, channels_last=True, compiled=True)
  return func_vmap(workload, params, data, compiled=True)


def with_higher(workload: Workload, params: Tree, data: Data) -> Callable[[], Tree]:
  """With `higher.innerloop_ctx`, one task after another."""
  import higher

  given = sequential(workload, params, data)
  maml, reptile = workload.algorithm == "maml", workload.algorithm == "reptile"

  class Network(torch.nn.Module):
    def __init__(self) -> None:
      super().__init__()
      self.leaves = torch.nn.ParameterList(given.params)

    def forward(self, *batch: torch.Tensor) -> torch.Tensor:
      return given.loss(list(self.parameters()), *batch)

  network = Network()
  optimizer: torch.optim.Optimizer = torch.optim.SGD(network.parameters(), _SGD_RATE)
  if reptile:
    optimizer = torch.optim.Adam(
      network.parameters(), _ADAM_RATE, betas=(0.0, _BETA2), eps=_EPSILON
    )

  def gradient(batches: list[Batch], tail: Batch) -> Tensors:
    context = higher.innerloop_ctx(
      network, optimizer, copy_initial_weights=False, track_higher_grads=maml
    )
    with context as (learner, inner):
      for count, batch in enumerate((*batches, tail) if reptile else batches, 1):
        # higher's Adam adds epsilon before the bias correction, so epsilon is scaled accordingly.
        epsilon = {"eps": [_EPSILON * math.sqrt(1 - _BETA2**count)]} if reptile else None
        inner.step(learner(*batch), override=epsilon)
      if reptile:
        return torch._foreach_sub(given.params, [leaf.detach() for leaf in learner.parameters()])
      of = network.parameters() if maml else learner.parameters()
      return torch.autograd.grad(learner(*tail), tuple(of))

  return lambda: given.mean_of_tasks(gradient)


def with_torchopt(workload: Workload, params: Tree, data: Data) -> Callable[[], Tree]:
  """With TorchOpt's functional optimizers, one task after another.

  Updates are made in place, except for MAML.
  """
  import torchopt

  given = sequential(workload, params, data)
  maml, reptile = workload.algorithm == "maml", workload.algorithm == "reptile"
  optimizer = torchopt.sgd(_SGD_RATE)
  if reptile:
    optimizer = torchopt.adam(_ADAM_RATE, betas=(0.0, _BETA2), eps=_EPSILON)

  def gradient(batches: list[Batch], tail: Batch) -> Tensors:
    phi = [leaf.clone().requires_grad_() for leaf in given.params]
    leaves, state = phi, optimizer.init(phi)
    for batch in (*batches, tail) if reptile else batches:
      grads = torch.autograd.grad(given.loss(leaves, *batch), leaves, create_graph=maml)
      updates, state = optimizer.update(list(grads), state, inplace=not maml)
      leaves = torchopt.apply_updates(leaves, updates, inplace=not maml)
    if reptile:
      return torch._foreach_sub(given.params, [leaf.detach() for leaf in leaves])
    return torch.autograd.grad(given.loss(leaves, *tail), phi if maml else leaves)

  return lambda: given.mean_of_tasks(gradient)


PEERS: dict[str, Peer] = {
  "torch.func vmap": func_vmap,
  "torch.func loop": func_loop,
  "torch.func loop channels_last": partial(func_loop, channels_last=True),
  "torch.compile": func_compiled,
  "higher": with_higher,
  "torchopt": with_torchopt,
}
