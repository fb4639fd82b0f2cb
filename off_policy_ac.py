r"""Off-policy actor-critic: Q(s, a) can be learnt, many times over, from what all earlier policies did.

Degris, White and Sutton 2012, "Off-Policy Actor-Critic" (arXiv 1205.4839), theorem 1.
Replay, target: Lillicrap et al. 2016, "Continuous Control with Deep Reinforcement Learning" (1509.02971).

    for each step of N environments:
        1. anneal the learning rates
        2. take a ~ π(·|s), and store (s, a, r, s', terminated; for `importance` log π(a|s)) in the buffer
        num_updates times, once learning_starts transitions are stored:
            3. draw a batch from the buffer
            4. one Adam step of the critic on mean (Q(s, a) − y)²,  y = r + γ E_{a' ~ π(·|s')} Q'(s', a')
            5. one Adam step of the actor on −ent_coef H plus, as actor_update says,
                 resample         −mean log π(a|s) (Q(s, a) − b), fresh a ~ π(·|s), b mean Q of the others
                 reparameterized  −mean Q(s, a), fresh a = tanh(μ_θ(s) + σ_θ(s) ε): a gradient through Q
                 importance       −mean π(a|s) / β(a|s) (Q(s, a) − E_π Q(s, ·)), with the stored a of policy β
            6. the target follows: φ' ← φ' + τ (φ − φ')
        7. log, evaluate, save

The expectations are sums over all actions if Discrete, means over num_samples draws for a Box.

The naive algorithm, with r + γ V(s') as the target of V(s) and the stored a in the actor's step, is wrong
twice. r and s' belong to the action of β, the mixture of all earlier policies: V becomes its value. And
∇ log π(a|s) A(s, a) with a ~ β favours what β did often. Q(s, a) with a' ~ π in y repairs the first, a fresh
action, or the weight π/β, the second. The states remain β's, and ∇Q^π is left out (theorem 1).

Beyond the paper: Q has a target, instead of gradient-TD; a Box has a = tanh(u), and the buffer holds u, so
that tanh's slope cancels in π/β; observations and rewards are normalised by default. With lookahead n > 1,
y has n rewards before γ^n Q': errors of Q, which the actor exploits, then weigh less, but older policies took
the later actions (Barth-Maron et al. 2018, "Distributed Distributional Deterministic Policy Gradients").

Compare with ddpg.py: the policy has no noise of its own there, and Q leads it as in `reparameterized`.

    python off_policy_ac.py
    python off_policy_ac.py --env-id Hopper-v5 --total-timesteps 300000 --lookahead 5 --hidden-size 128 \
        --batch-size 128 --tau 0.005 --learning-starts 10000 --no-normalize-obs --no-normalize-rewards \
        --compile --num-envs 1 --learning-rate 1e-3 --actor-update reparameterized --num-samples 1 \
        --ent-coef 0.1
    (HalfCheetah-v5, where a fall ends no episode: with --lookahead 1 --hidden-size 256 --batch-size 256
    --learning-starts 25000 --no-anneal-lr)
"""

import math
import os
import random
import shlex
import signal
import sys
import time
from contextlib import ExitStack, suppress
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium.spaces import Box, Discrete, flatdim
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter


@dataclass(frozen=True)
class Args:
    """Flags of the command line; the defaults solve CartPole-v1."""

    env_id: str = "CartPole-v1"  # Gymnasium environment; module:Name-v0 imports the module first
    seed: int = 1  # of everything random
    total_timesteps: int = 100_000  # environment steps, over all environments
    num_envs: int = 4  # environments, N
    device: str = "auto"  # auto (a GPU if there is one), cpu, cuda or cuda:1
    num_threads: int = 1  # of PyTorch on the CPU; NumPy's: OPENBLAS_NUM_THREADS
    compile: bool = False  # compile the gradient; takes half a minute
    run_dir: str = ""  # default: runs/<env-id>/<script>/seed<seed>__<date-time>
    resume: bool = False  # go on from the checkpoint in --run-dir if there is one
    checkpoint_every: int = 100_000  # environment steps; episodes restart after a checkpoint; 0: off
    eval_every: int = 0  # environment steps; 0: at the end alone
    eval_episodes: int = 20  # of the greedy policy; 0: no evaluation
    max_episode_steps: int = 0  # time limit; 0: the environment's own

    log_interval: int = 200  # environment steps between points of a curve (evaluations wait for one)
    learning_starts: int = 1_000  # transitions stored before the first update
    num_updates: int = 1  # updates after each step of all environments
    batch_size: int = 128  # transitions in the batch of an update
    buffer_size: int = 1_000_000  # transitions that are kept
    learning_rate: float = 3e-4  # Adam's step size for the policy
    q_learning_rate: float = 1e-3  # Adam's step size for Q
    anneal_lr: bool = True  # lower the step sizes linearly, to 0 at the end
    gamma: float = 0.99  # discount γ
    lookahead: int = 1  # n: rewards in y before Q' stands for the rest
    tau: float = 0.05  # how far the targets move in each update
    actor_update: Literal["resample", "reparameterized", "importance"] = "resample"  # fresh a, dQ/da, stored
    num_samples: int = 8  # fresh actions for each state where an expectation over a Box is estimated
    ent_coef: float = 0.03  # weight of the entropy bonus
    max_grad_norm: float = 1e3  # a longer gradient is scaled down to this norm
    normalize_obs: bool = True  # by the running mean and deviation
    normalize_rewards: bool = True  # by the running deviation of the discounted return
    hidden_size: int = 64  # width of the two hidden layers
    log_std_init: float = 0.0  # log σ of a Gaussian policy at the start; the bounds of actions are ±1

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.tau > 1:
            raise ValueError("--tau must be at most 1")


