"""The configuration of a training run. All its errors are reported at once, unknown keys with the nearest names."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from gemma_scope_tl.errors import GemmaScopeError, TrainingStateError
from gemma_scope_tl.registry.locate import configuration_file
from gemma_scope_tl.sites import LAYERED_SITES, SITES
from gemma_scope_tl.training.config_file import each_once, number, override_key, plain_copy, problem, read_config
from gemma_scope_tl.training.config_types import (
    Count,
    DeviceName,
    FolderPath,
    Layers,
    Positive,
    RecipeValues,
    SiteKey,
    Skip,
    Start,
    Width,
    merged_recipe,
)
from gemma_scope_tl.training.recipe import FAST_WIDTH, Recipe
from gemma_scope_tl.training.spec import LATER

NO_EFFECT = ("output", "threads", "checkpoint_every", "loggers")
"""Keys that may differ between a run and its continuation, because results do not depend on them."""
_SHOWN_PROBLEMS = 50


class Section(BaseModel):
    """A part of a configuration."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSection(Section):
    """The model on whose activations SAEs are trained: arguments of ``load_model``."""

    name: str = "bundled"
    backend: Literal["bridge", "hooked_transformer"] = "bridge"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: DeviceName | None = None


class DataSection(Section):
    """The text, as ``pack_tokens`` takes it; ``dataset: bundled`` is the package's own held-out text.

    Attributes:
        folder: folder of the packed tokens; by default ``tokens`` in the run's folder.
    """

    dataset: Annotated[str, Field(min_length=1)]
    column: str | None = None
    split: str = "train"
    config: str | None = None
    revision: str | None = None
    streaming: bool = True
    context: Annotated[Count, Field(ge=2)] = 1024
    chat: bool = False
    limit_tokens: Count | None = None
    folder: str | None = None


class SourceSection(Section):
    """The source of activations.

    Attributes:
        kind: ``streaming`` runs the model during training, ``store`` reads a store that ``write_store`` wrote.
        path: folder or URL of the store.
        dtype: dtype of the bucket.
        bucket_rows: activations that are shuffled together; a multiple of the batch size.
        batch_rows: token rows in a forward pass.
        scale_rows: activations from which each place's scale is measured.
        device: device of the bucket.
    """

    kind: Literal["streaming", "store"] = "streaming"
    path: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    bucket_rows: Count = 1 << 20
    batch_rows: Count = 8
    scale_rows: Count = 1 << 17
    device: DeviceName = "cpu"


class MeshSection(Section):
    """How many processes divide each SAE and each batch. ``torchrun`` must start ``latents * data`` processes.

    Attributes:
        latents: number of equal parts of every SAE's latents, for SAEs that are too wide for one process.
        data: number of equal parts of every batch. Every process reads the whole batch, so a store is better suited
            than streaming, where each process runs the model.
    """

    latents: Count = 1
    data: Count = 1

    @property
    def processes(self) -> int:
        """Number of processes."""
        return self.latents * self.data


