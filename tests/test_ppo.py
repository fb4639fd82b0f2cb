"""Proves that ppo.py computes what its formulas say: advantages, losses, policies, statistics, whole runs.

References are double loops in NumPy, numbers worked out by hand, torch.distributions and torch's own Adam.
Environments write down all they are asked and answer; whole runs of train() are done again by a second road.
"""

import math
import tempfile
from contextlib import ExitStack
from functools import cache
from itertools import combinations_with_replacement, pairwise, product
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributions import Categorical, Independent, Normal

import ppo

INF, DISCRETE = np.inf, spaces.Discrete(3)
WIDE = spaces.Box(np.float32([-1, 0]), np.float32([3, 10]))  # not symmetric, and not of one width
BOTH = pytest.mark.parametrize("space", [DISCRETE, WIDE], ids=["categorical", "gaussian"])
NAMES = ("obs", "reward", "next_obs", "terminated", "dones", "discounted")
SMALL = {
    "env_id": "ppo/Counting-v0", "num_envs": 3, "num_steps": 8, "update_epochs": 3, "total_timesteps": 96,
    "learning_rate": 0.01, "gamma": 0.9, "gae_lambda": 0.7, "hidden_size": 8, "device": "cpu",
}  # fmt: skip
PLAIN = {"normalize_rewards": True, "normalize_advantages": False, "anneal_lr": False}
HUGE = {"normalize_obs": True, "env_id": "ppo/CountingBox-v0", "log_std_init": 2.3}  # σ = 10

def close(actual, expected, tolerance=1e-10):
    """Compares numbers, arrays, or tuples of them."""
    for pair in zip(actual, expected, strict=True) if isinstance(actual, tuple) else ((actual, expected),):
        tensors = (torch.as_tensor(x, dtype=torch.float64).detach() for x in pair)
        torch.testing.assert_close(*tensors, rtol=0, atol=tolerance)

def new_agent(space, obs_dim=3, double=True, random=True, **flags):
    """If random, all parameters are far from 0, so that no part of a formula can hide."""
    torch.manual_seed(0)
    envs = SimpleNamespace(obs_dim=obs_dim, action_dim=spaces.flatdim(space), discrete=space is DISCRETE)
    agent = ppo.Agent(envs, ppo.Args(**{"hidden_size": 8} | flags))
    for param in agent.parameters() if random else ():
        param.data = 0.7 * torch.randn_like(param)
    return agent.double() if double else agent

def random_case(space, size=16):
    """An agent, and obs, actions, old log-probabilities (some within the clip range), advantages, returns."""
    agent, shapes = new_agent(space), ((3,), (2,), (), (), ())
    obs, actions, change, advantages, returns = (torch.randn(size, *x, dtype=torch.float64) for x in shapes)
    actions = torch.randint(3, (size,)) if space is DISCRETE else actions
    logprobs = distribution(agent, obs).log_prob(actions).detach()
    return agent, [obs, actions, logprobs + 0.3 * change, 2 * advantages + 1, returns]

def distribution(agent, obs):
    z = agent.actor(obs)
    return Categorical(logits=z) if agent.discrete else Independent(Normal(z, agent.log_std.exp()), 1)

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

def double_loop(rewards, values, next_values, terminated, dones, gamma, lam):
    """Columns are cut into episodes first; then A_t = Σ_k (γλ)^k δ_{t+k} within one of them, term by term."""
    advantages = np.zeros_like(rewards)
    for n in range(rewards.shape[1]):
        for start, stop in pairwise([0, *(np.flatnonzero(dones[:, n]) + 1), len(dones)]):
            for t, u in combinations_with_replacement(range(start, stop), 2):
                future = 0.0 if terminated[u, n] else gamma * next_values[u, n]
                advantages[t, n] += (gamma * lam) ** (u - t) * (rewards[u, n] + future - values[u, n])
    return advantages

