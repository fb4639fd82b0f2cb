"""Tables and figures from the results of benchmark.run, and the sweep's hyperparameters for TensorBoard.

    python -m benchmark.report

Writes report.md and its figures beside the results, and, where there are run directories, a summary of all results
into <runs>/hparams, for the HPARAMS page of `tensorboard --logdir runs/benchmark`. Seeds are the replicates: a curve is
the interquartile mean (IQM) over seeds, with a stratified bootstrap interval of 95 % (Agarwal et al. 2021, rliable).
"""

import importlib
import json
import math
import shlex
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from benchmark import peers, suite
from benchmark.published import SOURCES, figure_to_beat
from benchmark.run import ROOT

# Colours of Okabe and Ito, which the colour-blind can tell apart (its yellow, too pale for paper, is grey here), and a
# marker each for print in black and white
COLOURS = ("#999999", "#E69F00", "#56B4E9", "#009E73", "#000000", "#0072B2", "#D55E00", "#CC79A7")
STYLES = {
    script: {"color": colour, "marker": marker, "markevery": 3, "markersize": 4, "linewidth": 1.2}
    for script, colour, marker in zip(suite.SCRIPTS, COLOURS, "ov^<sDPX", strict=True)
}
TRUST_REGIONS = ("npg", "trpo", "trpo-dual", "ppo")
NO_HYPERPARAMETERS = {"env_id", "run_dir", "resume", "device", "num_threads", "compile"}
NO_HYPERPARAMETERS |= {"checkpoint_every", "eval_every", "eval_episodes"}

Results = dict[str, dict[str, list[dict]]]  # of each environment and script, in the order of the seeds


@dataclass(frozen=True)
class Args:
    """Where everything is."""

    results: str = "benchmark/results"  # results of benchmark.run; the report is written here, too
    runs: str = "runs/benchmark"  # run directories of benchmark.run


# In the order of tables and legends: each script, then its variants; the peers last
NAMES = [name for script in suite.SCRIPTS for name in (script, *suite.VARIANTS) if name.partition("-")[0] == script]
NAMES += suite.PEERS


def load(folder: Path) -> Results:
    """All results, in the order of the suite; other environments come last."""
    found = {path.parent.parent.name for path in folder.glob("*/*/seed*.json")}
    results: Results = {}
    for env in (*suite.CLASSIC, *suite.MUJOCO, *sorted(found - {*suite.CLASSIC, *suite.MUJOCO})):
        for name in NAMES:
            files = sorted((folder / env / name).glob("seed*.json"), key=lambda path: int(path.stem[4:]))
            if files:
                results.setdefault(env, {})[name] = [json.loads(path.read_text()) for path in files]
    return results


def bootstrap(scores: np.ndarray | list[np.ndarray], statistic: Callable, reps: int = 2000) -> tuple[np.ndarray, ...]:
    """A statistic (a vector) of scores (runs, tasks, ...), and its 95 % interval, low and high."""
    from rliable import library

    np.random.seed(0)  # noqa: NPY002 (rliable draws from here, whatever random_state it is given)
    mean, bounds = library.get_interval_estimates({"": scores}, statistic, reps=reps)
    return mean[""], *bounds[""]


def iqm(scores: np.ndarray) -> np.ndarray:
    """Interquartile mean over the runs of one task, of each point: (runs, 1, points) to (points).

    What rliable's aggregate_iqm is for one point. That, called for each point of each resample, took 90 s a report, for
    SciPy's trim_mean spends 0.2 ms on checking its arguments.
    """
    cut = len(scores) // 4
    return np.sort(scores[:, 0], 0)[cut : len(scores) - cut].mean(0)


def interval(curves: list[dict[str, float]], points: int = 20) -> tuple[np.ndarray, ...]:
    """Steps, IQM over seeds and its interval, low and high, of curves {step: value} at common steps."""
    steps = np.linspace(0, 1, points + 1)[1:] * min(max(map(int, curve)) for curve in curves)
    rows = np.array([np.interp(steps, [int(step) for step in curve], list(curve.values())) for curve in curves])
    return steps, *(bootstrap(rows[:, None], iqm) if len(rows) > 1 else (rows[0],) * 3)


