"""Tests of the applications; python test_all.py runs them with its own."""

import contextlib
import io
import re
import runpy
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import mkdtemp
from unittest import SkipTest, mock

import numpy as np
import torch
from numpy import nan
from torch.nn.functional import mse_loss

import data
import eval as evaluate
import finetune
import model
import train
from applications import (adapters, alphaearth, blocks, budyko, common, controls, dynamic_world,
                          embeddings, ensembles, figures, growth, height, hybrid, intervals,
                          landslide, predict, reconstruction, release, soil, soil_moisture,
                          tails)
from test_all import (FILES, REAL, archives, checkpoint, close, needs_real_data, out_with_encoder,
                      quick_run, raises, tune)


# soil_moisture.py and soil.py

PROFILES = {  # of small archives of the ISMN and of WoSIS, with | between the lines
    "net/s1/net_net_s1_sm_0.05_X.stm": "net net s1 45.0 9.0 120 .05 .05 X-1|2000/01/01 00:00 0.2 "
        "G M|2000/01/01 12:00 0.3 G M|2000/01/01 13:00 0.9 D01 M|2000/01/03 00:00 0.125 G M",
    "net/s1/net_net_s1_sm_0.20_X.stm": "net net s1 45.0 9.0 120 .2 .2 X-2|2000/01/01 00:00 0.4 G M",
    "net/s2/net_net_s2_sm_0.05_X.stm": "net net s2 46.0 9.0 90 .05 .05 X|2000/01/01 00:00 0.4 G M",
    "net/s1/s1.csv": "date,precipitation|2000-01-01,3|2000-01-02,0",
    "net/s1/net_net_s1_static_variables.csv": "quantity_name;unit;depth_from[m];depth_to[m];value;"
        "quantity_source_name;resolution;|clay fraction;% weight;0.00;0.30;23.00;HWSD;30\";|"
        "clay fraction;% weight;0.30;1.00;29.00;HWSD;30\";|organic carbon;% weight;-99.90;-99.90;"
        "0.59;insitu;;|land cover classification;;;;120;CCI_landcover_2000;;|"
        "land cover classification;;;;130;CCI_landcover_2010;;",
    "net/s_3/net_net_s,3_sm_0.05_X.stm":
        "net net s,3 47.0 9.0 90 .05 .05 X|2000/01/01 00:00 0.4 G M",
    "net/s_3/net_net_s,3_sm_0.05_Y.stm":
        "net net s,3 47.0 9.0 90 .05 .05 Y|2000/01/01 00:00 0.5 G M|2000/01/02 00:00 0.5 G M",
    "net/s_3/s_3.csv": "date,precipitation|2000-01-01,1",
    "net/s4/net_net_s4_sm_0.50_X.stm": "net net s4 48.0 9.0 90 .5 .5 X|2000/01/01 00:00 0.4 G M",
    "net/s4/s4.csv": "date,precipitation|2000-01-01,1",
    "net/s5/net_net_s5_sm_0.05_X.stm": "net net s5 48.0 9.0 90 .05 .05 X|2000/01/01 00:00 0.4 D M",
    "net/s5/s5.csv": "date,precipitation|2000-01-01,1",
    "w_profiles.tsv": "profile_id\tlatitude\tlongitude|7\t10\t20|8\t11\t21|9\t12\t22",
    "w_physical.tsv": "profile_id\tupper_depth\tlower_depth\tclay_value_avg\tsilt_value_avg\t"
        "sand_value_avg|7\t0\t10\t10\t20\t70|7\t10\t50\t40\t20\t40|8\t0\t30\t30\t30\t45.5|"
        "9\t0\t20\t\t50\t50"}


def profiles(old="", new="", only=""):
    """As archives(), with PROFILES."""
    with mock.patch.dict(FILES, PROFILES, clear=True):
        return archives(old, new, only)


def test_ismn_gives_daily_means_of_good_values_at_the_shallowest_sensor():
    with contextlib.redirect_stdout(io.StringIO()) as said:
        s = data.load(f"ismn:{profiles()}", "soil_moisture", cache=None)
    assert s.ids.tolist() == ["net_s1", "net_s4", "net_s,3"]
    assert s.dynamic_names == ("precipitation",)
    np.testing.assert_equal(s.latlon, [[45, 9], [48, 9], [47, 9]])
    assert s.static_names == ("elevation", "clay", "landcover_130")
    np.testing.assert_equal(s.static, [[120, 23, 1], [90, nan, nan], [90, nan, nan]])
    np.testing.assert_equal(s.forcing[0], [[3], [0], [nan]])
    np.testing.assert_allclose(s.target, [[0.25, nan, 0.125], [0.4, nan, nan], [0.5, 0.5, nan]])
    for complaint in (r"net s2: skipped, no weather: neither of \['s2'\] with .csv is there",
                      "net s4: its uppermost sensor is 0.5 m deep, not the surface",
                      "net s5: skipped, no value of its uppermost sensor is flagged good"):
        assert re.search(complaint, said.getvalue()), complaint


def test_damaged_ismn_files_are_refused_with_file_and_line():
    for old, new, complaint in (
            ("45.0 9.0", "45.0", "0.05_X.stm, line 1: 8 fields, expected 9"),
            ("45.0", "95.0", "net_s1 has the latitude 95"), ("45.0", "x", "line 1: lat is 'x'"),
            ("0.125 ", "0,125 ", "0.05_X.stm, line 5: value is '0,125'"),
            ("2000/01/03", "2000/13/03", "0.05_X.stm, line 5: date is '2000/13/03'"),
            ("date,", "day,", "s1.csv: no column date")):
        raises(ValueError, complaint, data.load, f"ismn:{profiles(old, new, 's1')}", cache=None)


def test_wosis_gives_the_texture_of_the_upper_30_cm():
    with contextlib.redirect_stdout(io.StringIO()) as said:
        s = data.load(f"wosis:{profiles()}", cache=None)
    assert s.ids.tolist() == ["7"] and s.static_names == ("clay", "silt", "sand")
    np.testing.assert_allclose(s.static, [[30, 20, 50]])    # 10 cm of one layer, 20 of the other
    np.testing.assert_equal(s.latlon, [[10, 20]])
    assert "2 of 3 profiles left out" in said.getvalue()    # adds up to 105.5 %; has no clay


def test_gauges_are_known_by_their_attributes_alone_each_once():
    folder = archives("us_9,no series", "hysets_us_1,twice")
    with contextlib.redirect_stdout(io.StringIO()) as said:
        s = data.load(f"gauges:{folder}", cache=None)
    assert s.ids.tolist() == ["hysets_us_1", "us_2"]        # in the order of their names
    assert s.forcing.shape == (2, 365, 1) and np.isnan(s.forcing).all()
    assert "3 gauges, of which 0 left out" in said.getvalue() and "1 twice" in said.getvalue()


def test_gauges_of_which_little_is_known_are_left_out():
    folder = archives()
    table = folder / "attributes/us/attributes_other_us.csv"
    more = folder / "attributes/us/attributes_caravan_us.csv"
    columns = "gauge_id,frac_snow,p_seasonality,ele_mt_sav,kar_pc_sse"
    more.write_text(f"{columns}\nus_1,1,1,1,1\n")           # 10 with coordinates; the others: 4
    with contextlib.redirect_stdout(io.StringIO()) as said:
        s = data.load(f"gauges:{folder}", cache=None)
    assert s.ids.tolist() == ["us_1"] and "3 gauges, of which 2 left out" in said.getvalue()
    more.unlink(), table.unlink()
    raises(ValueError, "no site found", data.load, f"gauges:{mkdtemp()}", cache=None)


def test_texture_and_what_is_derived_of_it_are_no_inputs_of_a_texture_task():
    sites = data.load(quick=True)
    renamed = [{"forest": "soil_porosity", "pasture": "water_capacity"}.get(name, name)
               for name in sites.static_names]
    sites = data.replace(sites, static_names=tuple(renamed))
    soil = "clay", "silt", "sand", "organic_carbon", "soil_porosity", "water_capacity"
    for part in ("clay", "silt", "sand"):
        blind = finetune.TASKS[part].prepare(sites, None)
        hidden = np.isin(renamed, soil)
        assert np.array_equal(np.isnan(blind.static).all(0), hidden)
        np.testing.assert_equal(blind.static[:, ~hidden], sites.static[:, ~hidden])
        np.testing.assert_equal(blind.target, sites.static[:, renamed.index(part)])
    lacking = data.replace(sites, static_names=("x", *renamed[1:3], "y", *renamed[4:]))
    prepare = finetune.TASKS["clay"].prepare
    raises(ValueError, "no attribute clay", prepare, lacking, finetune.Options())
    assert np.isnan(prepare(lacking, None).target).all()    # where a trained model predicts


def test_a_value_per_site_is_predicted_at_the_held_out_sites():
    out, sites = out_with_encoder(), data.load(quick=True)
    common.main("clay", "", argv=f"--quick --model resconn,mlp,glm --out {out}".split())
    with mock.patch.dict(finetune.TASKS):                   # main() wraps them
        alphaearth.main(f"--quick --task clay --model alphaearth --out {out}".split())
    clay = sites.static[data.folds(sites, "pub", 5) == 0, sites.static_names.index("clay")]
    for name, (result,) in evaluate.load_runs(out)["clay synthetic pub5"].items():
        assert np.array_equal(result["obs"][:, 0], clay[~np.isnan(clay)]), name
        assert np.isfinite(result["sim"]).all() and result["sim"].shape == result["obs"].shape, name


