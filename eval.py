"""Metrics, and the table over every run that finetune.py left under out/runs.

    python eval.py                          a row per setting and model: score ± error over folds
    python -m applications.ensembles        the same, with the medians of seeds and of models
"""

import json
import math
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import defaultdict
from pathlib import Path

import numpy as np


def site_metrics(obs, sim):
    """{metric: score} of one site over its valid pairs, NaN where undefined.

    RMSEs and mae in the unit of obs; pbias, fhv, flv in %. NSE: doi 10.1016/0022-1694(70)90255-6,
    KGE: 10.1016/j.jhydrol.2009.08.003, biases of high and low flows: 10.1029/2007WR006716.
    """
    o, s = valid_pairs(obs, sim)
    if len(o) < 2:
        o = s = np.full(2, math.nan)                        # every score becomes NaN
    error, do, ds = s - o, o - o.mean(), s - s.mean()
    corr = ratio((do * ds).sum(), math.sqrt((do ** 2).sum() * (ds ** 2).sum()))
    spread, mean = ratio(s.std(), o.std()), ratio(s.mean(), o.mean())
    flows = np.sort([o, s])                                 # (2, days)
    top = max(round(0.02 * len(o)), 1)                      # days of the highest 2 %
    high_o, high_s = flows[:, -top:].sum(1)
    low = round(0.3 * len(o)) + 1                           # days of the lowest 30 %
    logs = np.log(flows[:, :low].clip(1e-6))                # (2, low)
    low_o, low_s = (logs - logs[:, :1]).sum(1)              # above the minimum
    curve_o, curve_s = np.percentile(flows, np.linspace(0, 100, 100), axis=1).T
    return {
        "rmse": math.sqrt((error ** 2).mean()),
        "ubrmse": math.sqrt(((ds - do) ** 2).mean()),       # of the anomalies
        "corr": corr,                                       # Pearson's r
        "nse": 1 - ratio((error ** 2).sum(), (do ** 2).sum()),
        "kge": 1 - math.sqrt((corr - 1) ** 2 + (spread - 1) ** 2 + (mean - 1) ** 2),
        "mae": float(abs(error).mean()),
        "pbias": 100 * ratio(error.sum(), o.sum()),
        "fhv": 100 * ratio(high_s - high_o, high_o),        # biases of high and of
        "flv": -100 * ratio(low_s - low_o, low_o),          # (logs of) low flows
        "fdc_rmse": math.sqrt(((curve_s - curve_o) ** 2).mean())}   # of the flow-duration curves


def class_metrics(label, score):
    """accuracy, precision, recall, f1 at score >= 0.5, and ROC auc (by ranks); labels 0 and 1."""
    label, score = valid_pairs(label, score)
    true, guess = label > 0.5, score >= 0.5
    hits, ones, zeros = (true & guess).sum(), true.sum(), (~true).sum()
    _, place, ties = np.unique(score, return_inverse=True, return_counts=True)
    rank = (np.cumsum(ties) - (ties - 1) / 2)[place]        # equal scores share their mean rank
    return {"accuracy": ratio((true == guess).sum(), len(true)),
            "precision": ratio(hits, guess.sum()),
            "recall": ratio(hits, ones),
            "f1": ratio(2 * hits, guess.sum() + ones),
            "auc": ratio(rank[true].sum() - ones * (ones + 1) / 2, ones * zeros)}


def valid_pairs(obs, sim):
    """Both, flat, where both are finite: (2, n)."""
    pairs = np.array([np.ravel(obs), np.ravel(sim)], float)
    return pairs[:, np.isfinite(pairs).all(0)]


def ratio(a, b):
    """a / b as a float, NaN where b is 0."""
    return float(a / b) if abs(b) > 1e-12 else math.nan


def series_scores(obs, sim):
    """Of daily series (sites, days): medians over the sites of their metrics, but for the mean of
    NSE clipped to ±1, over all and over the worst tenth, and the share of sites below 0."""
    sites = [site_metrics(o, s) for o, s in zip(obs, sim)]
    nse = np.array([scores["nse"] for scores in sites])
    clipped = np.sort(nse.clip(-1, 1))                      # NaN last
    tenth = max(round(np.isfinite(nse).sum() / 10), 1)
    result = {"clipped": np.nanmean(clipped), "worst tenth": np.nanmean(clipped[:tenth])}
    for name in ("nse", "kge", "corr", "rmse", "ubrmse", "fhv"):
        result[name] = np.nanmedian([scores[name] for scores in sites])
    return result | {"below 0": (nse < 0).sum() / max(np.isfinite(nse).sum(), 1)}


def value_scores(obs, sim):
    """Of one value per site, (sites, 1): over all sites at once."""
    scores, difference = site_metrics(obs, sim), np.asarray(sim) - obs
    median = np.nanmedian(difference)
    return {"R2": scores["nse"], "rmse": scores["rmse"], "median difference": median,
            "nmad": 1.4826 * np.nanmedian(abs(difference - median))}


