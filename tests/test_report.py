"""The report is one page that opens anywhere and says what was found and what is missing, the same bytes each time."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from diffx.cli.main import run as command
from diffx.compare.factorial import Observation, effects
from diffx.evaluation import Evaluation
from diffx.experiment import Run, fingerprint
from diffx.metrics.values import jackknifed
from diffx.plots import Chart, Line, decades, log_ticks, plot_chart
from diffx.report.numbers import interval, number
from diffx.utils import DiffxError

ARMS = {("linear", "eps"): 9.0, ("linear", "v"): 6.0, ("cosine", "eps"): 5.0, ("cosine", "v"): 3.0}
TARGETS = {"linear": "Linear", "cosine": "Cosine", "eps": "Eps", "v": "V"}


def config_of(schedule, parameterization, seed):
    parts = {
        "data": {"_target_": "diffx.data.Digits", "batch_size": 64},
        "schedule": {"_target_": f"diffx.schedules.{TARGETS[schedule]}"},
        "parameterization": {"_target_": f"diffx.parameterizations.{TARGETS[parameterization]}"},
        "sampler": {"_target_": "diffx.samplers.DDIM", "steps": 20},
    }
    chosen = {"data": "digits", "schedule": schedule, "parameterization": parameterization, "sampler": "ddim"}
    rest = {"name": "ablation", "seed": seed, "training": {"max_steps": 100}, "evaluation": {"seed": 0}}
    return parts | rest | {"choices": chosen}


def write_run(root, schedule, parameterization, seed, level=None, nfes=(5, 20), pictures=True, state="finished"):
    """A run directory as training and evaluation leave it, without training."""
    config = config_of(schedule, parameterization, seed)
    digest = fingerprint({"schedule": schedule, "parameterization": parameterization})
    run = Run(root / "ablation" / f"parameterization={parameterization},schedule={schedule}-{digest}" / f"seed{seed}")
    run.path.mkdir(parents=True)
    run.config_file.write_text(yaml.safe_dump(config, sort_keys=False))
    reason = {"reason": "loss is NaN"} if state == "failed" else {}
    run.set_status(state, step=100 if state == "finished" else 40, **reason)
    draw = np.random.default_rng([seed, *digest.encode()])
    launch = {"command": "diffx train -m schedule=linear,cosine parameterization=eps,v seed=0,1", "commit": "abc123"}
    (run.path / "launches.jsonl").write_text(
        json.dumps(launch | {"packages": {"torch": "2.15.0"}, "host": "node7"}) + "\n"
    )
    rows = ["step,loss,images,flops,device_seconds,loss/logsnr<-8,loss/logsnr-8..-4,loss/logsnr>8,eval/fd_digits"]
    for step in range(10, 101, 10):
        loss = 1 / step + 0.01 * draw.random()
        rows.append(f"{step},{loss},{64 * step},{1e9 * step},{0.7 * step},{loss},{2 * loss},{3 * loss},")
        rows += [f"{step},,,,,,,,{100 / step + draw.random()}"] if step % 50 == 0 else []
    (run.path / "metrics.csv").write_text("\n".join(rows) + "\n")
    if pictures:
        run.samples.mkdir()
        for name in ("step=00000050", "final"):
            Image.fromarray(draw.integers(0, 255, (40, 40), dtype=np.uint8)).save(run.samples / f"{name}.png")
    for nfe in nfes if level is not None else ():
        write_evaluation(run, config, nfe, level + 20 / nfe + 0.2 * seed + 0.05 * draw.standard_normal(), draw)
    return run


def write_evaluation(run, config, nfe, mean, draw):
    without = torch.tensor(mean + 0.01 * draw.standard_normal(10))
    value = jackknifed("fd_digits", mean, without, 1000, "float64", bias=0.0)
    sampler = config["sampler"] | {"steps": nfe}
    protocol = {"extractor": "digits", "num_samples": 1000, "nfe": nfe, "sampler": sampler, "step": 100}
    protocol["reference"] = {"data": "digits", "split": "test", "images": 360, "fingerprint": "fc7b"}
    hashed = fingerprint({key: value for key, value in protocol.items() if key != "step"})
    settings = {"sampler": sampler, "choices": config["choices"], "schedule": config["schedule"]}
    machine = {"device": "NVIDIA H100", "processes": 1, "commit": "abc123", "dirty": False, "host": "node8"}
    evaluation = Evaluation(
        {"fd_digits": value},
        protocol | {"seed": config["seed"], "identity": run.path.parent.name[-10:]},
        hashed,
        {"sampling": 0.5 * nfe, "total": 0.6 * nfe},
        settings=settings,
        command="diffx evaluate repeat=…",
        environment=machine,
    )
    run.evaluations.mkdir(exist_ok=True)
    evaluation.save(run.evaluations / f"step=00000100-{hashed}.json")


@pytest.fixture(scope="session")
def sweep(tmp_path_factory):
    """2 × 2 arms of two seeds each, evaluated at two NFE; without pictures of one arm."""
    root = tmp_path_factory.mktemp("sweep")
    for (schedule, parameterization), level in ARMS.items():
        for seed in (0, 1, 2):
            pictures = (schedule, parameterization) != ("linear", "v")
            write_run(root, schedule, parameterization, seed, level, pictures=pictures)
    return root


@pytest.fixture(scope="session")
def page(sweep, tmp_path_factory):
    """The report of the sweep."""
    out = tmp_path_factory.mktemp("page") / "report.html"
    assert command(["report", str(sweep), "--out", str(out), "--baseline", "schedule=linear,parameterization=eps"]) == 0
    return out


# ---- the page as text ----


def test_says_all_that_was_asked_for(page):
    text = page.read_text()
    for heading in (
        "The answer",
        "Comparison",
        "Samples",
        "Learning curves",
        "Loss by noise level",
        "Quality and cost",
    ):
        assert f">{heading}</h2>" in text
    for words in ("cosine, v", "cosine, eps", "linear, v", "linear, eps", "better", "12 runs of 4 arms: 12 finished"):
        assert words in text
    assert "Do schedule (cosine or linear) and parameterization (eps or v) change fd_digits on ablation" in text
    assert "after 100 training steps?" in text
    # where the numbers come from, and how to get them again
    for words in ("abc123", "node7", "NVIDIA H100", "2.15.0", "diffx train -m schedule=linear,cosine", "repeat="):
        assert words in text
    assert "No pictures of linear, v" in text


def test_loads_nothing_and_is_not_too_large(page):
    text = page.read_text()
    assert "http" not in re.sub(r'http-equiv="[^"]*"', "", text)
    assert not re.findall(r"<(?:link|iframe|object)\b|@import|url\(", text)
    assert {source[:5] for source in re.findall(r'\bsrc="([^"]*)"', text)} == {"data:"}
    assert "default-src 'none'" in text
    assert page.stat().st_size < 3_000_000


def test_every_arm_has_its_pictures_and_everything_a_name(page):
    text = page.read_text()
    assert len(re.findall(r'<img src="data:image/png', text)) == 3 * 2  # three arms with pictures, at two steps
    assert all(re.search(r'alt="[^"]+"', tag) for tag in re.findall(r"<img[^>]*>", text))
    assert len(re.findall(r"<table", text)) == len(re.findall(r"<caption", text))
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    for name in re.findall(r'aria-(?:labelledby|describedby)="([^"]+)"', text) + re.findall(r'href="#([^"]+)"', text):
        assert name in ids


def test_same_inputs_same_bytes_in_any_order(sweep, tmp_path, monkeypatch):
    monkeypatch.setattr("diffx.report.report._on_paper", lambda plot, folder: [])  # slow, and compared below
    arms = sorted(map(str, (sweep / "ablation").iterdir()))
    said = []
    for order in (arms, arms[::-1]):
        assert command(["report", *order, "--out", str(tmp_path / "report.html")]) == 0
        said.append((tmp_path / "report.html").read_bytes())
    assert said[0] == said[1]


def test_figures_are_the_same_bytes_too(tmp_path):
    line = Line("a", [1, 2, 4], [3.0, 2.0, 1.0], [2.5, None, 0.5], [3.5, None, 1.5])
    chart = Chart([line], "NFE", "fid", log_x=True, mark=2.0)
    for name in ("x.svg", "x.pdf"):
        plot_chart(chart, tmp_path / name)
        first = (tmp_path / name).read_bytes()
        plot_chart(chart, tmp_path / name)
        assert (tmp_path / name).read_bytes() == first


def test_plots_for_a_paper(page):
    folder = page.with_name("report_figures")
    names = {file.stem for file in folder.iterdir()}
    assert {
        "comparison",
        "learning-loss",
        "learning-fd_digits",
        "noise-levels",
        "cost-NFE",
        "main-effects-schedule",
    } <= names
    for name in names:
        assert (folder / f"{name}.pdf").read_bytes().startswith(b"%PDF")
        assert b"<svg" in (folder / f"{name}.svg").read_bytes()


# ---- what is missing is said ----


def rendered(root, *arguments):
    out = root / "report.html"
    assert command(["report", str(root), "--out", str(out), *arguments]) == 0
    return out.read_text()


def test_nothing_measured_yet(tmp_path):
    write_run(tmp_path, "linear", "eps", 0)
    write_run(tmp_path, "cosine", "eps", 0, state="running")
    text = rendered(tmp_path)
    assert "There is no answer yet" in text
    assert "cosine, seed 0: not finished, last seen as running at step 40." in text
    assert 'id="plot-learning"' in text  # the rest is shown
    assert "data:image/png" in text


def test_runs_are_chosen_by_key(tmp_path):
    for schedule in ("linear", "cosine"):
        for seed in (0, 1):
            write_run(tmp_path, schedule, "eps", seed, 5.0, nfes=[20])
    text = rendered(tmp_path, "schedule=linear,cosine", "seed=1", "title=One seed")
    assert "2 runs of 2 arms" in text
    assert "<h1>One seed</h1>" in text
    assert "seed=1" in text


def test_a_single_run(tmp_path):
    write_run(tmp_path, "linear", "eps", 0, 5.0, nfes=[20])
    text = rendered(tmp_path)
    assert "one seed" in text.lower()
    assert "no main effects to show" in text


def test_broken_runs_are_named(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path, "linear", "eps", seed, 5.0)
        write_run(tmp_path, "cosine", "eps", seed, 4.0, pictures=False)
    failed = write_run(tmp_path, "cosine", "v", 0, state="failed")
    (failed.samples / "final.png").write_bytes(b"no picture")
    damaged = write_run(tmp_path, "linear", "v", 0, 4.0)
    damaged.config_file.write_text("name: [")
    torn = next(write_run(tmp_path, "linear", "v", 1, 4.0).evaluations.iterdir())
    torn.write_text("{")
    text = rendered(tmp_path)
    assert f"{damaged.path} is left out" in text
    assert f"{torn} is left out" in text
    assert "cosine, v, seed 0: failed at step 40 (loss is NaN)" in text
    assert "cannot be read" in text
    assert "No pictures of cosine, eps" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--metric", "fd_digit"], "fd_digits"),
        (["--by", "shedule"], "schedule"),
        (["--baseline", "schedule=cosin"], "cosine"),
        (["--out", "report.pdf"], ".html"),
        (["--titel", "x"], "--title"),
    ],
)
def test_mistakes_are_one_sentence(sweep, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DiffxError, match=re.escape(words)) as error:
        command(["report", str(sweep), *arguments])
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_no_folder_and_no_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DiffxError, match="folder"):
        command(["report"])
    with pytest.raises(DiffxError, match="no run below"):
        command(["report", str(tmp_path)])


# ---- numbers ----


def factorial(shift, seeds=(0, 1, 2), missing=()):
    """y = a + b + shift·ab, with noise that all runs of a seed share."""
    runs = []
    for a in (0, 1):
        for b in (0, 1):
            if (a, b) not in missing:
                values = [2 * a + b + shift * a * b + 0.5 * seed for seed in seeds]
                levels = {"a": str(a), "b": str(b)}
                runs += [Observation(levels, seed, y, 0.1) for seed, y in zip(seeds, values, strict=True)]
    return runs


def test_main_effects_and_interaction_of_a_known_table():
    found = effects(factorial(4.0), ["a"])
    assert [round(mean.value, 9) for mean in found.means] == [1.0, 5.0]
    assert found.contrasts[0].value == pytest.approx(4.0)  # 2 + 4 / 2
    # what all runs of a seed share is no difference between levels
    assert found.contrasts[0].interval == pytest.approx((4.0, 4.0))
    assert found.means[0].interval[1] - found.means[0].value == pytest.approx(4.302653 * 0.5 / 3**0.5)
    assert effects(factorial(4.0), ["a", "b"]).contrasts[0].value == pytest.approx(4.0)
    assert effects(factorial(0.0), ["a", "b"]).contrasts[0].value == pytest.approx(0.0)


def test_unbalanced_tables_compare_like_with_like():
    found = effects(factorial(4.0, missing=[(1, 1)]), ["a"])
    assert (found.combinations, found.omitted) == (1, 1)
    assert found.contrasts[0].value == pytest.approx(2.0)  # at b = 0 only
    assert effects(factorial(0.0, missing=[(1, 1)]), ["a", "b"]) is None


def test_a_lost_run_costs_its_own_combination_only():
    runs = [
        Observation({"a": str(a), "b": str(b)}, seed, 3 * a + b + 0.1 * a * seed)
        for a in (0, 1)
        for b in (0, 1, 2)
        for seed in (0, 1, 2)
        if (a, b, seed) != (1, 2, 0)
    ]
    found = effects(runs, ["a"])
    assert (found.combinations, found.omitted) == (2, 1)
    assert found.contrasts[0].seeds == 3
    assert found.contrasts[0].value == pytest.approx(3.1)
    assert found.contrasts[0].distinguishable


def test_one_seed_has_the_interval_of_its_images():
    found = effects(factorial(0.0, seeds=(0,)), ["a"]).contrasts[0]
    assert found.seeds == 1
    assert found.interval[1] - found.value == pytest.approx(2.262157 * 0.1)  # four values of stderr 0.1, each by half
    bare = [Observation(run.levels, run.seed, run.value) for run in factorial(0.0, seeds=(0,))]
    assert effects(bare, ["a"]).contrasts[0].interval is None


def test_numbers_have_the_digits_that_they_deserve():
    assert number(3.14159, 0.02) == "3.142"
    assert number(-447.62, 9.0) == "−447.6"
    assert number(447.62, 30.0) == "448"
    assert number(None) == number(float("nan")) == "–"
    assert number(0.00001234) == "1.234e-05"
    assert interval(1.2345, 1.3345) == "1.234 to 1.335"


def test_logarithmic_axes_have_whole_labels():
    assert (decades([2, 20, 0.2]), decades([0, 1]), decades([])) == (pytest.approx(2), 0, 0)
    assert log_ticks([5, 10, 20, 20]) == [5, 10, 20]
    assert log_ticks([0.9, 1.0, 1.1, 3, 4, 5, 6, 7, 8, 30]) == [1, 2, 5, 10, 20]
    assert log_ticks([1e-4 * 1.3**k for k in range(60)]) == [1e-4, 1e-3, 1e-2, 1e-1, 1, 10, 100]


# ---- in a browser ----


@pytest.fixture(scope="session")
def browser():
    """Headless Chromium."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("there is no Chromium on this machine")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def tab(browser, page):
    """The page from its file, with a list of everything that went wrong and of everything it asked for."""
    wrong = []
    tab = browser.new_page()
    tab.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.on("request", lambda request: None if request.url.startswith(("file:", "data:")) else wrong.append(request.url))
    tab.goto(page.as_uri())
    tab.wait_for_selector("html[data-plots=drawn]")
    return tab, wrong


