"""Tests of the applications; python test_all.py runs them, too. Real data: ../shared/real."""

import contextlib
import io
import json
import math
import signal
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import mkdtemp
from unittest import mock

import data
import numpy as np
import torch

import eval as evaluate
import finetune
import train
from applications import (adapters, alphaearth, blocks, common, controls, dynamic_world, embeddings,
                          ensembles, figures, growth, height, hybrid, landslide, predict, release,
                          soil, values)
from model import Config
from test_all import close, printed
from train import shared_options

REAL = Path(data.__file__).resolve().parents[1] / "shared" / "real"
FOLDER = Path(mkdtemp())

def raises(text, function, *args, error=ValueError):
    """Assert that the call raises this error, with the text in its message."""
    try:
        function(*args)
    except error as found:
        assert text in str(found), f"{found} does not say {text}"
    else:
        raise AssertionError(f"nothing raised, expected {text}")

# camels.py, ismn.py, wosis.py, gauges.py

CAMELS = {
    "basin_mean_forcing/daymet/01/01013500_lump_cida_forcing_leap.txt":
        "  47.24| 250.00|86400000|Year Mnth Day Hr dayl(s) prcp(mm/day) srad(W/m2) tmax(C) tmin(C) "
        "vp(Pa)|1980 12 31 12 43200 3 200 10 0 610.8|1981 01 01 12 43200 0 100 8 2 500",
    "usgs_streamflow/01/01013500_streamflow_qc.txt":
        "01013500 1980 12 31  100.00 A|01013500 1981 01 01  -999.00 M|01013500 1981 01 02 3 A",
    "tables/camels_topo.txt": "gauge_id;gauge_lat;gauge_lon;elev_mean|01013500;47.2;-68.6;251",
    "tables/camels_soil.txt": "gauge_id;soil_porosity;max_water_content|01013500;0.4;0.5",
    "tables/camels_hydro.txt": "gauge_id;q_mean|01013500;1.7"}

ISMN = {
    "n/s1/n_n_s1_sm_0.05_0.05_X.stm": "n n s1 45.0 9.0 120 .05 .05 X-1|2000/01/01 00:00 0.2 G M||"
        "2000/01/01 12:00 0.3 G Frozen soil,OK|2000/01/01 13:00 0.9 D01 M|2000/01/02 00:00 .125 G",
    "n/s1/n_n_s1_sm_0.20_0.20_X.stm": "n n s1 45.0 9.0 120 .2 .2 X-2|2000/01/02 00:00 0.4 G M",
    "n/s1/s1.csv": "date,precipitation|2000-01-01,3|2000-01-02,0",
    "n/s1/n_n_s1_static_variables.csv": "quantity_name;unit;depth_from[m];depth_to[m];value;source|"
        "clay fraction;%;0.00;0.30;23.00;HWSD;30\";|clay fraction;%;0.30;1.00;29.00;HWSD;30\";|"
        "land cover classification;;;;120;CCI_2000|land cover classification;;;;130;CCI_2010",
    "n/s2/n_n_s2_sm_0.05_0.05_X.stm": "n n s2 46.0 9.0 -9999 .05 .05 X|2000/01/01 00:00 0.4 G M",
    "n/s2/n_n_s2_static_variables.csv": "silt fraction;%;0.00;0.30;40.00;HWSD|"     # no header
        "land cover classification;;;;10;CCI_2010",
    "m/s1/m_m_s1_sm_0.50_0.50_X.stm": "m m s1 48.0 9.0 90 .5 .5 X|2000/01/01 00:00 0.4 G M",
    "m/s1/s1.csv": "date,precipitation|2000-01-01,1", "weather/s2.csv": "date,tmax|2000-01-01,9"}

LAYERS = [("7", 0, 10, 10, 20, 70), ("7", 10, 50, 40, 20, 40), ("8", 0, 30, 30, 30, 45.5),
          ("9", 0, 20, "", 50, 50)]     # profile, top and bottom in cm, clay, silt and sand in %

def source(name, files, old="", new="", only=""):
    """NAME:DIR of a new folder with the files, | between lines; `old` is replaced in some."""
    folder = Path(mkdtemp(dir=FOLDER))
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        text = text.replace(old, new) if old and only in path else text
        (folder / path).write_text(text.replace("|", "\n"))
    return f"{name}:{folder}"

def read(spec):
    with contextlib.redirect_stdout(io.StringIO()) as said:
        return data.load(spec, "soil_moisture" if "ismn" in spec else "streamflow", None), said

def test_camels_joins_weather_flow_and_tables():
    s, _ = read(source("camels", CAMELS))
    assert s.ids.tolist() == ["01013500"] and s.dates.astype(str).tolist()[0] == "1980-12-31"
    static = dict(zip(s.static_names, s.static[0].astype(float).round(4).tolist()))
    assert static == {"elevation": 251, "area": 86.4, "soil_porosity": .4, "water_capacity": .5}
    assert data.groups(["clay", "soil_porosity", "water_capacity"]) == ("soil",) * 3
    pet = data.potential_evaporation(47.2, 366, 5.0, 10.0, 0.0)     # rain, t, tmax, tmin, …
    expected = [3, 5, 10, 0, pet, 200 / 2, 100 / np.exp(17.27 * 5 / 242.3)]
    assert s.dynamic_names == (*data.DYNAMIC,)[:6] + ("humidity",)
    np.testing.assert_allclose(s.forcing[0, 0], expected, rtol=1e-6)
    np.testing.assert_allclose(s.latlon, [[47.2, -68.6]], rtol=1e-6)
    np.testing.assert_allclose(s.target, [[2.8316846592, np.nan]], rtol=1e-6)

def test_damaged_camels_files_are_refused_with_file_and_line():
    for old, new, only, complaint in (
            ("01013500;", "1013500;", "tables", "ids and files differ in leading zeros"),
            ("100.00", "1OO", "flow", "qc.txt, line 1: expected"),
            ("86400000", "-9999", "cida", "lines 1 to 3: expected latitude"),
            ("1981 01 02 3", "1981 01 01 3", "flow", "qc.txt, line 3: expected"),
            ("1980 12", "1981 12", "cida", "leap.txt: its days are not in order"),
            ("tmin(C)", "t", "cida", "line 4: expected year")):
        raises(complaint, read, source("camels", CAMELS, old, new, only))

def test_ismn_gives_daily_means_of_good_values_at_the_uppermost_sensor():
    s, said = read(source("ismn", ISMN))
    assert s.ids.tolist() == ["m_s1", "n_s1", "n_s2"]
    np.testing.assert_allclose(s.target, [[0.4, np.nan], [0.25, 0.125], [0.4, np.nan]])
    assert s.forcing[:2, 0, 0].tolist() == [1, 3]           # weather of one's own network
    assert s.static_names == ("elevation", "clay", "silt", "landcover_10", "landcover_130")
    np.testing.assert_equal(s.static, [[90, *[np.nan] * 4], [120, 23, np.nan, 0, 1],
                                       [np.nan, np.nan, 40, 1, 0]])
    assert read(source("ismn", ISMN, "130;", "-9999;", ""))[0].static_names[-1] == "landcover_120"
    for text in ("m_m_s1: its uppermost sensor is 0.5 m", "without static variables: 1 (m_s1)"):
        assert text in said.getvalue()

