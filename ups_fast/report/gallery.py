"""Samples in a page: pictures with a caption each, or lines of a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import NamedTuple

from ups_fast.report.thumbnails import Thumbnail

STYLE = """
:root { --good: #2f855a; --bad: #d64545; }
@media (prefers-color-scheme: dark) { :root { --good: #48bb78; --bad: #f56565; } }
.groups { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.25rem; }
.groups > b { max-width: 9rem; padding-top: .2rem; font-weight: 600; overflow-wrap: anywhere; }
.groups > b span { display: block; color: var(--muted); font-weight: 400; font-size: .8rem; }
.pictures { display: flex; flex-wrap: wrap; gap: .35rem .5rem; margin: 0 0 .6rem; }
figure { width: 5.1rem; margin: 0; font-size: .72rem; line-height: 1.35; font-variant-numeric: tabular-nums; }
figure img { display: block; max-width: 100%; height: auto; margin: 3px 0 .35rem 3px; border-radius: 3px;
  image-rendering: pixelated; box-shadow: 0 0 0 1px var(--rule); }
figure.wrong img, figure.wrong .lost { box-shadow: 0 0 0 2px var(--ground), 0 0 0 4px var(--bad); }
figure .smooth { image-rendering: auto; }
figure .lost { box-sizing: border-box; width: 64px; height: 64px; margin: 3px 0 .35rem 3px; padding: .3rem;
  border-radius: 3px; background: var(--tint); color: var(--muted); box-shadow: 0 0 0 1px var(--rule); }
figcaption span, figcaption b { display: block; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
figcaption span { color: var(--muted); }
.is { color: var(--bad) !important; }
.heat { margin: 1rem 0 1.5rem; }
.heat table { font-size: .82rem; }
.heat th, .heat td { min-width: 1.6rem; max-width: 8rem; padding: .25rem .4rem; text-align: center; border: 0;
  overflow: hidden; text-overflow: ellipsis; }
.heat th:first-child { text-align: right; }
.heat .down { writing-mode: vertical-rl; transform: rotate(180deg); max-height: 8rem; text-align: left; }
.heat td { border: 1px solid var(--ground);
  background: color-mix(in srgb, var(--bad) calc(var(--p) * 1%), var(--tint)); }
.heat td.right { background: color-mix(in srgb, var(--good) calc(var(--p) * .6%), var(--tint)); }
"""

Pictures = Mapping[int, Thumbnail | str]  # by sample id; in place of one why it cannot be read


class Shown(NamedTuple):
    """A sample and what is said of it; "" is left out."""

    id: int
    title: str
    label: str
    confidence: str
    truth: str  # where the label is wrong
    note: str
    nearest: str  # labeled sample


class Group(NamedTuple):
    name: str
    size: str
    members: list[Shown]


@dataclass(frozen=True)
class Section:
    title: str
    about: str
    groups: list[Group]
    above: str = ""  # HTML
    note: str = "note"  # what the notes are


def page_of(sections: Sequence[Section], pictures: Pictures | None) -> str:
    """All sections as HTML, samples as pictures; without any as lines of tables."""
    parts = []
    for section in sections:
        about = f'<p class="muted">{escape(section.about)}</p>'
        parts.append(f"<h2>{escape(section.title)}</h2>\n{about}\n{section.above}")
        parts.append(_lines(section) if pictures is None else _figures(section, pictures))
    return "".join(parts)


def _figures(section: Section, pictures: Pictures) -> str:
    named = any(group.name for group in section.groups)
    rows = []
    for group in section.groups:
        name = f"<b>{escape(group.name)}<span>{escape(group.size)}</span></b>\n" if named else ""
        figures = "\n".join(_figure(each, pictures[each.id]) for each in group.members)
        rows.append(f'{name}<div class="pictures">\n{figures}\n</div>\n')
    text = "".join(rows)
    return f'<div class="groups">\n{text}</div>\n' if named else text


def _figure(each: Shown, picture: Thumbnail | str) -> str:
    title = escape(each.title)
    if isinstance(picture, str):
        image = f'<div class="lost" title="{escape(picture[:300])}">cannot be read</div>'
    else:
        smooth = ' class="smooth"' if picture.source.startswith("data:image/jpeg") else ""
        size = f'width="{picture.width}" height="{picture.height}"'
        image = f'<img{smooth} alt="{title}" {size} src="{picture.source}">'
    lines = [f'<b title="{escape(each.label)}">{escape(each.label)}</b>']
    lines += [f"<span>{escape(each.confidence)}</span>"] if each.confidence else []
    lines += (
        [f'<span class="is" title="{escape(each.truth)}">is {escape(each.truth)}</span>']
        if each.truth
        else []
    )
    lines += [f'<span title="{escape(each.note)}">{escape(each.note)}</span>'] if each.note else []
    wrong = ' class="wrong"' if each.truth else ""
    return f'<figure{wrong} title="{title}">{image}<figcaption>{"".join(lines)}</figcaption></figure>'


def _lines(section: Section) -> str:
    """A table of the samples. Columns that nothing stands in are left out."""
    rows = [(group, each) for group in section.groups for each in group.members]
    columns = {
        "row": [each.title for _, each in rows],
        "group": [f"{group.name} ({group.size})" if group.name else "" for group, _ in rows],
        "label": [each.label for _, each in rows],
        "confidence ± std": [each.confidence for _, each in rows],
        "true class": [each.truth for _, each in rows],
        section.note: [each.note for _, each in rows],
        "nearest labeled row": [each.nearest for _, each in rows],
    }
    kept = {name: cells for name, cells in columns.items() if any(cells)}
    return text_table(list(kept), list(zip(*kept.values(), strict=True))) + "\n" if kept else ""


def text_table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table of text as HTML."""

    def line(tag: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    lines = "\n".join(line("td", cells) for cells in body)
    return f'<div class="wide"><table>\n<thead>{line("th", head)}</thead>\n<tbody>\n{lines}\n</tbody></table></div>'


def confusion_table(
    classes: Sequence[str], counts: Sequence[Sequence[int]]
) -> str:  # [C], [C, C] truth by label
    """As HTML: a line for each true class, in which the root of a label's share gives its cell the color."""
    down = ' class="down"' if max(map(len, classes)) > 3 else ""
    head = "".join(f'<th title="{escape(name)}"><div{down}>{escape(name)}</div></th>' for name in classes)
    lines = []
    for a, row in enumerate(counts):
        total = max(1, sum(row))
        cells = ""
        for b, n in enumerate(row):
            right, share = " class=right" if a == b else "", 100 * math.sqrt(n / total)
            cells += f'<td{right} style="--p:{share:.0f}">{f"{n:,}" if n else ""}</td>'
        lines.append(f'<tr><th title="{escape(classes[a])}">{escape(classes[a])}</th>{cells}</tr>')
    body = "\n".join(lines)
    return (
        f'<div class="wide heat"><table>\n<caption class="muted">true class (lines) by label (columns)</caption>\n'
        f"<thead><tr><th></th>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>\n"
    )
