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
"""Actor-critic: a learned V(s) takes the place of the rewards that are still to come, so no episode has to end first.

Sutton et al. 1999, "Policy Gradient Methods for Reinforcement Learning with Function Approximation" (theorem 1 is the
gradient); Sutton and Barto 2018, "Reinforcement Learning: An Introduction", chapters 7 (n steps), 12 (traces) and 13
(actor-critic); Schulman et al. 2016, "High-Dimensional Continuous Control Using Generalized Advantage Estimation".

    repeat:
        1. run the policy for T steps in each of N environments
        2. fit the critic: critic_epochs Adam steps on mean (V(s_t) − y_t)², where y_t is the discounted sum of rewards,
           or r_t + γ V(s'_t) (critic_target); each step computes these constants anew with the newest V
        3. advantages with the fitted critic, from δ_t = r_t + γ V(s'_t) − V(s_t):
             td           A_t = δ_t: least variance, but biased where V is wrong
             n_step       A_t = Σ_{k<n} γ^k δ_{t+k} = Σ_{k<n} γ^k r_{t+k} + γ^n V(s_{t+n}) − V(s_t), n = lookahead
             gae          A_t = Σ_k (γλ)^k δ_{t+k}: all n mixed, with weights (1 − λ) λ^(n−1)  (GAE eq. 16)
             monte_carlo  A_t = Σ_k γ^k δ_{t+k} = Σ_k γ^k r_{t+k} − V(s_t): V is a mere baseline, no bias, most variance
        4. one Adam step on the pseudo-loss −mean(log π(a_t|s_t) A_t) − ent_coef H
        5. every 128 steps, or each rollout if longer: update the observation statistics, then log, evaluate and save

No sum goes on past the end of an episode. If s' terminates the task, V(s') is 0; a time limit and the cut after T
steps do not, so there V of the true successor counts.

Online is the same with T = N = 1: all A are then δ, and each step is learnt from as it comes. Only there, traces hand δ
on to the steps before (Sutton and Barto, page 332): e ← γλ e + ∇ log π(a|s), θ ← θ + α δ e, and likewise with ∇V(s) for
the critic, with the same δ. With θ and V held, an episode of these sums up to the step of `gae` with λ = trace_decay.

Actor and critic are two networks, or with --shared-network one trunk with two heads: then steps 2 and 4 are a single
step on the pseudo-loss + vf_coef mean (V − y)², with advantages from V as it was before.

What departs from the sources, and why: step t of an episode does not count γ^t times (reinforce.py tells why); Adam and
a clipped gradient take the place of plain steps; observations and rewards can be scaled by running statistics; all
episodes restart after a checkpoint, so that a resumed run is exact.

Compare with reinforce.py, which waits for whole episodes, and a2c.py: many short rollouts, one loss for both networks.

    python actor_critic.py
    python actor_critic.py --num-envs 1 --num-steps 1 --trace-decay 0.9 --learning-rate 3e-4 --critic-learning-rate 1e-3
    python actor_critic.py --env-id HalfCheetah-v5 --total-timesteps 1000000 --num-steps 64 --learning-rate 1e-3 \
        --log-std-init -1 --normalize-obs --normalize-rewards --normalize-advantages
"""

import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
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
from torch.nn.functional import mse_loss, pad
from torch.utils.tensorboard import SummaryWriter