def test_an_odd_ismn_file_costs_its_station_with_a_line():
    for old, new, only, complaint in (
            ("45.0 9.0", "45.0", "s1_sm_0.05", "0.05_X.stm, line 1: no header"),
            (" .125 ", " 0,125 ", "", "0.05_X.stm, line 6: no date, time, value, flag"),
            ("2000/01/02", "2000/13/02", "n_s1_sm_0.05", "0.05_X.stm, line 6: no date"),
            (" G", " U", "n_s1_sm", "n_n_s1: left out: no value of its uppermost sensor"),
            ("23.00", "230", "n_s1", "n_n_s1_static_variables.csv: not in %"),
            ("date,", "day,", "n/s1/s1.csv", "s1.csv: no row, or no column date")):
        s, said = read(source("ismn", ISMN, old, new, only))
        assert complaint in said.getvalue() and s.ids.tolist() == ["m_s1", "n_s2"], complaint

def test_wosis_gives_the_texture_of_the_upper_30_cm_of_both_layouts():
    places = 'profile_id\tname\tlatitude\tlongitude|7\t"A, ""B"""\t10\t20|8\tC\t11\t21|9\tD\t12\t22'
    head, lines = "profile_id\tupper_depth\tlower_depth", ["\t".join(map(str, x)) for x in LAYERS]
    lines = [head + "\tclay_value_avg\tsilt_value_avg\tsand_value_avg", *lines]
    old = {"w_profiles.tsv": places, "w_physical.tsv": "|".join(lines)}
    new = {"w_profiles.tsv": places}
    for i, part in enumerate(("clay", "silt", "sand")):
        lines = [f"{p}\t{top}\t{bottom}\t{x[i]}" for p, top, bottom, *x in LAYERS]
        new[f"w_{part}.tsv"] = head + "\tvalue_avg|" + "|".join(lines)
    for files in (old, new):
        s, said = read(source("wosis", files))
        assert s.ids.tolist() == ["7"] and s.static_names == ("clay", "silt", "sand")
        np.testing.assert_allclose(s.static, [[30, 20, 50]])        # 10 cm of one layer, 20 of two
        assert s.latlon.tolist() == [[10, 20]] and "in all: 2 (8, 9)" in said.getvalue()
    raises("w_clay.tsv: no column value_avg", read, source("wosis", new, "value_avg", "x", "clay"))
    raises("line 2: value_avg is 'x'", read, source("wosis", new, "\t10|", "\tx|", "clay"))

def test_gauges_are_known_by_their_attributes_alone_each_once():
    s, said = read(source("gauges", {
        "attributes/hysets/attributes_h.csv": "gauge_id,area|hysets_us_1,1",      # half known
        "attributes/us/attributes_us.csv": "gauge_id,area,clay|us_1,1,8|us_2,2,7",
        "attributes/camels/attributes_c.csv": "gauge_id,area,clay|camels_us_1,1,9"}))
    assert s.ids.tolist() == ["camels_us_1", "us_2"] and s.static.tolist() == [[9, 1], [7, 2]]
    assert "at most half of the attributes known: 1 (hysets_us_1)" in said.getvalue()
    assert "of another source too: 1 (us_1)" in said.getvalue()

# values.py, soil.py, landslide.py, alphaearth.py

def quick(application, out, *options):
    """What a short run printed; its encoder knows nothing of the soil."""
    if not (FOLDER / "pretrained.pt").is_file():
        printed(soil.main, ["train", "--quick", "--steps", "2", "--out", str(FOLDER)])
    encoder = "--checkpoint", str(FOLDER / "pretrained.pt")
    return printed(application.main, ["--quick", "--out", str(FOLDER / out), *encoder, *options])

def runs(out):
    return {path.stem.split(", ")[-3]: path for path in (FOLDER / out / "values").glob("*.npz")}

def test_clay_is_predicted_at_the_held_out_sites_and_by_the_saved_model():
    said = quick(soil, "clay")
    sites = data.load(quick=True)
    clay = sites.static[:, sites.static_names.index("clay")]
    test = (data.folds(sites, "pub", 5) == 0) & ~np.isnan(clay)
    encoder, _ = train.load_checkpoint(FOLDER / "pretrained.pt")
    assert "soil" not in encoder.config.static_groups and "forest" in encoder.config.static_names
    assert {*runs("clay")} == {"resconn", "mlp", "glm"} and said.count("R2") == 3
    for name, path in runs("clay").items():
        saved, model = np.load(path), values.load(path.with_suffix(".pt"))
        assert saved["ids"].tolist() == sites.ids[test].tolist(), name
        np.testing.assert_array_equal(saved["obs"][:, 0], clay[test])
        assert not {*saved["ids"]} & {*saved["validation_ids"]}
        np.testing.assert_allclose(model.predict(sites)[test], saved["sim"], rtol=1e-4)
        soils = np.array(data.groups(sites.static_names)) == "soil"
        forged = replace(sites, static=np.where(soils, 1e3, sites.static))      # none is read
        np.testing.assert_array_equal(model.predict(forged), model.predict(sites))

def test_an_encoder_that_knows_test_sites_is_refused():
    raises("has seen", quick, soil, "leak", "--model", "resconn", "--fold", "1")
    said = quick(soil, "leak", "--model", "resconn,mlp", "--fold", "1", "--allow-overlap")
    assert [line.endswith("(has seen test sites)") for line in said.splitlines()
            if "R2" in line] == [True, False]

def test_the_same_run_gives_the_same_and_another_seed_another():
    said = [quick(soil, "again", "--model", "mlp", "--seed", seed).splitlines()[-1]
            for seed in ("0", "0", "1")]
    assert said[0] == said[1] != said[2]

def test_hold_out_none_leaves_a_model_and_no_test_sites():
    assert "R2" not in quick(soil, "none", "--model", "mlp", "--holdout", "none")
    path, = runs("none").values()
    assert len(np.load(path)["ids"]) == 0 < len(np.load(path)["validation_ids"])
    assert np.isfinite(values.load(path.with_suffix(".pt")).predict(data.load(quick=True))).all()

def test_attributes_of_the_targets_group_are_no_inputs():
    sites = data.load(quick=True)
    blind, ndvi = soil.attribute_as_target(sites, "ndvi"), sites.static_names.index("ndvi")
    assert not {"ndvi", "forest"} & {*blind.static_names}
    np.testing.assert_array_equal(blind.target, sites.static[:, [ndvi]])
    raises("no attribute gold", soil.attribute_as_target, sites, "gold")
    alone = replace(sites, static=sites.static[:, :1], static_names=("elevation",))
    assert np.isnan(soil.attribute_as_target(alone, "elevation").static).all()

