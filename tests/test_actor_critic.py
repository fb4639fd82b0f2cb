"""Proves that actor_critic.py has exactly the expectations, targets and traces it claims.

The expectations are exact: the shipped `train` gets every trajectory of the MDP in tabular.py. What it hands
to its loss, weighted by the probability of each, is compared with formulas of V, Q and the distribution of
states from dynamic programming. Formulas are compared with double loops, real runs are retraced with
torch.distributions, clip_grad_norm_ and plain Adam.
"""

import copy
import tempfile
from collections import namedtuple
from itertools import pairwise
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from tabular import CONTINUES, MDP, A, TabularEnv, linear
from torch.distributions import Categorical, Independent, Normal

import actor_critic

GAMMA = 0.75  # as 0.875 below, the same number in float32 and float64
ESTIMATES = [{"advantage": "td"}, {"advantage": "monte_carlo"}]
ESTIMATES += [{"advantage": "n_step", "lookahead": n} for n in (1, 2, 3, 20)]
ESTIMATES += [{"advantage": "gae", "gae_lambda": lam} for lam in (0.0, 0.5, 1.0)]
TARGETS = ("monte_carlo", "bootstrap")
ONLINE = {"num_envs": 1, "num_steps": 1}
DISCRETE, BOX = spaces.Discrete(A), spaces.Box(-1, 3, (1,))
SPACES = pytest.mark.parametrize("space", [DISCRETE, BOX], ids=["discrete", "box"])
TIMED = MDP(timed=True)  # there a critic for each (t, s) can be exact
THETA = torch.tensor([[0.5, -0.4], [-0.7, 0.6], [0.2, -0.9]]).double().repeat(4, 1)
THETA = THETA + torch.linspace(-0.6, 0.7, 24).double().reshape(12, 2)
PROBABILITIES, OCCUPANCY = TIMED.probabilities(THETA.softmax(-1)), TIMED.occupancy(THETA.softmax(-1))
TRUE_V, TRUE_Q = TIMED.values(THETA.softmax(-1), GAMMA)
WRONG_V = TRUE_V + torch.tensor([[3, -1.5, 0.7], [0.4, 2, -1], [-2.5, 0.3, 1.1], [1.2, 0.8, -0.9]]).double()

def close(actual, expected, tolerance=1e-10):
    actual, expected = (torch.as_tensor(x, dtype=torch.float64).detach() for x in (actual, expected))
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)

def vector(tensors):
    return torch.cat([x.detach().flatten() for x in tensors])

def args_of(**flags):
    return actor_critic.Args(**{"gamma": GAMMA, "hidden_size": 5, "device": "cpu"} | flags)

# Obs, actions and advantages as the loss got them, the gradients that the optimisers got, metrics, learning
# rates in the optimiser and in the log
Iteration = namedtuple("Iteration", "batch gradients metrics rates")

def watched_train(agent, envs, args):
    """What the shipped train() does, an iteration each, with this agent and this class of environments."""
    batches, iterations = [], []
    loss, end_iteration = actor_critic.actor_loss, actor_critic.Run.end_iteration

    def spy_loss(agent, *batch):
        batches.append(batch[:3])
        return loss(agent, *batch)

    def spy_end(run, metrics, rate, interval):
        groups = [part.param_groups[0] for name, part in run.parts.items() if name.endswith("optimizer")]
        gradients = [group["params"][0].grad.clone() for group in groups]
        floats, rates = {name: float(value) for name, value in metrics.items()}, [groups[0]["lr"], rate]
        iterations.append(Iteration(batches[-1], gradients, floats, rates))
        assert interval == run.args.log_interval
        end_iteration(run, metrics, rate, interval)

    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        patch.setattr(actor_critic, "Agent", lambda *_: agent)
        patch.setattr(actor_critic, "Envs", envs)
        patch.setattr(actor_critic, "actor_loss", spy_loss)
        patch.setattr(actor_critic.Run, "end_iteration", spy_end)
        patch.setattr(actor_critic.Run, "evaluate", lambda run: None)
        patch.setattr(actor_critic.Run, "log", lambda *_: None)  # slow
        actor_critic.train(actor_critic.Args(**vars(args) | {"run_dir": directory}))
    return iterations

