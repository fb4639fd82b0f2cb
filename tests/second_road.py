"""What several tests compare the scripts with, and how they look into whole runs of the shipped `train`.

References are torch.distributions, sums term by term, and statistics of all rows of the past at once.
"""

import copy
import tempfile
from collections import namedtuple
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gymnasium import spaces
from tabular import BOX
from torch.distributions import Categorical, Independent, Normal

torch.set_num_threads(1)  # small tensors; two threads only wait for each other


def close(actual, expected, tolerance=1e-10):
    """Compares numbers, arrays, or tuples of them."""
    for pair in zip(actual, expected, strict=True) if isinstance(actual, tuple) else ((actual, expected),):
        tensors = (torch.as_tensor(x, dtype=torch.float64).detach() for x in pair)
        torch.testing.assert_close(*tensors, rtol=0, atol=tolerance)


def vector(tensors):
    return torch.cat([x.detach().flatten() for x in tensors])


def new_agent(module, space, obs_dim=18, spread=0.5, double=True, **flags):
    """With a spread, all parameters are far from 0, so that no part of a formula can hide."""
    torch.manual_seed(0)
    envs = SimpleNamespace(obs_dim=obs_dim, action_dim=spaces.flatdim(space), discrete=space is not BOX)
    agent = module.Agent(envs, module.Args(**{"hidden_size": 5} | flags))
    for param in agent.parameters() if spread else ():
        param.data.add_(spread * torch.randn_like(param))
    return agent.double() if double else agent


def distribution(agent, x):
    """π(·|s) of torch.distributions, for what the network sees."""
    z = agent.actor(x)
    return Categorical(logits=z) if agent.discrete else Independent(Normal(z, agent.log_std.exp()), 1)


def random_arrays(case):
    """rewards, values, next_values, terminated, dones (T, N); ends of both kinds: few, many, everywhere."""
    rng = np.random.default_rng(case)
    shape = (int(rng.integers(1, 20)), int(rng.integers(1, 4)))
    terminated, truncated = (rng.random(shape) < rng.choice([0, p, 0.5]) for p in (0.1, 0.2))
    (terminated, truncated)[case % 2][{0: slice(None), 1: 0, 2: -1}.get(case % 10, slice(0))] = True
    dones, (rewards, values, next_values) = terminated | truncated, 10 * rng.normal(size=(3, *shape))
    next_values[:-1] = np.where(dones[:-1], next_values[:-1], values[1:])  # else s' is s_{t+1}
    return rewards, values, next_values, terminated, dones


CASES = [random_arrays(case) for case in range(200)]


def left(dones, t, i):
    """The number of steps from t to the end of the episode, or of the batch."""
    return min(len(dones) - t, 1 + int(np.argmax([*dones[t:, i], True])))


def n_step_loop(rewards, values, next_values, terminated, dones, gamma, n):
    """Σ_{k<m} γ^k r_{t+k} + γ^m (1 − terminated) V(s'_{t+m−1}) − V(s_t), term by term."""
    advantages = -values
    for t, i in np.ndindex(rewards.shape):
        m = min(n, left(dones, t, i))
        advantages[t, i] += sum(gamma**k * rewards[t + k, i] for k in range(m))
        advantages[t, i] += 0.0 if terminated[t + m - 1, i] else gamma**m * next_values[t + m - 1, i]
    return advantages


def lambda_loop(*arrays):
    """(1 − λ) Σ_n λ^(n−1) A^n up to the end, where the last A^n has all the weight that is left."""
    *arrays, gamma, lam = arrays
    by_n = [n_step_loop(*arrays, gamma, n) for n in range(1, len(arrays[0]) + 1)]
    advantages = np.zeros_like(arrays[0])
    for t, i in np.ndindex(advantages.shape):
        weights = [(1 - lam) * lam**n for n in range(left(arrays[-1], t, i))]
        weights[-1] = lam ** (len(weights) - 1)
        advantages[t, i] = sum(w * one[t, i] for w, one in zip(weights, by_n, strict=False))
    return advantages


Steps = namedtuple("Steps", "obs actions rewards next_obs terminated dones discounted running fresh")
# An iteration: its steps and noise; what the loss was given and what it logged, each time; the gradients that
# the optimizers have at the end; metrics, the learning rates in the optimizer and in the log; agent, orders
Iteration = namedtuple("Iteration", "steps noise batches gradients metrics rates agent orders")


