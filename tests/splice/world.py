"""A small model under a sequence of operations, and what must be true of it after each: the interpreter of
``test_properties.py``. It keeps its own account of what is attached and hooked, and asks the model to agree."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from sae_lens import StandardSAE, StandardSAEConfig
from sae_lens.saes.sae import SAEMetadata

from gemma_scope_tl.errors import GemmaScopeError, SpliceError, UnknownNameError
from gemma_scope_tl.model.hook_names import translate_hook_name
from gemma_scope_tl.sae.access import locate
from tests.helpers import hooked, random_gemma, random_sae, random_tokens

POSITIONS = [None, 1, -1, [0, 2], slice(1, 3), torch.arange(4) % 2 == 0]
ACTS = "hook_sae_acts_post"


@dataclass(eq=False)
class Live:
    """An attached SAE, or a user's hook: on a site, or on the hook points of the SAE with the number ``sae``."""

    what: str
    sae: int | None
    stage: int = 0
    block: bool = False
    permanent: bool = False
    point: Any = None
    handle: Any = None
    fired: list[int] = field(default_factory=list)


def stock_sae(dims: Any) -> Any:
    """One of SAELens's own, at an att site, where heads come apart."""
    torch.manual_seed(3)
    metadata = SAEMetadata(hook_name="blocks.1.attn.hook_z")
    width = dims.n_heads * dims.d_head
    return StandardSAE(StandardSAEConfig(d_in=width, d_sae=64, reshape_activations="hook_z", metadata=metadata))


