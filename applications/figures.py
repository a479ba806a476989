"""Pictures of everything under out/, and how well the network fills in what is hidden.

    python -m applications.figures [--out out]          needs matplotlib

SETTING.png         of each setting of out/runs: NSE of all models at the test sites, a map of the
                    method's, hydrographs of its median and its worst site
SETTING.csv         the metrics of each site
settings.png        of several settings: NSE of all models, a panel for each data set
reconstruction.png  a year of weather at a site that out/pretrained.pt was not trained on: each
                    group of variables hidden for 60 days in turn, and what the network puts there

Of the checkpoint it prints how much is explained (R2) of each group, hidden at the validation
sites: attributes altogether, weather for these days. The yardstick beside it is ridge regression on
the attributes left visible, or the mean of the day of the year at training sites. A model has the
same colour in every figure, with all encoders unless some are compared; observed is black.
"""

import math
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

import data
from applications.common import new_figure, save_figure
from eval import load_runs, site_metrics
from model import NEVER_HIDDEN, Masks
from train import Windows, apply_standardisation, arrange, load_checkpoint, split


def by_site(runs):
    """{site: its NSE, mean over one model's runs, and the arrays of the first run that tests it}"""
    result, scores = {}, defaultdict(list)
    for run in runs:
        for k, site in enumerate(run["ids"]):
            metrics = site_metrics(run["obs"][k], run["sim"][k])
            scores[site].append(metrics["nse"])
            row = {name: run[name][k] for name in ("latlon", "obs", "sim")} | {"run": run}
            result.setdefault(site, row | {"metrics": metrics})["nse"] = np.mean(scores[site])
    return {site: row for site, row in result.items() if math.isfinite(row["nse"])}


def write_metrics(path, models):
    """A csv: every metric of each site, by each model; of several seeds the first."""
    header, rows = ",".join(["model,id,lat,lon", *site_metrics([], [])]), []
    for name, sites in models.items():
        rows += [(name, x, *row["latlon"], *row["metrics"].values()) for x, row in sites.items()]
    data.write_atomically(path, lambda file: np.savetxt(
        file, np.array(rows, object), "%s", ",", header=header, comments=""))


