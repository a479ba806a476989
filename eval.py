"""Metrics, and tables and figures over every run that finetune.py left under out/runs.

    python eval.py              a row per setting and model: score ± standard error over folds
    python eval.py --plot       figures too: distribution, map, hydrographs, skill against labels,
                                weather reconstructed by out/pretrained.pt
    python eval.py --landcover DIR --weights DIR    Sentinel-2 scenes by Dynamic World: the months
"""

import json
import math
from collections import defaultdict
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

import data
from model import DynamicWorld
from train import Windows, load_checkpoint, option, parse

BASELINES = ("lstm", "mlp", "cnn", "pixel")
# of data.LAND_COVER, as Dynamic World draws them
COLOURS = "#419bdf #397d49 #88b053 #7a87c6 #e49635 #dfc35a #c4281b #a59b8f #b39fe1".split()


def ratio(a, b):
    """a / b as a float, NaN where b is 0."""
    return float(a / b) if abs(b) > 1e-12 else math.nan


def site_metrics(obs, sim):
    """{metric: score} of one site over its valid pairs, NaN where undefined.

    RMSEs and mae in the unit of obs; pbias, fhv, flv in %. NSE: doi 10.1016/0022-1694(70)90255-6,
    KGE: 10.1016/j.jhydrol.2009.08.003, biases of high and low flows: 10.1029/2007WR006716.
    """
    obs, sim = np.asarray(obs, float).ravel(), np.asarray(sim, float).ravel()
    valid = np.isfinite(obs) & np.isfinite(sim)
    o, s = obs[valid], sim[valid]
    if len(o) < 2:
        o = s = np.full(2, math.nan)                        # every score becomes NaN
    error, do, ds = s - o, o - o.mean(), s - s.mean()
    corr = ratio((do * ds).sum(), math.sqrt((do ** 2).sum() * (ds ** 2).sum()))
    spread, mean = ratio(s.std(), o.std()), ratio(s.mean(), o.mean())
    high_o, high_s = (np.sort(x)[-max(round(0.02 * len(x)), 1):] for x in (o, s))    # top 2 %
    low_o, low_s = (np.log(np.sort(x)[:round(0.3 * len(x)) + 1].clip(1e-6)) for x in (o, s))
    low_o, low_s = low_o - low_o[0], low_s - low_s[0]       # lowest 30 %, above the minimum
    curve_o, curve_s = (np.percentile(x, np.linspace(0, 100, 100)) for x in (o, s))
    return {
        "rmse": math.sqrt((error ** 2).mean()),
        "ubrmse": math.sqrt(((ds - do) ** 2).mean()),       # of the anomalies
        "corr": corr,                                       # Pearson's r
        "nse": 1 - ratio((error ** 2).sum(), (do ** 2).sum()),
        "kge": 1 - math.sqrt((corr - 1) ** 2 + (spread - 1) ** 2 + (mean - 1) ** 2),
        "mae": float(abs(error).mean()),
        "pbias": 100 * ratio(error.sum(), o.sum()),
        "fhv": 100 * ratio((high_s - high_o).sum(), high_o.sum()),      # biases of high and of
        "flv": -100 * ratio((low_s - low_o).sum(), low_o.sum()),         # (logs of) low flows
        "fdc_rmse": math.sqrt(((curve_s - curve_o) ** 2).mean())}   # of the flow-duration curves