def test_a_name_is_true_or_refused():
    for task, name in (("clay", "lstm"), ("streamflow", "mlp"), ("streamflow", "cnn"),
                       ("clay", "resconn-gated"), ("landslide", "lstm")):
        raises(ValueError, f"--model {name} is not for {task}", tune,
               f"--task {task} --model {name}", mkdtemp())


def test_a_linear_baseline_is_solved():
    rng = np.random.default_rng(0)
    x, noise = rng.standard_normal((300, 4)), rng.standard_normal(300)
    y = x @ [1, -2, 0, 3] + 5 + 0.1 * noise
    truth = torch.from_numpy(y)[:, None]
    w, b = common.converge(torch.from_numpy(x), partial(mse_loss, target=truth))
    best = np.linalg.lstsq(np.column_stack([x, np.ones(300)]), y, rcond=None)[0]
    close(torch.cat([w[:, 0], b]), torch.tensor(best), atol=1e-4)
    sites, names = data.load(quick=True), data.load(quick=True).static_names
    sites.static[:] = np.nan_to_num(sites.static)           # clay from the attributes, no noise
    others = np.array(data.groups(names)) != "soil"
    o, fold_of = finetune.Options(task="clay"), data.folds(sites, "pub", 5)
    scaling = train.fit_standardisation(sites.static[fold_of != 0])
    z = train.apply_standardisation(sites.static, scaling)
    sites.static[:, names.index("clay")] = z[:, others] @ rng.standard_normal(others.sum())
    model, run = finetune.run(o, "glm", finetune.TASKS["clay"].prepare(sites, o), fold_of, 0, 0)
    assert evaluate.value_scores(run["obs"], run["sim"])["R2"] > 0.999


def test_training_sites_miss_groups_and_a_rare_class_is_bounded():
    sites, seen = data.load(quick=True), []
    sites = replace(sites, static=np.nan_to_num(sites.static))
    sites.static[0, 0] = 1e6                                # of one site only
    o, fold_of = soil.Options(task="clay", hide=0.5, bound=1.5, steps=40), np.arange(len(sites.ids))
    fold_of[1:] = 1 + fold_of[1:] % 2                       # the first site is tested

    def look(self, e, forcing, static, extra):
        seen.append((self.training, static))
        return forward(self, e, forcing, static, extra)
    forward, prepared = finetune.Predictor.forward, finetune.TASKS["clay"].prepare(sites, o)
    with mock.patch.object(finetune.Predictor, "forward", look):
        finetune.run(o, "mlp", prepared, fold_of, 0, 0)
    others = np.array(data.groups(sites.static_names)) != "soil"
    for training, share in ((True, 0.5 * 7 / 8), (False, 0)):   # one copy of eight is complete
        values = torch.cat([x for kind, x in seen if kind == training])[:, others]
        assert abs(values.isnan().float().mean() - share) < 0.1 * training + 1e-6
        assert values.nan_to_num().abs().max() == 1.5


def test_an_encoder_that_was_trained_to_tell_the_target_is_told():
    for without, told in (("", True), ("soil", False)):
        out = mkdtemp()
        command = f"train --quick --steps 1 --out {out}".split()
        common.main("clay", "", argv=command, without=without)
        with contextlib.redirect_stdout(io.StringIO()) as said:
            common.main("clay", "", argv=f"--quick --model resconn --out {out}".split())
        assert ("trained to tell clay" in said.getvalue()) == told


def test_the_scores_shown_are_the_tasks():
    with contextlib.redirect_stdout(io.StringIO()) as said:
        tune("--task soil_moisture --model lstm", out := mkdtemp())
        evaluate.main(["--out", out])
    assert said.getvalue().count("rmse") == 4 and "kge" not in said.getvalue()  # and ubrmse


@mock.patch.dict(data.READERS)                              # what they register is forgotten
@mock.patch.dict(finetune.TASKS)
@mock.patch.dict(finetune.VARIANTS)
def test_every_application_explains_its_options():
    for path in sorted(Path(common.__file__).parent.glob("[a-z]*.py")):
        if path.stem not in ("common", "blocks", "tests"):
            with (mock.patch.object(sys, "argv", [str(path), "--help"]),
                  contextlib.redirect_stdout(io.StringIO()) as said):
                raises(SystemExit, "^0$", runpy.run_path, str(path), run_name="__main__")
            assert "usage" in said.getvalue(), path


def test_an_application_pretrains_with_its_readers():
    out = mkdtemp()
    command = f"train --quick --steps 2 --seq-len 1 --holdout none --data gauges:{archives()}"
    common.main("clay", "", argv=[*command.split(), "--out", out])
    _, saved = train.load_checkpoint(Path(out, "pretrained.pt"))
    assert saved["ids"] == ["us_1", "us_2", "us_9"] and saved["step"] == 2


# ensembles.py

def test_interval_scores_equal_their_formulas():
    rng = np.random.default_rng(0)
    obs, members = rng.standard_normal(50), rng.standard_normal((7, 50))
    low, high = members.min(0), members.max(0)
    pairs = abs(members[:, None] - members).mean((0, 1))    # all K^2 of them
    crps = abs(members - obs).mean(0) - pairs / 2
    close(ensembles.interval_scores(np.append(obs, nan), *np.pad([low, high], ((0, 0), (0, 1))),
                                    np.pad(members, ((0, 0), (0, 1)))),
          {"coverage": ((low <= obs) & (obs <= high)).mean(), "width": (high - low).mean(),
           "mae": abs(np.median(members, 0) - obs).mean(), "crps": crps.mean()})
    one = ensembles.interval_scores(obs, obs, obs, obs[None] + 1)
    assert np.isclose(one["crps"], 1) and np.isclose(one["mae"], 1)     # of one: its mae


def test_the_median_of_the_seeds_has_a_row_of_its_own():
    out = out_with_encoder()
    tune("--model resconn,lstm --allow-overlap", out)     # one seed: only both kinds together
    models, = ensembles.load_ensembles(out).values()
    assert [*models][2:] == [" + ".join([*models][:2]) + ", median"]
    tune("--model resconn,lstm --seeds 3 --allow-overlap", out)
    models, = ensembles.load_ensembles(out).values()
    *both, one, other, all_of_them = models
    assert {one, other} == {"lstm, median", "resconn, median"}
    assert all_of_them == " + ".join(both) + ", median"
    run, = models[all_of_them]
    sims = [run["sim"] for name in ("resconn", "lstm") for run in models[name]]
    assert np.array_equal(run["sim"], np.median(sims, 0)) and run["baseline"] == "lstm, median"
    with contextlib.redirect_stdout(io.StringIO()) as text:
        ensembles.main(["--out", out])
    assert text.getvalue().count("gain over lstm, median") == 2
    tune("--model resconn,lstm --seeds 2 --draw 1", out)    # of the same sites: a choice of them
    found = ensembles.load_ensembles(out).values()
    assert sum("chosen by validation, median" in models for models in found) == 1
    tune("--model lstm --seeds 2 --labelled 20", out)       # of other sites each: no ensemble
    found = ensembles.load_ensembles(out).values()
    assert sum("lstm, median" in models for models in found) == 2


def test_the_best_mixture_is_that_of_the_validation_sites():
    obs = np.random.default_rng(0).gamma(1.0, 3, (4, 50))

    def run(model, sim):
        return dict(model=model, scoring="series", setting="x", validation_ids=np.arange(4),
                    validation_obs=obs, validation_sim=sim)
    high, low, far = run("high", obs + 1), run("low", obs - 1), run("far", obs[::-1] * 3)
    chosen, tried = ensembles.best_mixture([high, far, low])
    assert [run["model"] for run in chosen] == ["high", "low"] and len(tried) == 7
    assert tried["high", "low"] == 1 > tried["high",] == tried["low",]
    chosen, _ = ensembles.best_mixture([high, run("high", obs), far])    # all seeds of a kind
    assert [run["model"] for run in chosen] == ["high", "high"]
    scores = iter([nan, 0.1, 0.5])                          # of both, high, low
    with mock.patch.dict(evaluate.SCORINGS, series=lambda obs, sim: {"x": next(scores)}):
        assert ensembles.best_mixture([high, low])[0] == [low]       # no score is no best


# predict.py and embeddings.py

def own_basins(n=12):
    """csv:DIR with basins of the synthetic world, the last but one without flow, the last without
    a file; and the world."""
    sites, folder = data.synthetic_world(3, n, 3), Path(mkdtemp())
    rows = ["id,lat,lon," + ",".join(sites.static_names)]
    for i, (site, latlon) in enumerate(zip(sites.ids, sites.latlon)):
        rows.append(",".join([site, *map(str, [*latlon, *sites.static[i]])]).replace("nan", ""))
        lines = ["date," + ",".join(sites.dynamic_names) + ",streamflow" * (i < n - 2)]
        for day, weather, flow in zip(sites.dates, sites.forcing[i], sites.target[i]):
            lines.append(",".join(map(str, [day, *weather, *[flow][:i < n - 2]])))
        (folder / f"{site}.csv").write_text("\n".join(lines))
    (folder / f"{site}.csv").unlink()
    short = folder / "synthetic_0002.csv"                   # ends a hundred days before the others
    short.write_text("\n".join(short.read_text().split("\n")[:-100]))
    (folder / "sites.csv").write_text("\n".join(rows))
    return folder, sites


