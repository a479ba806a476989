"""Metrics, and the table over every run that finetune.py left under out/runs.

    python eval.py                          a row per setting and model: score ± error over folds
    python -m applications.ensembles        medians of seeds and models, and gains paired by site
"""

import json
import math
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import defaultdict
from pathlib import Path

import numpy as np


def site_metrics(obs, sim):
    """{metric: score} of one site over its valid pairs, NaN where undefined.
    RMSEs and mae in the unit of obs; pbias, fhv, flv in %. NSE: doi 10.1016/0022-1694(70)90255-6,
    KGE: 10.1016/j.jhydrol.2009.08.003, biases of high and low flows: 10.1029/2007WR006716."""
    o, s = valid_pairs(obs, sim)
    if len(o) < 2:
        o = s = np.full(2, math.nan)                        # every score becomes NaN
    error, do, ds = s - o, o - o.mean(), s - s.mean()
    corr = ratio((do * ds).sum(), math.sqrt((do ** 2).sum() * (ds ** 2).sum()))
    spread, mean = ratio(s.std(), o.std()), ratio(s.mean(), o.mean())
    flows = np.sort([o, s])                                 # (2, days)
    high_o, high_s = flows[:, -max(round(0.02 * len(o)), 1):].sum(1)    # of the highest 2 %
    logs = np.log(flows[:, :round(0.3 * len(o)) + 1].clip(1e-6))        # of the lowest 30 %
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
    medians = {name: np.nanmedian([scores[name] for scores in sites])
               for name in ("nse", "kge", "corr", "rmse", "ubrmse", "fhv")}
    return {"clipped": np.nanmean(clipped), "worst tenth": np.nanmean(clipped[:tenth]), **medians,
            "below 0": (nse < 0).sum() / max(np.isfinite(nse).sum(), 1)}


def load_runs(folder):
    """Every run under folder/runs: {setting: {model: [run]}}; those of other options never meet."""
    result = defaultdict(lambda: defaultdict(list))
    for path in sorted(Path(folder, "runs").glob("*.npz")):
        try:
            run = dict(np.load(path))
            run |= json.loads(str(run["about"])) | {"path": path}
        except Exception as error:
            print(f"{path} is no run of finetune.py, passed over: {error!r}")
            continue
        if len(run["ids"]):                                 # of hold-out none there are no scores
            result[run["setting"]][run["model"]].append(run)
    return result


def mean_scores(runs):
    """Mean over seeds of the scores on all test sites of one model's runs."""
    scores = []
    for seed in sorted({run["seed"] for run in runs}):
        of_seed = [run for run in runs if run["seed"] == seed]
        obs = np.concatenate([run["obs"] for run in of_seed])                   # (sites, days)
        scores.append(series_scores(obs, np.concatenate([run["sim"] for run in of_seed])))
    return {name: np.mean([of_seed[name] for of_seed in scores]) for name in scores[0]}


def table(runs):
    """Print each setting's models: scores over all test sites ± standard error over folds."""
    for setting, models in runs.items():
        print(f"\n{setting}")
        for name, of_model in models.items():
            seeds, folds = {run["seed"] for run in of_model}, {run["fold"] for run in of_model}
            of_folds = [mean_scores([r for r in of_model if r["fold"] == fold]) for fold in folds]
            sites = len({site for run in of_model for site in run["ids"]})
            line = f"{name:<20}{sites:>6} sites, {len(folds)} folds, {len(seeds)} seeds"
            for metric, score in mean_scores(of_model).items():
                line += f"  {metric} {score:.3f}"
                if len(folds) > 1:
                    spread = np.nanstd([scores[metric] for scores in of_folds])
                    line += f" ± {spread / math.sqrt(len(folds) - 1):.3f}"
            print(line + "  (has seen test sites)" * any(run["overlap"] for run in of_model))


def main(argv=None):
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="out", help="folder whose runs/ finetune.py wrote [out]")
    out = parser.parse_args(argv).out
    runs = load_runs(out)
    if not runs:
        parser.error(f"no run with sites held out in {out}/runs: start with python finetune.py")
    table(runs)


if __name__ == "__main__":
    main()
