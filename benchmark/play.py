"""Plays a trained agent of any script: its return, a GIF, and its episodes as arrays.

    python -m benchmark.play runs/CartPole-v1/ppo/seed1__2026-01-01_12-00-00 --gif cartpole.gif
    python -m benchmark.play runs/CartPole-v1/ppo/seed1__2026-01-01_12-00-00 --record demonstrations.npz

The policy is greedy, and its episodes are those of the script's own evaluation. The arrays are what `reinforce.py
--demonstrations` reads. Where there is no screen, MuJoCo needs MUJOCO_GL=egl or MUJOCO_GL=osmesa to render.
"""

import importlib
import inspect
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import gymnasium as gym
import numpy as np
import torch
import tyro


@dataclass(frozen=True)
class Args:
    """What is played, and what is kept of it."""

    run_dir: Annotated[str, tyro.conf.Positional]  # the directory of a run
    episodes: int = 1  # how many are played
    gif: str = ""  # file for an animation of them
    max_frames: int = 250  # of the animation; a longer one loses every other frame until it fits
    record: str = ""  # .npz file for obs, actions (in the environment's units), rewards and ends


def load(run_dir: str) -> tuple[Any, Any, Any]:
    """The script, the flags and the agent of a run, from its checkpoint."""
    path = Path(run_dir, "checkpoint.pt")
    if not path.exists():
        sys.exit(f"play: {path} does not exist")
    saved = torch.load(path, map_location="cpu", weights_only=True)
    script = importlib.import_module(saved["script"])
    (kind,) = (x for name, x in vars(script).items() if name.endswith("Agent"))  # Agent, or one of its own
    args, (env, *names) = script.Args(**saved["args"]), inspect.signature(kind).parameters
    agent = kind(**{env: script.make_envs(args.env_id, 1)[0]}, **{name: getattr(args, name) for name in names})
    agent.load_state_dict(saved["agent"])
    return script, args, agent


def play(args: Args) -> tuple[list[float], dict[str, list], list[np.ndarray]]:
    """The return of each episode, the arrays of all of them, and the frames if they are asked for."""
    script, flags, agent = load(args.run_dir)
    env = gym.make(flags.env_id, render_mode="rgb_array" if args.gif else None)
    act, to_env = agent.policy(), script.action_map(env.action_space)
    returns, frames, arrays = [], [], {"obs": [], "actions": [], "rewards": [], "ends": []}
    for episode in range(args.episodes):
        (obs, _), done, total = env.reset(seed=script.env_seed(flags.seed, 1, episode)), False, 0.0
        while not done:
            if args.gif:
                frames.append(env.render())
            flat = gym.spaces.flatten(env.observation_space, obs).astype(np.float32)
            action = to_env(act(flat[None], 0.0))[0]
            obs, reward, terminated, truncated, _ = env.step(action)
            total, done = total + float(reward), terminated or truncated
            for name, value in zip(arrays, (flat, action, reward, done), strict=True):
                arrays[name].append(value)
        returns.append(total)
    return returns, arrays, frames


def main(args: Args) -> None:
    """Plays, prints the returns, and writes the files that are asked for."""
    returns, arrays, frames = play(args)
    print(f"returns {', '.join(f'{x:.1f}' for x in returns)}; mean {np.mean(returns):.1f}")
    if args.record:
        np.savez(args.record, **{name: np.array(values) for name, values in arrays.items()})
    if args.gif:
        from PIL import Image

        stride = 1
        while len(frames) > args.max_frames * stride:
            stride *= 2
        images = [Image.fromarray(frame).convert("P", palette=Image.Palette.ADAPTIVE) for frame in frames[::stride]]
        images[0].save(args.gif, save_all=True, append_images=images[1:], duration=40, loop=0)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