def test_basins_of_your_own_go_from_nothing_to_predictions():
    (folder, sites), out = own_basins(), mkdtemp()
    train.main(f"--quick --steps 2 --data csv:{folder} --holdout none --out {out}".split())
    finetune.main(f"--quick --data csv:{folder} --holdout none --seeds 2 --out {out}".split())
    command = f"csv:{folder} --out {out}".split()
    predict.main(command)
    where = Path(out, "predictions", f"csv-{folder.name}")
    runs = [dict(np.load(path), model=path.name.split(", ")[1], scoring="series", path=path)
            for path in sorted(Path(out, "runs").glob("*.npz"))]
    assert len(runs) == 4
    chosen, tried = ensembles.best_mixture(runs)             # at the validation sites
    assert len(tried) == 3 and len(chosen) >= 2
    members = [finetune.load(run["path"].with_suffix(".pt")) for run in chosen]
    loaded = data.load(f"csv:{folder}", cache=None)
    expected = np.median([model.predict(loaded) for model in members], 0)       # (N, T)
    table = data.Table(where / "synthetic_0003.csv", ["date"])
    low, median, high = (table.numbers(f"{name} (mm/d)") for name in ("low", "median", "high"))
    np.testing.assert_allclose(median, expected[3], rtol=1e-3)
    assert (0 <= low).all() and (low <= median).all() and (median <= high).all()
    found = np.load(f"{where}.npz")
    np.testing.assert_allclose(found["median"][[0, 1, *range(3, 11)]],
                               expected[[0, 1, *range(3, 11)]], rtol=1e-5)
    assert np.array_equal(np.isnan(found["median"][2]), np.arange(len(sites.dates)) >= 1096 - 100)
    assert len(data.Table(where / "synthetic_0002.csv").lines) == len(sites.dates) - 100
    assert np.isnan(found["median"][11]).all() and not (where / "synthetic_0011.csv").exists()
    table = data.Table(where / "sites.csv")
    assert table.columns["id"] == tuple(sites.ids) and np.isnan(table.numbers("mean (mm/d)")[11])
    assert (table.numbers("distance (km)")[:9] < 1).sum() >= 7      # trained at, or to validate
    assert "tmax" in table.columns["fed as missing"][11]
    # started twice, it goes on where it stopped; of other models it writes nothing
    values = np.load(where / "values.npy", mmap_mode="r+")
    values[5], values[4] = nan, 7
    (where / "synthetic_0005.csv").unlink()
    del values
    predict.main(command)
    again = np.load(f"{where}.npz")["median"]
    np.testing.assert_allclose(again[5], found["median"][5], rtol=1e-4)
    assert (again[4] == 7).all()
    assert (where / "synthetic_0005.csv").exists()
    finetune.main(f"--quick --data csv:{folder} --holdout none --seed 9 --out {out}".split())
    raises(ValueError, "holds predictions of other models or data: move", predict.main, command)
    raises(FileNotFoundError, "no runs with 'xyz' in their names", predict.main,
           [*command, "--runs", "xyz"])
    empty = data.replace(loaded, dynamic_names=("snow",), static_names=("x",),
                         forcing=loaded.forcing[..., :1], static=loaded.static[:, :1])
    raises(ValueError, "none of what the models know", predict.missing_variables, empty, members)


def test_intervals_hold_what_they_promise_at_other_sites():
    rng = np.random.default_rng(0)

    def draw(n):
        sim = rng.gamma(0.5, 4, (n, 400))
        return np.maximum(sim + (0.1 + 0.3 * sim) * rng.standard_normal((n, 400)), 0), sim
    calibration = intervals.Calibration(*draw(40))
    obs, sim = draw(300)
    q = calibration.quantiles(sim)
    assert q.shape == (10, 300, 400) and (np.diff(q, axis=0) >= 0).all()
    for some in (sim < 1, sim > 4):                         # small and large values alike
        inside = (q[0] <= obs) & (obs <= q[-1])
        assert 0.87 < inside[some].mean() < 0.93
    raises(ValueError, "nothing to calibrate with", intervals.Calibration, obs * nan, sim)
    # errors may be of either sign where values are
    q = intervals.Calibration(obs[:9] - 5, sim[:9] - 5).quantiles(np.array([-4.0]))
    assert q.min() < -4 < q.max()


def test_intervals_are_checked_at_held_out_sites():
    out = out_with_encoder()
    tune("--model resconn,lstm --seeds 2 --draw 0", out)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        intervals.main(["--out", out])
    rows = re.findall(r"(raw|calibrated) +(all|dry half|wet half) +coverage (\S+)", said.getvalue())
    assert len(rows) == 3 * 6 and " + " in said.getvalue()
    coverage = {kind: float(x) for kind, part, x in rows[-6:] if part == "all"}
    assert coverage["raw"] < 0.6 < 0.75 < coverage["calibrated"]
    tune("--model lstm --seeds 2 --fold 1", out)
    runs = [run for models in evaluate.load_runs(out).values() for run in models["lstm"]]
    apart = [dict(run, validation_ids=run["validation_ids"] + str(k)) for k, run in enumerate(runs)]
    raises(ValueError, "run finetune.py with --draw 0", ensembles.common_validation, apart)


def test_flow_is_learned_as_a_share_of_the_climatic_mean():
    sites = data.load(quick=True)
    mean = budyko.climatic_mean(sites)
    p, e = (sites.forcing[..., sites.dynamic_names.index(name)].mean(1)
            for name in ("precipitation", "pet"))
    np.testing.assert_allclose(mean[:, 0], p - p / np.sqrt(1 + (p / e) ** 2), rtol=1e-3)
    y = budyko.root_of_share(sites.target, sites)
    np.testing.assert_allclose(budyko.flow(y, sites), sites.target, rtol=1e-4, atol=1e-5)
    assert np.isclose(y[7, 100] ** 2 * mean[7, 0], sites.target[7, 100], rtol=1e-4)
    out = out_with_encoder()
    tune("--model resconn-budyko,lstm-budyko", out)
    models, = evaluate.load_runs(out).values()
    for path in Path(out, "runs").glob("*.pt"):             # and what is saved gives it back
        run, = models[path.name.split(", ")[1]]
        test = np.isin(sites.ids, run["ids"])
        again = finetune.load(path).predict(sites)[test, -len(run["dates"]):]
        assert np.corrcoef(again.ravel(), run["sim"].ravel())[0, 1] > 0.98
        # hardly trained it gives the same share everywhere: in mm/d it goes with the climatic mean
        assert np.corrcoef(run["sim"].mean(1), mean[test, 0])[0, 1] > 0.9
    dry = data.replace(sites, dynamic_names=("rain", *sites.dynamic_names[1:]))
    raises(ValueError, "no precipitation", budyko.climatic_mean, dry)


def test_tails_tell_volume_from_timing_and_take_parts_of_the_embedding_away():
    obs = np.array([1.0, 5, 2, nan, 4])
    np.testing.assert_allclose(tails.right_volume(obs, 3 * obs), obs)
    assert np.isclose(tails.rank_correlation(np.array([1, 2, 9, nan]), np.array([3, 2, 1, 0])), -1)
    out = out_with_encoder()
    tune("--model resconn,lstm", out)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        tails.main(f"--out {out} --worst 2".split())
    text = said.getvalue()
    assert len(re.findall(r"^ +synthetic_\d+ +aridity", text, re.M)) == 2
    lines = re.findall(r"^(?:lstm|resconn|  without [\w ]+?)  +(.*)", text, re.M)
    assert len(lines) == len({*lines}) == 4 + 7
    run, = evaluate.load_runs(out)["streamflow synthetic pub5"]["resconn"]
    model, sites = finetune.load(run["path"].with_suffix(".pt")), data.load(quick=True)
    tested = np.flatnonzero(np.isin(sites.ids, run["ids"]))
    same = tails.without("", model, sites, tested, slice(-len(run["dates"]) + 1096, 1096))
    np.testing.assert_allclose(same, run["sim"], atol=1e-2)


def test_embeddings_are_written_for_every_site():
    (folder, sites), (path, _) = own_basins(), checkpoint()
    out = mkdtemp()
    with contextlib.redirect_stdout(io.StringIO()) as said:
        embeddings.main(f"csv:{folder} --out {out} --checkpoint {path}".split())
    table = data.Table(Path(out, "embeddings", f"csv-{folder.name}.csv"), ["id", "lat", "lon"])
    assert table.columns["id"] == tuple(sites.ids) and len(table.columns) == 3 + 2 * 64
    loaded = data.load(f"csv:{folder}", cache=None)
    network, saved = train.load_checkpoint(path)
    c = network.eval().config
    windows = train.Windows(loaded, saved["scaling"], 365, c.dynamic_names, c.static_names)
    e = network.encode(*windows.get(np.array([2]), np.array([0])))[0].detach()
    for part, expected in (("site", e[-1]), ("day", e[:-1].mean(0))):
        row = [table.numbers(f"{part}_{d:03d}")[2] for d in range(64)]
        close(torch.tensor(row), expected, atol=1e-4)
    assert "of 10 sites" in said.getvalue()


