"""Ensembles: the median over the seeds of a model and over several models, in eval.py's table.

    python finetune.py --seeds 3 --draw 0 --fold all && python -m applications.ensembles [--out out]

Rows are added for each model's seeds together, for all models together and, of the kinds there
are, for the mixture that is best at the validation sites, which no member learned from.
"""

import argparse
from collections import defaultdict
from itertools import combinations

import numpy as np

import data
from eval import SCORINGS, load_runs, table


def load_ensembles(folder):
    """eval.load_runs(folder), {setting: {model: [run]}}, with the rows of the ensembles added."""
    settings = load_runs(folder)
    for models in settings.values():
        models |= ensembles(models)
    return settings


def ensembles(models):
    """{name: runs} for the median over the seeds of each model and of all models; where the seeds
    have the same test sites, and learned from the same, or all, labelled ones."""
    result, members = {}, dict(models)
    if len(models) > 1:
        members[" + ".join(models)] = sum(models.values(), [])
    for name, runs in members.items():
        folds = defaultdict(list)
        for run in runs:
            folds[run["fold"]].append(run)
        alike = all(np.array_equal(run["ids"], of_fold[0]["ids"])
                    for of_fold in folds.values() for run in of_fold)
        fair = runs[0]["draw"] >= 0 or not runs[0]["labelled"]
        if alike and fair and len(runs) > len(folds):
            result[f"{name}, median"] = [median(of_fold) for of_fold in folds.values()]
            if " + " in name and runs[0]["draw"] >= 0:      # all of them, or those chosen
                chosen = [median(best_mixture(of_fold)[0]) for of_fold in folds.values()]
                result["chosen by validation, median"] = chosen
    return result


def median(runs):
    """One run in place of several of a fold: the median of their predictions."""
    sim = np.median([run["sim"] for run in runs], 0)
    return runs[0] | {"sim": sim, "seed": 0, "baseline": runs[0]["baseline"] + ", median"}


def common_validation(runs):
    """obs (n, T) and members (K, n, T) at the validation sites that all members left out."""
    shared = set.intersection(*[set(run["validation_ids"].tolist()) for run in runs])
    if not shared:
        raise ValueError(f"{runs[0]['setting']}: the members have no validation site in common, so "
                         "nothing to calibrate with: run finetune.py with --draw 0")
    members = []
    for run in runs:
        row = {site: i for i, site in enumerate(run["validation_ids"].tolist())}
        chosen = [row[site] for site in sorted(shared)]
        members.append(run["validation_sim"][chosen])
    return run["validation_obs"][chosen], np.array(members)


def best_mixture(runs):
    """The runs of those kinds of model whose median scores best at the validation sites, on the
    days of the test; and {kinds: that score} of every mixture. All runs are of one fold."""
    kinds, tried = sorted({run["model"] for run in runs}), {}
    for n in range(len(kinds), 0, -1):                      # of equals, the larger mixture
        for some in combinations(kinds, n):
            obs, sims = common_validation([run for run in runs if run["model"] in some])
            scores = SCORINGS[runs[0]["scoring"]](obs, np.median(sims, 0))
            tried[some] = next(iter(scores.values()))
    best = max(tried, key=lambda some: np.nan_to_num(tried[some], nan=-np.inf))
    return [run for run in runs if run["model"] in best], tried


def interval_scores(obs, low, high, members):
    """coverage: share of obs within low to high; their mean width; mae of the members' median and
    crps of the members (K, ...): doi 10.1198/016214506000001437, eq. 21. In the unit of obs."""
    known = np.isfinite(obs + low + high)
    o, x = obs[known], np.sort(members[:, known], 0)                            # (n,), (K, n)
    K = len(x)
    between = (np.arange(1 - K, K, 2)[:, None] * x).sum(0) / K ** 2    # half the mean difference
    return {"coverage": ((low[known] <= o) & (o <= high[known])).mean(),
            "width": (high - low)[known].mean(),
            "mae": abs(np.median(x, 0) - o).mean(),
            "crps": (abs(x - o).mean(0) - between).mean()}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="out", help="folder whose runs/ finetune.py wrote [out]")
    table(load_ensembles(parser.parse_args(argv).out))


if __name__ == "__main__":
    data.command(main)