def test_gae_equals_a_double_loop_over_separate_episodes():
    """Each kind of end has its own rate; now and then there are ends at every step, at 0, or at T - 1."""
    rng, both = np.random.default_rng(0), 0
    for case in range(200):
        shape = (int(rng.integers(1, 20)), int(rng.integers(1, 4)))
        terminated, truncated = (rng.random(shape) < rng.choice([0, 0.1, rate]) for rate in (0.5, 0.6))
        (terminated, truncated)[case % 2][{0: slice(None), 1: 0, 2: -1}.get(case % 10, slice(0))] = True
        both += (terminated & truncated).sum()
        arrays = (*(10 * rng.normal(size=shape) for _ in range(3)), terminated, terminated | truncated)
        gamma, lam = rng.choice([0.0, 0.875, 1.0]), rng.choice([0.0, 0.75, 1.0])
        close(ppo.gae(*map(torch.from_numpy, arrays), gamma, lam), double_loop(*arrays, gamma, lam))
    assert both > 100

def test_gae_by_hand():
    """γ = ½; δ = 0, 4, 4.5, 1, but δ_2 = 1 where step 2 terminates and δ_3 = −3 where step 3 does."""
    for terminated, truncated, lam, expected in (
        ([], [], 0, [0, 4, 4.5, 1]), ([], [], 1, [3.25, 6.5, 5, 1]),
        ([2], [], 1, [2.25, 4.5, 1, 1]), ([], [2], 1, [3.125, 6.25, 4.5, 1]),
        ([2], [2], 0.8, [1.76, 4.4, 1, 1]), ([], [2], 0.8, [2.32, 5.8, 4.5, 1]),  # both: as terminated
        ([], [3], 0.8, [2.384, 5.96, 4.9, 1]), ([3], [1], 0.8, [1.6, 4, 3.3, -3]),
    ):  # fmt: skip
        numbers = torch.tensor([[1.0, 2, 3, 4], [0.5, -1, 2, 7], [-1, 2, 7, 8]])[..., None]  # r, V(s), V(s')
        terminated, truncated = (torch.tensor([[t in x] for t in range(4)]) for x in (terminated, truncated))
        advantages = ppo.gae(*numbers, terminated, terminated | truncated, 0.5, lam)
        close(advantages[:, 0], expected, 1e-6)
        assert advantages.dtype == torch.float32

@pytest.mark.parametrize("cut", ["terminated", "truncated"])
def test_the_next_episode_leaves_no_trace(cut):
    """Not one bit of an advantage depends on what is after it. Shapes that would broadcast are refused."""
    numbers, dones = torch.randn(3, 20, 2), torch.zeros(20, 2, dtype=torch.bool)
    dones[12] = True
    terminated = dones & (cut == "terminated")
    before = ppo.gae(*numbers, terminated, dones, 0.99, 1.0)
    numbers[0, 13:] *= 1e6
    numbers[2][terminated] = 1e6
    after = ppo.gae(*numbers, terminated, dones, 0.99, 1.0)
    assert torch.equal(before[:13], after[:13])
    assert not (before[13:] == after[13:]).any()
    for i in range(5):
        with pytest.raises(AssertionError):
            ppo.gae(*(x[:, : 2 - (k == i)] for k, x in enumerate((*numbers, terminated, dones))), 0.99, 1.0)

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

@BOTH
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
    assert len({param.untyped_storage().data_ptr() for param in agent.parameters()}) == 12 + (space is WIDE)
    obs, actions, _, advantages, returns = batch
    logprobs = distribution(agent, obs).log_prob(actions)
    loss, _ = ppo.ppo_loss(agent, obs, actions, logprobs.detach(), advantages, returns, args)
    scaled = (advantages - advantages.mean()) / advantages.std(correction=0)
    close(gradients(loss, agent), gradients(-(logprobs * scaled).mean(), agent), 1e-6)
    for i in (2, 3, 4):  # (B, 1) beside (B,)
        with pytest.raises(AssertionError):
            ppo.ppo_loss(agent, *batch[:i], batch[i][:, None], *batch[i + 1 :], args)