def test_neighbours_that_are_alike_are_told():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200, 2))
    assert embeddings.likeness(x, x[:, 0]) > 0.9 > 0.3 > embeddings.likeness(x, rng.random(200))
    scores, shares = embeddings.components(np.outer(x[:, 0], [3, 4, 0]) + 1)
    assert abs(shares[0] - 1) < 1e-9
    assert np.isclose(abs(np.corrcoef(scores[:, 0], x[:, 0])[0, 1]), 1)


# landslide.py

def slopes(points="713255,9559875,TRUE,1,2,3,4,5|713030,9559875,FALSE,1,2,3,4,5", **raster):
    """An archive of two points on a raster of 40 x 50 cells; the second is too near the edge."""
    folder = Path(mkdtemp())
    text = f"x,y,lslpts,slope,cplan,cprof,elev,log10_carea|{points}"
    (folder / "points.csv").write_text(text.replace("|", "\n"))
    maps = np.arange(2.0 * 40 * 50).reshape(2, 40, 50)
    grid = dict(ta=maps, xmin=713_000.0, ymax=9_560_000.0, res=10.0)
    np.savez(folder / "raster.npz", **grid | raster)
    return folder


def test_a_patch_lies_round_its_point():
    with contextlib.redirect_stdout(io.StringIO()) as said:
        s = data.load(f"landslide:{slopes()}", "landslide", cache=None)
    maps = np.arange(2.0 * 40 * 50).reshape(2, 40, 50)      # the point: 255 m east, 125 m south
    np.testing.assert_equal(s.extra["patch"], maps[None, :, 12 - 8:12 + 9, 25 - 8:25 + 9])
    assert s.target.tolist() == [1] and s.static.shape == (1, 5)
    assert "points.csv, line 3: skipped, its patch leaves the raster" in said.getvalue()
    rows = "713255,9559875,{},1,2,3,4,5"
    folder = slopes("|".join(rows.format(label) for label in ("0", "1", "false", "True")))
    assert data.load(f"landslide:{folder}", "landslide", cache=None).target.tolist() == [0, 1, 0, 1]


@needs_real_data
def test_the_centre_of_a_patch_is_the_raster_cell_of_its_point():
    s = data.load(f"landslide:{REAL / 'landslide'}", "landslide", cache=None)
    assert s.extra["patch"].shape == (347, 5, 17, 17) and abs(s.target.mean() - 0.5) < 0.02
    slope = s.static[:, s.static_names.index("slope")]
    assert np.corrcoef(s.extra["patch"][:, 0, 8, 8], slope)[0, 1] > 0.99


def test_damaged_landslide_archives_are_refused():
    for folder, complaint in (
            (slopes("713255,9559875,maybe,1,2,3,4,5"), "points.csv, line 2: lslpts is 'maybe'"),
            (slopes("713255,,TRUE,1,2,3,4,5"), "points.csv, line 2: y is ''"),
            (slopes("NA,9559875,TRUE,1,2,3,4,5"), "points.csv, line 2: x is 'NA'"),
            (slopes(res=0.0), "raster.npz: cells of 0.0 m"), (slopes(xmin=nan), "nan, 9560000"),
            (slopes(ta=np.zeros((4, 5))), "raster.npz: ta has the shape")):
        raises(ValueError, complaint, data.load, f"landslide:{folder}", "landslide", cache=None)
    both = "landslide:{0},csv:{1}".format(slopes(), archives())
    raises(ValueError, "sites have no (patch|landslide)", data.load, both, cache=None)
    (folder / "raster.npz").unlink()
    raises(FileNotFoundError, r"no file \*.npz", data.load, f"landslide:{folder}", cache=None)


def test_synthetic_slopes_slide_where_they_are_steep():
    sites = landslide.add_synthetic_slopes(data.load(), None)
    steep = sites.extra["patch"][:, 1, 8, 8]
    assert set(sites.target) == {0, 1} and 0.2 < sites.target.mean() < 0.4
    assert steep[sites.target == 1].mean() > steep[sites.target == 0].mean() + 3
    assert landslide.add_synthetic_slopes(sites, None) is sites     # real patches stay


def test_glm_does_not_see_the_patch_and_cnn_nothing_else():
    def forged(**changes):
        def change(sites):
            sites = landslide.add_synthetic_slopes(sites, None)
            patch = sites.extra["patch"] * changes.get("patch", 1)
            return data.replace(sites, static=sites.static * np.float32(changes.get("static", 1)),
                                extra=sites.extra | {"patch": patch})
        return change

    def differs(variant, **changes):                        # -1: the same steps, other inputs
        return not np.array_equal(quick_run(variant, forged(), task="landslide")["sim"],
                                  quick_run(variant, forged(**changes), task="landslide")["sim"])
    assert differs("cnn", patch=-1) and not differs("cnn", static=-1)
    assert differs("glm", static=-1) and not differs("glm", patch=-1)
    assert differs("resconn", patch=-1) and differs("resconn", static=-1)
    head = landslide.PatchHead(16, 0.0, {"patch": 2})
    assert head.cnn(torch.zeros(1, 2, 17, 17)).shape == (1, 16, 8, 8)


# alphaearth.py, adapters.py and release.py

def three_sites():
    folder = archives()
    return data.load(f"caravan:{folder},camels:{folder}", cache=None)   # us_1, us_2, 01013500


def test_vectors_are_joined_by_place_within_5_km():
    s, path = three_sites(), Path(mkdtemp(), "points.npz")
    np.savez(path, lat=[40.5, 47.22, nan], lon=[-75, -68.6, 0], v=np.eye(3, 64, dtype="f4"))
    vectors = alphaearth.join_vectors(s, path)              # the last site is 2 km away
    np.testing.assert_equal(vectors[:, :2], [[1, 0], [nan, nan], [0, 1]])
    np.savez(path, lat=[40.56], lon=[-75], v=np.ones((1, 64)))                  # 6.7 km
    raises(ValueError, "points.npz: has a vector for none", alphaearth.join_vectors, s, path)
    np.savez(path, lat=[40.5], lon=[375], v=np.ones((1, 64)))
    raises(ValueError, "points.npz: latitude and longitude .*375", alphaearth.join_vectors, s, path)


def table_of_vectors(*ids, key="id"):
    path = Path(mkdtemp(), "points.csv")
    rows = [",".join([key, *(f"A{i:02d}" for i in range(64))])] + [i + 64 * ",0.5" for i in ids]
    path.write_text("\n".join(rows))
    return path


def test_vectors_are_joined_by_id():
    s, path = three_sites(), table_of_vectors("us_2", "elsewhere")
    np.testing.assert_equal(alphaearth.join_vectors(s, path)[:, 0], [nan, 0.5, nan])
    path = path.with_suffix(".npz")
    np.savez(path, id=["01013500", "us_1"], v=np.eye(2, 64))
    np.testing.assert_equal(alphaearth.join_vectors(s, path)[:, :2], [[0, 1], [nan, nan], [1, 0]])


def test_files_of_vectors_that_cannot_be_joined_are_refused():
    s, path = three_sites(), Path(mkdtemp(), "points.npz")
    for file, complaint in ((table_of_vectors("us_2", "us_2"), "the id .*us_2.* twice"),
                            (table_of_vectors("x"), "a vector for none of the sites"),
                            (table_of_vectors("x", key="name"), "no column lat, lon")):
        raises(ValueError, complaint, alphaearth.join_vectors, s, file)
    for arrays, complaint in ((dict(v=np.ones((1, 63))), r"no array \(n, 64\) among \['v'\]"),
                              (dict(v=np.ones((1, 64))), "no array lat"),
                              (dict(v=np.ones((1, 64)), id=[3]), "id holds int64, not text"),
                              (dict(v=np.ones((2, 64)), id=["a"]), "id has the shape")):
        np.savez(path, **arrays)
        raises(ValueError, complaint, alphaearth.join_vectors, s, path)
    raises(ValueError, "give --vectors FILE", alphaearth.add_vectors, s, alphaearth.Options())


def test_vectors_are_given_or_made_of_the_synthetic_world():
    given = alphaearth.Options(vectors=str(table_of_vectors("us_1")))
    assert (alphaearth.add_vectors(three_sites(), given).extra["vectors"][0] == 0.5).all()
    sites = data.load()
    vectors = alphaearth.add_vectors(sites, alphaearth.Options()).extra["vectors"]  # (700, 64)
    some = abs(vectors[:, 0]) < 0.95                        # tanh of the others has saturated
    x, y = sites.extra["latents"][some], np.arctanh(vectors[some, 0])
    noise = y - x @ np.linalg.lstsq(x, y)[0]
    assert vectors.shape == (700, 64) and 0.2 < noise.std() < 0.35 < y.std()


