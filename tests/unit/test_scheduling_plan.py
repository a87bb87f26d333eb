"""The planner against the published case study, and its behaviour when inputs move or do not suffice."""

import json
import math
from dataclasses import replace

import pytest
import typer
from typer.testing import CliRunner

from kvpool.scheduling import cli, plots
from kvpool.scheduling.config import largest_batch, load_case, parse_case
from kvpool.scheduling.lengths import Empirical, TruncatedLogNormal
from kvpool.scheduling.model import Bound, InfeasiblePlanError, Means, System, operate
from kvpool.scheduling.planner import best_threshold, perturbations, plan, plan_split, purchases
from kvpool.scheduling.profiles import GBPS, Label
from kvpool.scheduling.report import compare, figures, labels, move
from kvtransport.errors import ConfigError


@pytest.fixture(scope="module")
def paper():
    return load_case("paper")


@pytest.fixture(scope="module")
def comparison(paper):
    return compare(paper)


def app():
    instance = typer.Typer()
    cli.register(instance)
    instance.command("other")(lambda: None)
    return instance


# -- the case study -----------------------------------------------------------------------------------

TOLERANCE = {
    "threshold_tokens": 0.03,
    "n_prfaas": 0.0,
    "n_p": 0.0,
    "n_d": 0.0,
    "offload_share": 0.03,
    "th_prfaas": 0.03,
    "th_pdp": 0.03,
    "th_pdd": 0.03,
    "lambda_max": 0.03,
    "egress_gbps": 0.10,
    "ttft_mean_s": 0.05,
    "ttft_p90_s": 0.05,
    "prfaas_over_homogeneous": 0.03,
    "prfaas_over_naive": 0.04,
    "naive_over_homogeneous": 0.03,
}


@pytest.mark.parametrize("column", ["prfaas_pd", "homogeneous_pd", "naive_heterogeneous", "ratios"])
def test_every_published_figure_is_met(paper, comparison, column):
    published = paper.published[column]
    assert len(published) >= 6
    for key, value in published.items():
        planned = comparison.figures[column][key]
        if key in TOLERANCE:
            assert planned == pytest.approx(value, rel=max(TOLERANCE[key], 1e-12)), key
        else:
            assert planned == pytest.approx(value, abs=0.02), key


def test_the_reference_calculation_is_met_closely(paper, comparison):
    best = comparison.plan.best
    assert best.threshold == pytest.approx(19_590, rel=0.003)
    assert best.th_prfaas == pytest.approx(1.571, rel=0.002)
    assert best.th_pdp == pytest.approx(1.627, rel=0.002)
    assert best.lambda_max == pytest.approx(3.195, rel=0.002)
    assert operate(paper.system, 19_400, 3, 5).ttft_mean == pytest.approx(2.20, rel=0.005)


def test_labels_follow_from_what_the_figures_depend_on(paper, comparison):
    found = labels(paper, comparison)
    assert found["naive_heterogeneous"]["lambda_max"] is Label.PREDICTION
    assert found["naive_heterogeneous"]["ttft_mean_s"] is Label.PREDICTION
    assert found["naive_heterogeneous"]["th_pdd"] is Label.DERIVED
    assert found["prfaas_pd"]["threshold_tokens"] is Label.DERIVED
    assert found["prfaas_pd"]["n_p"] is Label.DERIVED
    assert found["prfaas_pd"]["n_prfaas"] is Label.INPUT
    assert found["ratios"]["equal_cost_gain"] is Label.DERIVED
    honest = replace(paper, labels=dict.fromkeys(paper.labels, Label.MEASURED))
    assert set(labels(honest, comparison)["prfaas_pd"].values()) == {Label.INPUT, Label.PREDICTION}


KEYS = (
    "threshold_tokens",
    "offload_share",
    "th_prfaas",
    "th_pdp",
    "th_pdd",
    "lambda_max",
    "egress_gbps",
    "ttft_mean_s",
)
DIRECTIONS = {
    # input +10% at the split 3/5, t optimal: the sign of every output, in the order of KEYS
    "pd.instances": "0000+000",
    "pd.prefill_seconds": "-++-0-++",
    "pd.batch_max": "0000+000",
    "pd.decode_step": "0000-000",
    "workload.lengths": "+---0--+",
    "workload.output_tokens": "0000-000",
    "prfaas.instances": "-+++0++-",
    "prfaas.prefill_seconds": "+---0--+",
    "prfaas.kv_bytes": "000000+0",
    "prfaas.egress": "00000000",
}