def relu_mlp(fan_in: int, width: int, fan_out: int, gain: float) -> nn.Sequential:
    """ReLU network with two hidden layers, PyTorch's initial weights; the last ones times `gain`, bias 0."""
    layers = nn.Linear(fan_in, width), nn.Linear(width, width), nn.Linear(width, fan_out)
    nn.init.zeros_(layers[2].bias)
    layers[2].weight.data.mul_(gain)
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])


class Agent(nn.Module):
    """Policy π(a|s) and action value Q(s, a) with its target, of raw observations.

    Discrete: softmax, and one Q for each action. Box: a = tanh(u), u ~ N(μ(s), diag σ(s)²); `actions` are u.
    """

    def __init__(self, envs, args: Args) -> None:
        super().__init__()
        self.discrete, self.action_dim = envs.discrete, envs.action_dim
        self.obs_norm = RunningNorm(envs.obs_dim) if args.normalize_obs else nn.Identity()
        outputs, q_inputs, q_outputs = envs.action_dim, envs.obs_dim, envs.action_dim
        if not self.discrete:
            outputs, q_inputs, q_outputs = 2 * envs.action_dim, envs.obs_dim + envs.action_dim, 1
        self.actor = relu_mlp(envs.obs_dim, args.hidden_size, outputs, gain=0.1)  # logits, or μ and log σ
        self.actor[4].bias.data[envs.action_dim :] = args.log_std_init
        self.critic = relu_mlp(q_inputs, args.hidden_size, q_outputs, gain=1.0)
        self.target_critic = deepcopy(self.critic)

    def distribution(self, obs: Tensor) -> tuple[Tensor, ...]:
        """What π(·|s) is made of: (log π(a|s) of all a,), or μ(s) and log σ(s) of u, σ within [e⁻²⁰, e²]."""
        output = self.actor(self.obs_norm(obs))
        if self.discrete:
            return (output.log_softmax(-1),)
        mean, log_std = output.chunk(2, -1)
        return mean, log_std.clamp(-20, 2)

    def logprobs(self, obs: Tensor, actions: Tensor) -> Tensor:
        """log π(a|s), or log N(u; μ, σ²) = −½ Σ_d ((u_d − μ_d)/σ_d)² − Σ_d log(σ_d √(2π)), (...)."""
        if self.discrete:
            return self.distribution(obs)[0].gather(-1, actions.unsqueeze(-1)).squeeze(-1)
        mean, log_std = self.distribution(obs)
        z = (actions - mean) * (-log_std).exp()
        return -0.5 * (z.square() + math.log(2 * math.pi)).sum(-1) - log_std.sum(-1)

    def q_values(self, obs: Tensor, actions: Tensor, critic: nn.Module) -> Tensor:
        """Q(s, a), (...), of the critic or its target; for each state there may be several u (K, ...)."""
        obs = self.obs_norm(obs)
        if self.discrete:
            return critic(obs).gather(-1, actions.unsqueeze(-1)).squeeze(-1)
        obs = obs.expand(*actions.shape[:-1], obs.shape[-1])
        return critic(torch.cat([obs, actions.tanh()], -1)).squeeze(-1)

    def noise(self, *shape: int) -> np.ndarray:
        """Gumbel noise n = −log E, E ~ Exp(1): argmax_a (z_a + n_a) samples π; or n ~ N(0, 1) for μ + σ n."""
        noise = torch.empty(*shape, self.action_dim)  # drawn on the CPU, whatever the device
        return (-noise.exponential_().log() if self.discrete else noise.normal_()).numpy()

    @torch.no_grad()
    def act(self, obs: Tensor, noise: Tensor) -> Tensor:
        """As the act of in_numpy without squash, on the agent's device."""
        if self.discrete:
            return (self.distribution(obs)[0] + noise).argmax(-1)
        mean, log_std = self.distribution(obs)
        return mean + log_std.exp() * noise

    def in_numpy(self, squash: bool = True):
        """Returns act(obs, noise), valid until an update: u, or tanh(u) if squash, in NumPy (change both)."""
        w1, b1, w2, b2, w3, b3, *norm = to_numpy(*self.actor.parameters(), *[*self.obs_norm.buffers()][-2:])

        def act(obs, noise):  # (N, obs_dim) to (N,) if Discrete, else to (N, action_dim)
            x = ((obs - norm[0]) * norm[1]).clip(-10, 10) if norm else obs
            output = np.maximum(np.maximum(x @ w1.T + b1, 0) @ w2.T + b2, 0) @ w3.T + b3
            if self.discrete:
                return (output + noise).argmax(-1)
            mean, log_std = np.split(output, 2, -1)
            u = mean + np.exp(log_std.clip(-20, 2)) * noise
            return np.tanh(u) if squash else u

        return act