def class_metrics(label, score):
    """accuracy, precision, recall, f1 at score >= 0.5, and ROC auc (by ranks); labels 0 and 1."""
    label, score = np.asarray(label, float).ravel(), np.asarray(score, float).ravel()
    valid = np.isfinite(label) & np.isfinite(score)
    true, guess = label[valid] > 0.5, score[valid] >= 0.5
    hits, ones, zeros = (true & guess).sum(), true.sum(), (~true).sum()
    _, place, ties = np.unique(score[valid], return_inverse=True, return_counts=True)
    rank = (np.cumsum(ties) - (ties - 1) / 2)[place]        # equal scores share their mean rank
    return {"accuracy": ratio((true == guess).sum(), len(true)),
            "precision": ratio(hits, guess.sum()),
            "recall": ratio(hits, ones),
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

    Series: medians over sites, but for the mean of NSE clipped to ±1 and the share of NSE below 0.
    One value, class, or probability of class 1 per site: over all sites at once.
    """
    if obs.shape[1] > 1:
        sites = [site_metrics(o, s) for o, s in zip(obs, sim)]
        nse = np.array([scores["nse"] for scores in sites])
        names = ("nse", "kge", "corr", "rmse", "ubrmse", "fhv")
        medians = {name: np.nanmedian([scores[name] for scores in sites]) for name in names}
        failed = (nse < 0).sum() / max(np.isfinite(nse).sum(), 1)
        return {"clipped": np.nanmean(nse.clip(-1, 1)), **medians, "below 0": failed}
    if np.array_equal(sim, sim.round()):                    # classes, not probabilities or numbers
        each = {k: class_metrics(obs == k, sim == k) for k in np.unique(obs)}
        return {"balanced": np.mean([scores["recall"] for scores in each.values()]),
                "accuracy": (obs == sim).mean(),
                **{f"f1 {k:.0f}": scores["f1"] for k, scores in each.items()}}
    if np.isin(obs, (0, 1)).all():
        scores = class_metrics(obs, sim)
        return {name: scores[name] for name in ("auc", "accuracy", "f1")}
    scores, difference = site_metrics(obs, sim), sim - obs
    median = np.median(difference)
    return {"R2": scores["nse"], "rmse": scores["rmse"], "median difference": median,
            "nmad": 1.4826 * np.median(abs(difference - median))}


def load_runs(folder):
    """Every run under folder/runs: {setting: {model: [run]}}."""
    runs = defaultdict(lambda: defaultdict(list))
    for path in sorted(Path(folder, "runs").glob("*.npz")):
        run = dict(np.load(path))
        run |= json.loads(str(run["settings"]))
        runs[run["setting"]][run["name"]].append(run)
    return runs


def per_site(runs):
    """{site: score} of one model's runs, mean over seeds: NSE, or minus the error of its value."""
    scores = defaultdict(list)
    for run in runs:
        for site, o, s in zip(run["ids"], run["obs"], run["sim"]):
            error = o != s if run["task"] == "landcover" else abs(o - s)
            scores[site].append(site_metrics(o, s)["nse"] if len(o) > 1 else -float(error[0]))
    return {site: np.mean(of_seeds) for site, of_seeds in scores.items()}


def mean_skill(runs):
    """Mean over seeds of the skill on all the test sets of one model's runs."""
    scores = []
    for seed in {run["seed"] for run in runs}:
        tests = [(run["obs"], run["sim"]) for run in runs if run["seed"] == seed]
        scores.append(skill(*map(np.concatenate, zip(*tests))))
    return {name: np.mean([score.get(name, math.nan) for score in scores]) for name in scores[0]}


def table(runs):
    """Print each setting's models: scores over all test sites ± standard error over folds, and the
    median gain per site over the supervised baseline with the p-value of a sign test."""
    for setting, models in runs.items():
        print(f"\n{setting}")
        baseline = next((name for name in BASELINES if name in models), None)
        base = per_site(models.get(baseline, []))
        for name, of_model in models.items():
            total, mine = mean_skill(of_model), per_site(of_model)
            seeds, folds = ({run[key] for run in of_model} for key in ("seed", "fold"))
            parts = [mean_skill([run for run in of_model if run["fold"] == k]) for k in folds]
            line = f"{name:<20}{len(mine):>6} sites, {len(folds)} folds, {len(seeds)} seeds"
            for metric, mean in total.items():
                by_fold = [part.get(metric, math.nan) for part in parts]
                if "auc" in total:      # probabilities of different folds must not be ranked as one
                    mean = np.mean(by_fold)
                error = ratio(np.nanstd(by_fold), (len(folds) - 1) ** 0.5)
                line += f"  {metric} {mean:.3f}" + f" ± {error:.3f}" * (len(folds) > 1)
            gain = np.array([mine[site] - base[site] for site in mine.keys() & base.keys()])
            gain = gain[np.isfinite(gain) & (gain != 0)]
            if len(gain):
                line += f"  gain over {baseline} {np.median(gain):+.3f}, p {sign_test(gain):.1e}"
            print(line + "  (has seen test sites)" * any(run["overlap"] for run in of_model))


def plot(runs, folder):
    """Draw each setting: scores per site of all models, map and hydrographs of the last; and
    labels.png: median scores against the number of training sites with observations."""
    from matplotlib.figure import Figure
    curves = defaultdict(dict)
    for setting, models in runs.items():
        daily = len(next(iter(models.values()))[0]["dates"]) > 1
        what, limits = ("NSE", (-1, 1)) if daily else ("minus absolute error", None)
        figure = Figure((14, 9), layout="constrained")
        (left, right), *below = figure.subplots(1 + daily, 2, squeeze=False)
        for name, of_model in models.items():
            score = per_site(of_model)
            values, median = np.sort([*score.values()]), np.nanmedian([*score.values()])
            left.plot(values, np.linspace(0, 1, len(values)), label=f"{name}, median {median:.2f}")
            head, _, labelled = setting.partition(", labelled ")
            curves[f"{name}, {head}"][float(labelled or "inf")] = median
        left.set(title=setting, xlabel=what, ylabel="share of sites", xlim=limits)
        left.legend()
        ids, latlon, obs, sim = (np.concatenate([run[key] for run in of_model])
                                 for key in ("ids", "latlon", "obs", "sim"))
        values = np.array([score[site] for site in ids])
        dots = right.scatter(latlon[:, 1], latlon[:, 0], 12, values, vmin=0 if daily else None)
        right.set(title=name, xlabel="longitude", ylabel="latitude")
        figure.colorbar(dots, label=what)
        order, known = np.argsort(values), np.isfinite(values).sum()            # NaN last
        for axis, kind, k in zip(np.ravel(below), ("median", "worst"), (known // 2, 0)):
            pair = np.stack([obs[order[k]], sim[order[k]]], 1)                  # (T, 2)
            axis.plot(of_model[0]["dates"][-730:], pair[-730:], lw=0.8, label=["observed", name])
            axis.legend(title=f"{kind} site {ids[order[k]]}: {values[order[k]]:.2f}")
        figure.savefig(Path(folder, setting.replace(", ", "_").replace(" ", "-") + ".png"), dpi=80)
    figure = Figure(layout="constrained")
    axis, counts = figure.subplots(), sorted({n for points in curves.values() for n in points})
    for name, points in curves.items():
        labelled, medians = zip(*sorted(points.items()))
        axis.plot([counts.index(n) for n in labelled], medians, "o-", label=name)
    axis.set_xticks(range(len(counts)), [f"{n:.0f}".replace("inf", "all") for n in counts])
    axis.set(xlabel="training sites with observations", ylabel="median score at held-out sites")
    axis.legend(fontsize=8)
    figure.savefig(Path(folder, "labels.png"), dpi=80)


def plot_reconstruction(folder, days=60):
    """Draw reconstruction.png: a year of weather at a site that folder's encoder was not trained
    on, each group of variables hidden in turn for some days, and what the network puts there."""
    from matplotlib.figure import Figure
    model, saved = load_checkpoint(Path(folder, "pretrained.pt"))
    options, groups = saved["options"], np.array(model.eval().config.dynamic_groups)
    sites = data.load(options["data"], cache=Path(folder, "cache"), quick=options["quick"])
    windows = Windows(sites, saved["scaling"], model.config.max_days)
    site = np.flatnonzero(~np.isin(sites.ids, saved["ids"]))[:1].repeat(len(groups))
    batch = windows.get(site, windows.starts(site[:1], np.random.default_rng(0)).repeat(len(site)))
    hidden = torch.zeros_like(batch[0]).bool()              # (C, L, C): the groups in turn
    block = slice(windows.days // 2, windows.days // 2 + days)
    hidden[:, block] = torch.from_numpy(groups == groups[:, None])[:, None]
    with torch.no_grad():
        guess = model.decode(model.encode(*batch, hidden=(hidden, None, None)))[0]
    figure = Figure((10, 1.5 * len(groups)), layout="constrained")
    for c, axis in enumerate(np.ravel(figure.subplots(len(groups), 1, sharex=True))):
        axis.plot(batch[0][c, :, c], "k", lw=0.8, label="observed")
        axis.plot(np.arange(windows.days)[block], guess[c, block, c], label="hidden, reconstructed")
        axis.set(ylabel=sites.dynamic_names[c])
    axis.set(xlabel=f"day of a year at {sites.ids[site[0]]}; standardised values")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=2)
    figure.savefig(Path(folder, "reconstruction.png"), dpi=80)


def monthly(classes, clear, dates):
    """Shares of the 9 classes among the clear pixels, by month and over all months (the mean of the
    months), and the share that is clear: {month: (10,)}; classes, clear (T, H, W), dates (T,)."""
    months, month_of = {}, dates.astype("datetime64[M]")
    for month in np.unique(month_of):
        at = month_of == month
        seen = classes[at][clear[at]]
        share = np.bincount(seen, minlength=9) / (len(seen) or math.nan)
        months[str(month)] = np.append(share, clear[at].mean())
    return months | {"all": np.nanmean([*months.values()], 0)}


def landcover(o):
    """Classify dated scenes with Dynamic World's released network; print and draw the months."""
    dates, scenes, clear = data.read_scenes(o.landcover)
    model = DynamicWorld.from_release(o.weights)
    x = torch.from_numpy(data.normalize_s2(scenes)).permute(0, 3, 1, 2)         # (T, 9, H, W)
    with torch.no_grad():
        classes = torch.cat([model(scene[None]).argmax(1) for scene in x]).numpy()  # (T, H, W)
    months, cloudy = (monthly(classes, mask, dates) for mask in (clear, clear | True))
    for title, rows in ("clear pixels", months), ("all pixels, clouds too", cloudy):
        print(f"{title:<24}" + "".join(f"{name[:11]:>12}" for name in (*data.LAND_COVER, "seen")))
        for month, shares in rows.items():
            print(f"{month:<24}" + "".join(f"{share:>12.1%}" for share in shares))
    if not o.plot:
        return
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    figure = Figure((3 * (1 + len(dates)), 3.5), layout="constrained")
    bars, *maps = figure.subplots(1, 1 + len(dates))
    shares = np.array([*months.values()]).T                 # (10, months)
    for k, name in enumerate(data.LAND_COVER):
        bars.bar([*months], shares[k], bottom=shares[:k].sum(0), color=COLOURS[k], label=name)
    bars.set_title("share of clear pixels")
    for axis, date, top, seen in zip(maps, dates, classes, clear):
        axis.imshow(top, ListedColormap(COLOURS), vmin=0, vmax=8, interpolation="nearest")
        axis.set(title=f"{date}, {seen.mean():.0%} clear", xticks=[], yticks=[])
    figure.legend(loc="outside lower center", ncols=9)
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
    if o.plot and not find_spec("matplotlib"):
        raise SystemExit("--plot needs matplotlib: pip install matplotlib")
    if o.landcover:
        return landcover(o)
    runs = load_runs(o.out)
    if not runs:
        raise FileNotFoundError(f"no runs in {o.out}/runs: start with python finetune.py")
    table(runs)
    if o.plot:
        plot(runs, o.out)
        if Path(o.out, "pretrained.pt").exists():
            plot_reconstruction(o.out)


if __name__ == "__main__":
    main()