@pytest.fixture
def opened(tab):
    """The open page, as on a light screen."""
    tab, wrong = tab
    tab.set_viewport_size({"width": 1000, "height": 800})
    tab.emulate_media(media="screen", color_scheme="light")
    yield tab
    assert wrong == []


def test_plots_are_drawn_and_change(opened):
    boxes = opened.locator(".plot")
    assert boxes.count() == 6
    for k in range(boxes.count()):
        assert boxes.nth(k).locator(".live svg.main-svg").first.is_visible()
        assert not boxes.nth(k).locator("img.static").is_visible()
    title = opened.locator("#live-learning .xtitle")
    assert title.text_content() == "training steps"
    opened.locator("#plot-learning").get_by_label("training FLOPs").check()
    assert "FLOP]" in title.text_content()
    opened.locator("#plot-learning").get_by_label("fd_digits").check()
    assert opened.locator("#live-learning .ytitle").text_content() == "fd_digits during training"


def test_tables_sort_by_click_and_by_key(opened):
    table = opened.locator("#comparison-table")
    head = table.get_by_role("columnheader", name=re.compile("^fd_digits"))

    def first():
        return [cell.strip() for cell in table.locator("tbody tr").first.locator("td").all_text_contents()[:2]]

    head.get_by_role("button").click()
    assert (head.get_attribute("aria-sort"), first()) == ("ascending", ["cosine", "v"])
    head.get_by_role("button").focus()
    opened.keyboard.press("Enter")
    assert (head.get_attribute("aria-sort"), first()) == ("descending", ["linear", "eps"])
    assert "descending" in opened.locator("#said").text_content()