def finals(runs: list[dict]) -> np.ndarray:
    """The final return of each seed."""
    return np.array([run["final_return"] for run in runs])


def steps_of(run: dict) -> int:
    """Environment steps of a run."""
    return max(map(int, run["evaluations"]))


def steps_to(run: dict, threshold: float) -> float:
    """Environment steps until an evaluation reaches the threshold; infinite if none does."""
    return min((int(step) for step, value in run["evaluations"].items() if value >= threshold), default=math.inf)


def improvement(ours: list[list[dict]], theirs: list[list[dict]]) -> tuple[float, float, float]:
    """Probability that a run of ours ends above one of theirs, mean over the environments; and its interval."""
    from rliable import metrics

    scores = []
    for side in (ours, theirs):
        fewest = min(len(runs) for runs in side)
        scores.append(np.array([finals(runs)[:fewest] for runs in side]).T)
    found = bootstrap(scores, lambda x, y: np.array([metrics.probability_of_improvement(x, y)]), reps=1000)
    return tuple(float(x[0]) for x in found)


def verdict(runs: list[dict], published: tuple[float, float]) -> tuple[str, tuple[float, float]]:
    """Ours against a published interval, by the bootstrap interval of our mean, which is given back, too."""
    _, low, high = bootstrap(finals(runs)[:, None], lambda x: np.array([x.mean()]))
    low, high = float(low[0]), float(high[0])
    return "beaten" if low > published[1] else "below" if high < published[0] else "equal", (low, high)


def label(*values: float) -> str:
    """Returns, with a digit after the point where they are small."""
    digits = 1 if abs(np.mean(values)) < 300 else 0
    return ", ".join(f"{value:.{digits}f}" for value in values)


