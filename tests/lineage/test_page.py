"""The audit's page: a reader clicks from a number to its pictures."""

import hashlib
import re
from pathlib import Path

import pytest

from tests.browser import Page, needs_chromium, opened
from tests.flows.service import until
from tests.mini_project import run

IN_VIEW = "(r => r.top < innerHeight / 2 && r.bottom > 0)(document.getElementById('%s').getBoundingClientRect())"
BACK = ("score", "export", "train", "draw")  # from the number to the shards


@pytest.fixture
def written(project: Path) -> Path:
    run("python", "-m", "tve_pipeline.cli", "audit", "--html", "audit.html", cwd=project)
    return project / "audit.html"


def test_every_link_leads_to_a_place_on_the_page_and_none_away_from_it(written: Path) -> None:
    text = written.read_text()
    targets, places = re.findall(r'href="([^"]+)"', text), set(re.findall(r'id="([^"]+)"', text))
    assert targets
    assert {target.removeprefix("#") for target in targets} <= places
    assert "<script" not in text
    assert not re.search(r'(src|href)="(https?:)?//', text)


def link(page: Page, scope: str, text: str) -> str:
    """A selector of the link in `scope` whose words contain `text`."""
    number = page.value(
        f"[...document.querySelectorAll('{scope} a')].findIndex(each => each.textContent.includes({text!r}))"
    )
    assert number >= 0, f"{scope}: no link to {text}"
    page.value(f"document.querySelectorAll('{scope} a')[{number}].dataset.test = '{scope} {text}'")
    return f'[data-test="{scope} {text}"]'


@needs_chromium
@pytest.mark.parametrize("width", [1100, 390], ids=["desk", "phone"])
def test_a_reader_clicks_from_a_number_to_the_shards(written: Path, project: Path, width: int) -> None:
    read = {"score": "models/mini/export", "export": "models/mini/model.bin", "train": "data/mini/shards"}
    with opened(written.as_uri(), width=width) as page:
        page.click(link(page, ".results", "results/mini/metrics.json"))
        for stage in BACK:
            assert page.value("location.hash") == f"#{stage}"
            until(lambda stage=stage: page.value(IN_VIEW % stage), f"{stage} scrolls into view", 10)
            if stage in read:
                page.click(link(page, f"#{stage}", read[stage]))
        page.click("#draw details summary")
        shown = page.value("document.querySelector('#draw details').innerText")
    for shard in sorted((project / "data" / "mini" / "shards").iterdir()):
        assert f"{shard.name} sha256 {hashlib.sha256(shard.read_bytes()).hexdigest()}" in " ".join(shown.split())


@needs_chromium
def test_a_box_of_the_graph_leads_to_its_stage(written: Path) -> None:
    with opened(written.as_uri()) as page:
        page.click("svg a[href='#train'] rect")
        assert page.value("location.hash") == "#train"