def test_glm_is_solved_and_a_network_learns():
    rng, sites, scores = np.random.default_rng(0), data.load(quick=True), {}
    static = rng.standard_normal((60, len(sites.static_names))).astype(np.float32)
    column = sites.static_names.index("clay")
    others = np.array(data.groups(sites.static_names)) != "soil"
    static[:, column] = 20 + static[:, others] @ rng.standard_normal(others.sum())
    sites = replace(sites, static=static)
    for name, steps in (("glm", "1"), ("mlp", "1"), ("mlp", "200")):
        options = f"--model {name} --steps {steps} --out {FOLDER / 'solved' / steps}".split()
        with mock.patch.object(data, "load", lambda *_, **__: sites):
            printed(soil.main, options)
        path, = (FOLDER / "solved" / steps / "values").glob(f"*, {name}, *.npz")
        scores[name, steps] = values.value_scores(np.load(path)["obs"], np.load(path)["sim"])["R2"]
    assert scores["glm", "1"] > 0.99 and scores["mlp", "200"] > scores["mlp", "1"] + 0.2, scores

def test_class_metrics_equal_those_counted_by_hand():
    scores = values.class_metrics([1, 1, 0, 0, 1], [0.9, 0.4, 0.4, 0.2, 0.8])
    found = [scores[name] for name in ("accuracy", "precision", "recall", "f1", "auc")]
    np.testing.assert_allclose(found, [4 / 5, 1, 2 / 3, 4 / 5, 5.5 / 6])
    assert np.isnan(values.class_metrics([1, 1], [0.2, 0.3])["auc"])
    scores = values.value_scores(np.array([[1.], [2], [3]]), np.array([[1.], [2], [6]]))
    np.testing.assert_allclose([scores["R2"], scores["median difference"]], [1 - 9 / 2, 0])

def slopes(points="713255,9559875,TRUE,1,2,3,4,5|713030,9559875,0,1,2,3,4,5", **raster):
    """An archive of two points on a raster of 40 x 50 cells; the second is too near the edge."""
    folder = Path(mkdtemp(dir=FOLDER))
    text = f"x,y,lslpts,slope,cplan,cprof,elev,log10_carea|{points}"
    (folder / "points.csv").write_text(text.replace("|", "\n"))
    grid = dict(ta=np.arange(4000.).reshape(2, 40, 50), xmin=713_000., ymax=9_560_000., res=10.)
    np.savez(folder / "raster.npz", **grid | raster)
    return folder

def test_a_patch_lies_round_its_point_and_labels_are_no_attributes():
    folder = slopes()
    sites = soil.attribute_as_target(data.load(f"landslide:{folder}", cache=None), "landslide")
    assert sites.target[:, 0].tolist() == [1, 0]
    assert sites.static_names == ("elevation", "slope", "cplan", "cprof", "log10_carea")
    x, y = np.array([[713255, 713030, 2e6], [9559875, 9559875, 0]])     # the third is far away
    patches = landslide.read_patches(folder, x, y)          # the first: 255 m east, 125 m south
    maps = np.arange(4000.).reshape(2, 40, 50)
    np.testing.assert_array_equal(patches[0], maps[:, 12 - 8:12 + 9, 25 - 8:25 + 9])
    assert np.isnan(patches).any((1, 2, 3)).tolist() == [False, True, True]
    np.testing.assert_allclose(sites.latlon, [[-3.98, -79.08]] * 2, atol=0.01)
    for wrong in ("1,2,maybe,1,2,3,4,5", "1,2,TRUE,1,2,3,4,5|NA,2,TRUE,1,2,3,4,5"):
        line = wrong.count("|") + 2
        raises(f"points.csv, line [{line}]", list, landslide.read(slopes(wrong)))
    raises("cells of 0.0 m", landslide.read_patches, slopes(res=0.0), x, y)

def test_glm_does_not_see_the_patch_and_cnn_nothing_else():
    quick(landslide, "slide")
    sites = landslide.add_synthetic_slopes(data.load(quick=True))
    other = replace(sites, extra={"patch": -sites.extra["patch"]})
    bare = replace(sites, static=sites.static + np.nan)
    for name, of_patch, of_static in (("glm", 0, 1), ("cnn", 1, 0), ("resconn", 1, 1)):
        model = values.load(runs("slide")[name].with_suffix(".pt"))
        chance = model.predict(sites)
        assert ((chance > 0) & (chance < 1)).all()
        assert (not np.allclose(model.predict(other), chance)) == of_patch, name
        assert (not np.allclose(model.predict(bare), chance)) == of_static, name
    raises("no patch of sites", values.load(runs("slide")["cnn"].with_suffix(".pt")).predict,
           data.load(quick=True))

def test_vectors_are_joined_by_id_or_by_place_and_decoded():
    sites, path, unit = data.load(quick=True), FOLDER / "vectors.npz", np.eye(64)[:2]
    places = sites.latlon[:2] + [[0.02, 0], [0, 0]]
    expected = np.vstack([unit, np.full((58, 64), np.nan)])
    for found in (dict(id=sites.ids[:2]), dict(lat=places[:, 0], lon=places[:, 1])):
        np.savez(path, v=unit, **found)
        np.testing.assert_array_equal(alphaearth.join_vectors(sites, path), expected)
    stored = np.full((2, 64), -16, np.int8)                 # 64 x (16 / 127.5)^4 = 0.126^2
    stored[0, :16], stored[1] = 64, -128                    # 16 x (64 / 127.5)^4 = 1.008^2
    np.savez(path, v=stored, id=sites.ids[:2])
    first, second = alphaearth.join_vectors(sites, path)[:2]
    np.testing.assert_allclose(first[[0, 63]], [0.25196, -0.01575], rtol=1e-3)
    assert np.isnan(second).all()
    for arrays, complaint in ((dict(v=3.5 * unit), "vectors.npz: 2 vectors of a length like [3.5]"),
                              (dict(v=unit[:, :63]), "no array (n, 64)"),
                              (dict(v=unit, id=["x", "y"]), "for none of the sites")):
        np.savez(path, **dict(id=sites.ids[:2]) | arrays)
        raises(complaint, alphaearth.join_vectors, sites, path)

def test_windows_are_drawn_that_have_something_to_score():
    sites, drawn, outputs = data.load(quick=True), [], finetune.Samples.outputs
    sites = replace(sites, target=np.where(sites.dates < sites.dates[400], np.nan, sites.target))
    def note(self, i):
        drawn.extend([] if isinstance(i, slice) else zip(self.site[i], self.start[i]))
        return outputs(self, i)
    options = f"--quick --model lstm --train-period 1995-01-01/1996-12-31 --out {mkdtemp()}"
    with mock.patch.object(finetune.Samples, "outputs", note):
        with mock.patch.object(data, "load", lambda *_: sites):
            printed(finetune.main, options.split())
    assert len(drawn) == 80 == sum(np.isfinite(sites.target[i, day + 120:day + 365]).any()
                                   for i, day in drawn)

