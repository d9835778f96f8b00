"""What README and docs name exists: the tests that prove their claims, the files and the headings that they link to."""

import re
from pathlib import Path

import pytest
from conftest import ROOT

pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
of_each_page = pytest.mark.parametrize("page", pages, ids=lambda page: page.name)


def prose(page: Path) -> str:
    return re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:  # of the headings, as GitHub makes them
    titles = re.findall(r"^#+ +(.+?) *$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@of_each_page
def test_each_test_that_is_named_exists(page):
    for file, name in re.findall(r"`(test_\w+)::(\w+)`", page.read_text()):
        assert f"\ndef {name}(" in (ROOT / "tests" / f"{file}.py").read_text(), f"{file}::{name}"


def test_each_line_of_what_survives_what_names_a_test():
    section = (ROOT / "docs" / "faults.md").read_text().split("\n## ")[1]
    lines = re.findall(r"^\| (?!case ).*", section, re.MULTILINE)
    assert len(lines) > 50
    assert not [line for line in lines if not re.search(r"\| `test_\w+::\w+`[^|]* \|$", line)]


@of_each_page
def test_each_link_within_the_repository_leads_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        file, _, anchor = link.partition("#")
        target = (page.parent / file) if file else page
        assert "://" in link or (target.exists() and (not anchor or anchor in anchors(target))), link