def random_agent(space, args):
    """In float64, with parameters that are all far from 0, so that no part of a formula can hide."""
    envs = SimpleNamespace(obs_dim=12, action_dim=spaces.flatdim(space), discrete=space is DISCRETE)
    torch.manual_seed(0)
    agent = actor_critic.Agent(envs, args).double()
    for parameter in agent.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    return agent

def distribution(agent, obs):
    z = agent.actor(obs)
    return Categorical(logits=z) if agent.discrete else Independent(Normal(z, agent.log_std.exp()), 1)

class Given:
    """In place of Envs: all trajectories side by side, in float64; what is after an end is of no interest."""

    steps, ended, episodes, batch = 0, (), [(0.0, 0, 0.0)], TIMED.batch()

    def reset(self, *_):
        self.t, self.obs = 0, self.batch.obs[0].numpy()

    def step(self, _):
        row = type(self.batch)(*(x[self.t].numpy() for x in self.batch))
        self.t, self.steps, self.obs = self.t + 1, self.steps + len(row.mask), row.next_obs
        return row.rewards, row.next_obs, row.terminated, row.terminated | row.truncated, row.rewards

def estimated_gradients(values, **flags):
    """Σ_t ∇ log π(a_t|s_t) A_t of each trajectory, (K, rows, A): minus the gradient of the shipped loss."""
    flags |= {"critic_epochs": 1, "learning_rate": 0.0, "critic_learning_rate": 0.0, "total_timesteps": 1}
    args = args_of(num_envs=len(PROBABILITIES), num_steps=TIMED.horizon, **flags)
    agent, envs = random_agent(DISCRETE, args), Given()
    agent.actor, agent.critic = linear(THETA), linear(values.reshape(-1, 1))
    agent.in_numpy = lambda: lambda *_: envs.batch.actions[envs.t].numpy()
    (iteration,) = watched_train(agent, lambda *_: envs, args)
    grads = []
    for i, length in enumerate(envs.batch.mask.sum(0).tolist()):
        loss, _ = actor_critic.actor_loss(agent, *(x[:length, i] for x in iteration.batch), 0.0)
        grads.append(-length * torch.autograd.grad(loss, agent.actor.weight)[0].T)
    return torch.stack(grads)

def expectation(grads):
    return torch.tensordot(PROBABILITIES, grads, 1)

def formula(weights):
    """Σ_t E[∇ log π(a_t|s_t) X_t(s_t, a_t)], X (horizon, S, A), by dynamic programming."""
    theta = THETA.clone().requires_grad_()
    return torch.autograd.grad(TIMED.surrogate(theta.softmax(-1), OCCUPANCY, weights), theta)[0]

@pytest.mark.parametrize("flags", ESTIMATES, ids=str)
def test_with_the_true_values_every_advantage_gives_the_policy_gradient(flags):
    """Without a discount, where the missing factor γ^t is 1, it is the gradient of the objective."""
    close(expectation(estimated_gradients(TRUE_V, **flags)), formula(TRUE_Q))
    theta = THETA.clone().requires_grad_()
    values, _ = TIMED.values(THETA.softmax(-1), 1.0)
    (exact,) = torch.autograd.grad(TIMED.objective(theta.softmax(-1), 1.0), theta)
    close(expectation(estimated_gradients(values, gamma=1.0, **flags)), exact)
    assert exact.norm() > 0.5

