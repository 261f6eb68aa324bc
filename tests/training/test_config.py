"""Configurations: what is read, merged and overridden, and what is refused with which words."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.model.sizes import sizes_of
from gemma_scope_tl.registry import list_saes
from gemma_scope_tl.registry.locate import MODEL_FOLDER, bundle_folder, configurations
from gemma_scope_tl.sites import ModelDims
from gemma_scope_tl.training.config import TrainingStateError, load_config
from gemma_scope_tl.training.grid import groups_of
from gemma_scope_tl.training.recipe import FAST, PAPER, fast
from tests.training.planted import DIMS, tiny_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def _not_a_mark(text: str) -> str:
    marks = "{site}, {layer}, {width}, {affine}"
    return f"grid.0.init_from: init_from {text!r}: {text} is not a mark; its marks are {marks}."


def test_all_problems_at_once_with_nearest_names(tmp_path: Path) -> None:
    bad = tiny_config(tmp_path, sead=1, checkpoint_every=0)
    bad["source"]["bucket_row"] = 3
    bad["grid"][0]["sites"] = ["ress"]
    bad["grid"][1]["width"] = [1]
    bad["recipe"]["lrr"] = 1
    with pytest.raises(TrainingStateError) as caught:
        load_config(bad)
    text = str(caught.value)
    assert "6 problems" in text
    for part in (
        "sead: Unknown key 'sead'. Nearest: seed",
        "source.bucket_row: Unknown key 'bucket_row'. Nearest: bucket_rows",
        "Unknown site 'ress'. Nearest: res",
        "grid.1.width: Unknown key 'width'. Nearest: widths",
        "Unknown recipe value 'lrr'. Nearest: lr",
        "checkpoint_every: Input should be greater than 0, not 0",
    ):
        assert part in text, text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 5}, "one of steps and tokens"),
        ({"steps": None}, "say how long to train"),
        ({"source": {"kind": "streaming"}}, "data is missing"),
        ({"source": {"kind": "store"}}, "source.path"),
        ({"source": {"kind": "store", "path": "x", "bucket_rows": 100}}, "must be a multiple of the batch size, 64"),
        ({"recipe": {"preset": "papr"}}, "Unknown recipe preset 'papr'. Nearest: paper"),
        ({"grid": []}, "at least 1 item"),
        ({"grid": [{"sites": ["res"], "widths": ["15k"], "lambdas": [1]}]}, "'15k' is not the label of a power of two"),
        ({"grid": [{"sites": ["res"], "widths": [64]}]}, "one of lambdas and target_l0s"),
        ({"grid": [{"sites": ["res"], "widths": [64], "lambdas": [float("nan")]}]}, "finite number"),
        *(
            ({"grid": [{"sites": ["res"], "widths": [64], **entry}]}, message)
            for entry, message in (
                ({"target_l0s": [100]}, "target_l0s: 100 is not below the width 64"),
                ({"target_l0s": [64], "widths": [128, 64]}, "target_l0s: 64 is not below the width 64"),
                ({"target_l0s": [0]}, "greater than 0, not 0"),
                ({"target_l0s": [-3]}, "greater than 0, not -3"),
                ({"target_l0s": [float("nan")]}, "finite number"),
                ({"target_l0s": [True]}, "not a number: True"),
                ({"target_l0s": [8, 8.0]}, "target_l0s has 8 twice"),
                ({"lambdas": [1e-3, 1e-3]}, "lambdas has 0.001 twice"),
                ({"lambdas": [1], "layers": [1, 1]}, "layers has 1 twice"),
                ({"lambdas": [1], "layers": [True]}, "not a number: True"),
                ({"lambdas": [1], "widths": ["1k", 1024]}, "widths has 1024 twice"),
                ({"lambdas": [1], "sites": ["res", "res"]}, "sites has res twice"),
                ({"lambdas": [1], "steps": True}, "not a number: True"),
            )
        ),
        ({"only": ["res*", "res*"]}, "only has res\\* twice"),
        ({"seed": True}, "not a number: True"),
        ({"device": "gpu"}, "'gpu' is no device"),
        ({"device": "cuda:x"}, "'cuda:x' is no device"),
    ],
)
def test_refusals(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingStateError, match=message):
        load_config(tiny_config(tmp_path, **changes))


def test_files_extend_each_other_and_are_overridden(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(
        "output: a\nsteps: 5\nsource: {kind: store, path: s, bucket_rows: 128}\n"
        "recipe: {preset: fast, batch_size: 64, lr: 7e-5}\n"
        "grid:\n- {sites: [res], layers: [1], widths: [1k], lambdas: [6e-4]}\n"
    )
    (tmp_path / "top.yaml").write_text("extends: base.yaml\noutput: b\nsource: {bucket_rows: 256}\n")
    config = load_config(tmp_path / "top.yaml", ["grid.0.widths=[512, 16k]", "steps=4e3", "data.dataset=bundled"])
    assert (config.output, config.source.path, config.source.bucket_rows) == ("b", "s", 256)
    assert (config.steps, config.grid[0].widths, config.data and config.data.dataset) == (4000, [512, 16384], "bundled")
    assert config.recipes == [replace(FAST, batch_size=64, lr=7e-5)]  # YAML reads 7e-5 as a word
    assert load_config(config) == config
    (tmp_path / "loop.yaml").write_text("extends: loop.yaml\n")
    for path, overrides, message in (
        ("loop.yaml", [], "may extend each other"),
        ("top.yaml", ["steps"], "not an override"),
        ("top.yaml", ["grid.3.widths=[1]"], "is not an index of the list"),
        ("none.yaml", [], "none.yaml does not exist"),
    ):
        with pytest.raises(GemmaScopeError, match=message):
            load_config(tmp_path / path, overrides)


def test_grid_names_groups_and_seeds(tmp_path: Path) -> None:
    config = load_config(tiny_config(tmp_path))
    groups = groups_of(config, DIMS)
    assert [(g.place.key, g.steps, len(g.specs)) for g in groups] == [
        ("res/layer_0", 24, 2),
        ("res/layer_1", 24, 2),
        ("transcoder/layer_1", 17, 1),
    ]
    specs = [spec for group in groups for spec in group.specs]
    assert [s.name for s in specs][::2] == [
        "res/layer_0/width_64/target_l0_4",
        "res/layer_1/width_64/target_l0_4",
        "transcoder/layer_1/width_64/lambda_0.01",
    ]
    assert len({spec.seed for spec in specs}) == 5
    assert specs[-1].recipe.l0_coefficient == 0.01
    part = groups_of(load_config(tiny_config(tmp_path, only=["*/target_l0_9"])), DIMS)
    assert [s for g in part for s in g.specs] == [specs[1], specs[3]]  # their seeds do not depend on the others
    twice = tiny_config(tmp_path)
    twice["grid"].append(twice["grid"][0])
    with pytest.raises(TrainingStateError, match="twice: res/layer_0/width_64/target_l0_4"):
        groups_of(load_config(twice), DIMS)
    with pytest.raises(TrainingStateError, match="fits no SAE"):
        groups_of(load_config(tiny_config(tmp_path, only=["att/*"])), DIMS)
    with pytest.raises(GemmaScopeError, match="has no layer 4"):
        groups_of(load_config(tiny_config(tmp_path), ["grid.0.layers=[4]"]), DIMS)


@pytest.mark.parametrize("size", ["2b", "9b"])
def test_paper_configs_are_the_release(size: str) -> None:
    """Every site, layer and width of the release's main suite is in the grid, and nothing else."""
    config = load_config(CONFIGS / f"gemma-2-{size}-paper.yaml")
    groups = groups_of(config, sizes_of(f"gemma-2-{size}").dims)
    ours = {(g.place.site, g.place.layer, spec.d_sae) for g in groups for spec in g.specs}
    table = list_saes(model=f"gemma-2-{size}")
    layers = [None if pd.isna(layer) else int(layer) for layer in table["layer"]]
    theirs = set(zip(table["site"], layers, table["d_sae"].astype(int), strict=True))
    assert ours == theirs
    tokens = {spec.d_sae: g.steps * config.batch_size for g in groups for spec in g.specs}
    assert {d: round(n / 1e9) for d, n in tokens.items()} == {
        d: 16 if d == 2**20 else 4 if d <= 2**14 else 8 for d in tokens
    }
    assert all(replace(spec.recipe, l0_coefficient=6e-4) == PAPER for g in groups for spec in g.specs)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_first_line_is_the_command(path: Path) -> None:
    assert path.read_text().startswith(f"# gemma-scope train {path.stem}")
    assert configurations()[path.stem] == path
    config = load_config(path)
    bundle = bundle_folder(config.model.name)
    if bundle is not None and not (bundle / MODEL_FOLDER).exists():
        pytest.skip(f"{bundle} is not made yet")
    assert groups_of(config, sizes_of(config.model.name).dims)


