"""Metrics, and tables and figures over every run that finetune.py left under out/runs.

    python eval.py              a row per setting and model: median over sites ± s.e. over folds
    python eval.py --plot       figures too: distribution, map, hydrographs, skill against labels
"""

import json
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from train import option, parse

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


def load_runs(folder):
    """Every run under folder/runs: {setting: {model: [run]}}, with the metrics of its sites."""
    runs = defaultdict(lambda: defaultdict(list))
    for path in sorted(Path(folder, "runs").glob("*.npz")):
        with np.load(path) as z:
            run = dict(z)
        run |= json.loads(str(run["settings"]))
        run["metrics"] = [site_metrics(o, s) for o, s in zip(run["obs"], run["sim"])]
        runs[run["setting"]][run["name"]].append(run)
    return runs


def per_site(runs, metric="nse"):
    """{site: mean over seeds of a metric} of one model's runs."""
    values = defaultdict(list)
    for run in runs:
        for site, scores in zip(run["ids"], run["metrics"]):
            values[str(site)].append(scores[metric])
    return {site: float(np.mean(v)) for site, v in values.items()}


def table(runs, reference="lstm", metrics=("nse", "kge", "corr", "rmse", "ubrmse", "fhv")):
    """Print, per setting and model, the median ± s.e. over folds, and the gain on `reference`."""
    for setting, models in runs.items():
        print(f"\n{setting}\n{'model':<20}{'folds':>6}{'seeds':>6}{'sites':>6}"
              + "".join(f"{m:>16}" for m in metrics)
              + f"{'clipped':>9}{'< 0':>7}{'gain':>8}{'p':>9}")
        base = per_site(models.get(reference, ()))
        for name, of_model in models.items():
            folds = {run["fold"] for run in of_model}
            line = f"{name:<20}{len(folds):>6}{len({run['seed'] for run in of_model}):>6}"
            line += f"{len(per_site(of_model)):>6}"
            for metric in metrics:
                medians = [np.nanmedian([*per_site(part, metric).values()]) for part in
                           [of_model] + [[r for r in of_model if r["fold"] == f] for f in folds]]
                error = ratio(np.std(medians[1:]), (len(folds) - 1) ** 0.5)
                line += f"{medians[0]:>8.3f} ± {error:5.3f}"
            nse = per_site(of_model)
            values = np.array([*nse.values()])
            line += f"{np.nanmean(np.clip(values, -1, 1)):>9.3f}{np.nanmean(values < 0):>7.1%}"
            gain = np.array([nse[site] - base[site] for site in nse if site in base])
            gain = gain[np.isfinite(gain)]
            if len(gain) and name != reference:
                line += f"{np.median(gain):>+8.3f}{sign_test(gain):>9.1e}"
            print(line)


def plot(runs, folder):
    """Draw every setting's figures into the folder; returns their paths."""
    try:
        import matplotlib
    except ImportError:
        print("--plot needs matplotlib: pip install matplotlib")
        return []
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    paths, curves = [], defaultdict(lambda: defaultdict(dict))

    def save(figure, name):
        paths.append(Path(folder, name.replace(", ", "_").replace(" ", "-") + ".png"))
        figure.savefig(paths[-1], dpi=80, bbox_inches="tight")
        plt.close(figure)

    for setting, models in runs.items():
        figure, axis = plt.subplots(figsize=(5, 3.5))
        for name, of_model in models.items():
            values = np.sort([*per_site(of_model).values()])
            share = np.linspace(0, 1, len(values))
            axis.plot(values, share, label=f"{name}, {np.median(values):.2f}")
            head, _, labelled = setting.partition(", labelled ")
            curves[head][name][labelled or "all"] = np.median(values)
        axis.set(xlim=(-1, 1), xlabel="NSE at held-out sites", ylabel="share of sites",
                 title=setting)
        axis.legend(title="model, median", fontsize=8)
        save(figure, f"distribution {setting}")
        for name, of_model in models.items():
            nse, run = per_site(of_model), of_model[0]
            place = {str(i): x for r in of_model for i, x in zip(r["ids"], r["latlon"])}
            lat, lon = np.array([place[site] for site in nse]).T
            figure, axis = plt.subplots(figsize=(7, 3.5))
            dots = axis.scatter(lon, lat, c=[*nse.values()], vmin=0, vmax=1, s=12)
            figure.colorbar(dots, label="NSE")
            axis.set(xlabel="longitude", ylabel="latitude", title=f"{name}, {setting}")
            save(figure, f"map {setting} {name}")
            order = np.argsort([m["nse"] for m in run["metrics"]])
            figure, axes = plt.subplots(2, 1, figsize=(8, 5), layout="constrained")
            for axis, i, what in zip(axes, (order[len(order) // 2], order[0]), ("median", "worst")):
                for key, label, colour in (("obs", "observed", "k"), ("sim", name, "C1")):
                    axis.plot(run["dates"][-730:], run[key][i][-730:], colour, lw=0.8, label=label)
                title = f"{what} site: {run['ids'][i]}, NSE {run['metrics'][i]['nse']:.2f}"
                axis.set(ylabel="mm/d", title=title)
            axes[0].legend()
            save(figure, f"hydrographs {setting} {name}")
    for head, models in curves.items():
        figure, axis = plt.subplots(figsize=(5, 3.5))
        for name, points in models.items():
            labels = sorted(points, key=lambda n: float("inf") if n == "all" else int(n))
            axis.plot(labels, [points[n] for n in labels], "o-", label=name)
        axis.set(xlabel="training sites with observations", ylabel="median NSE", title=head)
        axis.legend()
        save(figure, f"labels {head}")
    return paths


@dataclass
class Options:
    out: str = option("out", "folder whose runs/ finetune.py wrote")
    plot: bool = option(False, "draw figures into --out (needs matplotlib)")


def main(argv=None):
    o = parse(Options, __doc__, argv)
    runs = load_runs(o.out)
    if not runs:
        raise FileNotFoundError(f"no runs in {o.out}/runs: start with python finetune.py")
    table(runs)
    for path in plot(runs, o.out) if o.plot else ():
        print(path)


if __name__ == "__main__":
    main()
