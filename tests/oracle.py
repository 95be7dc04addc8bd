"""The paper in plain Python loops and NumPy, on softmax regression with its derivatives by hand.

Slow and obvious: it shares no code with the library, and judges it. Parameters are one matrix
`[features, classes]`; a batch is inputs `[b, features]` and labels `[b]`; the loss is a sum.
"""

import numpy as np


def probabilities(weights, inputs):
  logits = inputs @ weights
  exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
  return exponentials / exponentials.sum(axis=1, keepdims=True)


def loss(weights, batch):
  inputs, labels = batch
  p = probabilities(weights, inputs)
  return -sum(np.log(p[row, label]) for row, label in enumerate(labels))


def gradient(weights, batch):
  inputs, labels = batch
  total = np.zeros_like(weights)
  for x, label, p in zip(inputs, labels, probabilities(weights, inputs), strict=True):
    error = p.copy()
    error[label] -= 1
    total += np.outer(x, error)
  return total


def hessian_vector(weights, batch, vector):
  inputs, _ = batch
  total = np.zeros_like(weights)
  for x, p in zip(inputs, probabilities(weights, inputs), strict=True):
    slope = x @ vector
    total += np.outer(x, p * slope - p * (p @ slope))
  return total


def sgd(rate):
  def update(state, grad):
    return state, -rate * grad

  return lambda weights: None, update


def adam(rate, beta2=0.999, epsilon=1e-8):
  """Adam with beta1 = 0."""

  def init(weights):
    return 0, np.zeros_like(weights)

  def update(state, grad):
    count, second = state
    count, second = count + 1, beta2 * second + (1 - beta2) * grad**2
    return (count, second), -rate * grad / (np.sqrt(second / (1 - beta2**count)) + epsilon)

  return init, update


def unroll(weights, state, batches, update):
  """The gradients and updates of every step, and where the steps lead."""
  grads, updates = [], []
  for batch in batches:
    grads.append(gradient(weights, batch))
    state, step = update(state, grads[-1])
    updates.append(step)
    weights = weights + step
  return weights, state, grads, updates


def reptile(weights, state, batches, optimizer):
  adapted, state, _, _ = unroll(weights, state, batches, optimizer[1])
  return weights - adapted, state


def fomaml(weights, state, batches, optimizer):
  adapted, state, _, _ = unroll(weights, state, batches[:-1], optimizer[1])
  return gradient(adapted, batches[-1]), state


def maml_through_sgd(weights, batches, rate):
  """Equation 24: the product of (I - rate H_j) times the last gradient, each H_j at phi_j."""
  path = [weights]
  for batch in batches[:-1]:
    path.append(path[-1] - rate * gradient(path[-1], batch))
  result = gradient(path[-1], batches[-1])
  for phi, batch in reversed(list(zip(path[:-1], batches[:-1], strict=True))):
    result = result - rate * hessian_vector(phi, batch, result)
  return result


def serial(estimate, weights, state, tasks, optimizer):
  """The mean over tasks, the optimizer's state handed from each task to the next."""
  total = np.zeros_like(weights)
  for batches in tasks:
    grad, state = estimate(weights, state, batches, optimizer)
    total += grad
  return total / len(tasks), state
