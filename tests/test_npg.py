"""Proves the formulas of npg.py, which trpo.py has too: policy, KL, Fisher matrix, direction, step, losses.

The Fisher matrix is written down as the outer product of scores, exact for both kinds of policies, and as the
Hessian of torch's KL. Whole runs of both scripts are in test_trpo.py.
"""

import copy
import math
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from gymnasium import spaces
from second_road import close, distribution, new_agent, vector
from tabular import BOX
from torch.distributions import kl_divergence
from torch.nn.utils import vector_to_parameters

import npg
import trpo


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(params=[npg, trpo], ids=["npg", "trpo"])
def module(request):
    return request.param


@pytest.fixture(params=[spaces.Discrete(3), BOX], ids=["categorical", "gaussian"])
def agent(request, module):
    return new_agent(module, request.param, obs_dim=3, hidden_size=3)


def random_batch(agent, *shape):
    actions = torch.randint(3, shape) if agent.discrete else torch.randn(*shape, 2)
    return torch.randn(*shape, 3), actions, torch.randn(shape)


def params_of(agent):
    return [param for name, param in agent.named_parameters() if not name.startswith("critic")]


def jacobian(values, params, **kwargs):
    rows = torch.autograd.grad(values, params, torch.eye(len(values)), is_grads_batched=True, **kwargs)
    return torch.cat([row.flatten(1) for row in rows], 1)


def dense_fisher(agent, x, params):
    """Mean over s of E_a[∇ log π(a|s) ∇ log π(a|s)ᵀ]; Gauss-Hermite nodes make that exact for Gaussians."""
    pi, fisher, (nodes, weights) = distribution(agent, x), 0.0, np.polynomial.hermite_e.hermegauss(3)
    if agent.discrete:
        cases = [(torch.full(probs.shape, a), probs.detach()) for a, probs in enumerate(pi.probs.T)]
    else:
        nodes, weights = torch.tensor(nodes), weights / weights.sum()
        chosen = map(list, product(range(3), repeat=len(agent.log_std)))
        cases = [(pi.mean + pi.stddev * nodes[i], weights[i].prod()) for i in chosen]
    for actions, weight in cases:
        scores = jacobian(pi.log_prob(actions.detach()), params, retain_graph=True)
        fisher = fisher + (weight * scores.T) @ scores / len(x)
    return fisher


def shipped_loss(module, agent, old, obs, actions, advantages, ent_coef=0.0):
    with torch.no_grad():
        old_logprobs, dist = old.policy(obs, actions)[0], old.distribution(obs)
    return module.surrogate_loss(agent, obs, actions, old_logprobs, advantages, dist, ent_coef)


def test_kl_in_float32(module):
    mean, log_std = torch.zeros(1, 1).float(), torch.full((1,), -1.0).float()
    for change in (1e-3, 1e-5):  # σ² itself would lose it in rounding
        kl = module.kl_divergence((mean, log_std), (mean + change * log_std.exp(), log_std + change))
        assert kl.item() == pytest.approx(1.5 * change**2, rel=0.1)


def test_fisher_is_the_outer_product_of_scores(module, agent):
    (obs, *_), params = random_batch(agent, 12), params_of(agent)
    fisher_vector_product = module.fisher_vector_product(agent, obs.reshape(3, 4, 3), params)  # time first
    fisher = torch.stack([fisher_vector_product(unit) for unit in torch.eye(len(vector(params)))], 1)
    close(fisher, dense_fisher(agent, obs, params))
    for v in torch.randn(3, len(fisher)):
        close(fisher_vector_product(v), fisher @ v)  # linear


@pytest.mark.parametrize("n", [1, 2, 8, 20])
def test_conjugate_gradient_is_the_best_in_the_krylov_space(module, n):
    """After k iterations no combination of b, A b, ..., A^(k−1) b has a smaller error, measured by A."""
    root, b, errors = torch.randn(n, 2 * n), torch.randn(n), []
    A = root @ root.T / n
    solution = torch.linalg.solve(A, b)
    close(module.conjugate_gradient(lambda v: A @ v, b, n, 1e-12), solution, 1e-8)
    for k in range(1, min(n, 8)):
        basis = torch.stack([torch.linalg.matrix_power(A, i) @ b for i in range(k)], 1)
        x = module.conjugate_gradient(lambda v: A @ v, b, k)
        close(x, basis @ torch.linalg.solve(basis.T @ A @ basis, basis.T @ b), 1e-6)
        errors.append((x - solution) @ A @ (x - solution))
    assert all(a > b for a, b in pairwise(errors))
    assert torch.equal(module.conjugate_gradient(lambda v: A @ v, 0 * b, 5), 0 * b)