@pytest.mark.parametrize("flags", [ESTIMATES[i] for i in (0, 1, 2, 3, 4, 8)], ids=str)
def test_bias_with_a_wrong_critic(flags):
    """It is Σ_t E[∇ log π γ^m (1 − terminated) (V − V^π)(s_{t+m})], m = n or all that is left, by listing.

    So Monte Carlo believes the critic alone about what follows the time limit.
    """
    n = {"td": 1, "n_step": flags.get("lookahead")}.get(flags["advantage"], TIMED.horizon)
    batch, theta, error, total = Given.batch, THETA.clone().requires_grad_(), (WRONG_V - TRUE_V), 0.0
    for i, length in enumerate(batch.mask.sum(0).tolist()):
        for t in range(length):
            last = min(t + n, length) - 1
            if not batch.terminated[last, i]:
                score = PROBABILITIES[i] * theta.log_softmax(-1)[batch.rows[t, i], batch.actions[t, i]]
                total = total + score * GAMMA ** (last + 1 - t) * error.flatten() @ batch.next_obs[last, i]
    bias = expectation(estimated_gradients(WRONG_V, **flags)) - formula(TRUE_Q)
    close(bias, torch.autograd.grad(total, theta)[0])
    if n == 1:  # V(s_t) is a baseline, the rest is Q^π
        close(bias, formula(GAMMA * torch.einsum("san,tn->tsa", CONTINUES, error[1:])))
        assert bias.norm() > 0.3
    elif n > 2:
        _, q_values = TIMED.values(THETA.softmax(-1), GAMMA, WRONG_V[-1])
        close(bias, formula(q_values) - formula(TRUE_Q))

def random_case(case):
    """rewards, values, next_values, terminated, dones (T, N); ends of both kinds: few, many, everywhere."""
    rng = np.random.default_rng(case)
    shape = (int(rng.integers(1, 20)), int(rng.integers(1, 4)))
    terminated, truncated = (rng.random(shape) < rng.choice([0, p, 0.5]) for p in (0.1, 0.2))
    (terminated, truncated)[case % 2][{0: slice(None), 1: 0, 2: -1}.get(case % 10, slice(0))] = True
    dones, (rewards, values, next_values) = terminated | truncated, 10 * rng.normal(size=(3, *shape))
    next_values[:-1] = np.where(dones[:-1], next_values[:-1], values[1:])  # else s' is s_{t+1}
    return rewards, values, next_values, terminated, dones

CASES = [random_case(case) for case in range(200)]

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

def by_loops(args, *arrays):
    n = {"td": 1, "n_step": args.lookahead, "monte_carlo": 1000}.get(args.advantage)
    return n_step_loop(*arrays, args.gamma, n) if n else lambda_loop(*arrays, args.gamma, args.gae_lambda)

@pytest.mark.parametrize("flags", ESTIMATES, ids=str)
def test_advantages_equal_double_loops_over_separate_episodes(flags):
    """n steps, their mixture by λ; td and monte_carlo are both ends of either."""
    inside = 0
    for case, arrays in enumerate(CASES):
        args = args_of(**flags | {"gamma": (0.0, 0.875, 1.0)[case % 3]})
        advantages = actor_critic.advantage_estimates(*map(torch.from_numpy, arrays), args=args)
        close(advantages, by_loops(args, *arrays))
        inside += (arrays[4] & ~arrays[3])[:-1].sum() * arrays[3][:-1].sum()
        for n, same in ((1, (0, 2, 6)), (1000, (1, 5, 8))):
            if ESTIMATES.index(flags) in same:
                close(advantages, n_step_loop(*arrays, args.gamma, n))
    assert inside > 1000  # both kinds of ends, within the window
    with pytest.raises(AssertionError):
        actor_critic.gae(*(torch.zeros(3, n) for n in (1, 2, 2, 2, 2)), GAMMA, 0.5)

@pytest.mark.parametrize("critic_target", TARGETS)
def test_critic_targets_equal_a_double_loop(critic_target):
    args = args_of(critic_target=critic_target)
    for arrays in CASES:
        targets = actor_critic.critic_targets(*map(torch.from_numpy, arrays), args=args)
        close(targets, arrays[1] + n_step_loop(*arrays, GAMMA, 1 if critic_target == "bootstrap" else 1000))

def either():
    return gym.wrappers.TransformAction(TabularEnv(timed=True), lambda action: int(action[0] > 1), BOX)