@BOTH
def test_equal_advantages_teach_nothing_but_the_entropy_grows(space):
    """Normalised, that is any constant, whatever rounding says."""
    for constant, ent_coef in product((0.0, 0.1, -12345.678), (0.0, 0.1)):
        agent, batch = random_case(space)
        batch[3], entropy = torch.full((16,), constant), agent.policy(*batch[:2])[1].mean()
        args = ppo.Args(ent_coef=ent_coef, vf_coef=0.0, normalize_advantages=constant != 0)
        grads = gradients(ppo.ppo_loss(agent, *batch, args)[0], agent)
        for param, grad in zip(agent.parameters(), grads, strict=True):
            param.data -= 0.05 * grad
        assert ent_coef or all((grad == 0).all() for grad in grads)
        assert (agent.policy(*batch[:2])[1].mean() > entropy + 1e-5) == bool(ent_coef)

@BOTH
def test_logprob_and_entropy(space):
    """Values and gradients as torch.distributions has them, one number for an action of any dimension."""
    agent, (obs, actions, *_) = random_case(space, 20)
    for shape in ((20,), (5, 4)):
        seen, taken = obs.reshape(*shape, 3), actions.reshape(*shape, *actions.shape[1:])
        pi, weights = distribution(agent, seen), torch.linspace(-1, 2, 20).reshape(shape)
        logprobs, entropy = agent.policy(seen, taken)
        for actual, expected in ((logprobs, pi.log_prob(taken)), (entropy, pi.entropy())):
            close(actual, expected)
            close(*(gradients((weights * x).sum(), agent) for x in (actual, expected)))

@BOTH
def test_acting_in_numpy_draws_from_the_policy(space):
    """The noise is independent in time, environment and dimension, and each action as frequent as π(a|s)."""
    agent, steps = new_agent(space, double=False, normalize_obs=True), 50_000
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
    actions = torch.from_numpy(act(obs.repeat(steps, 1).numpy(), noise.reshape(2 * steps, -1)))
    logprobs, entropy = agent.policy(obs.repeat(steps, 1), actions)  # E[log π] = −H
    assert (logprobs + entropy).mean().abs() < 4 * logprobs.std() / math.sqrt(2 * steps)

def test_initial_weights_are_orthogonal():
    agent = new_agent(WIDE, 5, double=False, random=False, hidden_size=16, log_std_init=-0.5)
    for net, last in ((agent.actor, 0.01), (agent.critic, 1.0)):
        for layer, gain in zip(net[::2], (2**0.5, 2**0.5, last), strict=True):
            w = layer.weight if layer.out_features <= layer.in_features else layer.weight.T
            close((w @ w.T, layer.bias), (gain**2 * torch.eye(len(w)), torch.zeros_like(layer.bias)), 1e-5)
    assert (agent.log_std == -0.5).all()

@pytest.mark.parametrize("shape", [(), (3,)])
def test_running_moments_equal_those_of_all_rows(shape):
    """Of float32 rows far from 0, where digits cancel."""
    rng, norm, other = np.random.default_rng(0), ppo.RunningNorm(*shape), ppo.RunningNorm(*shape)
    x, rows = torch.randn(4, *shape), np.empty((0, *shape))
    assert torch.equal(norm(x), x)  # before the first rows
    for size in [*rng.integers(1, 50, 20).tolist(), 1, 1, 2]:
        new = np.float32(1e6 + rng.normal(size=(size, 2, *shape)) * (np.arange(1, 4) if shape else 2))
        rows = np.concatenate([rows, new.reshape(-1, *shape)])
        norm.update(torch.from_numpy(new))
        np.testing.assert_allclose(norm.mean, rows.mean(0), rtol=1e-7)
        np.testing.assert_allclose(norm.scale, 1 / np.sqrt(rows.var(0) + 1e-8), rtol=1e-6)
        other.load_state_dict(norm.state_dict())  # holds all that is needed to go on
        norm, other = other, norm
    x = 1e6 + 30 * torch.randn(100, *shape)
    close(norm(x), ((x.numpy() - norm.mean.numpy()) / rows.std(0)).clip(-10, 10), 1e-5)

