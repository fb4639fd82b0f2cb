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
"""Advantage actor-critic, A2C and A3C: short rollouts side by side, and one gradient step on each batch of them.

Mnih et al. 2016, "Asynchronous Methods for Deep Reinforcement Learning" (arXiv 1602.01783), Algorithm S3; advantages
from Schulman et al. 2016, "High-Dimensional Continuous Control Using Generalized Advantage Estimation" (GAE).

    for each update:
        1. anneal the learning rate
        2. run the policy π for T steps in each of N environments
        3. scale the rewards by the running deviation of the discounted return
        4. δ_t = r_t + γ V(s'_t) − V(s_t);  A_t = Σ_l (γλ)^l δ_{t+l};  G_t = A_t + V(s_t)
           With λ = 1, as in the paper, G_t is the discounted sum of the rewards in the rollout, and V from there on
        5. one step of RMSprop on −mean log π(a|s) A + vf_coef (V − G)² − ent_coef H
        6. every log_interval steps: update the observation statistics, then log, evaluate and save

A2C is synchronous: each update sees N environments in different states, which is what makes it stable. They can be
shared out among the processes and machines of torchrun, which average their gradients: the same update, found together.

A3C is asynchronous: with --asynchronous, each of K workers acts in N environments with a copy θ' of the shared
parameters θ, and applies its gradient to θ as soon as it has one; meanwhile others may have moved θ. The statistics of
RMSprop (or Adam) are shared, too. Who comes first is up to the machine: no two runs with several workers are the same,
and a resumed run goes on correctly, but not bit for bit.

What departs from the paper, and why: the losses are means over the batch, not sums, so the step does not grow with it;
actor and critic are two networks, so vf_coef only weighs them in the common clipping; λ can be less than 1; rewards are
scaled by default (if V is about 100, its gradient takes nearly all of the norm that both are clipped to, and leaves
little for the policy), and observations can be; a time limit bootstraps with V of the true successor; all episodes
restart after a checkpoint, so that a resumed run is exact; a worker changes θ under a lock, which keeps the optimizer's
statistics whole (the paper's workers overwrite each other now and then).

Compare with actor_critic.py, which fits the critic first, and with ppo.py, which takes many steps on each batch and for
that puts the clipped ratio ρ in the place of log π.

    python a2c.py
    python a2c.py --asynchronous --num-workers 2 --num-envs 4
    python a2c.py --env-id HalfCheetah-v5 --total-timesteps 1000000 --optimizer adam --num-steps 64 \
        --normalize-advantages --log-std-init -1 --normalize-obs
    torchrun --nproc-per-node 2 a2c.py
"""