gym.register("actor_critic/Discrete-v0", TabularEnv, kwargs={"timed": True})
gym.register("actor_critic/Box-v0", either)
Step = namedtuple("Step", "obs actions rewards next_obs terminated dones discounted_returns fresh")

def real_run(space, **flags):
    """The flags, the agent as it was, iterations, steps taken, noise, and the agent; in float64."""
    args, steps, noise = args_of(env_id=f"actor_critic/{type(space).__name__}-v0", **flags), [], []

    class Envs(actor_critic.Envs):
        def reset(self, *stream):
            super().reset(*stream)
            self.obs, self.fresh = self.obs.astype(float), True

        def step(self, actions):
            obs, fresh, self.fresh = self.obs.copy(), self.fresh, False
            result = [x.astype(float) if x.dtype.kind == "f" else x for x in super().step(actions)]
            steps.append((obs, actions, *result, fresh))
            return result

    agent = random_agent(space, args)
    start, draw = copy.deepcopy(agent), agent.noise
    agent.noise = lambda *shape: noise.append(draw(*shape)) or noise[-1]
    iterations = watched_train(agent, Envs, args)
    assert len(iterations) == len(noise) == len(steps) / args.num_steps
    return args, start, iterations, steps, noise, agent

def columns(steps):
    return Step(*(torch.from_numpy(np.array(x)) for x in zip(*steps, strict=True)))

@SPACES
@pytest.mark.parametrize("lam", [0.3, 0.9, 1.0])
def test_summed_trace_updates_of_an_episode_are_the_lambda_return_update(space, lam):
    """With frozen parameters: Σ_t ∇ log π(a_t|s_t) (G^λ_t − V(s_t)), and Σ_t ∇V(s_t) (G^λ_t − V(s_t))."""
    flags = {"trace_decay": lam, "total_timesteps": 128, "learning_rate": 0.0, "critic_learning_rate": 0.0}
    _, agent, iterations, steps, *_ = real_run(space, max_grad_norm=1e9, **flags, **ONLINE)
    x = columns(steps)
    values, next_values = (agent.value(obs) for obs in (x.obs, x.next_obs))
    arrays = (y.detach().numpy() for y in (x.rewards, values, next_values, x.terminated, x.dones))
    advantages = torch.from_numpy(lambda_loop(*arrays, GAMMA, lam))
    params = [y for name, y in agent.named_parameters() if not name.startswith("critic")]
    starts = [0, *(x.dones[:, 0].nonzero()[:, 0] + 1).tolist()]
    assert len(starts) > 30
    logprobs, critic_params = distribution(agent, x.obs).log_prob(x.actions), list(agent.critic.parameters())
    for i, (inputs, outputs) in enumerate(((params, logprobs), (critic_params, values))):
        for start, end in pairwise(starts):
            total = (outputs[start:end] * advantages[start:end]).sum()
            expected = vector(torch.autograd.grad(total, inputs, retain_graph=True))
            close(-sum(iterations[t].gradients[i] for t in range(start, end)), expected)

CHANGES = [
    {}, {"critic_target": "bootstrap", "anneal_lr": False}, *({"num_steps": 8} | x for x in ESTIMATES[:4]),
    {"normalize_obs": True, "normalize_rewards": True, "normalize_advantages": True, "ent_coef": 0.1},
    {"shared_network": True, "vf_coef": 0.3, "ent_coef": 0.1, "max_grad_norm": 0.1}, ONLINE,
    *({"trace_decay": 0.9, "normalize_rewards": x, "normalize_obs": x, **ONLINE} for x in (False, True)),
]  # fmt: skip