def watch(module, agent, loss, args, envs=None):
    """What the shipped train() does with this agent in float64, an iteration each; `envs` replace its own."""
    steps, noises, orders, batches, iterations = ([] for _ in range(5))
    shipped, end = getattr(module, loss), module.Run.end_iteration
    draw, randperm = agent.noise, torch.randperm

    class Envs(module.Envs):
        def reset(self, *stream):
            super().reset(*stream)
            self.obs, self.fresh = self.obs.astype(float), True

        def step(self, actions, *running):
            obs, fresh, self.fresh = self.obs, self.fresh, False
            result = [x.astype(float) if x.dtype.kind == "f" else x for x in super().step(actions, *running)]
            steps.append((obs, actions, *result, *(running or [np.ones(len(obs), bool)]), fresh))
            return result

    def spy_loss(*given):
        result = shipped(*given)
        batches.append((given[1:], [x.item() for x in result[1]]))
        return result

    def spy_end(run, tags, rows, rate, *interval):
        optimizers = [part for name, part in run.parts.items() if name.endswith("optimizer")]
        groups = [optimizer.param_groups[0] for optimizer in optimizers]
        now = Steps(*(torch.from_numpy(np.array(x)) for x in zip(*steps, strict=True))) if steps else None
        gradients = [x["params"][0].grad.clone() for x in groups if x["params"][0].grad is not None]
        floats, rates = dict(zip(tags, rows[0].tolist(), strict=True)), [groups[0]["lr"], rate]
        noise = torch.from_numpy(np.concatenate(noises)).double()[: len(steps)] if noises else None
        seen = batches[:], gradients, floats, rates, copy.deepcopy(agent), orders[:]
        iterations.append(Iteration(now, noise, *seen))
        for each in (steps, noises, orders, batches):
            each.clear()
        assert interval in ((), (getattr(args, "log_interval", None),))
        end(run, tags, rows, rate, *interval)

    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        patch.setattr(agent, "noise", lambda *shape: noises.append(draw(*shape)) or noises[-1], raising=False)
        patch.setattr(torch, "randperm", lambda n: orders.append(randperm(n)) or orders[-1])
        patch.setattr(module, "Agent", lambda *_: agent)
        patch.setattr(module, "Envs", envs or Envs)
        patch.setattr(module, loss, spy_loss)
        patch.setattr(module.Run, "end_iteration", spy_end)
        patch.setattr(module.Run, "evaluate", lambda run: None)
        patch.setattr(module.Run, "log", lambda *_: None)  # slow
        module.train(module.Args(**vars(args) | {"run_dir": directory}))
    return iterations


def as_seen(args, agent, iterations, k):
    """The steps of iteration k as the formulas see them, normalised by the past; actions are the policy's."""
    now, past = iterations[k].steps, [each.steps for each in iterations[: k + 1]]
    mean, var, weights, rows = 0.0, torch.zeros(1), torch.ones(0).double(), []
    for x in past[:k] if args.normalize_obs else ():  # a batch weighs less, the smaller the step size was
        left, new = 1 - args.anneal_lr * len(weights) / args.total_timesteps, x.obs[x.running]
        weight = torch.full((len(new),), left / (len(weights) + len(new))).double()
        weights, rows = torch.cat([weights * (1 - weight.sum()), weight]), [*rows, new]
        mean = weights @ torch.cat(rows)
        var = weights @ (torch.cat(rows) - mean) ** 2
    std = torch.where(var > 0, var + 1e-8, 1.0).sqrt()
    obs, next_obs = (((x - mean) / std).clip(-10, 10) for x in (now.obs, now.next_obs))
    pi, noise = distribution(agent, obs), iterations[k].noise
    acted = (pi.logits + noise).argmax(-1) if agent.discrete else pi.mean + agent.log_std.exp() * noise
    close(now.actions[now.running], acted[now.running], 1e-6)
    var, rewards = torch.cat([x.discounted for x in past]).var(correction=0), now.rewards
    if vars(args).get("normalize_rewards") and var > 0:
        rewards = rewards / (var + 1e-8).sqrt()
    return now._replace(obs=obs, next_obs=next_obs, rewards=rewards)
