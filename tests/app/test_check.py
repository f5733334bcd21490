"""The page Check: findings of a config under a load, of pasted source, the catalogue, bad links."""

import pytest
from streamlit.testing.v1 import AppTest

import planner
from tests.app.test_pages import ROOT

pytestmark = pytest.mark.usefixtures("store")


def opened(**query):
    """The page as a link opens it."""
    app = AppTest.from_file(str(ROOT / "app" / "views" / "check.py"), default_timeout=30)
    app.query_params.update(query)
    app.run()
    assert not app.exception
    return app


def test_the_page_is_in_the_navigation():
    app = AppTest.from_file(str(ROOT / "app" / "main.py"), default_timeout=30)
    app.run()
    app.switch_page("views/check.py").run()
    assert not app.exception
    assert app.header[0].value == "Check"


def shown(app):
    return "\n".join(element.value for element in (*app.markdown, *app.caption))


def counts(app):
    return {card.label: int(card.value) for card in app.metric}


def test_a_link_opens_the_findings_of_its_load():
    query = {"model": "llama-2-7b", "gpu": "a100-80gb", "batch": "64", "context": "4096"}
    app = opened(**query)
    load = {"gpu": "a100-80gb", "batch": 64, "context_tokens": 4096}
    expected = planner.check("llama-2-7b", **load)
    assert counts(app)["Critical"] == sum(f.severity == "critical" for f in expected) == 1
    text = shown(app)
    assert "The KV cache outgrows the GPU" in text
    assert "First that fits: GQA with 8 kv heads" in text
    assert "batch 64 × 4,096 tokens" in text


def test_a_sound_model_says_so():
    app = opened(model="llama-3.1-8b", gpu="h200", batch="1", context="8192")
    assert set(counts(app).values()) == {0}
    assert "Nothing found" in app.success[0].value


def test_pasted_source_is_checked_and_its_text_is_no_markup():
    app = opened(model="llama-3.1-8b", batch="1")
    code = "def f(q, k, v):\n    return softmax(q @ k.mT + g('<b>:red[x]'), -1) @ v\n"
    app.get_by_key("source").set_value(code).run()
    assert not app.exception
    text = shown(app)
    assert "Scores go into softmax unscaled" in text
    assert "<b>" not in text
    assert ":red[x]" not in text


def test_source_that_is_no_python_is_one_line():
    app = opened()
    app.get_by_key("source").set_value("def f(:").run()
    assert "pasted.py is not Python" in app.error[0].value


def test_the_catalogue_lists_every_edge():
    table = opened().dataframe[-1].value
    assert len(table) == len(planner.edges()) - 1
    assert {"critical", "high", "medium", "info"} == set(table["severity"])


def test_a_link_with_nonsense_is_told():
    app = opened(context="-5", gpu="h999")
    assert len(app.warning) == 2
