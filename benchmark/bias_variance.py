"""Bias and variance of the policy gradient under each advantage of actor_critic.py, measured on CartPole-v1.

    python -m benchmark.bias_variance

A policy is trained for a while and then held. Each of many rollouts gives one estimate of the gradient for
each kind of advantage. Their mean is compared with that of Monte Carlo, which no critic biases: a rollout is
twice as long as the part of it that is weighted, so that its episodes are over before the cut. Squared bias
and variance (summed over the parameters) are given in units of the squared length of the true gradient, and
for two critics: that of the training, and one that was fitted to many rollouts of the policy that is held.
"""

import json
import platform
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro
from torch import Tensor
from tqdm import tqdm

import actor_critic as ac

LOOKAHEADS = (1, 4, 8, 16, 32, 64)
LAMBDAS = (0.0, 0.8, 0.9, 0.95, 0.98, 0.99, 1.0)
FLOOR = 1e-4  # a squared bias below this is drawn here: it may be noise


@dataclass(frozen=True)
class Args:
    """What is measured."""

    env_id: str = "CartPole-v1"  # its episodes must be short under the policy that is held
    train_steps: int = 8_000  # environment steps of the training before
    rollouts: int = 1000  # gradient estimates of each kind
    num_envs: int = 8  # environments of a rollout
    num_steps: int = 256  # steps of each that are weighted; as many follow
    fit_steps: int = 2000  # of the second critic
    gamma: float = 0.99  # discount γ
    out: str = "benchmark/results/bias_variance"  # .json and .png


def gradient(agent: ac.Agent, obs: Tensor, actions: Tensor, advantages: Tensor) -> np.ndarray:
    """One estimate of ∇J, as a long vector."""
    loss, _ = ac.actor_loss(agent, obs, actions, advantages, ent_coef=0.0)
    params = [x for name, x in agent.named_parameters() if not name.startswith("critic")]
    return -torch.cat([x.flatten() for x in torch.autograd.grad(loss, params)]).numpy()