def draw_setting(path, setting, models, colours):
    """The pictures of {model: what by_site knows}, the method before all others."""
    method = next(iter(models))
    ranked = sorted(models[method], key=lambda site: models[method][site]["nse"])
    figure = new_figure(9.5, 7.4)
    shares, places, middle, lowest = figure.subplot_mosaic(
        "AB;CC;DD", width_ratios=(2, 3), height_ratios=(3.4, 2, 2)).values()
    figure.suptitle(setting)
    draw_distribution(shares, models, colours)
    draw_map(places, method, list(models[method].values()))
    for axis, kind, site in ((middle, "median", ranked[len(ranked) // 2]),
                             (lowest, "worst", ranked[0])):
        axis.set_title(f"{kind} site: {site}", loc="left")
        tested = [name for name in models if name in (method, "lstm") and site in models[name]]
        draw_hydrographs(axis, {name: models[name][site] for name in tested}, colours)
    save_figure(figure, path)


def draw_distribution(axis, models, colours, style="-", count=""):
    """The share of sites whose NSE is below x, a curve for each model."""
    for name, rows in models.items():
        values = [row["nse"] for row in rows.values()]
        label = f"{name}{count}, median {np.median(values):.2f}"
        if any(row["run"]["overlap"] for row in rows.values()):
            label += "\n(has seen test sites)"
        axis.ecdf(values, color=colours[name], linestyle=style, label=label)
    # a few sites may be at -100
    axis.set(xlabel="NSE", ylabel=f"share of {len(values)} held-out sites below", xlim=(-1, 1))
    axis.legend(loc="upper left", handlelength=1)


def draw_map(axis, name, rows):
    """Each site of one model, coloured by its NSE."""
    lat, lon = np.array([row["latlon"] for row in rows]).T                      # (N,) each
    dots = axis.scatter(lon, lat, 24, [row["nse"] for row in rows], vmin=0, vmax=1, ec="0.3")
    axis.figure.colorbar(dots, ax=axis, extend="min", label=f"NSE of {name}")
    axis.set(xlabel="longitude (degrees)", ylabel="latitude (degrees)")


def draw_hydrographs(axis, tested, colours):
    """The last year with observations of a site, from {model: what by_site knows of it}."""
    first = next(iter(tested.values()))
    target, dates = first["run"]["target"], first["run"]["dates"]
    last = np.flatnonzero(np.isfinite(first["obs"]))[-1] + 1
    days = slice(max(last - 365, 0), last)
    axis.plot(dates[days], first["obs"][days], "k", label="observed")
    for name, row in tested.items():
        label = f"{name}, NSE {row['nse']:.2f}"
        axis.plot(dates[days], row["sim"][days], color=colours[name], label=label)
    axis.set_ylabel(f"{target} ({getattr(data.VARIABLES.get(target), 'unit', 'in its unit')})")
    axis.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False, handlelength=1)


def draw_settings(path, panels, colours):
    """A panel for each of {data set: {(labelled sites, setting): models}}: the shares of all its
    settings, the fewer sites the more broken the line."""
    figure = new_figure(4 * len(panels), 4)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (name, settings) in zip(axes, panels.items()):
        ordered = sorted(settings.items(), reverse=True)
        for ((labelled, _), models), style in zip(ordered, 9 * ["-", "--", ":", "-."]):
            count = f", {labelled:.0f} sites".replace("inf", "all")
            draw_distribution(axis, models, colours, style, count)
        axis.set_title(name)
    save_figure(figure, path)


@torch.no_grad()
def reconstruct(folder, spec):
    """Hide one group after the other in 4 windows of each of 250 validation sites; print the R2.

    The picture is of the first window.
    """
    model, saved = load_checkpoint(folder / "pretrained.pt")
    options, c = Namespace(**saved["options"]), model.eval().config
    sites = data.load(spec or options.data, cache=folder / "cache", quick=options.quick)
    windows = Windows(sites, saved["scaling"], c.max_days, c.dynamic_names, c.static_names)
    training, validation = split(options, sites)
    validation = validation[windows.last[validation] > 0][:250]         # those that have weather
    data.check(len(validation), f"{folder}/pretrained.pt: no validation site has weather")
    site = np.repeat(validation, 4)                                             # (B,)
    start = windows.starts(site, np.random.default_rng(0))                      # (B,)
    batch = windows.get(site, start)
    forcing, static, _, day_of_year = batch                 # (B, L, C), (B, S), (B, 2), (B, L)
    print(f"R2 at {len(validation)} validation sites {'':<3}{'StefaLand':>10}{'yardstick':>11}")

    table = windows.static.numpy()                                              # (N, S)
    for group in sorted({*c.static_groups} - {NEVER_HIDDEN}):
        member = np.array(c.static_groups) == group                             # (S,)
        _, guess = decode(model, batch, Masks(static=torch.tensor(member)))     # (B, S)
        others = table[:, ~member]
        fitted = [ridge(others[training], y[training], others[site]) for y in table[:, member].T]
        fitted = torch.tensor(np.stack(fitted, 1))                              # (B, V)
        show(f"static {group}", static[:, member], guess[:, member], fitted)

    usual = climatology(windows, training)[day_of_year.long() - 1]              # (B, L, C)
    inside = torch.zeros(windows.days, 1, dtype=torch.bool)                     # (L, 1)
    inside[windows.days // 2:][:60] = True
    filled = torch.full_like(forcing[0], torch.nan)                             # (L, C)
    for group in sorted({*c.dynamic_groups}):
        hidden = inside & torch.tensor([name == group for name in c.dynamic_groups])    # (L, C)
        guess, _ = decode(model, batch, Masks(dynamic=hidden))                  # (B, L, C)
        show(f"dynamic {group}", forcing.where(hidden, torch.nan), guess, usual)
        filled[hidden] = guess[0, hidden]
    draw_reconstruction(
        folder / "reconstruction.png", sites.ids[site[0]], sites.dates[start[0]:], c.dynamic_names,
        in_units(forcing[0], windows.scaling), in_units(filled, windows.scaling))


def show(name, truth, guess, yardstick):
    """A row of the table."""
    print(f"{name:<24}{r_squared(truth, guess):>10.3f}{r_squared(truth, yardstick):>11.3f}")


def decode(model, batch, hidden):
    """What the network puts at (B, L, C) and (B, S), 64 windows at a time to bound the memory."""
    guesses = [model.decode(model.encode(*part, hidden))
               for part in zip(*[x.split(64) for x in batch])]
    return [torch.cat(parts) for parts in zip(*guesses)]


def ridge(x, y, x_new):
    """Ridge regression with generalised cross-validation (doi 10.1080/00401706.1979.10489751);
    missing x = mean, missing y left out: (n, S), (n,), (B, S) -> (B,)."""
    x, x_new, y = np.nan_to_num(x[~np.isnan(y)]), np.nan_to_num(x_new), y[~np.isnan(y)]
    u, s, vt = np.linalg.svd(x - x.mean(0), full_matrices=False)
    shrink = s ** 2 / (s ** 2 + np.logspace(-2, 5, 30)[:, None])                # (penalties, S)
    fits = shrink * (u.T @ (y - y.mean())) @ u.T                                # (penalties, n)
    error = ((y - y.mean() - fits) ** 2).sum(1) / (len(y) - 1 - shrink.sum(1)) ** 2
    weights = vt.T @ (shrink[error.argmin()] / s * (u.T @ (y - y.mean())))      # (S,)
    return y.mean() + (x_new - x.mean(0)) @ weights


def climatology(windows, training):
    """Mean of every day of the year over 500 training sites: (366, C), standardised."""
    forcing, names = windows.sites.forcing[training[:500]], windows.sites.dynamic_names
    past = apply_standardisation(arrange(forcing, names, windows.dynamic_names), windows.scaling)
    past = torch.tensor(past).nanmean(0)                                        # (T, C)
    return torch.stack([past[windows.day_of_year == day].nanmean(0) for day in range(1, 367)])


def r_squared(truth, guess):
    """1 - SSE/SST over what is known of the truth, mean over the variables (last axis) it has."""
    truth, guess = truth.double().flatten(0, -2), guess.flatten(0, -2)          # (n, V)
    sse = (truth - guess).square().nansum(0)                                    # (V,)
    sst = (truth - truth.nanmean(0)).square().nansum(0)
    return (1 - sse / sst)[sst > 1e-9].mean().item()        # NaN if it has none


def in_units(values, scaling):
    """Undo train.apply_standardisation: a tensor (..., V) -> an array in the variables' units."""
    log, mean, std = scaling.numpy()
    values = values.numpy() * std + mean
    return np.where(log > 0, np.expm1(values), values)


def draw_reconstruction(path, site, dates, names, observed, filled):
    """Weather of one window (L, C), and what was put in where it was hidden, NaN elsewhere."""
    dates, measured = dates[:len(observed)], np.flatnonzero(np.isfinite(observed).any(0))
    figure = new_figure(8.5, 1 + 1.2 * len(measured))
    axes = figure.subplots(len(measured), 1, sharex=True, squeeze=False)[:, 0]
    for axis, v in zip(axes, measured):
        axis.plot(dates, observed[:, v], "k", lw=0.8, label="observed")
        axis.plot(dates, filled[:, v], "C0", label="hidden and reconstructed")
        axis.axvspan(*dates[np.isfinite(filled[:, v])][[0, -1]], color="0.85", zorder=0)
        axis.set_ylabel(f"{names[v]}\n({data.VARIABLES[names[v]].unit})")
        axis.text(1.01, 0.1, *data.groups([names[v]]), transform=axis.transAxes, rotation=-90)
    figure.suptitle(f"{site}, not trained on; each group, named at the right, is hidden in turn")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    save_figure(figure, path)


def rank(name):
    """Where a model, such as resconn@1a2b, stands: the method first, the baseline last."""
    return {"resconn": 0, "lstm": 2}.get(name.partition("@")[0], 1), name


def main(argv=None):
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="out", type=Path, help="of runs/ and pretrained.pt [out]")
    parser.add_argument("--data", default="", help="of the reconstruction [the pretraining's]")
    o = parser.parse_args(argv)
    runs, panels = load_runs(o.out), defaultdict(dict)
    names = sorted(set().union(*runs.values()), key=rank)
    kind = {name: name.partition("@")[0] for name in names}
    if any(len({kind[name] for name in models}) < len(models) for models in runs.values()):
        kind = {name: name for name in names}               # encoders are compared: tell them apart
    kinds = list(dict.fromkeys(kind.values()))
    colours = {name: f"C{kinds.index(kind[name]) % 10}" for name in names}
    for setting, models in runs.items():
        options = next(iter(models.values()))[0]["options"]
        sites = {name: by_site(models[name]) for name in names if name in models}
        data.check(all(sites.values()), f"{setting}: no test site has an NSE")
        write_metrics(o.out / f"{setting}.csv", sites)
        draw_setting(o.out / f"{setting}.png", setting, sites, colours)
        data_set = f"{Path(options['data']).name}, {options['holdout']}"
        panels[data_set][options["labelled"] or math.inf, setting] = sites
    if len(runs) > 1:
        draw_settings(o.out / "settings.png", panels, colours)
    if (o.out / "pretrained.pt").is_file() or not runs:
        reconstruct(o.out, o.data)


if __name__ == "__main__":
    data.command(main)