# adapters.py, controls.py, hybrid.py
def network(variant, **changes):
    """An untrained one, in training mode, and its inputs: 3 basins of 365 days."""
    torch.manual_seed(0)
    settings = dict(target="streamflow", variant=variant, width=16, dropout=0.0, centre=[1, 2],
                    forcing_names=("precipitation", "tmin", "tmax", "pet"), spread=[0.5, 2],
                    static_names=("clay", "sand", "forest", "area"), scaling={"forcing":
                        torch.tensor([[1.0, 0, 0, 0], [1, 3, 8, 2], [1, 5, 6, 1]]).double()})
    settings["config"] = vars(Config(settings["forcing_names"], settings["static_names"]))
    model = finetune.VARIANTS[variant].network(settings | changes)
    e = torch.randn(3, 366, 2 * model.encoder.config.d_model) if model.encoder else None
    return model, (e, torch.randn(3, 365, 4), torch.randn(3, 4))

def test_every_own_network_is_saved_and_loaded_as_itself():
    for variant in (adapters.MODELS + ",scratch," + controls.MODELS + ",resconn-hbv").split(","):
        model, inputs = network(variant)
        train.save(FOLDER / "one.pt", settings=model.settings, weights=model.state_dict())
        again = finetune.load(FOLDER / "one.pt")
        assert torch.equal(again(*inputs), model.eval()(*inputs)) and type(again) is type(model)
        if model.encoder:                                   # and E matters
            assert not torch.equal(again(inputs[0].flip(0), *inputs[1:]), again(*inputs)), variant

def test_saved_networks_predict_what_their_runs_did():
    out, sites = str(FOLDER / "adapters"), data.load(quick=True)
    train.main(["--quick", "--steps", "1", "--out", out])
    command = ["--quick", "--steps", "2", "--out", out, "--model", "raw,untrained,resconn-hbv"]
    read = finetune.Samples.read
    with mock.patch.object(finetune.Samples, "read", autospec=True, side_effect=read) as reads:
        finetune.main(command)
    hides = {(one.args[0].hide, one.args[1] is one.args[0].windows) for one in reads.mock_calls}
    assert hides == {(0.3, False), (0.3, True), (0.0, False), (0.0, True)}  # to train, to predict
    paths = [*FOLDER.glob("adapters/runs/*.pt")]
    assert len(paths) == 3
    for path in paths:
        model, run = finetune.load(path), np.load(path.with_suffix(".npz"))
        test = np.flatnonzero(np.isin(sites.ids, run["ids"]))
        first, last = np.searchsorted(sites.dates, run["dates"][[0, -1]])
        again = finetune.Samples(model, sites, test, slice(first, last + 1)).predict()
        assert np.array_equal(again, run["sim"]) and np.isfinite(again).all(), path

def test_adapters_do_what_their_names_say():
    model, inputs = network("resconn-gated")
    plain = network("resconn")[0]
    model.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        model.adapter[0].weight[:] = 0
        model.adapter[0].bias[:] = torch.tensor([2.0] * 16 + [0.0] * 16)    # 2 by half a gate
    plain.expand.bias.data += 1
    torch.testing.assert_close(model(*inputs), plain(*inputs))
    layer, x = adapters.Experts(8, n=3), torch.randn(2, 5, 8)
    parts = zip(layer.gate(x).softmax(-1).split(1, -1), layer.experts(x).chunk(3, -1))
    torch.testing.assert_close(layer(x), sum(share * answer for share, answer in parts))
    assert network("resconn-narrow")[0].norms[3][1].out_features == 8
    model, (e, forcing, static) = network("resconn-authors")    # the attributes matter without E
    assert not torch.equal(model.eval()(0 * e, forcing, static), model(0 * e, forcing, -static))

def test_controls_do_what_their_names_say():
    raw, (_, forcing, static) = network("raw")
    forcing[1, 3, 2] = np.nan
    e = raw.encoder.read(forcing, static, torch.ones(3, 2), torch.ones(3, 365)).float()
    assert (e[..., raw.encoder.config.d_model:] == 0).all() and (e[:, :365, 10:] == 0).all()
    assert torch.equal(e[:, :365, :4], forcing.nan_to_num()) and e[1, 3, 6] == 1
    assert abs(e[:, :365, 8:10].norm(dim=-1) - 1).max() < 1e-5      # sine and cosine
    assert torch.equal(e[:, 365, 10:14], static) and e[..., 4:8].sum() == 1
    model, _ = network("untrained")                         # it takes no encoder from a run
    assert type(model)(model.settings, model.encoder).encoder is not model.encoder
    assert not model.encoder.position.requires_grad
    for variant, unread in (("shallow", slice(64, 128)), ("deep", slice(64))):
        model, (e, *others) = network(variant)
        before = model(e, *others)
        e[..., unread] = 0
        assert torch.equal(model(e, *others), before) and not model.gain.requires_grad
    model, (e, *others) = network("linear")
    change = model(e, *others) != model(e.index_fill(1, torch.tensor(200), 0), *others)
    assert change.any(2).any(0).nonzero().tolist() == [[200]]                   # that day
    for variant, hide in zip(("resconn", "lstm", "resconn-shown", "lstm-hiding"), (0.3, 0, 0, 0.3)):
        assert network(variant)[0].hide == hide
    windows = mock.Mock(get=lambda *_: (0, torch.ones(500, 3)), static_groups=("soil", "soil", "a"))
    some = mock.Mock(site=[0], start=[0], device="cpu", hide=0.3)
    clay, sand, area = finetune.Samples.read(some, windows, 0)[1].isnan().float().T
    assert torch.equal(clay, sand) and not torch.equal(clay, area) and abs(clay.mean() - 0.3) < 0.07

