"""Clay, silt and sand of the topsoil (%) at places that were never sampled.

    python -m applications.soil train && python -m applications.soil        the synthetic world
    python -m applications.soil --target sand --data wosis:DIR,csv:DIR --holdout pur --fold all
    python -m applications.soil train --data gauges:DIR --config '{"max_days": 1}' --steps 6000

wosis:DIR, gauges:DIR: profiles, and Caravan's attribute tables (wosis.py, gauges.py). csv:DIR may
be nothing but a sites.csv. The third command pretrains on attributes alone; an encoder of single
days suits sites without weather. All of the target's group is hidden from the models. `train` here,
with the options of train.py, hides the soil, whatever the target is later: it may be any other
attribute, of whose group an encoder should not know either. Models and runs: values.py.
"""

import sys
from dataclasses import replace

import data
import train
from applications import values


def attribute_as_target(sites, name):
    """The sites with this attribute as their target, (N, 1), and nothing of its group."""
    names, group_of = sites.static_names, data.groups(sites.static_names)
    data.check(name in names, f"the sites have no attribute {name}, only {', '.join(names)}")
    group, target = group_of[names.index(name)], sites.static[:, [names.index(name)]]
    kept = tuple([other for other, its in zip(names, group_of) if its != group]) or ("nothing",)
    static = train.arrange(sites.static, names, kept)                           # (N, S)
    return replace(sites, target=target, static=static, static_names=kept)


def load_sites(o):
    """The sites of --data for --target."""
    return attribute_as_target(train.load_sites(o), o.target)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["train"]:
        train.main(argv[1:], lambda o: attribute_as_target(train.load_sites(o), "clay"))
    else:
        values.main(__doc__, load_sites, argv, target="clay")


if __name__ == "__main__":
    data.command(main)