@pytest.mark.parametrize("name", DIRECTIONS)
@pytest.mark.parametrize("factor", [1.1, 0.9])
def test_every_input_moves_every_output_the_right_way(paper, name, factor):
    system = paper.system
    before = figures(operate(system, best_threshold(system, 3), 3, 5))
    moved = perturbations(system)[name](system, factor)
    after = figures(operate(moved, best_threshold(moved, 3), 3, moved.pd.instances - 3))
    if name == "pd.instances" and factor < 1:
        return_sign = "0000--"  # with four decode instances decode binds
        keys = KEYS[:6]
    else:
        flip = {"+": "-", "-": "+", "0": "0"}
        return_sign = DIRECTIONS[name] if factor > 1 else "".join(flip[c] for c in DIRECTIONS[name])
        keys = KEYS
    for key, sign in zip(keys, return_sign, strict=True):
        change = after[key] / before[key] - 1
        seen = "0" if abs(change) < 1e-6 else "+" if change > 0 else "-"
        assert seen == sign, f"{name} x{factor}: {key} changed by {change:+.3%}"


def test_directions_cover_every_input(paper):
    assert set(DIRECTIONS) == set(perturbations(paper.system))


def test_published_figures_do_not_reach_the_plan(paper, comparison):
    wrong = {c: {k: v * 7 for k, v in rows.items()} for c, rows in paper.published.items()}
    assert compare(replace(paper, published=wrong)).figures == comparison.figures


def test_prices_move_the_equal_cost_gain_only(paper, comparison):
    dearer = compare(replace(paper, prices=(2.2, 1.0))).figures
    assert dearer["ratios"].pop("equal_cost_gain") < comparison.figures["ratios"]["equal_cost_gain"]
    rest = {c: {k: v for k, v in rows.items() if k != "equal_cost_gain"} for c, rows in comparison.figures.items()}
    assert dearer == rest


def test_moving_an_input_moves_the_baselines_too(paper):
    slower = move(paper, "pd.prefill_seconds", 1.1)
    assert slower.homogeneous.pd.profile.seconds(20_000) == pytest.approx(1.1 * paper.system.pd.profile.seconds(20_000))


# -- equations ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("means", list(Means))
def test_the_optimum_balances_the_paths_and_no_grid_point_beats_it(paper, means):
    system = replace(paper.system, means=means)
    best = plan(system).best
    assert best.limits[Bound.PRFAAS_COMPUTE] == pytest.approx(best.limits[Bound.PD_PREFILL], rel=1e-6)
    assert best.th_prfaas + best.th_pdp == pytest.approx(best.lambda_max, rel=1e-6)
    for n_p in range(8):
        for t in range(500, 131_000, 1_500):
            assert operate(system, t, n_p, 8 - n_p).lambda_max <= best.lambda_max * (1 + 1e-9)


def test_expected_means_agree_with_a_large_sample(paper):
    import numpy as np

    system = replace(paper.system, means=Means.EXPECTED)
    sample = system.workload.lengths.sample(np.random.default_rng(1), 400_000)
    t = 19_400.0
    point = operate(system, t, 3, 5)
    long, short = sample[sample > t], sample[sample <= t]
    remote, local = system.prfaas.profile.prefill.at_all(long), system.pd.profile.prefill.at_all(short)
    assert point.offload_share == pytest.approx(len(long) / len(sample), rel=0.01)
    assert point.th_prfaas == pytest.approx(4 / remote.mean(), rel=0.01)
    assert point.th_pdp == pytest.approx(3 / local.mean(), rel=0.01)
    both = np.concatenate([remote, local])
    assert point.ttft_mean == pytest.approx(both.mean(), rel=0.01)
    assert point.ttft_p90 == pytest.approx(np.quantile(both, 0.9), rel=0.01)
    sizes = system.prfaas.profile.sizes.at_all(long)
    assert point.egress == pytest.approx(point.lambda_max * point.offload_share * sizes.mean(), rel=0.01)


