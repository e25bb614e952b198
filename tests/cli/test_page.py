"""The page of ``hf-soap compare --html``: whole, self-contained, and alive in a real browser where there is one."""

import json
import math
import os
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from comparing import SETTINGS, TINY, ends_with, run_compare

from hf_soap.cli.compare.corpus import build_corpus
from hf_soap.cli.compare.page import charts, write_html
from hf_soap.cli.compare.sweep import Case, run_case

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="needs Chromium: apt-get install chromium")

LABELS = ["adamw_torch_fused", "soap:adam_modules=</script>&wte,one_sided=true"]
"""The second one would end the script that carries the data, if it were written as it stands."""


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    """Sweeps, two horizons and two seeds; of the second optimizer the largest learning rate diverges."""

    def case(optimizer: str, optim_args: str, steps: int) -> Case:
        base = replace(SETTINGS, optimizer=optimizer, optim_args=optim_args, lr=0.01, steps=steps)

        def loss(lr: float, seed: int) -> float:
            return 4 - 0.1 * math.log2(steps) - len(optim_args) / 1000 + abs(math.log2(lr / 0.01)) + seed / 10

        return run_case(
            base,
            lambda settings: ends_with(
                settings, math.nan if optim_args and settings.lr > 0.01 else loss(settings.lr, settings.seed)
            ),
            rates=3,
            widen=False,
            seeds=[0, 1],
        )

    return [case(*label.partition(":")[::2], steps) for label in LABELS for steps in (8, 16)]


