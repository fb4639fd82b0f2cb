"""Proves that ppo.py computes what its formulas say: advantages, losses, policies, statistics, whole runs.

References are double loops in NumPy, numbers worked out by hand, torch.distributions and torch's own Adam.
What stands in other scripts in the same words is proved here for all of them.
"""

import copy
import math

import numpy as np
import pytest
import torch
from second_road import CASES, as_seen, close, distribution, lambda_loop, new_agent, watch
from tabular import BOX, DISCRETE, SPACES
from torch.distributions import Normal

import a2c
import actor_critic
import npg
import ppo
import reinforce
import trpo


def random_case(space, size=16):
    """An agent, and obs, actions, old log-probabilities (some within the clip range), advantages, returns."""
    agent, shapes = new_agent(ppo, space, 3), ((3,), (2,), (), (), ())
    obs, actions, change, advantages, returns = (torch.randn(size, *x, dtype=torch.float64) for x in shapes)
    actions = torch.randint(2, (size,)) if space is DISCRETE else actions
    logprobs = distribution(agent, obs).log_prob(actions).detach()
    return agent, [obs, actions, logprobs + 0.3 * change, 2 * advantages + 1, returns]


def reference_loss(agent, obs, actions, old_logprobs, advantages, returns, args):
    """PPO's loss sample by sample, where `if` chooses the branch; and what is logged."""
    pi, eps, losses, kls, clipped = distribution(agent, obs), args.clip_coef, [], [], 0
    if args.normalize_advantages:
        advantages = (advantages - advantages.numpy().mean()) / advantages.numpy().std()
    for logratio, advantage in zip(pi.log_prob(actions) - old_logprobs, advantages, strict=True):
        ratio, bound = logratio.exp(), 1 + eps if advantage > 0 else 1 - eps
        beyond = ratio > bound if advantage > 0 else ratio < bound
        losses.append(-bound * advantage if beyond else -ratio * advantage)
        kls.append(ratio.item() - 1 - logratio.item())
        clipped += not 1 - eps <= ratio.item() <= 1 + eps
    policy_loss, entropy = sum(losses) / len(losses), pi.entropy().mean()
    value_loss = sum((v - g) ** 2 for (v,), g in zip(agent.critic(obs), returns, strict=True)) / len(returns)
    loss = policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy
    return loss, [policy_loss.item(), value_loss.item(), entropy.item(), np.mean(kls), clipped / len(kls)]


def gradients(loss, agent):
    """One for each parameter; zeros where there is no way from the loss to it."""
    return torch.autograd.grad(loss, list(agent.parameters()), retain_graph=True, materialize_grads=True)


