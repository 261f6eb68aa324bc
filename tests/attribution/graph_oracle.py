"""A frozen pass of a plain Hugging Face model, by hooks of PyTorch alone, and its Jacobian by autograd.

Every active latent, error, bias and embedding is multiplied by a number that is 1, and the derivative of a target with
respect to it is the direct effect. Nothing of the package's graphs is used, and coders only as holders of matrices.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from gemma_scope_tl.sae.layered import LayeredCoder
from tests.helpers import decoder_of

Key = tuple[Any, ...]


class Oracle:
    """Direct effects in a plain model.

    Args:
        hf: a model in float64 with eager attention.
        ids: ``[pos]``.
        coders: SAEs with ``site`` and ``layer``, and layered coders.
        before_gain: whether transcoders read the norm before its gain, as those of Gemma 2 do.
        applied: True ``[pos]`` where coders apply.
        constants: attention patterns and MLP outputs of each layer, which the backends round differently.
    """

    def __init__(
        self, hf: Any, ids: Tensor, coders: list[Any], before_gain: bool, applied: Tensor, constants: Any
    ) -> None:
        self.hf, self.ids, self.applied, self.before_gain = hf, ids, applied, before_gain
        self.decoder = decoder_of(hf)
        self.readers: list[tuple[str, int, Any, int]] = []  # site, layer, coder, k
        self.written: dict[tuple[str, int], tuple[Any, int]] = {}
        for coder in coders:
            layers = coder.layers if isinstance(coder, LayeredCoder) else [coder.layer]
            for k, layer in enumerate(layers):
                self.readers.append((coder.site, layer, coder, k))
                self.written["mlp" if coder.site == "transcoder" else coder.site, layer] = (coder, k)
        self.scales: dict[Key, Tensor] = {}
        self.acts: dict[tuple[str, int], Tensor] = {}
        self.pre: dict[tuple[str, int], Tensor] = {}
        self.read: dict[tuple[str, int], Tensor] = {}
        self.patterns, self.mlps = constants
        self.hold: dict[Key, Tensor] = {}  # denominators, errors
        self.run()
        self.final = self.run()

    def scale(self, *key: Any) -> Tensor:
        """The number 1 that a source is multiplied by."""
        if key not in self.scales:
            self.scales[key] = torch.ones((), dtype=torch.float64, requires_grad=True)
        return self.scales[key]

    def norm(self, name: Key, module: Any, x: Tensor, gain: bool = True) -> Tensor:
        """A norm whose denominator is the one of the first run."""
        if name not in self.hold:
            self.hold[name] = (x.pow(2).mean(-1, keepdim=True) + module.eps).sqrt().detach()
        out = x / self.hold[name]
        return out * (1 + module.weight.detach()) if gain else out

    def encode(self, site: str, layer: int, x: Tensor) -> None:
        """Latents that read a tensor; those of the first run stay."""
        for at, number, coder, k in self.readers:
            if (at, number) != (site, layer):
                continue
            arrays = ("W_enc", "b_enc", "threshold")
            layered = isinstance(coder, LayeredCoder)
            w, b, theta = (getattr(coder, n)[k] if layered else getattr(coder, n) for n in arrays)
            z = x @ w.detach() + b.detach()
            self.pre[site, layer] = z
            if (site, layer) not in self.acts:
                active = (z > theta) & self.applied[:, None]
                self.acts[site, layer] = torch.where(active, z, 0.0).detach()
            self.read[site, layer] = x

    def write(self, site: str, layer: int, y: Tensor) -> Tensor:
        """The tensor as the sum of its sources."""
        if (site, layer) not in self.written:
            return y
        coder, k = self.written[site, layer]
        at = coder.site
        where = self.applied[:, None].to(y)
        if isinstance(coder, LayeredCoder):
            parts = [(coder.layers[j], coder.W_dec[j][:, k - j].detach()) for j in range(k + 1)]
            bias = coder.b_dec[k].detach()
            skip = None if coder.W_skip is None else coder.W_skip[k].detach()
        else:
            parts, bias = [(layer, coder.W_dec.detach())], coder.b_dec.detach()
            turned = getattr(coder, "W_skip", None)
            skip = None if turned is None else turned.detach().T
        out = torch.zeros_like(y)
        for source_layer, rows in parts:
            f = self.acts[at, source_layer]
            entries = []
            for p, i in f.nonzero().tolist():
                entries.append((p, self.scale("latent", at, source_layer, p, i) * f[p, i] * rows[i]))
            for p in range(len(f)):
                mine = [vector for q, vector in entries if q == p]
                if mine:
                    out = out + torch.nn.functional.one_hot(torch.tensor(p), len(f))[:, None] * sum(mine)
        out = out + where * bias * self.scale("bias", site, layer)
        if skip is not None:
            out = out + (where * self.read[at, layer]) @ skip
        if ("error", site, layer) not in self.hold:
            self.hold["error", site, layer] = (y - out).detach()
        error = self.hold["error", site, layer]
        scales = torch.stack([self.scale("error", site, layer, p) for p in range(len(y))])
        return out + error * scales[:, None]

    def run(self) -> Tensor:
        """The frozen pass, ``[pos, d]`` before the unembedding."""
        seen: dict[str, Tensor] = {}
        with ExitStack() as stack, torch.enable_grad():
            add = lambda handle: stack.callback(handle.remove)  # noqa: E731
            for number, layer in enumerate(self.decoder.layers):
                add(layer.register_forward_pre_hook(self._enter(number), with_kwargs=True))
                for name in ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm"):
                    add(getattr(layer, name).register_forward_hook(self._norm(number, name)))
                add(layer.self_attn.register_forward_hook(self._attention(number), with_kwargs=True))
                add(layer.post_feedforward_layernorm.register_forward_hook(self._mlp(number)))
                add(layer.register_forward_hook(self._leave(number)))
            keep = lambda m, a, out: seen.__setitem__("final", self.norm(("final",), m, a[0][0]))  # noqa: E731
            add(self.decoder.norm.register_forward_hook(keep))
            self.hf(self.ids[None])
        return seen["final"]

    def _enter(self, number: int) -> Any:
        def hook(module: Any, args: Any, kwargs: Any) -> Any:
            if number:
                return None
            x = args[0][0].detach()
            self.encode("embedding", -1, x)
            scales = torch.stack([self.scale("embedding", p) for p in range(len(x))])
            return ((x * scales[:, None])[None], *args[1:]), kwargs

        return hook

    def _norm(self, number: int, name: str) -> Any:
        def hook(module: Any, args: Any, out: Tensor) -> Tensor:
            y = self.norm((name, number), module, args[0][0])
            if name == "pre_feedforward_layernorm":
                read = self.norm((name, number), module, args[0][0], gain=False) if self.before_gain else y
                self.encode("transcoder", number, read)
            return y[None]

        return hook

    def _attention(self, number: int) -> Any:
        def hook(module: Any, args: Any, kwargs: Any, out: Any) -> Any:
            x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            v = module.v_proj(x)[0].unflatten(-1, (-1, module.head_dim))
            v = v.repeat_interleave(self.patterns[number].shape[0] // v.shape[1], dim=1)
            z = torch.einsum("hqk,khd->qhd", self.patterns[number], v).flatten(1)
            self.encode("att", number, z)
            z = self.write("att", number, z)
            return (module.o_proj(z)[None], *out[1:])

        return hook

    def _mlp(self, number: int) -> Any:
        def hook(module: Any, args: Any, out: Tensor) -> Tensor:
            y = self.mlps[number].to(torch.float64)
            reads = any((site, layer) == ("mlp", number) for site, layer, _, _ in self.readers)
            if reads or ("mlp", number) not in self.written:
                scales = torch.stack([self.scale("mlp", number, p) for p in range(len(y))])
                y = y * scales[:, None]
            self.encode("mlp", number, y)
            return self.write("mlp", number, y)[None]

        return hook

    def _leave(self, number: int) -> Any:
        def hook(module: Any, args: Any, out: Tensor) -> Tensor:
            self.encode("res", number, out[0])
            return self.write("res", number, out[0])[None]

        return hook

    def effects(self, target: Tensor) -> dict[Key, float]:
        """The derivative of a number with respect to every source."""
        keys = list(self.scales)
        found = torch.autograd.grad(
            target, [self.scales[key] for key in keys], retain_graph=True, materialize_grads=True
        )
        return {key: float(g) for key, g in zip(keys, found, strict=True)}


@torch.no_grad()
def recorded(model: Any, ids: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Attention patterns and MLP outputs of a hooked model, which tests of splices compare with the plain one."""
    names = [[f"blocks.{layer}.{name}" for layer in range(model.dims.n_layers)] for name in _HOOKS]
    _, cache = model.run_with_cache(ids[None], names_filter=[*names[0], *names[1]])
    return [cache[name][0] for name in names[0]], [cache[name][0] for name in names[1]]


_HOOKS = ("attn.hook_pattern", "hook_mlp_out")
