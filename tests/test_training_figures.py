"""Figures of training and the numbers behind them: lines are what was given, points what NumPy computes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import frontier
from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.viz.figures import save_figure
from gemma_scope_tl.viz.training_figures import pareto, training_curves
from scripts.smollm2.model import Halves

ROOT = Path(__file__).parents[1]
BUNDLED_LOG = ROOT / "gemma_scope_tl" / "bundled" / "saes" / "training.jsonl"


def points() -> pd.DataFrame:
    rows = [("a", 30.0, 0.1, 0.02), ("a", 10.0, 0.3, 0.2), ("b", 10.0, 0.4, 0.3), ("b", 40.0, 0.2, 0.05)]
    return pd.DataFrame(rows, columns=["recipe", "l0", "fvu", "delta_loss"])


def test_a_line_per_recipe_in_the_order_of_l0(tmp_path: Path) -> None:
    figure = pareto(points(), title="title")
    fvu, loss = figure.axes
    drawn = {str(line.get_label()): np.transpose(line.get_data()).tolist() for line in fvu.lines}
    assert drawn == {"a": [[10.0, 0.3], [30.0, 0.1]], "b": [[10.0, 0.4], [40.0, 0.2]]}
    assert np.asarray(loss.lines[1].get_ydata()).tolist() == [0.3, 0.05]
    assert (fvu.get_xscale(), fvu.get_yscale(), loss.get_yscale()) == ("log", "linear", "log")
    assert (fvu.get_xlabel(), loss.get_ylabel()) == ("L0", "delta loss, nats")
    assert save_figure(figure, tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")


def test_a_loss_below_the_clean_one_is_not_lost_on_a_logarithmic_axis() -> None:
    frame = points()
    frame.loc[0, "delta_loss"] = -0.001
    assert pareto(frame).axes[1].get_yscale() == "linear"


def test_a_log_file_is_drawn_as_it_is() -> None:
    rows = [json.loads(line) for line in BUNDLED_LOG.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if "step" in row and "silent" in row]
    figure = training_curves(BUNDLED_LOG, metrics=("l0", "silent"))
    one = [(r["step"], r["l0"]) for r in rows if r["name"] == "att/layer_2/width_1k/target_l0_16"]
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert len(lines) == len({r["name"] for r in rows})
    assert [tuple(point) for point in np.transpose(lines["att/layer_2/width_1k/target_l0_16"].get_data())] == one
    assert len(figure.axes) == 2


def test_rows_of_a_frame_are_told_apart_by_the_columns_asked_for() -> None:
    frame = pd.DataFrame({"step": [2, 1, 1, 2], "name": ["x", "x", "y", "y"], "seed": [0, 0, 1, 1], "l0": [1, 2, 3, 4]})
    lines = training_curves(frame, metrics=["l0"]).axes[0].lines
    assert {str(line.get_label()): list(line.get_ydata()) for line in lines} == {"x": [2, 1], "y": [3, 4]}  # type: ignore[arg-type]
    labels = [line.get_label() for line in training_curves(frame, metrics=["l0"], by=("seed",)).axes[0].lines]
    assert labels == ["seed 0", "seed 1"]


def test_only_a_last_line_may_be_half_written(tmp_path: Path) -> None:
    path, whole = tmp_path / "log.jsonl", json.dumps({"step": 1, "name": "x", "l0": 3.0})
    path.write_text(whole + "\n" + whole[:10], encoding="utf-8")
    assert len(training_curves(path, metrics=["l0"]).axes[0].lines) == 1
    path.write_text(whole[:10] + "\n" + whole + "\n", encoding="utf-8")
    with pytest.raises(GemmaScopeError, match=r"log\.jsonl, line 1 is not JSON"):
        training_curves(path, metrics=["l0"])
    path.write_text("3\n" + whole + "\n", encoding="utf-8")
    with pytest.raises(GemmaScopeError, match="line 1 is not a JSON object"):
        training_curves(path, metrics=["l0"])
    with pytest.raises(GemmaScopeError, match="cannot be read"):
        training_curves(tmp_path / "missing.jsonl")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.drop(columns="fvu"), "needs the columns fvu"),
        (lambda f: f[:0], "no row"),
        (lambda f: f.assign(l0=np.nan), "'l0' holds values that are not finite"),
        (lambda f: f.assign(fvu=np.inf), "'fvu' holds values that are not finite"),
    ],
)
def test_bad_frames_are_named(change: object, message: str) -> None:
    with pytest.raises(GemmaScopeError, match=message):
        pareto(change(points()))  # type: ignore[operator]
    with pytest.raises(GemmaScopeError, match="no row|needs the columns"):
        training_curves(pd.DataFrame({"step": [1.0], "event": ["start"], "l0": [None]}), metrics=["l0"])


def _random_arrays(d_in: int, d_sae: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_enc": (d_sae,), "b_dec": (d_in,)}
    arrays = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {**arrays, "threshold": torch.rand(d_sae, generator=generator) + 1.0}


def test_points_are_measured_as_numpy_does_in_float64() -> None:
    arrays, x = _random_arrays(6, 20), torch.randn(5000, 6, generator=torch.Generator().manual_seed(1)) + 2.0
    w = {name: value.double().numpy() for name, value in arrays.items()}
    pre = x.double().numpy() @ w["W_enc"] + w["b_enc"]
    f = np.where(pre > w["threshold"], pre, 0.0)
    error = np.square(x.double().numpy() - f @ w["W_dec"] - w["b_dec"]).sum()
    fvu = error / np.square(x.double().numpy() - x.double().numpy().mean(0)).sum()
    row = frontier.measure(arrays, x)
    # A pre-activation within float32's rounding of its threshold may count otherwise: at most one in 100,000.
    assert row["l0"] == pytest.approx((f > 0).sum() / len(x), rel=1e-5)
    assert row["fvu"] == pytest.approx(fvu, rel=1e-5)
    assert row["alive"] == (f > 0).any(0).mean()
    frequency = (f > 0).mean(0)
    assert 0.0 < row["dense_share"] < 1.0
    assert row["dense_share"] == pytest.approx(frequency[frequency > 0.1].sum() / frequency.sum(), rel=1e-4)


def test_the_peer_is_compared_at_our_l0_on_its_lower_envelope() -> None:
    points = [(10.0, 0.4), (40.0, 0.1), (20.0, 0.5), (80.0, 0.2)]  # the last two lie above the others
    assert frontier.interpolated(points, 20.0) == pytest.approx(0.2)  # a straight line in logarithms: 4 / L0
    assert frontier.interpolated(points, 40.0) == pytest.approx(0.1)
    with pytest.raises(GemmaScopeError, match="both sides of L0 9"):
        frontier.interpolated(points, 9.0)
    ours = [
        {"recipe": "ours", "seed": seed, "settings": {"target_l0": 20.0}, "l0": 20.0, "fvu": fvu, "delta_loss": 0.05}
        for seed, fvu in enumerate((0.1, 0.1, 0.125))
    ]
    peers = [
        {"recipe": f"{frontier.PEER}, tanh", "seed": seed, "l0": l0, "fvu": fvu, "delta_loss": fvu / 4}
        for seed in range(3)
        for l0, fvu in points
    ]
    fvu, loss = frontier.comparison([*ours, *peers], "x")
    assert fvu["ratio"] == pytest.approx((2.0 + 2.0 + 1.6) / 3) and loss["ratio"] == pytest.approx(1.0)
    half = (
        4.302653 * (0.16 / 3) ** 0.5 / 3**0.5
    )  # Student's quantile of two degrees of freedom, and the variance 0.16 / 3
    assert (fvu["ratio_low"], fvu["ratio_high"]) == pytest.approx((fvu["ratio"] - half, fvu["ratio"] + half), rel=1e-6)
    assert loss["ratio_low"] == pytest.approx(loss["ratio_high"])
    with pytest.raises(GemmaScopeError, match="both sides"):  # a seed is compared with its own peers only
        frontier.comparison([{**ours[0], "seed": 5}, *peers], "x")


@pytest.mark.parametrize("power", [-0.4, -0.7, -1.5])
def test_a_coefficient_is_found_whatever_the_power_law(power: float) -> None:
    seen: list[float] = []

    def l0(coefficient: float) -> float:
        seen.append(coefficient)
        return 30.0 * coefficient**power

    found = frontier.coefficient_for(l0, 12.0, 1.0, tries=6, close=0.02)
    assert 30.0 * found**power == pytest.approx(12.0, rel=0.02)
    assert len(seen) <= 4


def test_the_peer_trains_on_our_batches_and_keeps_its_function_under_our_names() -> None:
    x = torch.randn(2048, 8, generator=torch.Generator().manual_seed(2))
    budget = frontier.Budget(d_sae=32, steps=20, batch_size=64, seed=3)
    given = frontier._norm_batches_first(x, budget)
    taken = [next(given) for _ in range(frontier.NORM_BATCHES + 40)][frontier.NORM_BATCHES :]
    wanted = frontier.batches(x, 64, 3)
    assert all(torch.equal(batch, next(wanted)) for batch in taken)
    assert {row for batch in taken[:32] for row in batch[:, 0].tolist()} == set(x[:, 0].tolist())
    trained = frontier.theirs(x, frontier.PeerSettings(lr=1e-2), 0.1, budget)  # raises unless SAELens's class agrees
    assert trained.settings["lr"] == 1e-2
    assert frontier.measure(trained.arrays, x)["fvu"] < 1.0


def test_a_model_cut_in_two_is_the_model() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=5, num_attention_heads=4,
        num_key_value_heads=2, head_dim=4,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    tokens = torch.randint(0, 40, (2, 9))
    with torch.no_grad():
        whole = model(tokens, output_hidden_states=True)
    halves = Halves(model, 2)
    stream = halves.stream(tokens)
    torch.testing.assert_close(stream, whole.hidden_states[3], rtol=0, atol=0)
    torch.testing.assert_close(halves.logits(stream), whole.logits, rtol=0, atol=0)
    assert not torch.equal(halves.logits(2 * stream), whole.logits)


def test_a_legend_of_long_names_stays_within_the_figure() -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    names = [f"transcoder/layer_{number}/width_16k/target_l0_100" for number in range(6)]
    rows = [{"name": name, "step": step, "l0": step, "fvu": 1.0} for name in names for step in (1, 2)]
    figure = training_curves(pd.DataFrame(rows), metrics=("l0", "fvu"))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    (legend,) = figure.legends
    extent = legend.get_window_extent(canvas.get_renderer())
    assert extent.x0 >= 0 and extent.x1 <= figure.bbox.width