def test_an_empirical_workload_plans_like_the_distribution_it_came_from(paper):
    lengths = paper.system.workload.lengths
    sample = Empirical([lengths.quantile((i + 0.5) / 20_000) for i in range(20_000)])
    same = replace(paper.system, workload=replace(paper.system.workload, lengths=sample))
    assert plan(same).best.lambda_max == pytest.approx(plan(paper.system).best.lambda_max, rel=2e-3)
    assert plan(same).best.threshold == pytest.approx(plan(paper.system).best.threshold, rel=2e-3)


def test_a_narrow_link_binds_and_raises_the_threshold(paper):
    prfaas = paper.system.prfaas
    narrow = replace(paper.system, prfaas=replace(prfaas, egress=9 * GBPS))
    best = plan(narrow).best
    assert Bound.PRFAAS_LINK in best.binds
    assert best.threshold > plan_split(paper.system, best.n_p).threshold
    bought = {p.what: p.gain for p in purchases(narrow)}
    assert bought["10 Gbps more egress"] > 0.3
    assert bought["one more PrfaaS instance"] == pytest.approx(0, abs=1e-6)


def test_no_bandwidth_plans_without_offloading(paper):
    dark = replace(paper.system, prfaas=replace(paper.system.prfaas, egress=0.0))
    result = plan(dark)
    assert result.best.offload_share == 0
    assert result.best.lambda_max == pytest.approx(plan(System(paper.system.pd, paper.system.workload)).best.lambda_max)
    assert any("nothing can be offloaded" in n for n in result.notes)


def test_a_plan_says_where_it_extrapolates(paper):
    assert any("extrapolated" in note and "PD" in note for note in plan(paper.system).notes)


# -- infeasible ---------------------------------------------------------------------------------------


def test_infeasible_plans_say_why(paper):
    system = paper.system
    alone = System(replace(system.pd, instances=1), system.workload)
    with pytest.raises(InfeasiblePlanError, match="cannot both prefill and decode, and there is no PrfaaS cluster"):
        plan(alone)
    dark = replace(system, pd=replace(system.pd, instances=1), prfaas=replace(system.prfaas, egress=0.0))
    with pytest.raises(InfeasiblePlanError, match="the PrfaaS link has no bandwidth"):
        plan(dark)
    with pytest.raises(InfeasiblePlanError, match="the PrfaaS cluster has no instance"):
        plan(replace(alone, prfaas=replace(system.prfaas, instances=0)))
    with pytest.raises(InfeasiblePlanError, match="nothing can decode"):
        plan(replace(system, pd=replace(system.pd, instances=0)))
    with pytest.raises(InfeasiblePlanError, match="even one request is too slow"):
        plan(replace(system, pd=replace(system.pd, batch_max=0)))


def test_the_batch_is_the_largest_that_meets_the_slo():
    steps = [(1, 12.0), (16, 22.0), (32, 38.0)]
    assert largest_batch(steps, 0.025) == 19
    assert largest_batch(steps, 0.1) == 32  # never beyond what was measured
    with pytest.raises(InfeasiblePlanError, match=r"12 ms even at batch 1.*100 tokens/s leaves 10 ms"):
        largest_batch(steps, 0.01)


CONFIG = """
title = "mine"
[workload]
lengths = { kind = "trace", path = "mooncake-conversation", cache_blocks = 20000 }
[prfaas]
instances = 2
profile = "1t-hybrid-8xh200"
model = "minimax-m2.5"
egress_gbps = 50
[pd]
instances = 4
profile = "mine.csv"
slo_tokens_per_s = 40
decode_steps_ms = [[1, 10.0], [64, 30.0]]
"""
PROFILE = "# label: measured\ntokens,prefill_seconds\n1024,0.5\n8192,1.4\n65536,9.9\n"


