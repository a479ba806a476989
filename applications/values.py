"""One value, or one class, per site: what soil.py, landslide.py and alphaearth.py share.

    python train.py && python -m applications.soil --seeds 3     clay, for example

`resconn` reads the embedding of the frozen encoder and, on a residual path, the attributes; `mlp`
the attributes alone; `glm`, ridge or logistic regression, likewise. The embedding: tokens before
the encoder's layers and, at first at 0.3, after them; of the site, and the mean over the days of
the first year of its record. What the application hides is hidden from the encoder, too.
A run leaves predictions in out/values/*.npz and its model beside: load("….pt").predict(sites).
Options: those of finetune.py that have to do with checkpoint, folds and seeds.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

import data
import finetune
import train
from applications.common import PENALTIES, converge
from eval import ratio, site_metrics, valid_pairs
from model import Config, StefaLand


class Tokens(nn.Module):
    """Vectors of a site, each normed, summed by learned gains: (B, n, D) -> (B, width)."""

    def __init__(self, n, d, width):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor([1, 1, 0.3, 0.3])[:n])
        self.norms, self.expand = nn.ModuleList(map(nn.LayerNorm, [d] * n)), nn.Linear(d, width)

    def forward(self, x):
        return self.expand(sum(gain * norm(token) for gain, norm, token in
                               zip(self.gain, self.norms, x.unbind(1))))


LAYERS = {"embedding": Tokens, "attributes": nn.Linear}     # input -> its layer(*shape, width)
# model -> its inputs
VARIANTS = {"resconn": ("embedding", "attributes"), "mlp": ("attributes",), "glm": ("attributes",)}


class Network(nn.Module):
    """The sum of what the inputs' layers say, read by two more: a value per site, or a logit.

    `settings`, plain values, and the weights are all that it takes to predict at other sites.
    """

    def __init__(self, settings, encoder=None):
        super().__init__()
        self.settings, self.encoder, self.inputs = settings, encoder, ("static",)
        if settings["config"] and not encoder:
            self.encoder = StefaLand(Config(**settings["config"]))
        width, shapes = 1 if settings["linear"] else 64, settings["shapes"]
        self.layers = nn.ModuleDict({name: LAYERS[name](*shapes[name], width) for name in shapes})
        self.head = nn.Sequential(nn.Dropout(0.2), nn.LayerNorm(width), nn.Linear(width, width),
                                  nn.GELU(), nn.Dropout(0.2), nn.Linear(width, 1))

    def forward(self, features):
        """{input: (B, ...)} -> (B, 1), standardised, or logits."""
        x = sum(layer(features[name]) for name, layer in self.layers.items())   # (B, width)
        return x if self.settings["linear"] else self.head(x)

    def values(self, features):
        """Values in the target's unit, or probabilities of class 1: (N, 1)."""
        s, y = self.settings, self.eval()(features).detach()
        return (y.sigmoid() if s["classes"] else y * s["spread"] + s["centre"]).numpy()

    def predict(self, sites):
        """The value, or the probability of class 1, at other sites: (N, 1). What it was not
        trained on, as those of the target's group, it does not see."""
        static = train.arrange(sites.static, sites.static_names, self.settings["static_names"])
        sites = replace(sites, static=static, static_names=self.settings["static_names"])
        return self.values(features_of(self.settings, self.encoder, sites))


finetune.VARIANTS["value"] = finetune.Variant(Network)      # the variant of all these, for load
load = finetune.load


def features_of(settings, encoder, sites):
    """A model's inputs at sites with its attributes, {input: (N, ...)}; ValueError if one lacks."""
    z = train.apply_standardisation(sites.static, settings["scaling"]["static"])    # (N, S)
    x = sites.extra | {"attributes": finetune.fill_and_flag(torch.from_numpy(z))}   # (N, 2 S)
    if encoder:
        x["embedding"] = embed(encoder, settings["encoder_scaling"], sites)
    data.check({*settings["inputs"]} <= x.keys(), f"no {' or '.join(settings['inputs'])} of sites")
    return {name: torch.as_tensor(x[name], dtype=torch.float32) for name in settings["inputs"]}