def log_slope(u: Tensor) -> Tensor:
    """log Π_d tanh'(u_d) = Σ_d 2 (log 2 − u_d − log(1 + e^(−2 u_d))): log π(a|s) is log N(u) minus this."""
    return 2 * (math.log(2) - u - nn.functional.softplus(-2 * u)).sum(-1)


def n_step_rows(queues, starts, taken, rewards, next_obs, terminated, dones, n: int, gamma: float) -> list:
    """Finished rows (*taken_t, r_t + γ r_{t+1} + ... + γ^(n−1) r_{t+n−1}, s_{t+n}, γ^n (1 − terminated)).

    The queue of an environment keeps the steps that wait for later rewards; at an episode's end n is what is
    left of it.
    """
    rows = []
    for i, queue in enumerate(queues):
        if starts[i]:  # a checkpoint cut the last episode
            queue.clear()
        queue.append((*(x[i] for x in taken), rewards[i]))
        while queue and (len(queue) == n or dones[i]):
            total = sum(gamma**k * reward for k, (*_, reward) in enumerate(queue))
            discount = gamma ** len(queue) * (not terminated[i])
            rows.append((*queue.pop(0)[:-1], total, next_obs[i], discount))
    return rows


def q_targets(rewards: Tensor, discounts: Tensor, next_values: Tensor) -> Tensor:
    """y = r + γ^n (1 − terminated) V(s'), all (B,), as `n_step_rows` has them; a time limit ends no task."""
    assert rewards.shape == discounts.shape == next_values.shape
    return rewards + discounts * next_values


def exact_loss(logprobs: Tensor, q_values: Tensor) -> Tensor:
    """−mean Σ_a π(a|s) Q(s, a), (B, A): its gradient is the expectation of that of `score_loss`."""
    assert logprobs.shape == q_values.shape
    return -(logprobs.exp() * q_values.detach()).sum(-1).mean()


def score_loss(logprobs: Tensor, q_values: Tensor) -> Tensor:
    """−mean log π(a_k|s) (Q(s, a_k) − b_k), (K, B), a_k ~ π(·|s); b_k is the mean Q of the other draws."""
    assert logprobs.shape == q_values.shape
    others = len(q_values) - 1  # which do not depend on a_k: the gradient stays unbiased
    baselines = (q_values.sum(0) - q_values) / others if others else torch.zeros_like(q_values)
    return -(logprobs * (q_values - baselines).detach()).mean()


def importance_loss(logratio: Tensor, advantages: Tensor) -> Tensor:
    """−mean ρ A, ρ = π/β = exp(logratio), (B,), a ~ β: minus its gradient is mean ρ ∇log π A (Degris)."""
    assert logratio.shape == advantages.shape
    return -(logratio.exp() * advantages.detach()).mean()


def expected_values(agent: Agent, critic: nn.Module, obs: Tensor, noise: Tensor) -> Tensor:
    """E_{a ~ π(·|s)} Q(s, a), (B,): exact if Discrete, else the mean over draws, noise (K, B, action_dim)."""
    if agent.discrete:
        return (agent.distribution(obs)[0].exp() * critic(agent.obs_norm(obs))).sum(-1)
    mean, log_std = agent.distribution(obs)
    return agent.q_values(obs, mean + log_std.exp() * noise, critic).mean(0)


def q_loss(agent: Agent, obs, actions, rewards, next_obs, discounts, noise) -> tuple[Tensor, list]:
    """mean (Q(s, a) − y)² over a batch of transitions, and what to log."""
    with torch.no_grad():
        next_values = expected_values(agent, agent.target_critic, next_obs, noise)
        targets = q_targets(rewards, discounts, next_values)
    q_values = agent.q_values(obs, actions, agent.critic)
    assert q_values.shape == targets.shape
    loss = nn.functional.mse_loss(q_values, targets)
    return loss, [loss, q_values.mean()]


def policy_loss(agent, obs, actions, behaviour_logprobs, noise, actor_update, ent_coef) -> tuple:
    """The loss of the chosen kind − ent_coef H, and what to log; rows (B, ...), noise (K, B, action_dim)."""
    if agent.discrete:
        (logprobs,) = agent.distribution(obs)
        entropy = -(logprobs.exp() * logprobs).sum(-1).mean()
    else:
        mean, log_std = agent.distribution(obs)
        u = mean + log_std.exp() * noise
        entropy = (log_slope(u) - agent.logprobs(obs, u)).mean()
    if actor_update == "reparameterized":
        loss = -agent.q_values(obs, u, agent.critic).mean()
    elif actor_update == "importance":
        with torch.no_grad():
            values = expected_values(agent, agent.critic, obs, noise)
            advantages = agent.q_values(obs, actions, agent.critic) - values
        loss = importance_loss(agent.logprobs(obs, actions) - behaviour_logprobs, advantages)
    elif agent.discrete:
        loss = exact_loss(logprobs, agent.critic(agent.obs_norm(obs)))
    else:
        u = u.detach()
        loss = score_loss(agent.logprobs(obs, u), agent.q_values(obs, u, agent.critic))
    return loss - ent_coef * entropy, [loss, entropy]


