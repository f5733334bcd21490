"""The served app in headless Chromium: a model chosen, a CSV downloaded, nothing thrown."""

import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pandas as pd
import pytest

import planner
from profiles import records

pytestmark = pytest.mark.browser

ROOT = Path(__file__).parents[2]

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
if CHROMIUM is None:
    pytest.skip("no chromium on this machine", allow_module_level=True)

IDLE = '[data-test-script-state="notRunning"]'


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The app's address; its log has no traceback in the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("app") / "log"
    command = [sys.executable, "-m", "streamlit", "run", "app/main.py"]
    command += ["--server.port", str(port), "--server.address", "127.0.0.1"]
    with (
        log.open("wb") as out,
        subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out) as process,
    ):
        try:
            wait_until_healthy(f"http://127.0.0.1:{port}/_stcore/health", process, log)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
    assert "Traceback" not in log.read_text()


def wait_until_healthy(address, process, log):
    end = time.monotonic() + 30
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(address, timeout=2) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.1)
    raise TimeoutError(log.read_text())


@pytest.fixture(scope="module")
def chromium():
    """One browser for all tests, so that the app's own files are loaded once."""
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"],
        )
        yield browser.new_context(viewport={"width": 1280, "height": 900})
        browser.close()


@pytest.fixture
def page(chromium):
    """A page that has thrown nothing when the test ends."""
    page, thrown = chromium.new_page(), []
    page.on("pageerror", lambda error: thrown.append(str(error)))
    yield page
    page.close()
    assert thrown == []


def settled(page):
    """Wait until the script has run to its end."""
    page.get_by_test_id("stHeading").first.wait_for(timeout=30_000)
    page.locator(IDLE).wait_for(state="attached", timeout=30_000)
    assert page.get_by_test_id("stException").count() == 0


def test_a_model_is_chosen_and_its_ledger_downloaded(server, page, tmp_path):
    page.goto(f"{server}/?runtime=vllm&batch=2")
    settled(page)
    page.get_by_role("combobox", name="Model").fill("qwen2.5-7b")  # a long list: type to find
    page.get_by_role("option", name="qwen2.5-7b").click()
    page.get_by_role("heading", name="qwen2.5-7b on NVIDIA H200 SXM").wait_for()
    settled(page)
    assert "model=qwen2.5-7b" in page.url
    with page.expect_download() as download:
        page.get_by_role("button", name="Download CSV").click()
    target = tmp_path / "ledger.csv"
    download.value.save_as(target)
    assert download.value.suggested_filename == "qwen2.5-7b_h200.csv"
    expected = planner.estimate(
        planner.load_model("qwen2.5-7b"),
        planner.Inference(batch=2, prompt_tokens=2048, output_tokens=256, logits="last"),
        planner.Deployment(gpu="h200", runtime="vllm"),
    )
    table = pd.read_csv(target)
    assert table["bytes"].sum() == expected.memory.total_bytes
    assert list(table.columns) == list(expected.table().columns)


def test_a_plan_survives_a_visit_to_the_measurements(server, page):
    page.goto(f"{server}/?runtime=vllm&model=gemma-2-9b")
    settled(page)
    page.get_by_role("link", name="Measured").click()
    page.get_by_role("heading", name="Measured", exact=True).wait_for()
    settled(page)
    page.get_by_role("link", name="Plan").click()
    page.get_by_role("heading", name="gemma-2-9b on NVIDIA H200 SXM").wait_for()
    settled(page)


def test_on_a_phone_the_figure_is_drawn_and_described_and_nothing_is_wider(server, page):
    page.set_viewport_size({"width": 400, "height": 900})
    page.goto(f"{server}/?runtime=vllm")
    settled(page)
    page.locator(".js-plotly-plot .bars path").first.wait_for()
    assert page.locator('[aria-label*="Weights 14.99 GiB"], [alt*="Weights 14.99 GiB"]').count()
    main = page.get_by_test_id("stMain")
    assert main.evaluate("e => e.scrollWidth - e.clientWidth") <= 0


