"""Metrics, and tables and figures over every run that finetune.py left under out/runs.

    python eval.py              a row per setting and model: score ± standard error over folds
    python eval.py --plot       figures too: distribution, map, hydrographs, skill against labels
    python eval.py --landcover DIR --weights DIR    Sentinel-2 scenes by Dynamic World: the months
"""

import json
import math
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import data
from model import DynamicWorld
from train import option, parse

BASELINES = ("lstm", "mlp", "cnn", "pixel")
COLOURS = ("#419bdf", "#397d49", "#88b053", "#7a87c6", "#e49635", "#dfc35a", "#c4281b", "#a59b8f",
           "#b39fe1")            # Dynamic World's, of data.LAND_COVER
METRICS = "rmse ubrmse corr nse kge mae pbias fhv flv fdc_rmse".split()


def ratio(a, b):
    """a / b as a float, NaN where b is 0."""
    return float(a / b) if abs(b) > 1e-12 else math.nan


def site_metrics(obs, sim):
    """Scores of one site over its valid pairs, NaN where undefined: a dict with METRICS as keys.

    rmse, mae, ubrmse (RMSE of anomalies), fdc_rmse (100 percentiles) in the unit of obs; corr:
    Pearson r; nse = 1 - SSE/SST (doi 10.1016/0022-1694(70)90255-6); kge (10.1016/j.jhydrol.2009
    .08.003); pbias, fhv (top 2 %), flv (lowest 30 %, of logs) in % (10.1029/2007WR006716).
    """
    obs, sim = np.asarray(obs, float).ravel(), np.asarray(sim, float).ravel()
    valid = np.isfinite(obs) & np.isfinite(sim)
    o, s = obs[valid], sim[valid]
    if len(o) < 2:
        return dict.fromkeys(METRICS, math.nan)
    error, do, ds = s - o, o - o.mean(), s - s.mean()
    high_o, high_s = (np.sort(x)[len(x) - max(round(0.02 * len(x)), 1):].sum() for x in (o, s))
    low_o, low_s = (np.log(np.maximum(np.sort(x)[:round(0.3 * len(x)) + 1], 1e-6)) for x in (o, s))
    low_o, low_s = (low_o - low_o[0]).sum(), (low_s - low_s[0]).sum()
    corr = ratio((do * ds).sum(), math.sqrt((do ** 2).sum() * (ds ** 2).sum()))
    spread, mean = ratio(s.std(), o.std()), ratio(s.mean(), o.mean())
    curve = np.percentile(s, np.linspace(0, 100, 100)) - np.percentile(o, np.linspace(0, 100, 100))
    return dict(zip(METRICS, (
        math.sqrt((error ** 2).mean()), math.sqrt(((ds - do) ** 2).mean()), corr,
        1 - ratio((error ** 2).sum(), (do ** 2).sum()),
        1 - math.sqrt((corr - 1) ** 2 + (spread - 1) ** 2 + (mean - 1) ** 2),
        float(np.abs(error).mean()), 100 * ratio(error.sum(), o.sum()),
        100 * ratio(high_s - high_o, high_o), -100 * ratio(low_s - low_o, low_o),
        math.sqrt((curve ** 2).mean()))))


def class_metrics(label, score):
    """accuracy, precision, recall, f1 at score >= 0.5, and ROC auc (by ranks); labels 0 and 1."""
    label, score = np.asarray(label, float).ravel(), np.asarray(score, float).ravel()
    valid = np.isfinite(label) & np.isfinite(score)
    true, guess = label[valid] > 0.5, score[valid] >= 0.5
    hits, ones, zeros = (true & guess).sum(), true.sum(), (~true).sum()
    _, place, ties = np.unique(score[valid], return_inverse=True, return_counts=True)
    rank = (np.cumsum(ties) - (ties - 1) / 2)[place]
    return {"accuracy": ratio((true == guess).sum(), len(true)),
            "precision": ratio(hits, guess.sum()), "recall": ratio(hits, ones),
            "f1": ratio(2 * hits, guess.sum() + ones),
            "auc": ratio(rank[true].sum() - ones * (ones + 1) / 2, ones * zeros)}


def sign_test(difference):
    """Two-sided exact p-value that a difference is as often positive as negative."""
    wins, n = int((difference > 0).sum()), int((difference != 0).sum())
    tail = (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2)
            for k in range(min(wins, n - wins) + 1))
    return min(1.0, 2 * sum(map(math.exp, tail))) if n else math.nan


