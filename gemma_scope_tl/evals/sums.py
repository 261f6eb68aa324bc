"""What an evaluation measures, as typed sums. Each :class:`Piece` is kept in one file of the cache.

The names of the fields are the names of the tensors in that file: renaming one makes old caches unreadable.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from gemma_scope_tl.evals.accumulators import Accumulator, LatentCounts, TokenMean, VectorMean
from gemma_scope_tl.evals.saes import Subject
from gemma_scope_tl.sites import Place, target_of


class Piece(Accumulator):
    """Accumulators that are complete at the same time.

    Attributes:
        key: key of the piece in the cache; empty without a cache.
        done: whether the accumulators contain all data.
    """

    # Without annotations, so that they are not fields of the dataclasses below and not part of their state.
    key = ""
    done = False


@dataclass
class CleanLoss(Piece):
    """The loss of the model alone, of each scored prediction."""

    loss: TokenMean = field(default_factory=TokenMean)


@dataclass
class Centre(Piece):
    """The mean activation at a place."""

    mean: VectorMean = field(default_factory=VectorMean)


@dataclass
class PerToken(Piece):
    """One number for each token."""

    value: TokenMean = field(default_factory=TokenMean)


@dataclass
class SAESums(Piece):
    """The sums of one SAE.

    Attributes:
        fired: number of tokens on which each latent is active.
        l0: number of active latents.
        error: squared reconstruction error.
        loss, kl: cross-entropy of the spliced model, and KL divergence from the clean prediction, in nats.
    """

    fired: LatentCounts
    l0: TokenMean = field(default_factory=TokenMean)
    error: TokenMean = field(default_factory=TokenMean)
    loss: TokenMean = field(default_factory=TokenMean)
    kl: TokenMean = field(default_factory=TokenMean)


@dataclass
class PlaceSums:
    """The sums that the SAEs which write at one place share.

    Attributes:
        centre: the mean activation.
        deviation: squared distance of each activation from the centre.
        ablated: the model's loss when the tensor is replaced, by the kind of ablation.
    """

    ablated: dict[str, PerToken]
    centre: Centre = field(default_factory=Centre)
    deviation: PerToken = field(default_factory=PerToken)

    def pieces(self) -> dict[str, Piece]:
        """All pieces by their kind, which is a part of the key in the cache."""
        return {"centre": self.centre, "deviation": self.deviation, **self.ablated}

    @property
    def needs_centre(self) -> bool:
        """Whether the centre is missing, and a piece that is still to be measured depends on it."""
        dependent = [self.deviation, *(piece for kind, piece in self.ablated.items() if kind == "mean")]
        return not self.centre.done and not all(piece.done for piece in dependent)


@dataclass
class Sums:
    """All pieces of an evaluation.

    Attributes:
        clean: sums of the model alone.
        targets: the place that each SAE writes.
        places: sums of each of these places.
        saes: sums of each SAE.
        uniformity: uniformity of latent importance of each SAE; empty if it is not measured.
    """

    targets: list[Place]
    places: dict[Place, PlaceSums]
    saes: list[SAESums]
    uniformity: list[PerToken]
    clean: CleanLoss = field(default_factory=CleanLoss)

    @classmethod
    def empty(cls, subjects: Sequence[Subject], ablations: Iterable[str], uniformity: bool) -> Sums:
        """Sums without any data."""
        targets = [target_of(subject.place) for subject in subjects]
        return cls(
            targets,
            places={place: PlaceSums({kind: PerToken() for kind in ablations}) for place in targets},
            saes=[SAESums(LatentCounts.empty(subject.d_sae)) for subject in subjects],
            uniformity=[PerToken() for _ in subjects] if uniformity else [],
        )

    def place_of(self, number: int) -> PlaceSums:
        """The sums of the place that the SAE with this index writes."""
        return self.places[self.targets[number]]

    def of_sae(self, number: int) -> list[Piece]:
        """The pieces of the SAE with this index, without those of its place."""
        return [self.saes[number], *self.uniformity[number : number + 1]]

    def pieces(self) -> list[Piece]:
        """Every piece. The order is part of the key and the format of checkpoints."""
        found: dict[int, Piece] = {id(self.clean): self.clean}
        for number in range(len(self.saes)):
            for piece in (*self.place_of(number).pieces().values(), *self.of_sae(number)):
                found[id(piece)] = piece  # a place that several SAEs write comes with the first of them
        return list(found.values())
