"""How many GPUs serve a rate of requests, and what that costs: a capacity report of one service."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
import streamlit as st

import planner
from app import widgets
from planner.capacity.fleet import Fleet, OwnedGpus, Service
from planner.capacity.fleet_report import best_rows
from planner.capacity.traffic import fixed
from planner.format import seconds
from planner.report import csv_text

PLENTY = 1024
"""GPUs of each kind that may be taken."""


@st.cache_data(show_spinner="Looking for the fewest copies …", max_entries=32)
def report(
    _model: planner.Model,
    name: str,
    work: planner.Inference,
    deploy: planner.Deployment,
    rate: int,
    prices: Mapping[str, float],
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Every layout on every GPU, and the best of each GPU: of those with a price if there are any.

    The cheapest come first, where there are no prices those of the fewest GPUs.
    """
    every, best = [], []
    for gpu in prices or (deploy.gpu,):
        service = Service(
            name=name,
            model=_model,
            requests_per_s=float(rate),
            traffic=fixed(work.prompt_tokens, work.output_tokens),
            runtime=deploy.runtime,
            kv_dtype=deploy.kv_dtype,
        )
        owned = OwnedGpus(name=gpu, count=PLENTY, price_per_hour=prices.get(gpu))
        every.append(planner.capacity_report(Fleet(gpus=(owned,), services=(service,))))
        best.append(best_rows(every[-1]))
    order = "price_per_hour" if prices else "gpus_needed"
    table = pd.concat([rows for rows in best if not rows.empty] or best[:1])
    return pd.concat(every), table.sort_values([order, "gpus_needed"], kind="stable")


def served(
    model: planner.Model,
    work: planner.Inference,
    deploy: planner.Deployment,
    prices: Mapping[str, float],
) -> None:
    """The rate, the GPUs that it takes, and the whole report as a file."""
    with st.container(horizontal=True, vertical_alignment="bottom"):
        st.subheader("For a rate of requests")
        place = st.empty()
    rate = widgets.number(
        "Requests a second", "rate", help="Of the prompt and output tokens above, in all copies."
    )
    every, best = report(model, model.name, work, deploy, rate, prices)
    place.download_button(
        "Download capacity report",
        csv_text(every),
        file_name="capacity.csv",
        mime="text/csv",
        on_click="ignore",
        icon=":material/download:",
    )
    if best.empty:
        st.info("No layout of these GPUs holds the model and a request.")
        return
    st.dataframe(
        pd.DataFrame(
            {
                "gpu": best["gpu"],
                "GPUs": best["gpus_needed"],
                "price an hour": best["price_per_hour"],
                "copies": best["copies"],
                "GPUs of a copy": best["gpus_per_copy"],
                "requests at once": best["requests_at_once_needed"],
                "TTFT": [seconds(s) for s in best["ttft_s"]],
                "TPOT": [seconds(s) for s in best["tpot_s"]],
            }
        ).drop(columns=[] if prices else ["price an hour"]),
        hide_index=True,
        column_config={
            "price an hour": st.column_config.NumberColumn(format="%.2f"),
            "requests at once": st.column_config.NumberColumn(
                format="%.0f", help="In all copies, by Little's law."
            ),
            "TPOT": st.column_config.TextColumn(help="With prompts of others between."),
        },
        alt="GPUs that serve the rate",
    )
    st.caption(
        "Copies leave time for prompts between decode steps; they follow from estimated times: "
        f"{', '.join(sorted(set(best['latency_basis'])))}."
    )