def test_bundled_config_has_every_place() -> None:
    config = load_config(CONFIGS / "bundled.yaml")
    groups = groups_of(config, sizes_of("bundled").dims)
    assert len(groups) == 17
    assert sum(len(group.specs) for group in groups) == 12 * 6 + 5 * 3


def test_fast_is_in_the_units_of_each_sae(tmp_path: Path) -> None:
    """A unit direction sees 1 / sqrt(d_in) of an activation: at 512 dimensions half of what it sees at 128."""
    grid = [{"sites": ["res", "att"], "layers": [0], "widths": [1024], "target_l0s": [8]}]
    recipe = {"preset": "fast", "batch_size": 64, "bandwidth": 0.3}
    config = load_config(tiny_config(tmp_path, recipe=recipe, grid=grid))
    dims = ModelDims(n_layers=1, d_model=512, n_heads=4, d_head=8)
    res, att = (group.specs[0].recipe for group in groups_of(config, dims))
    for found, d_in in ((res, 512), (att, 32)):
        base = fast(d_in, d_sae=1024, target_l0=8, steps=config.steps or 0)
        assert found == replace(base, batch_size=64, bandwidth=0.3)  # what is given is taken as it is
    assert res.lr == pytest.approx(att.lr / 4, rel=1e-12)
    assert res.init_threshold < att.init_threshold and res.init_encoder_scale > att.init_encoder_scale


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("grid.0.layers", 1, "grid.0.layers: should be 'all' or a list, such as [1, 2], not 1"),
        ("grid.0.layers", "al", "grid.0.layers: should be 'all' or a list, such as [1, 2], not 'al'"),
        ("grid.0.layers", None, "grid.0.layers: should be 'all' or a list, such as [1, 2], not None"),
        ("grid.0.layers", [1, "x"], "grid.0.layers.1: should be a whole number, not 'x'"),
        ("grid.0.layers", [1.5], "grid.0.layers.0: should be a whole number, not 1.5"),
        ("grid.0.sites", "res", "grid.0.sites: should be a list, such as [res], not 'res'"),
        ("grid.0.widths", 128, "grid.0.widths: should be a list, such as [128], not 128"),
        ("grid", {}, "grid: should be a list, not {}"),
        ("grid.0", 1, "grid.0: should be a section of keys, not 1"),
        ("model", "bundled", "model: should be a section of keys, not 'bundled'"),
        ("data", "bundled", "data: should be a section of keys, not 'bundled'"),
        ("model.name", 3, "model.name: should be a word, not 3"),
        ("steps", [1], "steps: should be a whole number, not [1]"),
        ("loggers", ["wandb"], "loggers.0: should be a section of keys, not 'wandb'"),
        ("recipe.preset", ["fast"], "recipe.preset: should be a word, such as fast, not ['fast']"),
        ("recipe.preset", None, "recipe.preset: should be a word, such as fast, not None"),
        ("recipe.betas", [False, 0.9], "recipe.betas.0: not a number: False"),
        ("recipe.betas", [0.9, "b"], "recipe.betas.1: should be a number, not 'b'"),
        ("recipe.betas", [0.9, [1]], "recipe.betas.1: should be a number, not [1]"),
        ("recipe.betas", 0.9, "recipe: recipe.betas cannot be 0.9."),
        ("recipe.matryoshka", ["a"], "recipe.matryoshka.0: should be a number, not 'a'"),
        ("recipe.lr", True, "recipe.lr: not a number: True"),
        ("grid.0.recipe", {"preset": {}}, "grid.0.recipe.preset: should be a word, such as fast, not {}"),
        ("steps", 1e30, "steps: should be at most 9,007,199,254,740,992, not 1e+30"),
        ("steps", 10**400, "steps: should be at most 9,007,199,254,740,992, not a number of 1329 bits"),
        ("tokens", "1e30", "tokens: should be at most 9,007,199,254,740,992, not 1e+30"),
        ("grid.0.widths", [10**18], f"grid.0.widths.0: Input should be less than or equal to {2**30}, not {10**18}"),
        ("grid.0.init_from", "{site.__class__}", _not_a_mark("{site.__class__}")),
        ("grid.0.init_from", "{layer:1000000000}", _not_a_mark("{layer:1000000000}")),
        ("grid.0.init_from", "{site!r}", _not_a_mark("{site!r}")),
        ("grid.0.init_from", "{}", _not_a_mark("{}")),
        ("grid.0.init_from", "{0}", _not_a_mark("{0}")),
        ("grid.0.init_from", "{site[0]}", _not_a_mark("{site[0]}")),
        (
            "grid.0.target_l0s",
            [1e-300],
            "grid.0: The preset fast knows no start for an L0 of 1e-300 among 64 latents.",
        ),
    ],
)
def test_a_wrong_type_is_one_line_of_words(tmp_path: Path, key: str, value: object, words: str) -> None:
    """No name of a class, a validator or a member of a union."""
    bad: Any = {**tiny_config(tmp_path), "model": {"name": "bundled"}}
    section, (*above, last) = bad, [int(part) if part.isdigit() else part for part in key.split(".")]
    for part in above:
        section = section[part]
    section[last] = value
    if key == "tokens":
        del bad["steps"]
    with pytest.raises(TrainingStateError) as caught:
        load_config(bad)
    assert str(caught.value) == f"the configuration has 1 problem:\n  {words}"


