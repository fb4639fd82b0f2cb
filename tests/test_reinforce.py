"""Proves that each estimator of reinforce.py has exactly the expectation it claims, and that the rest of it is right.

The expectations are exact, not statistical. One iteration of the shipped `train`, with step size 0, is run on every
trajectory of the MDP in tabular.py, or for the leave-one-out baselines on every pair or triple of trajectories. What it
hands to its loss and to its optimiser, weighted by the probability of the group, is compared with formulas of J, Q and
the state distribution that come from dynamic programming.
"""
import copy
import io
import math
import pickle
import tempfile
import zipfile
from collections import Counter
from functools import cache
from itertools import combinations_with_replacement, product
from types import SimpleNamespace
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from tabular import MDP, REWARD, TERMINATES, TRANSITION, A, S, TabularEnv, linear
from torch import Tensor

import reinforce

GAMMA = 0.8
OLD = torch.tensor([[0.5, -0.4], [-0.7, 0.6], [0.2, -0.9]], dtype=torch.float64)  # logits of the policy that acted
NEW = OLD + torch.tensor([[0.4, -0.3], [0.5, -0.2], [-0.6, 0.7]], dtype=torch.float64)  # and of a later one
WRONG_V = torch.tensor([[3.0], [-1.5], [0.7]], dtype=torch.float64)
WEIGHTS, DISCOUNTS = ("trajectory", "reward_to_go"), ("now", "start")
BASELINES, IMPORTANCES = ("none", "average", "optimal", "time", "value"), ("trajectory", "causal", "first_order")
GROUPED = ("average", "optimal", "time")  # the baselines that need other episodes
# Groups of n trajectories are listed on ever smaller problems: 42 single ones, 136 pairs, 84 triples
MDPS = {1: MDP(horizon=3), 2: MDP(horizon=2), 3: MDP(horizon=2, start=(0.0, 1.0, 0.0))}


def powers(x: float, steps: int) -> Tensor:
    """x^t, (steps, 1)."""
    return torch.tensor([[x**t] for t in range(steps)], dtype=torch.float64)


def close(actual: Any, expected: Any, tolerance: float = 1e-10) -> None:
    actual, expected = (torch.as_tensor(x).detach().double() for x in (actual, expected))
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


# -- the shipped estimators on all trajectories ------------------------------------------------------------------------


class Iteration(NamedTuple):
    batch: tuple[Tensor, ...]  # what train() handed to reinforce_loss, the agent aside
    gradient: Tensor  # the estimate of ∇J: minus what it handed to the optimiser, of the actor's parameters in one row
    metrics: dict[str, float]


def tabular_agent(theta: Tensor, values: Tensor = WRONG_V) -> reinforce.Agent:
    agent = reinforce.Agent(TabularEnv(), 2, 0.0, False).double()
    agent.actor.net, agent.critic.net = linear(theta), linear(values)
    return agent


def run_train(batches: list[reinforce.Episodes], agent: reinforce.Agent, **flags: Any) -> list[Iteration]:
    """The shipped train() with these episodes in place of those it would run, one iteration each, and step size 0."""
    feed, seen, iterations = iter(batches), [], []
    loss, end_iteration = reinforce.reinforce_loss, reinforce.Run.end_iteration

    def spy_loss(agent: reinforce.Agent, *batch: Tensor, importance: str) -> tuple[Tensor, dict[str, Tensor]]:
        seen.append(batch)
        return loss(agent, *batch, importance=importance)

    def spy_end(run: reinforce.Run, steps: int, ended: list, metrics: dict[str, float]) -> None:
        gradient = -torch.cat([param.grad.flatten() for param in agent.actor.parameters()])
        iterations.append(Iteration(seen[-1], gradient, metrics))
        end_iteration(run, steps, ended, metrics)

    steps = sum(int(episodes.mask.sum()) for episodes in batches)
    flags = {"gamma": GAMMA, "learning_rate": 0.0, "critic_learning_rate": 0.0, "critic_epochs": 1} | flags
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as directory:
        patch.setattr(reinforce, "Agent", lambda *_: agent)
        patch.setattr(reinforce, "run_episodes", lambda *_: next(feed))
        patch.setattr(reinforce, "reinforce_loss", spy_loss)
        patch.setattr(reinforce.Run, "end_iteration", spy_end)
        flags |= {"env_id": "Tabular-v0", "num_envs": batches[0].mask.shape[1], "total_timesteps": steps}
        flags |= {"run_dir": directory, "checkpoint_every": 0, "eval_episodes": 0, "device": "cpu"}
        reinforce.train(reinforce.Args(**flags))
    assert len(iterations) == len(batches)
    return iterations


