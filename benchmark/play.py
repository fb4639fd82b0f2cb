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
from pickle import UnpicklingError
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
    max_frames: int = 150  # of the animation, which shows the beginning, at the environment's own speed
    width: int = 300  # of the animation, in pixels
    camera: str = ""  # a camera of MuJoCo's model: that named track follows a runner
    record: str = ""  # .npz file for obs, actions (in the environment's units), rewards and ends


def load(run_dir: str) -> tuple[Any, Any, Any]:
    """The script, the flags and the agent of a run, from its checkpoint."""
    path = Path(run_dir, "checkpoint.pt")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        script = importlib.import_module(saved["script"])
    except (OSError, UnpicklingError, RuntimeError, LookupError, TypeError, ImportError) as error:
        what = "does not exist" if isinstance(error, FileNotFoundError) else "is damaged, or not a script's checkpoint"
        print(f"play: {path} {what}", file=sys.stderr)
        raise SystemExit(2) from None
    (kind,) = (x for name, x in vars(script).items() if name.endswith("Agent"))  # Agent, or one of its own
    args, (env, *names) = script.Args(**saved["args"]), inspect.signature(kind).parameters
    agent = kind(**{env: script.make_envs(args.env_id, 1)[0]}, **{name: getattr(args, name) for name in names})
    agent.load_state_dict(saved["agent"])
    return script, args, agent


def play(args: Args) -> tuple[list[float], dict[str, list], list[np.ndarray], int]:
    """The return of each episode, the arrays of all of them, the frames if they are asked for, and frames a second."""
    script, flags, agent = load(args.run_dir)
    camera = {"camera_name": args.camera} if args.camera else {}
    env = gym.make(flags.env_id, render_mode="rgb_array" if args.gif else None, **camera)
    act, to_env = agent.policy(), script.action_map(env.action_space)
    returns, frames, arrays = [], [], {"obs": [], "actions": [], "rewards": [], "ends": []}
    for episode in range(args.episodes):
        (obs, _), done, total = env.reset(seed=script.env_seed(flags.seed, 1, episode)), False, 0.0
        while not done:
            if args.gif and len(frames) < args.max_frames:
                frames.append(env.render())
            flat = gym.spaces.flatten(env.observation_space, obs).astype(np.float32)
            action = to_env(act(flat[None], 0.0))[0]
            obs, reward, terminated, truncated, _ = env.step(action)
            total, done = total + float(reward), terminated or truncated
            for name, value in zip(arrays, (flat, action, reward, done), strict=True):
                arrays[name].append(value)
        returns.append(total)
    return returns, arrays, frames, env.metadata["render_fps"]


def main(args: Args) -> None:
    """Plays, prints the returns, and writes the files that are asked for."""
    returns, arrays, frames, fps = play(args)
    print(f"returns {', '.join(f'{x:.1f}' for x in returns)}; mean {np.mean(returns):.1f}")
    if args.record:
        np.savez(args.record, **{name: np.array(values) for name, values in arrays.items()})
    if args.gif:
        from PIL import Image

        images = [Image.fromarray(frame) for frame in frames]
        size = args.width, round(args.width * images[0].height / images[0].width)
        images = [image.resize(size).convert("P", palette=Image.Palette.ADAPTIVE, colors=64) for image in images]
        images[0].save(args.gif, save_all=True, append_images=images[1:], duration=1000 / fps, loop=0)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