@needs_real_data
def test_every_real_point_has_an_ndvi_or_none_and_its_vector():
    s = data.load(f"alphaearth:{REAL / 'alphaearth'}", cache=None)
    vectors = alphaearth.join_vectors(s, REAL / "alphaearth/embeddings.npz")
    assert len(s.ids) == 1270 and s.static_names == ("ndvi",) and np.isnan(s.static).sum() == 377
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=0.2)
    assert np.isnan(finetune.TASKS["ndvi"].prepare(s, None).static).all()


def test_adapters_keep_the_shape():
    x = torch.randn(2, 5, 16)
    for name, adapter in adapters.ADAPTERS.items():
        assert adapter(16)(x).shape == x.shape, name
        head = finetune.VARIANTS[f"resconn-{name}"].head(16, 0.1, {})
        assert isinstance(head.adapter, type(adapter(16))) and head(x, []).shape == (2, 5), name


def test_experts_are_weighted_by_their_gate():
    torch.manual_seed(0)
    layer, x = adapters.Experts(8, n=3), torch.randn(2, 5, 8)
    weight = torch.softmax(x @ layer.gate.weight.T + layer.gate.bias, -1)
    expected = 0
    for k in range(3):
        own = slice(8 * k, 8 * k + 8)
        answer = x @ layer.experts.weight[own].T + layer.experts.bias[own]
        expected = expected + weight[..., k:k + 1] * answer
    close(layer(x), expected)


def test_adapters_of_other_networks_do_what_their_names_say():
    out = out_with_encoder()
    names = [name for name, variant in finetune.VARIANTS.items()
             if variant.network and variant.network.__module__ == adapters.__name__]
    assert names == ["resconn-tenth", "resconn-narrow", "resconn-noise", "resconn-authors"]
    tune(f"--model {','.join(names)}", out)
    for name in names:                                      # each is saved and loaded as itself
        path, = Path(out, "runs").glob(f"*{name},*.pt")
        again = finetune.load(path)
        assert type(again) is finetune.VARIANTS[name].network
        if name == "resconn-narrow":
            assert np.linalg.matrix_rank(
                (again.norms[3][2].weight @ again.norms[3][1].weight).detach()) == 8
        if name == "resconn-noise":
            x = torch.randn(1, 3, 64)
            noise = again.norms[1]
            assert torch.equal(noise(x), noise[0](x))
            assert not torch.equal(again.train() and noise(x), noise[0](x))
        if name == "resconn-authors":                       # the attributes matter without E
            x = torch.randn(2, 9, len(again.settings["forcing_names"]))
            s, e = torch.randn(2, len(again.settings["static_names"])), torch.zeros(2, 10, 128)
            assert abs(again(e, x, s, []) - again(e, x, -s, [])).max() > 1e-3


def test_controls_take_the_encoders_place():
    sites = data.load(quick=True)
    config = model.Config(sites.dynamic_names, sites.static_names)
    raw, C, S = controls.Inputs(config), len(sites.dynamic_names), len(sites.static_names)
    forcing, static = torch.randn(2, 7, C), torch.randn(2, S)
    forcing[1, 3, 2] = nan
    e = raw.read(forcing, static, torch.tensor([[40.0, 9], [nan, nan]]), torch.ones(2, 7))
    assert e.shape == (2, 8, raw.config.d_model)
    close(e[:, :7, :C], forcing.nan_to_num())
    assert e[1, 3, C + 2] == 1 and e[..., C:2 * C].sum() == 1 and (e[:, :7, 2 * C + 2:] == 0).all()
    close(e[:, 7, 2 * C + 2:2 * C + 2 + S], static)
    assert (e[:, 7, :2 * C + 2] == 0).all()
    out = out_with_encoder()
    tune("--model raw,untrained,resconn", out)
    trained, untrained = (finetune.load(*Path(out, "runs").glob(f"*, {name}, *.pt")).encoder
                          for name in ("resconn", "untrained"))
    weights = checkpoint()[1]["model"]
    assert torch.equal(trained.position, weights["position"])
    assert not torch.equal(untrained.position, weights["position"])
    assert not any(p.requires_grad for p in untrained.parameters())
    tune("--model shallow,deep", out)
    for name, gain in (("shallow", [1, 1, 0, 0]), ("deep", [0, 0, 1, 1])):
        assert finetune.load(*Path(out, "runs").glob(f"*, {name}, *.pt")).gain.tolist() == gain
    tune("--model lstm-hiding", out)
    path, = Path(out, "runs").glob("*lstm-hiding*.pt")
    hiding = finetune.load(path)
    with mock.patch.object(finetune.Predictor, "forward", lambda self, e, x, s, extra: s):
        assert torch.equal(hiding(None, None, torch.ones(50, S), []), torch.ones(50, S))
        hidden = hiding.train()(None, None, torch.ones(500, S), []).isnan()
    assert abs(hidden.float().mean() - 0.3) < 0.05
    clay, sand = (sites.static_names.index(name) for name in ("clay", "sand"))
    assert torch.equal(hidden[:, clay], hidden[:, sand])    # whole groups


# hybrid.py

def buckets(days=1096, basins=4, components=3):
    """Weather of three years with frost and drought, parameters and full stores, in float64."""
    g = torch.Generator().manual_seed(0)
    draw = partial(torch.rand, generator=g, dtype=torch.float64)
    season = torch.cos(2 * np.pi * torch.arange(days) / 365.25)[:, None, None].double()
    rain = torch.where(draw(days, basins, 1) < 0.3, 20 * draw(days, basins, 1), 0.0)
    temperature = 5 - 14 * season + 10 * draw(days, basins, 1) - 5
    weather = rain, temperature, 3 - 2.5 * season + draw(days, basins, 1)
    fixed = {name: r for name, r in hybrid.PARAMETERS.items() if name not in hybrid.DAILY}
    daily = {name: hybrid.PARAMETERS[name] for name in hybrid.DAILY}
    p = hybrid.within(fixed, 4 * draw(1, basins, components, len(fixed)) - 2)
    p |= hybrid.within(daily, 4 * draw(days, basins, components, len(daily)) - 2)
    scale = torch.stack([0 * p["k1"] + 30, 0 * p["k1"] + 2, p["capacity"], 0 * p["k1"] + 40,
                         0 * p["k1"] + 90])[:, 0]                               # (5, B, K)
    return weather, p, (scale * draw(5, basins, components)).unbind()


def test_buckets_lose_no_water():
    (rain, temperature, pet), p, stores = buckets()
    some = slice(0, 3 * 365 + 1 - 60)                       # ends in November, with snow
    flow, evaporation, after = hybrid.hbv(
        rain[some], temperature[some], pet[some],
        {name: x[some] if len(x) > 1 else x for name, x in p.items()}, stores)
    lost = rain[some].sum(0) - evaporation.sum(0) - flow.sum(0) - sum(after) + sum(stores)
    assert lost.abs().max() < 3e-3 / 10, lost               # mm in nearly three years
    assert min(x.min() for x in (flow, evaporation, *after)) >= 0
    assert (evaporation <= pet[some] * 1.001).all() and (after[2] <= p["capacity"][0]).all()
    assert after[0].max() > 1                               # what lies there has been counted
    assert all(x.sum() > 0.05 * rain[some].sum() for x in (flow, evaporation))


def test_buckets_equal_hbv_written_with_numbers():
    (rain, temperature, pet), p, stores = buckets(730, 2, 2)
    flow, evaporation, after = hybrid.hbv(rain, temperature, pet, p, stores)
    b, k = 1, 0                                             # a basin and one of its components
    snow, water, soil, upper, lower = (float(x[b, k]) for x in stores)
    for day in range(730):
        P, T, E = (float(x[day, b, 0]) for x in (rain, temperature, pet))
        c = {name: float(x[day if len(x) > 1 else 0, b, k]) for name, x in p.items()}
        above = T - c["threshold"]
        melt = freeze = 0.0
        if above > 0:
            melt = min(c["degree_day"] * above, snow)
        else:
            snow += P
            freeze = min(-c["refreezing"] * c["degree_day"] * above, water)
        snow, water = snow + freeze - melt, water + melt - freeze
        outflow = max(water - c["retention"] * snow, 0)
        water -= outflow
        inflow = outflow + (P if above > 0 else 0)
        recharge = inflow * (soil / c["capacity"]) ** c["beta"]
        soil += inflow - recharge
        excess = max(soil - c["capacity"], 0)
        soil -= excess
        wetness = soil / (c["limit"] * c["capacity"])
        actual = min(E * min(wetness, 1) ** c["shape"], soil)
        soil -= actual
        upper += recharge + excess
        percolation = min(upper, c["percolation"])
        upper, lower = upper - percolation, lower + percolation
        q0 = c["k0"] * max(upper - c["overflow"], 0)
        q1 = c["k1"] * (upper - q0)
        q2 = c["k2"] * lower
        upper, lower = upper - q0 - q1, lower - q2
        close(flow[day, b, k], torch.tensor(q0 + q1 + q2), atol=0.01)
        close(evaporation[day, b, k], torch.tensor(actual), atol=0.01)
    close(torch.stack(after)[:, b, k], torch.tensor([snow, water, soil, upper, lower]), atol=0.1)