@dataclass(frozen=True)
class Args:
    """Flags of the command line; the defaults solve CartPole-v1."""

    # Experiment
    env_id: str = "CartPole-v1"  # Gymnasium environment with Box or Discrete observations and actions
    seed: int = 1  # of everything random: networks, actions, environments
    total_timesteps: int = 200_000  # environment steps over all environments, rounded up to a whole iteration
    num_envs: int = 8  # environments that are stepped together, N
    device: str = "auto"  # auto (a GPU if there is one), cpu, cuda or cuda:N
    num_threads: int = 1  # CPU threads of PyTorch; one is fastest for small networks
    compile: bool = False  # compile loss, gradient and clipping into one graph (takes half a minute first)
    run_dir: str = ""  # where the run is written (default: runs/<env-id>/<script>/seed<seed>__<date-time>)
    resume: bool = False  # go on from the checkpoint in --run-dir if there is one
    checkpoint_every: int = 100_000  # environment steps between checkpoints, after which all episodes restart; 0: off
    eval_every: int = 0  # environment steps between evaluations of the greedy policy; 0: at the end alone
    eval_episodes: int = 20  # episodes of one evaluation; 0: no evaluation

    # Algorithm
    num_steps: int = 32  # steps of each environment in a rollout, T
    learning_rate: float = 5e-3  # the optimizer's step size
    anneal_lr: bool = True  # lower the learning rate linearly: full in the first iteration, 0 after the last
    gamma: float = 0.99  # discount γ
    critic_learning_rate: float = 2e-3  # Adam's step size for V
    critic_epochs: int = 10  # passes over each batch in the regression of V
    critic_target: Literal["monte_carlo", "bootstrap"] = "monte_carlo"  # V learns the sum of rewards, or r + γ V(s')
    advantage: Literal["td", "n_step", "monte_carlo", "gae"] = "gae"  # rewards before V: one, n, all, a mixture
    lookahead: int = 5  # n of the n-step advantage
    gae_lambda: float = 0.95  # λ of generalized advantage estimation: 0 is one step, 1 is Monte Carlo
    trace_decay: float = 0.0  # λ of the eligibility traces, for one step of one environment at a time; 0: off
    shared_network: bool = False  # one trunk with a head for the policy and one for V, trained together
    ent_coef: float = 0.0  # weight of the entropy bonus
    vf_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 0.5  # the gradient of all parameters together is scaled down to this norm where it is longer
    normalize_advantages: bool = False  # shift and scale the advantages of each update to mean 0 and deviation 1
    normalize_obs: bool = False  # shift and scale observations by their running mean and deviation
    normalize_rewards: bool = False  # divide rewards by the running deviation of the discounted return
    hidden_size: int = 64  # width of the two hidden layers of each network
    log_std_init: float = 0.0  # log σ at the start, in units in which the action bounds are ±1

    def __post_init__(self) -> None:
        check_flags(self)
        if self.trace_decay and (self.batch_size > 1 or self.shared_network or self.trace_decay > 1):
            raise ValueError("--trace-decay is at most 1, with --num-envs 1, --num-steps 1 and no --shared-network")
        if self.normalize_advantages and self.batch_size == 1:
            raise ValueError("--normalize-advantages makes a single advantage 0; it needs more steps or environments")

    @property
    def batch_size(self) -> int:
        """Transitions in one rollout, B = T N."""
        return self.num_steps * self.num_envs

    @property
    def updates_per_iteration(self) -> int:
        """Rollouts, each with its update, between two points in the log: more than one where they are very short."""
        return max(1, 128 // self.batch_size)


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


def mlp(fan_in: int, hidden_size: int, fan_out: int, gain: float) -> nn.Sequential:
    """tanh network with two hidden layers; orthogonal weights with gains √2, √2 and `gain`, zero biases."""
    layers = [nn.Linear(fan_in, hidden_size), nn.Linear(hidden_size, hidden_size), nn.Linear(hidden_size, fan_out)]
    for layer, layer_gain in zip(layers, (math.sqrt(2), math.sqrt(2), gain), strict=True):
        nn.init.orthogonal_(layer.weight, layer_gain)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])


