"""Metrics, and the tables and figures over every run that finetune.py left under out/.

    python eval.py                  one row per model and setting: median over sites ± s.e. over folds
    python eval.py --plot           also figures: map, distribution, hydrographs, label scarcity
"""

import json
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from train import option, parse


def site_metrics(obs, sim):
    """Scores of one site's series over its valid pairs; NaN where undefined. SPEC of each:

    rmse, mae, ubrmse (RMSE of anomalies) in the unit of obs; corr Pearson r; nse = 1 - SSE/SST
    (doi 10.1016/0022-1694(70)90255-6); kge (10.1016/j.jhydrol.2009.08.003); pbias, fhv (top 2 %
    of flows), flv (lowest 30 %, logs) in % (10.1029/2007WR006716); fdc_rmse over 100 percentiles.
    """
    keys = "rmse ubrmse corr nse kge mae pbias fhv flv fdc_rmse".split()
    obs, sim = np.asarray(obs, float).ravel(), np.asarray(sim, float).ravel()
    valid = np.isfinite(obs) & np.isfinite(sim)
    o, s = obs[valid], sim[valid]
    if len(o) < 2:
        return dict.fromkeys(keys, math.nan)
    error, do, ds = s - o, o - o.mean(), s - s.mean()
    sorted_o, sorted_s, top, low = np.sort(o), np.sort(s), round(0.02 * len(o)), round(0.3 * len(o))

    def over(a, b):
        return float(a / b) if abs(b) > 1e-12 else math.nan

    corr = over((do * ds).sum(), math.sqrt((do ** 2).sum() * (ds ** 2).sum()))
    kge = 1 - math.sqrt((corr - 1) ** 2 + (over(s.std(), o.std()) - 1) ** 2
                        + (over(s.mean(), o.mean()) - 1) ** 2)
    log_o, log_s = (np.log(np.maximum(x[:low], 1e-6)) for x in (sorted_o, sorted_s))
    low_o, low_s = ((x - x[:1]).sum() for x in (log_o, log_s))
    percentiles = np.linspace(0, 100, 100)
    fdc = np.percentile(s, percentiles) - np.percentile(o, percentiles)
    return dict(zip(keys, (
        math.sqrt((error ** 2).mean()), math.sqrt(((ds - do) ** 2).mean()), corr,
        1 - over((error ** 2).sum(), (do ** 2).sum()), kge, float(np.abs(error).mean()),
        100 * over(error.sum(), o.sum()),
        100 * over((sorted_s[-top:] - sorted_o[-top:]).sum(), sorted_o[-top:].sum()) if top else math.nan,
        -100 * over(low_s - low_o, low_o), math.sqrt((fdc ** 2).mean()))))


def class_metrics(label, score):
    """accuracy, precision, recall, f1 at score >= 0.5, and ROC auc (ranks, ties halved); label 0/1."""
    label, score = np.asarray(label, float).ravel(), np.asarray(score, float).ravel()
    valid = np.isfinite(label) & np.isfinite(score)
    y, guess = label[valid] > 0.5, score[valid] >= 0.5
    hits, n1, n0 = (y & guess).sum(), y.sum(), (~y).sum()
    _, place, ties = np.unique(score[valid], return_inverse=True, return_counts=True)
    rank = (np.cumsum(ties) - (ties - 1) / 2)[place]

    def over(a, b):
        return float(a / b) if b else math.nan

    return {"accuracy": over((y == guess).sum(), len(y)), "precision": over(hits, guess.sum()),
            "recall": over(hits, n1), "f1": over(2 * hits, guess.sum() + n1),
            "auc": over(rank[y].sum() - n1 * (n1 + 1) / 2, n1 * n0)}


def sign_test(difference):
    """Two-sided p-value that positive and negative differences are equally likely (exact)."""
    wins, n = int((difference > 0).sum()), int((difference != 0).sum())
    tail = [math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2)
            for k in range(min(wins, n - wins) + 1)]
    return min(1.0, 2 * sum(map(math.exp, tail))) if n else math.nan


def load_runs(folder):
    """Every run under the folder -> {setting without model: {model: {(fold, seed): run}}}."""
    runs = defaultdict(lambda: defaultdict(dict))
    for path in sorted(Path(folder).glob("runs/*.npz")):
        with np.load(path) as z:
            run = {key: z[key] for key in z.files}
        s = json.loads(str(run["settings"]))
        run["metrics"] = [site_metrics(o, p) for o, p in zip(run["obs"], run["sim"])]
        runs[s["setting"]][s["name"]][s["fold"], s["seed"]] = run
    return runs


def per_site(by_fold, metric="nse"):
    """{site: mean over seeds of a metric} of one model's runs, over all folds."""
    values = defaultdict(list)
    for run in by_fold.values():
        for site, scores in zip(run["ids"], run["metrics"]):
            values[str(site)].append(scores[metric])
    return {site: float(np.mean(v)) for site, v in values.items()}