def test_conjugate_gradient_stops_at_the_residual_and_minds_the_curvature(module):
    """Many more iterations than needed change nothing, with a b of any size; each calls the product once."""
    for dtype, scale in product((torch.float32, torch.float64), (1e-12, 1.0, 1e12)):
        root, b, calls = torch.randn(9, 40, dtype=dtype), scale * torch.randn(9, dtype=dtype), []
        A = root @ root.T
        results = [module.conjugate_gradient(lambda v, A=A: A @ v, b, k, 1e-3) for k in range(30)]
        last = next(k for k, x in enumerate(results) if (A @ x - b).norm() <= 1e-3 * b.norm())
        assert 2 < last < 9
        assert all(torch.equal(x, results[last]) for x in results[last:])
        assert not torch.equal(results[last], results[last - 1])
        module.conjugate_gradient(lambda v, A=A, calls=calls: calls.append(v) or A @ v, b, 30)
        assert len(calls) == 30
    for diagonal in torch.tensor([[-1.0, -2, -3], [1.0, 2, -0.5], [0.0, 0, 0]]):
        assert module.conjugate_gradient(lambda v, d=diagonal: d * v, torch.ones(3), 5).isnan().all()


@pytest.mark.parametrize("damping", [0.0, 0.01, 0.5])
def test_direction_curvature_and_the_kl_of_the_step(module, agent, damping):
    params, old, batch, errors = params_of(agent), copy.deepcopy(agent), random_batch(agent, 60), []
    F, start = dense_fisher(agent, batch[0], params), vector(params)
    for iterations in (80, 3):
        g = -module.flat_grad(shipped_loss(module, agent, agent, *batch)[0], params)
        fvp = module.fisher_vector_product(agent, batch[0], params)
        x, curvature = module.natural_gradient(fvp, g, iterations, damping)
        close(curvature, x @ F @ x, 1e-9 if iterations == 3 else 0.01 * curvature)
        if damping:
            solution = torch.linalg.solve(F + damping * torch.eye(len(F)), g)
            assert ((x - solution).norm() < 1e-4 * solution.norm()) == (iterations == 80)
    close(module.kl_step_size(torch.tensor(8.0), 0.04), 0.1)
    for max_kl in (1e-2, 1e-4, 1e-6, 1e-8):
        vector_to_parameters(start + module.kl_step_size(curvature, max_kl) * x, params)
        kl = kl_divergence(*(distribution(x, batch[0]) for x in (old, agent))).mean().item()
        errors.append(abs(kl / max_kl - 1))
    assert all(small < 0.2 * large for large, small in pairwise(errors))  # with √ε, or faster
    assert errors[-1] < 1e-3


@pytest.mark.parametrize("ent_coef", [0.0, 0.3])
def test_losses_metrics_and_gradient(module, agent, ent_coef):
    obs, actions, advantages = batch = random_batch(agent, 4, 5)
    old = copy.deepcopy(agent)
    for param in old.parameters():
        param.data.add_(0.2 * torch.randn_like(param))
    loss, metrics = shipped_loss(module, agent, old, *batch, ent_coef)
    pi, pi_old, params = distribution(agent, obs), distribution(old, obs), params_of(agent)
    logratios = (pi.log_prob(actions) - pi_old.log_prob(actions)).flatten().tolist()
    gain = np.mean([math.exp(x) * a for x, a in zip(logratios, advantages.flatten(), strict=True)])
    approx_kl, entropy = np.mean([math.exp(x) - 1 - x for x in logratios]), pi.entropy().mean()
    close(torch.stack(metrics), [-gain, entropy.item(), approx_kl, kl_divergence(pi_old, pi).mean().item()])
    close(loss, -gain - ent_coef * entropy)
    # At π_old the gradient is that of mean log π(a|s) A + ent_coef H; elsewhere it is another one
    plain = module.flat_grad((pi.log_prob(actions) * advantages).mean() + ent_coef * entropy, params)
    close(-module.flat_grad(shipped_loss(module, agent, agent, *batch, ent_coef)[0], params), plain)
    assert (module.flat_grad(loss, params) + plain).norm() > 0.1 * plain.norm()
    with pytest.raises(AssertionError):
        shipped_loss(module, agent, old, *batch[:2], advantages[:, :1])
    errors = [agent.critic(x).item() - g.item() for x, g in zip(obs[0], advantages[0], strict=True)]
    close(module.critic_loss(agent, obs[0], advantages[0]), np.mean(np.square(errors)))
    with pytest.raises(AssertionError):
        module.critic_loss(agent, obs[0], advantages)