def test_numbers_may_be_written_as_text_in_lists_too(tmp_path: Path) -> None:
    """YAML reads 9e-1 as a word."""
    recipe = {**tiny_config(tmp_path)["recipe"], "betas": ["0.9", "95e-2"], "matryoshka": ("25e-2", 0.5)}
    (found, *_) = load_config(tiny_config(tmp_path, recipe=recipe)).recipes
    assert (found.betas, found.matryoshka) == ((0.9, 0.95), (0.25, 0.5))


def test_a_recipe_that_does_not_suit_a_width_is_a_problem_of_its_entry(tmp_path: Path) -> None:
    recipe = {**tiny_config(tmp_path)["recipe"], "matryoshka": [0.001]}
    with pytest.raises(TrainingStateError, match=r"grid\.0: Matryoshka shares .*; grid\.1: Matryoshka shares"):
        load_config(tiny_config(tmp_path, recipe=recipe))


def test_overrides_do_not_change_the_callers_mapping(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    config["grid"] = tuple(config["grid"])
    before = copy.deepcopy(config)
    overrides = ["grid.0.widths=[128]", "grid.1.layers.0=0", "recipe.batch_size=32", "source.scale_rows=1024", "seed=9"]
    read = load_config(config, overrides)
    assert config == before
    assert (read.grid[0].widths, read.grid[1].layers, read.batch_size, read.seed) == ([128], [0], 32, 9)


def test_layers_may_be_all_or_any_numbers(tmp_path: Path) -> None:
    for layers in ("all", [0, 1], (0, 1), range(2)):
        config = tiny_config(tmp_path)
        config["grid"][0]["layers"] = layers
        read = load_config(config)
        assert read.grid[0].layers == ("all" if layers == "all" else [0, 1])
        assert load_config(read) == read and load_config(read.model_dump(mode="json")) == read