@pytest.mark.parametrize("module", [a2c, actor_critic, npg, trpo, ppo])
def test_gae_equals_a_double_loop_over_separate_episodes(module):
    for case, arrays in enumerate(CASES[:90]):
        gamma, lam = (0.0, 0.875, 1.0)[case % 3], (0.0, 0.75, 1.0)[case // 3 % 3]
        close(module.gae(*map(torch.from_numpy, arrays), gamma, lam), lambda_loop(*arrays, gamma, lam))
    for i in range(5):  # shapes that would broadcast
        with pytest.raises(AssertionError):
            module.gae(*(torch.zeros(3, 2 - (k == i)) > 0 for k in range(5)), 0.99, 1.0)


def test_clipped_surrogate_table():
    """The slope is that of the loss in ρ: zero exactly where the clip holds, and there alone."""
    for advantage, ratio, loss, slope in (
        (1.0, 0.5, -0.5, -1), (1.0, 1.0, -1.0, -1), (1.0, 1.1, -1.1, -1), (1.0, 1.5, -1.2, 0),
        (-1.0, 0.5, 0.8, 0), (-1.0, 0.9, 0.9, 1), (-1.0, 1.0, 1.0, 1), (-1.0, 1.5, 1.5, 1),
        (3.0, 1.5, -3.6, 0), (-3.0, 1.5, 4.5, 3), (0.0, 1.5, 0.0, 0),
    ):  # fmt: skip
        rho = torch.tensor([ratio], dtype=torch.float64, requires_grad=True)
        value, approx_kl, clipfrac = ppo.clipped_surrogate(rho.log(), torch.tensor([advantage]), 0.2)
        close((value, approx_kl, clipfrac), (loss, ratio - 1 - math.log(ratio), ratio in (0.5, 1.5)))
        close(torch.autograd.grad(value, rho)[0], [slope])
        assert not approx_kl.requires_grad


@SPACES
def test_loss_and_gradient(space):
    """Also: losses are means, each trains its own network, at π_old the gradient is the policy gradient."""
    agent, batch = random_case(space)
    kinds = ({}, {"normalize_advantages": False}, {"vf_coef": 0.0}, {"vf_coef": 0.0, "ent_coef": 0.0})
    for args in (ppo.Args(**flags) for flags in kinds):
        loss, metrics = ppo.ppo_loss(agent, *batch, args)
        expected, numbers = reference_loss(agent, *batch, args)
        close((loss, *metrics), (expected, *numbers), 1e-7)
        close(gradients(loss, agent), gradients(expected, agent), 1e-6)
        for (name, _), grad in zip(agent.named_parameters(), gradients(loss, agent), strict=True):
            assert (grad.abs().sum() > 0) == bool(args.vf_coef or not name.startswith("critic")), name
        shuffled_copies = (x[torch.arange(48) * 5 % 16] for x in batch)
        close(ppo.ppo_loss(agent, *shuffled_copies, args)[0], loss, 1e-7)
    assert len({param.untyped_storage().data_ptr() for param in agent.parameters()}) == 12 + (space is BOX)
    obs, actions, _, advantages, returns = batch
    logprobs = distribution(agent, obs).log_prob(actions)
    loss, _ = ppo.ppo_loss(agent, obs, actions, logprobs.detach(), advantages, returns, args)
    scaled = (advantages - advantages.mean()) / advantages.std(correction=0)
    close(gradients(loss, agent), gradients(-(logprobs * scaled).mean(), agent), 1e-6)
    batch[3] = torch.full((16,), -12345.678)  # equal advantages teach nothing, whatever rounding says
    loss, _ = ppo.ppo_loss(agent, *batch, ppo.Args(vf_coef=0.0, ent_coef=0.0))
    assert not any(grad.any() for grad in gradients(loss, agent))
    for i in (2, 3, 4):  # (B, 1) beside (B,)
        with pytest.raises(AssertionError):
            ppo.ppo_loss(agent, *batch[:i], batch[i][:, None], *batch[i + 1 :], args)


@SPACES
@pytest.mark.parametrize("module", [reinforce, actor_critic, a2c, npg, trpo, ppo])
def test_acting_in_numpy_draws_from_the_policy(module, space):
    """The noise is independent in time, environment and dimension, and each action as frequent as π(a|s)."""
    agent, steps = new_agent(module, space, 3, double=False, normalize_obs=True), 20_000
    offset, scale = torch.tensor([[5.0, 5.0, 1e5], [1.0, 30.0, 1.0]])  # 1e5 costs digits in another order
    agent.obs_norm.update(offset + scale * torch.randn(50, 3))
    obs, noise, act = offset + scale[[1, 1, 0]] * torch.randn(2, 3), agent.noise(steps, 2), agent.in_numpy()
    x = torch.from_numpy(noise).double().flatten(1)
    u = (-(-x).exp()).exp() if space is DISCRETE else Normal(0, 1).cdf(x)  # uniform if x is Gumbel or normal
    z = math.sqrt(12) * (torch.cat([u[1:], u[:-1]], 1) - 0.5)
    close(z.T @ z / len(z), torch.eye(z.shape[1]), 5 / math.sqrt(steps))
    for k in range(1, 9):
        close((u**k).mean(0), torch.full(u.shape[1:], 1 / (k + 1)), 4 * 0.3 / math.sqrt(steps))
    seen = agent.obs_norm(obs)
    assert seen.abs().max() == 10
    out, sigma = agent.actor(seen).detach().numpy(), agent.log_std.exp().detach().numpy()
    for n in (*noise[:100], 0):
        close(act(obs.numpy(), n), (out + n).argmax(-1) if space is DISCRETE else out + sigma * n, 1e-5)


def test_initial_weights_are_orthogonal():
    agent = new_agent(ppo, BOX, 5, spread=0, double=False, hidden_size=16, log_std_init=-0.5)
    for net, last in ((agent.actor, 0.01), (agent.critic, 1.0)):
        for layer, gain in zip(net[::2], (2**0.5, 2**0.5, last), strict=True):
            w = layer.weight if layer.out_features <= layer.in_features else layer.weight.T
            close((w @ w.T, layer.bias), (gain**2 * torch.eye(len(w)), torch.zeros_like(layer.bias)), 1e-5)
    assert (agent.log_std == -0.5).all()


@pytest.mark.parametrize("shape", [(), (3,)])
def test_running_moments_equal_those_of_all_rows(shape):
    """Of float32 rows far from 0, where digits cancel."""
    rng, norm = np.random.default_rng(0), ppo.RunningNorm(*shape)
    x, rows = torch.randn(4, *shape), np.empty((0, *shape))
    assert torch.equal(norm(x), x)  # before the first rows
    for size in [*rng.integers(1, 50, 20).tolist(), 1, 1, 2]:
        new = np.float32(1e6 + rng.normal(size=(size, 2, *shape)) * (np.arange(1, 4) if shape else 2))
        rows = np.concatenate([rows, new.reshape(-1, *shape)])
        norm.update(torch.from_numpy(new))
        np.testing.assert_allclose(norm.mean, rows.mean(0), rtol=1e-7)
        np.testing.assert_allclose(norm.scale, 1 / np.sqrt(rows.var(0) + 1e-8), rtol=1e-6)
    x = 1e6 + 30 * torch.randn(100, *shape)
    close(norm(x), ((x.numpy() - norm.mean.numpy()) / rows.std(0)).clip(-10, 10), 1e-5)


def test_a_constant_input_comes_out_as_0():
    """Also where it is large, in both ways to act; other values are not blown up."""
    agent, same = new_agent(ppo, BOX, 3, double=False, normalize_obs=True), torch.tensor([[1e5, 0.1, -1 / 3]])
    for size in (1, 24, 255, 2048):
        agent.obs_norm.update(same.expand(size, 7, 3))
    close(agent.obs_norm(torch.cat([same, same + 1])), [[0.0] * 3, [1.0] * 3], 1e-6)
    close(agent.in_numpy()(same.numpy(), 0), agent.actor(torch.zeros(1, 3)), 1e-6)


KINDS = [
    {}, {"normalize_rewards": True, "normalize_advantages": False, "anneal_lr": False, "num_minibatches": 1},
    {"normalize_obs": True, "target_kl": 0.03, "update_epochs": 6},
]  # fmt: skip


@SPACES
@pytest.mark.parametrize("changes", KINDS, ids=lambda changes: "-".join(changes))
def test_a_run_can_be_retraced_by_a_second_road(space, changes):
    """Loops, separate parameters, backward(); what train() hands to its loss is compared on the way."""
    flags = {"num_envs": 3, "num_steps": 8, "num_minibatches": 4, "update_epochs": 3, "total_timesteps": 192}
    flags |= {"learning_rate": 0.02, "gamma": 0.9, "gae_lambda": 0.7, "ent_coef": 0.02, "device": "cpu"}
    flags |= {"env_id": f"Tabular{type(space).__name__}-v0"}
    args, epochs, clipped = ppo.Args(**flags | changes), [], 0
    agent = new_agent(ppo, space, normalize_obs=args.normalize_obs)
    other = copy.deepcopy(agent)
    optimizer = torch.optim.Adam(other.parameters(), eps=1e-5)
    iterations = watch(ppo, agent, "ppo_loss", args)
    assert len(iterations) == 8
    for k, iteration in enumerate(iterations):
        optimizer.param_groups[0]["lr"] = rate = 0.02 * (1 - k / 8 * args.anneal_lr)
        close(iteration.rates, [rate, rate])
        now, raw = as_seen(args, other, iterations, k), iteration.steps.obs.flatten(0, 1)
        logprobs = distribution(other, now.obs).log_prob(now.actions).detach()
        left, logged = iteration.batches[:], []
        for epoch in range(args.update_epochs):
            values, next_values = (other.critic(x).detach()[..., 0] for x in (now.obs, now.next_obs))
            arrays = now.rewards, values, next_values, now.terminated, now.dones
            advantages = torch.from_numpy(lambda_loop(*(x.numpy() for x in arrays), 0.9, 0.7))
            returns = advantages + values
            if epoch == 0:
                explained = 1 - advantages.numpy().var() / returns.numpy().var()
            batch = [x.flatten(0, 1) for x in (now.obs, now.actions, logprobs, advantages, returns)]
            order = iteration.orders[epoch]
            assert order.sort()[0].tolist() == list(range(24))
            for rows in order.chunk(args.num_minibatches):
                (given, _), chosen = left.pop(0), [x[rows] for x in batch]
                close(given[:-1], (raw[rows], *chosen[1:]), 1e-6)
                loss, numbers = reference_loss(other, *chosen, args)
                optimizer.zero_grad()
                loss.backward()
                numbers.append(torch.nn.utils.clip_grad_norm_(other.parameters(), 0.5).item())
                optimizer.step()
                logged.append(numbers)
            if args.target_kl and np.mean(logged[-args.num_minibatches :], 0)[3] > args.target_kl:
                break
        epochs.append(epoch)
        assert not left
        expected = dict(zip(ppo.METRICS, [*np.mean(logged, 0), explained], strict=True))
        assert iteration.metrics == pytest.approx(expected, rel=1e-5, abs=1e-6)
        clipped += max(numbers[5] for numbers in logged) > 0.5
    close(tuple(agent.parameters()), tuple(other.parameters()), 1e-6)
    assert clipped
    assert (len(set(epochs)) > 1) == bool(args.target_kl)