def skill(obs, sim):
    """{name: score} of a test set, (sites, days) each; the first is the one to stop early by.

    Sites with series: medians over them, but for the mean of NSE clipped to ±1 and the share below
    0. A value, or a class 0 or 1, per site: over all sites at once.
    """
    if obs.shape[1] > 1:
        sites = [site_metrics(o, s) for o, s in zip(obs, sim)]
        nse = np.array([scores["nse"] for scores in sites])
        names = ("nse", "kge", "corr", "rmse", "ubrmse", "fhv")
        medians = {name: np.nanmedian([scores[name] for scores in sites]) for name in names}
        return {"clipped": np.nanmean(np.clip(nse, -1, 1)), **medians, "below 0": (nse < 0).mean()}
    if np.isin(obs, (0, 1)).all():
        scores = class_metrics(obs, sim)
        return {name: scores[name] for name in ("auc", "accuracy", "f1")}
    if np.array_equal(sim, sim.round()) and np.array_equal(obs, obs.round()):   # several classes
        table = np.zeros((int(max(obs.max(), sim.max())) + 1,) * 2)             # observed, guessed
        np.add.at(table, (obs.astype(int), sim.astype(int)), 1)
        hits, seen, guessed = table.diagonal(), table.sum(1), table.sum(0)
        f1 = 2 * hits / np.maximum(seen + guessed, 1)
        there = seen > 0
        return {"balanced": (hits[there] / seen[there]).mean(),
                "accuracy": hits.sum() / table.sum(),
                **{f"f1 {k}": f1[k] for k in np.flatnonzero(there)}}
    scores, difference = site_metrics(obs, sim), sim - obs
    median = np.median(difference)
    return {"R2": scores["nse"], "rmse": scores["rmse"], "median difference": median,
            "nmad": 1.4826 * np.median(abs(difference - median))}


def load_runs(folder):
    """Every run under folder/runs: {setting: {model: [run]}}."""
    runs = defaultdict(lambda: defaultdict(list))
    for path in sorted(Path(folder, "runs").glob("*.npz")):
        with np.load(path) as z:
            run = dict(z)
        run |= json.loads(str(run["settings"]))
        runs[run["setting"]][run["name"]].append(run)
    return runs


def per_site(runs):
    """{site: score} of one model's runs, mean over seeds: NSE, or minus the error of its value."""
    values = defaultdict(list)
    for run in runs:
        for site, o, s in zip(run["ids"], run["obs"], run["sim"]):
            error = (o != s)[0] if run["task"] == "landcover" else abs(o - s)[0]
            values[str(site)].append(site_metrics(o, s)["nse"] if len(o) > 1 else -float(error))
    return {site: float(np.mean(v)) for site, v in values.items()}


def mean_skill(runs):
    """Mean over seeds of the skill on all the test sets of a model's runs."""
    by_seed = defaultdict(list)
    for run in runs:
        by_seed[run["seed"]].append(run)
    scores = [skill(*(np.concatenate([run[key] for run in part]) for key in ("obs", "sim")))
              for part in by_seed.values()]
    return {name: np.mean([score[name] for score in scores]) for name in scores[0]}


def table(runs):
    """Print each setting's models: scores over all test sites ± standard error over folds, and the
    median gain per site over the supervised baseline with the p-value of a sign test."""
    for setting, models in runs.items():
        base = next((per_site(models[name]) for name in BASELINES if name in models), {})
        print(f"\n{setting}")
        for name, of_model in models.items():
            seeds, folds = ({run[key] for run in of_model} for key in ("seed", "fold"))
            total = mean_skill(of_model)
            parts = [mean_skill([r for r in of_model if r["fold"] == fold]) for fold in folds]
            line = f"{name:<20} {len(folds)} folds, {len(seeds)} seeds"
            for metric, mean in total.items():
                by_fold = [part.get(metric, math.nan) for part in parts]
                mean = np.mean(by_fold) if "auc" in total else mean     # scores of folds differ
                error = ratio(np.nanstd(by_fold), (len(folds) - 1) ** 0.5)
                line += f"  {metric} {mean:.3f} ± {error:.3f}"
            mine = per_site(of_model)
            gain = np.array([mine[site] - base[site] for site in mine if site in base])
            gain = gain[np.isfinite(gain) & (gain != 0)]
            if len(gain):
                line += f"  gain {np.median(gain):+.3f}, p {sign_test(gain):.1e}"
            print(line)