def tabular_episodes(mdp: MDP, chosen: Any) -> reinforce.Episodes:
    batch = mdp.batch(chosen)
    return reinforce.Episodes(batch.obs, batch.actions, batch.rewards, batch.mask)


@cache
def shipped(
    weight: str, discount_from: str, baseline: str, n: int, gamma: float = GAMMA
) -> tuple[Tensor, list[Iteration]]:
    """The probability of every group of n trajectories under OLD, in any order, and what train() makes of the group."""
    mdp = MDPS[n]
    single = mdp.probabilities(OLD.softmax(-1))
    groups = list(combinations_with_replacement(range(len(single)), n))
    orders = [math.factorial(n) / math.prod(map(math.factorial, Counter(group).values())) for group in groups]
    iterations = run_train(
        [tabular_episodes(mdp, group) for group in groups], tabular_agent(OLD),
        weight=weight, discount_from=discount_from, baseline=baseline, gamma=gamma,
    )  # fmt: skip
    return torch.tensor(orders, dtype=torch.float64) * single[torch.tensor(groups)].prod(1), iterations


def on_policy(iterations: list[Iteration]) -> Tensor:
    """The estimates of ∇J at OLD that the optimiser got, (groups, S, A)."""
    return torch.stack([iteration.gradient.reshape(A, S).T for iteration in iterations])


def off_policy(iterations: list[Iteration], theta: Tensor, importance: str) -> Tensor:
    """The estimates of ∇J at theta from the same batches, (groups, S, A)."""
    agent, grads = tabular_agent(theta), []
    for iteration in iterations:
        loss, _ = reinforce.reinforce_loss(agent, *iteration.batch, importance=importance)
        grads.append(-torch.autograd.grad(loss, agent.actor.net.weight)[0].T)
    return torch.stack(grads)


def expectation(probabilities: Tensor, values: Tensor) -> Tensor:
    return torch.tensordot(probabilities, values, 1)


def variance(probabilities: Tensor, grads: Tensor) -> float:
    """E‖ĝ − Eĝ‖², summed over the parameters."""
    return float(probabilities @ (grads - expectation(probabilities, grads)).square().flatten(1).sum(1))


def true_gradient(mdp: MDP, theta: Tensor, gamma: float = GAMMA) -> Tensor:
    theta = theta.clone().requires_grad_()
    return torch.autograd.grad(mdp.objective(theta.softmax(-1), gamma), theta)[0]


def formula(mdp: MDP, discount_from: str, theta: Tensor, states: Tensor, future: Tensor) -> Tensor:
    """Σ_t c_t E[∇ log π_θ(a|s) Q_t(s,a)], a from θ, s_t from the policy `states`, Q of `future`; c_t is γ^t or 1."""
    theta = theta.clone().requires_grad_()
    discount = powers(GAMMA if discount_from == "start" else 1.0, mdp.horizon)
    _, q_values = mdp.values(future.softmax(-1), GAMMA)
    surrogate = mdp.surrogate(theta.softmax(-1), discount * mdp.occupancy(states.softmax(-1)), q_values)
    return torch.autograd.grad(surrogate, theta)[0]


