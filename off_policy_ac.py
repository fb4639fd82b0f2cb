# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch==2.13.0",
#   "gymnasium[classic-control,mujoco]==1.4.0",
#   "mujoco==3.8.1",
#   "numpy==2.4.6",
#   "tyro==1.0.17",
#   "tensorboard==2.21.0",
# ]
# ///
"""Off-policy actor-critic: transitions of all earlier policies are learnt from many times, with the help of Q(s, a).

Degris, White and Sutton 2012, "Off-Policy Actor-Critic" (arXiv 1205.4839), theorem and algorithm; replay buffer and
target network as in Lillicrap et al. 2016, "Continuous Control with Deep Reinforcement Learning" (arXiv 1509.02971).

    for each step of N environments:
        1. take a ~ π(·|s), and store (s, a, r, s', terminated, log π(a|s)) in the replay buffer
        num_updates times, once learning_starts transitions are stored:
            2. draw a batch from the buffer
            3. critic: one Adam step on mean (Q(s, a) − y)²,  y = r + γ E_{a' ~ π(·|s')} Q'(s', a')
            4. actor: one Adam step on −ent_coef H plus, as actor_update says,
                 resample         −mean log π(a|s) (Q(s, a) − b), with fresh a ~ π(·|s) in place of the stored one
                 reparameterized  −mean Q(s, a), with fresh a = tanh(μ_θ(s) + σ_θ(s) ε): the gradient goes through Q
                 importance       −mean π(a|s) / β(a|s) (Q(s, a) − E_π Q(s, ·)), with the stored a; β is the policy
                                  that took it
            5. Q', the target, follows Q: φ' ← φ' + τ (φ − φ')
    every log_interval steps: log, evaluate and save

If s' terminates the task, it is worth 0; a time limit is no such end. π is always the present policy. Discrete
actions need no draws: the expectations in y, in H and in `resample` are sums over all actions. For a Box they are
means over num_samples draws (each compared, in `resample`, with the mean of the others).

The naive algorithm, with r + γ V(s') as the target of V(s) and the stored a in the actor's step, is wrong twice. The
stored r and s' belong to β's action: V becomes the value of a policy that goes on with the mixture β of all earlier
ones. And ∇ log π(a|s) A(s, a) with a ~ β is not a policy gradient: it favours what β did often, by the factor β/π. Q
puts the first right, since it is told the action and chooses a' itself; a fresh action, or the weight π/β, the
second. What remains, and is accepted: the states are those of the earlier policies, not those of π, and the part of
the gradient that goes through Q^π is left out, so this is not the exact gradient of any objective (theorem 1).

The Gaussian of the siblings, with one σ for all states, is clipped at the bounds of a Box, and beyond them Q's gradient
is 0: it could not bring the mean back. Here tanh keeps actions inside, and σ depends on s, since a bonus for entropy
must be able to leave σ where it does no harm. The buffer holds u, a = tanh(u): the slope of tanh cancels in π/β, and
atanh, which is infinite where float32 rounds tanh(u) to 1, is never needed. As the first policy is nearly uniform,
there is no separate phase of random actions.

What departs from Degris et al., and why: they learn V with gradient-TD and eligibility traces, which keeps linear
critics from diverging; a target network does that for Q here, in the lecture's way. Observations and rewards are scaled
by running statistics: where Q is near 100 for all actions, as on CartPole, and they differ by 1, a policy is
deterministic before Q can tell them apart (networks of 64 units then reach a return of 100 to 300, and 500 with
scaling). The actor's steps are smaller than Q's by default, so that Q keeps up with the policy: with 1e-3 for both, one
CartPole run in five lost its 500 again. All episodes restart after a checkpoint, which holds the buffer too, so that a
resumed run is exact.

Compare with ddpg.py: the policy has no noise of its own there, and Q leads it as in `reparameterized`.

    python off_policy_ac.py
    python off_policy_ac.py --env-id HalfCheetah-v5 --total-timesteps 300000 --num-envs 1 --learning-starts 25000 \
        --hidden-size 256 --batch-size 256 --learning-rate 1e-3 --actor-update reparameterized --num-samples 1 \
        --tau 0.005 --ent-coef 0.1 --no-anneal-lr --no-normalize-obs --no-normalize-rewards --compile
"""

import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal, NamedTuple, NoReturn
from zipfile import BadZipFile, ZipFile

import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import tyro
from gymnasium import spaces
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor, nn
from torch.nn.functional import mse_loss, softplus
from torch.utils.tensorboard import SummaryWriter


@dataclass(frozen=True)
class Args:
    """Flags of the command line; the defaults solve CartPole-v1."""

    # Experiment
    env_id: str = "CartPole-v1"  # Gymnasium environment with Box or Discrete observations and actions
    seed: int = 1  # of everything random: networks, actions, environments
    total_timesteps: int = 100_000  # environment steps over all environments, rounded up to a whole iteration
    num_envs: int = 4  # environments that are stepped together, N
    device: str = "auto"  # auto (a GPU if there is one), cpu, cuda or cuda:N
    num_threads: int = 1  # CPU threads of PyTorch; one is fastest for small networks
    compile: bool = False  # compile loss, gradient and clipping into one graph (takes half a minute first)
    run_dir: str = ""  # where the run is written (default: runs/<env-id>/<script>/seed<seed>__<date-time>)
    resume: bool = False  # go on from the checkpoint in --run-dir if there is one
    checkpoint_every: int = 100_000  # environment steps between checkpoints, after which all episodes restart; 0: off
    eval_every: int = 0  # environment steps between evaluations of the greedy policy; 0: at the end alone
    eval_episodes: int = 20  # episodes of one evaluation; 0: no evaluation

    # Algorithm
    log_interval: int = 200  # environment steps in an iteration, which ends with one point of each curve
    learning_starts: int = 1_000  # transitions in the replay buffer before the first update
    num_updates: int = 1  # updates after each step of all environments
    batch_size: int = 128  # transitions in the batch of an update
    buffer_size: int = 1_000_000  # transitions that are kept, 4 bytes a number: a million of HalfCheetah-v5 are 0.17 GB
    learning_rate: float = 3e-4  # the optimizer's step size
    q_learning_rate: float = 1e-3  # Adam's step size for Q
    anneal_lr: bool = True  # lower the learning rate linearly: full in the first iteration, 0 after the last
    gamma: float = 0.99  # discount γ
    tau: float = 0.05  # how far the target network moves towards Q in each update
    actor_update: Literal["resample", "reparameterized", "importance"] = "resample"  # fresh actions, dQ/da, or stored
    num_samples: int = 8  # fresh actions for each state where an expectation over a Box is estimated
    importance_clip: float = 0.0  # importance weights are cut to this; 0: off
    ent_coef: float = 0.03  # weight of the entropy bonus
    max_grad_norm: float = 1e3  # the gradient of all parameters together is scaled down to this norm where it is longer
    normalize_obs: bool = True  # shift and scale observations by their running mean and deviation
    normalize_rewards: bool = True  # divide rewards by the running deviation of the discounted return
    hidden_size: int = 64  # width of the two hidden layers of each network
    log_std_init: float = 0.0  # log σ at the start, in units in which the action bounds are ±1

    def __post_init__(self) -> None:
        check_flags(self)
        if self.tau > 1:
            raise ValueError(f"--tau must be at most 1, not {self.tau}")
        if self.buffer_size < self.num_envs:
            raise ValueError(f"--buffer-size {self.buffer_size} does not hold one step of all environments")


