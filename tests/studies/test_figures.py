"""The studies' figures draw what the tables hold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.viz import study_figures
from gemma_scope_tl.viz.figures import save_figure


def _suite() -> pd.DataFrame:
    rows = [
        {"site": site, "layer": layer, "d_sae": d, "id": f"{layer}/{d}/{l0}", "l0": l0, "fvu": 1 / l0 + layer}
        for site in ("res", "mlp")
        for layer in (0, 1)
        for d in (256, 1024)
        for l0 in (40.0, 10.0, 20.0)
    ]
    rows.append({"site": "embedding", "layer": None, "d_sae": 256, "id": "e", "l0": 5.0, "fvu": 0.3})
    table = pd.DataFrame(rows)
    table["delta_loss"] = table["fvu"] / 3
    table["uniformity"], table["uniformity_low"], table["uniformity_high"] = 0.6, 0.5, 0.7
    return table


def test_fidelity_draws_a_line_per_layer_and_width_in_the_order_of_l0() -> None:
    figure = study_figures.fidelity_figure(_suite())
    axes = figure.axes
    assert [ax.get_title() for ax in axes] == ["res", "mlp", "embedding"] * 2
    assert axes[0].get_ylabel() == "delta loss, nats"
    assert [len(ax.lines) for ax in axes] == [4, 4, 1] * 2
    line = axes[3].lines[3]  # FVU of res, layer 1, 1,024 latents
    assert list(line.get_xdata()) == [10, 20, 40]
    np.testing.assert_allclose(line.get_ydata(), [1.1, 1.05, 1.025])
    assert line.get_label() == "layer 1, 1024 latents"
    assert axes[0].get_xscale() == axes[0].get_yscale() == "log"
    assert len({(entry.get_color(), entry.get_linestyle()) for entry in axes[0].lines}) == 4


def test_a_splice_that_lowers_the_loss_is_drawn_on_a_plain_axis() -> None:
    table = _suite()
    table.loc[0, "delta_loss"] = -0.01
    figure = study_figures.fidelity_figure(table)
    assert figure.axes[0].get_yscale() == "linear"
    assert figure.axes[1].get_yscale() == "log"


def test_logarithmic_axes_have_few_plain_numbers() -> None:
    figure = study_figures.fidelity_figure(_suite())
    figure.canvas.draw()
    axis = figure.axes[0].xaxis
    shown = [label.get_text() for label in axis.get_majorticklabels()]
    assert {"10", "20"} <= set(shown) and all(text.replace(".", "").isdecimal() for text in shown)
    assert not any(label.get_text() for label in axis.get_minorticklabels())


def test_uniformity_shows_intervals(tmp_path: Path) -> None:
    figure = study_figures.uniformity_figure(_suite())
    bars = figure.axes[0].collections[0].get_segments()
    assert [bar[:, 1].tolist() for bar in bars] == [[0.5, 0.7]] * 3
    assert save_figure(figure, tmp_path / "u.png").read_bytes().startswith(b"\x89PNG")


def test_positions_are_the_middles_of_bins() -> None:
    table = pd.DataFrame({"site": "res", "layer": 1, "id": "a", "start": [1, 2, 6], "stop": [2, 6, 16]})
    for name in ("squared_error", "fvu", "delta_loss"):
        table[name] = [3.0, 2.0, 1.0]
    lines = [ax.lines[0] for ax in study_figures.position_figure(table).axes]
    assert [list(line.get_xdata()) for line in lines] == [[1, 3.5, 10.5]] * 3


def test_frequencies_are_stairs_of_shares_with_a_colour_per_width() -> None:
    rows = [
        {"site": "res", "layer": layer, "id": f"{d}", "d_sae": d, "low": low, "high": low + 1, "share": s, "dead": 0.1}
        for layer in (0, 1)
        for d in (256, 1024)
        for low, s in ((-2.0, 0.5), (-1.0, 0.4))
    ]
    (ax,) = study_figures.frequency_figure(pd.DataFrame(rows)).axes
    data = [patch.get_data() for patch in ax.patches]
    assert [list(part.values) for part in data] == [[0.5, 0.4]] * 4
    assert list(data[0].edges) == [-2, -1, 0]
    colors = [patch.get_edgecolor() for patch in ax.patches]
    assert colors[0] == colors[2] != colors[1] == colors[3]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["256 latents", "1,024 latents"]


def test_domains_go_from_best_to_worst() -> None:
    table = pd.DataFrame({"domain": ["a", "b", "c"] * 2, "site": ["res"] * 3 + ["mlp"] * 3})
    table["delta_loss"] = table["fvu"] = [0.3, 0.1, 0.2, 0.5, 0.1, 0.2]
    ax = study_figures.domain_figure(table).axes[0]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["b", "c", "a"]
    np.testing.assert_allclose(ax.lines[-1].get_ydata(), [0.1, 0.2, 0.4])
    assert [round(x) for x in ax.lines[0].get_xdata()] == [2, 0, 1]


def test_precision_compares_with_the_first_dtype() -> None:
    table = pd.DataFrame({"dtype": ["float32"] * 2 + ["bfloat16"] * 2})
    table["delta_loss"] = table["fvu"] = table["l0"] = [1.0, 2.0, 1.5, 2.5]
    (points, _diagonal) = study_figures.precision_figure(table).axes[0].lines
    assert list(points.get_xdata()) == [1, 2]
    assert list(points.get_ydata()) == [1.5, 2.5]
    with pytest.raises(GemmaScopeError, match="needs two dtypes"):
        study_figures.precision_figure(table.iloc[:2])


def test_transfer_draws_a_line_per_model_and_kind() -> None:
    table = pd.concat([_suite().assign(model=m, saes=s) for m, s in (("base", "base"), ("tuned", "base"))])
    assert [line.get_label() for line in study_figures.transfer_figure(table).axes[0].lines] == [
        "base, base",
        "tuned, base",
    ]


def test_tables_that_cannot_be_drawn() -> None:
    table = _suite()
    with pytest.raises(GemmaScopeError, match="needs the columns fvu; there are"):
        study_figures.fidelity_figure(table.drop(columns="fvu"))
    with pytest.raises(GemmaScopeError, match="no row"):
        study_figures.fidelity_figure(table.iloc[:0])
