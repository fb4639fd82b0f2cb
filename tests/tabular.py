"""A Markov decision process so small that all its trajectories can be listed: the tests' exact expectations.

Everything is float64 and differentiable in the policy. J, V, Q and the occupancy come from dynamic programming,
the trajectories and their probabilities from listing: the two ways check each other.

A policy is a table `pi` of probabilities (rows, A) with a row for each observation, which is one-hot. Unless
`timed`, a row is a state: policy and critic see s alone, though V and Q of the finite horizon depend on (t, s);
policy gradient theorems hold all the same. If `timed`, row t * S + s is the pair (t, s), t up to the horizon
itself (the last `next_obs`): there a tabular critic can be exact.

An episode ends at the transition in TERMINATES, and after `horizon` steps (truncated; it can be both). The
terminating one arrives in an ordinary state, which has a value: whoever bootstraps there is found out.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import Tensor, nn

S, A = 3, 2
TRANSITION = torch.tensor(  # P(s'|s,a), (S, A, S)
    [[[0, 1, 0], [0.25, 0, 0.75]], [[0, 0, 1], [0.4, 0.6, 0]], [[1, 0, 0], [0, 0.35, 0.65]]], dtype=torch.float64
)
TERMINATES = torch.zeros(S, A, S, dtype=torch.bool)
TERMINATES[1, 1, 0] = True
# r(s,a,s'), different everywhere; all positive, so that a baseline has something to remove
REWARD = torch.tensor([[2.3, 0.9], [2.9, 1.6], [3.3, 1.2]], dtype=torch.float64).unsqueeze(-1)
REWARD = REWARD + torch.tensor([0.05, -0.2, 0.15], dtype=torch.float64)
CONTINUES = TRANSITION * ~TERMINATES  # P(s', and the episode goes on | s, a)


class Batch(NamedTuple):
    """Whole trajectories, time first. After its end a trajectory repeats its last state, with action 1 and reward 0."""

    rows: Tensor  # (T, N) row of the policy's table that is seen at t
    obs: Tensor  # (T, N, rows) the same, one-hot
    actions: Tensor  # (T, N)
    rewards: Tensor  # (T, N)
    next_obs: Tensor  # (T, N, rows) the true successor
    mask: Tensor  # (T, N) true while the trajectory runs
    terminated: Tensor  # (T, N)
    truncated: Tensor  # (T, N)


@dataclass(frozen=True)
class MDP:
    horizon: int = 3
    start: tuple[float, ...] = (0.6, 0.4, 0.0)
    timed: bool = False

    @property
    def rows(self) -> int:
        return S * (self.horizon + 1) if self.timed else S

    def row(self, t: int, s: int) -> int:
        return S * t + s if self.timed else s

    def by_time(self, pi: Tensor) -> Tensor:
        """The policy's table as (horizon, S, A)."""
        return pi.reshape(-1, S, A)[: self.horizon].expand(self.horizon, S, A)

    def values(self, pi: Tensor, gamma: float, final: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """V (horizon + 1, S) and Q (horizon, S, A), discounted from now; `final` is V after the time limit, or 0."""
        values, q_values = [torch.zeros(S, dtype=torch.float64) if final is None else final], []
        for probs in self.by_time(pi).flip(0):
            q_values.append((TRANSITION * REWARD).sum(-1) + gamma * CONTINUES @ values[-1])
            values.append((probs * q_values[-1]).sum(-1))
        return torch.stack(values[::-1]), torch.stack(q_values[::-1])

    def objective(self, pi: Tensor, gamma: float) -> Tensor:
        """J = E[Σ_t γ^t r_t]."""
        return torch.tensor(self.start, dtype=torch.float64) @ self.values(pi, gamma)[0][0]

    def occupancy(self, pi: Tensor) -> Tensor:
        """Pr(the episode still runs at t, and s_t = s), (horizon, S)."""
        occupancy = [torch.tensor(self.start, dtype=torch.float64)]
        for probs in self.by_time(pi)[:-1]:
            occupancy.append(torch.einsum("s,sa,san->n", occupancy[-1], probs, CONTINUES))
        return torch.stack(occupancy)

    def surrogate(self, pi: Tensor, occupancy: Tensor, q_values: Tensor) -> Tensor:
        """Σ_t Σ_s d_t(s) Σ_a π(a|s) X_t(s,a); d and X are constants: its gradient is the policy gradient's formula."""
        return (occupancy.detach().unsqueeze(-1) * self.by_time(pi) * q_values.detach()).sum()

    def _paths(self, s: int, t: int) -> Iterator[tuple[tuple[int, int, int], ...]]:
        for a, successor in product(range(A), range(S)):
            if TRANSITION[s, a, successor] > 0:
                step = (s, a, successor)
                if TERMINATES[step] or t + 1 == self.horizon:
                    yield (step,)
                else:
                    yield from ((step, *rest) for rest in self._paths(successor, t + 1))

    @cached_property
    def trajectories(self) -> list[tuple[tuple[int, int, int], ...]]:
        """Every trajectory that can happen, as steps (s, a, s')."""
        return [path for s in range(S) if self.start[s] > 0 for path in self._paths(s, 0)]

    def probabilities(self, pi: Tensor) -> Tensor:
        """p(τ) = p(s_0) Π_t π(a_t|s_t) P(s_t+1|s_t,a_t) of each trajectory, (K,)."""
        table, result = self.by_time(pi), []
        for path in self.trajectories:
            probability = torch.tensor(self.start[path[0][0]], dtype=torch.float64)
            for t, (s, a, successor) in enumerate(path):
                probability = probability * table[t, s, a] * TRANSITION[s, a, successor]
            result.append(probability)
        return torch.stack(result)

    def batch(self, chosen: Any = None) -> Batch:
        """The trajectories with the indices `chosen` (default: all) side by side, padded to the longest of them."""
        paths = [self.trajectories[i] for i in (range(len(self.trajectories)) if chosen is None else chosen)]
        eye = torch.eye(self.rows, dtype=torch.float64)
        columns = []
        for t in range(max(map(len, paths))):
            for path in paths:
                if t < len(path):
                    (s, a, successor), now, then = path[t], t, t + 1
                    reward, ended, cut = float(REWARD[s, a, successor]), bool(TERMINATES[path[t]]), then == self.horizon
                else:
                    s, a, successor, now, then = path[-1][2], 1, path[-1][2], len(path), len(path)
                    reward, ended, cut = 0.0, False, False
                columns.append((self.row(now, s), a, reward, self.row(then, successor), t < len(path), ended, cut))
        rows, actions, rewards, successors, mask, terminated, truncated = (
            torch.from_numpy(np.array(column)).reshape(-1, len(paths)) for column in zip(*columns, strict=True)
        )
        return Batch(rows, eye[rows], actions, rewards, eye[successors], mask, terminated, truncated)


class Given:
    """In place of a script's Envs: these batches of trajectories, one for each iteration, in float64."""

    def __init__(self, batches: list[Batch]) -> None:
        rows = ([x[t].numpy() for x in batch] for batch in batches for t in range(len(batch.obs)))
        self.rows, self.steps, self.ended = [Batch(*row) for row in rows], 0, []
        self.cwd, self.episodes = "", [(0.0, 0, 0.0)]

    def reset(self, *_: int) -> None:
        self.obs = self.rows[0].obs

    def step(self, _: Any, running: Any = None) -> tuple[np.ndarray, ...]:
        row = self.rows.pop(0)
        assert running is None or running.tolist() == row.mask.tolist()
        self.steps, self.obs = self.steps + row.mask.sum(), self.rows[0].obs if self.rows else None
        return row.rewards, row.next_obs, row.terminated, row.terminated | row.truncated, row.rewards


def linear(table: Tensor) -> nn.Linear:
    """A bias-free layer that gives row i of `table` for the i-th one-hot observation; its weight is the transpose."""
    layer = nn.Linear(*table.shape, bias=False, dtype=torch.float64)
    layer.weight.data = table.detach().T.contiguous()
    return layer


class TabularEnv(gym.Env):
    """The same process as an environment, `Tabular-v0`; keyword arguments as for `MDP`."""

    def __init__(self, **kwargs: Any) -> None:
        self.mdp = MDP(**kwargs)
        self.observation_space = gym.spaces.Box(0, 1, (self.mdp.rows,), np.float64)
        self.action_space = gym.spaces.Discrete(A)

    def _obs(self) -> np.ndarray:
        return np.eye(self.mdp.rows)[self.mdp.row(self.t, self.s)]

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.t, self.s = 0, int(self.np_random.choice(S, p=self.mdp.start))
        return self._obs(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        s, self.s = self.s, int(self.np_random.choice(S, p=TRANSITION[self.s, action].numpy()))
        self.t += 1
        step = (s, int(action), self.s)
        return self._obs(), float(REWARD[step]), bool(TERMINATES[step]), self.t == self.mdp.horizon, {}


def box_env() -> gym.Env:
    """With some function of two numbers for an action."""
    return gym.wrappers.TransformAction(TabularEnv(**LONG), lambda action: int(np.sin(action.sum()) > 0), BOX)


DISCRETE = gym.spaces.Discrete(A)
BOX = gym.spaces.Box(np.float32([-1, 0]), np.float32([3, 10]))  # not symmetric, and not of one width
SPACES = pytest.mark.parametrize("space", [DISCRETE, BOX], ids=["discrete", "box"])
LONG = {"horizon": 5, "start": (0.0, 1.0, 0.0), "timed": True}  # 18 rows
gym.register("Tabular-v0", entry_point=TabularEnv)
gym.register("TabularDiscrete-v0", entry_point=TabularEnv, kwargs=LONG)
gym.register("TabularBox-v0", entry_point=box_env)