def summary(estimates: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """Squared bias against the mean of `reference`, and variance, summed over the parameters; both (K, P).

    ‖mean difference‖² counts its own noise as bias; that much, variance / K, is taken off again.
    """
    differences = estimates - reference
    noise = differences.var(0, ddof=1).sum() / len(differences)
    return float((differences.mean(0) ** 2).sum() - noise), float(estimates.var(0, ddof=1).sum())


class Sampler:
    """Rollouts of the policy that is held, as what the estimators need."""

    def __init__(self, args: Args, agent: ac.Agent, envs: ac.Envs) -> None:
        self.agent, self.num_steps, self.envs = agent, args.num_steps, envs
        envs.reset(1, 0, 0)

    def __call__(self) -> tuple[Tensor, Tensor, Callable]:
        """obs, actions; arrays(agent): rewards, V(s_t), V(s'_t), terminated, dones, by its critic."""
        act, steps = self.agent.in_numpy(), []
        for noise in self.agent.noise(2 * self.num_steps, len(self.envs.envs)):
            obs = self.envs.obs
            actions = act(obs, noise)
            steps.append((obs, actions, *self.envs.step(actions)[:4]))
        obs, actions, rewards, next_obs, terminated, dones = (
            torch.from_numpy(np.array(x)) for x in zip(*steps, strict=True)
        )

        def arrays(agent: ac.Agent) -> tuple[Tensor, ...]:
            with torch.no_grad():
                values, next_values = agent.value(torch.stack([obs, next_obs]))
            return rewards, values, next_values, terminated, dones

        return obs, actions, arrays


def fit(agent: ac.Agent, batches: list, args: Args, epochs: int) -> None:
    """Fits the critic to Monte Carlo returns, with a step of Adam on one batch after the other."""
    optimizer = torch.optim.Adam(agent.critic.parameters(), lr=ac.Args.critic_learning_rate, eps=1e-5)
    for epoch in range(epochs):
        obs, _, arrays = batches[epoch % len(batches)]
        inputs = arrays(agent)
        optimizer.zero_grad()
        ac.critic_loss(agent, obs, inputs[1] + ac.gae(*inputs, args.gamma, 1.0)).backward()
        optimizer.step()


def measure(args: Args) -> dict:
    """(squared bias, variance) over ‖∇J‖² of each estimator with each critic; what these are."""
    with tempfile.TemporaryDirectory() as directory:
        run = {"total_timesteps": args.train_steps, "run_dir": directory, "eval_episodes": 0}
        ac.train(ac.Args(env_id=args.env_id, **run))
        saved = torch.load(Path(directory, "checkpoint.pt"), weights_only=True)
    flags = ac.Args(env_id=args.env_id, gamma=args.gamma)
    stack = ExitStack()
    envs = ac.Envs(stack, flags, args.num_envs)
    agent = ac.Agent(envs, flags)
    agent.load_state_dict(saved["agent"])
    sample, poor, good = Sampler(args, agent, envs), agent, deepcopy(agent)
    fit(good, [sample() for _ in range(20)], args, args.fit_steps)
    critics = {"as it is in training": poor, "fitted to 20 rollouts": good}

    n_steps = {f"n = {n}": replace(flags, advantage="n_step", lookahead=n) for n in LOOKAHEADS}
    gaes = {f"λ = {x:g}": replace(flags, advantage="gae", gae_lambda=x) for x in LAMBDAS}
    estimates = {critic: {name: [] for name in n_steps | gaes} for critic in critics}
    explained = {critic: [] for critic in critics}
    for _ in tqdm(range(args.rollouts)):
        obs, actions, arrays = sample()
        for critic, critic_agent in critics.items():
            inputs = arrays(critic_agent)
            for name, kind in (n_steps | gaes).items():
                advantages = ac.advantage_estimates(*inputs, args=kind)
                part = (x[: args.num_steps] for x in (obs, actions, advantages))
                estimates[critic][name].append(gradient(agent, *part))
            advantages = ac.gae(*inputs, args.gamma, 1.0)[: args.num_steps]
            returns = inputs[1][: args.num_steps] + advantages
            explained[critic].append(float(1 - advantages.var(correction=0) / returns.var(correction=0)))

    lengths = [length for _, _, length in envs.ended]
    stack.close()
    truth = np.array(estimates["fitted to 20 rollouts"]["λ = 1"])
    noise = truth.var(0, ddof=1).sum() / len(truth)
    length = float((truth.mean(0) ** 2).sum() - noise)
    tables = {
        critic: {name: [x / length for x in summary(np.array(rows), truth)] for name, rows in table.items()}
        for critic, table in estimates.items()
    }
    return {
        "episode_length": float(np.mean(lengths)),
        "longest_episode": int(max(lengths)),
        "explained_variance": {critic: float(np.mean(x)) for critic, x in explained.items()},
        "critics": tables,
    }


def draw(figures: dict, path: Path, title: str) -> None:
    """Squared bias over variance, a curve for n and one for λ, a panel for each critic."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained", sharex=True, sharey=True)
    for axis, (critic, table) in zip(axes, figures["critics"].items(), strict=True):
        for letter, label, style, side in (("n", "n-step", "s--", 1), ("λ", "GAE", "o-", -1)):
            kind = {name: pair for name, pair in table.items() if letter in name}
            rows = {name: (variance, max(bias, FLOOR)) for name, (bias, variance) in kind.items()}
            axis.plot(*zip(*rows.values(), strict=True), style, label=label)
            for name, point in rows.items():
                where = {"xytext": (7 * side, 3 * side), "va": "bottom" if side > 0 else "top"}
                where |= {"textcoords": "offset points", "ha": "left" if side > 0 else "right", "fontsize": 8}
                axis.annotate(name, point, **where)
            axis.plot(*min(rows.values(), key=sum), "ko", markersize=13, fillstyle="none")
        explained = figures["explained_variance"][critic]
        axis.set(xscale="log", yscale="log", title=f"critic {critic} (explained variance {explained:.2f})")
        axis.set(xlabel="variance / ‖∇J‖²", ylabel="squared bias / ‖∇J‖²")
        axis.minorticks_off()
        axis.margins(0.15, 0.1)
        axis.legend(loc="lower left")
    figure.suptitle(title)
    plt.savefig(path, dpi=120)


def main(args: Args) -> None:
    """Measures, draws, and writes the figures with the versions."""
    torch.set_num_threads(1)
    figures = measure(args)
    versions = {name: version(name) for name in ("torch", "gymnasium", "numpy")}
    versions["python"] = platform.python_version()
    found = {"args": asdict(args), "versions": versions, "figures": figures}
    Path(f"{args.out}.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    steps = args.num_envs * args.num_steps
    title = f"Policy gradient of {steps:,} steps of {args.env_id}; ring: least sum of both"
    draw(figures, Path(f"{args.out}.png"), title)
    for critic, table in figures["critics"].items():
        print(f"critic {critic}: explained variance {figures['explained_variance'][critic]:.2f}")
        for name, (bias, variance) in table.items():
            print(f"  {name:9s} squared bias {bias:8.4f}, variance {variance:8.4f}, in units of |∇J|²")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
