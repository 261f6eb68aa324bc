"""The description of one coder over several layers to train: a crosscoder or a cross-layer transcoder (CLT)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from gemma_scope_tl.errors import GemmaScopeError, unknown_name
from gemma_scope_tl.registry.widths import width_label
from gemma_scope_tl.sites import LAYERED_SITES, Place, target_of
from gemma_scope_tl.training.recipe import Recipe
from gemma_scope_tl.training.spec import MARKS, marks_of


@dataclass(frozen=True)
class LayeredSpec:
    """One coder over several layers to train (:class:`~gemma_scope_tl.sae.layered.LayeredCoder`).

    Attributes:
        name: name of the coder, unique in a suite, such as ``"clt/layers_all/width_4k/target_l0_60_affine"``.
        kind: ``"crosscoder"`` or ``"clt"``.
        layers: the model's layers that it reads and writes, ascending.
        d_sae: number of latents of all layers together; every layer has the same number.
        recipe: hyper-parameters.
        seed: seed of the initial weights.
        target_l0: the wanted L0 of all layers together. The quadratic penalty needs it.
        skip: whether a CLT has a linear path from each layer's input to the same layer's output.
        init_from: where the single-layer coders are read from with which the training starts; empty for the recipe's
            initial weights. See :mod:`~gemma_scope_tl.training.layered_start`.
        l0_start: the target L0 at the first step, from which it falls linearly to ``target_l0``. None for the sum of
            the single-layer coders' L0s with ``init_from``, and for ``target_l0`` without it.
        l0_decay_steps: the number of steps of that fall. None for the steps over which lambda rises, as in Gemma Scope
            2's report (50,000 for both).
        all_layers: whether these are all layers of the model.

    Raises:
        GemmaScopeError: a value is out of range.
    """

    name: str
    kind: str
    layers: tuple[int, ...]
    d_sae: int
    recipe: Recipe
    seed: int
    target_l0: float | None = None
    skip: bool = False
    init_from: str = ""
    l0_start: float | None = None
    l0_decay_steps: int | None = None
    all_layers: bool = False

    def __post_init__(self) -> None:
        if self.kind not in LAYERED_SITES:
            raise unknown_name("kind of layered coder", self.kind, LAYERED_SITES)
        layers = self.layers
        if not layers or list(layers) != sorted(set(layers)) or layers[0] < 0:
            raise GemmaScopeError(f"{self.name}: the layers must ascend from 0 on, not {list(layers)}.")
        if self.d_sae < len(layers) or self.d_sae % len(layers) or self.seed < 0:
            raise GemmaScopeError(
                f"{self.name}: the width {self.d_sae} is that of all layers together, and must be a multiple of their "
                f"number, {len(layers)}; and seed must be 0 or more."
            )
        for name in ("target_l0", "l0_start"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value < math.inf:
                raise GemmaScopeError(f"{self.name}: {name} must be greater than 0, not {value}.")
        if self.recipe.l0_penalty == "quadratic" and self.target_l0 is None:
            raise GemmaScopeError(f"{self.name}: the quadratic penalty needs a target_l0.")
        if self.recipe.l0_penalty != "quadratic" and (self.l0_start is not None or self.l0_decay_steps is not None):
            raise GemmaScopeError(f"{self.name}: a target that decays belongs to the quadratic penalty.")
        if self.skip and not self.is_transcoder:
            raise GemmaScopeError(
                f"{self.name}: only a CLT has a skip path. With one, a crosscoder would copy its input."
            )
        self.recipe.prefixes_of(self.width)

    @property
    def is_transcoder(self) -> bool:
        """Whether the coder predicts tensors other than its inputs."""
        return LAYERED_SITES[self.kind] == "transcoder"

    @property
    def width(self) -> int:
        """Number of latents of each layer."""
        return self.d_sae // len(self.layers)

    @property
    def reads(self) -> tuple[Place, ...]:
        """The place that is read at each layer."""
        return tuple(Place(LAYERED_SITES[self.kind], layer) for layer in self.layers)

    @property
    def writes(self) -> tuple[Place, ...]:
        """The place that is reconstructed at each layer."""
        return tuple(target_of(place) for place in self.reads)

    @property
    def said_all(self) -> bool:
        """Whether files say "all" in place of the layers, as Google's do for CLTs and not for crosscoders."""
        return self.all_layers and self.is_transcoder

    @property
    def folder(self) -> str:
        """The folder of a release that holds the coder's, below the release's own."""
        return self.kind

    @property
    def release_head(self) -> str:
        """What the coder's path in a release begins with, as in Gemma Scope 2's; its L0 follows."""
        layers = "" if self.said_all else f"layer_{'_'.join(map(str, self.layers))}_"
        return f"{self.kind}/{layers}width_{width_label(self.d_sae)}_l0_"

    @property
    def where(self) -> dict[str, Any]:
        """What a row of metrics says of the coder, beside its name."""
        return {"site": self.kind, "layer": None, "layers": list(self.layers), "d_sae": self.d_sae}

    @property
    def starts(self) -> tuple[str, ...]:
        """``init_from`` for each layer, with its marks replaced. ``{width}`` is that of a layer.

        Raises:
            GemmaScopeError: something else than a mark is in braces.
        """
        marks_of(self.init_from)
        tail = "_affine" if self.skip else ""
        values = ((place.site, str(place.layer), width_label(self.width), tail) for place in self.reads)
        return tuple(self.init_from.format(**dict(zip(MARKS, each, strict=True))) for each in values)

    def target_at(self, step: int, start: float | None = None) -> float | None:
        """``L0*`` of step ``step`` (from 0): it falls linearly from ``start`` to the target, then stays.

        Args:
            step: the step.
            start: the target at the first step; None for :attr:`l0_start`, or the target if there is none.

        >>> recipe = Recipe(l0_penalty="quadratic", l0_warm_up_steps=10)
        >>> spec = LayeredSpec("a", "clt", (0, 1), 64, recipe, 0, target_l0=8.0, l0_start=28.0)
        >>> [spec.target_at(step) for step in (0, 5, 10, 99)]
        [28.0, 18.0, 8.0, 8.0]
        """
        start = self.l0_start if start is None else start
        if start is None or self.target_l0 is None:
            return self.target_l0
        steps = self.recipe.l0_warm_up_steps if self.l0_decay_steps is None else self.l0_decay_steps
        left = 0.0 if step >= steps else 1.0 - step / steps
        return self.target_l0 + (start - self.target_l0) * left

    def to_json(self) -> dict[str, Any]:
        """The spec as plain data, which :meth:`from_json` reads."""
        return asdict(self) | {"layers": list(self.layers)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LayeredSpec:
        """Make a spec from what :meth:`to_json` returned."""
        read: dict[str, Any] = {"layers": tuple(data["layers"]), "recipe": Recipe.from_json(data["recipe"])}
        return cls(**{**data, **read})


@dataclass(frozen=True)
class LayeredGroup:
    """One coder over several layers, which is stepped by itself.

    Attributes:
        steps: length of the training in steps.
        spec: the coder.
    """

    steps: int
    spec: LayeredSpec

    @property
    def specs(self) -> tuple[LayeredSpec, ...]:
        """The coder, as groups of one place have several."""
        return (self.spec,)

    @property
    def places(self) -> tuple[Place, ...]:
        """The places that are read."""
        return self.spec.reads

    @property
    def name(self) -> str:
        """The name of the group, unique in a run, from which file names are made."""
        return f"{self.spec.name.replace('/', '_')}_{self.steps}_steps"