def flat_gradient(loss: Tensor, metrics: list, params: list, max_norm: float) -> tuple[Tensor, Tensor]:
    """The gradient as one vector, scaled down to max_norm if longer; metrics and its norm as another."""
    grad = torch.cat([x.flatten() for x in torch.autograd.grad(loss, params)])
    metrics = torch.stack([x.detach() for x in (*metrics, grad.norm())])
    return grad * (max_norm / (metrics[-1] + 1e-6)).clamp(max=1), metrics


def replayed(function):
    """Returns function(*inputs) -> Tensor, which call 4 records as a CUDA graph: one launch replays it.

    A replay runs no Python: what changes has to be an input, or a tensor that is changed in place.
    """
    graph, calls, held, output = torch.cuda.CUDAGraph(), 0, [], None

    def replay(*inputs):
        nonlocal calls, held, output
        calls += 1
        held = held or [torch.as_tensor(x).to("cuda", copy=True) for x in inputs]  # the graph's addresses
        for x, new in zip(held, inputs, strict=True):
            if isinstance(new, float):
                x.fill_(new)
            else:
                x.copy_(torch.as_tensor(new))
        if calls < 4:  # compiles, and makes the optimizers' state
            return function(*held)
        if calls == 4:
            with torch.cuda.graph(graph):  # records, and computes nothing
                output = function(*held)
        graph.replay()
        return output.clone()  # the next replay overwrites it

    return replay


class ReplayBuffer:
    """The last `capacity` transitions, one a row of a single tensor: a batch is then a single gather."""

    def __init__(self, capacity: int, widths: list[int], device: torch.device) -> None:
        self.widths = widths  # of the columns, which are (B, width)
        self.count = 0
        try:
            self.rows = torch.empty(capacity, sum(widths), device=device)
        except RuntimeError:
            fail(f"--buffer-size {capacity} needs {4e-9 * capacity * sum(widths):,.1f} GB on {device}")

    def add(self, *columns: np.ndarray) -> None:
        """Appends N transitions, columns (N, ...); the oldest ones make room."""
        rows = np.concatenate([x.reshape(len(x), -1) for x in columns], 1, dtype=np.float32)
        while len(rows):  # a ring: up to its end, then on from its start
            begin = self.count % len(self.rows)
            part, rows = np.split(rows, [len(self.rows) - begin])
            self.rows[begin : begin + len(part)] = torch.from_numpy(part)
            self.count += len(part)

    def draw(self, batch_size: int) -> Tensor:
        """The row numbers of a batch, drawn uniformly, with replacement."""
        return torch.randint(min(self.count, len(self.rows)), (batch_size,))

    def batch(self, index: Tensor) -> tuple[Tensor, ...]:
        """The columns of these rows."""
        return self.rows.index_select(0, index.to(self.rows.device)).split(self.widths, 1)

    def state_dict(self) -> dict:
        return {"count": self.count, "rows": self.rows[: self.count].clone()}  # what was filled

    def load_state_dict(self, state: dict) -> None:
        self.count = state["count"]
        self.rows[: self.count] = state["rows"]


METRICS = (  # in the order in which `train` has their values
    "losses/q_loss", "losses/q_values", "losses/q_grad_norm", "losses/policy_loss", "losses/entropy",
    "losses/grad_norm",
)  # fmt: skip


