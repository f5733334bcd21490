"""The expander for pasted logs on the page Plan."""

from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

pytestmark = pytest.mark.usefixtures("store")

ROOT = Path(__file__).parents[2]
POOL = "Available KV cache memory: 53.29 GiB\nGPU KV cache size: 436,560 tokens"


def pasted(text, **query):
    app = AppTest.from_file(str(ROOT / "app" / "main.py"), default_timeout=30)
    app.query_params.update(query)
    app.run()
    app.text_area[0].set_value(text).run()
    assert not app.exception
    return app


def test_a_pasted_log_stands_beside_the_plan_of_the_page():
    app = pasted(POOL, model="llama-3-8b", gpu="h100-80gb", runtime="vllm")
    table = next(d.value for d in app.dataframe if "printed" in d.value)
    row = table.set_index("").loc["KV pool"]
    assert row["printed"] == "53.29 GiB"
    assert row["planned"].endswith("GiB")
    assert any("llama-3-8b" in text.value for text in app.markdown)


def test_a_model_that_is_not_known_is_not_taken_for_the_pages():
    text = f"non-default args: {{'model': 'someone/else-9b'}}\n{POOL}"
    app = pasted(text, model="llama-3-8b", gpu="h100-80gb", runtime="vllm")
    table = next(d.value for d in app.dataframe if "printed" in d.value)
    assert set(table["planned"]) == {"–"}
    assert any("'someone/else-9b' is not in the catalogue" in c.value for c in app.caption)


def test_text_that_is_no_log_ends_in_one_line():
    app = pasted("nothing of the kind")
    assert [error.value[:40] for error in app.error] == [
        'the log has nothing of a vLLM start-up ("M'[:40]
    ]


def test_gpus_that_share_a_model_are_in_the_link():
    app = AppTest.from_file(str(ROOT / "app" / "main.py"), default_timeout=30)
    app.query_params.update(model="llama-3.1-70b", gpu="h100-80gb", runtime="vllm", tp="4", pp="2")
    app.run()
    assert not app.exception
    assert app.header[0].value == "llama-3.1-70b on 8 × NVIDIA H100 80GB SXM"
    assert any("one of 4 tensor-parallel GPUs, stage 2 of 2" in c.value for c in app.caption)