@pytest.mark.parametrize("mdp", [*MDPS.values(), MDP(horizon=4), MDP(timed=True)])
def test_dynamic_programming_and_enumeration_agree(mdp: MDP):
    theta = (OLD.repeat(mdp.rows // S, 1) + torch.linspace(-1, 1, 2 * mdp.rows).reshape(-1, 2)).requires_grad_()
    pi = theta.softmax(-1)
    probabilities, batch = mdp.probabilities(pi), mdp.batch()
    by_listing = probabilities @ (powers(GAMMA, mdp.horizon) * batch.rewards).sum(0)
    by_programming = mdp.objective(pi, GAMMA)
    close(probabilities.sum(), 1.0)
    close(by_listing, by_programming)
    close(*(torch.autograd.grad(J, theta, retain_graph=True)[0] for J in (by_listing, by_programming)))
    assert len({float(r) for r in REWARD.flatten()}) == REWARD.numel()
    (values, q_values), occupancy = mdp.values(pi, GAMMA), mdp.occupancy(pi)
    for t, s in product(range(mdp.horizon), range(S)):  # E[G_t | s_t, a_t] by conditioning on the listed trajectories
        returns = sum(GAMMA ** (u - t) * batch.rewards[u] for u in range(t, mdp.horizon))
        here = batch.mask[t] & (batch.rows[t] == mdp.row(t, s))
        close(probabilities[here].sum(), occupancy[t, s])
        for a in range(A) if here.any() else ():
            there = here & (batch.actions[t] == a)
            close(probabilities[there] @ returns[there] / probabilities[there].sum(), q_values[t, s, a])
        if here.any():
            close(probabilities[here] @ returns[here] / probabilities[here].sum(), values[t, s])


def test_the_environment_walks_the_listed_trajectories_and_no_others():
    env, walked = gym.make("Tabular-v0", disable_env_checker=True).unwrapped, set()
    rng, listed, batch = np.random.default_rng(0), MDP().trajectories, MDP().batch()
    for episode in range(600):
        obs, _ = env.reset(seed=episode)
        path, flags, rewards = [], [(False, False)], []
        while not any(flags[-1]):
            action = int(rng.integers(A))
            next_obs, reward, *ends, _ = env.step(action)
            path.append((int(obs.argmax()), action, int(next_obs.argmax())))
            flags.append(tuple(ends))
            rewards.append(reward)
            obs = next_obs
        i, steps = listed.index(tuple(path)), len(path)
        walked.add(i)
        assert batch.mask[:, i].sum() == steps
        assert batch.rewards[:steps, i].tolist() == rewards
        assert list(zip(batch.terminated[:steps, i], batch.truncated[:steps, i], strict=True)) == flags[1:]
    assert len(walked) > 0.9 * len(listed)
    assert TERMINATES.sum() == 1
    assert TRANSITION[TERMINATES] > 0


# -- expectation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("weight", "discount_from", "baseline"), list(product(WEIGHTS, DISCOUNTS, BASELINES)))
def test_expected_gradient(weight: str, discount_from: str, baseline: str):
    """With any baseline: `start` is ∇J, `now` is Σ_t E[∇ log π Q_t]; off-policy as the docstring says of each kind."""
    n = 2 if baseline in GROUPED else 1
    mdp, (probabilities, iterations) = MDPS[n], shipped(weight, discount_from, baseline, n)
    mean = expectation(probabilities, on_policy(iterations))
    close(mean, formula(mdp, discount_from, OLD, OLD, OLD))
    if discount_from == "start":
        close(mean, true_gradient(mdp, OLD))
        close(formula(mdp, discount_from, NEW, NEW, NEW), true_gradient(mdp, NEW))
    for importance, (states, future) in zip(IMPORTANCES, [(NEW, NEW), (NEW, OLD), (OLD, OLD)], strict=True):
        claimed = formula(mdp, discount_from, NEW, states, future)
        close(expectation(probabilities, off_policy(iterations, NEW, importance)), claimed)
        close(off_policy(iterations, OLD, importance), on_policy(iterations))  # at θ = β nothing is reweighted


@pytest.mark.parametrize("baseline", GROUPED)
def test_expected_gradient_of_three_episodes(baseline: str):
    probabilities, iterations = shipped("reward_to_go", "start", baseline, 3)
    close(expectation(probabilities, on_policy(iterations)), true_gradient(MDPS[3], OLD))
    mean = expectation(probabilities, off_policy(iterations, NEW, "trajectory"))
    close(mean, true_gradient(MDPS[3], NEW))


def test_bias_of_discounting_from_now():
    """It is −Σ_t (1 − γ^t) E[∇ log π Q_t], not small, and 0 with γ = 1."""
    probabilities, iterations = shipped("reward_to_go", "now", "none", 1)
    bias = expectation(probabilities, on_policy(iterations)) - true_gradient(MDPS[1], OLD)
    theta, batch = OLD.clone().requires_grad_(), MDPS[1].batch()
    missing = torch.zeros((), dtype=torch.float64)  # by listing, with the factor that `now` lacks
    for t, u in product(range(3), range(3)):
        logprobs = torch.distributions.Categorical(logits=theta[batch.rows[t]]).log_prob(batch.actions[t])
        score = MDPS[1].probabilities(OLD.softmax(-1)) * logprobs * batch.mask[t]
        missing = missing + (score @ batch.rewards[u]) * (GAMMA ** (u - t) - GAMMA**u if u >= t else 0)
    close(bias, torch.autograd.grad(missing, theta)[0])
    assert float(bias.norm()) == pytest.approx(BIASES["now"], rel=1e-6)
    for discount_from in DISCOUNTS:
        probabilities, iterations = shipped("reward_to_go", discount_from, "none", 1, gamma=1.0)
        close(expectation(probabilities, on_policy(iterations)), true_gradient(MDPS[1], OLD, gamma=1.0))


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_bias_of_importance_weights(importance: str):
    """Exact for `trajectory` alone; the sizes are those of this MDP, NEW and OLD."""
    probabilities, iterations = shipped("reward_to_go", "start", "none", 1)
    bias = expectation(probabilities, off_policy(iterations, NEW, importance)) - true_gradient(MDPS[1], NEW)
    assert float(bias.norm()) == pytest.approx(BIASES[importance], rel=1e-6, abs=1e-10)


BIASES = {"now": 0.1, "trajectory": 0.0, "causal": 0.1, "first_order": 0.1}


@pytest.mark.parametrize("n", [2, 3])
def test_an_episode_in_its_own_baseline_would_bias(n: int):
    """By the factor 1 − 1/N: the contrast to the shipped baselines, which leave it out."""
    probabilities, iterations = shipped("trajectory", "start", "none", n)
    agent, grads = tabular_agent(OLD), []
    for obs, actions, old_logprobs, returns, mask in (iteration.batch for iteration in iterations):
        batch = (obs, actions, old_logprobs, returns - returns[0].mean(), mask)
        loss, _ = reinforce.reinforce_loss(agent, *batch, importance="trajectory")
        grads.append(-torch.autograd.grad(loss, agent.actor.net.weight)[0].T)
    close(expectation(probabilities, torch.stack(grads)), (1 - 1 / n) * true_gradient(MDPS[n], OLD))


# -- variance ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("discount_from", DISCOUNTS)
def test_reward_to_go_lowers_the_variance(discount_from: str):
    spread = {weight: variance(shipped(weight, discount_from, "none", 1)[0],
              on_policy(shipped(weight, discount_from, "none", 1)[1])) for weight in WEIGHTS}  # fmt: skip
    print(spread)
    assert spread["reward_to_go"] < 0.9 * spread["trajectory"]