import math
import os
import queue
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
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
from torch import Tensor, multiprocessing, nn
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
    log_interval: int = 512  # environment steps in an iteration, which ends with one point of each curve
    num_steps: int = 16  # steps of each environment in a rollout, T
    optimizer: Literal["rmsprop", "adam"] = "rmsprop"  # RMSprop is the paper's
    learning_rate: float = 2e-3  # the optimizer's step size
    anneal_lr: bool = True  # lower the learning rate linearly: full in the first iteration, 0 after the last
    gamma: float = 0.99  # discount γ
    gae_lambda: float = 0.95  # λ of generalized advantage estimation: 0 is one step, 1 is Monte Carlo
    ent_coef: float = 0.0  # weight of the entropy bonus
    vf_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 0.5  # the gradient of all parameters together is scaled down to this norm where it is longer
    asynchronous: bool = False  # A3C: workers with environments of their own update the shared parameters in turn
    num_workers: int = 2  # processes of --asynchronous, each with num_envs environments
    normalize_advantages: bool = False  # shift and scale the advantages of each update to mean 0 and deviation 1
    normalize_obs: bool = False  # shift and scale observations by their running mean and deviation
    normalize_rewards: bool = True  # divide rewards by the running deviation of the discounted return
    hidden_size: int = 64  # width of the two hidden layers of each network
    log_std_init: float = 0.0  # log σ at the start, in units in which the action bounds are ±1

    def __post_init__(self) -> None:
        check_flags(self)
        if self.asynchronous and self.device.startswith("cuda"):
            raise ValueError("--asynchronous shares parameters between processes on the CPU; it needs --device cpu")

    @property
    def batch_size(self) -> int:
        """Transitions in one rollout, B = T N."""
        return self.num_steps * self.num_envs

    @property
    def updates_per_iteration(self) -> int:
        """Rollouts, each with its update, between two points in the log: more than one where they are very short."""
        return max(1, self.log_interval // self.batch_size)


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


def normalize(x: Tensor) -> Tensor:
    """(x − mean) / (deviation + 1e-8) over all entries; zeros where all are equal."""
    std, mean = torch.std_mean(x, correction=0)
    return (x - mean) / (std + 1e-8)


def value_loss(values: Tensor, returns: Tensor) -> Tensor:
    """mean (V(s) − G)² over (B,); G is a constant."""
    assert values.shape == returns.shape
    return mse_loss(values, returns.detach())


def explained_variance(values: Tensor, returns: Tensor) -> Tensor:
    """1 − Var(G − V) / Var(G): 1 for a perfect critic, 0 for a constant one."""
    return 1 - (returns - values).var(correction=0) / (returns.var(correction=0) + 1e-8)


def a2c_loss(
    agent: Agent, obs: Tensor, next_obs: Tensor, actions: Tensor, rewards: Tensor, terminated: Tensor, dones: Tensor, *,
    gamma: float, gae_lambda: float, vf_coef: float, ent_coef: float, normalize_advantages: bool,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """−mean(log π(a|s) A) + vf_coef L_V − ent_coef H, to be minimised, and what to log, for a rollout (T, N).

    A and G = A + V(s) come from the critic as it is, and are constants; obs and next_obs are normalised.
    """
    (logprobs, entropy), values = agent.actor(obs, actions), agent.critic(obs)
    with torch.no_grad():
        advantages = gae(rewards, values, agent.critic(next_obs), terminated, dones, gamma, gae_lambda)
        returns = advantages + values
    explained = explained_variance(values.detach(), returns)
    advantages = normalize(advantages) if normalize_advantages else advantages
    policy_loss, v_loss, entropy = -(logprobs * advantages).mean(), value_loss(values, returns), entropy.mean()
    metrics = {"policy_loss": policy_loss, "value_loss": v_loss, "entropy": entropy, "explained_variance": explained}
    return policy_loss + vf_coef * v_loss - ent_coef * entropy, metrics


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


def join(num_envs: int) -> tuple[int, int]:
    """Joins the processes of torchrun; returns this one's rank and its share of the environments. Alone: 0 and all."""
    if not dist.is_torchelastic_launched():
        return 0, num_envs
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # which is now what "cuda" means
    dist.init_process_group()
    if num_envs % dist.get_world_size():
        fail(f"--num-envs {num_envs} cannot be divided among {dist.get_world_size()} processes")
    return dist.get_rank(), num_envs // dist.get_world_size()


def gather(x: Tensor) -> Tensor:
    """The columns of all processes side by side: (T, N/P, ...) to (T, N, ...); x itself where there is but one."""
    if not dist.is_initialized():
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts, 1)


def broadcast(run: "Run") -> None:
    """Gives to all processes of torchrun what the first one has, perhaps from a checkpoint."""
    if dist.is_initialized():
        states = {name: part.state_dict() for name, part in run.parts.items()}
        message = [run.step, run.iteration, torch.get_rng_state(), states]
        dist.broadcast_object_list(message)
        run.step, run.iteration, rng, states = message
        torch.set_rng_state(rng)
        for name, part in run.parts.items():
            part.load_state_dict(states[name])


def learn(args: Args, run: Any, params: list[nn.Parameter], collector: Collector) -> None:
    """The loop of A2C, and of each worker of A3C; `run` counts the steps and takes what is logged."""
    agent, optimizer, return_norm = run.parts.values()
    normalized_loss = partial(
        a2c_loss, agent, gamma=args.gamma, gae_lambda=args.gae_lambda, vf_coef=args.vf_coef, ent_coef=args.ent_coef,
        normalize_advantages=args.normalize_advantages,
    )  # fmt: skip

    def loss(*rollout: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        # 3. scale the rewards
        obs, next_obs, actions, rewards, terminated, dones, discounted_returns = rollout
        if args.normalize_rewards:
            return_norm.update(gather(discounted_returns))
        rewards = rewards * return_norm.scale

        # 4. advantages and returns, and the loss of the whole batch
        return normalized_loss(agent.obs_norm(obs), agent.obs_norm(next_obs), actions, rewards, terminated, dones)

    update = make_update(loss, params, optimizer, args.max_grad_norm, args.compile)
    device, steps = params[0].device, args.updates_per_iteration * args.batch_size
    while run.step < args.total_timesteps:
        # 1. anneal the learning rate
        learning_rate = args.learning_rate * (1 - args.anneal_lr * run.step / args.total_timesteps)
        optimizer.param_groups[0]["lr"] = learning_rate

        if run.fresh_start:
            collector.reset(args.seed, run.iteration)
        metrics, seen, ended = [], [], []
        for taken in range(0, steps, args.batch_size):
            # 2. run the policy
            rollout, episodes = collector.collect(agent, args.num_steps, run.step + taken)
            ended += [(taken + offset, *episode) for offset, *episode in episodes]
            seen.append(rollout.obs)

            # 3. to 5. the loss above, and one step on it
            metrics.append(update(*(x.to(device) for x in rollout)))

        # 6. update the statistics, log, evaluate, save
        if args.normalize_obs:
            agent.update_obs_norm(gather(torch.cat(seen).to(device)))
        run.end_iteration(steps, ended, mean_metrics(metrics) | {"charts/learning_rate": learning_rate})


class Worker:
    """What Run is to the main process, to one worker of A3C: it counts with the others, and reports."""

    def __init__(self, iteration: int, counter: Any, reports: Any, **parts: Any) -> None:
        self.iteration, self.counter, self.reports, self.parts = iteration, counter, reports, parts
        self.fresh_start = True

    @property
    def step(self) -> int:
        """Environment steps of all workers so far."""
        return self.counter.value

    def end_iteration(self, steps: int, ended: list[tuple[int, float, int]], metrics: dict[str, float]) -> None:
        """Counts the steps and reports; leaves if there is nobody to report to."""
        if not multiprocessing.parent_process().is_alive():
            raise SystemExit(1)
        with self.counter.get_lock():
            self.counter.value += steps
        self.reports.put((steps, ended, metrics))
        self.iteration, self.fresh_start = self.iteration + 1, False


def work(
    args: Args, rng: Tensor, iteration: int, counter: Any, lock: Any, reports: Any,
    shared: Agent, optimizer: torch.optim.Optimizer, return_norm: RunningNorm,
) -> None:  # fmt: skip
    """One worker of A3C, in a process of its own; shared, optimizer and return_norm are in shared memory."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)  # the main process hears them, and ends this one
    set_up("cpu", args.num_threads, args.seed)
    torch.set_rng_state(rng)
    agent = deepcopy(shared)
    params = list(agent.parameters())
    flatten(params)

    def locked(function: Callable) -> Callable:
        def call(*args: Any) -> None:
            with lock:
                function(*args)

        return call

    def refreshed(function: Callable) -> Callable:
        def call(*args: Any) -> None:
            function(*args)
            agent.load_state_dict(shared.state_dict())  # θ' ← θ, and the statistics

        return locked(call)

    optimizer.step, return_norm.update = refreshed(optimizer.step), locked(return_norm.update)
    agent.update_obs_norm = refreshed(shared.update_obs_norm)
    run = Worker(iteration, counter, reports, agent=agent, optimizer=optimizer, return_norm=return_norm)
    learn(args, run, params, Collector(make_envs(args.env_id, args.num_envs), args.gamma))
    reports.put(None)


def learn_asynchronously(args: Args, run: "Run") -> None:
    """A3C (Algorithm S3): starts the workers, logs and saves what they report, and ends with the first that fails."""
    agent, optimizer, return_norm = run.parts.values()
    (theta,) = optimizer.param_groups[0]["params"]
    if not optimizer.state:
        theta.grad = torch.zeros_like(theta)
        optimizer.step()  # makes its statistics; whatever tensor a process is given is in shared memory
        for statistic in optimizer.state[theta].values():
            statistic.zero_()
    context = multiprocessing.get_context("spawn")
    counter, lock, reports = context.Value("q", run.step), context.Lock(), context.Queue()
    workers = []
    for k in range(args.num_workers):
        seed = env_seed(args.seed, 2, k) if k else args.seed  # the first one is the synchronous run
        rng = torch.Generator().manual_seed(env_seed(seed, 3, run.iteration)).get_state()
        rng = rng if k or run.iteration else torch.get_rng_state()
        given = (replace(args, seed=seed), rng, run.iteration, counter, lock, reports, agent, optimizer, return_norm)
        workers.append(context.Process(target=work, args=given, daemon=True))
        workers[k].start()

    def wait_for(attempt: Callable) -> Any:
        while True:
            for worker in workers:
                if worker.exitcode:
                    fail(f"a worker ended with status {worker.exitcode}; the last checkpoint stays as it was", 1)
            with suppress(queue.Empty):
                if (result := attempt()) is not False:
                    return result

    def end_iteration(steps: int, ended: list, metrics: dict[str, float]) -> None:
        wait_for(partial(lock.acquire, timeout=1))  # nobody may change what is saved
        try:
            run.end_iteration(steps, ended, metrics)
        finally:
            lock.release()

    working, last = args.num_workers, (0, [], {})
    try:
        while working:
            report = wait_for(partial(reports.get, timeout=1))
            working -= report is None
            if report and last[0] and run.step + last[0] < args.total_timesteps:
                end_iteration(*last)
                last = (0, [], {})
            if report:  # the reports that come after the last step become one: when it is saved, all have ended
                steps, ended, metrics = report
                ended = last[1] + [(last[0] + offset, *episode) for offset, *episode in ended]
                last = (last[0] + steps, ended, metrics)
        end_iteration(*last)
    finally:
        for worker in workers:
            worker.kill()
            worker.join()


def train(args: Args) -> dict[str, float]:
    """Runs A2C or A3C; returns the last value of each metric, the final evaluation among them."""
    if args.asynchronous and dist.is_torchelastic_launched():
        fail("--asynchronous starts its own processes; it does not go together with torchrun")
    rank, share = join(args.num_envs)
    device = set_up("cpu" if args.asynchronous else args.device, args.num_threads, args.seed)
    envs = make_envs(args.env_id, share)
    agent = Agent(envs[0], args.hidden_size, args.log_std_init).to(device)
    return_norm = RunningNorm(1).to(device)
    params = list(agent.parameters())
    if args.optimizer == "rmsprop":
        optimizer = torch.optim.RMSprop([flatten(params)], lr=args.learning_rate, eps=1e-5)
    else:
        optimizer = torch.optim.Adam([flatten(params)], lr=args.learning_rate, eps=1e-5, fused=True)
    parts = {"agent": agent, "optimizer": optimizer, "return_norm": return_norm}
    with Follower(args, **parts) if rank else Run(args, **parts) as run:
        broadcast(run)
        if not args.asynchronous:
            learn(args, run, params, Collector(envs, args.gamma, rank * share, args.num_envs))
        elif run.step < args.total_timesteps:
            learn_asynchronously(args, run)
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


class Follower(Run):
    """What Run is to the first process of torchrun, to the others: it counts, and writes nothing."""

    def __init__(self, args: Any, **parts: Any) -> None:
        self.args, self.parts, self.fresh_start = args, parts, True
        self.step = self.iteration = self.signal = 0

    def __enter__(self) -> "Follower":
        self.handlers = {s: signal.signal(s, self.on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: Any) -> None:
        for signum, handler in self.handlers.items():
            signal.signal(signum, handler)

    def end_iteration(self, steps: int, ended: list[tuple[int, float, int]], metrics: dict[str, float]) -> None:
        """Counts the steps; exits if a signal came."""
        check_finite(self.step, metrics)
        stop, _ = agree(self.signal, ended)
        before, self.step, self.iteration = self.step, self.step + steps, self.iteration + 1
        every = self.args.checkpoint_every
        self.fresh_start = bool(every) and self.step // every > before // every
        if stop:
            raise SystemExit(128 + stop)

    def finish(self) -> dict[str, float]:
        """Nothing was logged here."""
        time.sleep(0.2)  # Gloo's threads let go of the last tensors; at the exit they would abort this process
        return {}


if __name__ == "__main__":
    train(tyro.cli(Args, description=__doc__))
