"""Makes tables and figures from the results of benchmark.run, and TensorBoard's page of hyperparameters.

    python -m benchmark.report

Writes report.md and its figures beside the results, and, where there are run directories, a summary of all
results into <runs>/hparams, for the HPARAMS page of `tensorboard --logdir runs/benchmark`. Seeds are the
replicates: a curve is the interquartile mean (IQM) over seeds with a bootstrap interval of 95 %, as Agarwal
et al. 2021 recommend.
"""

import importlib
import json
import math
import shlex
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
import tyro
from matplotlib.ticker import EngFormatter, MaxNLocator
from scipy import stats

from benchmark import ROOT, suite
from benchmark.published import RANDOM, REFERENCE, SOURCES, figure_to_beat

# In the order of tables and legends: each script, then its variants; the peers last
FAMILIES = {base: [base] for base in suite.SCRIPTS}
for variant in suite.VARIANTS:
    FAMILIES[variant.partition("-")[0]].append(variant)
NAMES = [*(name for family in FAMILIES.values() for name in family), *suite.PEERS]
# Colours of Okabe and Ito, which the colour-blind can tell apart (grey for its yellow, too pale for paper)
COLOURS = ("#999999", "#E69F00", "#56B4E9", "#009E73", "#000000", "#0072B2", "#D55E00", "#CC79A7")
FIGURES = ("curves.png", "peers.png", "variants.png", "trust_regions.png")
PLOTS: dict[str, tuple[str, dict[str, Any]]] = {  # label, what of a result, settings of the axis
    "evaluated return": ("evaluations", {}),
    "KL(π_old‖π), estimated": ("losses/approx_kl", {"yscale": "log"}),
    "accepted fraction": ("losses/accepted_fraction", {"ylim": (0, 1.05)}),
    "explained variance": ("losses/explained_variance", {"ylim": (0, 1.05)}),
}
REPORT = """# Results

{count} runs; {versions}.

Greedy policy at the end of the budget, over 20 episodes (Pendulum and Acrobot 100), the same ones in every
evaluation. Seeds are the replicates; intervals are percentiles of a bootstrap. Maximum: mean over seeds of
the best of 20 evaluations. Seconds: median of the whole process, evaluations included; steps a second leave
them and the compilation out. In the figures, a line is the IQM over seeds, a shade its interval.

{figures}

{returns}
## Against published returns

Each script against the highest return that is published for at most its number of steps (else, for the
fewest). Published is *beaten* where the interval of our mean lies above it (or above its own interval, where
a deviation over runs is published), *below* where ours lies below it, *equal* where they overlap. The figures
for `off_policy_ac.py` are SAC's, those for `actor_critic.py` A2C's.

{published}
{sources}

## Steps and seconds to a threshold

Median over seeds, until the first evaluation (one every twentieth of the budget) that reaches it; seconds of
training, without evaluations and imports. –: half of the seeds or more never do.

{thresholds}"""


@dataclass(frozen=True)
class Args:
    """Where everything is."""

    results: str = "benchmark/results"  # results of benchmark.run; the report is written here, too
    runs: str = "runs/benchmark"  # run directories of benchmark.run


def load(folder: Path) -> pd.DataFrame:
    """A row for each result, in the order of the suite; other environments come last."""
    rows = []
    others = sorted(path.parent.parent.name for path in folder.glob("*/*/seed*.json"))
    for env in dict.fromkeys((*suite.CLASSIC, *suite.MUJOCO, *others)):
        for name in NAMES:
            for path in sorted((folder / env / name).glob("seed*.json"), key=lambda path: int(path.stem[4:])):
                result = json.loads(path.read_text())
                steps = max(map(int, result["evaluations"]))
                row = {tag: None for tag, _ in PLOTS.values()} | {"env": env, "script": name, "steps": steps}
                rows.append(row | result | result["diagnostics"])
    return pd.DataFrame(rows)


iqm = partial(stats.trim_mean, proportiontocut=0.25)  # a quarter, rounded down, goes on either side


def bootstrap(statistic: Callable, scores: np.ndarray) -> tuple[float, float]:
    """95 % interval, low and high, of a statistic of a score for each run."""
    if len(set(scores)) == 1:
        return min(scores), max(scores)
    options = {"n_resamples": 2000, "method": "percentile", "rng": np.random.default_rng(0)}
    return tuple(stats.bootstrap((scores,), statistic, **options).confidence_interval)


def steps_to(evaluations: dict[str, float], threshold: float) -> float:
    """Environment steps until an evaluation reaches the threshold; infinite if none does."""
    return min((int(step) for step, value in evaluations.items() if value >= threshold), default=math.inf)


def verdict(ours: tuple[float, float], published: tuple[float, float]) -> str:
    """What a published interval is against ours."""
    return "beaten" if ours[0] > published[1] else "below" if ours[1] < published[0] else "equal"


def at_common_steps(curves: Iterable[dict[str, float]], points: int = 20) -> pd.DataFrame:
    """A row for each step and each curve {step: value}, up to the end of the shortest."""
    curves = [{int(step): value for step, value in curve.items()} for curve in curves]
    steps = np.linspace(0, 1, points + 1)[1:] * min(max(curve) for curve in curves)
    values = [np.interp(steps, list(curve), list(curve.values())) for curve in curves]
    return pd.DataFrame({"steps": np.tile(steps, len(curves)), "value": np.concatenate(values)})