@torch.no_grad()
def embed(encoder, scaling, sites):
    """Tokens before the layers, of the days and of the site, and after them: (N, 4, D)."""
    c, rows = encoder.eval().config, []
    windows = train.Windows(sites, scaling, c.max_days, c.dynamic_names, c.static_names)
    start = np.minimum(windows.first, len(sites.dates) - c.max_days)            # (N,)
    for i in np.array_split(np.arange(len(start)), len(start) // 64 + 1):
        e = encoder.read(*windows.get(i, start[i]))                             # (B, L+1, 2 D)
        rows.append(torch.stack([e[:, :-1].mean(1), e[:, -1]], 1))              # (B, 2, 2 D)
    return torch.cat(torch.cat(rows).chunk(2, -1), 1)


def fit(model, o, loss, features, y, training, validation, rng):
    """Train; keep the weights with the least loss at validation sites, looked at ten times."""
    optimizer, least = torch.optim.AdamW(model.parameters(), o.lr, weight_decay=1e-2), np.inf
    for step in range(o.steps):
        i, rate = rng.choice(training, o.batch_size), o.lr * train.learning_rate(step / o.steps)
        guess = model.train()({name: x[i] for name, x in features.items()})     # (B, 1)
        train.descend(optimizer, loss(guess, y[i]), rate, clip=1.0)
        if (step + 1) % max(o.steps // 10, 1) == 0:
            value = loss(model.eval()(features)[validation], y[validation]).item()
            if value < least:
                least, kept = value, {k: x.clone() for k, x in model.state_dict().items()}
    model.load_state_dict(kept)


def solve(model, loss, features, y, training, validation):
    """In place of fit, for glm: of the penalties that with the least loss at validation sites."""
    [layer], [x], truth = model.layers.values(), features.values(), y[training].double()
    maps = [converge(x[training], lambda y: loss(y, truth), penalty=p) for p in PENALTIES]
    losses = [loss(x[validation] @ w + b, y[validation]).item() for w, b in maps]
    w, b = maps[np.argmin(losses)]
    layer.load_state_dict({"weight": w.T, "bias": b})


def value_scores(obs, sim):
    """Of one value per site, (sites, 1): over all sites at once, in the unit of obs."""
    scores, difference = site_metrics(obs, sim), np.asarray(sim) - obs
    median = np.nanmedian(difference)
    return {"R2": scores["nse"], "rmse": scores["rmse"], "median difference": median,
            "nmad": 1.4826 * np.nanmedian(abs(difference - median))}


def class_metrics(label, score):
    """accuracy, precision, recall, f1 at score >= 0.5, and ROC auc (by ranks); labels 0 and 1."""
    label, score = valid_pairs(label, score)
    true, guess = label > 0.5, score >= 0.5
    hits, ones, zeros = (true & guess).sum(), true.sum(), (~true).sum()
    _, place, ties = np.unique(score, return_inverse=True, return_counts=True)
    rank = (np.cumsum(ties) - (ties - 1) / 2)[place]        # equal scores share their mean rank
    return {"accuracy": np.mean(true == guess), "precision": ratio(hits, guess.sum()),
            "recall": ratio(hits, ones), "f1": ratio(2 * hits, guess.sum() + ones),
            "auc": ratio(rank[true].sum() - ones * (ones + 1) / 2, ones * zeros)}


def run(o, variant, inputs, sites, fold, seed, setting):
    """Train one model on one fold, and write it and its predictions, which are returned:
    {name: array}. sites.target: (N, 1)."""
    torch.manual_seed(seed)
    encoder, saved, held_out = None, {"overlap": 0}, data.folds(sites, o.holdout, o.folds) == fold
    any_weather = replace(sites, forcing=np.zeros((len(held_out), 1, 1)))   # none is needed
    training, validation, test = finetune.choose_sites(
        o, any_weather, held_out, [slice(None)] * 2, np.random.default_rng([o.seed, fold]))
    if "embedding" in inputs:
        encoder, saved = finetune.load_encoder(o, sites, test, fold)
    settings = dict(
        variant="value", inputs=inputs, classes=o.classes, static_names=sites.static_names,
        config=saved.get("config"), encoder_scaling=saved.get("scaling"), linear=variant == "glm",
        centre=float(sites.target[training].mean()), spread=float(sites.target[training].std()),
        scaling={"static": train.fit_standardisation(sites.static[~held_out])},
        places={"latlon": torch.tensor(sites.latlon[training]),                 # trained at
                "static": torch.tensor(sites.static[training])})
    features = features_of(settings, encoder, sites)
    settings["shapes"] = {name: tuple(x.shape[1:]) for name, x in features.items()}
    model = Network(settings, encoder)
    y, loss = torch.tensor(sites.target), nn.functional.binary_cross_entropy_with_logits    # (N, 1)
    if not o.classes:
        y, loss = (y - settings["centre"]) / settings["spread"], nn.functional.mse_loss
    if variant == "glm":
        solve(model, loss, features, y, training, validation)
    else:
        fit(model, o, loss, features, y, training, validation, np.random.default_rng([seed, fold]))

    about = json.dumps(dict(setting=setting, model=variant, fold=fold, seed=seed, target=o.target,
                            data=sites.digest, options=finetune.identity(vars(o))))
    arrays = dict(about=about, latlon=sites.latlon[test], overlap=saved["overlap"])
    for name, x in (("ids", sites.ids), ("obs", sites.target), ("sim", model.values(features))):
        arrays |= {name: x[test], f"validation_{name}": x[validation]}      # to calibrate with
    path = Path(o.out, "values", f"{setting}, {variant}, fold {fold}, seed {seed}.npz")
    train.save(path.with_suffix(".pt"), settings=settings, weights=model.state_dict())
    data.write_atomically(path, lambda file: np.savez_compressed(file, **arrays))
    return arrays


def main(description, load_sites, argv=None, variants=VARIANTS, classes=False, *, target, **more):
    """The command line: trains each model on each fold and prints a table.

    load_sites(o) -> Sites whose target is (N, 1), NaN = unknown. more: the defaults of an
    application's own options, which are texts.
    """
    parser = train.shared_options(description, steps=600, batch_size=32, lr=2e-3, basins="",
                                  labelled=0, classes=classes)
    for name, default in dict(
            target=target, model=",".join(variants), checkpoint="", fold="0", **more).items():
        parser.add_argument(f"--{name}", default=default, help="see finetune.py [%(default)s]")
    parser.add_argument("--allow-overlap", action="store_true", help="as in finetune.py")
    parser.add_argument("--seeds", type=train.positive, default=1, help="repetitions")
    o, defaults = parser.parse_args(argv), vars(parser.parse_args([]))
    o.steps = min(o.steps, 10) if o.quick else o.steps
    torch.set_num_threads(o.threads)
    sites, score = load_sites(o), class_metrics if classes else value_scores
    setting, seeds = finetune.name_setting(o, defaults, sites), range(o.seed, o.seed + o.seeds)
    for variant in o.model.split(","):
        data.check(variant in variants, f"--model {variant}: expected some of {[*variants]}")
        runs = [[run(o, variant, variants[variant], sites, fold, seed, setting) for seed in seeds]
                for fold in finetune.tested_folds(o)]
        if o.holdout != "none":
            print_row(variant, runs, score)


def print_row(name, runs, score):
    """Mean over folds and seeds ± standard error over folds; runs: a list for each fold, with the
    arrays of each seed."""
    scores = [[score(x["obs"], x["sim"]) for x in of_fold] for of_fold in runs]
    row = f"{name:<20}{len(runs)} folds, {len(runs[0])} seeds"
    for metric in scores[0][0]:
        x = np.mean([[of_seed[metric] for of_seed in of_fold] for of_fold in scores], 1)  # (folds,)
        error = x.std() / np.sqrt(max(len(x) - 1, 1))
        row += f"  {metric} {x.mean():.3f}" + f" ± {error:.3f}" * (len(x) > 1)
    print(row + "  (has seen test sites)" * any(x["overlap"] > 0 for [x, *_] in runs))
