"""Links of documents and of docstrings lead to what is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
CODE = sorted(
    path for name in ("cvmatch", "tools", "benchmarks") for path in ROOT.rglob(f"{name}/**/*.py")
)


def anchors(document: Path) -> set[str]:
    """The anchors of a document's headings, as common hosts make them."""
    headings = re.findall(r"^#+ +(.*)$", document.read_text("utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_of_a_document_lead_to_files_and_headings(document):
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", document.read_text("utf-8")):
        name, _, anchor = target.partition("#")
        file = (document.parent / name).resolve() if name else document
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_links_of_code_lead_to_headings():
    links = [
        (path.name, *link)
        for path in CODE
        for link in re.findall(r"\b(docs/[\w-]+\.md)(?:#([\w-]+))?", path.read_text("utf-8"))
    ]
    assert links
    for name, document, anchor in links:
        assert (ROOT / document).exists(), (name, document)
        assert not anchor or anchor in anchors(ROOT / document), (name, document, anchor)