def test_a_users_config_plans(tmp_path):
    (tmp_path / "mine.csv").write_text(PROFILE)
    (tmp_path / "plan.toml").write_text(CONFIG)
    out = tmp_path / "plan.json"
    result = CliRunner().invoke(app(), ["plan", "--config", str(tmp_path / "plan.toml"), "--json", str(out)])
    assert result.exit_code == 0, result.output
    body = json.loads(out.read_text())
    assert body["prfaas_pd"]["lambda_max"] > 0
    assert body["homogeneous_pd"] is None
    assert body["ratios"]["equal_cost_gain"] is None
    assert set(body["sensitivity"]) == set(DIRECTIONS)
    assert "buys" in result.output


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (("instances = 2", "instances = 2\ncolour = 3"), "colour"),
        (("instances = 2", "instances = -2"), "instances and egress must be >= 0"),
        (("slo_tokens_per_s = 40", "slo_tokens_per_s = 0"), "slo_tokens_per_s must be positive"),
        (("slo_tokens_per_s = 40", "slo_tokens_per_s = 40\nbatch_max = 3"), "exactly one of batch_max"),
        (("mine.csv", "absent.csv"), "no profile 'absent.csv'"),
        (("mooncake-conversation", "absent"), "no trace 'absent'"),
        (("minimax-m2.5", "no-such-model"), "no-such-model"),
        (("cache_blocks = 20000 }", "cache_blocks = 20000 }\ncached_fraction = 1.0"), "cached_fraction"),
        (('title = "mine"', "title = "), "not TOML"),
    ],
)
def test_a_wrong_config_is_refused_by_name(tmp_path, edit, message):
    (tmp_path / "mine.csv").write_text(PROFILE)
    text = CONFIG.replace(*edit)
    assert text != CONFIG
    with pytest.raises(ConfigError, match=message):
        parse_case(text, where="plan.toml", folder=tmp_path)


# -- command line -------------------------------------------------------------------------------------


def test_plan_case_paper_writes_the_promised_json():
    result = CliRunner().invoke(app(), ["plan", "--case", "paper", "--json", "-"])
    assert result.exit_code == 0
    body = json.loads(result.stdout)
    keys = [
        "threshold_tokens",
        "n_prfaas",
        "n_p",
        "n_d",
        "offload_share",
        "lambda_max",
        "egress_gbps",
        "ttft_mean_s",
        "ttft_p90_s",
    ]
    for column in ("prfaas_pd", "homogeneous_pd", "naive_heterogeneous"):
        assert set(keys) <= set(body[column])
    assert body["homogeneous_pd"]["threshold_tokens"] is None
    assert body["homogeneous_pd"]["n_prfaas"] is None
    assert body["naive_heterogeneous"]["n_p"] is None
    assert body["ratios"]["prfaas_over_homogeneous"] == pytest.approx(1.54, rel=0.03)
    assert "PrfaaS-PD" in result.stderr
    assert "derived" in result.stderr


def test_plan_explains_wrong_use(tmp_path):
    run = CliRunner().invoke
    assert "exactly one of --case and --config" in run(app(), ["plan"]).output
    unknown = run(app(), ["plan", "--case", "nope"])
    assert unknown.exit_code == 2
    assert "packaged are: paper" in unknown.output
    assert run(app(), ["plan", "--config", str(tmp_path / "absent.toml")]).exit_code == 2
    assert "kvpool plan --case paper" in run(app(), ["plan", "--help"]).output


def test_pictures_are_written_as_png_and_svg(paper, comparison, tmp_path):
    files = plots.plan_pictures(paper.system, comparison.plan, tmp_path / "out")
    assert {f.name for f in files} == {
        f"{name}{suffix}"
        for name in (
            "capacity-over-split",
            "capacity-over-threshold",
            "capacity-over-bandwidth",
            "hybrid-against-dense",
        )
        for suffix in (".png", ".svg")
    }
    assert all(f.stat().st_size > 5_000 for f in files)


def test_without_matplotlib_pictures_say_what_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"pip install 'kvtransport\[bench\]'"):
        plots.load_pyplot()


def test_infinite_figures_become_null(tmp_path):
    path = tmp_path / "x.json"
    cli.write_json({"a": [math.inf, 1.0], "b": math.nan}, str(path))
    assert json.loads(path.read_text()) == {"a": [None, 1.0], "b": None}


def test_a_lognormal_cut_to_nothing_is_refused():
    with pytest.raises(ConfigError, match="next to nothing"):
        TruncatedLogNormal(5.0, 0.1, 100_000, 200_000)
