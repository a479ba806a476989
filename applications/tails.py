"""Where predictions of flow fail, and why: what the sites below zero have in common.

    python finetune.py --fold all --seeds 3 --draw 0 && python -m applications.tails [--out out]

For every setting of the runs and each model, the median over its seeds: how many sites fail (NSE
below 0), how many of them only by their volume, and how NSE goes with aridity, flow, and distance
to the training sites: in place, in attributes, in the embedding. Then what happens if the test
sites lack a part of their attributes or, for models with an encoder, if the days' tokens, the
site's, or the location are taken away. With matplotlib: a figure, tails.png, in --out.
"""

import argparse
import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import data
import finetune
from applications import budyko, figures, predict
from applications.ensembles import load_ensembles
from eval import site_metrics
from train import Windows

CAUSES = ("aridity (PET / P)", "mean flow (mm/d)", "distance (km)", "distance (attributes)",
          "distance (embedding)")
PARTS = ("days", "site", "location")                        # of a frozen encoder's embedding
SHARES = {"a quarter of the attributes": 0.25, "half of the attributes": 0.5,
          "three quarters of the attributes": 0.75}


def right_volume(obs, sim):
    """The prediction (T,) times what makes its mean that of the observations."""
    known = np.isfinite(obs + sim)
    return sim * obs[known].mean() / max(sim[known].mean(), 1e-6)


def scores(runs):
    """{site: its metrics, and the NSE with the right volume} of the median of a model's seeds."""
    together = {}
    for run in runs:
        for site, obs, sim in zip(run["ids"], run["obs"], run["sim"]):
            together.setdefault(site, (obs, []))[1].append(sim)
    result = {}
    for site, (obs, sims) in together.items():
        sim = np.median(sims, 0)
        result[site] = site_metrics(obs, sim)
        result[site]["right volume"] = site_metrics(obs, right_volume(obs, sim))["nse"]
    return result