@SPACES
@pytest.mark.parametrize("changes", CHANGES, ids=lambda changes: "-".join(map(str, changes.values())))
def test_a_run_can_be_retraced_by_a_second_road(space, changes):
    """Rollout by the policy as it is, critic steps on ever new targets, advantages, a step of the policy."""
    flags = {"num_envs": 2, "num_steps": 12, "critic_epochs": 3, "max_grad_norm": 0.3} | changes
    flags |= {"total_timesteps": 70 if changes.get("num_steps") == 1 else 200, "log_interval": 32}
    args, other, iterations, steps, noise, agent = real_run(space, checkpoint_every=32, **flags)
    T, traced = args.num_steps, args.trace_decay > 0
    params = [x for name, x in other.named_parameters() if name[:6] != "critic" or args.shared_network]
    critic_params = list(other.critic.parameters())
    actor = torch.optim.Adam(params, eps=1e-5)
    critic = torch.optim.Adam(critic_params, args.critic_learning_rate, eps=1e-5)
    fits = 0 if traced or args.shared_network else args.critic_epochs
    traces, longest, clipped = ([0.0] * len(params), [0.0] * len(critic_params)), 0, 0

    def descend(optimizer, params, grads):
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.clone()
        norm = torch.nn.utils.clip_grad_norm_(params, args.max_grad_norm)
        optimizer.step()
        return norm.item()

    def arrays(rewards, x, y, *ends):
        values, next_values = (other.critic(z).squeeze(-1).detach() for z in (x, y))
        return [z.numpy() for z in (rewards, values, next_values, *ends)]

    def targets(batch):
        n, now = 1 if args.critic_target == "bootstrap" else 1000, arrays(*batch)
        return torch.from_numpy(now[1] + n_step_loop(*now, GAMMA, n))

    for k, iteration in enumerate(iterations):
        past, now = columns(steps[: (k + 1) * T]), columns(steps[k * T : (k + 1) * T])
        obs, actions, rewards, next_obs, terminated, dones, _, fresh = now
        seen = past.obs[: k * T * args.normalize_obs].flatten(0, 1)
        var, mean = torch.var_mean(seen, 0, correction=0) if len(seen) else torch.zeros(2, 12)
        std = torch.where(var > 0, var + 1e-8, 1.0).sqrt()
        x, y = (((z - mean) / std).clip(-10, 10) for z in (obs, next_obs))
        pi, n = distribution(other, x), torch.from_numpy(noise[k])
        acted = (pi.logits + n).argmax(-1) if other.discrete else pi.mean + other.log_std.exp() * n
        close(actions, acted, 1e-6)
        var = past.discounted_returns.var(correction=0)
        rewards = rewards / (var + 1e-8).sqrt() if args.normalize_rewards and var > 0 else rewards
        batch = rewards, x, y, terminated, dones
        y_t = targets(batch).numpy()
        explained = 1 - np.var(y_t - arrays(*batch)[1]) / (np.var(y_t) + 1e-8)
        for _ in range(fits):
            loss = (other.critic(x).squeeze(-1) - targets(batch)).square().mean()
            descend(critic, critic_params, torch.autograd.grad(loss, critic_params))
        advantages = torch.from_numpy(by_loops(args, *arrays(*batch)))
        if args.normalize_advantages:
            advantages = (advantages - advantages.mean()) / advantages.std(correction=0)
        close(iteration.batch[2], advantages, 1e-6)
        done = k * T * args.num_envs / args.total_timesteps
        actor.param_groups[0]["lr"] = rate = args.learning_rate * (1 - done * args.anneal_lr)
        close(iteration.rates, [rate, rate])
        logprobs, entropy, values = pi.log_prob(actions), pi.entropy().mean(), other.critic(x).squeeze(-1)
        policy_loss, value_loss = -(logprobs * advantages).mean(), (values - targets(batch)).square().mean()
        loss = policy_loss - args.ent_coef * entropy + args.vf_coef * value_loss * args.shared_network
        grads = torch.autograd.grad(loss, params, retain_graph=True)
        if traced:
            longest = 0 if fresh or past.dones[k - 1] else longest + 1
            decay = GAMMA * args.trace_decay * (longest > 0)
            pairs = (logprobs, params), (values, critic_params)
            new = [torch.autograd.grad(output.sum(), inputs) for output, inputs in pairs]
            traces = [[decay * e + g for e, g in zip(*x, strict=True)] for x in zip(traces, new, strict=True)]
            grads, critic_grads = ([-advantages.item() * e for e in trace] for trace in traces)
            descend(critic, critic_params, critic_grads)
        norm = descend(actor, params, grads)
        clipped += norm > args.max_grad_norm
        expected = policy_loss.item(), value_loss.item(), entropy.item(), norm, explained
        expected = dict(zip(actor_critic.METRICS, expected, strict=True))
        assert iteration.metrics == pytest.approx(expected, rel=1e-5, abs=1e-6)
    close(vector(agent.parameters()), vector(other.parameters()), 1e-6)
    assert min(clipped, sum(fresh for *_, fresh in steps) - 1) > 0