class CategoricalActor(nn.Module):
    """Softmax policy over discrete actions: π(a|s) = exp z_a(s) / Σ_b exp z_b(s)."""

    def __init__(self, obs_dim: int, num_actions: int, hidden_size: int) -> None:
        super().__init__()
        self.num_actions = num_actions
        self.net = mlp(obs_dim, hidden_size, num_actions, 0.01)

    def noise(self, *shape: int) -> Tensor:
        """Gumbel noise −log E with E ~ Exp(1), (*shape, A): argmax_a (z_a + noise_a) is a draw from π."""
        return -torch.empty(*shape, self.num_actions).exponential_().log()

    @staticmethod
    def choose(logits: np.ndarray, noise: np.ndarray | float) -> np.ndarray:
        """Actions (B,) from logits (B, A); noise 0 gives the most likely ones."""
        return (logits + noise).argmax(-1)

    def forward(self, obs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """log π(a|s) and the entropy −Σ_a π(a|s) log π(a|s), of the shape of `actions`."""
        logprobs = self.net(obs).log_softmax(-1)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        return logprobs.gather(-1, actions.unsqueeze(-1)).squeeze(-1), entropy


class GaussianActor(nn.Module):
    """Gaussian policy over continuous actions: π(·|s) = N(μ(s), diag σ²), where log σ is a parameter."""

    def __init__(self, obs_dim: int, action_dim: int, hidden_size: int, log_std_init: float) -> None:
        super().__init__()
        self.net = mlp(obs_dim, hidden_size, action_dim, 0.01)
        self.log_std = nn.Parameter(torch.full((action_dim,), log_std_init))

    def noise(self, *shape: int) -> Tensor:
        """σ ε with ε ~ N(0, 1), (*shape, action_dim): μ + noise is a draw from π."""
        return torch.randn(*shape, len(self.log_std)) * self.log_std.detach().exp().cpu()

    @staticmethod
    def choose(mean: np.ndarray, noise: np.ndarray | float) -> np.ndarray:
        """Actions (B, action_dim) from means (B, action_dim); noise 0 gives the most likely ones."""
        return mean + noise

    def forward(self, obs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """log π(a|s) = −½ Σ_d z_d² − Σ_d log(σ_d √(2π)) with z = (a − μ) / σ, and the entropy Σ_d log(σ_d √(2πe))."""
        z = (actions - self.net(obs)) / self.log_std.exp()
        log_normalizer = self.log_std.sum() + 0.5 * math.log(2 * math.pi) * len(self.log_std)
        logprobs = -0.5 * z.square().sum(-1) - log_normalizer
        return logprobs, (log_normalizer + 0.5 * len(self.log_std)).expand_as(logprobs)


class Critic(nn.Module):
    """State value V(s): (..., obs_dim) to (...)."""

    def __init__(self, obs_dim: int, hidden_size: int) -> None:
        super().__init__()
        self.net = mlp(obs_dim, hidden_size, 1, 1.0)

    def forward(self, obs: Tensor) -> Tensor:
        return self.net(obs).squeeze(-1)


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


class Agent(nn.Module):
    """The policy, the critic, and the statistics that normalise what both of them see."""

    settled_after = 100_000  # observations

    def __init__(self, env: gym.Env, hidden_size: int, log_std_init: float) -> None:
        super().__init__()
        obs_dim, space = env.observation_space.shape[0], env.action_space
        self.obs_norm = RunningNorm(obs_dim)
        if isinstance(space, spaces.Discrete):
            self.actor = CategoricalActor(obs_dim, int(space.n), hidden_size)
        else:
            self.actor = GaussianActor(obs_dim, math.prod(space.shape), hidden_size, log_std_init)
        self.critic = Critic(obs_dim, hidden_size)

    def update_obs_norm(self, obs: Tensor) -> None:
        """Adds raw observations (..., obs_dim) to the statistics; once these are settled, no network's output changes.

        The first layers make up for it: W' = W scale / scale', b' = b + W' scale' (mean' − mean), as the last one does
        in Pop-Art (van Hasselt et al. 2016, proposition 1). Else new statistics would move the policy, and no clipping
        nor bound on the KL would know. Inputs beyond the clip of ±10 aside, and the slope where a deviation grows more
        than tenfold at once, as that of an input at rest does. At first outputs do change: kept from the first batch
        on, they made two trials on Hopper-v5 (trpo.py, a2c.py) end lower.
        """
        norm = self.obs_norm
        settled, mean, scale = norm.count >= self.settled_after, norm.mean.clone(), norm.scale.clone()
        norm.update(obs)
        ratio = torch.where(settled, scale / norm.scale, 1.0).clamp(max=10.0)
        moved = (settled * (norm.mean - mean) * norm.scale).to(scale.dtype)
        with torch.no_grad():
            for layer in {self.actor.net[0], self.critic.net[0]}:  # one, if they share it
                layer.weight.mul_(ratio)
                layer.bias.add_(layer.weight @ moved)

    def policy(self) -> Callable[[np.ndarray, np.ndarray | float], np.ndarray]:
        """act(obs, noise): the current policy, frozen, in NumPy; from raw observations (N, obs_dim) to actions.

        For the few rows of an environment step this is several times faster than PyTorch, and nothing has to go to a
        GPU and back. Actions are in the policy's units; `action_map` turns them into the environment's.
        """
        norm, net = self.obs_norm, self.actor.net
        tensors = (norm.scale, norm.shift, -norm.limit, norm.limit, *net.parameters())
        scale, shift, low, high, w1, b1, w2, b2, w3, b3 = (x.detach().cpu().numpy().T.copy() for x in tensors)

        def act(obs: np.ndarray, noise: np.ndarray | float) -> np.ndarray:
            x = np.minimum(np.maximum(obs * scale + shift, low), high)
            return self.actor.choose(np.tanh(np.tanh(x @ w1 + b1) @ w2 + b2) @ w3 + b3, noise)

        return act


def discounted_sum(x: Tensor, discounts: Tensor) -> Tensor:
    """y_t = x_t + c_t y_{t+1} with y_T = 0, along the first axis, for x and discounts c of one shape (T, ...).

    Takes log2 T passes in place of T steps: after pass k, y_t holds its first 2^k terms and c_t the product of as many
    discounts (Hillis and Steele 1986).
    """
    assert x.shape == discounts.shape
    y, c, reach = x, discounts, 1
    while reach < len(x):
        later_y, later_c = (pad(z[reach:], (0, 0) * (x.dim() - 1) + (0, reach)) for z in (y, c))
        y, c, reach = y + c * later_y, c * later_c, 2 * reach
    return y


def gae(
    rewards: Tensor, values: Tensor, next_values: Tensor, terminated: Tensor, dones: Tensor,
    gamma: float, gae_lambda: float,
) -> Tensor:  # fmt: skip
    """Generalized advantage estimates (Schulman et al. 2016, eq. 16), all (T, N).

    δ_t = r_t + γ (1 − terminated_t) V(s'_t) − V(s_t);  A_t = δ_t + γ λ (1 − done_t) A_{t+1}.
    A time limit cuts the sum, but its last δ bootstraps: only termination makes the future worth nothing.
    """
    assert rewards.shape == values.shape == next_values.shape == terminated.shape == dones.shape
    td_errors = rewards + gamma * next_values * ~terminated - values
    return discounted_sum(td_errors, gamma * gae_lambda * (~dones).to(td_errors.dtype))


def n_step(
    rewards: Tensor, values: Tensor, next_values: Tensor, terminated: Tensor, dones: Tensor,
    gamma: float, lookahead: int,
) -> Tensor:  # fmt: skip
    """Advantages from n = lookahead rewards, then V (Sutton and Barto 2018, eq. 7.1), all (T, N).

    A_t = Σ_{k<m} γ^k r_{t+k} + γ^m V(s'_{t+m−1}) − V(s_t), where m is n, or as many steps as there are before the
    episode ends or the rollout is cut; after termination V is 0. The sum telescopes: with δ as in `gae` it is
    Σ_{k<m} γ^k δ_{t+k}, and that of n + 1 steps is δ_t plus the discounted sum of n steps from t + 1 on.
    """
    td_errors = gae(rewards, values, next_values, terminated, dones, gamma, 0.0)
    advantages, discounts = td_errors, gamma * (~dones).to(td_errors.dtype)
    for _ in range(min(lookahead, len(rewards)) - 1):
        advantages = td_errors + discounts * pad(advantages[1:], (0, 0, 0, 1))
    return advantages


def advantage_estimates(*arrays: Tensor, gamma: float, advantage: str, lookahead: int, gae_lambda: float) -> Tensor:
    """A_t (T, N) of the chosen kind; arrays are rewards, values, next_values, terminated and dones, as for `gae`."""
    if advantage == "n_step":
        return n_step(*arrays, gamma, lookahead)
    return gae(*arrays, gamma, {"td": 0.0, "gae": gae_lambda, "monte_carlo": 1.0}[advantage])


def critic_targets(rewards: Tensor, values: Tensor, *arrays: Tensor, gamma: float, critic_target: str) -> Tensor:
    """What V(s_t) should be, (T, N): r_t + γ V(s'_t), or the discounted rewards up to the end of the episode.

    Of the latter, V(s') is the last term at a time limit and where the rollout is cut. V(s_t) itself cancels.
    """
    return values + gae(rewards, values, *arrays, gamma, 1.0 if critic_target == "monte_carlo" else 0.0)


def normalize(x: Tensor) -> Tensor:
    """(x − mean) / (deviation + 1e-8) over all entries; zeros where all are equal."""
    std, mean = torch.std_mean(x, correction=0)
    return (x - mean) / (std + 1e-8)


def value_loss(values: Tensor, returns: Tensor) -> Tensor:
    """mean (V(s) − G)² over (B,); G is a constant."""
    assert values.shape == returns.shape
    return mse_loss(values, returns.detach())


def critic_loss(agent: Agent, obs: Tensor, returns: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The value loss, and what to log of it."""
    loss = value_loss(agent.critic(obs), returns)
    return loss, {"value_loss": loss}


def actor_loss(
    agent: Agent, obs: Tensor, actions: Tensor, advantages: Tensor, *, ent_coef: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """−mean(log π(a|s) A) − ent_coef H, A is a constant: minus its gradient is the estimate of ∇J, if ent_coef is 0."""
    logprobs, entropy = agent.actor(obs, actions)
    assert logprobs.shape == advantages.shape
    policy_loss, entropy = -(logprobs * advantages.detach()).mean(), entropy.mean()
    return policy_loss - ent_coef * entropy, {"policy_loss": policy_loss, "entropy": entropy}


def shared_loss(
    agent: Agent, obs: Tensor, actions: Tensor, advantages: Tensor, returns: Tensor, *, ent_coef: float, vf_coef: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a network with two heads, and what to log of it."""
    loss, metrics = actor_loss(agent, obs, actions, advantages, ent_coef=ent_coef)
    v_loss, v_metrics = critic_loss(agent, obs, returns)
    return loss + vf_coef * v_loss, metrics | v_metrics


def eligibility_trace(trace: Tensor | float, decay: float, output: Tensor, net: nn.Module) -> Tensor:
    """e ← γλ e + ∇x (Sutton and Barto 2018, eq. 12.5); x is log π(a|s) or V(s), decay is γλ, e is one long vector."""
    grads = torch.autograd.grad(output, list(net.parameters()))
    return decay * trace + torch.cat([grad.flatten() for grad in grads])


def trace_loss(net: nn.Module, trace: Tensor, td_error: Tensor) -> Tensor:
    """−δ ⟨e, θ⟩ with constants δ and e: a step down this pseudo-loss goes along δ e (eq. 12.7)."""
    return -td_error.sum() * (trace @ torch.cat([param.flatten() for param in net.parameters()]))


def traced_critic_loss(agent: Agent, td_error: Tensor, trace: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """In place of `critic_loss`, for one step of one environment."""
    return trace_loss(agent.critic, trace, td_error), {"value_loss": td_error.square().mean()}


def traced_actor_loss(
    agent: Agent, obs: Tensor, actions: Tensor, td_error: Tensor, trace: Tensor, *, ent_coef: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """In place of `actor_loss`, whose metrics it has, for one step of one environment."""
    _, metrics = actor_loss(agent, obs, actions, td_error, ent_coef=ent_coef)
    return trace_loss(agent.actor, trace, td_error) - ent_coef * metrics["entropy"], metrics


def state_values(critic: nn.Module, obs: Tensor, last_obs: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """V(s_t) and V(s'_t), (T, N), as constants; s'_t is s_{t+1}, except where `ends`: there it is in `last_obs`."""
    with torch.no_grad():
        values = critic(obs)
        return values, values.roll(-1, 0).masked_scatter(ends, critic(last_obs))


def explained_variance(values: Tensor, returns: Tensor) -> Tensor:
    """1 − Var(G − V) / Var(G): 1 for a perfect critic, 0 for a constant one."""
    return 1 - (returns - values).var(correction=0) / (returns.var(correction=0) + 1e-8)


class Rollout(NamedTuple):
    """T steps of N environments."""

    obs: Tensor  # s_t (T, N, obs_dim), raw
    next_obs: Tensor  # s'_t (T, N, obs_dim), the true successor, also where an episode ended
    actions: Tensor  # a_t (T, N) or (T, N, action_dim), in the policy's units, not clipped
    rewards: Tensor  # r_t (T, N), received for a_t
    terminated: Tensor  # (T, N), s'_t ends the task: its value is 0
    dones: Tensor  # (T, N), terminated or truncated: the next row starts a new episode
    discounted_returns: Tensor  # r_t + γ r_{t-1} + γ² r_{t-2} + ... back to the start of the episode (T, N)


class Collector:
    """Steps N environments, and carries the unfinished episodes from one rollout to the next.

    These can be a part of all `num_envs`, from index `first` on: the others belong to other processes.
    """

    def __init__(self, envs: list[gym.Env], gamma: float, first: int = 0, num_envs: int = 0) -> None:
        self.envs, self.gamma, self.first, self.num_envs = envs, gamma, first, num_envs or len(envs)
        self.to_env = action_map(envs[0].action_space)

    def reset(self, seed: int, iteration: int) -> None:
        """Drops the unfinished episodes and starts all environments from seeds made of (seed, iteration, index)."""
        seeds = [env_seed(seed, 0, iteration, self.first + i) for i in range(len(self.envs))]
        resets = [env.reset(seed=seed) for env, seed in zip(self.envs, seeds, strict=True)]
        self.obs = np.array([obs for obs, _ in resets], np.float32)
        self.episodes = [(0.0, 0, 0.0) for _ in self.envs]  # return, length and discounted return so far

    def collect(self, agent: Agent, num_steps: int, step: int = 0) -> tuple[Rollout, list[tuple[int, float, int]]]:
        """Runs the policy for T steps, after `step` others; adds (steps, return, length) of each episode that ended."""
        act, shape, actions, ended = agent.policy(), (num_steps, len(self.envs)), [], []
        obs, next_obs = np.empty((2, *shape, self.obs.shape[1]), np.float32)
        rewards, discounted_returns = np.empty((2, *shape), np.float32)
        terminated, dones = np.empty((2, *shape), bool)
        noises = agent.actor.noise(num_steps, self.num_envs)[:, self.first : self.first + len(self.envs)].numpy()
        for t, noise in enumerate(noises):
            obs[t] = self.obs
            actions.append(act(self.obs, noise))
            if not math.isfinite(actions[t].sum()):  # MuJoCo would not survive it
                check_finite(step + t * self.num_envs, {"obs": self.obs, "actions": actions[t]})
            env_actions = self.to_env(actions[t])
            for i, env in enumerate(self.envs):
                next_obs[t, i], reward, terminated[t, i], truncated, _ = env.step(env_actions[i])
                episodic_return, length, discounted = self.episodes[i]
                self.episodes[i] = (episodic_return + reward, length + 1, reward + self.gamma * discounted)
                rewards[t, i], discounted_returns[t, i] = reward, self.episodes[i][2]
                dones[t, i] = terminated[t, i] or truncated
            self.obs = next_obs[t].copy()
            for i in np.flatnonzero(dones[t]):
                ended.append((t * self.num_envs + self.first + int(i) + 1, *self.episodes[i][:2]))
                self.obs[i], _ = self.envs[i].reset()
                self.episodes[i] = (0.0, 0, 0.0)
        if not math.isfinite(sum(np.vdot(x, x) for x in (obs, next_obs, rewards))):  # quick: nan and inf outlive a sum
            check_finite(step, {"obs": obs, "next_obs": next_obs, "rewards": rewards})
        arrays = (obs, next_obs, np.array(actions), rewards, terminated, dones, discounted_returns)
        return Rollout(*(torch.from_numpy(array) for array in arrays)), ended


def train(args: Args) -> dict[str, float]:
    """Runs actor-critic; gives the last value of each metric, the final evaluation among them."""
    device = set_up(args.device, args.num_threads, args.seed)
    envs = make_envs(args.env_id, args.num_envs)
    agent = Agent(envs[0], args.hidden_size, args.log_std_init).to(device)
    return_norm = RunningNorm(1).to(device)
    parts, collector = {"agent": agent, "return_norm": return_norm}, Collector(envs, args.gamma)

    def updater(name: str, loss: Callable, net: nn.Module, learning_rate: float) -> Callable:
        params = list(net.parameters())
        parts[name] = torch.optim.Adam([flatten(params)], lr=learning_rate, eps=1e-5, fused=True)
        return make_update(partial(loss, agent), params, parts[name], args.max_grad_norm, args.compile)

    if args.shared_network:
        agent.critic.net = nn.Sequential(*agent.actor.net[:4], agent.critic.net[4])
        loss = partial(shared_loss, ent_coef=args.ent_coef, vf_coef=args.vf_coef)
        update = updater("optimizer", loss, agent, args.learning_rate)
    else:
        losses = (traced_actor_loss, traced_critic_loss) if args.trace_decay else (actor_loss, critic_loss)
        update = updater("optimizer", partial(losses[0], ent_coef=args.ent_coef), agent.actor, args.learning_rate)
        update_critic = updater("critic_optimizer", losses[1], agent.critic, args.critic_learning_rate)
    fits = 0 if args.shared_network or args.trace_decay else args.critic_epochs  # 0: V has its step in step 4
    target = partial(critic_targets, gamma=args.gamma, critic_target=args.critic_target)
    estimate = partial(
        advantage_estimates, gamma=args.gamma, advantage=args.advantage, lookahead=args.lookahead,
        gae_lambda=args.gae_lambda,
    )  # fmt: skip
    with Run(args, **parts) as run:
        while run.step < args.total_timesteps:
            learning_rate = args.learning_rate * (1 - args.anneal_lr * run.step / args.total_timesteps)
            parts["optimizer"].param_groups[0]["lr"] = learning_rate
            if run.fresh_start:
                collector.reset(args.seed, run.iteration)
                actor_trace = critic_trace = 0.0

            metrics, seen, fitted, ended = [], [], [], []
            for step in range(0, args.updates_per_iteration * args.batch_size, args.batch_size):
                # 1. run the policy
                rollout, episodes = collector.collect(agent, args.num_steps, run.step + step)
                ended += [(step + offset, *episode) for offset, *episode in episodes]
                ends = rollout.dones.clone()  # where V(s'_t) is not V(s_{t+1})
                ends[-1] = True
                last_obs = agent.obs_norm(rollout.next_obs[ends].to(device))
                raw_obs, _, actions, rewards, terminated, dones, discounted_returns = (x.to(device) for x in rollout)
                obs, ends = agent.obs_norm(raw_obs), ends.to(device)
                seen.append(raw_obs)
                if args.normalize_rewards:
                    return_norm.update(discounted_returns)
                rewards = rewards * return_norm.scale

                # 2. fit the critic
                values, next_values = state_values(agent.critic, obs, last_obs, ends)
                targets = target(rewards, values, next_values, terminated, dones)
                fitted.append((values, targets))  # by a critic that has not seen this batch
                fit = {}
                for _ in range(fits):
                    fit = update_critic(obs, targets)
                    values, next_values = state_values(agent.critic, obs, last_obs, ends)
                    targets = target(rewards, values, next_values, terminated, dones)

                # 3. advantages
                advantages = estimate(rewards, values, next_values, terminated, dones)
                if args.normalize_advantages:
                    advantages = normalize(advantages)

                # 4. one step of the policy
                if args.shared_network:
                    metrics.append(update(obs, actions, advantages, targets))
                elif args.trace_decay:
                    decay, logprobs = args.gamma * args.trace_decay, agent.actor(obs, actions)[0]
                    actor_trace = eligibility_trace(actor_trace, decay, logprobs.sum(), agent.actor)
                    critic_trace = eligibility_trace(critic_trace, decay, agent.critic(obs).sum(), agent.critic)
                    fit = update_critic(advantages, critic_trace)
                    metrics.append(fit | update(obs, actions, advantages, actor_trace))
                    if rollout.dones.any():
                        actor_trace = critic_trace = 0.0
                else:
                    metrics.append(fit | update(obs, actions, advantages))

            # 5. update the statistics, log, evaluate, save
            if args.normalize_obs:
                agent.update_obs_norm(torch.cat(seen))
            explained = explained_variance(*(torch.cat(x) for x in zip(*fitted, strict=True)))
            more = {"losses/explained_variance": explained.item(), "charts/learning_rate": learning_rate}
            run.end_iteration(len(metrics) * args.batch_size, ended, mean_metrics(metrics) | more)
        return run.finish()


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