def test_a_constant_input_comes_out_as_0():
    """Also where it is large, in both ways to act; other values are not blown up."""
    agent, same = new_agent(WIDE, double=False, normalize_obs=True), torch.tensor([[1e5, 0.1, -1 / 3]])
    for size in (1, 24, 255, 2048):
        agent.obs_norm.update(same.expand(size, 7, 3))
    close(agent.obs_norm(torch.cat([same, same + 1])), [[0.0] * 3, [1.0] * 3], 1e-6)
    close(agent.in_numpy()(same.numpy(), 0), agent.actor(torch.zeros(1, 3)), 1e-6)

class Counting(gym.Env):
    """Shows episode + step / 100 and its own index, pays what no other step pays, and writes all down.
    Episodes last 3, 1, 4, 2, 9 steps (each environment begins elsewhere) and end in termination, a time limit
    or both. Every other environment shows the same array each time, as some do. `view` shows something else.
    """

    made = []  # noqa: RUF012

    def __init__(self, action_space=DISCRETE, space=None, view=None):
        self.observation_space, self.action_space = space or spaces.Box(-INF, INF, (2,)), action_space
        self.index, self.array, self.log, self.seeds = len(Counting.made), np.zeros(2, np.float32), [], []
        self.view = view or (lambda _: self.array.copy() if self.index % 2 else self.array)
        Counting.made.append(self)

    def show(self):
        self.array[:] = len(self.seeds) + self.count / 100, self.index
        return self.view(self.count)

    def reset(self, *, seed=None, options=None):
        self.seeds.append(seed)
        self.count = 0
        return self.show(), {}

    def step(self, action):
        which, obs = len(self.seeds) + self.index, np.array(self.show())
        self.count += 1
        left = (3, 1, 4, 2, 9)[which % 5] - self.count
        assert left >= 0, "step after the end"
        reward = self.index + len(self.seeds) / 4 - (self.count - 2) ** 2 - float(np.sum((action - 2) ** 2))
        ends = {"terminated": left == 0 and which % 3 != 1, "truncated": left == 0 and which % 3 != 0}
        step = {"obs": obs, "action": action, "reward": reward, "next_obs": np.array(self.show())}
        self.log.append(step | ends | {"dones": any(ends.values()), "episode": len(self.seeds)})
        return self.show(), reward, *ends.values(), {}

gym.register("ppo/Counting-v0", Counting)
gym.register("ppo/CountingBox-v0", Counting, kwargs={"action_space": WIDE})

def counting_envs(num_envs, **kwargs):
    Counting.made = []
    gym.registry["Any-v0"] = gym.envs.registration.EnvSpec("Any-v0", Counting, kwargs=kwargs)
    envs = ppo.Envs(ExitStack(), ppo.Args("Any-v0", gamma=0.9), num_envs)
    envs.reset(3, 0)
    return envs

def hand_count(envs, gamma):
    """What environments wrote as arrays (T, N, ...), by name; and (steps, return, length) of the episodes."""
    ended = []
    for t, env in product(range(len(envs[0].log)), envs):
        now = env.log[t]
        rewards = [step["reward"] for step in env.log[: t + 1] if step["episode"] == now["episode"]]
        now["discounted"] = sum(gamma**k * reward for k, reward in enumerate(reversed(rewards)))
        if now["dones"]:
            ended.append((len(envs) * (t + 1), sum(rewards), len(rewards)))
    return {name: np.stack([[step[name] for step in env.log] for env in envs], 1) for name in now}, ended

def test_steps_are_what_the_environments_did():
    envs = counting_envs(4)
    steps = [(envs.obs, *envs.step(np.array([0, 1, 2, t % 3]))) for t in range(32)]
    obs, rewards, next_obs, terminated, dones, discounted = map(np.array, zip(*steps, strict=True))
    expected, ended = hand_count(Counting.made, 0.9)
    close((obs, rewards, next_obs, terminated, dones, discounted), [expected[name] for name in NAMES], 1e-4)
    close(envs.ended, ended, 1e-9)
    assert np.unique(terminated + 2 * expected["truncated"]).tolist() == [0, 1, 2, 3]