def label(*values: float) -> str:
    """Returns, with a digit after the point where they are small."""
    digits = 1 if abs(np.mean(values)) < 300 else 0
    return ", ".join(f"{value:.{digits}f}" for value in values)


def row_of_returns(env: str, script: str, runs: pd.DataFrame) -> list[str]:
    """How the runs ended, and what they took."""
    ends = runs.final_return.to_numpy()
    row = [env, script, f"{runs.steps.iloc[0]:,}", f"{label(ends.mean())} ({label(*ends)})"]
    row += [f"{label(iqm(ends))} [{label(*bootstrap(iqm, ends))}]", label(runs.max_return.mean())]
    return [*row, f"{runs.seconds.median():.0f}", f"{runs.steps_per_second.median():,.0f}"]


def row_of_published(env: str, script: str, runs: pd.DataFrame) -> list[str]:
    """Ours against the highest return that is published for the budget."""
    ends, steps = runs.final_return.to_numpy(), runs.steps.iloc[0]
    ours = bootstrap(np.mean, ends)
    row = [env, script, f"{steps:,}", f"{label(ends.mean())} [{label(*ours)}]"]
    figure = figure_to_beat(script, env, steps)
    if not figure:
        return [*row, "", "none published", ""]
    theirs = label(figure.value) + (f" ± {figure.std:g}" if figure.std else "")
    judged = verdict(ours, figure.interval) if len(ends) > 1 else "(one seed)"
    return [*row, theirs, f"{figure.source}, {figure.steps:,} steps", judged]


def row_of_threshold(env: str, script: str, runs: pd.DataFrame) -> list[str]:
    """Steps and seconds of training until an evaluation reaches the threshold."""
    threshold = suite.THRESHOLDS[env]
    steps = np.array([steps_to(evaluations, threshold) for evaluations in runs.evaluations])
    medians = np.median(steps), np.median(steps / runs.steps_per_second)
    shown = ["–" if x == math.inf else f"{x:,.0f}" if x >= 10 else f"{x:.1f}" for x in medians]
    return [env, str(threshold), script, f"{np.isfinite(steps).sum()} of {len(steps)}", *shown]


