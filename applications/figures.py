"""What eval.py tells in numbers, as pictures of everything under out/. Needs matplotlib.

    python -m applications.figures [--out out]

<setting>.png         of each setting of the runs: the scores of all models at the test sites; a map
                      of the method's; for series, hydrographs of its median and its worst site
labels.png            median score against the number of training sites with observations
reconstruction.png    a year of weather at a site that out/pretrained.pt was not trained on, each
                      group of variables hidden in turn, and what the network puts there

A model has the same colour in every figure; what was observed is black.
"""

import argparse
import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

import data
from eval import load_runs, per_site
from model import Masks
from train import Windows, load_checkpoint

ORDER = ("resconn", "lstm", "noresconn", "linear", "scratch", "direct")     # others follow by name
SCORE = {"series": "NSE", "value": "minus absolute error", "class": "minus error of probability"}
UNIT = {"streamflow": "mm/d", "soil_moisture": "m3/m3"}
GREY = "0.85"


def draw_setting(path, setting, runs, scores, colours):
    """All models of a setting: runs {model: [run]} and, in their order, {model: {site: score}}."""
    about = runs[next(iter(scores))][0]
    method = next((name for name in scores if name != about["baseline"]), about["baseline"])
    ranked = [site for site, score in scores[method].items() if math.isfinite(score)]
    ranked.sort(key=scores[method].get)
    chosen = {}
    if about["scoring"] == "series" and ranked:
        chosen = {"median site": ranked[len(ranked) // 2], "worst site": ranked[0]}
    figure = new_figure(11, 4 + 2.5 * len(chosen))
    panels = figure.subplot_mosaic([["distribution", "map"]] + [[kind, kind] for kind in chosen],
                                   width_ratios=(2, 3), height_ratios=[4] + [2.5] * len(chosen))
    figure.suptitle(setting)
    draw_distribution(panels["distribution"], runs, scores, colours)
    draw_map(panels["map"], runs[method], scores[method])
    panels["map"].set_title(f"{SCORE[about['scoring']]} of {method}")
    for kind, site in chosen.items():
        for name in scores:
            if name in (method, about["baseline"]):
                draw_hydrograph(panels[kind], site, runs[name], colours[name],
                                f"{name}, NSE {scores[name].get(site, math.nan):.2f}")
        panels[kind].set_title(f"{kind} of {method}: {site}")
    save(figure, path)


def draw_distribution(axis, runs, scores, colours):
    """The share of sites whose score is below x, a curve per model."""
    scoring = runs[next(iter(scores))][0]["scoring"]
    for name, of_sites in scores.items():
        values = np.array([*of_sites.values()])
        label = f"{name}, median {np.nanmedian(values):.2f}"
        if any(run["overlap"] for run in runs[name]):
            label += "\n(has seen test sites)"
        axis.ecdf(values[np.isfinite(values)], color=colours[name], label=label)
    axis.axhline(0.5, color=GREY, zorder=0)
    axis.set(xlabel=SCORE[scoring], ylabel="share of sites below")
    if scoring == "series":
        axis.set_xlim(-1, 1)                                # a few sites may be at -100
    axis.set_title(f"{len(values)} sites without observations")
    axis.legend(loc="upper left")


def draw_map(axis, runs, scores):
    """Each site of one model's runs, coloured by its score."""
    place = {}
    for run in runs:
        place |= zip(run["ids"], run["latlon"])
    lat, lon = np.array([place[site] for site in scores]).T                     # (N,) each
    values = np.array([*scores.values()])                                       # (N,)
    low, high = 0, 1
    if runs[0]["scoring"] != "series":
        low, high = np.nanpercentile(values, 5), 0
    dots = axis.scatter(lon, lat, 24, values, vmin=low, vmax=high, edgecolors="0.3", linewidths=0.3)
    axis.figure.colorbar(dots, ax=axis, extend="min")
    if np.isfinite(lat).any():                              # degrees of both have one length there
        axis.set_aspect(1 / math.cos(math.radians(np.nanmean(lat))))
    axis.set(xlabel="longitude (degrees)", ylabel="latitude (degrees)")
    axis.grid(color=GREY)
    axis.set_axisbelow(True)


def draw_hydrograph(axis, site, runs, colour, label):
    """The last two years with observations at a site, observed and simulated (by the first run)."""
    for run in runs:
        rows = np.flatnonzero(run["ids"] == site)
        if len(rows):
            obs, sim = run["obs"][rows[0]], run["sim"][rows[0]]                 # (T,) each
            last = np.flatnonzero(np.isfinite(obs))[-1] + 1
            days = slice(max(last - 730, 0), last)
            if not axis.lines:
                axis.plot(run["dates"][days], obs[days], "k", lw=1.2, label="observed")
            axis.plot(run["dates"][days], sim[days], color=colour, lw=1.2, label=label)
            unit = UNIT.get(run["task"], "")
            axis.set_ylabel(f"{run['task'].replace('_', ' ')} ({unit})")
            axis.margins(x=0)
            axis.legend(loc="upper left", ncols=3)
            return


def draw_labels(path, runs, scores, colours):
    """Median score against labelled sites: a panel per data set that has two counts or more."""
    data_sets = defaultdict(dict)                           # {data set: {count: setting}}
    for setting, models in runs.items():
        labelled = next(iter(models.values()))[0]["labelled"]
        data_set = setting.replace(f", labelled {labelled}", "")
        data_sets[data_set][labelled or math.inf] = setting
    compared = [name for name in data_sets if len(data_sets[name]) > 1]
    if not compared:
        print(f"{path} is not drawn: it needs runs of two values of --labelled")
        return
    figure = new_figure(1 + 5 * len(compared), 4.5)
    axes = figure.subplots(1, len(compared), squeeze=False)[0]
    for axis, name in zip(axes, compared):
        counts = sorted(data_sets[name])
        settings = [data_sets[name][count] for count in counts]
        for model, colour in colours.items():
            at = [x for x, setting in enumerate(settings) if model in scores[setting]]
            medians = [np.nanmedian([*scores[settings[x]][model].values()]) for x in at]
            if at:
                axis.plot(at, medians, "o-", color=colour, label=model)
        axis.set_xticks(range(len(counts)), [f"{n:.0f}".replace("inf", "all") for n in counts])
        scoring = next(iter(runs[settings[0]].values()))[0]["scoring"]
        axis.set(title=name, xlabel="training sites with observations",
                 ylabel=f"median {SCORE[scoring]} at held-out sites")
        axis.grid(axis="y", color=GREY)
        axis.legend()
    save(figure, path)


@torch.no_grad()
def draw_reconstruction(path, checkpoint, days=60):
    """Weather at an unseen site, each group of variables hidden for some days in turn."""
    model, saved = load_checkpoint(checkpoint)
    config, options = model.eval().config, saved["options"]
    try:
        sites = data.load(options["data"], cache=checkpoint.with_name("cache"),
                          quick=options["quick"])
    except (ValueError, FileNotFoundError) as error:        # or only an application can read them
        print(f"{path} is not drawn: {error}")
        return
    windows = Windows(sites, saved["scaling"], config.max_days, config.dynamic_names,
                      config.static_names)
    unseen = np.flatnonzero(~np.isin(sites.ids, saved["ids"]) & (windows.last > 0))
    data.check(len(unseen), f"{checkpoint}: it was trained on every site that has weather")
    site = unseen[:1]                                                           # (B,), B = 1
    start = windows.starts(site, np.random.default_rng(0))                      # (B,)
    batch = windows.get(site, start)
    dates = sites.dates[start[0]:][:windows.days]                               # (L,)
    observed = in_units(batch[0], saved["scaling"]["forcing"])[0]               # (L, C)
    known = np.flatnonzero(np.isfinite(observed).any(0))
    groups = np.array(config.dynamic_groups)                                    # (C,)
    block = slice(windows.days // 2, windows.days // 2 + days)
    figure = new_figure(10, 1 + 1.5 * len(known))
    axes = figure.subplots(len(known), 1, sharex=True, squeeze=False)[:, 0]
    for axis, c in zip(axes, known):
        hidden = torch.zeros(batch[0].shape, dtype=torch.bool)                  # (B, L, C)
        hidden[:, block, groups == groups[c]] = True
        guess, _ = model.decode(model.encode(*batch, Masks(dynamic=hidden)))    # (B, L, C)
        guess = in_units(guess, saved["scaling"]["forcing"])[0]                 # (L, C)
        axis.plot(dates, observed[:, c], "k", lw=0.8, label="observed")
        axis.plot(dates[block], guess[block, c], "C0", label="hidden, reconstructed")
        axis.axvspan(dates[block][0], dates[block][-1], color=GREY, zorder=0)
        name = config.dynamic_names[c]
        axis.set_ylabel(f"{name}\n({data.DYNAMIC[name].unit})")
        axis.margins(x=0)
    figure.align_ylabels()
    figure.suptitle(f"Weather at {sites.ids[site[0]]}, which the network was not trained on")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    save(figure, path)


def in_units(values, scaling):
    """Undo train.apply_standardisation: a tensor (..., V) -> array in the variables' units."""
    log, mean, std = scaling.numpy()
    values = values.numpy() * std + mean
    return np.where(log > 0, np.expm1(values), values)


def new_figure(width, height):
    """An empty figure of so many inches."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemExit("figures need matplotlib: pip install matplotlib") from None
    matplotlib.rc("date", converter="concise")
    return Figure((width, height), layout="constrained")


def save(figure, path):
    data.write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=100))
    print(path)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="out", help="folder of runs/ and pretrained.pt [out]")
    folder = Path(parser.parse_args(argv).out)
    runs, checkpoint = load_runs(folder), folder / "pretrained.pt"
    if not runs and not checkpoint.is_file():
        raise FileNotFoundError(f"no runs in {folder}/runs, no {checkpoint}: start with train.py")
    names = set().union(*runs.values())
    order = [*ORDER, *sorted(names.difference(ORDER))]
    colours = {name: f"C{k % 10}" for k, name in enumerate(order)}
    scores = {}
    for setting, models in runs.items():
        scores[setting] = {name: per_site(models[name]) for name in order if name in models}
        path = folder / (setting.replace(", ", "_").replace(" ", "-") + ".png")
        draw_setting(path, setting, models, scores[setting], colours)
    if runs:
        draw_labels(folder / "labels.png", runs, scores, colours)
    if checkpoint.is_file():
        draw_reconstruction(folder / "reconstruction.png", checkpoint)


if __name__ == "__main__":
    main()