def buckets(days, basins=2, components=2):
    """Weather with frost and drought, parameters and full stores, in float64."""
    draw = partial(torch.rand, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    season = torch.cos(2 * np.pi * torch.arange(days) / 365.25)[:, None, None].double()
    rain = torch.where(draw(days, basins, 1) < 0.3, 20 * draw(days, basins, 1), 0.0)
    weather = rain, 10 * draw(days, basins, 1) - 14 * season, 3 - 2.5 * season + 0 * rain
    p = hybrid.within(hybrid.FIXED, 4 * draw(1, basins, components, 10) - 2)
    p |= hybrid.within(hybrid.DAILY, 4 * draw(days, basins, components, 3) - 2)
    p["overflow"] = p["overflow"] / 20                      # often enough, in every component
    return weather, p, [full * draw(basins, components) for full in (30, 2, 60, 40, 90)]

def test_buckets_equal_hbv_written_with_numbers_and_lose_no_water():
    weather, p, stores = buckets(700)                       # ends in December, with snow
    flow, evaporation, after = hybrid.hbv(*weather, p, stores)
    lost = (weather[0] - evaporation - flow).sum(0) + sum(stores) - sum(after)
    assert abs(lost).max() < 1e-9 and after[0].max() > 1
    assert min(x.min() for x in (flow, evaporation, *after)) >= 0
    snow, water, soil, upper, lower = (x[1, 0].item() for x in stores)
    for day in range(700):
        P, T, E = (x[day, 1, 0].item() for x in weather)
        c = {name: x[day % len(x), 1, 0].item() for name, x in p.items()}
        above = T - c["threshold"]
        melt = min(c["degree_day"] * max(above, 0), snow)
        freeze = min(c["refreezing"] * c["degree_day"] * max(-above, 0), water)
        snow, water = snow - melt + freeze + P * (above <= 0), water + melt - freeze
        outflow = max(water - c["retention"] * snow, 0)
        inflow, water = outflow + P * (above > 0), water - outflow
        recharge = inflow * (soil / c["capacity"]) ** c["beta"]
        excess = max(soil + inflow - recharge - c["capacity"], 0)
        soil += inflow - recharge - excess
        E = min(E * min(soil / c["limit"] / c["capacity"], 1) ** c["shape"], soil)
        soil, percolation = soil - E, min(upper + recharge + excess, c["percolation"])
        upper, lower = upper + recharge + excess - percolation, lower + percolation
        q0 = c["k0"] * max(upper - c["overflow"], 0)
        q1, q2 = c["k1"] * (upper - q0), c["k2"] * lower
        upper, lower = upper - q0 - q1, lower - q2
        assert abs(flow[day, 1, 0] - q0 - q1 - q2) + abs(evaporation[day, 1, 0] - E) < 0.01, day

def test_buckets_get_the_weather_in_its_units_and_their_flow_is_delayed():
    names, gap = ("precipitation", "tmin", "tmax", "pet"), np.nan
    x = np.array([[[0, 1, 9, 3], [20, gap, 7, 0.5], [gap, -5, -1, gap]]], "f4")
    scaling = torch.tensor([[1, 0, 0, 0], [1, 3, 8, 2.0], [1, 5, 6, 0.5]]).double()
    x = torch.from_numpy(train.apply_standardisation(x, scaling))
    about = dict(forcing_names=names, scaling={"forcing": scaling})
    weather = torch.cat(hybrid.in_units(x, about), -1)[:, 0]                    # (3 days, 3)
    np.testing.assert_allclose(weather, [[0, 5, 3], [20, 2.5, 0.5], [10, -3, 1.75]], atol=1e-5)
    raises("the sites have no pet", hybrid.in_units, x, about | {"forcing_names": names[:3]})
    model, (_, *inputs) = network("lstm-hbv")               # rain is all that flows, at once
    with (mock.patch.object(hybrid, "hbv", lambda rain, *_: (rain,)),
          mock.patch.object(hybrid, "route", lambda flow, **_: flow)):
        views = model(None, *inputs) * torch.tensor([0.5, 2]) + torch.tensor([1, 2])    # (B, L, 2)
    rain = hybrid.in_units(inputs[0], model.settings)[0][..., 0].T
    close(views, torch.stack([(rain + 1e-4).sqrt(), rain], -1), atol=1e-3)
    flow, t = torch.eye(60)[:, 10:11], np.arange(15) + 0.5  # one wet day
    routed = hybrid.route(flow, torch.tensor([2.0]), torch.tensor([1.5]))[10:25, 0]
    np.testing.assert_allclose(routed, t * np.exp(-t / 1.5) / (t * np.exp(-t / 1.5)).sum(), 1e-5)

# ensembles.py, predict.py, embeddings.py

def write_basins(folder, sites):
    """csv:DIR of the sites; the last but one without flow, the last without a file."""
    folder.mkdir(exist_ok=True)
    table = np.column_stack([sites.ids, np.hstack([sites.latlon, sites.static]).astype(str)])
    header = ",".join(["id,lat,lon", *sites.static_names])
    np.savetxt(folder / "sites.csv", table, "%s", ",", header=header, comments="")
    for i, site in enumerate(sites.ids[:-1]):
        columns = [sites.dates, *sites.forcing[i].T, *[sites.target[i]][:i < len(sites.ids) - 2]]
        header = ",".join(["date", *sites.dynamic_names, "streamflow"][:len(columns)])
        rows = np.column_stack([column.astype(str) for column in columns])
        np.savetxt(folder / f"{site}.csv", rows, "%s", ",", header=header, comments="")
    return f"csv:{folder}"

def own_basins():
    """csv:DIR with twelve basins, their sites, and a folder with models that learned from them."""
    folder, out = FOLDER / "basins", FOLDER / "own"
    if not folder.is_dir():
        common = f"--quick --steps 2 --holdout none --out {out} --data".split()
        printed(train.main, [*common, write_basins(folder, data.synthetic_world(3, 12, 2))])
        printed(finetune.main, [*common, f"csv:{folder}", "--seeds", "2"])
    with contextlib.redirect_stdout(io.StringIO()):
        return f"csv:{folder}", data.load(f"csv:{folder}", cache=None), out

def predicted(spec, out, *options):
    """What predict printed, and its medians (N, T)."""
    with mock.patch("applications.predict.find_spec", return_value=None):       # no pictures
        said = printed(predict.main, [spec, "--out", str(out), *options])
    return said, np.load(out / "predictions" / f"csv-{Path(spec).name}.npz")["median"]

def test_predictions_are_the_median_of_the_best_models_with_an_interval():
    spec, sites, out = own_basins()
    said, found = predicted(spec, out)
    assert "validation sites of the 90 % interval: 1 (few" in said and "11 of 12 sites" in said
    runs = [dict(np.load(path), path=path) for path in sorted(out.glob("runs/*basins*.npz"))]
    runs = [run | json.loads(str(run["about"])) for run in runs]
    chosen, tried = ensembles.best_mixture(runs)
    assert len(runs) == 4 and len(tried) == 3 and len(chosen) >= 2
    models = [finetune.load(run["path"].with_suffix(".pt")) for run in chosen]
    expected = np.median([model.predict(sites) for model in models], 0)
    np.testing.assert_allclose(found[:11], expected[:11], rtol=1e-4)
    where = out / "predictions" / "csv-basins"
    assert np.isnan(found[11]).all() and not (where / "synthetic_0011.csv").exists()
    table = data.read_table(where / "synthetic_0003.csv", "date")
    low, median, high = (table[f"{name} (mm/d)"] for name in ("low", "median", "high"))
    np.testing.assert_allclose(median, expected[3], rtol=1e-3)
    assert (0 <= low).all() and (low <= median).all() and (median < high).all()
    rows = [row.split(",") for row in (where / "sites.csv").read_text().splitlines()[1:]]
    assert [row[0] for row in rows] == list(sites.ids)
    assert sum(float(row[5]) < 1 for row in rows) == 9 and float(rows[4][5]) > 100  # km to training
    assert "tmax" in rows[11][7] and "tmax" not in rows[0][7]

def test_predictions_continue_or_begin_anew_but_are_never_of_other_sites_or_models():
    spec, sites, out = own_basins()
    sites = replace(sites, target=sites.target + 1)
    changed = write_basins(FOLDER / "changed", sites)
    _, first = predicted(changed, out)                      # by models of other data
    where = out / "predictions" / "csv-changed"
    values = np.load(where / "values.npy", mmap_mode="r+")
    values[5], values[4] = np.nan, 7                        # interrupted: 5 is missing, 4 is kept
    (where / "synthetic_0005.csv").unlink()
    said, again = predicted(changed, out)
    assert "replaced" not in said and (where / "synthetic_0005.csv").exists()
    assert np.allclose(again[5], first[5], rtol=1e-4) and (again[4] == 7).all()
    sites.forcing[0, :, 0] *= 10                            # more rain in the first basin
    write_basins(FOLDER / "changed", sites)
    said, wet = predicted(changed, out)
    np.testing.assert_allclose(wet[1:], first[1:], rtol=1e-4)
    assert "replaced" in said and not np.allclose(wet[0], first[0], rtol=1e-3)
    table = FOLDER / "changed" / "sites.csv"                # another order: each its own numbers
    header, *rows = table.read_text().splitlines()
    table.write_text("\n".join([header, *rows[::-1]]))
    np.testing.assert_allclose(predicted(changed, out)[1], wet[::-1], rtol=1e-4)
    printed(finetune.main, f"--quick --steps 2 --model lstm --holdout none --data {changed} "
                           f"--out {out}".split())
    said, more = predicted(changed, out)                    # by models of these data
    assert "replaced" in said and np.nanmean(more) > np.nanmean(first) + 0.5
    assert "not used: 1 (streamflow changed" in predicted(spec, out)[0]     # nor by the last ones

def test_what_cannot_be_predicted_is_refused_and_values_per_site_are_not():
    spec, sites, out = own_basins()
    raises("no runs with 'x'", predict.main, [spec, f"--out={out}", "--runs=x"], error=OSError)
    models = [finetune.load(path) for path in out.glob("runs/*basins*.pt")]
    for text in ("a/b", "sites", ".."):
        named = replace(sites, ids=np.array([text, *sites.ids[1:]]))
        raises(f"{text}: its predictions need", predict.check_sites, named, models, "")
        raises(f"{text}: its predictions need", predict.check_sites, sites, models, text)
    short = replace(sites, dates=sites.dates[:100])
    raises("100 days, the models read windows of 365: add", predict.check_sites, short, models, "")
    empty = replace(sites, dynamic_names=("snow",) * 7, static_names=("x",) * 19)
    raises("none of what the models know", predict.missing_variables, empty, models)
    printed(soil.main, f"--quick --data {spec} --holdout none --model mlp --out {out}".split())
    predicted(spec, out)
    predicted(spec, out, "--runs=clay", "--name=clay")
    low, median, high = np.load(out / "predictions" / "clay" / "values.npy")[:, 0].T[[1, 0, 2]]
    assert (low < median).all() and (median < high).all() and len(median) == 12

def test_intervals_hold_what_they_promise_with_many_sites_and_few():
    rng = np.random.default_rng(0)

    def draw(n, bias=0.0):                                  # sites err as a whole, and day by day
        level, noise = np.sqrt(rng.gamma(0.5, 4, (n, 200))), rng.standard_normal((n, 200))
        error = (0.1 + 0.3 * level) * noise + bias * rng.standard_normal((n, 1))
        return np.maximum(level + error, 0) ** 2, level ** 2

    def inside(n, obs, sim, bias=0.0):
        with contextlib.redirect_stdout(io.StringIO()):
            q = ensembles.Calibration(*draw(n, bias)).quantiles(sim)
        return (q[0] <= obs) & (obs <= q[-1])
    obs, sim = draw(300)
    for some in (sim < 1, sim > 4):                         # small and large values alike
        assert 0.86 < inside(60, obs, sim)[some].mean() < 0.94
    obs, sim = draw(200, bias=1)
    for n, most in {1: 1, 2: 0.97, 4: 0.96, 12: 0.95}.items():
        assert 0.87 < np.mean([inside(n, obs, sim, bias=1).mean() for _ in range(12)]) < most
    raises("nothing to calibrate with", ensembles.Calibration, obs * math.nan, sim)

def test_interval_scores_and_the_sign_test_equal_their_formulas():
    rng = np.random.default_rng(0)
    obs, q = rng.gamma(1, 1, (4, 50)), np.sort(rng.gamma(1, 1, (10, 4, 50)), 0)
    scores, pairs = ensembles.interval_scores(obs, q), abs(q[:, None] - q).mean((0, 1))
    inside, wet = (q[0] <= obs) & (obs <= q[-1]), np.argsort(obs.mean(1))[2:]
    assert np.isclose(scores["crps"], (abs(q - obs).mean(0) - pairs / 2).mean())
    assert scores["coverage"] == inside.mean() and scores["wet half"] == inside[wet].mean()
    assert np.isclose(ensembles.sign_test(np.array([1, 2, 3, 4, -1, 0, math.nan])), 0.375)

def test_medians_of_seeds_and_models_have_rows_and_gains():
    obs = np.random.default_rng(0).gamma(1.0, 3, (4, 50))

    def run(model, sim, seed=0):
        return dict(model=model, fold=0, seed=seed, options={"seed": 0}, ids=np.arange(4), obs=obs,
                    sim=sim, validation_ids=np.arange(4), validation_obs=obs, validation_sim=sim,
                    overlap=0, latlon=np.zeros((4, 2)))
    high, low, far = run("high", obs + 1), run("low", obs - 1), run("lstm", obs[::-1] * 3)
    chosen, tried = ensembles.best_mixture([high, far, low])
    assert [run["model"] for run in chosen] == ["high", "low"] and len(tried) == 7
    assert tried["high", "low"] == 1 > tried["high",] == tried["low",]
    other = run("low", obs + 3, seed=1)
    sites, sim = ensembles.left_out([low, other | {"validation_ids": np.arange(3, 7)}])
    assert len(sites) == 7 and np.allclose(sim[3], (obs[3] - 1 + obs[0] + 3) / 2)
    models = {"lstm": [far, far | {"seed": 1}], "low": [low, other]}
    with mock.patch("applications.ensembles.load_runs", return_value={"one": models}):
        said = printed(ensembles.main, [])
    for row in ("lstm, median ", "low, median ", "lstm + low, median ", "chosen by validation"):
        assert f"\n{row}" in said
    assert "gain of low over lstm" in said and "better at 4 of 4 sites, p 1.2e-01" in said
    assert said.count("over lstm, median: median +") == 3 and said.count("calibrated") == 3

def test_embeddings_are_written_for_every_site_and_neighbours_compared():
    spec, sites, out = own_basins()
    assert "nearest of 10 sites" in printed(embeddings.main, [spec, "--out", str(out)])
    table = data.read_table(out / "embeddings" / "csv-basins.csv", "id")
    assert list(table["id"]) == list(sites.ids) and len(table) == 3 + 2 * 64
    model, saved = train.load_checkpoint(out / "pretrained.pt")
    names = model.eval().config.dynamic_names, model.config.static_names
    windows = train.Windows(sites, saved["scaling"], 365, *names)
    e = model.encode(*windows.get(np.array([2]), np.array([0])))[0].detach().numpy()
    for part, expected in (("site", e[-1]), ("day", e[:-1].mean(0))):
        row = [table[f"{part}_{d:03d}"][2] for d in range(64)]
        np.testing.assert_allclose(row, expected, atol=1e-4)
    x = np.random.default_rng(0).standard_normal((200, 2))
    assert embeddings.likeness(x, x[:, 0]) > 0.9 > 0.3 > embeddings.likeness(x, x[::-1, 0])

# figures.py, growth.py, release.py

def test_figures_are_drawn_of_runs_and_of_a_checkpoint():
    out = FOLDER / "figures"
    raises("train.py", figures.main, ["--out", str(FOLDER / "nothing")], error=FileNotFoundError)
    printed(train.main, ["--quick", "--steps", "2", "--out", str(out)])
    command = ["--quick", "--steps", "1", "--out", str(out), "--model"]
    printed(finetune.main, [*command, "resconn,lstm"])
    printed(finetune.main, [*command, "lstm", "--labelled", "20"])
    try:
        import matplotlib
    except ImportError:
        return print("skipped: no matplotlib")
    with mock.patch.object(figures, "draw_distribution", wraps=figures.draw_distribution) as drawn:
        text = printed(figures.main, ["--out", str(out)])
    panel = [one.args[3:] for one in drawn.mock_calls if len(one.args) > 3]
    assert panel == [("-", ", all sites"), ("--", ", 20 sites")]                # of settings.png
    hidden = "climate geology soil terrain vegetation temperature precipitation radiation humidity"
    assert {*hidden.split()} <= {*text.split()} and "static context" not in text
    pictures = sorted(out.glob("*.png"))
    assert [path.name[:6] for path in pictures] == ["recons", "settin", "stream", "stream"]
    assert all(1000 < path.stat().st_size < 200_000 for path in pictures)
    [path] = out.glob("*, labelled 20*.csv")                # the metrics of each site
    [[run]] = evaluate.load_runs(out)[path.stem].values()
    expected = [evaluate.site_metrics(*pair)["kge"] for pair in zip(run["obs"], run["sim"])]
    np.testing.assert_allclose(data.read_table(path, "id")["kge"], expected, rtol=1e-4)
    with mock.patch.dict(sys.modules, {"matplotlib": None}):
        raises("pip install matplotlib", figures.new_figure, 1, 1, error=SystemExit)

def test_growth_is_measured_and_predicted():
    rows, true = sum(growth.RANGES.values(), []), np.array([2e-12, 0.0, 3e-12, 1e-3])
    factors = growth.fit({s: growth.terms(s) @ true for s in rows})
    np.testing.assert_allclose(factors, true, rtol=1e-6, atol=1e-20)
    falling = {s: growth.terms(s) @ [2e-12, -1e-9, 3e-12, 1e-3] for s in rows}
    assert min(falling.values()) > 0 and growth.fit(falling)[1] == 0            # not negative
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    first, step = growth.measure(growth.Setting(600, 30, 32, layers=1, batch=2), 4)
    for number, handler in before.items():
        signal.signal(number, handler)
    assert 0 < step < first + 1

def test_the_released_network_returns_what_theirs_returned():
    path = REAL / "release/release_io.npz"
    if not path.is_file():
        return print(f"skipped: no {path}")
    found = release.differences(path)
    assert len(found) == 5 and max(found.values()) < 1e-5, found
    file = np.load(path)
    state = {key[6:]: file[key] for key in file.files if key.startswith("state/")}
    network = release.from_release(state, int(file["heads"]))
    assert [*network.dynamic_names] == [*file["dynamic_names"]] and not network.training
    assert [*network.static_names] == [*file["static_names"]]
    embedding, mean = network.static_embedding, torch.tensor(   # what hides one is its mean
        state["static_embedding.masked_values"]).mean(0)
    torch.testing.assert_close(embedding(mean, torch.ones(len(mean)).bool()), embedding(mean))
    raises("['surprise']", release.from_release, state | {"surprise": file["x"]}, 4)
    for key in ("decoder_norm.bias", "positional_encoding.position_embedding"):
        fewer = {name: value for name, value in state.items() if name != key}
        raises("missing ['", release.from_release, fewer, 4)

# dynamic_world.py, blocks.py, height.py

def test_dynamic_world_equals_the_released_network():
    read = dynamic_world.DynamicWorld.from_release
    (FOLDER / "variables").mkdir()
    np.zeros(231_208, "<f4").tofile(FOLDER / "variables" / "variables.data-00000-of-00001")
    raises("00001: 231208 values, expected 231209", read, FOLDER)
    if not (REAL / "dynamicworld").is_dir():
        return print("skipped: no real data")
    z = np.load(REAL / "dynamicworld/reference_io.npz")
    x = torch.from_numpy(dynamic_world.normalize(z["s2_raw"][:2])).permute(0, 3, 1, 2)
    logits = read(REAL / "dynamicworld/forward")(x).permute(0, 2, 3, 1).detach()
    assert np.allclose(logits, z["logits"][:2], atol=1e-4)

def test_shares_of_land_cover_by_month_are_those_counted_by_hand():
    classes = np.array([[[8, 8]], [[8, 1]], [[1, 4]], [[4, 4]]])                # (4, 1, 2)
    clear = np.array([[[1, 1]], [[0, 1]], [[1, 1]], [[0, 0]]], bool)
    dates = np.array(["2020-01-05", "2020-01-25", "2020-06-01", "2020-07-01"], "M8[D]")
    months = dynamic_world.monthly(classes, clear, dates)
    assert np.allclose(months["2020-01"], [0, 1 / 3, 0, 0, 0, 0, 0, 0, 2 / 3, 3 / 4])
    assert np.isnan(months["2020-07"][:9]).all() and months["2020-07"][9] == 0      # all cloud
    assert np.allclose(months["all"], [0, 5 / 12, 0, 0, 1 / 4, 0, 0, 0, 1 / 3, 7 / 12])

TIMES = np.array(["2020-03-01T10:00:07", "2020-02-01T10:00:00"])

def write_scenes(**changes):
    arrays = {"s2_l1c": np.full((2, 4, 5, 9), 0.2), "s2_bands": np.array([*dynamic_world.BANDS]),
              "s2_dates": TIMES, "clm": np.ones((1, 4, 5)), "ndvi_dates": TIMES[:1]} | changes
    folder = Path(mkdtemp(dir=FOLDER))
    np.savez(folder / "scenes.npz", **{name: x for name, x in arrays.items() if x is not None})
    return folder

def test_cloud_masks_are_joined_by_time():
    days, slashes = TIMES.astype("M8[D]"), np.char.replace(TIMES, "-", "/")
    for scene, mask in ((TIMES, TIMES), (TIMES.astype("M8[ns]"), slashes), (days, TIMES),
                        (np.char.add(TIMES, ".25Z"), TIMES), (TIMES, days.astype(str))):
        folder = write_scenes(s2_dates=scene, ndvi_dates=mask[:1])
        dates, _, clear = dynamic_world.read_scenes(folder)
        assert dates.astype(str).tolist() == ["2020-02-01", "2020-03-01"]
        assert clear.mean((1, 2)).tolist() == [1, 0], (scene, mask)
    text = printed(dynamic_world.read_scenes, folder)
    assert "1 of 2 scenes without a cloud mask, taken as clear ['2020-02-01T10" in text
    late = write_scenes(ndvi_dates=np.array(["2020-03-01T10:00:08"]))           # by a second
    text = printed(dynamic_world.read_scenes, late)
    assert "2 of 2 scenes" in text and "; 1 of 1 masks without a scene ['2020-03" in text
    assert "2 of 2 scenes" in printed(dynamic_world.read_scenes, write_scenes(clm=None))

def test_what_was_not_seen_is_marked_and_an_offset_taken_off():
    x = np.full((2, 4, 5, 9), 0.3)
    x[1, 0, 0, 3], x[1, 0, 1, 0], x[1, 0, 2], x[1, 0, 3, 4] = np.nan, -9999, 0, np.inf
    x[1, 1, 0, 0], x[1, 1, 1] = 0, 0.05                     # one band of 0, and a dark pixel: seen
    for offset, value, dark in ((0, 3000, 500), (-0.1, 2000, 0)):
        _, scenes, clear = dynamic_world.read_scenes(write_scenes(s2_l1c=x), offset)
        assert clear[0].sum() == 16 and not clear[0, 0, :4].any() and not clear[1].any()
        assert np.isnan(scenes[0, 0, :4]).all() and np.allclose(scenes[1], value)
        assert np.allclose(scenes[0, 1, 1], dark) and scenes[0, 1, 0, 0] == 0
    raises("--offset 0.1: expected 0 or -0.1", dynamic_world.main, ["--offset", "0.1"])
    text = printed(dynamic_world.main, [str(write_scenes(s2_l1c=x)), "--offset", "-0.1"])
    assert "80.0%\n2020-03" in text
    with mock.patch.object(dynamic_world, "read_scenes", side_effect=ValueError("asked")) as read:
        raises("asked", dynamic_world.main, ["DIR", "--offset", "-0.1"])
    read.assert_called_with("DIR", -0.1)

def test_scenes_that_do_not_fit_are_refused_by_name():
    good = np.full((2, 4, 5, 9), 0.1)
    for complaint, name, value in (
            ("the median of s2_l1c is 1000, that of digital", "s2_l1c", (1e4 * good).astype("u2")),
            ("s2_l1c has no pixel that is neither 0", "s2_l1c", 0 * good),
            ("s2_l1c holds float64 (4, 5, 9), s2_bands (9,), s2_da", "s2_l1c", good[0]),
            ("s2_bands is ['B02', ", "s2_bands", np.array(["B02"] * 9)),
            ("the arrays ['s2_l1c', 's2_dates'", "s2_bands", None),
            ("s2_dates: Day out of range", "s2_dates", np.array(["2020-02-31", "2020-03-01"])),
            ("s2_dates: no date in '2020'", "s2_dates", np.array(["2020", "2021"])),
            ("clm has the shape (1, 4, 5), expected (0, 4, 5)", "ndvi_dates", None)):
        folder = write_scenes(**{name: value})
        raises(f"scenes.npz: {complaint}", dynamic_world.read_scenes, folder)
    Path(folder, "scenes.npz").write_bytes(b"PK")
    raises("scenes.npz is no npz, or damaged", dynamic_world.read_scenes, folder)

def test_every_node_of_a_unet_takes_part():
    for nested, nodes in ((False, 3), (True, 3 + 2 + 1)):
        network = height.UNet(5, 3, nested, width=8)
        y = network(torch.randn(2, 5, 28, 33))
        assert y.shape == (2, 3, 28, 33) and len(network.up) == nodes
        y.square().sum().backward()
        assert all(weight.grad.abs().sum() > 0 for weight in network.parameters())

def test_blocks_hold_each_pixel_once_and_are_turned_with_their_map():
    image = np.arange(2.0 * 30 * 50).reshape(2, 30, 50)
    cut = blocks.cut(image, image[0], "a test")
    assert cut.image.shape == (2 * 3, 2, 40, 40) and cut.ids[4] == "block_01_01"
    assert sorted(cut.target[~np.isnan(cut.target)]) == [*range(30 * 50)]
    assert np.array_equal(cut.target[4, 10:20, 10:30], image[0, 20:30, 20:40])
    assert np.array_equal(cut.image[1][:, :, :10], cut.image[0][:, :, 20:30])
    image, corners = torch.arange(3.0 * 40 * 40).view(3, 1, 40, 40), set()
    seen = torch.where(torch.from_numpy(height.EDGE), torch.nan, image[:, 0])
    for seed in range(20):
        y, x = height.crop(seen, image, np.random.default_rng(seed))
        known = ~y.isnan()                                  # (3, 32, 32)
        assert (known.sum((1, 2)) == 16 * 16).all() and torch.equal(y[known], x[:, 0][known])
        corners.add(y[0][known[0]][0].item())               # the first known pixel
    assert len(corners) == 4                                # of the block: it has been turned

def run(model, cut, fold=0, task="height"):
    o = shared_options("", steps=30, batch_size=8, lr=2e-3, device="cpu", dtype="float32",
                       out=str(FOLDER), task=task).parse_args([])
    return height.run(o, model, cut, data.folds(cut, "pub", 5), fold, 0)

def test_height_learns_and_never_sees_the_map_of_test_blocks():
    cut = blocks.cut(*blocks.synthetic_tile("", "height", size=100), "small")   # 25 blocks
    cut.image = cut.image[:, :16]                           # of 64 channels
    obs, sim = run("unet", cut)
    assert height.Height.scores(obs, sim)["R2"] > 0.3
    cut.target[data.folds(cut, "pub", 5) == 0] += 999
    changed, again = run("unet", cut)
    assert np.array_equal(sim, again) and changed.min() > 999
    cut.target = 0 * cut.target + 7 * cut.image[:, :3].sum(1)   # what three channels say exactly
    assert height.Height.scores(*run("pixel", cut))["R2"] > 0.9999
    raises("fold 5: 0 test", run, "pixel", cut, 5)
    with mock.patch.object(height, "fit", return_value=[]) as fit:
        run("unet", cut)
    images, targets = fit.call_args.args[3:5]               # of training blocks alone
    assert abs(images.mean((0, 2, 3))).max() < 1e-5 and targets[:, height.EDGE].isnan().all()

def test_land_cover_learns_and_weights_classes_by_rarity():
    cut = blocks.cut(*blocks.synthetic_tile("", "landcover", size=100), "small")
    obs, sim = run("unet", cut, task="landcover")
    assert height.LandCover.scores(obs, sim)["balanced"] > 0.7
    target = np.array([[[0, 0, 0, 1]], [[2, 2, 2, np.nan]]], "f4")              # the second: a test
    assert np.allclose(height.LandCover(target, [0]).rarity, [4 / 3 / 3, 4 / 3, 4 / 3])
    obs, sim = np.array([[0, 1], [1, 1], [np.nan] * 2]), np.array([[0, 0], [1, 1], [0, 1]])
    assert height.LandCover.scores(obs, sim) == {
        "balanced": (1 + 2 / 3) / 2, "accuracy": 3 / 4, "f1 0": 2 / 3, "f1 1": 4 / 5}