@pytest.fixture(scope="module")
def page(cases: list[Case], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    (folder / "text.txt").write_text("abc" * 1000)
    corpus = build_corpus(folder / "text.txt", vocab_size=256, seq_len=8, max_held_out=4)
    write_html(folder / "out" / "report.html", cases, corpus)
    return folder / "out" / "report.html"


class Elements(HTMLParser):
    """Lists the elements of a page, and fails where they are not closed in the order in which they were opened."""

    VOID = frozenset({"meta", "input", "br", "link", "img"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, list[str]] = {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, self.getpos()

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.text.setdefault(self.open[-1] if self.open else "", []).append(data.strip())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def test_page_is_well_formed_and_accessible(page: Path) -> None:
    elements = Elements(page.read_text(encoding="utf-8"))
    assert elements.open == []
    assert elements.all("html") == [{"lang": "en"}]
    assert len(elements.text["title"]) == 1
    assert len(elements.all("h1")) == len(elements.all("main")) == 1
    ids = [attributes["id"] for _, attributes in elements.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in elements.found:
        for key in ("aria-labelledby", "for"):
            assert attributes.get(key) in (None, *ids)
    assert all(attributes.get("scope") for attributes in elements.all("th"))
    assert all(attributes.get("aria-label") for attributes in elements.all("svg"))
    assert len(elements.all("label")) == len(elements.all("input"))


def test_page_loads_nothing(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"https?:|@import|url\(|//[a-z]+\.[a-z]", text)
    for _, attributes in Elements(text).found:
        assert not attributes.keys() & {"src", "href", "srcset", "action"}
    assert "default-src 'none'" in text


def test_page_says_what_the_table_says(page: Path, cases: list[Case]) -> None:
    elements = Elements(page.read_text(encoding="utf-8"))
    cells = elements.text["td"]
    for case in cases:
        assert f"{case.mean_loss:.4f} ± 0.0707" in cells
    assert LABELS[1] in elements.text["th"]
    assert "16, 100 %" in cells
    assert "0.005" not in cells, "only the best rate of each stands in the table"
    assert "adamw_torch_fused, 8 steps: 0.005 → 4.7000, 0.01 → 3.7000, 0.02 → 4.7000" in elements.text["li"]


def test_diverged_runs_are_gaps_in_a_chart(cases: list[Case]) -> None:
    curves, sweep, horizons = charts(cases)
    assert [chart["id"] for chart in (curves, sweep, horizons)] == ["curves", "sweep", "horizons"]
    assert sweep["series"][2]["mean"][2] is None
    assert sweep["series"][0]["x"] == {"lr": [0.005, 0.01, 0.02]}
    assert horizons["series"][0] == {
        "label": LABELS[0],
        "name": LABELS[0],
        "x": {"length": [8, 16]},
        "mean": pytest.approx([3.75, 3.65]),
        "low": pytest.approx([3.7, 3.6]),
        "high": pytest.approx([3.8, 3.7]),
    }
    json.dumps(charts(cases), allow_nan=False)


def test_compare_writes_the_page(tmp_path: Path) -> None:
    page = tmp_path / "pages" / "report.html"
    (tmp_path / "text.txt").write_text("abc" * 1000)
    paths = ["--data", tmp_path / "text.txt", "--output-dir", tmp_path / "out", "--html", page]
    result = run_compare("adamw", "--steps", 2, *TINY, *paths)
    assert result.exit_code == 0, result.output
    (chart,) = json.loads(re.search(r'type="application/json">(.*?)</script>', page.read_text())[1])
    assert chart["series"][0]["x"]["step"] == [0, 1, 2]


def browse(page: Path, fragment: str, *options: str) -> str:
    """Opens the page in a browser and returns it as its script left it; what it wrote to the console is an error."""
    done = subprocess.run(
        [
            str(BROWSER),
            *("--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"),
            f"--user-data-dir={page.parent / 'profile'}",
            *(options or ["--dump-dom"]),
            f"{page.as_uri()}{fragment}",
        ],
        capture_output=True,
        check=True,
        text=True,
        timeout=120,
        env={**os.environ, "HOME": str(page.parent)},
    )
    assert "CONSOLE" not in done.stderr, done.stderr
    return done.stdout


def drawn(dom: str, chart: str) -> str:
    return re.search(rf'<svg id="{chart}".*?</svg>', dom, flags=re.DOTALL)[0]


@needs_browser
def test_script_draws_every_curve(page: Path) -> None:
    dom = browse(page, "")
    assert {chart: drawn(dom, chart).count("<polyline") for chart in ("curves", "sweep", "horizons")} == {
        "curves": 4,
        "sweep": 4,
        "horizons": 2,
    }
    assert drawn(dom, "curves").count("<polygon") == 4, "a band per curve of two seeds"
    assert "NaN" not in dom
    # The diverged run has no point.
    assert drawn(dom, "sweep").count("<circle") == 2 * 3 + 2 * 2


@needs_browser
def test_an_optimizer_is_hidden_and_values_are_read_out(page: Path) -> None:
    dom = browse(page, "#hide=adamw_torch_fused&axis=step&at=7.6")
    names = re.findall(r'data-name="([^"]*)"', drawn(dom, "curves"))
    assert len(names) == 2
    assert all(name.startswith("soap:") for name in names)
    assert drawn(dom, "horizons").count("<polyline") == 1
    readout = re.search(r'<output id="curves-values".*?</output>', dom, flags=re.DOTALL)[0]
    assert "Training step 8: " in readout
    assert readout.count("<span>") == 2
    assert drawn(dom, "curves").count('class="cursor"') == 1


@needs_browser
def test_page_answers_clicks_and_the_pointer(page: Path) -> None:
    """What a hand would do, by a script behind the page's own; the address then says what is shown."""
    hand = """
        document.querySelector("#legend input").click();
        document.querySelector("input[value=seconds]").click();
        const chart = document.getElementById("curves"), box = chart.getBoundingClientRect();
        chart.dispatchEvent(new PointerEvent("pointermove", { clientX: box.right - 20, clientY: box.top + 50 }));
        document.getElementById("sweep").dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight" }));
        document.title = location.hash;
    """
    touched = page.with_name("touched.html")
    touched.write_text(page.read_text(encoding="utf-8").replace("</body>", f"<script>{hand}</script></body>"))
    dom = browse(touched, "")
    assert "<title>#hide=adamw_torch_fused&amp;axis=seconds</title>" in dom
    assert drawn(dom, "curves").count("<polyline") == 2
    assert re.search(r"Seconds of training[^<]* 2: </b><span>soap:", dom)
    assert "Peak learning rate 0.01: </b>" in dom


@needs_browser
def test_what_goes_wrong_in_the_browser_is_noticed(page: Path) -> None:
    broken = page.with_name("broken.html")
    broken.write_text(page.read_text(encoding="utf-8").replace("\nreadAddress();", "\nreadAdress();"))
    with pytest.raises(AssertionError, match="readAdress is not defined"):
        browse(broken, "")


@needs_browser
def test_axis_and_zoom_change_what_is_drawn(page: Path) -> None:
    def labels(dom: str) -> list[str]:
        return re.findall(r"<text[^>]*>([^<]*)</text>", drawn(dom, "curves"))

    steps, seconds, zoomed = (labels(browse(page, part)) for part in ("", "#axis=seconds", "#zoom=1"))
    assert "Training step" in steps
    assert any(label.startswith("Seconds") for label in seconds)
    assert {"0", "16"} <= set(steps)
    assert "8" in zoomed
    assert "0" not in zoomed


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_follows_the_colour_scheme(page: Path, tmp_path: Path, scheme: str) -> None:
    from matplotlib.image import imread

    picture = tmp_path / "picture.png"
    dark = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    browse(page, "", f"--screenshot={picture}", "--window-size=1000,1200", *dark)
    pixels = imread(picture)[..., :3]
    background = pixels[2, 2].mean()
    assert background < 0.2 if scheme == "dark" else background > 0.9
    # Something colourful is drawn on it.
    assert ((pixels.max(-1) - pixels.min(-1)) > 0.4).sum() > 500