def make_envs(env_id: str, num_envs: int) -> list[gym.Env]:
    """A plain list of environments; observations come out flat (Box reshaped, Discrete one-hot)."""
    try:
        envs = [gym.make(env_id, disable_env_checker=True) for _ in range(num_envs)]
    except (gym.error.Error, ImportError) as error:
        fail(f"--env-id {env_id}: {error}")
    obs_space, action_space = envs[0].observation_space, envs[0].action_space
    if not isinstance(obs_space, spaces.Box | spaces.Discrete):
        fail(f"{env_id} has observations {obs_space}; Box and Discrete are supported, here and in the sibling scripts")
    is_box = isinstance(action_space, spaces.Box) and action_space.dtype.kind == "f"
    if not is_box and not isinstance(action_space, spaces.Discrete):
        fail(f"{env_id} has actions {action_space}; Discrete and Box of floats are supported, here and in the siblings")
    flat = isinstance(obs_space, spaces.Box) and len(obs_space.shape) == 1
    return envs if flat else [gym.wrappers.FlattenObservation(env) for env in envs]


def relu_mlp(fan_in: int, hidden_size: int, fan_out: int, gain: float) -> nn.Sequential:
    """ReLU network with two hidden layers and PyTorch's initial weights, those of the last layer times `gain`."""
    layers = [WideLinear(fan_in, hidden_size), WideLinear(hidden_size, hidden_size), nn.Linear(hidden_size, fan_out)]
    nn.init.zeros_(layers[2].bias)
    layers[2].weight.data.mul_(gain)
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])


class SoftmaxActor(nn.Module):
    """Softmax policy over discrete actions: π(a|s) = exp z_a(s) / Σ_b exp z_b(s)."""

    def __init__(self, obs_dim: int, num_actions: int, hidden_size: int) -> None:
        super().__init__()
        self.num_actions = num_actions
        self.net = relu_mlp(obs_dim, hidden_size, num_actions, 0.1)

    def noise(self, *shape: int) -> Tensor:
        """Gumbel noise −log E with E ~ Exp(1), (*shape, A): argmax_a (z_a + noise_a) is a draw from π."""
        return -torch.empty(*shape, self.num_actions).exponential_().log()

    @staticmethod
    def choose(logits: np.ndarray, noise: np.ndarray | float) -> np.ndarray:
        """Actions (B,) from logits (B, A); noise 0 gives the most likely ones."""
        return (logits + noise).argmax(-1)

    @staticmethod
    def squash(actions: np.ndarray) -> np.ndarray:
        """Discrete actions are in the environment's units already."""
        return actions

    def logprobs(self, out: Tensor, actions: Tensor) -> Tensor:
        """log π(a|s), (B,), from logits (B, A) and actions (B,)."""
        return out.log_softmax(-1).gather(-1, actions.long().unsqueeze(-1)).squeeze(-1)


class SquashedGaussianActor(nn.Module):
    """a = tanh(u) with u ~ N(μ(s), diag σ(s)²), σ limited to [e⁻²⁰, e²]; the buffer holds u, the environment gets a."""

    def __init__(self, obs_dim: int, action_dim: int, hidden_size: int, log_std_init: float) -> None:
        super().__init__()
        self.action_dim = action_dim
        self.net = relu_mlp(obs_dim, hidden_size, 2 * action_dim, 0.1)
        self.net[4].bias.data[action_dim:] = log_std_init

    def noise(self, *shape: int) -> Tensor:
        """ε ~ N(0, 1), (*shape, action_dim): μ + σ ε is a draw of u."""
        return torch.randn(*shape, self.action_dim)

    @staticmethod
    def choose(out: np.ndarray, noise: np.ndarray | float) -> np.ndarray:
        """u (B, action_dim) from μ and log σ side by side; noise 0 gives the most likely ones."""
        mean, log_std = np.split(out, 2, -1)
        return mean + np.exp(np.clip(log_std, -20.0, 2.0)) * noise

    @staticmethod
    def squash(actions: np.ndarray) -> np.ndarray:
        """a = tanh(u)."""
        return np.tanh(actions)

    @staticmethod
    def sample(out: Tensor, noise: Tensor) -> Tensor:
        """u = μ + σ ε, differentiable in μ and σ."""
        mean, log_std = out.chunk(2, -1)
        return mean + log_std.clamp(-20.0, 2.0).exp() * noise

    @staticmethod
    def logprobs(out: Tensor, u: Tensor) -> Tensor:
        """log N(u; μ, σ²) = −½ Σ_d z_d² − Σ_d log(σ_d √(2π)) with z = (u − μ) / σ; (..., action_dim) to (...)."""
        mean, log_std = out.chunk(2, -1)
        log_std = log_std.clamp(-20.0, 2.0)
        z = (u - mean) * (-log_std).exp()
        return -0.5 * (z.square() + math.log(2 * math.pi)).sum(-1) - log_std.sum(-1)