def train(args: Args) -> dict[str, float]:
    """Runs off-policy actor-critic; returns the last value of each metric, the evaluation among them."""
    device = set_up(args)
    with Run() as run:
        envs = Envs(run, args, args.num_envs)
        if envs.discrete and args.actor_update == "reparameterized":
            fail(f"--actor-update reparameterized needs a Box of actions; {args.env_id} has Discrete ones")
        agent = Agent(envs, args).to(device)
        return_norm = RunningNorm().to(device)
        params, critic_params = list(agent.actor.parameters()), list(agent.critic.parameters())
        flat, critic_flat = flatten(params), flatten(critic_params)  # parameters are views of them
        target_critic = flatten(list(agent.target_critic.parameters()))
        optimizer = torch.optim.Adam([flat], lr=args.learning_rate)
        critic_optimizer = torch.optim.Adam([critic_flat], lr=args.q_learning_rate)
        action_width = 1 if envs.discrete else envs.action_dim
        buffer = ReplayBuffer(args.buffer_size, [envs.obs_dim, action_width, 1, 1, envs.obs_dim, 1], device)
        optimizers = {"optimizer": optimizer, "critic_optimizer": critic_optimizer}
        run.start(args, envs, agent=agent, return_norm=return_norm, buffer=buffer, **optimizers)
        if not envs.discrete and not envs.bounded:
            say("actions stay within 2 of the one bound that they have, or in [-1, 1] if they have none")
        if args.learning_starts > args.total_timesteps:
            say("nothing will be learnt: --learning-starts is not reached")

        def critic_gradient(*batch: Tensor) -> tuple[Tensor, Tensor]:
            return flat_gradient(*q_loss(agent, *batch), critic_params, args.max_grad_norm)

        def gradient(*batch: Tensor) -> tuple[Tensor, Tensor]:
            loss, metrics = policy_loss(agent, *batch, args.actor_update, args.ent_coef)
            return flat_gradient(loss, metrics, params, args.max_grad_norm)

        if args.compile:
            torch._dynamo.config.trace_autograd_ops = True  # otherwise autograd.grad cuts the graph in two
            gradient, critic_gradient = torch.compile(gradient), torch.compile(critic_gradient)

        def update(index: Tensor, noises: Tensor, learning_rate, q_learning_rate) -> Tensor:
            # 3. a batch: these rows
            optimizer.param_groups[0]["lr"] = learning_rate + 1e-30  # never 0: unfused Adam divides by it
            critic_optimizer.param_groups[0]["lr"] = q_learning_rate + 1e-30
            obs, actions, logprobs, rewards, next_obs, discounts = buffer.batch(index)
            rewards, discounts = rewards[:, 0] * return_norm.scale, discounts[:, 0]
            actions = actions[:, 0].long() if envs.discrete else actions
            noises = noises.to(device)

            # 4. the critic's step
            batch = obs, actions, rewards, next_obs, discounts, noises[0]
            critic_flat.grad, critic_metrics = critic_gradient(*batch)
            critic_optimizer.step()

            # 5. the actor's step
            flat.grad, actor_metrics = gradient(obs, actions, logprobs[:, 0], noises[1])
            optimizer.step()

            # 6. the target follows
            target_critic.data.lerp_(critic_flat.data, args.tau)
            return torch.cat([critic_metrics, actor_metrics])

        graphs = args.compile and flat.is_cuda
        for adam in optimizers.values():  # a checkpoint overwrites it; on a GPU, fused is slow for one vector
            adam.param_groups[0].update(fused=not graphs, capturable=graphs)
        if graphs:
            torch.cuda.set_device(flat.device)
            update, act = replayed(update), replayed(agent.act)

        queues = [[] for _ in range(args.num_envs)]
        while run.step < args.total_timesteps and not run.signal:
            # 1. anneal the learning rates
            left = 1 - args.anneal_lr * run.step / args.total_timesteps
            learning_rates = left * args.learning_rate, left * args.q_learning_rate

            # 2. act and store
            obs, starts = envs.obs, [length == 0 for _, length, _ in envs.episodes]
            noise = agent.noise(args.num_envs)
            actions = act(obs, noise).cpu().numpy() if graphs else agent.in_numpy(squash=False)(obs, noise)
            behaviour_logprobs = np.zeros(args.num_envs)
            if args.actor_update == "importance":
                with torch.no_grad():
                    behaviour = [torch.from_numpy(x).to(device) for x in (obs, actions)]
                    behaviour_logprobs = agent.logprobs(*behaviour).cpu().numpy()
            *stepped, discounted_returns = envs.step(actions if envs.discrete else np.tanh(actions))
            taken = obs, actions, behaviour_logprobs
            if rows := n_step_rows(queues, starts, taken, *stepped, args.lookahead, args.gamma):
                buffer.add(*map(np.array, zip(*rows, strict=True)))
            if args.normalize_obs:
                agent.obs_norm.update(torch.from_numpy(obs).to(device), left)
            if args.normalize_rewards:
                return_norm.update(torch.from_numpy(discounted_returns).to(device))

            # 3. to 6. update
            metrics = []
            for _ in range(args.num_updates if buffer.count >= args.learning_starts else 0):
                index = buffer.draw(args.batch_size)
                noises = torch.randn(2, args.num_samples, args.batch_size, envs.action_dim)
                metrics.append(update(index, noises, *learning_rates))

            # 7. log, evaluate, save
            run.end_iteration(METRICS, metrics, learning_rates[0], args.log_interval)
        return run.finish()


# ------------------------------------------------------------------------------------------------------------
# Below: tools, the same text in every script
SCRIPT = Path(globals().get("__file__", "notebook")).stem
LONGEST = 100_000  # steps of an episode that has to end


class RunningNorm(nn.Module):
    """(x − mean) / √(var + 1e-8), clipped to ±10, with running moments of rows; x − mean for var 0."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.count, self.mean64, self.var = (nn.Buffer(torch.zeros(shape).double()) for _ in range(3))
        self.mean, self.scale = nn.Buffer(torch.zeros(shape)), nn.Buffer(torch.ones(shape))

    def update(self, x: Tensor, pace: float = 1.0) -> None:
        """Merges rows x (..., *shape) into the moments (Chan et al. 1979, eq. 2.1), at the weight `pace`."""
        x = x.reshape(-1, *self.mean.shape).double()
        var, mean = torch.var_mean(x, 0, correction=0)
        self.count += len(x)
        weight = pace * len(x) / self.count
        self.var.lerp_(var + (1 - weight) * (mean - self.mean64) ** 2, weight)
        self.mean64.lerp_(mean, weight)
        self.mean.copy_(self.mean64)
        self.scale.copy_(torch.where(self.var > 0, (self.var + 1e-8).rsqrt(), 1))

    def forward(self, x: Tensor) -> Tensor:
        return ((x - self.mean) * self.scale).clamp(-10, 10)


def flatten(params: list[nn.Parameter]) -> nn.Parameter:
    """One vector of which the parameters become views: an optimizer's step is then one kernel."""
    flat = nn.Parameter(nn.utils.parameters_to_vector(params).detach())
    nn.utils.vector_to_parameters(flat.data, params)
    return flat