def test_the_slider_changes_the_pictures(opened):
    opened.locator("#step").focus()
    opened.keyboard.press("ArrowLeft")
    assert opened.locator("#step-shown").text_content() == "step 50"
    shown = opened.locator(".gallery img:visible")
    assert shown.count() == 3
    assert {shown.nth(k).get_attribute("data-step") for k in range(3)} == {"50"}


def test_light_dark_and_paper(opened):
    def back():
        return opened.evaluate("getComputedStyle(document.body).backgroundColor")

    def letters():
        return opened.evaluate("getComputedStyle(document.querySelector('#live-learning .xtitle')).fill")

    assert back() == "rgb(255, 255, 255)"
    light = letters()
    opened.emulate_media(color_scheme="dark")
    assert back() != "rgb(255, 255, 255)"
    assert letters() != light
    opened.get_by_role("button", name="Light colours").click()
    assert (back(), letters()) == ("rgb(255, 255, 255)", light)
    opened.emulate_media(media="print", color_scheme="dark")
    assert back() == "rgb(255, 255, 255)"
    assert opened.locator("#plot-learning img.static").is_visible()
    assert not opened.locator("#live-learning").is_visible()
    assert not opened.locator("#theme").is_visible()


def test_a_narrow_screen_scrolls_tables_not_the_page(opened):
    opened.set_viewport_size({"width": 400, "height": 800})
    assert opened.evaluate("document.documentElement.scrollWidth") <= 400


def test_without_scripts_everything_is_there(browser, page):
    context = browser.new_context(java_script_enabled=False)
    tab = context.new_page()
    tab.goto(page.as_uri())
    assert tab.locator("#plot-comparison img.static").is_visible()
    assert tab.locator("#comparison-table tbody tr").count() == 4
    assert tab.locator(".gallery img:visible").count() == 3
    assert not tab.locator("#theme").is_visible()
    context.close()


def test_a_browser_that_cannot_unpack_says_so(browser, page):
    tab = browser.new_page()
    tab.add_init_script("delete window.DecompressionStream")
    tab.goto(page.as_uri())
    assert tab.locator("#no-plots").is_visible()
    assert tab.locator("#plot-learning img.static").is_visible()
    tab.close()
