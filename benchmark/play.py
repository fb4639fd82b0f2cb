"""Plays a trained agent of any script: its return, a GIF, and its episodes as arrays.

    python -m benchmark.play runs/CartPole-v1/ppo/seed1__2026-01-01_12-00-00 --gif cartpole.gif
    python -m benchmark.play runs/CartPole-v1/ppo/seed1__2026-01-01_12-00-00 --record demonstrations.npz

The policy is greedy, and its episodes are those of the script's own evaluation. `reinforce.py
--demonstrations` reads the arrays. Where there is no screen, MuJoCo needs MUJOCO_GL=egl or MUJOCO_GL=osmesa
to render.
"""

import importlib
import sys
from contextlib import ExitStack
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
    max_frames: int = 150  # of the animation, which shows the beginning, at the environment's own speed
    width: int = 300  # of the animation, in pixels
    camera: str = ""  # a camera of MuJoCo's model: that named track follows a runner
    record: str = ""  # .npz file for obs, actions (in the environment's units), rewards and ends


class Recorder(gym.Wrapper):
    """Keeps what an environment sees and returns, and its first frames."""

    def __init__(self, env: gym.Env, max_frames: int) -> None:
        super().__init__(env)
        self.max_frames, self.frames = max_frames, []
        self.arrays: dict[str, list] = {"obs": [], "actions": [], "rewards": [], "ends": []}

    def reset(self, **kwargs: Any) -> tuple[Any, dict]:
        self.obs, info = self.env.reset(**kwargs)
        return self.obs, info

    def step(self, action: Any) -> tuple:
        if len(self.frames) < self.max_frames:
            self.frames.append(self.env.render())
        obs, reward, terminated, truncated, info = self.env.step(action)
        for name, value in zip(self.arrays, (self.obs, action, reward, terminated or truncated), strict=True):
            self.arrays[name].append(np.array(value))
        self.obs = obs
        return obs, reward, terminated, truncated, info


def play(args: Args) -> tuple[list[float], Recorder]:
    """The return of each episode, and what was recorded."""
    path = Path(args.run_dir, "checkpoint.pt")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        script = importlib.import_module(saved["script"])
        flags = script.Args(**saved["args"])
    except Exception as error:
        reason = str(error).partition("\n")[0]
        print(f"play: {path} cannot be played: {type(error).__name__} {reason}", file=sys.stderr)
        raise SystemExit(2) from None
    with ExitStack() as stack:
        envs = script.Envs(stack, flags, 1)
        agent = script.Agent(envs, flags)
        saved["agent"].pop("multiplier", None)  # of trpo.py --constraint dual
        agent.load_state_dict(saved["agent"])
        camera = {"camera_name": args.camera} if args.camera else {}
        mode = {"render_mode": "rgb_array"} if args.gif else {}
        env = gym.make(flags.env_id, max_episode_steps=flags.max_episode_steps or None, **mode, **camera)
        recorder = stack.enter_context(Recorder(env, args.max_frames if args.gif else 0))
        envs.envs = [recorder]
        envs.reset(flags.seed, 1)
        act = agent.in_numpy()
        while len(envs.ended) < args.episodes:
            envs.step(act(envs.obs, 0))
    return [episodic_return for _, episodic_return, _ in envs.ended], recorder


def main(args: Args) -> None:
    """Plays, prints the returns, and writes the files that are asked for."""
    returns, recorder = play(args)
    print(f"returns {', '.join(f'{x:.1f}' for x in returns)}; mean {np.mean(returns):.1f}")
    if args.record:
        np.savez(args.record, **{name: np.array(values) for name, values in recorder.arrays.items()})
    if args.gif:
        from PIL import Image

        height, width, _ = recorder.frames[0].shape
        size = args.width, args.width * height // width
        images = [Image.fromarray(frame).resize(size) for frame in recorder.frames]
        images = [image.convert("P", palette=Image.Palette.ADAPTIVE, colors=64) for image in images]
        duration = 1000 / recorder.metadata["render_fps"]
        images[0].save(args.gif, save_all=True, append_images=images[1:], duration=duration, loop=0)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