def class_scores(obs, sim):
    """Of one class per site, 0 or 1, and the probability of 1."""
    scores = class_metrics(obs, sim)
    return {name: scores[name] for name in ("auc", "accuracy", "f1")}


SCORINGS = {"series": series_scores, "value": value_scores, "class": class_scores}


def sign_test(difference):
    """Two-sided exact p-value that a difference is as often positive as negative."""
    wins, losses = int((difference > 0).sum()), int((difference < 0).sum())
    n = wins + losses                                       # neither ties nor NaN
    tail = sum(math.comb(n, k) for k in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2 ** n) if n else math.nan


def load_runs(folder):
    """Every run under folder/runs: {setting: {model: [run]}}; those of other options never meet."""
    runs = []
    for path in sorted(Path(folder, "runs").glob("*.npz")):
        run = dict(np.load(path))
        about = json.loads(str(run.get("about", "{}")))
        if "pretraining" not in about:
            raise ValueError(f"{path} is no run of this version: move it away")
        if len(run["ids"]):                                 # of hold-out none there are no scores
            runs.append(run | about["options"] | about | {"path": path})
    tell_apart(runs, ("setting",), "options")
    tell_apart(runs, ("setting", "model"), "pretraining")
    result = defaultdict(lambda: defaultdict(list))
    for run in runs:
        result[run["setting"]][run["model"]].append(run)
    return result


def tell_apart(runs, keys, options):
    """Where runs alike in these keys differ in run[options], the last key is told what differs."""
    alike = defaultdict(list)
    for run in runs:
        alike[tuple(run[key] for key in keys)].append(run)
    for of_a_kind in alike.values():
        for name in sorted(set().union(*[run[options] for run in of_a_kind])):
            values = [run[options].get(name) for run in of_a_kind]
            if len(set(map(str, values))) > 1:
                for run, value in zip(of_a_kind, values):
                    run[keys[-1]] += f", {name} {value}"


def per_site(runs):
    """{site: score} of one model's runs, mean over seeds: NSE, or minus the error of its value."""
    scores = defaultdict(list)
    for run in runs:
        for site, o, s in zip(run["ids"], run["obs"], run["sim"]):
            score = site_metrics(o, s)["nse"] if run["scoring"] == "series" else -abs(o[0] - s[0])
            scores[site].append(score)
    return {site: np.mean(of_seeds) for site, of_seeds in scores.items()}


def mean_scores(runs):
    """Mean over seeds of the scores on all test sites of one model's runs."""
    of_seeds = []
    for seed in sorted({run["seed"] for run in runs}):
        obs = np.concatenate([run["obs"] for run in runs if run["seed"] == seed])
        sim = np.concatenate([run["sim"] for run in runs if run["seed"] == seed])
        of_seeds.append(SCORINGS[runs[0]["scoring"]](obs, sim))
    return {name: np.mean([scores[name] for scores in of_seeds]) for name in of_seeds[0]}


def table(runs):
    """Print each setting's models: scores over all test sites ± standard error over folds, and the
    median gain per site over the baseline with the p-value of a sign test."""
    for setting, models in runs.items():
        print(f"\n{setting}")
        for name, of_model in models.items():
            mine, baseline = per_site(of_model), of_model[0]["baseline"]
            scored = np.isfinite([*mine.values()]).sum()    # some may have no observation
            seeds = {run["seed"] for run in of_model}
            folds = sorted({run["fold"] for run in of_model})
            of_folds = [mean_scores([run for run in of_model if run["fold"] == k]) for k in folds]
            line = f"{name:<20}{scored:>6} of {len(mine)} sites, {len(folds)} folds, "
            line += f"{len(seeds)} seeds"
            scores = mean_scores(of_model)
            for metric in of_model[0]["shown"] or scores:
                score = scores[metric]
                by_fold = [of_fold[metric] for of_fold in of_folds]
                if of_model[0]["scoring"] == "class":       # models of different folds may not
                    score = np.mean(by_fold)                # rank each other's sites
                line += f"  {metric} {score:.3f}"
                if len(folds) > 1:
                    line += f" ± {np.nanstd(by_fold) / math.sqrt(len(folds) - 1):.3f}"
            if name != baseline and baseline in models:
                base = per_site(models[baseline])
                gain = np.array([mine[site] - base[site] for site in mine.keys() & base.keys()])
                line += f"  gain over {baseline} {np.nanmedian(gain):+.3f}, p {sign_test(gain):.1e}"
            if any(run["overlap"] for run in of_model):
                line += "  (has seen test sites)"
            print(line)


def main(argv=None):
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="out", help="folder whose runs/ finetune.py wrote [out]")
    folder = parser.parse_args(argv).out
    runs = load_runs(folder)
    if not runs:
        raise FileNotFoundError(f"no runs in {folder}/runs: start with python finetune.py")
    table(runs)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
