"""One HTML page that needs no network: a verdict, then sections of text, charts and tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

from converter.errors import OutputError

try:
    from jinja2 import Environment, StrictUndefined
    from plotly import graph_objects as go
    from plotly.offline import get_plotlyjs
except ImportError as error:
    raise OutputError(f"report: must have plotly and Jinja2, got {error}. Install nmsparse[report].") from error

TEMPLATE = "page.html.jinja"
BLUE, RED = "#3b82c4", "#d55e00"  # 3:1 and more against the page, light and dark, and apart for the colour-blind


@dataclass(frozen=True)
class Line:
    """A sentence of the verdict, and whether it is good news."""

    text: str
    good: bool = True


@dataclass(frozen=True)
class Chart:
    """A drawing, and what it shows in words: its caption, and all that a screen reader has of it."""

    figure: go.Figure
    says: str

    def html(self, name: str) -> str:
        """Return the drawing as an element of the id `name`, for a page that has plotly's script."""
        text: str = self.figure.to_html(
            full_html=False,
            include_plotlyjs=False,
            div_id=name,
            config={"responsive": True, "displaylogo": False, "displayModeBar": False},
        )
        return text


@dataclass(frozen=True)
class Section:
    """A part of the page; its table is folded away where there are charts."""

    title: str
    text: str = ""
    charts: Sequence[Chart] = ()
    head: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    verbatim: str = ""


def page(title: str, verdict: Sequence[Line], sections: Sequence[Section]) -> str:
    """Return the page; whatever stands in its texts is text there, not HTML."""
    source = (resources.files("converter.delivery") / TEMPLATE).read_text("utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.from_string(source).render(
        title=title, verdict=verdict, sections=sections, plotly=get_plotlyjs()
    )


def bars(names: Sequence[str], series: dict[str, Sequence[float]], unit: str, says: str) -> Chart:
    """Return a chart with a bar for each name and series."""
    figure = go.Figure(
        [
            go.Bar(name=name, x=list(names), y=list(values), marker_color=color)
            for (name, values), color in zip(series.items(), (BLUE, RED), strict=False)
        ]
    )
    return Chart(_plain(figure, unit, 320), says)


def line(xs: Sequence[float], ys: Sequence[float], along: str, unit: str, says: str) -> Chart:
    """Return a chart of the points, joined in the order in which they are given."""
    figure = go.Figure(go.Scatter(x=list(xs), y=list(ys), mode="lines+markers", marker_color=BLUE))
    return Chart(_plain(figure, unit, 320).update_xaxes(title=along), says)


def intervals(names: Sequence[str], values: Sequence[tuple[float, float, float]], unit: str, says: str) -> Chart:
    """Return a chart with a point for each name, in its interval: low, value, high."""
    figure = go.Figure(
        go.Scatter(
            x=[value for _, value, _ in values],
            y=list(names),
            mode="markers",
            marker={"color": BLUE, "size": 10},
            error_x={
                "type": "data",
                "symmetric": False,
                "array": [high - value for _, value, high in values],
                "arrayminus": [value - low for low, value, _ in values],
                "color": BLUE,
            },
        )
    )
    figure = _plain(figure, "", 120 + 40 * len(names)).update_xaxes(title=unit)
    return Chart(figure.update_yaxes(autorange="reversed"), says)


def heat(
    rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float | None]], most: float, says: str
) -> Chart:
    """Return a map of the values `[row][column]`, in colours from 0 to `most`; None is left blank."""
    cells = go.Heatmap(
        x=list(columns),
        y=list(rows),
        z=[list(row) for row in values],
        zmin=0,
        zmax=most,
        colorscale="Cividis",
        xgap=1,
        ygap=1,
    )
    figure = _plain(go.Figure(cells), "", 140 + 28 * len(rows))
    figure.update_xaxes(title="block", type="category")
    return Chart(figure.update_yaxes(autorange="reversed"), says)


def _plain(figure: go.Figure, unit: str, height: int) -> go.Figure:
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 8, "r": 8, "t": 24, "b": 8},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        legend={"orientation": "h", "y": 1.1},
        dragmode=False,
    )
    figure.update_yaxes(title=unit, automargin=True)
    return figure.update_xaxes(automargin=True)