def pyplot():
    """matplotlib.pyplot for files, or None and a message where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        return print("--plot needs matplotlib: pip install matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot
    return matplotlib.pyplot


def plot(runs, folder):
    """Draw a figure per setting and the curve of skill against labels into the folder."""
    plt = pyplot()
    if plt is None:
        return
    curves = defaultdict(dict)
    for setting, models in runs.items():
        figure, axes = plt.subplot_mosaic(
            [["distribution", "map"], ["median"] * 2, ["worst"] * 2], figsize=(12, 9),
            layout="constrained", height_ratios=(2, 1, 1))
        for name, of_model in models.items():
            values = np.sort([*per_site(of_model).values()])
            label = f"{name}, median {np.nanmedian(values):.2f}"
            axes["distribution"].plot(values, np.linspace(0, 1, len(values)), label=label)
            head, _, labelled = setting.partition(", labelled ")
            curves[f"{name}, {head}"][float(labelled or "inf")] = np.nanmedian(values)
        daily = len(of_model[0]["dates"]) > 1
        what = "NSE" if daily else "minus absolute error"
        axes["distribution"].set(xlim=(-1, 1) if daily else None, ylabel="share of sites",
                                 xlabel=f"{what} at held-out sites", title=setting)
        axes["distribution"].legend()
        score, run = per_site(of_model), of_model[0]        # of the last model
        where = {str(i): x for r in of_model for i, x in zip(r["ids"], r["latlon"])}
        lat, lon = np.array([where[site] for site in score]).T
        dots = axes["map"].scatter(lon, lat, c=[*score.values()], s=12, vmin=0 if daily else None)
        figure.colorbar(dots, label=what)
        axes["map"].set(xlabel="longitude", ylabel="latitude", title=name)
        order = np.argsort([score[str(i)] for i in run["ids"]])
        for kind, i in ("median", order[len(order) // 2]), ("worst", order[0]):
            for key, label, colour in ("obs", "observed", "k"), ("sim", name, "C1"):
                days, values = run["dates"][-730:], run[key][i][-730:]
                axes[kind].plot(days, values, colour, lw=0.8, label=label)
            axes[kind].legend(title=f"{kind} site {run['ids'][i]}: {score[str(run['ids'][i])]:.2f}")
        figure.savefig(Path(folder, setting.replace(", ", "_").replace(" ", "-") + ".png"), dpi=80)
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, points in curves.items():
        labels = sorted(points)
        axis.plot([f"{n:.0f}" if n < math.inf else "all" for n in labels],
                  [points[n] for n in labels], "o-", label=name)
    axis.set(xlabel="training sites with observations", ylabel="median score at held-out sites")
    axis.legend(fontsize=8)
    figure.savefig(Path(folder, "labels.png"), dpi=80)


def monthly(classes, clear, dates):
    """Shares of the 9 classes among the clear pixels, by month and over all months (the mean of the
    months), and the share that is clear: {month: (10,)}; classes, clear (T, H, W), dates (T,)."""
    months = {}
    for month in np.unique(dates.astype("datetime64[M]")):
        at = dates.astype("datetime64[M]") == month
        seen = classes[at][clear[at]]
        share = np.bincount(seen, minlength=9) / len(seen) if len(seen) else np.full(9, np.nan)
        months[str(month)] = np.append(share, clear[at].mean())
    return months | {"all": np.nanmean([*months.values()], 0)}


def landcover(o):
    """Classify dated scenes with Dynamic World's released network; print and draw the months."""
    dates, scenes, clear = data.read_scenes(o.landcover)
    model, began = DynamicWorld.from_release(o.weights), time.time()
    with torch.no_grad():
        x = torch.from_numpy(data.normalize_s2(scenes)).permute(0, 3, 1, 2)     # (T, 9, H, W)
        classes = torch.cat([model(scene[None]).argmax(1) for scene in x]).numpy()
    print(f"{len(dates)} scenes of {classes.shape[1]} x {classes.shape[2]} pixels in "
          f"{time.time() - began:.2f} s")
    for title, mask in (("clear pixels", clear), ("all pixels, clouds too", clear | True)):
        print(f"{title:<24}" + "".join(f"{name[:11]:>12}" for name in (*data.LAND_COVER, "seen")))
        months = monthly(classes, mask, dates)
        for month, shares in months.items():
            print(f"{month:<24}" + "".join(f"{share:>12.1%}" for share in shares))
    if o.plot and (plt := pyplot()):
        from matplotlib.colors import ListedColormap
        months, colours = monthly(classes, clear, dates), ListedColormap(COLOURS)
        figure, axes = plt.subplots(1, 1 + len(dates), figsize=(16, 3.5), layout="constrained")
        bottom = np.zeros(len(months))
        for name, colour, share in zip(data.LAND_COVER, COLOURS, np.array([*months.values()]).T):
            axes[0].bar(list(months), share, bottom=bottom, color=colour, label=name)
            bottom += np.nan_to_num(share)
        axes[0].legend(fontsize=6)
        axes[0].set_title("share of clear pixels")
        for axis, date, top, mask in zip(axes[1:], dates, classes, clear):
            axis.imshow(top, colours, vmin=0, vmax=8, interpolation="nearest")
            axis.set_title(f"{date}, {mask.mean():.0%} clear")
            axis.set_axis_off()
        Path(o.out).mkdir(exist_ok=True)
        figure.savefig(Path(o.out, "landcover.png"), dpi=80)


@dataclass
class Options:
    out: str = option("out", "folder whose runs/ finetune.py wrote")
    plot: bool = option(False, "draw figures into --out (needs matplotlib)")
    landcover: str = option("", "folder of an npz of dated Sentinel-2 scenes to classify")
    weights: str = option("", "folder of Dynamic World's released weights, with variables/")


def main(argv=None):
    o = parse(Options, __doc__, argv)
    if o.landcover:
        return landcover(o)
    runs = load_runs(o.out)
    if not runs:
        raise FileNotFoundError(f"no runs in {o.out}/runs: start with python finetune.py")
    table(runs)
    if o.plot:
        plot(runs, o.out)


if __name__ == "__main__":
    main()