def test_every_parameter_of_the_buckets_and_every_weight_has_a_gradient():
    weather, p, stores = buckets(365)
    p["overflow"] = p["overflow"] / 20                      # often enough, in every component
    stores[2][0] = 0                                        # a soil without water
    p = {name: x.requires_grad_() for name, x in p.items()}
    stores = [x.requires_grad_() for x in stores]
    hybrid.hbv(*weather, p, stores)[0].square().sum().backward()
    for name, x in [*p.items(), *zip(hybrid.STORES, stores)]:
        assert (x.grad.abs().amax((0, 1)) > 0).all(), name
        assert x.grad.isfinite().all(), name
    torch.manual_seed(0)
    head = hybrid.HBVHead(16, 0.0, {})
    extra = [torch.cat(weather, -1).transpose(0, 1).float()]                    # (B, L, 3)
    y = head(torch.randn(365, 4, 16), extra)
    assert y.shape == (365, 4)
    y.square().sum().backward()
    assert all((weight.grad != 0).any() for weight in head.parameters())
    with mock.patch.object(hybrid, "hbv", lambda *inputs: [0 * inputs[3]["beta"]]):
        head(torch.randn(365, 4, 16), extra).sum().backward()       # where nothing flows
    assert all(weight.grad.isfinite().all() for weight in head.parameters())


def test_routing_delays_flow_by_a_gamma_function():
    flow = torch.zeros(60, 2, dtype=torch.float64)
    flow[10, 0] = flow[5, 1] = 1
    a, b = torch.tensor([2.0, 1.0]).double(), torch.tensor([1.5, 0.7]).double()
    routed = hybrid.route(flow, a, b)
    t = np.arange(15) + 0.5
    for basin, day in ((0, 10), (1, 5)):
        share = t ** (a[basin].item() - 1) * np.exp(-t / b[basin].item())
        close(routed[day:day + 15, basin], torch.from_numpy(share / share.sum()))
    close(routed.sum(0), torch.ones(2))                     # none before, none lost


def test_buckets_get_the_weather_of_their_days_in_its_units():
    seen, forward = [], finetune.Predictor.forward

    def spy(self, e, forcing, static, extra):
        seen.append((self.settings, forcing, extra[-1]))
        return forward(self, e, forcing, static, extra)
    with mock.patch.object(finetune.Predictor, "forward", spy):
        quick_run("lstm-hbv", steps=1)
    for settings, forcing, weather in (seen[0], seen[-1]):  # in training and in prediction
        names, (log, mean, std) = settings["forcing_names"], settings["scaling"]["forcing"]
        x = forcing * std + mean                            # as it was, (B, L, C)
        x = dict(zip(names, torch.where(log > 0, x.expm1(), x).unbind(-1)))
        x["temperature"] = (x["tmax"] + x["tmin"]) / 2
        assert x["precipitation"].max() > 20 and weather.shape == (*forcing.shape[:2], 3)
        for values, name in zip(weather.unbind(-1), ("precipitation", "temperature", "pet")):
            close(values, x[name], atol=1e-3)


def test_gaps_of_the_weather_are_filled_and_a_missing_variable_named():
    forcing = np.array([[[1, 5, 0], [nan, 7, 0], [3, nan, 0]], [[0, 1, nan]] * 3], "f4")
    filled = hybrid.weather(forcing, ("precipitation", "temperature", "pet"))
    close(filled, torch.tensor([[[1.0, 5, 0], [2, 7, 0], [3, 6, 0]], [[0, 1, 0]] * 3]))
    raises(ValueError, "the sites have no pet", hybrid.weather, forcing,
           ("precipitation", "temperature", "humidity"))


def test_buckets_learn_and_predict_flow():
    out, sites = out_with_encoder(), data.load(quick=True)
    tune("--model resconn-hbv,lstm-hbv --steps 3", out)
    models, = evaluate.load_runs(out).values()
    assert {*models} == {"resconn-hbv", "lstm-hbv"}
    for path in Path(out, "runs").glob("*.pt"):
        run, = models[path.name.split(", ")[1]]
        assert np.isfinite(run["sim"]).all() and run["sim"].min() >= 0
        test, days = np.isin(sites.ids, run["ids"]), len(run["dates"])
        again = finetune.load(path).predict(sites)[test, -days:]
        assert np.corrcoef(again.ravel(), run["sim"].ravel())[0, 1] > 0.98
    before, after = (quick_run("lstm-hbv", steps=steps, lr=2e-2)["validation"] for steps in (1, 12))
    assert after > before + 0.02, (before, after)
    with mock.patch.object(hybrid, "hbv", lambda *inputs: [0 * inputs[3]["beta"] + 4]):
        np.testing.assert_allclose(quick_run("lstm-hbv", steps=1)["sim"], 4, atol=1e-2)     # mm/d


def released():
    """The state dict of the authors' network, and the file that it stands in."""
    file = np.load(REAL / "release/release_io.npz")
    return {key[6:]: file[key] for key in file.files if key.startswith("state/")}, file


@needs_real_data
def test_the_released_network_returns_what_theirs_returned():
    state, file = released()
    network = release.from_release(state, int(file["heads"]))
    assert [*network.dynamic_names] == [*file["dynamic_names"]] and not network.training
    assert [*network.static_names] == [*file["static_names"]]
    differences = release.differences(REAL / "release/release_io.npz")
    assert len(differences) == 5 and max(differences.values()) < 1e-5, differences
    embedding, mean = network.static_embedding, torch.tensor(  # what hides an attribute is its mean
        state["static_embedding.masked_values"]).mean(0)
    close(embedding(mean, torch.ones(len(mean)).bool()), embedding(mean))


@needs_real_data
def test_a_release_with_a_key_too_many_or_too_few_is_refused():
    state, file = released()
    raises(ValueError, "not understood .*surprise", release.from_release,
           state | {"surprise": file["x"]}, 4)
    for key in ("decoder_norm.bias", "positional_encoding.position_embedding"):
        fewer = {name: value for name, value in state.items() if name != key}
        raises(ValueError, "missing .*(decoder_norm.bias|position)", release.from_release, fewer, 4)


# reconstruction.py and figures.py

def test_reconstruction_stands_beside_its_yardsticks():
    out = out_with_encoder()
    rows, n = reconstruction.reconstruction(out)
    sites = data.load(quick=True)
    seen, held = np.isin(sites.ids, checkpoint()[1]["ids"]), data.folds(sites, "pub", 5) == 0
    assert n == (~seen & ~held).sum()
    assert [group for kind, group, *_ in rows if kind == "static"] == [
        "climate", "geology", "soil", "terrain", "vegetation"]
    yardstick = {group: theirs for kind, group, _, theirs in rows if kind == "dynamic"}
    assert yardstick["temperature"] > 0.01 and abs(yardstick["precipitation"]) < 0.1


def test_ridge_regression_and_r_squared():
    rng = np.random.default_rng(0)
    x, noise = rng.normal(3, 1, (200, 5)), rng.normal(size=200)
    y = x @ [1, -2, 0, 0, 3] + 1 + 0.1 * noise
    y[:5] = nan
    guess = torch.tensor(reconstruction.ridge(x[:150], y[:150], x[150:]))[:, None]
    useless = reconstruction.ridge(x[:150], noise[:150], x[150:])
    assert np.abs(useless - noise[:150].mean()).max() < 0.5
    much = rng.normal(size=(60, 40))
    assert reconstruction.ridge(much[:50], noise[:50], much[50:]).std() < 0.3   # well penalised
    truth, half = torch.tensor(y[150:, None]), torch.arange(50)[:, None] < 25
    assert reconstruction.r_squared(truth, guess, half | True) > 0.99
    assert abs(reconstruction.r_squared(truth, 0 * guess + truth.mean(), half | True)) < 1e-9
    assert reconstruction.r_squared(truth, torch.where(half, guess, 1e6), half) > 0.99
    assert np.isnan(reconstruction.r_squared(truth * nan, guess, half))


def test_figures_are_drawn_of_runs_and_of_a_checkpoint():
    try:
        import matplotlib
    except ImportError:
        raise SkipTest("no matplotlib") from None
    raises(FileNotFoundError, "start with train.py", figures.main, ["--out", mkdtemp()])
    out = out_with_encoder()
    tune("--model resconn,lstm", out)
    tune("--model resconn --labelled 20", out)
    figures.main(["--out", out])
    written = {path.name: path.read_bytes() for path in Path(out).glob("*.png")}
    assert written.keys() == {
        "streamflow-synthetic-pub5.png", "streamflow-synthetic-pub5_labelled-20.png",
        "labels.png", "reconstruction.png"}
    for name, picture in written.items():
        assert picture[:4] == b"\x89PNG" and len(picture) < 200_000, name


