"""Every public entry point, every way of giving a batch, both backends: the answer of Hugging Face on each text alone.

The ways stand in :func:`ways`, the entry points in :data:`PASSES`, :data:`GENERATIONS` and :data:`TABLES`; a public
method or function in none of them, nor in :data:`NO_TEXT`, fails :func:`test_every_entry_point_has_a_row`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import gemma_scope_tl as gs
from gemma_scope_tl.sites import BACKENDS
from gemma_scope_tl.text.batch import as_batch
from tests.helpers import CharTokenizerFactory, hooked, random_gemma, random_sae
from tests.inputs.ways import TEMPLATE, padded

TEXTS = ["hello you", "hi", "a third one"]
NEW = 4  # tokens to generate
ROUNDING = 2e-5  # float32, relative to logits of about 30
CONFIG = "narrow-heads"


def _tokenizer() -> Any:
    tokenizer = CharTokenizerFactory.get()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def _alone(texts: list[str]) -> list[torch.Tensor]:
    return [_tokenizer()(text, return_tensors="pt")["input_ids"] for text in texts]


def _messages(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def ways() -> dict[str, tuple[list[str], Any, dict[str, Any]]]:
    """By name: the texts that are meant (``""`` a filler row), what is given for them, and keywords with it."""
    rows = [ids[0] for ids in _alone(TEXTS)]
    left, right = padded(rows, "left"), padded(rows, "right")
    filler = torch.cat([left, torch.zeros_like(left[:1])])
    encoded = {side: _tokenizer()(TEXTS, return_tensors="pt", padding=True, padding_side=side) for side in _SIDES}
    return {
        "text": (TEXTS[:1], TEXTS[0], {}),
        "ids": (TEXTS[:1], rows[0], {}),
        "list": (TEXTS, TEXTS, {}),
        "left-padded": (TEXTS, left, {}),
        "right-padded": (TEXTS, right, {}),
        "with mask": (TEXTS, padded(rows, "left", 9), {"attention_mask": (left != 0).long()}),
        "BatchEncoding, left": (TEXTS, encoded["left"], {}),
        "BatchEncoding, right": (TEXTS, encoded["right"], {}),
        "with a filler row": ([*TEXTS, ""], filler, {}),
    }


_SIDES = ("left", "right")


class World:
    """A hooked model and the plain one."""

    def __init__(self, backend: str) -> None:
        self.plain = random_gemma(CONFIG)
        self.model = hooked(random_gemma(CONFIG), backend)
        self.model.tokenizer.chat_template = TEMPLATE
        self.sae = random_sae(self.model.dims, "res", 0)
        self._generated: dict[str, list[int]] = {}
        self.ways = ways()
        self.texts = {text: _alone([text])[0] for text in (*TEXTS, *(f"<user>{t}<model>" for t in TEXTS))}
        self.wanted = {text: self.logits(ids) for text, ids in self.texts.items()}
        self.wanted_spliced = {text: self.spliced_logits(ids) for text, ids in self.texts.items()}

    @torch.no_grad()
    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Hugging Face's logits ``[pos, vocab]`` of one text."""
        return self.plain(ids).logits[0]

    @torch.no_grad()
    def spliced_logits(self, ids: torch.Tensor) -> torch.Tensor:
        """The same with the SAE in the place of layer 0's output everywhere but at BOS, by the formula."""

        def replace(_module: Any, _args: Any, out: torch.Tensor) -> torch.Tensor:
            pre = out @ self.sae.W_enc + self.sae.b_enc
            recons = torch.where(pre > self.sae.threshold, pre, 0.0) @ self.sae.W_dec + self.sae.b_dec
            return torch.where((ids == 2)[..., None], out, recons)

        handle = self.plain.model.layers[0].register_forward_hook(replace)
        try:
            return self.plain(ids).logits[0]
        finally:
            handle.remove()

    def generated(self, ids: torch.Tensor) -> list[int]:
        """The tokens that Hugging Face generates behind one text, cut behind EOS."""
        key = str(ids.tolist())
        if key not in self._generated:
            out = self.plain.generate(ids, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
            self._generated[key] = out[0, ids.shape[1] :].tolist()
        return self._generated[key]


@pytest.fixture(params=BACKENDS, scope="module")
def world(request: pytest.FixtureRequest) -> World:
    return World(request.param)


def _row(of: torch.Tensor, number: int, length: int, way: str) -> torch.Tensor:
    """The columns of a row that hold its text."""
    return of[number, :length] if "right" in way else of[number, of.shape[1] - length :]


# -- passes: [batch, pos, vocab] of the batch against each text alone -------------------------------------------------

Entry = Callable[..., torch.Tensor]
ERROR_TERM = {"error_term": True}
PASSES: dict[str, Entry] = {
    "forward": lambda w, given, **how: w.model(given, **how),
    "run_with_hooks": lambda w, given, **how: w.model.run_with_hooks(given, fwd_hooks=[], **how),
    "run_with_cache": lambda w, given, **how: w.model.run_with_cache(given, names_filter="hook_embed", **how)[0],
    "hooks": lambda w, given, **how: _inside(w.model.hooks([]), w, given, how),
    "run_with_saes": lambda w, given, **how: w.model.run_with_saes(given, saes=w.sae, **how),
    "run_with_cache_with_saes": lambda w, given, **how: w.model.run_with_cache_with_saes(given, saes=w.sae, **how)[0],
    "run_with_hooks_with_saes": lambda w, given, **how: w.model.run_with_hooks_with_saes(
        given, saes=w.sae, fwd_hooks=[], **how
    ),
    "saes": lambda w, given, **how: _inside(w.model.saes([w.sae]), w, given, how),
    "splice": lambda w, given, **how: _inside(gs.splice(w.model, w.sae), w, given, how),
    "add_sae": lambda w, given, **how: _added(w, given, how),
}
SPLICED = {name for name in PASSES if "sae" in name or name == "splice"}


def _inside(block: Any, world: World, given: Any, how: dict[str, Any]) -> torch.Tensor:
    with block:
        return world.model(given, **how)


def _added(world: World, given: Any, how: dict[str, Any]) -> torch.Tensor:
    world.model.add_sae(world.sae)
    try:
        return world.model(given, **how)
    finally:
        world.model.reset_saes()


@pytest.mark.parametrize("entry", PASSES)
def test_passes(world: World, entry: str, subtests: pytest.Subtests) -> None:
    logits = world.wanted_spliced if entry in SPLICED else world.wanted
    for way, (texts, given, how) in world.ways.items():
        with subtests.test(way=way):
            with torch.no_grad():
                got = PASSES[entry](world, given, **how)
            assert bool(torch.isfinite(got).all())
            for number, text in enumerate(filter(None, texts)):
                row = _row(got, number, logits[text].shape[0], way)
                torch.testing.assert_close(row, logits[text], rtol=0, atol=ROUNDING * 30)


def test_loss(world: World, subtests: pytest.Subtests) -> None:
    """The mean over all predictions of Hugging Face from each text alone."""
    for way, (texts, given, how) in world.ways.items():
        with subtests.test(way=way):
            losses = []
            for text in filter(None, texts):
                logits, ids = world.wanted[text], world.texts[text]
                losses += torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="none").tolist()
            with torch.no_grad():
                positional, named = world.model(given, "loss", **how), world.model(given, return_type="loss", **how)
                logits, both = world.model(given, return_type="both", **how)
            assert named.item() == pytest.approx(sum(losses) / len(losses), abs=2e-5)
            by_hand = world.model.loss_fn(logits, as_batch(world.model, given, **how).ids, how.get("attention_mask"))
            assert both.item() == named.item() == positional.item() and logits.ndim == 3
            assert by_hand.item() == pytest.approx(named.item(), abs=1e-6)