def test_actions_have_their_own_units_and_observations_are_flat():
    """A policy's unit is half the width between two bounds, and what is beyond a bound is clipped."""
    units = np.float32([-100, -1, 0, 0.5, 1, 100])[:, None]
    for space, expected, obs_space, view, flat in (
        (spaces.Discrete(6, start=5), [5, 6, 7, 8, 9, 10],
         spaces.Discrete(3, start=5), lambda k: 5 + 2 * k, [[1, 0, 0], [0, 0, 1]]),
        (spaces.Box(-2.0, 4.0, ()), [-2, -2, 1, 2.5, 4, 4],
         spaces.Box(0, 9, (), np.float64), lambda k: np.array(4.0 + k), [[4], [5]]),
        (spaces.Box(-4, np.array([[4.0], [0.0]]), dtype=np.float64),
         [[[-4], [-4]], [[-4], [-4]], [[0], [-2]], [[2], [-1]], [[4], [0]], [[4], [0]]],
         spaces.Box(0, 9, (2, 2)), lambda k: np.float32([[k, 1], [2, 3]]), [[0, 1, 2, 3], [1, 1, 2, 3]]),
        (spaces.Box(np.float32([-1, -INF, -INF]), np.float32([INF, 0.25, INF])),
         np.hstack([units.clip(-1), units.clip(max=0.25), units]),
         spaces.Box(0, 9, (2,), np.int64), lambda k: [4, k], [[4, 0], [4, 1]]),
    ):  # fmt: skip
        envs = counting_envs(6, action_space=space, space=obs_space, view=view)
        actions = np.arange(6) if envs.discrete else units.repeat(envs.action_dim, 1)
        obs = np.array([envs.obs, envs.step(actions)[1]])
        assert (obs[:, 0].tolist(), obs.dtype) == (flat, np.float32)
        given = [env.log[0]["action"] for env in Counting.made]
        close(np.array(given), expected, 0)
        assert all(space.contains(np.asarray(action)) and action.dtype == space.dtype for action in given)

@cache
def run_train(**flags):
    """Runs train(); returns what its functions were given, what it logged, and the environments it made."""
    run, start, gae, loss = SimpleNamespace(gae=[], updates=[]), ppo.Run.start, ppo.gae, ppo.ppo_loss

    def spy_start(self, args, envs, **parts):
        run.args, run.parts, run.rng = args, parts, torch.get_rng_state()
        run.first = {name: x.clone() for name, x in parts["agent"].state_dict().items()}
        start(self, args, envs, **parts)

    def spy_gae(*args):
        run.gae.append((*args, gae(*args)))
        return run.gae[-1][-1]

    def spy_loss(agent, *batch):
        result = loss(agent, *batch)
        (group,), ratio = run.parts["optimizer"].param_groups, (agent.policy(*batch[:2])[0] - batch[2]).exp()
        run.updates.append((*batch[:-1], group["lr"], ratio.detach(), result[1][3].item()))
        return result

    Counting.made = []
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as directory:
        for name, spy in {"Run.start": spy_start, "gae": spy_gae, "ppo_loss": spy_loss}.items():
            patch.setattr(f"ppo.{name}", spy)
        run.metrics = ppo.train(ppo.Args(**SMALL | flags, run_dir=directory))
        events = EventAccumulator(directory, {"scalars": 0}).Reload()
        run.scalars = {x: [(e.step, e.value) for e in events.Scalars(x)] for x in events.Tags()["scalars"]}
    run.made, run.envs = Counting.made, Counting.made[:3]
    return run