class World:
    """A model of one backend, nine SAEs, and operations on them."""

    def __init__(self, backend: str) -> None:
        self.model = hooked(random_gemma("narrow-heads"), backend)
        places = [("res", 0), ("res", 0), ("mlp", 1), ("att", 0), ("embedding", None), ("transcoder", 1), ("res", 1)]
        self.saes = [random_sae(self.model.dims, *place, d_sae=64, seed=i) for i, place in enumerate(places)]
        self.saes += [random_sae(self.model.dims, "transcoder", 0, d_sae=64, skip=True), stock_sae(self.model.dims)]
        self.wrong = [random_sae(self.model.dims, "att", 0), random_sae(self.model.dims, "res", 9, d_sae=64)]
        self.wrong[0].site = "res"
        self.tokens = random_tokens(self.model, length=6)
        self.tokens[1, :2], self.tokens[1, 2] = 0, 2  # padding, then BOS
        self.live: list[Live] = []
        self.stack: list[tuple[Any, list[Live], bool]] = []
        self.seen: dict[Any, torch.Tensor] = {}  # what the model said before in the same state
        self.done: Counter[str] = Counter()
        with torch.no_grad():
            self.seen["logits", ()] = self.model(self.tokens)
            self.model.run_with_cache(
                self.tokens
            )  # transformers hooks its attention once and for all, to show patterns
        self.pristine = self.snapshot()

    # -- the account ---------------------------------------------------------------------------------------------------

    def snapshot(self) -> Any:
        """All that splicing could leave behind."""

        def hooks(point: Any) -> Any:
            lens = [[id(handle) for handle in held] for held in (point.fwd_hooks, point.bwd_hooks)]
            return id(point), point.name, lens, list(point._forward_hooks), list(point._backward_hooks)

        def grads(module: Any) -> Any:
            return [(parameter.requires_grad, parameter.grad is None) for parameter in module.parameters()]

        kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        tracker = self.model.token_tracker
        return (
            {name: hooks(point) for name, point in self.model.hook_dict.items()},
            list(getattr(self.model, "mod_dict", ())),
            [[len(vars(module)[kind]) for kind in kinds] for module in self.model.modules()],
            [{name: hooks(point) for name, point in sae.hook_dict.items()} for sae in self.saes],
            [(sae.hook_z_reshaping_mode, sae.use_error_term, sae.training) for sae in self.saes],
            [grads(module) for module in (self.model, *self.saes)],
            (self.model.context_level, tracker.generating, list(self.model.acts_to_saes)),
        )

    def attached(self) -> list[Live]:
        return [one for one in self.live if one.handle is None]

    def names(self, i: int) -> list[str]:
        """Read and write hook of an SAE, in HookedTransformer's words."""
        site, layer = locate(self.saes[i])
        return [site.hook_name(layer, "hooked_transformer"), site.hook_name_out(layer, "hooked_transformer")]

    def plan(self, i: int, chain: bool) -> int | None:
        """The stage at which an SAE would be attached now, or None where it must be refused."""
        stages = [one.stage for one in self.attached() if self.names(one.sae or 0)[1] == self.names(i)[1]]
        if any(one.sae == i for one in self.attached()) or (stages and (not chain or i in (5, 7))):
            return None
        return max(stages, default=-1) + 1

    def state(self, extra: Live | None = None) -> Any:
        return tuple((one.what, one.sae, one.stage) for one in (*self.live, *([extra] if extra else [])))

    def agree(self, kind: str, value: torch.Tensor, extra: Live | None = None) -> None:
        """The same state has the same output to the bit, whatever went before."""
        known = self.seen.setdefault((kind, self.state(extra)), value)
        assert torch.equal(known, value), (kind, self.state(extra))

    def forget(self, gone: list[Live]) -> None:
        """Strike SAEs off, and hooks of blocks on them: once detached, no block finds those."""
        numbers = {one.sae for one in gone if one.handle is None}
        self.live = [
            one for one in self.live if one not in gone and not (one.block and one.handle and one.sae in numbers)
        ]

    def check(self) -> None:
        wanted = [self.names(one.sae or 0)[0] + (f".{one.stage}" if one.stage else "") for one in self.attached()]
        assert list(self.model.acts_to_saes) == wanted
        assert list(self.model.acts_to_saes.values()) == [self.saes[one.sae or 0] for one in self.attached()]

    # -- operations ----------------------------------------------------------------------------------------------------

    def attach(self, i: int, error: bool, chain: bool, where: int) -> None:
        stage = self.plan(i, chain)
        options = {"use_error_term": error, "chain": chain, "positions": POSITIONS[where]}
        if stage is None:
            self.done["attach refused"] += 1
            with pytest.raises(SpliceError):
                self.model.add_sae(self.saes[i], **options)
            return
        self.model.add_sae(self.saes[i], **options)
        self.live.append(Live(f"sae {error} {where}", i, stage))

    def attach_wrong(self, which: int) -> None:
        with pytest.raises(SpliceError):
            self.model.add_sae(self.wrong[which])

    def detach(self, k: int, backend: str) -> None:
        if not self.attached():
            with pytest.raises(UnknownNameError):
                self.model.reset_saes("blocks.0.hook_resid_post")
            return
        read = self.names(self.attached()[k % len(self.attached())].sae or 0)[0]
        site, layer = locate(self.saes[self.attached()[k % len(self.attached())].sae or 0])
        self.model.reset_saes(site.hook_name(layer, backend))  # type: ignore[arg-type]
        self.forget([one for one in self.attached() if self.names(one.sae or 0)[0] == read])

    def detach_all(self) -> None:
        self.model.reset_saes()
        self.forget(self.attached())

    def open_saes(self, i: int, j: int, error: bool, chain: bool, where: int, keep: bool) -> None:
        before, added = list(self.live), []
        for number in (i, j):
            stage = self.plan(number, chain)
            added.append(None if stage is None else Live(f"sae {error} {where}", number, stage))
            self.live += [one for one in added[-1:] if one]
        block = self.model.saes([self.saes[i], self.saes[j]], not keep, error, True, POSITIONS[where], chain)
        if None in added:
            self.live = before
            self.done["open_saes refused"] += 1
            with pytest.raises(SpliceError):
                block.__enter__()
            return
        block.__enter__()
        self.stack.append((block, [one for one in added if one], keep))

    def _hook_fn(self, live: Live, kind: str) -> Callable[..., Any]:
        def fn(value: torch.Tensor, hook: Any) -> torch.Tensor | None:
            live.fired.append(1)
            if kind == "in place":
                value.mul_(0.5)
            return value * 0.5 if kind == "edit" else None

        return fn

    def hook(self, target: int, kind: str, how: str) -> None:
        """A user's hook on the site that SAE ``target`` writes, or (from 100) on the SAE itself."""
        on_sae, i = divmod(target, 100)
        live = Live(f"hook {target} {kind}", i if on_sae else None, block=how == "block", permanent=how == "permanent")
        name = self.model.get_sae_hook_name(self.saes[i], ACTS) if on_sae else self.names(i)[1]
        if on_sae and name in self.model.hook_dict:
            i = live.sae = next(
                one.sae or 0
                for one in self.attached()
                if self.saes[one.sae or 0].hook_dict[ACTS] is self.model.hook_dict[name]
            )
            live.what = f"hook {100 + i} {kind}"
        fn = self._hook_fn(live, kind)
        if on_sae and not any(one.sae == i for one in self.attached()):
            with pytest.raises(UnknownNameError):
                self.model.hooks([(name, fn)]) if how == "block" else self.model.add_hook(name, fn)
            return
        block = self.model.hooks([(name, fn)]) if how == "block" else None
        _ = block.__enter__() if block else self.model.add_hook(name, fn, is_permanent=live.permanent)
        hooks = self.model.hook_dict
        live.point = hooks[name if on_sae else translate_hook_name(name, hooks, self.model.backend)]
        live.handle = live.point.fwd_hooks[-1]
        self.live.append(live)
        if block is not None:
            self.stack.append((block, [live], False))

    def close(self, by_exception: bool) -> None:
        if not self.stack:
            return
        block, added, keep = self.stack.pop()
        if by_exception:
            error = ZeroDivisionError()
            assert not block.__exit__(ZeroDivisionError, error, None)
        else:
            block.__exit__(None, None, None)
        if not keep or by_exception:
            self.forget([one for one in added if one in self.live])

    def reset_hooks(self, including_permanent: bool) -> None:
        self.model.reset_hooks(including_permanent=including_permanent)
        reached = {one.sae for one in self.attached()} | {None}
        self.live = [
            one
            for one in self.live
            if one.handle is None or one.sae not in reached or (one.permanent and not including_permanent)
        ]

    def forward(self) -> None:
        for one in self.live:
            one.fired.clear()
        with torch.no_grad():
            self.agree("logits", self.model(self.tokens))
        attached = {one.sae for one in self.attached()} | {None}
        for one in self.live:
            if one.handle is not None:
                assert len(one.fired) == (one.sae in attached)

    def gradient(self) -> None:
        leaves: list[torch.Tensor] = []

        def leaf(value: torch.Tensor, hook: Any) -> torch.Tensor:
            leaves.append(value.detach().clone().requires_grad_())
            return leaves[0] * 1

        logits = self.model.run_with_hooks(self.tokens, fwd_hooks=[("blocks.0.attn.hook_z", leaf)])
        assert bool(torch.autograd.grad(logits.square().mean(), leaves)[0].isfinite().all())

    def fail(self, target: int, positions: bool) -> None:
        """An exception in a hook on a site or an SAE, or in the splice itself, for a position that does not exist."""
        on_sae, i = divmod(target, 100)
        if positions and self.plan(i, chain=True) is not None:
            with pytest.raises(SpliceError, match="No position 77"), torch.no_grad():
                self.model.run_with_saes(self.tokens, saes=self.saes[i], positions=77, chain=True)
            return
        inside = on_sae and any(one.sae == i for one in self.attached())
        name = self.model.get_sae_hook_name(self.saes[i]) if inside else self.names(i)[1]
        with pytest.raises(ZeroDivisionError), torch.no_grad():
            self.model.run_with_hooks(self.tokens, fwd_hooks=[(name, lambda value, hook: 1 / 0)])

    def cached(self, i: int, error: bool, where: int, everything: bool) -> None:
        stage = self.plan(i, chain=True)
        options = {"use_error_term": error, "positions": POSITIONS[where], "chain": True}
        if stage is None:
            with pytest.raises(SpliceError):
                self.model.run_with_cache_with_saes(self.tokens, saes=self.saes[i], **options)
            return
        name = f"{self.names(i)[1]}{f'.{stage}' if stage else ''}.{ACTS}"
        with torch.no_grad():
            logits, cache = self.model.run_with_cache_with_saes(
                self.tokens, saes=self.saes[i], names_filter=None if everything else [name], **options
            )
        assert cache[name].shape == (*self.tokens.shape, 64)
        if not everything:  # a hook on the pre-activations makes them dense, and rounds otherwise
            self.agree("logits", logits, Live(f"sae {error} {where}", i, stage))

    def generate(self, use_cache: bool) -> None:
        def run() -> torch.Tensor:
            return self.model.generate(
                self.tokens[:1], max_new_tokens=2, do_sample=False, stop_at_eos=False, use_past_kv_cache=use_cache
            )

        self.agree(f"text {use_cache}", run())

    def copied(self, i: int, pickled: bool, error: bool, where: int) -> None:
        """A copy, made whether or not the original is attached, splices as the original does."""
        if any(one.sae == i and one.handle for one in self.live):
            return  # the user's hooks would come along
        pickled &= i != 8  # SAELens's own keep local functions
        twin = pickle.loads(pickle.dumps(self.saes[i])) if pickled else copy.deepcopy(self.saes[i])
        for name, value in self.saes[i].state_dict().items():
            assert torch.equal(twin.state_dict()[name], value)
        stage = self.plan(i, chain=True)
        if stage is not None:
            options = {"use_error_term": error, "positions": POSITIONS[where], "chain": True}
            with torch.no_grad():
                logits = self.model.run_with_saes(self.tokens, saes=twin, **options)
            self.agree("logits", logits, Live(f"sae {error} {where}", i, stage))
            assert [point.name for point in twin.hook_dict.values()] == list(twin.hook_dict)

    # -- a whole sequence ----------------------------------------------------------------------------------------------

    def run(self, operations: list[tuple[Any, ...]]) -> None:
        """All operations, then everything closed and detached: nothing may be left."""
        self.live, self.stack = [], []
        try:
            for name, *arguments in operations:
                self.done[name] += 1
                getattr(self, name)(*arguments)
                self.check()
            for i in range(len(self.stack)):
                self.close(by_exception=i % 2 == 1)
            self.detach_all()
            self.check()
            self.forward()  # the user's hooks that are left fire once each
            for point in {id(one.point): one.point for one in self.live}.values():
                left = [one.handle for one in self.live if one.point is point]
                assert len(point.fwd_hooks) == len(left)
                assert all(a is b for a, b in zip(point.fwd_hooks, left, strict=True))
        except GemmaScopeError as error:
            raise AssertionError("refused where nothing is wrong") from error
        finally:
            self.clean_up()
        self.done["sequences"] += 1
        assert self.snapshot() == self.pristine
        self.forward()

    def clean_up(self) -> None:
        """What the user would take away in the end."""
        while self.stack:
            self.stack.pop()[0].__exit__(None, None, None)
        self.model.reset_saes()
        for one in self.live:
            if one.handle is not None and one.handle in one.point.fwd_hooks:
                one.handle.hook.remove()
                one.point.fwd_hooks.remove(one.handle)
        self.live = []
