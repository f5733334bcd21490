"""The page Explore: its map, its lines, A against B, the ladder, bad links."""

import pandas as pd
import pytest
from streamlit.testing.v1 import AppTest

import planner
from app import explore_charts, explore_controls
from planner.capacity.fleet import Fleet, OwnedGpus, Service
from planner.capacity.fleet_report import best_rows
from planner.capacity.traffic import fixed
from planner.format import gib
from profiles import records
from tests.app.test_pages import ROOT, captions, made

pytestmark = pytest.mark.usefixtures("store")


def opened(**chosen):
    """The page with these choices, made together."""
    app = AppTest.from_file(str(ROOT / "app" / "main.py"), default_timeout=30)
    app.run()
    app.switch_page("views/explore.py").run()
    for key, value in chosen.items():
        app.get_by_key(key).set_value(value)
    if chosen:
        app.run()
    assert not app.exception
    return app


def test_a_model_is_explored_on_a_gpu():
    app = opened(model="gemma-2-9b", gpu="rtx-4090", runtime="attnlab")
    assert "gemma-2-9b in attnlab on NVIDIA GeForce RTX 4090" in captions(app)
    assert not app.error


def test_a_runtime_that_refuses_the_model_says_so():
    app = opened(model="bamba-9b", runtime="attnlab")
    assert "does not plan Mamba-2 layers of model_type=bamba" in app.error[0].value


def test_a_comparison_shows_both_totals_and_the_ladder_the_fewest():
    app = opened(model="llama-3.1-8b", gpu="rtx-4090", runtime="vllm", batch=4, prompt=1000)
    work = planner.Inference(batch=4, prompt_tokens=1000, output_tokens=256, logits="last")
    model = planner.load_model("llama-3.1-8b")
    deploy = planner.Deployment(gpu="rtx-4090", runtime="vllm")
    total = planner.estimate(model, work, deploy).memory.total_bytes
    shown = {card.label: card.value for card in app.metric}
    assert shown["A: total on NVIDIA GeForce RTX 4090"] == gib(total)
    sides = app.dataframe[0].value.set_index("per GPU")
    assert (
        sides.loc["largest batch", "A: rtx-4090, bf16 KV"]
        == f"{planner.max_batch(model, work, deploy):,}"
    )
    ladder = app.dataframe[1].value.set_index("gpu")
    for name in ("t4", "h200"):
        expected = planner.min_gpus(model, work, planner.Deployment(gpu=name, runtime="vllm"))
        assert ladder.loc[name, "gpus"] == expected


def test_the_ladder_is_of_the_gpus_that_have_a_price_the_cheapest_first():
    app = opened(model="llama-3.1-8b", runtime="vllm", prices="h200=3.5, l40s=0.9,t4=9")
    table = app.dataframe[1].value
    assert list(table["gpu"])[:2] == ["l40s", "h200"]
    assert table["price_per_hour"][0] == pytest.approx(0.9 * table["gpus"][0])
    app = opened(prices="h200=dear")
    assert app.error[0].value == "'h200=dear' is no price: such as h200=3.5"


def test_a_rate_takes_as_many_gpus_as_the_capacity_report_says():
    app = opened(model="llama-3.1-8b", runtime="vllm", prices="h100-80gb=2")
    app.get_by_key("rate").set_value(20).run()
    work = {"prompt_tokens": 2048, "output_tokens": 256}
    service = Service(
        name="a", model=planner.load_model("llama-3.1-8b"), requests_per_s=20, traffic=fixed(**work)
    )
    gpus = OwnedGpus(name="h100-80gb", count=1024, price_per_hour=2.0)
    best = best_rows(planner.capacity_report(Fleet(gpus=(gpus,), services=(service,)))).iloc[0]
    (row,) = app.dataframe[2].value.to_dict("records")
    assert (row["GPUs"], row["price an hour"]) == (best["gpus_needed"], best["price_per_hour"])


def test_measured_cells_are_marked(store):
    records.append(store, made(model="llama-50m", prompt_tokens=250, batch=2))
    app = opened(model="llama-50m", gpu="cpu", runtime="attnlab", output=4)
    figure = app.get("plotly_chart")[0].proto.spec
    assert "measured near here" in figure


def table(**more):
    return planner.sweep("llama-3.1-8b", "rtx-4090", [1, 64], [1024, 65_536], **more)


def test_the_map_colours_what_fits_above_and_the_rest_below_zero():
    cells = table()
    figure = explore_charts.fit_map(cells, measured=[(1, 1000)])
    (heat,) = figure.data
    fits = cells.set_index(["batch", "context_tokens"])["fits"]
    for batch, row in zip((1, 64), heat.z, strict=True):
        for context, share in zip((1024, 65_536), row, strict=True):
            assert (share > 0) == bool(fits[batch, context])
    marked = [(b, c) for b in (0, 1) for c in (0, 1) if explore_charts.MEASURED in heat.text[b][c]]
    assert marked == [(0, 0)]
    assert figure.layout.xaxis.type == figure.layout.yaxis.type == "category"
    assert explore_charts.fit_map_in_words(cells).startswith("Map of 4 cells")


def test_refused_cells_stay_empty_with_the_reason():
    cells = planner.sweep("gpt2", "h200", [1], [512, 4096])
    heat = explore_charts.fit_map(cells).data[0]
    assert heat.z[0][1] is None
    assert "reaches beyond 1024" in heat.hovertext[0][1]


def test_a_change_adds_up_to_its_total():
    model = planner.load_model("llama-3.1-8b")
    work = planner.Inference(batch=1, prompt_tokens=512, logits="last")
    a, b = (planner.estimate(model, work, planner.Deployment(gpu="h200", runtime=r))
            for r in ("vllm", "transformers"))  # fmt: skip
    figure = explore_charts.change(planner.what_if(a, b))
    *parts, total = figure.data[0].x
    assert sum(parts) == pytest.approx(total)
    assert "total" in explore_charts.change_in_words(planner.what_if(a, b))


def test_contexts_leave_a_prompt_and_end_at_the_models_positions():
    model = planner.load_model("gpt2")
    assert explore_controls.contexts(model, 1) == (256, 512, 1024)
    assert explore_controls.contexts(model, 600) == (1024,)
    assert isinstance(table(), pd.DataFrame)