def test_growth_is_measured_and_predicted():
    rows, true = growth.settings(), np.array([2e-12, 0.0, 3e-12, 1e-3])
    seconds = np.array([growth.terms(row) @ true for row in rows])
    np.testing.assert_allclose(growth.fit(rows, seconds), true, rtol=1e-6, atol=1e-20)
    falling = [growth.terms(row) @ [2e-12, -1e-9, 3e-12, 1e-3] for row in rows]
    assert min(falling) > 0 and growth.fit(rows, falling)[1] == 0       # not negative
    s = growth.Setting(layers=4, batch=32, width=256)
    gigabytes, hours = growth.plan(true, s, 8634, 39, 100, speed=2)
    assert 2.9 < gigabytes < 3.0                            # 8634 x 39 x 365.25 x 6 numbers
    assert np.isclose(hours, 100 * 32 * (366 * 39 * 256 ** 2 * 2e-12 + 366 ** 2 * 1024 * 3e-12
                                         + 1e-3 / 32) / 2 / 3600)
    path = Path(mkdtemp(), "weather.npy")
    growth.build(path, 20, years=1)
    assert np.load(path).shape == (20, 365, 6)
    answer = growth.measure(dict(sites=20, days=30, width=32, layers=1, batch=2), path, steps=4)
    assert answer["peak"] > 50 and 0 < answer["step"] < answer["first"] + 1
    assert (path.parent / "pretrained.pt").is_file()
    try:
        import matplotlib
    except ImportError:
        raise SkipTest("no matplotlib") from None
    growth.draw(path.with_suffix(".png"), rows, [answer] * len(rows), seconds)
    assert path.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"


def test_figures_say_what_they_cannot_draw():
    out = out_with_encoder()
    path, saved = Path(out, "pretrained.pt"), checkpoint()[1]
    torch.save(saved | {"options": saved["options"] | {"data": "nowhere:DIR"}}, path)
    with contextlib.redirect_stdout(io.StringIO()) as text:
        figures.main(["--out", out])                        # needs no matplotlib
    assert "reconstruction.png is not drawn: 'nowhere'" in text.getvalue()
    out = mkdtemp()                                         # sites of attributes alone
    command = f"train --quick --steps 1 --seq-len 1 --holdout none --data gauges:{archives()}"
    common.main("clay", "", argv=[*command.split(), "--out", out])
    with contextlib.redirect_stdout(io.StringIO()) as text:
        figures.main(["--out", out])
    assert "reconstruction.png is not drawn: " in text.getvalue()
    with mock.patch.dict(sys.modules, {"matplotlib": None}):
        raises(SystemExit, "pip install matplotlib", figures.new_figure, 1, 1)


# dynamic_world.py

@needs_real_data
def test_dynamic_world_equals_the_released_network():
    z = np.load(REAL / "dynamicworld/reference_io.npz")
    network = dynamic_world.DynamicWorld.from_release(REAL / "dynamicworld/forward")
    x = dynamic_world.normalize(z["s2_raw"])                                    # (5, H, W, 9)
    close(x, z["normalized"])
    with torch.no_grad():
        logits = network(torch.from_numpy(x).permute(0, 3, 1, 2))               # (5, 9, H, W)
    close(logits.permute(0, 2, 3, 1), torch.from_numpy(z["logits"]), atol=1e-4)


def test_shares_of_land_cover_by_month_are_those_counted_by_hand():
    classes = np.array([[[8, 8]], [[8, 1]], [[1, 4]]])                          # (3, 1, 2)
    clear = np.array([[[1, 1]], [[0, 1]], [[1, 1]]], bool)
    dates = np.array(["2020-01-05", "2020-01-25", "2020-06-01"], "M8[D]")
    months = dynamic_world.monthly(classes, clear, dates)
    assert [*months] == ["2020-01", "2020-06", "all"]
    close(months["2020-01"], np.array([0, 1 / 3, 0, 0, 0, 0, 0, 0, 2 / 3, 3 / 4]))
    close(months["2020-06"], np.array([0, 1 / 2, 0, 0, 1 / 2, 0, 0, 0, 0, 1]))
    close(months["all"], np.array([0, 5 / 12, 0, 0, 1 / 4, 0, 0, 0, 1 / 3, 7 / 8]))


def test_a_month_behind_clouds_has_no_shares_and_no_part_in_the_year():
    classes, clear = np.full((2, 1, 2), 4), np.array([[[0, 0]], [[1, 1]]], bool)
    months = dynamic_world.monthly(classes, clear, np.array(["2020-01-05", "2020-06-01"], "M8[D]"))
    assert np.isnan(months["2020-01"][:9]).all() and months["2020-01"][9] == 0
    assert months["all"][4] == 1 and months["all"][9] == 0.5


def test_weights_of_dynamic_world_that_are_cut_short_are_refused():
    folder, from_release = mkdtemp(), dynamic_world.DynamicWorld.from_release
    file = Path(folder, "variables", "variables.data-00000-of-00001")
    raises(FileNotFoundError, "variables.data-00000-of-00001", from_release, folder)
    file.parent.mkdir()
    np.zeros(231_209, "<f4").tofile(file)                   # all that the network has
    from_release(folder)
    file.write_bytes(file.read_bytes()[:-1])
    raises(ValueError, "231208 values, expected 231209", from_release, folder)


def write_scenes(folder, **changes):
    """Two scenes of 4 x 5 pixels and a cloud mask for the first; `changes` replace its arrays."""
    arrays = {"s2_l1c": np.full((2, 4, 5, 9), 0.1), "s2_bands": np.array([*dynamic_world.BANDS]),
              "s2_dates": np.array(["2020-03-01T10:00:00", "2020-02-01T10:00:00"]),
              "clm": np.ones((1, 4, 5)), "ndvi_dates": np.array(["2020-03-01T10:00:00"])}
    np.savez(Path(folder, "scenes.npz"), **arrays | changes)


def test_scenes_come_by_date_with_clouds_and_gaps_marked():
    folder, reflectance = mkdtemp(), np.full((2, 4, 5, 9), 0.1)
    reflectance[1, 0, 0, 3], reflectance[1, 0, 1, 0] = nan, -9999
    write_scenes(folder, s2_l1c=reflectance)
    dates, scenes, clear = dynamic_world.read_scenes(folder)
    assert dates.astype(str).tolist() == ["2020-02-01", "2020-03-01"]
    assert clear[0].sum() == 18 and not clear[0, 0, :2].any() and not clear[1].any()
    assert np.isnan(scenes[0, 0, :2]).all() and np.allclose(scenes[1], 1000)