def table(head: str, rows: list[list[Any]]) -> str:
    """Markdown."""
    lines = [head.split(" | "), ["---"] * len(head.split(" | ")), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def table_of_returns(results: Results) -> str:
    """Final and maximum return, seconds and steps a second of each script on each environment."""
    rows = []
    for env, scripts in results.items():
        for script, runs in scripts.items():
            mean, low, high = (float(x[0]) for x in bootstrap(finals(runs)[:, None, None], iqm))
            best = np.mean([run["max_return"] for run in runs])
            seconds, speed = (np.median([run[name] for run in runs]) for name in ("seconds", "steps_per_second"))
            rows.append([env, script, f"{steps_of(runs[0]):,}"])
            rows[-1] += [f"{label(finals(runs).mean())} ({label(*finals(runs))})"]
            rows[-1] += [f"{label(mean)} [{label(low, high)}]", label(best), f"{seconds:.0f}", f"{speed:,.0f}"]
    head = "environment | script | steps | final return: mean (seeds) | IQM [95 %] | maximum | seconds | steps/s"
    return table(head, rows)


def table_of_published(results: Results) -> str:
    """Each script against the highest return that is published for its budget."""
    rows = []
    for env, scripts in results.items():
        for script in [script for script in suite.SCRIPTS if script in scripts]:
            runs = scripts[script]
            figure = figure_to_beat(script, env, steps_of(runs[0]))
            if figure:
                judged, (low, high) = verdict(runs, figure.interval)
                judged = judged if len(runs) > 1 else "(one seed)"  # whose interval has no width
                theirs = label(figure.value) + (f" ± {figure.std:g}" if figure.std else "")
                where = f"{figure.source}, {figure.steps:,} steps"
            else:
                (_, (low, high)), judged, theirs, where = verdict(runs, (0, 0)), "", "", "none published"
            ours = f"{label(finals(runs).mean())} [{label(low, high)}]"
            rows.append([env, script, f"{steps_of(runs[0]):,}", ours, theirs, where, judged])
    return table("environment | script | steps | mean [95 %] | published | source | published is", rows)


def table_of_improvement(results: Results) -> str:
    """The probability of improvement of each script on its peer, on each environment and on all of them."""
    rows = []
    for peer in suite.PEERS:
        script = peer.removeprefix("sb3-")
        both = {env: (x[script], x[peer]) for env, x in results.items() if script in x and peer in x}
        groups = {env: [pair] for env, pair in both.items()}
        groups |= {"all of these": list(both.values())} if len(both) > 1 else {}
        for name, pairs in groups.items():
            mean, low, high = improvement(*([pair[side] for pair in pairs] for side in (0, 1)))
            returns = [label(finals(runs).mean()) for runs in pairs[0]] if len(pairs) == 1 else ["", ""]
            rows.append([script, peer, name, *returns, f"{mean:.2f} [{low:.2f}, {high:.2f}]"])
    head = "script | peer | environment | final return | of the peer | probability of improvement [95 %]"
    return table(head, rows) if rows else ""


def table_of_thresholds(results: Results) -> str:
    """Steps and seconds of training until an evaluation reaches the threshold of the environment."""
    rows = []
    for env, scripts in results.items():
        for script, runs in scripts.items() if env in suite.THRESHOLDS else ():
            threshold = suite.THRESHOLDS[env]
            steps = np.array([steps_to(run, threshold) for run in runs])
            seconds = steps / [run["steps_per_second"] for run in runs]
            medians = [f"{x:,.0f}" if x >= 10 else f"{x:.1f}" for x in map(np.median, (steps, seconds))]
            reached = f"{np.isfinite(steps).sum()} of {len(runs)}"
            rows.append([env, threshold, script, reached, *(x if x != "inf" else "–" for x in medians)])
    return table("environment | threshold | script | seeds that reach it | steps | seconds", rows)


def axes_for(count: int, columns: int = 4) -> tuple[Any, list[Any]]:
    """A figure as wide as a page, and so many of its axes; one more stays free for the legend."""
    import matplotlib.pyplot as plt

    columns = min(columns, count + 1)
    rows = -(-(count + 1) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(2.7 * columns, 2.5 * rows), layout="constrained")
    for axis in axes.flat[count:]:
        axis.axis("off")
    return figure, list(axes.flat)


def draw_curve(axis: Any, curves: list[dict[str, float]], script: str) -> None:
    """One curve with its interval; that of a peer is dashed, in the colour of its script, as that of a variant is.

    Where a script has more variants, the second is black and dotted, the third grey with dots and dashes.
    """
    steps, mean, low, high = interval(curves)
    base = script.removeprefix("sb3-").partition("-")[0]
    style = STYLES[base] | ({"linestyle": "--", "fillstyle": "none"} if script != base else {})
    variants = [name for name in suite.VARIANTS if name.partition("-")[0] == base]
    if script in variants:
        own = ({}, {"color": "#000000", "linestyle": ":"}, {"color": "#888888", "linestyle": "-."})
        style |= own[variants.index(script)]
    axis.plot(steps, mean, label=script, **style)
    axis.fill_between(steps, low, high, color=style["color"], alpha=0.15, linewidth=0)


def tidy(axes: list[Any]) -> None:
    """Steps as 100k, a light grid."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    for axis in axes:
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.xaxis.set_major_locator(MaxNLocator(4))
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3, linewidth=0.5)
        axis.set_xlim(left=0)


def finish(figure: Any, axes: list[Any], path: Path) -> None:
    """One legend for all, in the place that is free."""
    shown = [axis for axis in axes if axis.lines]
    tidy(shown)
    handles = {label: line for axis in shown for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    order = [name for name in NAMES if name in handles]
    axes[len(shown)].legend([handles[name] for name in order], order, loc="center", frameon=False, fontsize=9)
    figure.savefig(path, dpi=160)


def draw_returns(results: Results, names: tuple[str, ...], path: Path) -> None:
    """Evaluated return over environment steps, an axis for each environment, a curve for each script of `names`."""
    drawn = {env: [name for name in scripts if name in names] for env, scripts in results.items()}
    drawn = {env: scripts for env, scripts in drawn.items() if scripts}
    figure, axes = axes_for(len(drawn))
    for axis, (env, scripts) in zip(axes, drawn.items(), strict=False):
        for script in scripts:
            draw_curve(axis, [run["evaluations"] for run in results[env][script]], script)
        axis.set_title(env, fontsize=10)
    figure.supxlabel("environment steps", fontsize=9)
    figure.supylabel("evaluated return", fontsize=9)
    finish(figure, axes, path)


def draw_variants(results: Results, path: Path) -> bool:
    """Evaluated return of variants, an axis for each environment; beside them, the script if it has the same budget."""
    import matplotlib.pyplot as plt

    panels = [
        (env, [name for name in scripts if name.partition("-")[0] == base])
        for env, scripts in results.items()
        for base in suite.SCRIPTS
        if base in scripts and any(name.startswith(f"{base}-") for name in scripts)
    ]
    if not panels:
        return False
    figure, axes = plt.subplots(1, len(panels), figsize=(2.7 * len(panels), 2.7), layout="constrained", squeeze=False)
    for axis, (env, names) in zip(axes[0], panels, strict=True):
        for name in [name for name in names if suite.budget(name, env) == suite.budget(names[-1], env)]:
            draw_curve(axis, [run["evaluations"] for run in results[env][name]], name)
        axis.set_title(env, fontsize=10)
        axis.set_xlabel("environment steps", fontsize=9)
        axis.legend(frameon=False, fontsize=7, loc="best")
    axes[0, 0].set_ylabel("evaluated return", fontsize=9)
    tidy(axes[0])
    figure.savefig(path, dpi=160)
    return True


def draw_trust_regions(results: Results, path: Path) -> bool:
    """Return, and of each update KL(π_old‖π), the accepted fraction of the step, and how well V explained the returns.

    The KL of PPO is an estimate, the mean over the minibatches of the update.
    """
    import matplotlib.pyplot as plt

    three = ("npg", "trpo", "ppo")
    envs = [env for env in results if len({suite.budget(script, env) for script in three}) == 1]
    envs = [env for env in envs if set(three) <= results[env].keys()]
    envs = [env for env in envs if all("diagnostics" in run for script in three for run in results[env][script])]
    if not envs:
        return False
    rows = {
        "kl": "KL(π_old‖π) of an update",
        "accepted_fraction": "accepted fraction",
        "explained_variance": "explained variance",
    }
    figure, axes = plt.subplots(4, len(envs), figsize=(2.7 * len(envs), 8.6), layout="constrained", squeeze=False)
    for (above, *below), env in zip(axes.T, envs, strict=True):
        for script in (script for script in results[env] if script in TRUST_REGIONS):
            runs = results[env][script]
            draw_curve(above, [run["evaluations"] for run in runs], script)
            for axis, name in zip(below, rows, strict=True):
                tag = "losses/approx_kl" if (script, name) == ("ppo", "kl") else f"losses/{name}"
                if tag in runs[0]["diagnostics"]:
                    draw_curve(axis, [run["diagnostics"][tag] for run in runs], script)
        above.set_title(env, fontsize=10)
        below[0].set(yscale="log")
        below[1].set(ylim=(0, 1.05))
        below[2].set(ylim=(0, 1.05), xlabel="environment steps")
    tidy(axes.flat)
    for axis, label in zip(axes[:, 0], ("return", *rows.values()), strict=True):
        axis.set(ylabel=label)
    lines = {label: x for axis in axes[0] for x, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=len(lines))
    figure.savefig(path, dpi=160)
    return True


def hyperparameters(script: str, env: str, run: dict) -> dict[str, Any]:
    """All of them, defaults included, from the command line of a run; of a peer the seed and what its zoo sets."""
    words = shlex.split(run["command"])
    if script in suite.PEERS:
        flags = tyro.cli(peers.Args, args=[*words[3:], "--run-dir", ""])
        settings = {"seed": flags.seed, "total_timesteps": flags.total_timesteps}
        settings |= peers.ZOO.get((flags.algorithm, env), {})
        return {name: x if isinstance(x, bool | int | float) else str(x) for name, x in settings.items()}
    flags = tyro.cli(importlib.import_module(script.partition("-")[0]).Args, args=words[2:])
    return {name: value for name, value in asdict(flags).items() if name not in NO_HYPERPARAMETERS}


def write_hparams(results: Results, folder: Path) -> None:
    """One session of TensorBoard's HPARAMS page for each run; in a folder of its own, since runs hold nothing else."""
    from torch.utils.tensorboard import SummaryWriter
    from torch.utils.tensorboard.summary import hparams

    shutil.rmtree(folder, ignore_errors=True)
    for env, scripts in results.items():
        for script, runs in scripts.items():
            for run in runs:
                names = ("final_return", "max_return", "steps_per_second", "seconds")
                metrics = {f"hparams/{name}": run[name] for name in names}
                given = {"env": env, "script": script} | hyperparameters(script, env, run)
                with SummaryWriter(str(folder / env / script / f"seed{given['seed']}")) as writer:
                    for summary in hparams(given, metrics):
                        writer.file_writer.add_summary(summary)
                    for tag, value in metrics.items():
                        writer.add_scalar(tag, value, steps_of(run))


def text(results: Results, figures: list[str]) -> str:
    """The report: tables, then figures."""
    every = [run for scripts in results.values() for runs in scripts.values() for run in runs]
    versions: dict[str, set[str]] = {}
    for run in every:
        for name, version in run["versions"].items():
            versions.setdefault(name, set()).add(version)
    stated = ", ".join(f"{name} {' and '.join(sorted(found))}" for name, found in sorted(versions.items()))
    parts = [
        "# Results",
        f"{len(every)} runs; {stated}. Greedy policy at the end of the budget, over 20 episodes (Pendulum and Acrobot "
        "100), the same ones in every evaluation. Seeds are the replicates; intervals are percentiles of a stratified "
        "bootstrap. Maximum: mean over seeds of the best of 20 evaluations. Seconds: median over seeds of the whole "
        "process, evaluations included; steps a second leave them and the compilation out.",
        table_of_returns(results),
        "![Evaluated returns](curves.png)",
        "## Against published returns",
        "Each script against the highest return that is published for at most its number of steps (else, for the "
        "fewest steps). Published is *beaten* where the interval of our mean lies above it (or above its own interval, "
        "where a deviation over runs is published), *below* means that ours lies below it, *equal* that they overlap. "
        "Environment versions and protocols differ, as said under the table; that of `off_policy_ac.py` is SAC's, that "
        "of `actor_critic.py` A2C's.",
        table_of_published(results),
        "\n".join(f"- {name}: {what}" for name, what in SOURCES.items()),
        "## Against stable-baselines3",
        "The peers have the hyperparameters of their zoo, and our environments, budgets, seeds and evaluations. "
        "Probability of improvement: that a run of ours ends above one of theirs; ties count half.",
        table_of_improvement(results) or "No peer has been run on an environment of its script.",
        *(["![Evaluated returns, with peers](peers.png)"] if "peers.png" in figures else []),
        "## Steps and seconds to a threshold",
        "Median over seeds, until the first evaluation (one every twentieth of the budget) that reaches it; seconds of "
        "training, without evaluations, imports and compilation. –: half of the seeds or more never do.",
        table_of_thresholds(results),
        *(["## Variants", "![Evaluated returns of variants](variants.png)"] if "variants.png" in figures else []),
        *(["## Trust regions", "![Trust regions](trust_regions.png)"] if "trust_regions.png" in figures else []),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def main(args: Args) -> None:
    """Reads the results and writes the report."""
    import matplotlib as mpl

    mpl.use("agg")  # no screen is needed
    folder, runs = ROOT / args.results, ROOT / args.runs
    results = load(folder)
    if not results:
        print(f"no results in {folder}, so no report")
        return
    figures = ["curves.png"]
    draw_returns(results, suite.SCRIPTS, folder / "curves.png")
    compared = {x for scripts in results.values() for p in suite.PEERS if p in scripts for x in (p, p[4:])}
    if compared:
        with_peers = {env: scripts for env, scripts in results.items() if {*suite.PEERS} & scripts.keys()}
        draw_returns(with_peers, tuple(compared), folder / "peers.png")
        figures.append("peers.png")
    if draw_variants(results, folder / "variants.png"):
        figures.append("variants.png")
    if draw_trust_regions(results, folder / "trust_regions.png"):
        figures.append("trust_regions.png")
    (folder / "report.md").write_text(text(results, figures))
    if runs.is_dir():
        write_hparams(results, runs / "hparams")
    print(f"report in {folder / 'report.md'}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