def test_trace_loss_shared_network_shapes_and_noise():
    agent, shared = (random_agent(DISCRETE, args_of(shared_network=shared)) for shared in (False, True))
    params, td_error = list(agent.critic.parameters()), torch.tensor([[2.0]]).double()
    trace = torch.arange(sum(x.numel() for x in params)).double()
    loss = actor_critic.trace_loss(trace, td_error, params)
    close(vector(torch.autograd.grad(loss, params)), -2 * trace)
    for each, trunk in ((agent, False), (shared, True)):
        pairs = zip(each.actor.parameters(), each.critic.parameters(), strict=True)
        assert [x is y for x, y in pairs] == [trunk] * 4 + [False] * 2
    probs, noise = torch.tensor([0.3, 0.6, 0.1]), torch.from_numpy(agent.noise(150_000)).reshape(-1, 3)
    close((probs.log() + noise).argmax(-1).bincount() / 100_000, probs, 2e-2 / 10**0.5)  # samples of π
    obs, actions, wrong = torch.randn(6, 4, 12).double(), torch.zeros(6, 4).long(), torch.zeros(6, 1).double()
    with pytest.raises(AssertionError):
        actor_critic.actor_loss(agent, obs, actions, wrong, 0.0)
    with pytest.raises(AssertionError):
        actor_critic.critic_loss(agent, obs, wrong)

def test_flags_that_would_do_nothing_are_refused():
    trace, shared = {"trace_decay": 0.5, **ONLINE}, {"shared_network": True}
    for bad in ({"num_envs": 2}, {"num_steps": 2}, {"trace_decay": 1.1}, shared, {"ent_coef": 0.1}):
        with pytest.raises(ValueError, match="--trace-decay"):
            actor_critic.Args(**trace | bad)
    with pytest.raises(ValueError, match="--normalize-advantages"):
        actor_critic.Args(normalize_advantages=True, **ONLINE)
    actor_critic.Args(**trace | {"trace_decay": 1.0})

@pytest.mark.parametrize("critic_target", TARGETS)
@pytest.mark.parametrize("flags", [{"num_steps": 12, "num_envs": 2}, {"critic_epochs": 1, **ONLINE}], ids=str)
def test_a_constant_reward_has_the_value_of_an_infinite_horizon(critic_target, flags, monkeypatch):
    """1/(1 − γ) = 4, though no episode sees more than 3 rewards, which are worth 2.3."""

    def clock(env, action):  # pays 1 for ever, but is cut off
        env.t += 1
        return env._obs(), 1.0, False, env.t == 3, {}

    monkeypatch.setattr(TabularEnv, "step", clock)
    flags = {"critic_epochs": 20, "critic_learning_rate": 0.02, "learning_rate": 0.0} | flags
    flags |= {"critic_target": critic_target, "total_timesteps": 800, "max_grad_norm": 1e9}
    *_, steps, _, agent = real_run(DISCRETE, **flags)
    close(agent.value(columns(steps).obs), 4 + torch.zeros(len(steps), len(steps[0][0])), 0.3)

def test_learns_cartpole(tmp_path):
    """A wrong sign gives 9, no learning 20."""
    args = actor_critic.Args(total_timesteps=15_000, device="cpu", run_dir=str(tmp_path / "run"))
    assert actor_critic.train(args)["eval/episodic_return"] > 60