def table(head: str, row: Callable, frame: pd.DataFrame) -> str:
    """Markdown, a row for each script and environment."""
    groups = frame.groupby(["env", "script"], sort=False)
    rows = [head.split(" | "), ["---"] * len(head.split(" | ")), *(row(*key, runs) for key, runs in groups)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def text(frame: pd.DataFrame, figures: list[str]) -> str:
    """The report."""
    versions = {" ".join(pair) for versions in frame.versions for pair in versions.items()}
    returns = "environment | script | steps | mean return (seeds) | IQM [95 %] | maximum | seconds | steps/s"
    published = "environment | script | steps | mean [95 %] | published | source | published is"
    thresholds = "environment | threshold | script | seeds that reach it | steps | seconds"
    return REPORT.format(
        count=len(frame),
        versions=", ".join(sorted(versions)),
        figures="\n".join(f"![{name.removesuffix('.png')}]({name})" for name in FIGURES if name in figures),
        returns=table(returns, row_of_returns, frame),
        published=table(published, row_of_published, frame[frame.script.isin(suite.SCRIPTS)]),
        sources="\n".join(f"- {name}: {what}" for name, what in SOURCES.items()),
        thresholds=table(thresholds, row_of_threshold, frame[frame.env.isin(suite.THRESHOLDS)]),
    )


def look(name: str) -> dict[str, Any]:
    """A method has one colour and marker; its variants have other lines and shades, and so has its peer."""
    base = name.removeprefix("sb3-").partition("-")[0]
    index = suite.SCRIPTS.index(base)
    kind = FAMILIES[base].index(name) if name in FAMILIES[base] else 1 + name.endswith("defaults")
    return {
        "palette": tuple(np.array(mpl.colors.to_rgb(COLOURS[index])) * (1, 1, 0.4, 0.7)[kind]),
        "dashes": ("", (4, 1.5), (1, 1), (3, 1, 1, 1))[kind],
        "markers": "ov^<sDPX"[index],
    }


def draw(frame: pd.DataFrame, path: Path, labels: Sequence[str] = ("evaluated return",)) -> None:
    """A panel for each frame.panel, or for each of them and each label, a label in a row; with one legend."""
    parts = []
    for label in labels:
        tag, _ = PLOTS[label]
        for (panel, script), runs in frame.dropna(subset=tag).groupby(["panel", "script"], sort=False):
            parts.append(at_common_steps(runs[tag]).assign(panel=panel, script=script, label=label))
    if not parts:
        return
    names = [name for name in NAMES if name in set(frame.script)]
    looks = {key: {name: look(name)[key] for name in names} for key in ("palette", "dashes", "markers")}
    panels = frame.panel.nunique()
    layout = {"row": "label"} if len(labels) > 1 else {"col_wrap": panels if panels < 5 else -(-panels // 2)}
    grid = sns.relplot(
        pd.concat(parts), kind="line", x="steps", y="value", hue="script", style="script", hue_order=names,
        style_order=names, **looks, estimator=iqm, errorbar=partial(bootstrap, iqm), err_kws={"alpha": 0.15},
        col="panel", **layout, height=2.3, aspect=1.15, markevery=3, markersize=5, markeredgewidth=0,
        linewidth=1.2, facet_kws={"sharex": False, "sharey": False},
    )  # fmt: skip
    for key, axis in grid.axes_dict.items():
        label, panel = (labels[0], key) if len(labels) == 1 else key
        axis.set(xlim=(0, None), **PLOTS[label][1])
        axis.set_title(panel, fontsize=10)
        axis.set_ylabel(label if axis.get_ylabel() else "")
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.xaxis.set_major_locator(MaxNLocator(4))
        axis.grid(alpha=0.3, linewidth=0.5)
    grid.set_xlabels("environment steps")
    grid.savefig(path, dpi=160)


def draw_settings(file: Path) -> None:
    """Normalised scores of each script with different settings, a panel for each budget and environment."""
    frame = pd.DataFrame(json.loads(file.read_text())).explode("returns")
    low, high = (frame.env.map(returns) for returns in (RANDOM, REFERENCE))
    frame["normalised return"] = (frame.returns - low) / (high - low)
    grid = sns.catplot(
        frame, kind="bar", x="normalised return", y="script", hue="setting", order=suite.CONTINUOUS, row="steps",
        col="env", errorbar=("pi", 100), palette=COLOURS[:3], height=2.4, aspect=1.1, err_kws={"linewidth": 0.8},
    )  # fmt: skip
    grid.set_titles("{col_name}, {row_name:,} steps", size=9).savefig(file.with_suffix(".png"), dpi=160)


def draw_figures(frame: pd.DataFrame, folder: Path) -> None:
    """Draws what there are results for."""
    if (folder / "settings.json").exists():
        draw_settings(folder / "settings.json")
    frame = frame.assign(panel=frame.env)
    draw(frame[frame.script.isin(suite.SCRIPTS)], folder / "curves.png")
    peers = frame[frame.script.isin(suite.PEERS)]
    ours = frame[frame.script.isin(peers.script.str.removeprefix("sb3-")) & frame.env.isin(peers.env)]
    draw(pd.concat([ours, peers]), folder / "peers.png")
    variants = [frame.head(0)]
    for (env, name), runs in frame[frame.script.isin(suite.VARIANTS)].groupby(["env", "script"], sort=False):
        base = name.partition("-")[0]
        same = suite.budget(base, env) == suite.budget(name, env)
        beside = frame[(frame.env == env) & (frame.script == base) & same]
        variants.append(pd.concat([runs, beside]).assign(panel=f"{env}\n{base}"))
    once = pd.concat(variants).drop_duplicates(["panel", "command"])
    draw(once, folder / "variants.png")
    bounded = frame.env.isin(frame.env[frame.script.isin(("npg", "trpo"))])
    compared = frame[bounded & frame.script.isin(("npg", "trpo", "trpo-dual", "ppo"))]
    draw(compared, folder / "trust_regions.png", tuple(PLOTS))


def hyperparameters(script: str, env: str, command: str) -> dict[str, Any]:
    """All of them, defaults included, from the command line of a run; of a peer also what its zoo sets."""
    program, *words = shlex.split(command.removeprefix("python ").removeprefix("-m "))
    module = importlib.import_module(program.removesuffix(".py"))
    flags = {"script": script} | asdict(tyro.cli(module.Args, args=[*words, "--run-dir", ""]))
    flags |= vars(module).get("ZOO", {}).get(script[4:], {}).get(env, {})
    return {name: x if isinstance(x, bool | int | float) else str(x) for name, x in flags.items()}


def write_hparams(frame: pd.DataFrame, folder: Path) -> None:
    """One session of TensorBoard's HPARAMS page for each run, in a folder of its own."""
    from torch.utils.tensorboard import SummaryWriter

    shutil.rmtree(folder, ignore_errors=True)
    with SummaryWriter(str(folder)) as writer:
        for _, run in frame.iterrows():
            names = ("final_return", "max_return", "steps_per_second", "seconds")
            metrics = {f"hparams/{name}": run[name] for name in names}
            given = hyperparameters(run.script, run.env, run.command)
            name = f"{run.env}/{run.script}/seed{given['seed']}"
            writer.add_hparams(given, metrics, run_name=name, global_step=run.steps)


def main(args: Args) -> None:
    """Reads the results and writes the report."""
    mpl.use("agg")  # no screen is needed
    folder, runs = ROOT / args.results, ROOT / args.runs
    frame = load(folder)
    if frame.empty:
        print(f"no results in {folder}, so no report")
        return
    draw_figures(frame, folder)
    (folder / "report.md").write_text(text(frame, [path.name for path in folder.glob("*.png")]))
    if runs.is_dir():
        write_hparams(frame, runs / "hparams")
    print(f"report in {folder / 'report.md'}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