def table(runs, reference="lstm", metrics=("nse", "kge", "corr", "rmse", "ubrmse", "fhv")):
    """Print, per setting and model, the median over sites ± standard error over folds."""
    for setting, models in runs.items():
        print(f"\n{setting}\n{'model':<22}{'folds':>6}{'seeds':>6}{'sites':>6}"
              + "".join(f"{m:>15}" for m in metrics)
              + f"{'mean clipped':>14}{'below 0':>9}{'vs ' + reference:>9}{'p':>9}")
        base = per_site(models[reference]) if reference in models else {}
        for name, by_fold in models.items():
            folds, seeds = ({key[i] for key in by_fold} for i in (0, 1))
            cells = ""
            for metric in metrics:
                by_site = {f: per_site({k: r for k, r in by_fold.items() if k[0] == f}, metric)
                           for f in folds}
                medians = [np.nanmedian([*v.values()]) for v in by_site.values()]
                error = np.std(medians, ddof=1) / len(folds) ** 0.5 if len(folds) > 1 else math.nan
                everything = [x for v in by_site.values() for x in v.values()]
                cells += f"{np.nanmedian(everything):>8.3f}" + f" ± {error:.3f}".rjust(7)
            nse = per_site(by_fold)
            both = [s for s in nse if s in base and np.isfinite(nse[s] - base[s])]
            gain = np.array([nse[s] - base[s] for s in both])
            values = np.array([*nse.values()])
            cells += f"{np.nanmean(np.clip(values, -1, 1)):>14.3f}{np.nanmean(values < 0):>9.1%}"
            if both and name != reference:
                cells += f"{np.median(gain):>+9.3f}{sign_test(gain):>9.1e}"
            print(f"{name:<22}{len(folds):>6}{len(seeds):>6}{len(nse):>6}{cells}")


def plot(runs, folder):
    """Figures of every setting under the folder; returns their paths."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("--plot needs matplotlib: pip install matplotlib")
        return []
    paths = []

    def save(figure, name):
        paths.append(Path(folder) / f"{name}.png")
        figure.savefig(paths[-1], dpi=90, bbox_inches="tight")
        plt.close(figure)

    for setting, models in runs.items():
        figure, axis = plt.subplots(figsize=(5, 3.5))
        for name, by_fold in models.items():
            values = np.sort(np.nan_to_num([*per_site(by_fold).values()], nan=-9))
            axis.plot(values, np.linspace(0, 1, len(values)), label=f"{name} ({np.median(values):.2f})")
        axis.set(xlim=(-1, 1), xlabel="NSE at sites held out", ylabel="share of sites", title=setting)
        axis.legend(fontsize=8)
        save(figure, f"cdf {setting}")
        for name, by_fold in models.items():
            run = next(iter(by_fold.values()))
            every = {str(i): x for r in by_fold.values() for i, x in zip(r["ids"], r["latlon"])}
            scores = per_site(by_fold)
            figure, axis = plt.subplots(figsize=(7, 3.5))
            lat, lon = np.array([every[s] for s in scores]).T
            points = axis.scatter(lon, lat, c=[*scores.values()], vmin=0, vmax=1, s=10, cmap="viridis")
            figure.colorbar(points, label="NSE")
            axis.set(xlabel="longitude", ylabel="latitude", title=f"{name}, {setting}")
            save(figure, f"map {setting} {name}")
            order = np.argsort([m["nse"] for m in run["metrics"]])
            figure, axes = plt.subplots(2, 1, figsize=(8, 5))
            for axis, i, what in zip(axes, (order[len(order) // 2], order[0]), ("median", "worst")):
                axis.plot(run["dates"][-730:], run["obs"][i][-730:], "k", lw=0.8, label="observed")
                axis.plot(run["dates"][-730:], run["sim"][i][-730:], "C1", lw=0.8, label=name)
                axis.set(ylabel="mm/d", title=f"{what}: {run['ids'][i]}, NSE {run['metrics'][i]['nse']:.2f}")
                axis.legend(fontsize=8)
            figure.tight_layout()
            save(figure, f"hydrographs {setting} {name}")
    curves = defaultdict(lambda: defaultdict(list))
    for setting, models in runs.items():
        for name, by_fold in models.items():
            head, _, n = setting.partition(", labelled ")
            if n or len(runs) > 1:
                curves[head][name].append((int(n or 0) or 10 ** 4, np.median([*per_site(by_fold).values()])))
    for head, models in curves.items():
        figure, axis = plt.subplots(figsize=(5, 3.5))
        for name, points in models.items():
            n, y = zip(*sorted(points))
            axis.plot(range(len(n)), y, "o-", label=name)
            axis.set_xticks(range(len(n)), ["all" if x == 10 ** 4 else x for x in n])
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