def test_messages(world: World) -> None:
    """One conversation or several are the text that the template writes, with one BOS."""
    conversations = [_messages(text) for text in TEXTS]
    texts = [f"<user>{text}" for text in TEXTS]
    with torch.no_grad():
        several, one = world.model(conversations), world.model(conversations[0])
    for number, ids in enumerate(_alone(texts)):
        torch.testing.assert_close(_row(several, number, ids.shape[1], ""), world.logits(ids), rtol=0, atol=6e-4)
    torch.testing.assert_close(one[0], world.logits(_alone(texts)[0]), rtol=0, atol=6e-4)


# -- generation: new tokens against Hugging Face's on each text alone --------------------------------------------------

GREEDY = {"max_new_tokens": NEW, "do_sample": False}
GENERATIONS: dict[str, Callable[..., torch.Tensor]] = {
    "generate": lambda w, given, cache, **how: w.model.generate(
        given, use_past_kv_cache=cache, return_type="tokens", **GREEDY, **how
    ),
    "generate_stream": lambda w, given, cache, **how: torch.cat(
        list(
            w.model.generate_stream(
                given, max_tokens_per_yield=2, use_past_kv_cache=cache, return_type="tokens", **GREEDY, **how
            )
        ),
        dim=1,
    ),
    "hf_generate": lambda w, given, cache, **how: w.model.hf_generate(
        given, use_past_kv_cache=cache, return_type="tokens", **GREEDY, **how
    ),
    "original_model.generate": lambda w, given, cache, **how: w.model.original_model.generate(
        **(dict(given) if hasattr(given, "keys") else {"inputs": given}), use_cache=cache, **GREEDY, **how
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("cache", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("entry", GENERATIONS)
def test_generation(world: World, entry: str, cache: bool, subtests: pytest.Subtests) -> None:
    """Also of the bridge's Hugging Face model, as pipelines and evaluation harnesses call it, with ids."""
    if world.model.backend == "hooked_transformer" and entry in ("hf_generate", "original_model.generate"):
        assert not hasattr(world.model, entry.split(".")[0])
        return
    messages = ([f"<user>{t}<model>" for t in TEXTS], [_messages(text) for text in TEXTS], {})
    for way, (texts, given, how) in {**world.ways, "messages": messages}.items():
        ids = given
        if entry == "original_model.generate":
            if not isinstance(given, torch.Tensor) and not hasattr(given, "keys"):
                continue  # Hugging Face takes ids alone
            ids = given[None] if isinstance(given, torch.Tensor) and given.ndim == 1 else given
        with subtests.test(way=way):
            got = GENERATIONS[entry](world, ids, cache, **how)
            for number, text in enumerate(filter(None, texts)):
                wanted = world.generated(world.texts[text])
                assert got[number, -NEW:].tolist()[: len(wanted)] == wanted, f"row {number}"


@pytest.mark.parametrize("method", ["generate", "generate_stream", "hf_generate"])
def test_texts_come_back_for_texts(world: World, method: str) -> None:
    """As the tokenizer decodes what Hugging Face generates."""
    if not hasattr(world.model, method):
        assert world.model.backend == "hooked_transformer"
        return
    run = getattr(world.model, method)
    for given in (TEXTS[0], TEXTS):
        texts = [given] if isinstance(given, str) else given
        got = run(given, **GREEDY) if method != "generate_stream" else list(run(given, **GREEDY))
        if method == "generate_stream":
            pieces = [[piece] if isinstance(piece, str) else piece for piece in got]
            got = ["".join(row) for row in zip(*pieces, strict=True)]
        wanted = [
            world.model.tokenizer.decode([*ids[0].tolist(), *world.generated(ids)], skip_special_tokens=True)
            for ids in _alone(texts)
        ]
        assert ([got] if isinstance(got, str) else list(got)) == wanted


# -- nothing is left out ----------------------------------------------------------------------------------------------

# Public, and given no text (or, below the line, TransformerLens's own tools that read texts for other purposes).
NO_TEXT = {
    *("About", "AdapterMismatch", "GemmaScopeError", "JumpReLUSAE", "JumpReLUTranscoder", "ablate", "clamp"),
    *("export_suite", "list_saes", "load_latents", "load_model", "load_sae", "load_suite", "register_release"),
    *("register_with_sae_lens", "save_sae", "scale", "steer", "top_tokens", "train_suite", "upload_suite"),
    "unregister_release",
    *("graph_notes", "read_graph", "write_graph", "write_graph_page"),  # of a graph that was made: tests/attribution
    "verify",  # its texts are a file or a data set: tests/verify/test_run.py
    *("__version__", "reset_saes", "excluded_ids", "get_sae_hook_name", "prepare", "read_cache_kwarg"),
    *(
        "device_of",
        "set_tokenizer",
        "embedding_module",
        "check_fits",
        "check_row_fits",
        "enable_compatibility_mode",
        "process_weights_",
    ),
    *("sae_hook_points", "site_hook_point", "add_hook", "reset_hooks", "add_perma_hook"),
}
TABLES = {
    "attribute",
    "attribution_graph",
    "circuit",
    "evaluate",
    "feature_page",
    "features",
    "mean_norms",
}  # tests/inputs/test_tables.py
LOSSES = {"loss_fn"}  # test_loss
TEXT_TOOLS = {"to_tokens", "to_str_tokens", "to_string", "to_single_token", "to_single_str_token"}


def test_every_entry_point_has_a_row(world: World) -> None:
    """Every public function, and every method that this package defines on the models."""
    ours = {
        name
        for one in type(world.model).__mro__
        if one.__module__.startswith("gemma_scope_tl.")
        for name, value in vars(one).items()
        if not name.startswith("_") and callable(value)
    }
    functions = {
        name for name in gs.__all__ if callable(getattr(gs, name)) and not hasattr(getattr(gs, name), "__path__")
    }
    rows = {*PASSES, *GENERATIONS, *TABLES, *NO_TEXT, *TEXT_TOOLS, *LOSSES}
    assert sorted((ours | functions) - rows) == []