def to_numpy(*tensors: Tensor) -> list[np.ndarray]:
    """As arrays; from a GPU they come over in one transfer, on the CPU they are views."""
    if tensors[0].is_cuda:
        parts = torch.cat([x.detach().ravel() for x in tensors]).cpu().split([x.numel() for x in tensors])
        tensors = [part.view(x.shape) for part, x in zip(parts, tensors, strict=True)]
    return [x.detach().numpy() for x in tensors]


def say(line, stream="stdout"):
    """Prints; that the reader went away or the disk is full does not end the training."""
    try:
        print(line, file=getattr(sys, stream), flush=True)
    except (OSError, ValueError):
        setattr(sys, stream, None)


def fail(sentence, status=2):
    """Exits; status 2 is for bad input, 1 for a run that went wrong."""
    say(f"{SCRIPT}: {' '.join(sentence.splitlines())[:2000]}", "stderr")
    raise SystemExit(status)


def check_ranges(args):
    """Raises ValueError for the first number that is out of its flag's range."""
    for name, field in args.__dataclass_fields__.items():
        most = {"gamma": 1, "gae_lambda": 1, "hidden_size": 10_000}.get(name, 2**31 - 1)
        least = field.type is int and not name.endswith(("seed", "_every", "_episodes", "_episode_steps"))
        least = {"log_std_init": -100, "max_grad_norm": 1e-6}.get(name, int(least))
        value = getattr(args, name)
        if type(value) not in (str, bool, int, float):  # no other number can be read from a checkpoint
            raise ValueError(f"--{name.replace('_', '-')} must be a plain number or text, not {value!r}")
        if not isinstance(value, str) and not least <= value <= most:
            raise ValueError(f"--{name.replace('_', '-')} must be from {least} to {most}, not {value}")


def set_up(args):
    """Returns the device; sets the threads and the seed of PyTorch, whose CPU generator draws all noise."""
    device = args.device.replace("auto", "cuda" if torch.cuda.is_available() else "cpu")
    compiled = vars(args).get("compile", False)
    try:
        (torch.compile(torch.neg) if compiled else torch.neg)(torch.zeros(1, device=device)).item()
    except Exception as error:
        fail(f"--device {device}{' --compile' * compiled} does not work here: {error}")
    torch.set_num_threads(args.num_threads)
    torch.manual_seed(args.seed)
    return torch.device(device)


class Envs:
    """N copies of an environment, with flat observations, and actions whose bounds are ±1.

    A copy that ended restarts at once: `obs` (N, obs_dim) is what to act on next, `step` returns the true
    successors. `steps` counts those of all copies; `ended` lists (step, return, length) of episodes.
    """

    def __init__(self, stack, args, num_envs, first=0):
        self.name, self.gamma, self.steps, self.ended = args.env_id, args.gamma, 0, []
        self.first = first  # of these copies among those of several processes
        self.cwd = Path.cwd()  # until an environment changes it
        options = {"max_episode_steps": args.max_episode_steps or None, "disable_env_checker": True}
        try:
            self.envs = [stack.enter_context(gym.make(self.name, **options)) for _ in range(num_envs)]
        except (gym.error.Error, ImportError) as error:
            fail(f"--env-id {self.name}: {error}")
        self.obs_space, self.space = self.envs[0].observation_space, self.envs[0].action_space
        self.one_hot, self.discrete = isinstance(self.obs_space, Discrete), isinstance(self.space, Discrete)
        floats = isinstance(self.space, Box) and self.space.dtype.kind == "f"
        if not (self.one_hot or isinstance(self.obs_space, Box)) or not (self.discrete or floats):
            known = "Box or Discrete observations, Discrete actions (not in ddpg.py) or a Box of floats"
            fail(f"{known} are known; {self.name} has actions {self.space}, observations {self.obs_space}")
        self.obs_dim, self.action_dim = flatdim(self.obs_space), flatdim(self.space)
        if floats:
            low, high = self.space.low, self.space.high
            most = min(float(np.finfo(low.dtype).max), 1e30)  # from here on: no bound
            self.bounded = np.maximum(-low, high).max(initial=0) < most
            low = np.where(-low < most, low, np.where(high < most, high - 2, -1))
            high = np.where(high < most, high, low + 2)
            self.scale, self.shift = high / 2 - low / 2, high / 2 + low / 2

    def row(self, obs):
        """An observation as (obs_dim,): a Box flattened, a Discrete one-hot."""
        obs = np.asarray(obs)
        state = obs.item() - int(self.obs_space.start) if self.one_hot and obs.size == 1 else 0
        if obs.shape != self.obs_space.shape or (self.one_hot and state not in range(self.obs_dim)):
            what = obs if obs.shape == self.obs_space.shape else f"of shape {obs.shape}"
            fail(f"{self.name} returned an observation {what} for {self.obs_space}", 1)
        return np.arange(self.obs_dim) == state if self.one_hot else obs.ravel()

    def reset(self, *stream):
        """Starts new episodes, with seeds below 2³¹ that are made of the numbers in `stream`."""
        seeds = np.random.SeedSequence(stream).generate_state(self.first + len(self.envs))[self.first :] >> 1
        random.seed(int(seeds[0]))  # for environments that draw from these two
        np.random.seed(seeds[0])
        obs = [self.row(env.reset(seed=int(seed))[0]) for env, seed in zip(self.envs, seeds, strict=True)]
        self.obs = np.array(obs, np.float32)
        self.episodes = [(0.0, 0, 0.0)] * len(self.envs)  # return, length, r_t + γ r_{t-1} + γ² r_{t-2} + ...

    def step(self, actions, running=None):
        """Returns rewards (0 for copies not `running`), successors, terminated, dones, discounted returns."""
        if self.discrete:
            actions = actions + self.space.start
        else:
            if not np.isfinite(actions).all():
                fail(f"an observation, or an action of the policy, is not finite at step {self.steps:,}", 1)
            actions = actions.reshape(-1, *self.space.shape) * self.scale + self.shift
            actions = actions.clip(self.space.low, self.space.high)
        actions, next_obs = actions.astype(self.space.dtype), self.obs.copy()
        rewards, discounted_returns = np.zeros((2, len(self.envs)), np.float32)
        terminated, dones = np.zeros((2, len(self.envs)), bool)
        copies = range(len(self.envs)) if running is None else np.flatnonzero(running)
        self.steps += len(copies)
        for i in copies:
            action = actions[i] if self.discrete else actions[i, ...]  # an array, even of shape ()
            obs, reward, ended, truncated, _ = self.envs[i].step(action)
            next_obs[i], reward = self.row(obs), float(np.asarray(reward).item())
            total, length, discounted = self.episodes[i]
            self.episodes[i] = total + reward, length + 1, reward + self.gamma * discounted
            rewards[i], discounted_returns[i] = reward, self.episodes[i][2]
            terminated[i], dones[i] = bool(ended), bool(ended or truncated)
        found = {"an observation": (self.obs, next_obs), "a reward": rewards}
        if broken := [what for what, x in found.items() if not np.isfinite(x).all()]:
            fail(f"{self.name} returned {broken[0]} that is not finite at step {self.steps:,}", 1)
        self.obs = next_obs.copy()
        for i in dones.nonzero()[0]:
            self.ended.append((self.steps, *self.episodes[i][:2]))
            self.obs[i], self.episodes[i] = self.row(self.envs[i].reset()[0]), (0.0, 0, 0.0)
        return rewards, next_obs, terminated, dones, discounted_returns