def test_scenes_that_do_not_fit_are_refused_by_name():
    folder, read = mkdtemp(), dynamic_world.read_scenes
    raises(FileNotFoundError, "no file .*npz", read, folder)
    good = np.full((2, 4, 5, 9), 0.1)
    for changes, complaint in (
            ({"s2_l1c": good[0]}, r"s2_l1c has the shape \(4, 5, 9\), expected .*'T', 'H'"),
            ({"s2_l1c": good[:0]}, r"s2_l1c has the shape \(0,"),
            ({"s2_l1c": np.where(good > 0, np.inf, good)}, "s2_l1c is float64 with .*infinities"),
            ({"s2_l1c": good.astype(str)}, "s2_l1c is <U.* not numbers"),
            ({"s2_bands": np.array(["B02"] * 9)}, "s2_bands is .*expected .*'B12'"),
            ({"s2_dates": np.array(["2020-02-01"])}, r"s2_dates has the shape \(1,\), .*\(2,\)"),
            ({"s2_dates": np.array(["2020-02-31", "2020-03-01"])}, "s2_dates has '2020-02-31'"),
            ({"s2_dates": np.array(["2020", "2021"])}, "s2_dates has '2020', expected"),
            ({"clm": np.ones((1, 4, 4))}, r"clm has the shape \(1, 4, 4\), expected \(1, 4, 5\)")):
        write_scenes(folder, **changes)
        raises(ValueError, "scenes.npz: " + complaint, read, folder)
    np.savez(Path(folder, "scenes.npz"), s2_l1c=good)
    raises(ValueError, "scenes.npz: no array s2_bands, it has .*s2_l1c", read, folder)
    whole = Path(folder, "scenes.npz").read_bytes()
    Path(folder, "scenes.npz").write_bytes(whole[:len(whole) // 2])
    raises(ValueError, "scenes.npz is no npz, or damaged", read, folder)


# height.py, blocks.py and common.py

def test_every_node_of_a_unet_takes_part():
    x = torch.randn(2, 5, 24, 32)
    for nested, nodes in ((False, 4 + 3), (True, 4 + 3 + 2 + 1)):
        network = height.UNet(5, 3, nested, width=8)
        y = network(x)
        assert y.shape == (2, 3, 24, 32) and len(network.nodes) == nodes
        y.square().sum().backward()
        for name, weight in network.named_parameters():
            assert weight.grad.abs().sum() > 0, name
        raises(ValueError, "28 x 32, not multiples of 8", network, torch.randn(2, 5, 28, 32))


def test_blocks_hold_each_pixel_once_and_show_their_margin():
    image = np.arange(2.0 * 30 * 50).reshape(2, 30, 50)
    cut = blocks.cut(image, image[0], "a test")
    assert cut.image.shape == (2 * 3, 2, 40, 40) and cut.target.shape == (2 * 3, 40, 40)
    assert sorted(cut.target[~np.isnan(cut.target)]) == [*range(30 * 50)]
    assert cut.ids[4] == "block_01_01"
    assert np.array_equal(cut.image[4][:, 10:20, 10:30], image[:, 20:30, 20:40])
    known = ~np.isnan(cut.target[4])
    assert np.array_equal(cut.target[4][known], cut.image[4, 0][known])
    assert known[10:20, 10:30].all() and known.sum() == 10 * 20     # none in margin or padding
    assert np.array_equal(cut.image[1][:, :, :10], cut.image[0][:, :, 20:30])
    for complaint, x, y in (("image of .30, 50. pixels, a map of .30, 49.", image, image[0, :, 1:]),
                            ("no pixel of the map", image, image[0] * nan),
                            ("without data", image * nan, image[0])):
        raises(ValueError, "a test: .*" + complaint, blocks.cut, x, y, "a test")


def test_crop_turns_map_and_image_together_less_the_edges():
    image = torch.arange(3.0 * 40 * 40).view(3, 1, 40, 40)
    target = torch.full((3, 40, 40), nan)
    target[:, 10:30, 10:30] = image[:, 0, 10:30, 10:30]
    corners = set()
    for seed in range(20):
        y, x = height.crop(target, image, 2, np.random.default_rng(seed))
        known = ~y.isnan()
        assert y.shape == (3, 32, 32) and x.shape == (3, 1, 32, 32)
        assert (known.sum((1, 2)) == 16 * 16).all() and torch.equal(y[known], x[:, 0][known])
        corners.add(y[0][known[0]][0].item())               # the first known pixel
    assert len(corners) == 4                                # of the block: it has been turned
    target[:, 12:20] = nan                                  # a gap costs no pixel beside it
    y, _ = height.crop(target, image, 2, np.random.default_rng(0))
    assert ((~y.isnan()).sum((1, 2)) == 8 * 16).all()


def test_split_keeps_the_fold_and_unknown_blocks_out_of_training():
    cut = blocks.load("synthetic", "height")
    cut.target[::7] = nan
    fold_of = data.folds(cut, "pub", 5)
    parts = blocks.split(cut, fold_of, 0, np.random.default_rng(0))
    training, validation, test = parts
    together = np.concatenate(parts)
    known = ~np.isnan(cut.target).all((1, 2))
    assert sorted(together) == np.flatnonzero(known).tolist()       # each once
    assert np.array_equal(test, np.flatnonzero(known & (fold_of == 0)))
    assert len(validation) == (len(training) + len(validation)) // 7
    raises(ValueError, "fold 5: 0 test", blocks.split, cut, fold_of, 5, np.random.default_rng(0))


def test_height_learns_and_never_sees_the_map_of_test_blocks():
    o = height.Options(steps=30, batch_size=8, out=mkdtemp(), device="cpu")
    cut = blocks.load("synthetic", "height")
    fold_of = data.folds(cut, "pub", 5)
    first = height.run(o, "unet", cut, fold_of, 0, 0)
    assert evaluate.value_scores(first["obs"], first["sim"])["R2"] > 0.5
    cut.target[fold_of == 0] += 999
    second = height.run(o, "unet", cut, fold_of, 0, 0)
    assert np.array_equal(first["sim"], second["sim"]) and second["obs"].min() > 999


def test_land_cover_learns_and_weights_classes_by_rarity():
    o = height.Options(task="landcover", steps=30, batch_size=8, out=mkdtemp())
    cut = blocks.load("synthetic", "landcover")
    result = height.run(o, "unet", cut, data.folds(cut, "pub", 5), 0, 0)
    assert height.class_map_scores(result["obs"], result["sim"])["balanced"] > 0.7
    target = np.array([[[0, 0, 0, 1]], [[2, 2, 2, nan]]], "f4")                 # the second: a test
    task = height.LandCover(target, np.array([0]))
    assert task.outputs == 3
    close(task.rarity, torch.tensor([4 / 3 / 3, 4 / 3, 4 / 3]))


def test_scores_of_a_class_map_equal_their_formulas():
    obs, sim = np.array([[0, 1], [1, 1], [nan, nan]]), np.array([[0, 0], [1, 1], [0, 1]])
    close(height.class_map_scores(obs, sim), {
        "balanced": (1 + 2 / 3) / 2, "accuracy": 3 / 4, "f1 0": 2 / 3, "f1 1": 4 / 5})


def test_the_linear_baseline_of_images_is_solved():
    cut = blocks.load("synthetic", "height")
    channels = cut.image[:, :3].sum(1)                      # what three of them say exactly
    cut.target = np.where(np.isnan(cut.target), nan, 7 * channels).astype("f4")
    o = height.Options(steps=1, out=mkdtemp())
    result = height.run(o, "pixel", cut, data.folds(cut, "pub", 5), 0, 0)
    assert evaluate.value_scores(result["obs"].ravel(), result["sim"].ravel())["R2"] > 0.9999


def tile(image, target):
    """A folder with the files of tiles:DIR."""
    folder = Path(mkdtemp())
    np.save(folder / "x.npy", image)
    np.save(folder / "y.npy", target)
    return f"tiles:{folder}"


def test_tiles_are_decoded_and_their_marks_of_no_data_known():
    image, target = np.full((1, 20, 20), -51, np.int8), np.full((20, 20), 7.0)
    target[0] = -9999
    cut = blocks.load(tile(image, target), "height")
    assert np.allclose(cut.image, -0.16)                    # -(51 / 127.5)^2
    assert (cut.target == 7).sum() == 19 * 20 and np.isnan(cut.target[0, 10]).all()
    image[0, 5, 5] = -128                                   # AlphaEarth's mark
    raises(ValueError, "tiles:.*without data", blocks.load, tile(image, target), "height")
    raises(ValueError, "the classes .-1.., expected 0, 1, 2 and so on; no data is NaN or below",
           blocks.load, tile(np.zeros((1, 2, 2)), np.array([[0, 1], [-1, nan]])), "landcover")
    raises(ValueError, "the classes .0.5., expected 0, 1, 2",
           blocks.load, tile(np.zeros((1, 2, 2)), np.array([[0, 1], [0.5, nan]])), "landcover")
    raises(ValueError, "x.npy: x has the shape .2, 2., expected the axes 'chw'",
           blocks.load, tile(np.zeros((2, 2)), np.zeros((2, 2))), "height")
    raises(FileNotFoundError, "no file x.npy", blocks.load, f"tiles:{mkdtemp()}", "height")
    raises(FileNotFoundError, "no folder '/nowhere'", blocks.load, "tiles:/nowhere", "height")
    raises(ValueError, "pigeon.*expected synthetic, tiles:DIR or s2:DIR",
           blocks.load, "pigeon:/", "height")


def test_height_command_writes_maps_and_weights_and_prints_a_table():
    out = mkdtemp()
    with contextlib.redirect_stdout(io.StringIO()) as text:
        height.main(f"--quick --model pixel --fold 0,1 --out {out}".split())
    assert "64 channels of 200 x 200 pixels, 40000 of known height, in 100" in text.getvalue()
    assert re.search(r"2 pub folds at once.*\npixel .*R2 \S+ ± .*nmad", text.getvalue())
    files = sorted(path.name for path in Path(out, "height").iterdir())
    assert files == [f"height synthetic pub5, pixel, fold {k}, seed 0.{end}"
                     for k in (0, 1) for end in ("npz", "pt")]
    result = np.load(Path(out, "height", files[0]))
    assert result["obs"].shape == result["sim"].shape == (len(result["ids"]), 20, 20)
    assert np.isfinite(result["sim"]).all()
    saved = torch.load(Path(out, "height", files[1]), weights_only=True)
    height.MODELS["pixel"](64, 1).load_state_dict(saved["weights"])
    raises(ValueError, "--model vnet: expected one of unet", height.main, ["--model", "vnet"])
    raises(ValueError, "--buffer 10 leaves no pixel to learn", height.main,
           f"--quick --model pixel --buffer 10 --out {out}".split())


def test_npz_is_refused_by_file_and_array():
    path = Path(mkdtemp(), "a.npz")
    np.savez(path, lat=[1.0, 2.0], v=np.ones((3, 4)), far=[np.inf], name=["x", "y"], none=[],
             scale=2.0)
    arrays = common.read_npz(path, text=["name"], lat="n", name="n", v="mk", scale="")
    assert arrays["v"].shape == (3, 4) and set(arrays) >= {"lat", "name"}
    for complaint, axes in (
            ("no array lon among lat, v, far", dict(lon="n")),
            (r"v has the shape \(3, 4\), expected 'nk' with n = 2", dict(lat="n", v="nk")),
            (r"lat has the shape \(2,\), expected the axes 'nk'", dict(lat="nk")),
            ("none has .* empty", dict(none="n")), ("far holds an infinite", dict(far="n")),
            ("name holds <U1, not numbers", dict(name="n"))):
        raises(ValueError, "a.npz: " + complaint, common.read_npz, path, **axes)
    raises(ValueError, "lat holds float64, not text", common.read_npz, path, ["lat"], lat="n")
    whole = path.read_bytes()
    changed = whole.replace(b"\xf0\x3f", b"\xf1\x3f")
    for content in (b"", b"text", whole[:-30], whole[:200], changed):
        path.write_bytes(content)
        raises(ValueError, "a.npz: ", common.read_npz, path)
    np.savez(path, x=np.array([{}]))                        # a pickle: could be code
    raises(ValueError, "a.npz: .*pickle", common.read_npz, path)
    raises(FileNotFoundError, "no file .*tsv", common.one_file, path.parent, "*.tsv")