@torch.no_grad()
def tokens(model, sites):
    """The embedding of each site, (N, D), of one window in the middle of the record."""
    c, s = model.encoder.config, model.settings
    windows = Windows(sites, s["encoder_scaling"], c.max_days, c.dynamic_names, c.static_names)
    start = np.full(len(sites.ids), (len(sites.dates) - c.max_days) // 2)
    parts = np.array_split(np.arange(len(start)), len(start) // 64 + 1)
    return torch.cat([model.encoder.encode(*windows.get(i, start[i]))[:, -1] for i in parts])


def circumstances(sites, model, tested):
    """{site: values of CAUSES} of the sites `tested`, (n,) indices."""
    some = predict.take(sites, tested)
    climate = budyko.climate(some)                                              # P and E, (n,) each
    km, attributes = predict.distances(some, model.settings)
    places = {tuple(place) for place in model.settings["places"]["latlon"].tolist()}
    trained = np.array([tuple(place) in places for place in sites.latlon.tolist()])
    e = tokens(model, sites)
    nearest = torch.cdist(e[tested], e[trained]).amin(1).numpy()
    flow = np.nanmean(some.target, 1)
    return dict(zip(some.ids, zip(climate[1] / climate[0], flow, km, attributes, nearest)))


def without(part, model, sites, tested, days):
    """Predictions (n, T) for the sites `tested` once `part`, of PARTS or SHARES, says nothing."""
    if part == "location":
        sites = replace(sites, latlon=np.full_like(sites.latlon, np.nan))
    if part in SHARES:
        static, rng = np.array(sites.static), np.random.default_rng(0)
        static[tested] = data.hide_groups(static[tested], sites.static_names, SHARES[part], rng)
        sites = replace(sites, static=static)
    samples = finetune.Samples(model, sites, tested, days)
    if part == "site":                                      # the same for all: their mean
        samples.encoded[:, -1] = samples.encoded[:, -1].float().mean(0).half()
    if part == "days":
        samples.encoded[:, :-1] = samples.encoded[:, :-1].float().mean((0, 1)).half()
    return samples.predict()


def rank_correlation(x, y):
    known = np.isfinite(x) & np.isfinite(y)
    ranks = [np.argsort(np.argsort(values[known])) for values in (x, y)]
    return np.corrcoef(ranks)[0, 1]


def summary(name, of_sites):
    """A line: NSE, its worst tenth, the sites that fail, and what right volumes would do."""
    nse, mended, bias = (np.array([scored[key] for scored in of_sites.values()])
                         for key in ("nse", "right volume", "pbias"))
    worst = np.sort(nse.clip(-1, 1))[:max(round(0.1 * len(nse)), 1)]
    print(f"{name:<44} median NSE {np.median(nse):.3f}  clipped {nse.clip(-1, 1).mean():.3f}  "
          f"below 0: {(nse < 0).sum()} of {len(nse)}, worst tenth {worst.mean():.3f}, "
          f"|bias| {np.median(abs(bias)):.1f} %; with the right volume: clipped "
          f"{mended.clip(-1, 1).mean():.3f}, below 0: {(mended < 0).sum()}", flush=True)


def ablate(runs, sites):
    """Print how the runs of one model do where a part of what it reads is not known."""
    frozen = finetune.VARIANTS[runs[0]["model"]].embedding == "frozen"
    for part in [*SHARES, *PARTS] if frozen else SHARES:
        changed = []
        for run in runs:
            model = finetune.load(Path(run["path"]).with_suffix(".pt"))
            tested = np.flatnonzero(np.isin(sites.ids, run["ids"]))
            first = int(np.searchsorted(sites.dates, run["dates"][0]))
            days = slice(first, first + len(run["dates"]))
            changed.append(run | {"sim": without(part, model, sites, tested, days),
                                  "ids": sites.ids[tested], "obs": sites.target[tested, days]})
        summary(f"  without {part}", scores(changed))


def draw(path, causes, of_models):
    """NSE against each circumstance, and its distribution, for every model."""
    if not importlib.util.find_spec("matplotlib"):
        return print("no picture: it needs matplotlib")
    figure = figures.new_figure(11, 6.5)
    axes = figure.subplots(2, 3).ravel()
    for k, (name, of_sites) in enumerate(of_models.items()):
        nse = np.array([of_sites[site]["nse"] for site in causes]).clip(-1, 1)
        for axis, cause, x in zip(axes, CAUSES, np.array([*causes.values()]).T):
            axis.plot(x, nse, ".", ms=4, alpha=0.6, color=f"C{k}", label=name)
            axis.set(xlabel=cause, xscale="log", ylabel="NSE, at least -1")
            axis.xaxis.set_minor_formatter("")
        axes[5].plot(np.sort(nse), (np.arange(len(nse)) + 1) / len(nse), color=f"C{k}", label=name)
    axes[5].set(xlabel="NSE, at least -1", ylabel="share of sites below")
    axes[5].legend()
    for axis in axes:
        axis.grid(color=figures.GREY)
    figures.save(figure, path)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="out", help="folder whose runs/ finetune.py wrote [out]")
    parser.add_argument("--worst", type=int, default=10, help="failing sites to list [10]")
    o = parser.parse_args(argv)
    for setting, models in load_ensembles(o.out).items():
        first = next(iter(models.values()))[0]
        method = [run for run in models.get("resconn", []) if run["scoring"] == "series"]
        if not method:
            continue
        print(f"\n{setting}")
        sites = data.load(first["data"], first["task"], cache=Path(o.out, "cache"),
                          quick=first["quick"])
        causes = {}
        for run in {run["fold"]: run for run in method}.values():
            model = finetune.load(Path(run["path"]).with_suffix(".pt"))
            causes |= circumstances(sites, model, np.flatnonzero(np.isin(sites.ids, run["ids"])))
        of_models = {name: scores(runs) for name, runs in models.items()
                     if not name.endswith(", median") or "+" in name}
        causes = {site: values for site, values in causes.items()    # that all have predicted
                  if all(site in of_sites for of_sites in of_models.values())}
        for name, of_sites in of_models.items():
            summary(name, of_sites)
            nse = np.array([of_sites[site]["nse"] for site in causes])
            print("  rank correlation of NSE with " + ", ".join(
                f"{cause} {rank_correlation(x, nse):+.2f}"
                for cause, x in zip(CAUSES, np.array([*causes.values()]).T)))
            if not name.endswith("median"):
                ablate(models[name], sites)
        worst = sorted(causes, key=lambda site: of_models["resconn"][site]["nse"])
        for site in worst[:o.worst]:
            print(f"  {site:<20}" + ", ".join(
                f"{cause} {x:.3g}" for cause, x in zip(CAUSES, causes[site])))
            for name, of_sites in of_models.items():
                s = of_sites[site]
                print(f"    {name:<24}NSE {s['nse']:.2f}, r {s['corr']:.2f}, bias "
                      f"{s['pbias']:+.0f} %, with the right volume {s['right volume']:.2f}")
        drawn = [name for name in of_models if name in ("lstm", "resconn") or "+" in name]
        draw(Path(o.out, "tails.png"), causes, {name: of_models[name] for name in drawn})


if __name__ == "__main__":
    data.command(main)