@pytest.mark.parametrize("flags", [{}, PLAIN, HUGE], ids=["default", "plain", "box"])
def test_a_whole_run_by_a_second_road(flags):
    """Loops, separate parameters, backward(); what train() hands to its functions is compared on the way."""
    run = run_train(**flags)
    args, box, low, high, past, curves = run.args, flags is HUGE, WIDE.low, WIDE.high, None, []
    agent = new_agent(WIDE if box else DISCRETE, 2, double=False)
    agent.load_state_dict({name: run.first[name] for name in agent.state_dict()})
    optimizer = torch.optim.Adam(agent.parameters(), eps=1e-5)
    Counting.made = []
    envs = [gym.make(args.env_id).unwrapped for _ in range(3)]
    assert [env.reset() for env in envs]
    torch.set_rng_state(run.rng)

    def seen(obs):
        obs = obs if past is None else (obs - past.mean(0)) / np.sqrt(past.var(0) + 1e-8)
        return torch.from_numpy(obs).float().clip(-10, 10)

    for k in range(4):
        lr = optimizer.param_groups[0]["lr"] = 0.01 * (1 - k / 4 if args.anneal_lr else 1)
        noise = torch.randn(8, 3, 2) if box else -torch.empty(8, 3, 3).exponential_().log()
        actions = torch.zeros(8, 3, 2) if box else torch.zeros(8, 3, dtype=torch.int64)
        for t, n in np.ndindex(8, 3):
            output = agent.actor(seen(envs[n].array)).detach()
            sample = output + agent.log_std.exp().detach() * noise[t, n]
            actions[t, n] = sample if box else sample.argmax()
            given = np.clip([1, 5] + [2, 5] * sample.numpy(), low, high) if box else actions[t, n].numpy()
            if any(envs[n].step(given)[2:4]):
                envs[n].reset()
        arrays, _ = hand_count(envs, 0.9)
        obs, rewards, next_obs, *ends, _ = (arrays[name][8 * k :] for name in NAMES)
        rewards = rewards / np.sqrt(arrays["discounted"].var() + 1e-8) if args.normalize_rewards else rewards
        logprobs = distribution(agent, seen(obs)).log_prob(actions).detach()
        for epoch in range(3):
            values, next_values = (agent.critic(seen(x)).detach().numpy()[..., 0] for x in (obs, next_obs))
            inputs = rewards, values, next_values, *ends, 0.9, 0.7
            advantages = double_loop(*inputs)
            close(run.gae[3 * k + epoch], (*inputs, advantages), 1e-4)
            returns = advantages + values
            if epoch == 0:
                explained = 1 - advantages.var() / returns.var()
            batch = [torch.as_tensor(x).flatten(0, 1) for x in (obs, actions, logprobs, advantages, returns)]
            for i, chosen in enumerate(torch.randperm(24).chunk(4)):
                obs_, *rest = (x[chosen] for x in batch)
                *given, ratio, _ = run.updates[12 * k + 4 * epoch + i]
                close(tuple(given), (obs_, *rest, lr), 1e-4)
                assert (ratio - 1).abs().max() > 1e-4 if epoch or i else (ratio - 1).abs().max() < 1e-5
                loss, numbers = reference_loss(agent, seen(obs_.numpy()), *rest, args)
                optimizer.zero_grad()
                loss.backward()
                numbers.append(torch.nn.utils.clip_grad_norm_(agent.parameters(), 0.5).item())
                optimizer.step()
                curves.append([*numbers, explained, lr])
        past = arrays["obs"].reshape(-1, 2).astype(float) if args.normalize_obs else None
    trained = run.parts["agent"].state_dict()
    close(tuple(agent.parameters()), [trained[name] for name, _ in agent.named_parameters()], 1e-4)
    greedy = agent.actor(seen(np.array([step["obs"] for step in run.made[3].log]))).detach().numpy()
    greedy = np.clip([1, 5] + [2, 5] * greedy, low, high) if box else greedy.argmax(1)
    close(np.array([step["action"] for step in run.made[3].log]), greedy, 1e-2)  # in the evaluation
    curves = np.reshape(curves, (4, 12, -1)).mean(1).T
    assert curves[5].max() > 0.5  # the gradient was clipped
    for name, values in zip((*ppo.METRICS, "charts/learning_rate"), curves, strict=True):
        np.testing.assert_allclose(run.scalars[name], np.stack([(24, 48, 72, 96), values], 1), 1e-4, 1e-4)