def log_slope(u: Tensor) -> Tensor:
    """log Π_d tanh'(u_d) = Σ_d 2 (log 2 − u_d − log(1 + e^(−2 u_d))): log π(a|s) = log N(u) − this, for a = tanh(u)."""
    return 2 * (math.log(2) - u - softplus(-2 * u)).sum(-1)


class QCritic(nn.Module):
    """Action value Q(s, a) of continuous actions: (..., obs_dim) and (..., action_dim) to (...)."""

    def __init__(self, obs_dim: int, action_dim: int, hidden_size: int) -> None:
        super().__init__()
        self.net = relu_mlp(obs_dim + action_dim, hidden_size, 1, 1.0)

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        return self.net(torch.cat((obs, actions), -1)).squeeze(-1)


class DiscreteQCritic(nn.Module):
    """Action values Q(s, ·) of all discrete actions: (..., obs_dim) to (..., A)."""

    def __init__(self, obs_dim: int, num_actions: int, hidden_size: int) -> None:
        super().__init__()
        self.net = relu_mlp(obs_dim, hidden_size, num_actions, 1.0)

    def forward(self, obs: Tensor) -> Tensor:
        return self.net(obs)


class RunningNorm(nn.Module):
    """(x − mean) / √(variance + 1e-8), clipped to ±10, with the moments of all rows so far; before any of them, x."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1, dtype=torch.float64))  # of (), a graph forgets what it wrote
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("var", torch.ones(shape, dtype=torch.float64))
        self.register_buffer("scale", torch.ones(shape))
        self.register_buffer("shift", torch.zeros(shape))
        self.register_buffer("limit", torch.full(shape, torch.finfo(torch.float32).max))  # inf is no good number

    def update(self, x: Tensor) -> None:
        """Adds the rows of x (..., *shape) to the moments (Chan et al. 1979, eq. 2.1)."""
        x = x.to(self.mean.dtype).reshape(-1, *self.mean.shape)
        var, mean = torch.var_mean(x, 0, correction=0)
        self.count.add_(len(x))
        weight, delta = len(x) / self.count, mean - self.mean
        self.var.lerp_(var + (1 - weight) * delta**2, weight)
        self.mean.lerp_(mean, weight)
        self.scale.copy_((self.var + 1e-8).rsqrt())
        self.shift.copy_(-self.mean * self.scale)
        self.limit.fill_(10.0)

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.shift, x, self.scale).clamp(-self.limit, self.limit)


def frozen(obs_norm: RunningNorm, net: nn.Sequential) -> Callable[[np.ndarray], np.ndarray]:
    """The output of a network as it is now, in NumPy: from raw observations (N, obs_dim) to (N, ...).

    For the few rows of an environment step this is several times faster than PyTorch, and a GPU is asked but once.
    """
    tensors = [obs_norm.scale, obs_norm.shift, obs_norm.limit, *net.parameters()]
    flat, end, parts = torch.cat([x.detach().flatten() for x in tensors]).cpu().numpy(), 0, []
    for x in tensors:
        start, end = end, end + x.numel()
        parts.append(flat[start:end].reshape(x.shape))
    scale, shift, limit, w1, b1, w2, b2, w3, b3 = parts

    def forward(obs: np.ndarray) -> np.ndarray:
        x = np.minimum(np.maximum(obs * scale + shift, -limit), limit)
        return np.maximum(np.maximum(x @ w1.T + b1, 0) @ w2.T + b2, 0) @ w3.T + b3

    return forward


class OffPolicyAgent(nn.Module):
    """The policy, the critic with its target, and the statistics that normalise what they see."""

    def __init__(self, env: gym.Env, hidden_size: int, log_std_init: float) -> None:
        super().__init__()
        obs_dim, space = env.observation_space.shape[0], env.action_space
        self.obs_norm, self.discrete = RunningNorm(obs_dim), isinstance(space, spaces.Discrete)
        if self.discrete:
            self.actor = SoftmaxActor(obs_dim, int(space.n), hidden_size)
            self.critic = DiscreteQCritic(obs_dim, int(space.n), hidden_size)
        else:
            self.actor = SquashedGaussianActor(obs_dim, math.prod(space.shape), hidden_size, log_std_init)
            self.critic = QCritic(obs_dim, math.prod(space.shape), hidden_size)
        self.target_critic = deepcopy(self.critic)

    def policy(self) -> Callable[[np.ndarray, np.ndarray | float], np.ndarray]:
        """act(obs, noise): the current policy, frozen, from raw observations (N, obs_dim) to actions in units of ±1."""
        forward = frozen(self.obs_norm, self.actor.net)
        return lambda obs, noise: self.actor.squash(self.actor.choose(forward(obs), noise))


def q_targets(rewards: Tensor, terminated: Tensor, next_values: Tensor, gamma: float) -> Tensor:
    """y = r + γ (1 − terminated) V(s'), all (B,); a time limit is not the end of the task."""
    assert rewards.shape == terminated.shape == next_values.shape
    return rewards + gamma * (1 - terminated) * next_values


def polyak(target: Tensor, online: Tensor, tau: float) -> None:
    """φ' ← φ' + τ (φ − φ'), in place."""
    target.lerp_(online, tau)


def exact_loss(logprobs: Tensor, q_values: Tensor) -> Tensor:
    """−mean Σ_a π(a|s) Q(s, a), (B, A): its gradient is the expectation of that of `score_loss`."""
    assert logprobs.shape == q_values.shape
    return -(logprobs.exp() * q_values.detach()).sum(-1).mean()


def score_loss(logprobs: Tensor, q_values: Tensor) -> Tensor:
    """−mean log π(a_k|s) (Q(s, a_k) − b_k), (K, B), a_k ~ π(·|s); b_k is the mean Q of the other draws for this s.

    As b_k does not depend on a_k, the gradient stays unbiased. A single draw has no baseline.
    """
    assert logprobs.shape == q_values.shape
    others = len(q_values) - 1
    baselines = (q_values.sum(0) - q_values) / others if others else torch.zeros_like(q_values)
    return -(logprobs * (q_values - baselines).detach()).mean()


def importance_loss(logratio: Tensor, advantages: Tensor, importance_clip: float) -> Tensor:
    """−mean ρ A, ρ = π(a|s) / β(a|s) = exp(logratio), (B,): minus its gradient is mean ρ ∇ log π(a|s) A.

    With a ~ β and s from β's states that estimates the gradient of Degris et al. A weight above the clip is lowered to
    it by a constant factor, so it still has a gradient (unlike that of ppo.py, which stops there).
    """
    assert logratio.shape == advantages.shape
    if importance_clip:
        logratio = logratio - (logratio.detach() - math.log(importance_clip)).clamp(min=0)
    return -(logratio.exp() * advantages.detach()).mean()


def expected_values(agent: OffPolicyAgent, critic: nn.Module, obs: Tensor, noise: Tensor) -> Tensor:
    """V(s) = E_{a ~ π(·|s)} Q(s, a), (B,): exact for discrete actions, else the mean over draws, noise (K, B, dim)."""
    out = agent.actor.net(obs)
    if agent.discrete:
        return (out.softmax(-1) * critic(obs)).sum(-1)
    actions = agent.actor.sample(out, noise).tanh()
    return critic(obs.expand(len(noise), *obs.shape), actions).mean(0)


def q_loss(
    agent: OffPolicyAgent, obs: Tensor, actions: Tensor, rewards: Tensor, next_obs: Tensor, terminated: Tensor,
    noise: Tensor, *, gamma: float,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """mean (Q(s, a) − y)² over a batch of raw transitions, and what to log of it."""
    with torch.no_grad():
        next_values = expected_values(agent, agent.target_critic, agent.obs_norm(next_obs), noise)
        targets = q_targets(rewards, terminated, next_values, gamma)
    obs = agent.obs_norm(obs)
    if agent.discrete:
        q_values = agent.critic(obs).gather(-1, actions.long().unsqueeze(-1)).squeeze(-1)
    else:
        q_values = agent.critic(obs, actions.tanh())
    assert q_values.shape == targets.shape
    loss = mse_loss(q_values, targets)
    return loss, {"q_loss": loss, "q_values": q_values.mean()}


def policy_loss(
    agent: OffPolicyAgent, obs: Tensor, actions: Tensor, behaviour_logprobs: Tensor, noise: Tensor, *,
    actor_update: str, importance_clip: float, ent_coef: float,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """The policy loss of the chosen kind − ent_coef H, and what to log of it."""
    obs = agent.obs_norm(obs)
    out = agent.actor.net(obs)
    if agent.discrete:
        logprobs, q_values = out.log_softmax(-1), agent.critic(obs)
        entropy = -(logprobs.exp() * logprobs).sum(-1).mean()
        taken, values = actions.long().unsqueeze(-1), (logprobs.exp() * q_values).sum(-1)
        q_taken = q_values.gather(-1, taken).squeeze(-1)
    else:
        u = agent.actor.sample(out, noise)
        entropy = (log_slope(u) - agent.actor.logprobs(out, u)).mean()
    if actor_update == "reparameterized":
        loss = -agent.critic(obs.expand(len(u), *obs.shape), u.tanh()).mean()
    elif actor_update == "importance":
        if not agent.discrete:
            with torch.no_grad():
                q_taken = agent.critic(obs, actions.tanh())
                values = agent.critic(obs.expand(len(u), *obs.shape), u.tanh()).mean(0)
        logratio = agent.actor.logprobs(out, actions) - behaviour_logprobs
        loss = importance_loss(logratio, q_taken - values, importance_clip)
    elif agent.discrete:
        loss = exact_loss(logprobs, q_values)
    else:
        u = u.detach()
        with torch.no_grad():
            q_values = agent.critic(obs.expand(len(u), *obs.shape), u.tanh())
        loss = score_loss(agent.actor.logprobs(out, u), q_values)
    return loss - ent_coef * entropy, {"policy_loss": loss, "entropy": entropy}


class ReplayBuffer:
    """The last `capacity` transitions, one a row of a single tensor: a batch is then a single gather.

    `widths` are those of the columns; 0 stands for a number. The checkpoint holds the rows that were filled.
    """

    def __init__(self, capacity: int, widths: Sequence[int], device: torch.device) -> None:
        self.widths, self.sizes, self.count = widths, [max(width, 1) for width in widths], 0
        try:
            self.rows = torch.empty(capacity, sum(self.sizes), device=device)
        except RuntimeError:
            size = 4 * capacity * sum(self.sizes) / 1e9
            fail(f"--buffer-size {capacity} needs {size:,.1f} GB of memory, which cannot be had on {device}")

    def add(self, *columns: Tensor) -> None:
        """Appends N transitions, columns (N, width) or (N,); the oldest ones make room."""
        rows = torch.cat([x.float().reshape(len(x), -1) for x in columns], -1)
        where = (self.count + torch.arange(len(rows))) % len(self.rows)
        self.rows[where.to(self.rows.device)] = rows.to(self.rows.device)
        self.count += len(rows)

    def __len__(self) -> int:
        return min(self.count, len(self.rows))

    def sample(self, batch_size: int) -> list[Tensor]:
        """A batch of columns, drawn uniformly, with replacement."""
        index = torch.randint(len(self), (batch_size,)).to(self.rows.device)
        columns = self.rows.index_select(0, index).split(self.sizes, -1)
        return [x if width else x.squeeze(-1) for x, width in zip(columns, self.widths, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "rows": self.rows[: len(self)].clone()}  # of a view, all would be saved

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]
        self.rows[: len(self)].copy_(state["rows"])


class Step(NamedTuple):
    """What one step of N environments has led to."""

    next_obs: Tensor  # s' (N, obs_dim), the true successor, also where an episode ended
    rewards: Tensor  # r (N,)
    terminated: Tensor  # (N,), s' ends the task: its value is 0
    dones: Tensor  # (N,), terminated or truncated
    discounted_returns: Tensor  # r_t + γ r_{t-1} + γ² r_{t-2} + ... back to the start of the episode (N,)


class Stepper:
    """Steps N environments, and carries the unfinished episodes."""

    def __init__(self, envs: list[gym.Env], gamma: float) -> None:
        self.envs, self.gamma = envs, gamma
        self.to_env = action_map(envs[0].action_space)

    def reset(self, seed: int, iteration: int) -> None:
        """Drops the unfinished episodes and starts all environments from seeds made of (seed, iteration, index)."""
        resets = [env.reset(seed=env_seed(seed, 0, iteration, i)) for i, env in enumerate(self.envs)]
        self.obs = np.array([obs for obs, _ in resets], np.float32)
        self.episodes = [(0.0, 0, 0.0) for _ in self.envs]  # return, length and discounted return so far

    def step(self, actions: np.ndarray) -> tuple[Step, list[tuple[int, float, int]]]:
        """Takes actions in units of ±1; adds (steps, return, length) of each episode that ended."""
        next_obs, ended = np.empty_like(self.obs), []
        rewards, discounted_returns = np.empty((2, len(self.envs)), np.float32)
        terminated, dones = np.empty((2, len(self.envs)), bool)
        for i, (env, action) in enumerate(zip(self.envs, self.to_env(actions), strict=True)):
            next_obs[i], reward, terminated[i], truncated, _ = env.step(action)
            episodic_return, length, discounted = self.episodes[i]
            self.episodes[i] = (episodic_return + reward, length + 1, reward + self.gamma * discounted)
            rewards[i], discounted_returns[i] = reward, self.episodes[i][2]
            dones[i] = terminated[i] or truncated
        self.obs = next_obs.copy()
        for i in np.flatnonzero(dones):
            ended.append((int(i) + 1, *self.episodes[i][:2]))
            self.obs[i], _ = self.envs[i].reset()
            self.episodes[i] = (0.0, 0, 0.0)
        arrays = (next_obs, rewards, terminated, dones, discounted_returns)
        return Step(*(torch.from_numpy(array) for array in arrays)), ended


def train(args: Args) -> dict[str, float]:
    """Runs off-policy actor-critic; gives the last value of each metric, the final evaluation among them."""
    device = set_up(args.device, args.num_threads, args.seed)
    envs = make_envs(args.env_id, args.num_envs)
    space = envs[0].action_space
    if not isinstance(space, spaces.Box) and args.actor_update == "reparameterized":
        fail(f"--actor-update reparameterized needs Box actions, but {args.env_id} has {space}")
    if isinstance(space, spaces.Box) and not np.isfinite([space.low, space.high]).all():
        fail(f"{args.env_id} has actions {space}; tanh needs finite bounds, the on-policy siblings do not")
    agent = OffPolicyAgent(envs[0], args.hidden_size, args.log_std_init).to(device)
    obs_dim, action_dim = len(agent.obs_norm.mean), 0 if agent.discrete else agent.actor.action_dim
    buffer = ReplayBuffer(args.buffer_size, (obs_dim, action_dim, 0, obs_dim, 0, 0), device)
    return_norm, stepper = RunningNorm(1).to(device), Stepper(envs, args.gamma)
    parts = {"agent": agent, "return_norm": return_norm, "buffer": buffer}

    def updater(name: str, loss: Callable, net: nn.Module, learning_rate: float) -> tuple[Callable, Tensor]:
        params = list(net.parameters())
        flat = flatten(params)
        parts[name] = torch.optim.Adam([flat], lr=learning_rate, fused=True)
        return make_update(partial(loss, agent), params, parts[name], args.max_grad_norm, args.compile), flat.data

    loss = partial(q_loss, gamma=args.gamma)
    update_critic, critic = updater("q_optimizer", loss, agent.critic, args.q_learning_rate)
    loss = partial(
        policy_loss, actor_update=args.actor_update, importance_clip=args.importance_clip, ent_coef=args.ent_coef
    )
    update_actor, _ = updater("optimizer", loss, agent.actor, args.learning_rate)
    target_critic = flatten(list(agent.target_critic.parameters())).data
    with Run(args, **parts) as run:
        while run.step < args.total_timesteps:
            remaining = 1 - args.anneal_lr * run.step / args.total_timesteps
            parts["optimizer"].param_groups[0]["lr"] = args.learning_rate * remaining
            parts["q_optimizer"].param_groups[0]["lr"] = args.q_learning_rate * remaining
            if run.fresh_start:
                stepper.reset(args.seed, run.iteration)

            metrics, ended = [], []
            for step in range(0, args.log_interval, args.num_envs):
                # 1. act and store
                obs, noise = stepper.obs, agent.actor.noise(args.num_envs)
                out = frozen(agent.obs_norm, agent.actor.net)(obs)
                actions = agent.actor.choose(out, noise.numpy())
                if not math.isfinite(out.sum() + actions.sum()):  # MuJoCo would not survive it
                    found = {"obs": obs} | (metrics[-1] if metrics else {}) | {"actions": actions, "policy": out}
                    check_finite(run.step + step, found)
                new, episodes = stepper.step(agent.actor.squash(actions))
                check_finite(run.step + step, {"rewards": new.rewards, "next_obs": new.next_obs})
                obs, out, actions = (torch.from_numpy(x) for x in (obs, out, actions))
                logprobs = agent.actor.logprobs(out, actions)
                buffer.add(obs, actions, new.rewards, new.next_obs, new.terminated, logprobs)
                ended += [(step + offset, *episode) for offset, *episode in episodes]
                if args.normalize_obs:
                    agent.obs_norm.update(obs.to(device))
                if args.normalize_rewards:
                    return_norm.update(new.discounted_returns.to(device))

                for _ in range(args.num_updates if buffer.count >= args.learning_starts else 0):
                    # 2. draw a batch
                    obs, actions, rewards, next_obs, terminated, logprobs = buffer.sample(args.batch_size)
                    rewards = rewards * return_norm.scale
                    noise, next_noise = torch.randn(2, args.num_samples, args.batch_size, action_dim).to(device)

                    # 3. the critic's step
                    fit = update_critic(obs, actions, rewards, next_obs, terminated, next_noise)

                    # 4. the actor's step, in which nobody asks for the critic's gradient
                    agent.critic.requires_grad_(False)
                    metrics.append(fit | update_actor(obs, actions, logprobs, noise))
                    agent.critic.requires_grad_(True)

                    # 5. the target follows
                    polyak(target_critic, critic, args.tau)

            # log, evaluate, save
            more = {"charts/learning_rate": args.learning_rate * remaining}
            run.end_iteration(step + args.num_envs, ended, (mean_metrics(metrics) if metrics else {}) | more)
        return run.finish()


# ---------------------------------------------------------------------------------------------------------------------
# Speed: wide layers by oneDNN, which took half the time of MKL on an AMD EPYC. Without it, only rounding differs.
# ---------------------------------------------------------------------------------------------------------------------
ONEDNN = torch.backends.mkldnn.is_available()
if ONEDNN and not hasattr(torch.ops.onednn_float32, "linear"):  # torch.compile refuses `original` if weights change
    original = torch.ops.mkldnn._linear_pointwise.default
    torch.library.define("onednn_float32::linear", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
    torch.library.impl("onednn_float32::linear", "cpu")(lambda x, w, b: original(x, w, b, "none", [], ""))
    torch.library.register_fake("onednn_float32::linear")(nn.functional.linear)  # the shape alone


class OneDNNProduct(torch.autograd.Function):
    """y = x Wᵀ + b, (B, I) to (B, O). With g = dL/dy, its gradients are g W for x, gᵀ x for W, and Σ_B g for b."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.ops.onednn_float32.linear.default(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), needed = ctx.saved_tensors, ctx.needs_input_grad
        grad_x = torch.ops.onednn_float32.linear.default(grad, weight.T, None) if needed[0] else None
        grad_weight = torch.ops.onednn_float32.linear.default(grad.T.contiguous(), x.T, None) if needed[1] else None
        return grad_x, grad_weight, grad.sum(0) if needed[2] else None


class WideLinear(nn.Linear):
    """nn.Linear, but with 256 outputs or more, in float32 on a CPU, by oneDNN."""

    def forward(self, x: Tensor) -> Tensor:
        if not (ONEDNN and x.is_cpu and x.dtype == torch.float32 and self.out_features >= 256):
            return super().forward(x)
        return OneDNNProduct.apply(x.flatten(0, -2), self.weight, self.bias).unflatten(0, x.shape[:-1])


# ---------------------------------------------------------------------------------------------------------------------
# Plumbing, the same text in every script: flags, devices, seeds, evaluation, gradient steps, the run and its checkpoint
# ---------------------------------------------------------------------------------------------------------------------
SCRIPT = Path(__file__).stem
FREE_FLAGS = {"device", "num_threads", "run_dir", "resume"}  # a resumed run may have other ones


def fail(message: str, status: int = 2) -> NoReturn:
    """Exits with one sentence on stderr; status 2 is for bad input, 1 for a run that went wrong."""
    print(f"{SCRIPT}: {message}", file=sys.stderr)
    raise SystemExit(status)


def check_flags(args: Any) -> None:
    """Raises ValueError, in one sentence, for the first number that is out of its flag's range."""
    for name, value in vars(args).items():
        if isinstance(value, bool | str):
            continue
        zero = isinstance(value, float) or name in ("seed", "eval_episodes") or name.endswith("_every")
        low = -100 if name == "log_std_init" else 0 if zero else 1
        high = 1 if name in ("gamma", "gae_lambda") else 2**31 - 1 if name == "num_threads" else 2**63 - 1
        if not low <= value <= high:
            limit = f"at most {high}" if value > high else f"at least {low}"
            raise ValueError(f"--{name.replace('_', '-')} must be {limit}, not {value}")


def set_up(device: str, num_threads: int, seed: int) -> torch.device:
    """Sets PyTorch's threads and the CPU generator from which all noise is drawn; returns the device."""
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if not re.fullmatch(r"cpu|cuda|cuda:(0|[1-9]\d*)", chosen):
        fail(f"--device must be auto, cpu, cuda or cuda:N, not {device}")
    if chosen != "cpu" and int(chosen[5:] or 0) >= torch.cuda.device_count():
        fail(f"--device {device} is not there: PyTorch sees {torch.cuda.device_count()} CUDA devices")
    torch.set_num_threads(num_threads)
    torch.manual_seed(seed)
    return torch.device(chosen)


def env_seed(seed: int, *stream: int) -> int:
    """The seed of a stream: (0, iteration, index) for training, (1, episode) for evaluation; 32 well-mixed bits."""
    return int(np.random.SeedSequence(seed, spawn_key=stream).generate_state(1)[0])


def action_units(space: gym.Space) -> tuple[np.ndarray, np.ndarray]:
    """(scale, shift) such that the environment's action is scale x the policy's + shift.

    Discrete: 0 is the first action. Box: [-1, 1] is stretched to the bounds where both are finite.
    """
    if isinstance(space, spaces.Discrete):
        return np.int64(1), space.start
    finite = np.isfinite(space.low) & np.isfinite(space.high)
    low, high = np.where(finite, space.low, -1), np.where(finite, space.high, 1)
    return (high - low) / 2, (high + low) / 2


def action_map(space: gym.Space) -> Callable[[np.ndarray], Sequence]:
    """From the policy's actions, (N,) or (N, action_dim), to the environment's, clipped to the bounds of a Box."""
    scale, shift = action_units(space)
    if isinstance(space, spaces.Discrete):
        return lambda actions: (actions + shift).tolist()  # environments check a plain int much faster
    low, high, shape = space.low, space.high, (-1, *space.shape)
    return lambda actions: np.minimum(np.maximum(actions.reshape(shape) * scale + shift, low), high)


def evaluate(agent: Any, env: gym.Env, seed: int, episodes: int) -> tuple[float, float]:
    """Mean return (undiscounted, as the environment pays it) and length of the greedy policy over whole episodes.

    The episodes are the same ones at every call. Nothing that training reads is written, and no noise is drawn.
    """
    act, to_env, total, length = agent.policy(), action_map(env.action_space), 0.0, 0
    for episode in range(episodes):
        (obs, _), done = env.reset(seed=env_seed(seed, 1, episode)), False
        while not done:
            obs, reward, terminated, truncated, _ = env.step(to_env(act(np.float32(obs)[None], 0.0))[0])
            total, length, done = total + float(reward), length + 1, terminated or truncated
    return total / episodes, length / episodes


def flatten(params: list[nn.Parameter]) -> nn.Parameter:
    """One vector of all parameters, which become views of it: what is done to the vector is done to them."""
    flat = nn.Parameter(nn.utils.parameters_to_vector(params).detach())
    nn.utils.vector_to_parameters(flat.data, params)
    return flat


def average(x: Tensor) -> Tensor:
    """The mean of x over the processes of torchrun; x itself where there is but one."""
    if dist.is_initialized():
        dist.all_reduce(x)
        x = x / dist.get_world_size()
    return x


def agree(signum: int, ended: list) -> tuple[int, list]:
    """A signal that came to any of the processes of torchrun, and the episodes that ended in all of them, in order."""
    everything = [(signum, ended)]
    if dist.is_initialized():
        everything *= dist.get_world_size()
        dist.all_gather_object(everything, (signum, ended))
    signums, lists = zip(*everything, strict=True)
    return max(signums), sorted(episode for each in lists for episode in each)


def make_update(
    loss: Callable, params: list[nn.Parameter], optimizer: torch.optim.Optimizer, max_grad_norm: float, compile: bool
) -> Callable:
    """Returns update(*batch): one step of the optimizer, which holds flatten(params), along the clipped gradient.

    `loss(*batch)` is a scalar and a dict of metrics. These come back with the gradient's norm, still on the device.
    """
    (flat,) = optimizer.param_groups[0]["params"]

    def gradient(*batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        value, metrics = loss(*batch)
        grad = average(torch.cat([grad.flatten() for grad in torch.autograd.grad(value, params)]))
        grad_norm = grad.norm()
        metrics = {f"losses/{name}": metric.detach() for name, metric in metrics.items()}
        return grad * (max_grad_norm / (grad_norm + 1e-6)).clamp(max=1.0), metrics | {"losses/grad_norm": grad_norm}

    best, graphs = gradient, compile and flat.is_cuda
    if compile:
        torch._dynamo.config.trace_autograd_ops = True  # else autograd.grad would cut the graph in two
        best = torch.compile(gradient, options={"size_asserts": False, "triton.cudagraphs": graphs})

    def update(*batch: Tensor) -> dict[str, Tensor]:
        nonlocal best
        try:
            flat.grad, metrics = best(*batch)
        except torch._dynamo.exc.TorchDynamoException as error:
            print(f"--compile does not work here, going on without: {str(error).splitlines()[0]}", file=sys.stderr)
            flat.grad, metrics = (best := gradient)(*batch)
        optimizer.step()
        return {name: metric.clone() for name, metric in metrics.items()} if graphs else metrics  # else overwritten

    return update


def mean_metrics(metrics: list[dict[str, Tensor]]) -> dict[str, float]:
    """The mean of each metric over the updates (and processes), copied from the device in one go."""
    means = average(torch.stack([torch.stack([update[name] for update in metrics]).mean() for name in metrics[0]]))
    return dict(zip(metrics[0], means.tolist(), strict=True))


def check_finite(step: int, values: dict) -> None:
    """Ends the run at the first number that is not finite, before it can reach a checkpoint; `step` tells where."""
    for name, value in values.items():
        if isinstance(value, dict):
            check_finite(step, {f"{name} {key}": x for key, x in value.items()})
        elif isinstance(value, Tensor | np.ndarray | float) and not torch.as_tensor(value).isfinite().all():
            fail(f"{name} is not finite after step {step:,}; the last checkpoint stays as it was", status=1)


class Run:
    """A run directory (TensorBoard events and checkpoint.pt), the progress line and the signals.

    `parts` is everything with a state_dict; a checkpoint holds it, the flags, the counters and the generator's state.
    After a periodic checkpoint `fresh_start` asks for new episodes, in the run that goes on as in one that resumes: so
    no environment needs saving, and the two agree bit for bit.
    """

    def __init__(self, args: Any, **parts: Any) -> None:
        self.args, self.parts, self.eval_env = args, parts, make_envs(args.env_id, 1)[0]
        self.step = self.iteration = self.signal = 0
        self.fresh_start, self.metrics, self.last_return = True, {}, math.nan
        name = f"seed{args.seed}__{time.strftime('%Y-%m-%d_%H-%M-%S')}"
        self.dir = Path(args.run_dir or Path("runs", args.env_id, SCRIPT, name))
        self.path = self.dir / "checkpoint.pt"
        if args.resume and not args.run_dir:
            fail("--resume needs --run-dir, the run to continue")
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            used = any(self.dir.iterdir())
        except OSError as error:
            fail(f"--run-dir {self.dir} cannot be used ({error.strerror})")
        if used and not args.resume:
            fail(f"{self.dir} is not empty: add --resume to continue the run in it, or name another --run-dir")
        if self.path.exists():
            self.load()

    def load(self) -> None:
        """Takes everything from the checkpoint, or refuses it."""
        try:
            with ZipFile(self.path) as file:
                if file.testzip():
                    raise BadZipFile  # PyTorch does not look at the checksums
            saved = dict(torch.load(self.path, map_location="cpu", weights_only=True))
            now, then = asdict(self.args) | {"script": SCRIPT}, saved["args"] | {"script": saved["script"]}
            names = [name for name in now | then if name not in FREE_FLAGS]  # one that only one of them has differs
            changed = [name for name in names if now.get(name) != then.get(name)]
            if changed:
                differences = ", ".join(f"{name} (was {then.get(name)}, is {now.get(name)})" for name in changed)
                fail(f"{self.path} can only be continued with its own flags; these differ: {differences}")
            for name, part in self.parts.items():
                part.load_state_dict(saved[name])
            self.step, self.iteration = saved["step"], saved["iteration"]
            torch.set_rng_state(saved["rng"])
        except (OSError, BadZipFile, UnpicklingError, RuntimeError, LookupError, TypeError, ValueError):
            fail(f"{self.path} is damaged, or not a checkpoint of this project")

    def save(self) -> None:
        """Writes the checkpoint beside the old one, then renames it: a kill at any moment leaves one that is whole."""
        state = {name: part.state_dict() for name, part in self.parts.items()}
        check_finite(self.step, state)
        state |= {"script": SCRIPT, "args": asdict(self.args), "step": self.step, "iteration": self.iteration}
        state |= {"rng": torch.get_rng_state(), "versions": {m.__name__: str(m.__version__) for m in (torch, gym, np)}}
        self.writer.flush()  # after a resume no event up to this step may be missing
        temporary = self.path.with_suffix(".tmp")
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path)

    def __enter__(self) -> "Run":
        self.writer = SummaryWriter(str(self.dir), purge_step=self.step + 1)  # drops what came after the checkpoint
        flags = asdict(self.args).items()
        self.writer.add_text("flags", "\n".join(f"    --{name.replace('_', '-')} {value}" for name, value in flags))
        self.handlers = {s: signal.signal(s, self.on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        self.clock, self.first_step, self.compiling = time.perf_counter(), self.step, self.args.compile
        self.shown = -math.inf
        print(f"{SCRIPT} on {self.args.env_id}, from step {self.step:,}, in {self.dir}", flush=True)
        return self

    def __exit__(self, *_: Any) -> None:
        self.writer.close()
        for signum, handler in self.handlers.items():
            signal.signal(signum, handler)

    def on_signal(self, signum: int, _: Any) -> None:
        """Notes the first signal, which is acted on at the end of the iteration; a second one kills the process."""
        self.signal = signum
        for each in self.handlers:
            signal.signal(each, signal.SIG_DFL)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Adds a point to each curve, all in one event; the x axis is the number of environment steps."""
        self.metrics |= metrics
        points = [Summary.Value(tag=tag, simple_value=value) for tag, value in metrics.items()]
        self.writer.file_writer.add_summary(Summary(value=points), step)

    def end_iteration(self, steps: int, ended: list[tuple[int, float, int]], metrics: dict[str, float]) -> None:
        """Counts the steps and logs; evaluates and saves when it is time; exits if a signal came."""
        check_finite(self.step, metrics)
        stop, ended = agree(self.signal, ended)  # read once: no exit without a checkpoint
        for offset, episodic_return, length in ended:
            self.last_return = episodic_return
            point = {"charts/episodic_return": episodic_return, "charts/episodic_length": length}
            self.log(self.step + offset, point)
        before, self.step, self.iteration = self.step, self.step + steps, self.iteration + 1
        now = time.perf_counter()
        self.speed = (self.step - self.first_step) / (now - self.clock)
        self.log(self.step, metrics | {"charts/SPS": self.speed})
        if self.compiling:  # what comes before the second update does not count, unless it is all there is
            if "losses/grad_norm" in metrics:
                print(f"the first update compiled: {now - self.clock:.1f} s", flush=True)
                self.compiling = False
            self.clock, self.first_step = now, self.step
        self.show_progress()
        finished, every = self.step >= self.args.total_timesteps, self.args.eval_every
        if finished or (every and self.step // every > before // every):
            self.log(self.step, self.evaluate())
        every = self.args.checkpoint_every
        self.fresh_start = bool(every) and self.step // every > before // every
        if self.fresh_start or finished or stop:
            self.save()
        if stop:
            fail(f"stopped at step {self.step:,}; add --run-dir {self.dir} --resume to continue", 128 + stop)
        self.clock += time.perf_counter() - now  # nor do evaluations and checkpoints

    def show_progress(self) -> None:
        """Refreshes a line on a terminal; elsewhere prints one at every tenth of the run."""
        done = min(1.0, self.step / self.args.total_timesteps)
        terminal = sys.stdout.isatty()
        now, pause = (time.perf_counter(), 0.2) if terminal else (math.floor(10 * done), 1)
        if now >= self.shown + pause or done == 1:
            self.shown, left = now, max(0, self.args.total_timesteps - self.step) / self.speed
            line = f"{done:4.0%}  step {self.step:,}  {self.speed:,.0f} steps/s  {left:,.0f} s left"
            line += f"  return {self.last_return:.1f}"
            print(f"{line}\x1b[K" if terminal else line, end="\r" if terminal and done < 1 else "\n", flush=True)

    def evaluate(self) -> dict[str, float]:
        """The greedy policy's return and length."""
        if not self.args.eval_episodes:
            return {}
        result = evaluate(self.parts["agent"], self.eval_env, self.args.seed, self.args.eval_episodes)
        return dict(zip(("eval/episodic_return", "eval/episodic_length"), result, strict=True))

    def finish(self) -> dict[str, float]:
        """Prints how good the policy has become; returns the last value of each metric."""
        self.metrics = self.metrics or self.evaluate()  # empty if a finished run was resumed
        if self.args.eval_episodes:
            value, threshold = self.metrics["eval/episodic_return"], self.eval_env.spec.reward_threshold
            line = f"evaluated return {value:.1f} over {self.args.eval_episodes} episodes"
            if threshold is not None:
                line += f", {'solved' if value >= threshold else 'not solved'} (needs {threshold:g})"
            print(line)
        print(f"tensorboard --logdir {self.args.run_dir or 'runs'}")
        return self.metrics


# ---------------------------------------------------------------------------------------------------------------------


if __name__ == "__main__":
    train(tyro.cli(Args, description=__doc__))
