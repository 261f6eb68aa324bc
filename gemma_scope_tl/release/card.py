"""The model card of a repository: what it holds, how the SAEs were trained and how they are loaded."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from gemma_scope_tl.registry.widths import width_label
from gemma_scope_tl.release.metrics import COLUMNS, Row
from gemma_scope_tl.release.release_saes import About, ReleaseSAE

NOT_STATED = "Not stated by the authors."
TAGS = ("sparse-autoencoder", "jumprelu", "mechanistic-interpretability")
SAE_LENS_FOLDER = "sae_lens"
CIRCUIT_TRACER_FOLDER = "circuit_tracer"
_ENTITIES = {"<": "&lt;", "&": "&amp;"}


def render_card(
    name: str,
    saes: Sequence[ReleaseSAE],
    paths: Sequence[str],
    rows: Sequence[Row | None],
    about: About,
    layouts: Sequence[str],
) -> str:
    """The text of ``README.md``.

    Args:
        name: name of the release.
        saes: the SAEs of the release.
        paths: folder of each SAE in the repository.
        rows: measurements of each SAE; see :func:`match_metrics`.
        about: facts that the files do not hold.
        layouts: the layouts of the repository, among ``gemma-scope``, ``gemma_scope_2``, ``sae-lens`` and
            ``circuit-tracer``.
    """
    kinds = {"transcoders" if sae.is_transcoder else "SAEs" for sae in saes}
    first = f"{len(saes)} JumpReLU {' and '.join(sorted(kinds))} of {cell(about.base_model or saes[0].model)}."
    notes = "\n".join("- " + "\n  ".join(note.splitlines()) for note in about.notes)
    sections = [
        _front_matter(about, layouts),
        f"# {name}",
        f"{first} {about.description or ''}".strip(),
        f"## What is here\n\n{_summary(saes)}\n\n{_layout_text(layouts)}",
        f"## Loading\n\n{_loading(name, paths[0], layouts)}",
        f"## SAEs\n\n{_table(saes, paths, rows, about)}",
        f"## Training data\n\n{about.data or NOT_STATED}",
        f"## Recipe\n\n{_recipe(about, saes)}",
        f"## Licence\n\nThe weights: {cell(about.license)}.",
        *([f"## Notes\n\n{notes}"] if notes else []),
    ]
    return "\n\n".join(sections) + "\n"


def cell(value: object) -> str:
    """A value for a cell or a sentence, on one line and escaped so that Markdown and HTML show it as text."""
    text = " ".join(str(value).split())
    return re.sub(r"([\\`*\[\]|~])|(<)|(&)|(\b_|_\b)", lambda m: _ENTITIES.get(m[0], f"\\{m[0]}"), text)


def code(value: str) -> str:
    """A value as code that is valid in a table cell: on one line, between more backticks than it contains."""
    text = " ".join(value.split())
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{'`' * (longest + 1)}{pad}{text}{pad}{'`' * (longest + 1)}".replace("|", "\\|")


def _front_matter(about: About, layouts: Sequence[str]) -> str:
    import yaml

    head: dict[str, Any] = {"license": about.license}
    if about.base_model:
        head["base_model"] = about.base_model
    head["library_name"] = "saelens" if "sae-lens" in layouts else "gemma-scope-tl"
    head["tags"] = list(TAGS)
    return f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---"


def _summary(saes: Sequence[ReleaseSAE]) -> str:
    groups: defaultdict[tuple[str, str, int], list[ReleaseSAE]] = defaultdict(list)
    for sae in saes:
        groups[sae.model, sae.site, sae.d_sae].append(sae)
    lines = ["| model | site | layers | width | SAEs | L0 |", "|---|---|---|---|---|---|"]
    for (model, site, d_sae), here in groups.items():
        layers = _ranges(sorted({sae.layer for sae in here if sae.layer is not None}))
        l0s = sorted(round(sae.l0) for sae in here)
        span = str(l0s[0]) if l0s[0] == l0s[-1] else f"{l0s[0]}-{l0s[-1]}"
        lines.append(f"| {cell(model)} | {site} | {layers} | {width_label(d_sae)} ({d_sae}) | {len(here)} | {span} |")
    return "\n".join(lines)


def _ranges(numbers: Sequence[int]) -> str:
    """Consecutive numbers as ranges: ``0-3, 7``."""
    found: list[list[int]] = []
    for number in numbers:
        if found and found[-1][-1] == number - 1:
            found[-1].append(number)
        else:
            found.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in found)


def _layout_text(layouts: Sequence[str]) -> str:
    texts = {
        "gemma-scope": "`layer_L/width_W/average_l0_N/params.npz` (Gemma Scope's layout, below a folder for the site "
        "where there are several) holds `W_enc`, `W_dec`, `b_enc`, `b_dec`, `threshold` and, of a transcoder with a "
        "skip connection (`_affine`), `affine_skip_connection` (`x @ S`). Nothing is subtracted before the encoder, "
        "and inputs are raw activations.",
        "gemma_scope_2": "`SITE/layer_L_width_W_l0_N[_affine]/` (Gemma Scope 2's layout) holds `config.json` and "
        "`params.safetensors` with `w_enc`, `w_dec`, `b_enc`, `b_dec`, `threshold` and, of a transcoder with a skip "
        "connection, `affine_skip_connection` (`x @ S`). Nothing is subtracted before the encoder, and inputs are raw "
        "activations.",
        "sae-lens": f"`{SAE_LENS_FOLDER}/` holds the same SAEs in SAELens's layout.",
        "circuit-tracer": f"`{CIRCUIT_TRACER_FOLDER}/` holds sets of one transcoder a layer for circuit-tracer.",
    }
    return " ".join(texts[layout] for layout in layouts)


def _loading(name: str, path: str, layouts: Sequence[str]) -> str:
    ours = f'import gemma_scope_tl as gs; gs.register_release("{name}.yaml")\n'
    ours += f'sae = gs.JumpReLUSAE.from_pretrained("{name}", "{path}")'
    lines = [f"```python\n# in a copy of this repository\n{ours}\n```"]
    if "sae-lens" in layouts:
        inner = path if path.startswith(f"{SAE_LENS_FOLDER}/") else f"{SAE_LENS_FOLDER}/{path}"
        theirs = f'from sae_lens import SAE\nsae = SAE.from_pretrained("OWNER/NAME", "{inner}")'
        lines.append(f"```python\n# OWNER/NAME is this repository\n{theirs}\n```")
    return "\n\n".join(lines)


def _table(saes: Sequence[ReleaseSAE], paths: Sequence[str], rows: Sequence[Row | None], about: About) -> str:
    shown = [name for name in COLUMNS if any(row is not None and name in row for row in rows)]
    head = ["SAE", "site", "layer", "latents", *(COLUMNS[name] for name in shown)]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for sae, path, row in zip(saes, paths, rows, strict=True):
        layer = "" if sae.layer is None else str(sae.layer)
        cells = [code(path), sae.site, layer, str(sae.d_sae), *(_number((row or {}).get(name)) for name in shown)]
        lines.append(f"| {' | '.join(cells)} |")
    if not shown:
        labels = any(
            path.endswith((f"_{sae.row.label}", f"_{sae.row.label}_affine"))
            for sae, path in zip(saes, paths, strict=True)
            if sae.row
        )
        named = (
            "a label in a folder's name stands for the target"
            if labels
            else "the number in a folder's name is its rounded"
        )
        return "\n".join([*lines, "", f"No measurements were given; {named} L0."])
    left = sum(row is None for row in rows)
    text = f"Measured on: {about.evaluated_on or NOT_STATED} Losses and KL in nats a token."
    return "\n".join([*lines, "", text + (f" {left} of {len(rows)} were not measured." if left else "")])


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) and value == value else ""


def recorded_recipe(saes: Sequence[ReleaseSAE]) -> dict[str, Any]:
    """The hyper-parameters that a trained suite has recorded of all these SAEs; where they differ, from which to which.

    Empty if they are not known of every SAE.
    """
    if not all(sae.recipe for sae in saes):
        return {}
    names = dict.fromkeys(name for sae in saes for name in sae.recipe)
    return {name: _span([sae.recipe.get(name) for sae in saes]) for name in names}


def _span(values: Sequence[Any]) -> Any:
    """The value that all have; of numbers the least and the greatest, and of other things all."""
    different = [value for index, value in enumerate(values) if value not in values[:index]]
    if len(different) == 1:
        (value,) = different
        short = f"{value:.4g}" if isinstance(value, float) else ""
        return short if short and float(short) != value else value
    if all(isinstance(value, (int, float)) for value in different):
        return f"{min(different):.3g} to {max(different):.3g}"
    return ", ".join(str(value) for value in different)


def _recipe(about: About, saes: Sequence[ReleaseSAE]) -> str:
    recipe = about.recipe or recorded_recipe(saes)
    if not recipe:
        return NOT_STATED
    from gemma_scope_tl.training.recipe import PAPER

    papers = {field.name: getattr(PAPER, field.name) for field in fields(PAPER)}
    lines = ["| setting | here | paper | chosen by |", "|---|---|---|---|"]
    for name, value in recipe.items():
        paper = papers.get(name, "")
        same = name in papers and (list(value) if isinstance(value, (list, tuple)) else value) == (
            list(paper) if isinstance(paper, tuple) else paper
        )
        by = "search" if name in about.searched else "the paper" if same else "set beforehand"
        lines.append(f"| {cell(name)} | {cell(value)} | {cell(paper)} | {by} |")
    source = "Gemma Scope (Lieberum et al., 2024)"
    if not about.recipe and "target_l0" in recipe:
        lines += ["", "`l0_coefficient` is lambda at first. It was adjusted in training, to reach the target L0."]
    return "\n".join([*lines, "", f"The paper is {source}; it has no value where the column is empty."])
