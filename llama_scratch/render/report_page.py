"""The data model of a report, a page with a picture and sections.

`to_html` begins a report with the picture, and folds its sections. Terminal, plain text and PNG render the blocks of a
report like those of any other page.
"""

from __future__ import annotations

from dataclasses import dataclass

from llama_scratch.render.page import Finding, Heatmap, Page, PageBlock, Paragraph


@dataclass(frozen=True)
class Arcs:
    """The attention of one head from the last token.

    Args:
        head: Name of the head.
        row: Row of the stream that holds the output of the head's layer.
        links: Column of each token that it attends to, and its share. Column −1: before the first column.
        hover: Tooltip of the head's name.
    """

    head: str
    row: int
    links: tuple[tuple[int, float], ...]
    hover: str


@dataclass(frozen=True)
class Stream:
    """The residual stream of a text: one column per token, first layer at the bottom.

    Args:
        heatmap: The top prediction of each layer and token, from the embedding to the last layer.
        answer: The prediction after the text.
        probability: Its probability.
        ranks: The rank of the answer at each layer of the last token.
        arcs: The arcs of each head.
        shown: The head whose arcs are shown at first; "" for none.
    """

    heatmap: Heatmap
    answer: str
    probability: float
    ranks: tuple[int, ...]
    arcs: tuple[Arcs, ...] = ()
    shown: str = ""


@dataclass(frozen=True)
class Section:
    """A section of a report, folded under its title and its finding.

    Args:
        page: The view.
        anchor: Name of the component that the section is about; every mention of that name links to it.
    """

    page: Page
    anchor: str = ""

    @property
    def finding(self) -> str:
        """The sentence that the view begins with; "" if it has none."""
        return next((part.text for part in self.page.parts[:1] if isinstance(part, Finding)), "")

    @property
    def rest(self) -> tuple[PageBlock, ...]:
        """The blocks after the finding."""
        return self.page.parts[1:] if self.finding else self.page.parts


@dataclass(frozen=True, kw_only=True)
class ReportPage(Page):
    """A report, created by `report`. Its `parts` are all blocks, one after another.

    Args:
        prompt: The text.
        finding: The sentence that the report begins with.
        stream: The picture.
        aside: Blocks beside the picture.
        sections: The details.
    """

    prompt: str
    finding: Finding
    stream: Stream
    aside: tuple[PageBlock, ...]
    sections: tuple[Section, ...]


def report(
    prompt: str, finding: str, stream: Stream, aside: tuple[PageBlock, ...], sections: tuple[Section, ...]
) -> ReportPage:
    """Create a report.

    Args:
        prompt: The text.
        finding: The sentence that the report begins with.
        stream: The picture.
        aside: Blocks beside the picture.
        sections: The details.
    """
    first = Finding(finding)
    details = [part for each in sections for part in (Paragraph(each.page.title, "bold"), *each.page.parts)]
    return ReportPage(
        f"What comes after “{prompt}”",
        (first, stream.heatmap, *aside, *details),
        tuple(dict.fromkeys(name for each in sections for name in each.page.source)),
        prompt=prompt,
        finding=first,
        stream=stream,
        aside=aside,
        sections=sections,
    )