class Run(ExitStack):
    """A run's directory, curves, checkpoint, evaluations and signals; closes what was opened."""

    def start(self, args, envs, **parts):
        """Begins in a new directory, or goes on from a checkpoint, which holds the state of all `parts`."""
        self.args, self.envs, self.parts, self.metrics, self.pending = args, envs, parts, {}, []
        self.step = self.iteration = self.signal = 0
        self.pid = os.getpid()
        name = time.strftime(f"seed{args.seed}__%Y-%m-%d_%H-%M-%S_{time.time_ns() % 10**9:09d}")
        self.dir = Path(args.run_dir or f"runs/{args.env_id}/{SCRIPT}/{name}")
        folder = envs.cwd / self.dir
        self.path = folder / "checkpoint.pt"
        if args.resume and not args.run_dir:
            fail("--resume needs --run-dir, the run to continue")
        try:
            folder.mkdir(parents=True, exist_ok=bool(args.run_dir))
            if not os.access(folder, os.W_OK):
                raise PermissionError("it cannot be written")
            if any(folder.iterdir()) and not args.resume:
                raise FileExistsError("it is not empty; --resume continues its run")
            if self.path.exists():
                self.load()
            self.writer = self.enter_context(SummaryWriter(folder, purge_step=self.step + 1))
        except Exception as error:
            fail(f"--run-dir {self.dir} cannot be used: {type(error).__name__} {error}")
        self.writer.add_text("flags", "\n".join(f"    {flag} {value}" for flag, value in vars(args).items()))
        with suppress(ValueError):  # only the main thread can set handlers
            for signum in (signal.SIGINT, signal.SIGTERM):
                self.callback(signal.signal, signum, signal.signal(signum, self.on_signal))
        self.push(self.on_error)
        envs.steps = self.first_step = self.logged = self.step
        envs.reset(args.seed, 0, self.iteration)
        self.clock = time.perf_counter()
        say(f"{SCRIPT} on {args.env_id}, from step {self.step:,}, in {self.dir}")

    def on_signal(self, signum, _):
        """The first signal ends the run after this iteration; a second one kills the process."""
        self.signal = signum
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if os.getpid() != self.pid:  # an environment's process, forked from this one, ends
            os.kill(os.getpid(), signum)
        with suppress(OSError, ValueError, AttributeError):  # print() cannot be interrupted by itself
            os.write(sys.stdout.fileno(), b"stopping after this iteration; once more: at once\n")

    def on_error(self, _, error, __):
        """Says where it happened; once a signal has come, which ends environments' processes too, saves."""
        if isinstance(error, Exception):
            error.add_note(f"{self.args.env_id}, after step {self.envs.steps:,}")
            if self.signal:
                self.finish()
        if isinstance(error, SystemExit) and not error.code:
            fail(f"{self.args.env_id} ended the process after step {self.envs.steps:,}", 1)

    def load(self):
        """Takes everything from the checkpoint, or raises what is wrong with it."""
        saved = torch.load(self.path, map_location="cpu", weights_only=True)
        differing = vars(self.args).items() ^ saved["args"].items()  # of which only four may differ
        if changed := {flag for flag, _ in differing} - {"device", "num_threads", "run_dir", "resume"}:
            raise ValueError(f"it was begun with other values of {', '.join(sorted(changed))}")
        for name, part in self.parts.items():
            part.load_state_dict(saved[name])
        self.step, self.iteration = saved["step"], saved["iteration"]
        torch.set_rng_state(saved["rng"])

    def save(self):
        """A kill at any moment leaves a whole checkpoint: the old one, or this."""
        self.writer.flush()  # a resumed run drops the events after this step, and needs those before it
        state = {"script": SCRIPT, "args": vars(self.args), "step": self.step, "iteration": self.iteration}
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        with open(self.path.with_suffix(".tmp"), "wb") as file:
            torch.save(state | parts | {"rng": torch.get_rng_state()}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, self.path)

    def log(self, step, metrics):
        """Adds a point to each curve; the x axis is the number of environment steps."""
        self.metrics |= metrics
        points = [Summary.Value(tag=tag, simple_value=value) for tag, value in metrics.items()]
        self.writer.file_writer.add_summary(Summary(value=points), step)

    def end_iteration(self, tags, rows, learning_rate, log_interval=1):
        """Counts steps; every log_interval of them logs the mean row, evaluates and saves if it is time."""
        args, before = self.args, self.logged
        self.step, self.iteration = self.envs.steps, self.iteration + 1
        self.pending += rows
        left = max(0, args.total_timesteps - self.step)
        if left and not self.signal and self.step < before + log_interval:
            return
        values = torch.stack(self.pending).mean(0).tolist() if self.pending else []
        means = dict(zip(tags, values, strict=bool(values)))
        if broken := [tag for tag, value in means.items() if not math.isfinite(value)]:
            fail(f"{broken[0]} is not finite at step {self.step:,}; the last checkpoint stays as it was", 1)
        for step, episodic_return, length in self.envs.ended:
            self.log(step, {"charts/episodic_return": episodic_return, "charts/episodic_length": length})
        speed = (self.step - self.first_step) / (time.perf_counter() - self.clock)
        self.log(self.step, means | {"charts/learning_rate": learning_rate, "charts/SPS": speed})
        self.envs.ended, self.pending, self.logged = [], [], self.step
        if 10 * self.step // args.total_timesteps > 10 * before // args.total_timesteps:
            done = min(1, self.step / args.total_timesteps)
            line = f"{done:4.0%}  step {self.step:,}  {speed:,.0f} steps/s  {left / speed:,.0f} s left"
            say(f"{line}  return {self.metrics.get('charts/episodic_return', math.nan):.1f}")
        if left and args.eval_every and self.step // args.eval_every > before // args.eval_every:
            self.evaluate()
        if args.checkpoint_every and self.step // args.checkpoint_every > before // args.checkpoint_every:
            self.save()
            self.envs.reset(args.seed, 0, self.iteration)  # as a resumed run does: no env has to be saved

    def evaluate(self):
        """Logs the mean return and length of greedy episodes, in an environment of their own."""
        if not self.args.eval_episodes or self.signal:
            return
        with ExitStack() as stack:
            stack.callback(random.setstate, random.getstate())  # of which the environment may draw
            stack.callback(np.random.set_state, np.random.get_state())
            stack.callback(torch.set_rng_state, torch.get_rng_state())
            envs = Envs(stack, self.args, 1)
            envs.reset(self.args.seed, 1)
            act = self.parts["agent"].in_numpy()
            while len(envs.ended) < self.args.eval_episodes and envs.episodes[0][1] < LONGEST:
                envs.step(act(envs.obs, 0))
                if self.signal:
                    return
        cut = [(0, *episode[:2]) for episode in envs.episodes if episode[1] == LONGEST]
        _, value, length = np.mean(envs.ended + cut, 0).tolist()
        self.log(self.step, {"eval/episodic_return": value, "eval/episodic_length": length})
        hint = f", the last cut after {LONGEST:,} steps: see --max-episode-steps" if cut else ""
        say(f"evaluated return {value:.1f} over {len(envs.ended + cut)} episodes{hint}")

    def finish(self):
        """Saves, evaluates, and returns the last value of each metric."""
        self.save()
        self.evaluate()
        if self.signal:
            again = f"--run-dir {shlex.quote(str(self.dir))} --resume"
            fail(f"stopped at step {self.step:,}; add {again} to continue", 128 + self.signal)
        say(f"tensorboard --logdir {shlex.quote(self.args.run_dir or 'runs')}")
        return self.metrics


if __name__ == "__main__":
    with suppress(AttributeError):  # if closed, or a notebook's
        sys.stdout.reconfigure(errors="replace")  # Greek letters, where the terminal has none
    train(tyro.cli(Args, description=__doc__))

# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "gymnasium[classic-control,mujoco]==1.4.0", "mujoco==3.8.1",
#   "numpy==2.4.6", "tyro==1.0.17", "tensorboard==2.21.0"]
# ///