def test_number_of_updates():
    """Iterations × epochs × minibatches; target_kl is compared with the mean of one epoch."""
    single, one_batch = {"num_minibatches": 24, "normalize_advantages": False}, {"num_minibatches": 1}
    kinds = ({"target_kl": 1e-5}, {"target_kl": 1e-6} | one_batch, single)  # first the ratio is 1
    updates = [len(run_train(**flags, anneal_lr=False).updates) for flags in kinds]
    assert updates == [4 * 1 * 4, 4 * 2 * 1, 4 * 3 * 24]
    flags = {"anneal_lr": False, "total_timesteps": 24, "update_epochs": 5, "seed": 28}
    kls = np.reshape([update[-1] for update in run_train(**flags).updates], (5, 4))
    third = kls[2].mean()
    assert max(*kls[:2].mean(1), kls[:3].mean()) < 0.99 * third
    assert 1.01 * third < min(kls[2, 3], kls[3].mean())  # not the last, nor the mean of all, decides
    assert [len(run_train(**flags, target_kl=f * third).gae) for f in (0.999, 1.001)] == [3, 4]

def test_environments_start_anew_after_a_checkpoint_and_never_with_the_same_seed():
    """And raw returns of whole episodes, no others, are logged at the steps where they ended."""
    run = run_train(checkpoint_every=48, eval_every=24, normalize_rewards=True)
    ended = hand_count(run.envs, 0.9)[1]
    close(run.scalars["charts/episodic_return"], [(step, value) for step, value, _ in ended], 1e-5)
    assert run.scalars["charts/episodic_length"] == [(step, length) for step, _, length in ended]
    assert [step for step, _ in run.scalars["eval/episodic_return"]] == [24, 48, 72, 96]
    for env in run.envs:
        assert env.log[15]["episode"] < env.log[16]["episode"] == env.log[16]["obs"][0]
    seeds = [seed for env in run.made for seed in env.seeds if seed is not None]
    assert (len(seeds), len(set(seeds))) == (3 * 3 + 4, 3 * 3 + 1)  # all evaluations are the same
    envs = counting_envs(8)
    for seed, stream in product(range(4, 14), ((0, 0), (0, 1), (0, 2), (0, 3), (1,))):
        envs.reset(seed, *stream)
    seeds = [seed for env in Counting.made for seed in env.seeds]
    assert len({seed for seed in seeds if 0 <= seed < 2**31}) == len(seeds)  # of ten runs, and of evaluations

@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from torch's compiler itself
@pytest.mark.slow
def test_the_compiled_gradient_is_the_same(tmp_path):
    flags = [{"env_id": "Pendulum-v1", "compile": x, "run_dir": f"{tmp_path}/{x}"} for x in (False, True)]
    eager, compiled = (ppo.train(ppo.Args(**SMALL | x)) for x in flags)
    assert [eager[x] for x in ppo.METRICS] == pytest.approx([compiled[x] for x in ppo.METRICS], 1e-3, 1e-4)

@pytest.mark.parametrize("broken", [False, True])
def test_learns(broken, monkeypatch):
    """CartPole, and to act as Counting likes it best; an update with a wrong sign learns neither."""
    run_train.cache_clear()
    surrogate = ppo.clipped_surrogate
    if broken:
        monkeypatch.setattr(ppo, "clipped_surrogate", lambda x, a, eps: surrogate(x, -a, eps))
    flags = {"total_timesteps": 10_000, "num_envs": 8, "num_steps": 64, "learning_rate": 2.5e-3}
    run_train(**flags, env_id="ppo/CountingBox-v0", gamma=0.0)
    distance = np.mean([(step["action"] - 2) ** 2 for env in Counting.made[:8] for step in env.log[-100:]])
    run = run_train(**flags, env_id="CartPole-v1", hidden_size=64, gamma=0.99, gae_lambda=0.95)
    assert (distance < 8, run.metrics["eval/episodic_return"] > 100) == (not broken, not broken)
