"""Figures: what is drawn is what was given, and the file is a picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from gemma_scope_tl.viz.figures import latent_heatmap, metric_by_layer, new_figure, save_figure


def test_the_heat_map_holds_the_activations(tmp_path: Path) -> None:
    table = pd.DataFrame({"position": [1, 1, 2], "latent": [7, 9, 7], "activation": [0.5, 2.0, 4.0]})
    figure, (axes,) = new_figure(1)
    latent_heatmap(axes, table, ["<bos>", "a", "\n"], "title", latents=2)
    np.testing.assert_array_equal(axes.images[0].get_array(), [[0, 0.5, 4.0], [0, 2.0, 0]])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["7", "9"]
    path = save_figure(figure, tmp_path / "sub" / "figure.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in path.parent.iterdir()] == ["figure.png"]


def test_a_line_per_site_and_sparsity() -> None:
    rows = [(s, layer, l0, l0 / 100) for s in ("res", "mlp") for layer in (0, 1) for l0 in (10, 30)]
    table = pd.DataFrame(rows, columns=["site", "layer", "l0", "fvu"])
    _, (axes,) = new_figure(1)
    metric_by_layer(axes, table, "fvu", "FVU")
    lines = {line.get_label(): line.get_ydata().tolist() for line in axes.lines}
    assert lines["res, L0 10"] == [0.1, 0.1]
    assert lines["mlp, L0 30"] == [0.3, 0.3]
    assert len(lines) == 4
