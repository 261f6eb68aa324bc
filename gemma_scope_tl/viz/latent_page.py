"""``feature_page``: a latent's page as one HTML file, or inline in a notebook."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.files import write_atomically
from gemma_scope_tl.model.positions import Positions
from gemma_scope_tl.text.batch import Text
from gemma_scope_tl.viz.figures import STYLE as FIGURE_STYLE
from gemma_scope_tl.viz.figures import grid
from gemma_scope_tl.viz.latent_facts import LatentFacts, PageText, latent_facts

if TYPE_CHECKING:
    import pandas as pd

    from gemma_scope_tl.model.hooked import GemmaModel
    from gemma_scope_tl.viz.latent_facts import Excerpt

COLOR = "#c2410c"
# !important is needed because the demo shows the page inside Gradio, which has its own rules for tables and colours.
STYLE = """
.gs-latent { font: 15px/1.5 system-ui, sans-serif; color: #1c1917; background: #fff; padding: 1.2rem; max-width: 70rem;
  margin: 0 auto; border-radius: 8px; }
.gs-latent { color: #1c1917 !important; }
.gs-latent * { color: inherit !important; }
.gs-latent h1, .gs-latent h2 { line-height: 1.2; margin: 0 0 .4rem; }
.gs-latent h1 { font-size: 1.45rem; } .gs-latent h2 { font-size: 1.05rem; margin-top: 1.4rem; }
.gs-latent p { margin: 0 0 .5rem; } .gs-latent a { color: #9a3412 !important; text-decoration: underline; }
.gs-latent .gs-sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: 1.4rem; }
.gs-latent img { max-width: 100%; height: auto; }
.gs-latent table { border-collapse: collapse; width: 100%; font-size: .9rem; }
.gs-latent table, .gs-latent thead, .gs-latent tbody, .gs-latent tr { border: 0 !important; background: none; }
.gs-latent th, .gs-latent td { text-align: left; padding: .12rem .4rem !important; border: 0 !important;
  border-bottom: 1px solid #e7e5e4 !important; }
.gs-latent th:last-child, .gs-latent td:last-child { text-align: right; font-variant-numeric: tabular-nums; }
.gs-latent code { font: .9em ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
  background: none; border: 0; padding: 0; }
.gs-latent ol { padding: 0 !important; margin: 0 !important; list-style: none; }
.gs-latent li { padding: .45rem 0; border-bottom: 1px solid #e7e5e4; display: grid; grid-template-columns: 4rem 1fr; }
.gs-latent li > b { font-weight: 500; font-variant-numeric: tabular-nums; }
.gs-tokens { white-space: pre-wrap; overflow-wrap: anywhere; }
.gs-tokens span { border-radius: 3px; padding: .08rem 0; }
.gs-tokens span.gs-peak { outline: 2px solid #9a3412; }
"""

_SIGNS = {"\n": "⏎", "\r": "␍", "\t": "⇥"}
_UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")


def token_text(token: str) -> str:
    """A token as visible text.

    Line breaks and tabs become symbols. Control characters, direction marks and lone surrogates become numbers, since
    they would be invisible or change the text around them.
    """
    return _UNSEEN.sub(lambda found: _SIGNS.get(found[0]) or f"\\u{ord(found[0]):04x}", token)


def token_spans(tokens: Sequence[str], values: Sequence[float], maximum: float, peak: int | None = None) -> str:
    """Tokens as HTML, coloured by their values.

    Args:
        tokens, values: tokens and their values.
        maximum: the value with the darkest colour; at 0 no token is coloured.
        peak: index of a token to outline.
    """
    spans: list[str] = []
    for i, (token, value) in enumerate(zip(tokens, values, strict=True)):
        share = min(max(value / maximum, 0.0), 1.0) if maximum > 0 else 0.0
        style = f' style="background:rgba(234,88,12,{0.12 + 0.6 * share:.2f})"' if share > 0 else ""
        mark = ' class="gs-peak"' if i == peak else ""
        title = f' title="{value:.3f}"' if share > 0 else ""
        spans.append(f"<span{mark}{style}{title}>{escape(token_text(token))}</span>")
    return f'<span class="gs-tokens">{"".join(spans)}</span>'


def latent_html(facts: LatentFacts) -> str:
    """The page's content as one element with its style, for a notebook or inside another page."""
    place = facts.site if facts.layer is None else f"{facts.site}, layer {facts.layer}"
    link = ""
    if facts.neuronpedia and facts.neuronpedia.startswith("https://"):
        address = escape(facts.neuronpedia)
        link = f' <a href="{address}" target="_blank" rel="noopener noreferrer">Neuronpedia</a>'
        link += f" ({escape(facts.neuronpedia_warning)})" if facts.neuronpedia_warning else ""
    lens = {str(kind): rows for kind, rows in facts.lens.groupby("kind")}
    sides = [
        _table("Promoted tokens", _token_rows(lens["promoted"]), ("token", "logit")),
        _table("Suppressed tokens", _token_rows(lens["suppressed"]), ("token", "logit")),
        _table("Similar latents", _neighbour_rows(facts.neighbours), ("latent", "decoder cosine")),
    ]
    return (
        f'<style>{STYLE}</style><div class="gs-latent"><h1>Latent {facts.latent}</h1>'
        f"<p>{escape(place)}; one of {facts.d_sae:,} of <code>{escape(facts.name)}</code>.{link}</p>"
        f"<p>{_firing(facts)}</p>{_histogram(facts)}"
        f'<div class="gs-sides">{"".join(sides)}</div>{_examples(facts.examples, facts.maximum)}</div>'
    )


def document(title: str, body: str) -> str:
    """A complete HTML file around ``body``, which may not load external resources."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title></head>'
        f"<body>{body}</body></html>\n"
    )


def _firing(facts: LatentFacts) -> str:
    if not facts.fired:
        return f"It fires on none of the {facts.tokens:,} tokens looked at."
    share = f"{facts.fired:,} of {facts.tokens:,} tokens ({facts.density:.2%})"
    return f"It fires on {share}, at most with {facts.maximum:.2f}."


def _histogram(facts: LatentFacts) -> str:
    if not facts.counts:
        return ""
    figure, [[ax]] = grid(1, 1, (6.4, 1.9))
    ax.stairs(facts.counts, facts.edges, fill=True, color=COLOR, alpha=0.85)
    ax.set_yscale("log")
    ax.set_ylim(bottom=0.7)
    ax.set_xlim(0, facts.edges[-1])
    ax.set_xlabel("activation", fontsize=FIGURE_STYLE.label)
    ax.set_ylabel("tokens", fontsize=FIGURE_STYLE.label)
    ax.tick_params(labelsize=FIGURE_STYLE.tick)
    ax.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    data = base64.b64encode(buffer.getvalue()).decode()
    words = f"Histogram of {facts.fired} activations from 0 to {facts.maximum:.2f}"
    return f'<h2>How strongly</h2><img width="640" alt="{words}" src="data:image/png;base64,{data}">'


def _table(title: str, rows: list[tuple[str, str]], heads: tuple[str, str]) -> str:
    lines = "".join(f"<tr><td>{first}</td><td>{second}</td></tr>" for first, second in rows)
    return (
        f"<div><h2>{title}</h2><table><thead><tr><th>{heads[0]}</th><th>{heads[1]}</th></tr></thead>"
        f"<tbody>{lines}</tbody></table></div>"
    )


def _token_rows(lens: pd.DataFrame) -> list[tuple[str, str]]:
    pairs = zip(lens["token"].tolist(), lens["logit"].tolist(), strict=True)
    return [(f"<code>{escape(repr(token))}</code>", f"{logit:+.3f}") for token, logit in pairs]


def _neighbour_rows(neighbours: pd.DataFrame) -> list[tuple[str, str]]:
    pairs = zip(neighbours["latent"].tolist(), neighbours["cosine"].tolist(), strict=True)
    return [(str(latent), f"{cosine:.3f}") for latent, cosine in pairs]


def _examples(examples: list[Excerpt], maximum: float) -> str:
    if not examples:
        return ""
    lines: list[str] = []
    for one in examples:
        spans = token_spans(one.tokens, one.activations, maximum, one.peak)
        lines.append(f"<li><b>{one.activations[one.peak]:.2f}</b>{spans}</li>")
    return f"<h2>Where it fires strongest</h2><ol>{''.join(lines)}</ol>"


@dataclass(frozen=True)
class FeaturePage:
    """A latent's page.

    Attributes:
        facts: the numbers on it.
        html: a complete HTML document without external resources.
    """

    facts: LatentFacts

    @property
    def html(self) -> str:
        return document(f"Latent {self.facts.latent} of {self.facts.name}", latent_html(self.facts))

    def save(self, path: str | PathLike[str]) -> Path:
        """Write the document atomically. Missing folders are created."""
        return write_atomically(path, self.html)

    def _repr_html_(self) -> str:
        return latent_html(self.facts)


def feature_page(
    model: GemmaModel,
    sae: Any,
    latent: int,
    text: PageText | Text | None = None,
    *,
    rows: int = 64,
    context: int = 128,
    positions: Positions = None,
    **counts: int,
) -> FeaturePage:
    """A latent's top activating examples, firing histogram, promoted and suppressed tokens, and similar latents.

    Args:
        model: a model from ``load_model``.
        sae: a whole SAE or transcoder.
        latent: index of the latent.
        text: texts or token ids, by default the held-out text in the package; a :class:`PageText` keeps its activations
            for further latents.
        rows, context: maximum number of rows, and number of tokens in a row, for texts or token ids.
        positions: the only positions of each row that count, as in :func:`~gemma_scope_tl.splice`; None for all, or for
            those of a :class:`PageText`.
        counts: ``examples``, ``around``, ``k``, ``neighbours`` of :func:`latent_facts`.

    Returns:
        A page that notebooks show, with ``.html`` and ``.save(path)``.

    Raises:
        SpliceError: the latent or one of the positions does not exist, or the SAE does not fit the model.
        GemmaScopeError: there is too little text, only some latents of the SAE are loaded, or positions were given
            beside a :class:`PageText`, which has its own.
    """
    if not isinstance(text, PageText):
        text = PageText(model, text, rows, context, positions=positions)
    elif positions is not None:
        raise GemmaScopeError("The text of the page has its own positions: give positions= to PageText.")
    return FeaturePage(latent_facts(text, sae, latent, **counts))
