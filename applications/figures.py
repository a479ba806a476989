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
SCORE = {"series": "NSE", "value": "absolute error", "class": "error of the probability"}
GREY = "0.85"
LOOK = {"axes.titlesize": "medium", "axes.axisbelow": True, "date.converter": "concise",
        "grid.color": GREY, "legend.fontsize": 9, "legend.handlelength": 1.2,
        "legend.columnspacing": 1, "lines.linewidth": 1.2, "savefig.dpi": 90}


def about(models):
    """What the runs of one setting have in common, from the first of {model: [run]}."""
    return next(iter(models.values()))[0]


def site_scores(runs):
    """{site: NSE, or absolute error} of one model's runs, mean over seeds, where it is defined."""
    sign = 1 if runs[0]["scoring"] == "series" else -1      # per_site gives *minus* the error
    scores = {site: sign * score for site, score in per_site(runs).items()
              if math.isfinite(score)}
    data.check(scores, f"{runs[0]['setting']}, {runs[0]['model']}: no site has a score")
    return scores


def draw_setting(path, models, scores, colours):
    """A setting's {model: [run]} and, in the figures' order, {model: {site: score}}."""
    baseline = about(models)["baseline"]
    method = next((name for name in scores if name != baseline), baseline)
    chosen = {}
    if about(models)["scoring"] == "series":
        ranked = sorted(scores[method], key=scores[method].get)
        chosen = {"median site": ranked[len(ranked) // 2], "worst site": ranked[0]}

    rows = [["distribution", "map"]] + [[kind, kind] for kind in chosen]
    heights = [3.4] + [2] * len(chosen)
    figure = new_figure(9.5, sum(heights))
    panels = figure.subplot_mosaic(rows, width_ratios=(2, 3), height_ratios=heights)
    figure.suptitle(about(models)["setting"])
    draw_distribution(panels["distribution"], models, scores, colours)
    draw_map(panels["map"], models[method], scores[method])
    for kind, site in chosen.items():
        for name in scores:
            if name in (method, baseline) and site in scores[name]:
                label = f"{name}, NSE {scores[name][site]:.2f}"
                draw_hydrograph(panels[kind], site, models[name], colours[name], label)
        panels[kind].set_title(f"{kind} of {method}: {site}", loc="left")
    save(figure, path)


def draw_distribution(axis, models, scores, colours):
    """The share of sites whose score is below x, a curve for each model."""
    scoring = about(models)["scoring"]
    for name, of_sites in scores.items():
        values = list(of_sites.values())
        label = f"{name}, median {np.median(values):.2f}"
        if any(run["overlap"] for run in models[name]):
            label += "\n(has seen test sites)"
        axis.ecdf(values, color=colours[name], label=label)
    axis.axhline(0.5, color=GREY, zorder=0)
    sites = max(len(of_sites) for of_sites in scores.values())
    axis.set(xlabel=SCORE[scoring], ylabel="share of sites below", title=f"{sites} held-out sites")
    if scoring == "series":                                 # a few sites may be at -100
        axis.set(xlim=(-1, 1), xticks=(-1, -0.5, 0, 0.5, 1))
    axis.legend()


def draw_map(axis, runs, scores):
    """Each site of one model's runs, coloured by its score."""
    place = {}
    for run in runs:
        place.update(zip(run["ids"], run["latlon"]))
    lat, lon = np.array([place[site] for site in scores]).T                     # (N,) each
    values = list(scores.values())
    scoring = runs[0]["scoring"]
    axis.set_title(f"{runs[0]['model']}: {SCORE[scoring]}")
    if np.isnan(lat).all():
        axis.set(xlabel="no coordinates", xticks=[], yticks=[])
        return
    colour_map, highest, beyond = "viridis", 1, "min"
    if scoring != "series":                                 # an error: the small ones are good
        colour_map, highest, beyond = "viridis_r", np.percentile(values, 95), "max"
    dots = axis.scatter(lon, lat, 24, values, cmap=colour_map, vmin=0, vmax=highest,
                        edgecolors="0.3", linewidths=0.3)
    axis.figure.colorbar(dots, ax=axis, extend=beyond)
    wider = 1 / math.cos(math.radians(np.nanmean(lat)))     # a kilometre east is as long as north
    axis.set(xlabel="longitude (degrees)", ylabel="latitude (degrees)", aspect=wider)
    axis.grid()


def draw_hydrograph(axis, site, runs, colour, label):
    """A site's last year with observations, and what the first run that tests it makes of it."""
    run = next(run for run in runs if site in run["ids"])
    row = run["ids"].tolist().index(site)
    obs, sim = run["obs"][row], run["sim"][row]                                 # (T,) each
    last = np.flatnonzero(np.isfinite(obs))[-1] + 1
    days = slice(max(last - 365, 0), last)
    if not axis.lines:                                      # of the first model drawn here
        axis.plot(run["dates"][days], obs[days], "k", label="observed")
    axis.plot(run["dates"][days], sim[days], color=colour, label=label)
    axis.set_ylabel(f"{run['task']} ({run['unit']})")
    axis.margins(x=0)
    axis.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False)   # above it


def draw_labels(path, runs, scores, colours):
    """Median score against labelled sites: a panel per data set that has two counts or more."""
    medians, scoring = defaultdict(dict), {}                # {data set: {count: {model: median}}}
    for setting, models in runs.items():
        labelled = about(models)["labelled"]
        data_set = setting.replace(f", labelled {labelled}", "")
        scoring[data_set] = about(models)["scoring"]
        medians[data_set][labelled or math.inf] = {
            name: np.median(list(of_sites.values())) for name, of_sites in scores[setting].items()}
    compared = [data_set for data_set in medians if len(medians[data_set]) > 1]
    if not compared:
        print(f"{path} is not drawn: it takes runs with two values of --labelled")
        return
    figure = new_figure(1 + 5 * len(compared), 4.5)
    axes = figure.subplots(1, len(compared), squeeze=False)[0]
    for axis, data_set in zip(axes, compared):
        counts = sorted(medians[data_set])
        for name, colour in colours.items():
            curve = [medians[data_set][count].get(name, math.nan) for count in counts]
            if np.isfinite(curve).any():
                axis.plot(curve, "o-", color=colour, label=name)
        axis.set_xticks(range(len(counts)), [f"{n:.0f}".replace("inf", "all") for n in counts])
        axis.set(title=data_set, xlabel="training sites with observations",
                 ylabel=f"median {SCORE[scoring[data_set]]} at held-out sites")
        axis.grid(axis="y")
        axis.legend()
    save(figure, path)


@torch.no_grad()
def draw_reconstruction(path, checkpoint, days=60):
    """Weather at a site not trained on, each group of variables hidden for some days in turn."""
    model, saved = load_checkpoint(checkpoint)
    c, options = model.eval().config, saved["options"]
    try:                                                    # some only an application can read
        sites = data.load(options["data"], cache=path.with_name("cache"), quick=options["quick"])
    except (ValueError, FileNotFoundError) as error:
        print(f"{path} is not drawn: {error}")
        return
    windows = Windows(sites, saved["scaling"], c.max_days, c.dynamic_names, c.static_names)
    unseen = np.flatnonzero(~np.isin(sites.ids, saved["ids"]) & (windows.last > 0))
    if not len(unseen):
        print(f"{path} is not drawn: {checkpoint} has seen all sites with weather, or none has any")
        return
    site = unseen[:1]                                                           # (B,), B = 1
    start = windows.starts(site, np.random.default_rng(0))                      # (B,)
    batch = windows.get(site, start)
    dates = sites.dates[start[0]:start[0] + windows.days]                       # (L,)
    observed = in_units(batch[0], windows.scaling)[0]                           # (L, C)
    measured = np.flatnonzero(np.isfinite(observed).any(0))
    groups = np.array(c.dynamic_groups or c.dynamic_names)                      # (C,)
    block = slice(windows.days // 2, windows.days // 2 + days)

    figure = new_figure(8.5, 1 + 1.2 * len(measured))
    axes = figure.subplots(len(measured), 1, sharex=True, squeeze=False)[:, 0]
    for axis, v in zip(axes, measured):
        hidden = torch.zeros(batch[0].shape, dtype=torch.bool)                  # (B, L, C)
        hidden[:, block, groups == groups[v]] = True
        guess, _ = model.decode(model.encode(*batch, Masks(dynamic=hidden)))    # (B, L, C)
        guess = in_units(guess, windows.scaling)[0]                             # (L, C)
        axis.plot(dates, observed[:, v], "k", lw=0.8, label="observed")
        axis.plot(dates[block], guess[block, v], "C0", label="hidden and reconstructed")
        axis.axvspan(dates[block][0], dates[block][-1], color=GREY, zorder=0)
        name = c.dynamic_names[v]
        axis.set_ylabel(f"{name}\n({data.DYNAMIC[name].unit})")
        axis.text(1.01, 0.5, groups[v], transform=axis.transAxes, rotation=-90, va="center")
        axis.margins(x=0)
    figure.align_ylabels()
    figure.suptitle(f"{sites.ids[site[0]]}, not trained on; each group, named at the right, "
                    f"is hidden in turn")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    save(figure, path)


def in_units(values, scaling):
    """Undo train.apply_standardisation: a tensor (..., V) -> an array in the variables' units."""
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
    matplotlib.rcParams.update(LOOK)
    return Figure((width, height), layout="constrained")


def save(figure, path):
    data.write_atomically(path, lambda file: figure.savefig(file, format="png"))
    print(path)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="out", help="folder of runs/ and pretrained.pt [out]")
    folder = Path(parser.parse_args(argv).out)
    runs, checkpoint = load_runs(folder), folder / "pretrained.pt"
    if not runs and not checkpoint.is_file():
        raise FileNotFoundError(f"no {folder}/runs/*.npz, no {checkpoint}: start with train.py")
    names = set().union(*runs.values())
    order = [*ORDER, *sorted(names.difference(ORDER))]
    colours = {name: f"C{k % 10}" for k, name in enumerate(order)}
    scores = {}
    for setting, models in runs.items():
        scores[setting] = {name: site_scores(models[name]) for name in order if name in models}
        path = folder / (setting.replace(", ", "_").replace(" ", "-") + ".png")
        draw_setting(path, models, scores[setting], colours)
    if runs:
        draw_labels(folder / "labels.png", runs, scores, colours)
    if checkpoint.is_file():
        draw_reconstruction(folder / "reconstruction.png", checkpoint)


if __name__ == "__main__":
    data.command(main)