def test_a_decision_is_made_on_explore_and_taken_home_as_csv(server, page, tmp_path):
    page.goto(f"{server}/explore?model=gpt-9&gpu=rtx-4090&runtime=vllm&output=64")  # a fresh link
    settled(page)
    assert page.get_by_test_id("stAlert").filter(has_text="model='gpt-9' in the link").count() == 1
    page.locator(".heatmaplayer image, .heatmaplayer path").first.wait_for(state="attached")
    page.get_by_role("combobox", name="B: GPU").click()
    page.keyboard.type("l40s")
    page.keyboard.press("Enter")
    page.get_by_text("B: total on NVIDIA L40S").wait_for()
    settled(page)
    assert "b_gpu=l40s" in page.url
    with page.expect_download() as download:
        page.get_by_role("button", name="Download CSV").click()
    target = tmp_path / "map.csv"
    download.value.save_as(target)
    table = pd.read_csv(target)
    best = table[table["fits"] == True]  # noqa: E712
    model = planner.load_model("llama-3.1-8b")
    deploy = planner.Deployment(gpu="rtx-4090", runtime="vllm")
    work = planner.Inference(batch=1, prompt_tokens=8, output_tokens=64, logits="last")
    most = planner.max_context_tokens(model, work, deploy)
    longest = best[best["batch"] == 1]["context_tokens"].max()
    assert longest <= most < 2 * longest


def test_a_run_is_opened_by_a_link_drawn_under_its_levels_and_the_errors_downloaded(
    server, page, tmp_path
):
    """The committed records of an H200: one with NVML's series."""
    known, _ = records.load([records.DATA / "h200.jsonl"])
    one = next(record for record in known if record.series is not None)
    page.goto(f"{server}/measured?device=h200&run={one.id}")
    settled(page)
    page.locator(".heatmaplayer image, .heatmaplayer path").first.wait_for(state="attached")
    drawn = page.locator('[aria-label*="NVML\'s used memory"], [alt*="NVML\'s used memory"]')
    drawn.first.wait_for(state="attached")
    assert page.get_by_text("peak reserved", exact=False).first.count() == 1
    page.get_by_role("combobox", name="Split").click()
    page.get_by_role("option", name="held-out").click()
    page.keyboard.press("Escape")
    run = page.get_by_role("combobox", name="Run", exact=True)
    sync_api.expect(run).not_to_have_value(re.compile(one.id), timeout=30_000)  # it is calibration
    settled(page)
    assert "of_split=held-out" in page.url
    with page.expect_download() as download:
        page.get_by_role("button", name="Download CSV").click()
    target = tmp_path / "measured.csv"
    download.value.save_as(target)
    table = pd.read_csv(target)
    assert set(table["split"]) == {"held-out"}
    assert set(table["device"]) == {"h200"}


def test_on_a_phone_the_measurements_are_no_wider_than_the_page(server, page):
    page.set_viewport_size({"width": 400, "height": 900})
    page.goto(f"{server}/measured")
    settled(page)
    page.locator(".js-plotly-plot").first.wait_for()
    main = page.get_by_test_id("stMain")
    assert main.evaluate("e => e.scrollWidth - e.clientWidth") <= 0


def test_a_link_opens_the_check_of_a_load_and_sarif_is_downloaded(server, page, tmp_path):
    page.goto(f"{server}/check?model=llama-2-7b&gpu=a100-80gb&batch=64&context=4096")
    settled(page)
    page.get_by_text("The KV cache outgrows the GPU").wait_for()
    with page.expect_download() as download:
        page.get_by_role("button", name="Download SARIF").click()
    target = tmp_path / "found.sarif"
    download.value.save_as(target)
    assert '"ruleId": "kv-cache-over-gpu"' in target.read_text()
    page.get_by_role("tab", name="Source").click()
    box = page.get_by_role("textbox", name="Paste a model's source")
    box.fill("def f(q, k, v):\n    return softmax(q @ k.mT, -1) @ v\n")
    page.keyboard.press("Control+Enter")
    page.get_by_text("Scores go into softmax unscaled").wait_for()
