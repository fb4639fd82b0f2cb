"""Proves that actor_critic.py has exactly the expectations, targets and traces it claims, and the lecture's order.

The expectations are exact, not statistical: the shipped `train` gets every trajectory of the MDP in tabular.py; what it
hands to its loss, weighted by the probability of each, is compared with formulas of V, Q and the state distribution
from dynamic programming. Everything else is compared with double loops in NumPy and with plain autograd.
Networks, statistics, rollouts and `make_update` are those of ppo.py, word for word, and proved in test_ppo.py.
"""

import tempfile
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from tabular import CONTINUES, MDP, A, linear
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, Normal

import actor_critic

GAMMA, LAMBDA = 0.8, 0.7
ESTIMATES = [
    {"advantage": "td"}, {"advantage": "monte_carlo"}, *({"advantage": "n_step", "lookahead": n} for n in (1, 2, 3, 9)),
    *({"advantage": "gae", "gae_lambda": lam} for lam in (0.0, 0.5, 1.0)),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def close(actual: Any, expected: Any, tolerance: float = 1e-10) -> None:
    actual, expected = (torch.as_tensor(x, dtype=torch.float64).detach() for x in (actual, expected))
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def vector(tensors: Any) -> Tensor:
    return torch.cat([x.detach().flatten() for x in tensors])


# -- the shipped loop, written down ------------------------------------------------------------------------------------


class Event(NamedTuple):
    """Something that train() did."""

    kind: str  # collect, target, estimate, or the name of the loss of a gradient step
    params: Tensor  # of the agent before, in one row
    given: tuple  # what it was given: tensors
    result: Any  # the rollout, targets or advantages; of a step the gradient that the optimiser got


def new_agent(obs_dim: int, action_space: gym.Space, hidden_size: int = 5) -> actor_critic.Agent:
    env = SimpleNamespace(observation_space=spaces.Box(-1, 1, (obs_dim,)), action_space=action_space)
    return actor_critic.Agent(env, hidden_size, -0.3)


def random_agent(obs_dim: int, action_space: gym.Space) -> actor_critic.Agent:
    """In float64, with parameters that are all far from 0, so that no part of a formula can hide."""
    agent = new_agent(obs_dim, action_space).double()
    for param in agent.parameters():
        param.data = 0.7 * torch.randn_like(param)
    return agent


def tabular_agent(theta: Tensor, values: Tensor) -> actor_critic.Agent:
    agent = new_agent(len(theta), spaces.Discrete(A)).double()
    agent.actor.net, agent.critic.net = linear(theta), linear(values.reshape(-1, 1))
    return agent


def run_train(
    agent: actor_critic.Agent | None = None, feed: list | None = None, **flags: Any
) -> tuple[list[Event], list[dict[str, float]]]:
    """The shipped train() in float64, with the given agent, and the rollouts in `feed` for those it would run.

    Gives all it did, in order, and the metrics of each iteration. Unless told otherwise it moves no parameter.
    """
    events, metrics, feed = [], [], iter(feed) if feed else None
    make_update, collect, new = actor_critic.make_update, actor_critic.Collector.collect, actor_critic.Agent
    target, estimate = actor_critic.critic_targets, actor_critic.advantage_estimates
    seen = SimpleNamespace(agent=agent)

    def note(kind: str, given: tuple, result: Any, before: Tensor) -> Any:
        events.append(Event(kind, before, tuple(x.detach().clone() for x in given), result))
        return result

    def spy_agent(*args: Any) -> actor_critic.Agent:
        seen.agent = seen.agent or new(*args).double()
        return seen.agent

    def spy_collect(collector: Any, acting: Any, *args: Any) -> tuple[actor_critic.Rollout, list]:
        rollout, ended = (next(feed), []) if feed else collect(collector, acting, *args)
        rollout = actor_critic.Rollout(*(x.double() if x.is_floating_point() else x for x in rollout))
        return note("collect", rollout, rollout, vector(seen.agent.parameters())), ended

    def spy_make_update(loss: Any, params: list, optimizer: torch.optim.Optimizer, *rest: Any) -> Any:
        update = make_update(loss, params, optimizer, *rest)
        assert optimizer.param_groups[0]["lr"] == flags["learning_rate" if params[0] is first() else CRITIC]

        def spy_update(*batch: Tensor) -> dict[str, Tensor]:
            before = vector(seen.agent.parameters())
            result = update(*batch)
            note(loss.func.__name__, batch, optimizer.param_groups[0]["params"][0].grad.clone(), before)
            return result

        return spy_update

    def first() -> nn.Parameter:
        return next(iter(seen.agent.actor.parameters()))

    def spy(kind: str, original: Any, *given: Tensor, **kwargs: Any) -> Tensor:
        return note(kind, given, original(*given, **kwargs), vector(seen.agent.parameters()))

    def spy_end(run: actor_critic.Run, steps: int, ended: list, logged: dict[str, float]) -> None:
        metrics.append(logged | {"steps": steps, "ended": ended})
        end(run, steps, ended, logged)

    end = actor_critic.Run.end_iteration
    flags = {"learning_rate": 0.0, CRITIC: 0.0, "max_grad_norm": 1e9, "gamma": GAMMA, "critic_epochs": 1} | flags
    flags = {"env_id": "Tabular-v0", "num_envs": 1, "eval_episodes": 0, "checkpoint_every": 0, "device": "cpu"} | flags
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as directory:
        patch.setattr(actor_critic, "Agent", spy_agent)
        patch.setattr(actor_critic.Collector, "collect", spy_collect)
        patch.setattr(actor_critic, "make_update", spy_make_update)
        patch.setattr(actor_critic, "critic_targets", partial(spy, "target", target))
        patch.setattr(actor_critic, "advantage_estimates", partial(spy, "estimate", estimate))
        patch.setattr(actor_critic.Run, "end_iteration", spy_end)
        patch.setattr(actor_critic.Run, "log", lambda *_: None)  # slow
        actor_critic.train(actor_critic.Args(run_dir=directory, **flags))
    return events, metrics


CRITIC = "critic_learning_rate"


def only(events: list[Event], *kinds: str) -> list[Event]:
    return [event for event in events if event.kind in kinds]


# -- expectations ------------------------------------------------------------------------------------------------------

TIMED = MDP(timed=True)  # there a critic for each (t, s) can be exact
THETA = torch.tensor([[0.5, -0.4], [-0.7, 0.6], [0.2, -0.9]], dtype=torch.float64).repeat(4, 1)
THETA = THETA + torch.linspace(-0.6, 0.7, 24, dtype=torch.float64).reshape(12, 2)
TRUE_V, TRUE_Q = TIMED.values(THETA.softmax(-1), GAMMA)
WRONG_V = TRUE_V + torch.tensor([[3.0, -1.5, 0.7], [0.4, 2.0, -1.0], [-2.5, 0.3, 1.1], [1.2, 0.8, -0.9]]).double()
OCCUPANCY = TIMED.occupancy(THETA.softmax(-1))


def rollout_of(mdp: MDP) -> actor_critic.Rollout:
    """All trajectories side by side; what follows the end of one is another episode, of no interest."""
    batch = mdp.batch()
    dones = batch.terminated | batch.truncated
    return actor_critic.Rollout(
        batch.obs, batch.next_obs, batch.actions, batch.rewards, batch.terminated, dones, batch.rewards
    )




def estimated_gradients(values: Tensor, **flags: Any) -> Tensor:
    """Σ_t ∇ log π(a_t|s_t) A_t of each trajectory, (K, rows, A): minus the gradient of the shipped loss on it."""
    agent, rollout, mask = tabular_agent(THETA, values), rollout_of(TIMED), TIMED.batch().mask
    flags = {"num_envs": mask.shape[1], "num_steps": len(mask), "total_timesteps": mask.numel()} | flags
    events, _ = run_train(agent, [rollout], **flags)
    (step,) = only(events, "actor_loss")
    assert torch.equal(step.given[0], rollout.obs)
    grads = []
    for i, length in enumerate(mask.sum(0).tolist()):
        loss, _ = actor_critic.actor_loss(agent, *(x[:length, i] for x in step.given), ent_coef=0.0)
        grads.append(-length * torch.autograd.grad(loss, agent.actor.net.weight)[0].T)
    return torch.stack(grads)


def expectation(grads: Tensor) -> Tensor:
    return torch.tensordot(TIMED.probabilities(THETA.softmax(-1)), grads, 1)


def formula(weights: Tensor) -> Tensor:
    """Σ_t E[∇ log π(a_t|s_t) X_t(s_t, a_t)], X (horizon, S, A), by dynamic programming."""
    theta = THETA.clone().requires_grad_()
    return torch.autograd.grad(TIMED.surrogate(theta.softmax(-1), OCCUPANCY, weights), theta)[0]


@pytest.mark.parametrize("flags", ESTIMATES, ids=str)
def test_with_the_true_values_every_advantage_gives_the_policy_gradient(flags: dict):
    mean = expectation(estimated_gradients(TRUE_V, **flags))
    close(mean, formula(TRUE_Q))
    assert mean.norm() > 0.5


def test_the_policy_gradient_is_the_gradient_of_the_objective():
    """Without a discount, where the missing factor γ^t is 1."""
    theta = THETA.clone().requires_grad_()
    J = TIMED.objective(theta.softmax(-1), 1.0)
    values, _ = TIMED.values(THETA.softmax(-1), 1.0)
    for advantage in ("td", "n_step", "gae", "monte_carlo"):
        grads = estimated_gradients(values, advantage=advantage, gamma=1.0)
        close(expectation(grads), torch.autograd.grad(J, theta, retain_graph=True)[0])


@pytest.mark.parametrize("flags", [{"advantage": "monte_carlo"}, {"advantage": "n_step", "lookahead": 3}], ids=str)
def test_monte_carlo_is_unbiased_with_any_critic(flags: dict):
    """What follows the time limit is worth V to it; there alone it believes the critic."""
    _, q_values = TIMED.values(THETA.softmax(-1), GAMMA, WRONG_V[-1])
    close(expectation(estimated_gradients(WRONG_V, **flags)), formula(q_values))
    nothing = WRONG_V.clone()
    nothing[-1] = 0
    close(expectation(estimated_gradients(nothing, **flags)), formula(TRUE_Q))


@pytest.mark.parametrize("flags", [{"advantage": "td"}, {"advantage": "n_step", "lookahead": 1}], ids=str)
def test_bias_of_td_with_a_wrong_critic(flags: dict):
    """It is Σ_t E[∇ log π(a_t|s_t) γ (1 − terminated) (V − V^π)(s_{t+1})]: V(s_t) is a baseline, the rest is Q^π."""
    bias = expectation(estimated_gradients(WRONG_V, **flags)) - formula(TRUE_Q)
    error = (WRONG_V - TRUE_V)[1:]
    close(bias, formula(GAMMA * torch.einsum("san,tn->tsa", CONTINUES, error)))
    assert bias.norm() > 0.3


@pytest.mark.parametrize("n", [1, 2, 3])
def test_bias_of_n_steps_with_a_wrong_critic(n: int):
    """It is Σ_t E[∇ log π γ^m (1 − terminated) (V − V^π)(s_{t+m})], m = n or all that is left, by listing."""
    batch, theta = TIMED.batch(), THETA.clone().requires_grad_()
    logprobs, error = theta.log_softmax(-1), (WRONG_V - TRUE_V).flatten()
    total, probabilities = torch.zeros(()).double(), TIMED.probabilities(THETA.softmax(-1))
    for i, length in enumerate(batch.mask.sum(0).tolist()):
        for t in range(length):
            last = min(t + n, length) - 1
            if not batch.terminated[last, i]:
                score = probabilities[i] * logprobs[batch.rows[t, i], batch.actions[t, i]]
                total = total + score * GAMMA ** (last + 1 - t) * error[int(batch.next_obs[last, i].argmax())]
    bias = expectation(estimated_gradients(WRONG_V, advantage="n_step", lookahead=n)) - formula(TRUE_Q)
    close(bias, torch.autograd.grad(total, theta)[0])


def test_more_of_the_rewards_is_more_variance():
    """With the true values, when all estimates are unbiased."""
    probabilities = TIMED.probabilities(THETA.softmax(-1))

    def variance(**flags: Any) -> float:
        grads = estimated_gradients(TRUE_V, **flags)
        return float(probabilities @ (grads - expectation(grads)).square().flatten(1).sum(1))

    one, two, three = (variance(advantage="n_step", lookahead=n) for n in (1, 2, 3))
    zero, half, full = (variance(advantage="gae", gae_lambda=lam) for lam in (0.0, 0.5, 1.0))
    assert one < two < three
    assert zero < half < full
    assert (one, three) == pytest.approx((zero, full), rel=1e-10)


# -- advantages and targets against double loops -----------------------------------------------------------------------


def random_case(case: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """rewards, values, next_values, terminated, dones (T, N); ends are frequent, rare or everywhere, of both kinds."""
    shape = (int(rng.integers(1, 20)), int(rng.integers(1, 4)))
    terminated, truncated = rng.random(shape) < rng.choice([0, 0.1, 0.5]), rng.random(shape) < rng.choice([0, 0.2, 0.6])
    (terminated, truncated)[case % 2][{0: slice(None), 1: 0, 2: -1}.get(case % 10, slice(0))] = True
    dones, (rewards, values, next_values) = terminated | truncated, 10 * rng.normal(size=(3, *shape))
    next_values[:-1] = np.where(dones[:-1], next_values[:-1], values[1:])  # elsewhere the next state is the successor
    return rewards, values, next_values, terminated, dones


CASES = [random_case(case, np.random.default_rng(case)) for case in range(200)]


def pieces(dones: np.ndarray) -> list[range]:
    """The steps of each episode, or piece of one, in a column."""
    starts = [0, *(t + 1 for t in np.flatnonzero(dones)), len(dones)]
    return [range(a, b) for a, b in pairwise(starts) if a < b]


def n_step_loop(rewards, values, next_values, terminated, dones, gamma: float, n: int) -> np.ndarray:
    """Σ_{k<m} γ^k r_{t+k} + γ^m (1 − terminated) V(s'_{t+m−1}) − V(s_t), term by term."""
    advantages = np.zeros_like(rewards)
    for i in range(rewards.shape[1]):
        for piece in pieces(dones[:, i]):
            for t in piece:
                m = min(n, piece.stop - t)
                total = sum(gamma**k * rewards[t + k, i] for k in range(m))
                future = 0.0 if terminated[t + m - 1, i] else next_values[t + m - 1, i]
                advantages[t, i] = total + gamma**m * future - values[t, i]
    return advantages


def lambda_loop(rewards, values, next_values, terminated, dones, gamma: float, lam: float) -> np.ndarray:
    """(1 − λ) Σ_n λ^(n−1) A^n up to the end, where the last A^n has all the weight that is left."""
    by_n = [None, *(n_step_loop(rewards, values, next_values, terminated, dones, gamma, n) for n in range(1, 20))]
    advantages = np.zeros_like(rewards)
    for i in range(rewards.shape[1]):
        for piece in pieces(dones[:, i]):
            for t in piece:
                left = piece.stop - t
                weights = [(1 - lam) * lam ** (n - 1) for n in range(1, left)] + [lam ** (left - 1)]
                advantages[t, i] = sum(w * by_n[n][t, i] for n, w in enumerate(weights, 1))
    return advantages


@pytest.mark.parametrize("n", [1, 2, 3, 7, 1000])
def test_n_step_equals_a_double_loop_over_separate_episodes(n: int):
    inside = 0
    for case, arrays in enumerate(CASES):
        gamma = (0.0, 0.9, 1.0)[case % 3]
        close(actor_critic.n_step(*map(torch.from_numpy, arrays), gamma, n), n_step_loop(*arrays, gamma, n))
        inside += (arrays[4] & ~arrays[3])[:-1].sum() * arrays[3][:-1].sum()
    assert inside > 1000  # both kinds of ends, within the window


@pytest.mark.parametrize("lam", [0.0, 0.6, 1.0])
def test_gae_is_the_mixture_of_all_n_steps(lam: float):
    flags = {"gamma": 0.9, "lookahead": 5, "gae_lambda": lam}
    for arrays in CASES:
        advantages = actor_critic.advantage_estimates(*map(torch.from_numpy, arrays), advantage="gae", **flags)
        close(advantages, lambda_loop(*arrays, 0.9, lam))


def test_the_ends_of_n_and_lambda_are_td_and_monte_carlo():
    for arrays in CASES:
        tensors = [torch.from_numpy(x) for x in arrays]

        def estimate(advantage: str, lookahead: int = 3, lam: float = 0.5, tensors: list = tensors) -> Tensor:
            flags = {"gamma": 0.9, "lookahead": lookahead, "gae_lambda": lam}
            return actor_critic.advantage_estimates(*tensors, advantage=advantage, **flags)

        td, monte_carlo, steps = n_step_loop(*arrays, 0.9, 1), n_step_loop(*arrays, 0.9, 1000), len(arrays[0])
        for one in (estimate("td"), estimate("n_step", 1), estimate("gae", lam=0.0)):
            close(one, td)
        for all_of_them in (
            estimate("monte_carlo"), estimate("n_step", steps), estimate("n_step", steps + 5), estimate("gae", lam=1.0),
        ):  # fmt: skip
            close(all_of_them, monte_carlo)


@pytest.mark.parametrize("critic_target", ["monte_carlo", "bootstrap"])
def test_critic_targets_equal_a_double_loop(critic_target: str):
    for arrays in CASES:
        rewards, _, next_values, terminated, dones = arrays
        expected = np.zeros_like(rewards)
        for i in range(rewards.shape[1]):
            for piece in pieces(dones[:, i]):
                for t in piece:
                    last = t if critic_target == "bootstrap" else piece.stop - 1
                    expected[t, i] = sum(0.9 ** (u - t) * rewards[u, i] for u in range(t, last + 1))
                    if not terminated[last, i]:
                        expected[t, i] += 0.9 ** (last + 1 - t) * next_values[last, i]
        tensors = map(torch.from_numpy, arrays)
        close(actor_critic.critic_targets(*tensors, gamma=0.9, critic_target=critic_target), expected)


def test_the_next_episode_leaves_no_trace():
    """Not one bit of what is before an end depends on what is after it."""
    rewards, values, next_values = torch.randn(3, 20, 2)
    dones = torch.zeros(20, 2, dtype=torch.bool)
    dones[12] = True
    for terminated in (dones, torch.zeros_like(dones)):
        for flags in ESTIMATES:
            flags = {"gamma": 0.99, "lookahead": 5, "gae_lambda": 0.9} | flags
            before = actor_critic.advantage_estimates(rewards, values, next_values, terminated, dones, **flags)
            changed, others = rewards.clone(), values.clone()
            changed[13:], others[13:] = 1e6, -1e6
            after = actor_critic.advantage_estimates(changed, others, next_values, terminated, dones, **flags)
            assert torch.equal(before[:13], after[:13])
            assert not (before[13:] == after[13:]).any()


def test_state_values_of_successors():
    """V of the next row, or of the true successor where an episode ended or the rollout is cut."""
    obs, next_obs = torch.randn(2, 6, 3, 2)
    ends = torch.rand(6, 3) < 0.4
    ends[-1] = True
    next_obs[:-1] = torch.where(ends[:-1, :, None], next_obs[:-1], obs[1:])
    critic = new_agent(2, spaces.Discrete(2)).critic
    values, next_values = actor_critic.state_values(critic, obs, next_obs[ends], ends)
    close(values, critic(obs), 1e-6)
    close(next_values, critic(next_obs), 1e-6)
    assert not values.requires_grad
    assert not next_values.requires_grad


class Clock(gym.Env):
    """Pays 1 at every step, for ever, but is cut off after 5."""

    observation_space, action_space = spaces.Box(0, 1, (2,)), spaces.Discrete(2)

    def show(self) -> np.ndarray:
        return np.float32([1, self.time / 5])

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.time = 0
        return self.show(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.time += 1
        return self.show(), 1.0, False, self.time == 5, {}


gym.register("actor_critic/Clock-v0", Clock)


@pytest.mark.parametrize("critic_target", ["monte_carlo", "bootstrap"])
@pytest.mark.parametrize("flags", [{"num_steps": 12}, {"num_steps": 1, "num_envs": 1, "critic_epochs": 1}], ids=str)
def test_a_constant_reward_has_the_value_of_an_infinite_horizon(
    critic_target: str, flags: dict, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """1/(1 − γ) = 5, though no episode sees more than 5 rewards, which are worth 3.4."""
    agent = new_agent(2, spaces.Discrete(2), 8)
    monkeypatch.setattr(actor_critic, "Agent", lambda *_: agent)
    flags = {"num_envs": 2, "critic_epochs": 20, "critic_target": critic_target, CRITIC: 0.02} | flags
    actor_critic.train(actor_critic.Args(
        env_id="actor_critic/Clock-v0", run_dir=str(tmp_path / "run"), total_timesteps=1500, gamma=0.8, device="cpu",
        learning_rate=0.0, max_grad_norm=1e9, eval_episodes=0, **flags,
    ))  # fmt: skip
    close(agent.critic(torch.tensor([[1, t / 5] for t in range(5)])), torch.full((5,), 5.0), 0.4)


# -- traces ------------------------------------------------------------------------------------------------------------

ONLINE = {"num_envs": 1, "num_steps": 1}
BOTH = pytest.mark.parametrize("space", [spaces.Discrete(2), spaces.Box(-1, 1, (2,))], ids=["categorical", "gaussian"])


class Random(gym.Env):
    """Shows and pays anything; episodes last 1, 4, 2, 7, ... steps and terminate, are cut, or both at once."""

    observation_space = spaces.Box(-9, 9, (3,), np.float64)

    def __init__(self, action_space: gym.Space) -> None:
        self.action_space, self.episode = action_space, 0

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.episode, self.left = self.episode + 1, (1, 4, 2, 7, 3)[self.episode % 5]
        return self.np_random.normal(size=3), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.left, reward = self.left - 1, float(self.np_random.normal(1, 2))
        terminated, truncated = self.episode % 3 != 1, self.episode % 3 != 0
        return self.np_random.normal(size=3), reward, self.left == 0 and terminated, self.left == 0 and truncated, {}


for space in (spaces.Discrete(2), spaces.Box(-1, 1, (2,))):
    gym.register(f"actor_critic/{type(space).__name__}-v0", Random, kwargs={"action_space": space})


def env_of(space: gym.Space) -> str:
    return f"actor_critic/{type(space).__name__}-v0"


def joined(events: list[Event]) -> list[np.ndarray]:
    """The rollouts of a run as one: obs, next_obs, actions, rewards, terminated, dones."""
    columns = zip(*(event.result for event in only(events, "collect")), strict=True)
    return [torch.cat(column) for column in columns][:6]


@BOTH
@pytest.mark.parametrize("lam", [0.3, 0.9, 1.0])
def test_summed_trace_updates_of_an_episode_are_the_lambda_return_update(space: gym.Space, lam: float):
    """With frozen parameters: Σ_t ∇ log π(a_t|s_t) (G^λ_t − V(s_t)), and Σ_t ∇V(s_t) (G^λ_t − V(s_t))."""
    agent = random_agent(3, space)
    events, _ = run_train(agent, env_id=env_of(space), trace_decay=lam, total_timesteps=128, **ONLINE)
    obs, next_obs, actions, rewards, terminated, dones = joined(events)
    with torch.no_grad():
        values, next_values = agent.critic(obs), agent.critic(next_obs)
    arrays = [x.numpy() for x in (rewards, values, next_values, terminated, dones)]
    advantages = torch.from_numpy(lambda_loop(*arrays, GAMMA, lam))
    logprobs, _ = agent.actor(obs, actions)
    episodes = pieces(dones[:, 0].numpy())[:-1]
    assert len(episodes) > 30
    for kind, net, outputs in (
        ("traced_actor_loss", agent.actor, logprobs), ("traced_critic_loss", agent.critic, agent.critic(obs)),
    ):  # fmt: skip
        steps = [-event.result for event in only(events, kind)]
        assert len(steps) == 128
        for episode in episodes:
            rows = slice(episode.start, episode.stop)
            total = (outputs[rows] * advantages[rows]).sum()
            expected = torch.autograd.grad(total, list(net.parameters()), retain_graph=True)
            close(sum(steps[rows]), vector(expected))


@BOTH
def test_trace_step_has_the_entropy_bonus_and_clips(space: gym.Space):
    """−δ e − ent_coef ∇H for the policy, −δ e for the critic, e by its definition Σ_k (γλ)^k ∇x_{t−k}; then clipped."""
    agent = random_agent(3, space)
    events, metrics = run_train(
        agent, env_id=env_of(space), trace_decay=0.5, ent_coef=0.3, max_grad_norm=2.0, total_timesteps=128, **ONLINE
    )
    obs, next_obs, actions, rewards, terminated, dones = joined(events)
    logprobs, entropies = agent.actor(obs, actions)
    values = agent.critic(obs)
    td_errors = (rewards + GAMMA * agent.critic(next_obs) * ~terminated - values).detach()
    clipped, logged = 0, {"policy_loss": [], "value_loss": [], "entropy": [], "grad_norm": []}
    actor_steps, critic_steps = only(events, "traced_actor_loss"), only(events, "traced_critic_loss")
    for episode in pieces(dones[:, 0].numpy()):
        for t in episode:
            for steps, net, outputs, bonus in (
                (critic_steps, agent.critic, values, None), (actor_steps, agent.actor, logprobs, 0.3 * entropies[t, 0]),
            ):  # fmt: skip
                past = range(episode.start, t + 1)
                loss = -td_errors[t, 0] * sum((GAMMA * 0.5) ** (t - u) * outputs[u, 0] for u in past)
                loss = loss if bonus is None else loss - bonus
                grad = vector(torch.autograd.grad(loss, list(net.parameters()), retain_graph=True))
                close(steps[t].result, grad * min(1.0, 2.0 / grad.norm()), 1e-5)
                clipped += grad.norm() > 2
            row = (-td_errors[t, 0] * logprobs[t, 0], td_errors[t, 0] ** 2, entropies[t, 0], grad.norm())
            for name, number in zip(logged, row, strict=True):
                logged[name].append(number.item())
    assert 20 < clipped < 230
    for name, numbers in logged.items():  # of 128 updates in one iteration
        assert metrics[0][f"losses/{name}"] == pytest.approx(np.mean(numbers), rel=1e-6)


def test_traces_start_anew_with_the_episodes_after_a_checkpoint():
    """There the environment is reset though no episode has ended: the first step has no past."""
    space = spaces.Discrete(2)
    agent = random_agent(3, space)
    flags = {"env_id": env_of(space), "trace_decay": 1.0, "checkpoint_every": 128, "total_timesteps": 256}
    events, _ = run_train(agent, **flags, **ONLINE)
    obs, next_obs, _, rewards, terminated, dones = joined(events)
    assert not dones[127]
    step = only(events, "traced_critic_loss")[128]
    delta = rewards[128] + GAMMA * agent.critic(next_obs[128]) * ~terminated[128] - agent.critic(obs[128])
    grads = torch.autograd.grad(agent.critic(obs[128]).sum(), list(agent.critic.parameters()))
    close(step.result, -delta * vector(grads))


# -- the loop ----------------------------------------------------------------------------------------------------------

LIVE = {
    "num_envs": 2, "num_steps": 40, "total_timesteps": 320, "learning_rate": 0.01, CRITIC: 0.02, "critic_epochs": 3,
    "ent_coef": 0.1, "anneal_lr": False, "max_grad_norm": 0.5,
}  # fmt: skip


def at(params: Tensor, space: gym.Space, shared: bool = False) -> actor_critic.Agent:
    """An agent with these parameters."""
    agent = random_agent(3, space)
    if shared:
        share(agent)
    nn.utils.vector_to_parameters(params.clone(), agent.parameters())
    return agent


def share(agent: actor_critic.Agent) -> None:
    for i in (0, 2):
        agent.critic.net[i] = agent.actor.net[i]


@BOTH
@pytest.mark.parametrize("critic_target", ["monte_carlo", "bootstrap"])
def test_the_critic_is_fitted_before_the_advantages_are_computed(space: gym.Space, critic_target: str):
    """The lecture's order; targets and advantages come from the critic as it then is, and the true successors."""
    agent, flags = random_agent(3, space), {"critic_target": critic_target, "gae_lambda": LAMBDA} | LIVE
    events, _ = run_train(agent, env_id=env_of(space), **flags)
    kinds = [event.kind for event in events]
    fit = ["target", "critic_loss"] * 3
    assert kinds == ["collect", *fit, "target", "estimate", "actor_loss"] * 4
    for start in range(0, len(events), 10):
        rollout, before = events[start].result, None
        for event in events[start + 1 : start + 10]:
            now, ends = at(event.params, space), (rollout.terminated, rollout.dones)
            arrays = [x.detach() for x in (now.critic(rollout.obs), now.critic(rollout.next_obs))]
            given = (rollout.rewards, *arrays, *ends)
            by_hand = [x.detach().numpy() for x in given]
            if event.kind in ("target", "estimate"):
                for one, other in zip(event.given, given, strict=True):
                    close(one, other)
            if event.kind == "target":
                lam = 0.0 if critic_target == "bootstrap" else 1.0
                close(event.result, lambda_loop(*by_hand, GAMMA, lam) + by_hand[1], 1e-9)
                assert before is None or (event.result - before).abs().max() > 1e-4  # each fit has new ones
                before = event.result
            elif event.kind == "critic_loss":
                close(event.given[1], before)
            elif event.kind == "estimate":
                close(event.result, lambda_loop(*by_hand, GAMMA, LAMBDA), 1e-9)
                advantages = event.result
            else:
                for one, other in zip(event.given, (rollout.obs, rollout.actions, advantages), strict=True):
                    close(one, other)


def reference_loss(agent: actor_critic.Agent, kind: str, batch: tuple, flags: dict) -> Tensor:
    """Of one gradient step, with torch.distributions, sample by sample."""
    if kind == "critic_loss":
        obs, returns = batch
        return sum((v - y) ** 2 for v, y in zip(agent.critic.net(obs).flatten(), returns.flatten(), strict=True)) / 80
    obs, actions, advantages, *returns = batch
    out = agent.actor.net(obs)
    if hasattr(agent.actor, "log_std"):
        pi = Independent(Normal(out, agent.actor.log_std.exp()), 1)
    else:
        pi = Categorical(logits=out)
    weighted = zip(pi.log_prob(actions).flatten(), advantages.flatten(), strict=True)
    loss = -sum(a * x for x, a in weighted) / 80 - flags["ent_coef"] * pi.entropy().mean()
    if kind == "shared_loss":
        loss = loss + flags["vf_coef"] * reference_loss(agent, "critic_loss", (obs, *returns), flags)
    return loss


@BOTH
@pytest.mark.parametrize("shared", [False, True])
def test_the_gradient_steps_can_be_taken_by_a_second_road(space: gym.Space, shared: bool):
    """Separate tensors, loss.backward(), clip_grad_norm_ and plain Adam: the same parameters, step by step."""
    flags = LIVE | {"shared_network": shared, "vf_coef": 0.3}
    agent = random_agent(3, space)
    events, metrics = run_train(agent, env_id=env_of(space), **flags)
    steps = only(events, "actor_loss", "critic_loss", "shared_loss")
    assert {step.kind for step in steps} == ({"shared_loss"} if shared else {"actor_loss", "critic_loss"})
    other = at(steps[0].params, space, shared)
    assert len(list(other.parameters())) == len(list(agent.parameters())) == (8 if shared else 12) + (space.shape != ())
    nets = {"shared_loss": other, "actor_loss": other.actor, "critic_loss": other.critic}
    rates = {"shared_loss": 0.01, "actor_loss": 0.01, "critic_loss": 0.02}
    optimizers = {k: torch.optim.Adam(nets[k].parameters(), rates[k], eps=1e-5) for k in {x.kind for x in steps}}
    norms = []
    for step, then in pairwise([*steps, None]):
        other.zero_grad()
        reference_loss(other, step.kind, step.given, flags).backward()
        norm = torch.nn.utils.clip_grad_norm_(nets[step.kind].parameters(), 0.5)
        norms += [] if step.kind == "critic_loss" else [float(norm)]
        close(step.result, vector(p.grad for p in nets[step.kind].parameters()), 1e-8)
        optimizers[step.kind].step()
        close(vector(other.parameters()), then.params if then else vector(agent.parameters()), 1e-7)
    assert max(norms) > 0.5
    assert [m["losses/grad_norm"] for m in metrics] == pytest.approx(norms, rel=1e-5)  # the policy's


def test_a_shared_network_has_one_trunk_and_one_step():
    space = spaces.Discrete(2)
    agent = random_agent(3, space)
    start = {name: param.detach().clone() for name, param in agent.named_parameters()}
    events, _ = run_train(agent, env_id=env_of(space), **LIVE | {"shared_network": True, "total_timesteps": 80})
    assert [event.kind for event in events] == ["collect", "target", "estimate", "shared_loss"]
    storages = [[p.data_ptr() for p in net.parameters()] for net in (agent.actor, agent.critic)]
    assert storages[0][:4] == storages[1][:4]
    assert not set(storages[0][4:]) & set(storages[1])
    for name, param in agent.named_parameters():  # both heads, and the trunk once
        assert not torch.equal(param, start[name]), name
    for name in agent.state_dict():
        if "critic.net.0" in name or "critic.net.2" in name:
            assert torch.equal(agent.state_dict()[name], agent.state_dict()[name.replace("critic", "actor")])
    (step,), (estimate,), (target,) = (only(events, kind) for kind in ("shared_loss", "estimate", "target"))
    close(step.given[2], estimate.result)  # with the critic as it was
    close(step.given[3], target.result)
    assert torch.equal(estimate.params, target.params)


@BOTH
def test_each_loss_trains_its_own_network(space: gym.Space):
    agent, obs, advantages = random_agent(3, space), torch.randn(6, 4, 3).double(), torch.randn(6, 4).double()
    actions = torch.randint(2, (6, 4)) if isinstance(space, spaces.Discrete) else torch.randn(6, 4, 2).double()
    advantages.requires_grad_()
    trace = [vector(net.parameters()) for net in (agent.actor, agent.critic)]
    losses = {
        "actor": actor_critic.actor_loss(agent, obs, actions, advantages, ent_coef=0.1),
        "critic": actor_critic.critic_loss(agent, obs, 1 * advantages),
        "actor traced": actor_critic.traced_actor_loss(
            agent, obs[:1, :1], actions[:1, :1], advantages[:1, :1].detach(), trace[0], ent_coef=0.1
        ),
        "critic traced": actor_critic.traced_critic_loss(agent, advantages[:1, :1].detach(), trace[1]),
    }
    for name, (loss, _) in losses.items():
        named = dict(agent.named_parameters()) | {"advantages": advantages}
        grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        for param, grad in zip(named, grads, strict=True):
            assert (grad is not None and grad.abs().sum() > 0) == param.startswith(name.split()[0]), (name, param)
    with pytest.raises(AssertionError):
        actor_critic.actor_loss(agent, obs, actions, advantages[:, :1], ent_coef=0.0)
    with pytest.raises(AssertionError):
        actor_critic.critic_loss(agent, obs, advantages[:, :1])


@pytest.mark.parametrize(
    ("num_steps", "num_envs", "updates"), [(1, 1, 128), (1, 2, 64), (5, 3, 8), (32, 2, 2), (64, 2, 1), (99, 2, 1)]
)
def test_an_iteration_is_about_a_hundred_steps_or_one_rollout(num_steps: int, num_envs: int, updates: int):
    """Its metrics are means over the updates, and an episode is logged at the step where it ended."""
    flags = LIVE | {"num_envs": num_envs, "num_steps": num_steps, "critic_epochs": 2}
    steps = updates * num_steps * num_envs
    flags |= {"total_timesteps": 2 * steps, "env_id": env_of(spaces.Discrete(2))}
    events, metrics = run_train(random_agent(3, spaces.Discrete(2)), **flags)
    assert len(only(events, "collect")) == len(only(events, "actor_loss")) == 2 * updates
    assert [each["steps"] for each in metrics] == [steps, steps]
    dones = torch.cat([event.result.dones for event in only(events, "collect")]).flatten()
    ends = [end[0] for end in metrics[0]["ended"]] + [steps + end[0] for end in metrics[1]["ended"]]
    assert ends == (dones.nonzero().flatten() + 1).tolist()
    entropies, losses = [], []
    for event in only(events, "actor_loss", "critic_loss"):
        agent = at(event.params, spaces.Discrete(2))
        if event.kind == "actor_loss":
            entropies.append(agent.actor(*event.given[:2])[1].mean().item())
        else:
            losses.append(actor_critic.critic_loss(agent, *event.given)[0].item())
    losses = losses[1::2]  # the last step of each fit
    pairs = [(event.given[1], event.result) for event in only(events, "target")[::3]]  # before the fit
    for k, each in enumerate(metrics):
        half = slice(k * updates, (k + 1) * updates)
        assert each["losses/entropy"] == pytest.approx(np.mean(entropies[half]), rel=1e-6)
        assert each["losses/value_loss"] == pytest.approx(np.mean(losses[half]), rel=1e-6)
        values, targets = (torch.cat(x).numpy() for x in zip(*pairs[half], strict=True))
        explained = 1 - np.var(targets - values) / np.var(targets)
        assert each["losses/explained_variance"] == pytest.approx(explained, rel=1e-6)


def test_learning_rate_and_normalized_advantages():
    flags = LIVE | {"env_id": env_of(spaces.Discrete(2)), "normalize_advantages": True, "anneal_lr": True}
    events, metrics = run_train(random_agent(3, spaces.Discrete(2)), **flags)
    assert [each["charts/learning_rate"] for each in metrics] == pytest.approx([0.01, 0.0075, 0.005, 0.0025])
    for step, estimate in zip(only(events, "actor_loss"), only(events, "estimate"), strict=True):
        raw = estimate.result.numpy()
        close(step.given[2], (raw - raw.mean()) / raw.std(), 1e-6)


def test_statistics_scale_what_comes_after_them():
    """Observations with those of the steps before, rewards with the newest."""
    flags = LIVE | {"env_id": env_of(spaces.Discrete(2)), "normalize_obs": True, "normalize_rewards": True}
    events, _ = run_train(random_agent(3, spaces.Discrete(2)), **flags)
    rollouts = [event.result for event in only(events, "collect")]
    for k, (rollout, step, estimate) in enumerate(
        zip(rollouts, only(events, "actor_loss"), only(events, "estimate"), strict=True)
    ):
        before = torch.cat([each.obs for each in rollouts[:k]]).numpy().reshape(-1, 3) if k else None
        obs = rollout.obs.numpy()
        expected = obs if before is None else (obs - before.mean(0)) / np.sqrt(before.var(0) + 1e-8)
        close(step.given[0], expected, 1e-5)
        discounted = torch.cat([each.discounted_returns for each in rollouts[: k + 1]]).numpy()
        close(estimate.given[0], rollout.rewards / np.sqrt(discounted.var() + 1e-8), 1e-5)


def test_flags_that_would_do_nothing_are_refused():
    for bad in (
        {"trace_decay": 0.5}, {"trace_decay": 0.5, "num_envs": 1}, {"trace_decay": 0.5, "num_steps": 1},
        {"trace_decay": 1.1, **ONLINE}, {"trace_decay": 0.5, "shared_network": True, **ONLINE},
        {"normalize_advantages": True, **ONLINE},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"--{next(iter(bad)).replace('_', '-')}"):
            actor_critic.Args(**bad)
    actor_critic.Args(trace_decay=1.0, **ONLINE)


# -- learning ----------------------------------------------------------------------------------------------------------


class Target(gym.Env):
    """One step; the best action is 1 + 2x for what is seen, x from [-0.5, 0.5]; the pay is minus the squared error."""

    observation_space, action_space = spaces.Box(-0.5, 0.5, (1,)), spaces.Box(-1, 3, (1,))

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.x = self.np_random.uniform(-0.5, 0.5, 1).astype(np.float32)
        return self.x, {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        return self.x, -float((action - 1 - 2 * self.x).item() ** 2), True, False, {}


gym.register("actor_critic/Target-v0", Target)


@pytest.mark.parametrize("broken", [False, True])
def test_learns_a_continuous_action(broken: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The threshold is one that an update with a wrong sign misses; the policy starts near −1/3."""
    estimate = actor_critic.advantage_estimates
    if broken:
        monkeypatch.setattr(actor_critic, "advantage_estimates", lambda *x, **flags: -estimate(*x, **flags))
    args = actor_critic.Args(
        env_id="actor_critic/Target-v0", total_timesteps=6_000, num_envs=4, num_steps=10, learning_rate=0.01,
        hidden_size=16, device="cpu", eval_episodes=200, run_dir=str(tmp_path / "run"),
    )  # fmt: skip
    assert (actor_critic.train(args)["eval/episodic_return"] > -0.05) == (not broken)  # −0.01, and −6 with a wrong sign



def test_learns_cartpole(tmp_path: Path):
    args = actor_critic.Args(total_timesteps=15_000, device="cpu", eval_episodes=10, run_dir=str(tmp_path / "run"))
    value = actor_critic.train(args)["eval/episodic_return"]
    assert value > 150  # 392 to 500 with seeds 1 to 3, at random 20, with a wrong sign 9
