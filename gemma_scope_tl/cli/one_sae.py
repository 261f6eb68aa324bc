"""The model and the one SAE that `features`, `steer`, `top-tokens` and `attribute` look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gemma_scope_tl.cli import checks, options
from gemma_scope_tl.cli.choice import registry_name
from gemma_scope_tl.cli.output import note, progress

if TYPE_CHECKING:
    import pandas as pd

    from gemma_scope_tl.registry.schema import SAERow


@dataclass
class OneSAE:
    """Which model, which SAE of it, and how the answer is printed."""

    model: options.ModelName = "bundled"
    sae_model: options.SaeModel = None
    site: options.Site = "res"
    layer: options.Layer = 2
    width: options.Width = None
    l0: options.L0 = "canonical"
    backend: options.Backend = "bridge"
    device: options.Device = None
    dtype: options.Dtype = "float32"
    as_json: options.Json = False

    def check(self) -> None:
        """See that there is such an SAE, and such a device.

        Raises:
            UnknownNameError: with those that exist.
            DeviceError: with the devices that are here.
        """
        self.row()
        checks.available(self.device)

    def row(self) -> SAERow:
        """The SAE's registry row."""
        from gemma_scope_tl.registry import find
        from gemma_scope_tl.registry.listing import select_rows

        name = registry_name(self.model, self.sae_model)
        layer = None if self.site == "embedding" else self.layer
        width = self.width
        if width is None:
            rows = select_rows(model=name, site=self.site, layer=layer)
            width = min(rows, key=lambda row: row.d_sae).width if rows else "16k"
        return find(name, self.site, layer, width, self.l0)

    def name(self) -> str:
        """The SAE's release and id, as results name it."""
        row = self.row()
        return f"{row.release} {row.id}"

    def named(self, table: pd.DataFrame) -> pd.DataFrame:
        """A table for JSON whose every row says which SAE it is of; of an empty one, standard error says it."""
        row = self.row()
        if not len(table):
            note(f"note: no row; the SAE is {self.name()}.")
        return table.assign(release=row.release, id=row.id)

    def check_latent(self, latent: int) -> None:
        """See that the SAE has this latent.

        Raises:
            GemmaScopeError: it has fewer.
        """
        from gemma_scope_tl.errors import GemmaScopeError

        row = self.row()
        if latent >= row.d_sae:
            raise GemmaScopeError(f"{self.name()} has latents 0 to {row.d_sae - 1:,}, and no {latent:,}.")

    def load(self) -> tuple[Any, Any]:
        """The model and the SAE, on its device."""
        from gemma_scope_tl.dtypes import parse_device

        device = parse_device(self.device)
        from gemma_scope_tl.adapters.loading import load_model
        from gemma_scope_tl.sae.loading import load_row

        with progress.status("loading"):
            sae = load_row(self.row(), device=device, dtype=self.dtype)
            return load_model(self.model, backend=self.backend, device=device, dtype=self.dtype), sae
