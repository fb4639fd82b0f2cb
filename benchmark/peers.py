"""Runs stable-baselines3 and sb3-contrib on the same environments, with the hyperparameters of their zoo or their own.

    python -m benchmark.peers --algorithm ppo --env-id CartPole-v1 --run-dir runs/CartPole-v1/sb3-ppo/seed1
    python -m benchmark.run --scripts ppo sb3-ppo

It writes what a script writes (charts/episodic_return, charts/SPS, eval/episodic_return) and evaluates as a
script does: at the same steps, the same number of greedy episodes, from the same seeds. It cannot resume.
"""

import sys
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
import tyro
from sb3_contrib import TRPO
from stable_baselines3 import A2C, DDPG, PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecNormalize
from torch.utils.tensorboard import SummaryWriter

# Of each algorithm and environment
ZOO: dict[str, dict[str, dict[str, Any]]] = tomllib.loads(Path(__file__).with_name("zoo.toml").read_text())


@dataclass(frozen=True)
class Args:
    """One run of a peer."""

    run_dir: str  # where its events are written
    algorithm: Literal["ppo", "a2c", "ddpg", "trpo"] = "ppo"  # of stable-baselines3 or sb3-contrib
    env_id: str = "CartPole-v1"  # Gymnasium environment
    seed: int = 1  # of everything random
    total_timesteps: int = 100_000  # environment steps over all environments
    eval_every: int = 5000  # environment steps between evaluations
    eval_episodes: int = 20  # episodes of one evaluation
    defaults: bool = False  # the library's own hyperparameters in place of the zoo's, and both normalisations


def make(
    algorithm: str, env_id: str, seed: int, num_envs: int = 1, normalize: bool = False,
    noise_std: float = 0.0, device: str = "cpu", **settings: Any,
) -> Any:  # fmt: skip
    """A model of stable-baselines3; what is not set is its default."""
    envs = make_vec_env(env_id, num_envs, seed=seed)
    if normalize:
        envs = VecNormalize(envs, gamma=settings.get("gamma", 0.99))
    if noise_std:
        mean = np.zeros(envs.action_space.shape)
        settings["action_noise"] = NormalActionNoise(mean, np.full_like(mean, noise_std))
    for name, value in settings.items():
        if isinstance(value, str):  # "linear x" falls from x to 0
            settings[name] = LinearSchedule(float(value.removeprefix("linear ")), 0, 1)
    if "activation_fn" in settings.get("policy_kwargs", {}):
        settings["policy_kwargs"] = settings["policy_kwargs"] | {"activation_fn": torch.nn.ReLU}
    model = {"ppo": PPO, "a2c": A2C, "ddpg": DDPG, "trpo": TRPO}[algorithm]
    return model("MlpPolicy", envs, seed=seed, device=device, **settings)


def evaluate(model: Any, env_id: str, seed: int, episodes: int) -> tuple[float, float]:
    """Mean return and length of the greedy policy over the very episodes of a script's own evaluation."""
    normalizer, total, length, left = model.get_vec_normalize_env(), 0.0, 0, episodes
    with gym.make(env_id) as env:
        obs, _ = env.reset(seed=int(np.random.SeedSequence((seed, 1)).generate_state(1)[0] >> 1))
        while left:
            seen = normalizer.normalize_obs(obs[None]) if normalizer else obs[None]
            obs, reward, terminated, truncated, _ = env.step(model.predict(seen, deterministic=True)[0][0])
            total, length = total + float(reward), length + 1
            if terminated or truncated:
                left -= 1
                obs, _ = env.reset()
    return total / episodes, length / episodes


class Log(BaseCallback):
    """Writes TensorBoard's events as a script does, and evaluates when a script would."""

    def __init__(self, args: Args, writer: SummaryWriter) -> None:
        super().__init__()
        self.args, self.writer, self.before, self.begin = args, writer, 0, time.perf_counter()

    def write(self, **metrics: float) -> None:
        for tag, value in metrics.items():
            self.writer.add_scalar(tag, value, self.num_timesteps)

    def _on_step(self) -> bool:
        for info in self.locals["infos"]:
            if "episode" in info:
                episode = info["episode"]
                self.write(**{"charts/episodic_return": episode["r"], "charts/episodic_length": episode["l"]})
        return True

    def _on_rollout_start(self) -> None:
        args, step, now = self.args, self.num_timesteps, time.perf_counter()
        due = step >= args.total_timesteps or step // args.eval_every > self.before // args.eval_every
        self.before = step
        if not due:
            return
        speed = step / (now - self.begin)
        value, length = evaluate(self.model, args.env_id, args.seed, args.eval_episodes)
        self.write(**{"charts/SPS": speed, "eval/episodic_return": value, "eval/episodic_length": length})
        done = min(1.0, step / args.total_timesteps)
        print(f"{done:4.0%}  step {step:,}  {speed:,.0f} steps/s  evaluated return {value:.1f}", flush=True)
        self.begin += time.perf_counter() - now  # evaluations do not count

    def _on_training_end(self) -> None:
        self._on_rollout_start()


def train(args: Args) -> None:
    """Runs the peer, and logs as a script does."""
    torch.set_num_threads(1)
    try:
        settings = {"normalize": True} if args.defaults else ZOO[args.algorithm].get(args.env_id, {})
        model = make(args.algorithm, args.env_id, args.seed, **settings)
    except (gym.error.Error, AssertionError) as error:
        print(f"peers: --env-id {args.env_id}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    with SummaryWriter(args.run_dir) as writer:
        model.learn(args.total_timesteps, callback=Log(args, writer))


if __name__ == "__main__":
    train(tyro.cli(Args, description=__doc__))