class GridEntry(Section):
    """SAEs at every combination of these sites, layers, widths, sparsities and values of ``skip``.

    Attributes:
        sites: names of the site table; or ``crosscoder`` and ``clt`` for coders over several layers, whose entries
            have no other sites.
        layers: ``all`` or a list; not for the embedding, which has no layer. A coder over several layers spans them.
        widths: numbers of latents, or labels such as ``16k``. That of a coder over several layers is of all layers
            together, and divided equally among them.
        lambdas: fixed sparsity coefficients.
        target_l0s: in place of lambdas, L0s towards which lambda is steered; each must be below every width. That of a
            coder over several layers is of all layers together.
        steps, tokens: length of the training, by default that of the run.
        recipe: values that differ from the run's recipe.
        skip: whether transcoders and CLTs have a linear path around the latents; ``[false, true]`` trains both kinds.
        init_from: where the training starts, in place of the recipe's initial weights: the folder of a finished run,
            the folder of an SAE, or the release and id of a registry row. See
            :func:`~gemma_scope_tl.training.start.read_start`, and for coders over several layers
            :mod:`~gemma_scope_tl.training.layered_start`.
        l0_start, l0_decay_steps: for coders over several layers, the ``L0*`` at the first step and the number of steps
            over which it falls to the target. By default the sum of the L0s of the coders in ``init_from``, over the
            steps in which lambda rises; without ``init_from`` it does not fall.
    """

    sites: Annotated[list[SiteKey], Field(min_length=1)]
    layers: Layers = "all"
    widths: Annotated[list[Width], Field(min_length=1)]
    lambdas: list[Positive] | None = None
    target_l0s: list[Positive] | None = None
    steps: Count | None = None
    tokens: Count | None = None
    recipe: RecipeValues = Field(default_factory=dict[str, Any])
    skip: Skip = False
    init_from: Start | None = None
    l0_start: Positive | None = None
    l0_decay_steps: Count | None = None

    @property
    def spans_layers(self) -> bool:
        """Whether the coders of the entry span several layers each."""
        return any(site in LAYERED_SITES for site in self.sites)

    def share_of(self, value: float, layers: int | None = None) -> float:
        """A width or L0 of all layers together as that of one layer; those of SAEs as they are.

        ``layers`` is the number of layers; without it that of a list, and 1 for ``all``.
        """
        if not self.spans_layers:
            return value
        return value / (layers or (1 if self.layers == "all" else len(self.layers)))

    @property
    def skips(self) -> list[bool]:
        """The values of ``skip``."""
        return self.skip if isinstance(self.skip, list) else [self.skip]

    @model_serializer(mode="wrap")
    def _without_later(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Plain data without the keys that are not used, so that it equals that of runs from before these keys."""
        later = (*LATER, "l0_start", "l0_decay_steps")
        return {key: value for key, value in dump(self).items() if value or key not in later}

    @model_validator(mode="after")
    def _one_sparsity(self) -> GridEntry:
        if bool(self.lambdas) == bool(self.target_l0s):
            raise ValueError("give one of lambdas and target_l0s")
        if self.steps is not None and self.tokens is not None:
            raise ValueError("give one of steps and tokens")
        if self.layers == [] and (self.spans_layers or any(SITES[site].per_layer for site in self.sites)):
            raise ValueError("layers is empty: write 'all' or the layers")
        self._check_layered()
        layers = [] if self.layers == "all" else self.layers
        each_once(sites=self.sites, layers=layers, widths=self.widths, lambdas=self.lambdas, target_l0s=self.target_l0s)
        each_once(skip=self.skips)
        others = [site for site in self.sites if not SITES[LAYERED_SITES.get(site, site)].is_transcoder]
        if any(self.skips) and others:
            raise ValueError(f"skip: only transcoders have a skip path, not {', '.join(others)}")
        if self.target_l0s and max(self.target_l0s) >= min(self.widths):
            raise ValueError(f"target_l0s: {max(self.target_l0s):g} is not below the width {min(self.widths)}")
        return self

    def _check_layered(self) -> None:
        """Raise ValueError for what only coders over several layers have, or cannot have."""
        if not self.spans_layers:
            if self.l0_start is not None or self.l0_decay_steps is not None:
                raise ValueError(f"l0_start and l0_decay_steps belong to {' and '.join(LAYERED_SITES)}")
            return
        single = [site for site in self.sites if site not in LAYERED_SITES]
        if single:
            raise ValueError(f"sites: coders over several layers and those of {', '.join(single)} need two entries")
        if isinstance(self.layers, list):
            if self.layers != sorted(self.layers):
                raise ValueError(f"layers must ascend, not {self.layers}")
            count = len(self.layers)
            odd = [width for width in self.widths if width % count]
            if odd:
                near = max(1, round(odd[0] / count)) * count
                raise ValueError(f"widths: {odd[0]} is not a multiple of the {count} layers, as {near} is")


class LoggerSection(Section):
    """A logger of metrics beside ``metrics.jsonl``.

    Attributes:
        kind: ``tensorboard`` or ``wandb``.
        folder: folder of TensorBoard's files; by default ``tensorboard`` in the run's folder.
        project, name, mode: project, name and mode of the W&B run.
    """

    kind: Literal["tensorboard", "wandb"]
    folder: str | None = None
    project: str = "gemma-scope-tl"
    name: str | None = None
    mode: Literal["online", "offline", "disabled"] = "online"


class SuiteConfig(Section):
    """A training run.

    Attributes:
        output: folder of the run, for checkpoints, metrics and the finished suite.
        model, data, source: see their sections. Without ``data`` the source must be a store.
        steps, tokens: length of the training; give one of the two, unless every entry of the grid has its own.
        recipe: ``preset`` (paper, fast, gemma_scope_2) and values that differ from it. ``fast`` adapts its values to
            each SAE's place, width and target L0, and to the length of its training
            (:func:`~gemma_scope_tl.training.recipe.fast`).
        grid: the SAEs.
        only: patterns of names; SAEs of the grid that match none of them are left out. Empty for all.
        seed: seed of initial weights and shuffles.
        device: device on which SAEs are trained.
        mesh: see its section.
        threads: processor threads; by default PyTorch's number. Equal numbers give equal bits.
        eval_batches: number of batches after training on which SAEs are measured.
        checkpoint_every, log_every: number of steps between checkpoints, and between logged metrics.
        loggers: see their section.
    """

    output: FolderPath
    model: ModelSection = ModelSection()
    data: DataSection | None = None
    source: SourceSection = SourceSection()
    steps: Count | None = None
    tokens: Count | None = None
    recipe: RecipeValues = Field(default_factory=dict[str, Any])
    grid: Annotated[list[GridEntry], Field(min_length=1)]
    only: list[str] = Field(default_factory=list[str])
    seed: Annotated[int, BeforeValidator(number), Field(ge=0, lt=1 << 32)] = 0
    device: DeviceName = "cpu"
    mesh: MeshSection = MeshSection()
    threads: Count | None = None
    eval_batches: Count = 16
    checkpoint_every: Count = 1_000
    log_every: Count = 100
    loggers: list[LoggerSection] = Field(default_factory=list[LoggerSection])

    @model_validator(mode="after")
    def _goes_together(self) -> SuiteConfig:
        problems = self._unfit()
        if problems:  # what follows needs recipes
            raise ValueError("; ".join(problems))
        each_once(only=self.only)
        if self.steps is not None and self.tokens is not None:
            problems.append("give one of steps and tokens")
        if self.steps is None and self.tokens is None and any(not (e.steps or e.tokens) for e in self.grid):
            problems.append("say how long to train: steps or tokens, here or in every entry of the grid")
        if self.source.kind == "streaming" and self.data is None:
            problems.append("data is missing: a streaming source needs text")
        if (self.source.kind == "store") != (self.source.path is not None):
            problems.append("source.path belongs to, and is needed by, source.kind: store")
        sizes = {recipe.batch_size for recipe in self.recipes}
        if len(sizes) > 1:
            problems.append(f"all SAEs of a run share its batches: one batch_size, not {sorted(sizes)}")
        elif self.source.bucket_rows % (size := sizes.pop()):
            problems.append(
                f"source.bucket_rows, {self.source.bucket_rows}, must be a multiple of the batch size, {size}"
            )
        problems += self._undivided()
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _unfit(self) -> list[str]:
        """Problems of recipes that do not suit the widths and L0s of their entries."""
        found: list[str] = []
        for index, entry in enumerate(self.grid):
            aims: list[dict[str, Any]] = [{"target_l0": value} for value in entry.target_l0s or ()] or [{}]
            try:
                for width, aim in itertools.product(entry.widths, aims):
                    d_sae = max(1, int(entry.share_of(width)))
                    own = {key: entry.share_of(value) for key, value in aim.items()}
                    self.recipe_at(entry, FAST_WIDTH, d_sae=d_sae, **own).prefixes_of(d_sae)
            except GemmaScopeError as error:
                found.append(f"grid.{index}: {error}")
        return found

    def _undivided(self) -> list[str]:
        """Problems of a mesh that cannot divide the work equally."""
        parts = self.mesh.latents
        widths = sorted({w for entry in self.grid for w in entry.widths if entry.share_of(w) % parts})
        found = [f"mesh.latents, {self.mesh.latents}, does not divide the widths {widths}"] if widths else []
        if self.batch_size % self.mesh.data:
            found.append(f"mesh.data, {self.mesh.data}, does not divide the batch size, {self.batch_size}")
        return found

    @property
    def recipes(self) -> list[Recipe]:
        """The recipe of every entry of the grid, without adaptation to an SAE."""
        return [self.recipe_at(entry) for entry in self.grid]

    def recipe_at(self, entry: GridEntry, d_in: int | None = None, **sae: Any) -> Recipe:
        """The recipe of an entry, for activations of ``d_in`` dimensions; ``sae`` as for :func:`merged_recipe`."""
        return merged_recipe({**self.recipe, **entry.recipe}, d_in, **sae)

    @property
    def batch_size(self) -> int:
        """Number of activations per step."""
        return self.recipes[0].batch_size

    @property
    def results(self) -> dict[str, Any]:
        """Everything on which the trained weights and the metrics depend, as plain data."""
        left_out = {*NO_EFFECT, *(("mesh",) if self.mesh.processes == 1 else ())}
        return self.model_dump(mode="json", exclude=left_out)


def load_config(path: str | Path | SuiteConfig | Mapping[str, Any], overrides: Sequence[str] = ()) -> SuiteConfig:
    """Read and check a configuration.

    Args:
        path: a YAML file, or the name of one that comes with the package (``"demo"``); its content as a mapping; or a
            configuration.
        overrides: ``"key=value"``, the key with dots into sections and numbers into lists (``grid.0.widths=[1k]``), the
            value in YAML.

    Raises:
        TrainingStateError: the configuration has problems; the message lists all of them.
        RegistryError: the file cannot be read or is not plain YAML.
        UnknownNameError: there is no file, and no configuration of the name.
    """
    if isinstance(path, SuiteConfig):
        data, source = path.model_dump(mode="json"), "the configuration"
    elif isinstance(path, Mapping):
        data, source = plain_copy(path), "the configuration"
    else:
        file = configuration_file(path)
        data, source = read_config(file), str(file)
    for override in overrides:
        override_key(data, override)
    try:
        return SuiteConfig.model_validate(data)
    except ValidationError as error:
        problems = [problem(detail, SuiteConfig) for detail in error.errors(include_url=False)]
    shown = [f"  {one}" for one in problems[:_SHOWN_PROBLEMS]]
    if len(problems) > len(shown):
        shown.append(f"  and {len(problems) - len(shown)} more")
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    raise TrainingStateError(f"{source} has {count}:\n" + "\n".join(shown))
