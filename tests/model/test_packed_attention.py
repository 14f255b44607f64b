"""Attention without masks of all pairs: what flash-attn and torch's varlen_attn are handed, on stand-ins, against
masked SDPA in float64; and flex_attention itself, forward, which torch can run on CPU. No GPU has run either.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from moetrain.config.errors import ConfigError
from moetrain.model.attention import kernels, packed
from moetrain.model.attention.kernels import Rule, attend, choose
from moetrain.model.places import Places
from tests.model import fake_flash
from tests.model.test_decoder import TINY, build, ids, tiny

N = 24
LENGTHS = ((1, 7, 12, 4), (24,), (9, 1, 14))
FAKES = {
    "flash-attn 3": ("flash_attn_interface", {"flash_attn_varlen_func": fake_flash.flash_attn_3}),
    "flash-attn 2": ("flash_attn", {"flash_attn_varlen_func": fake_flash.flash_attn_2}),
    "torch's varlen_attn": ("torch.nn.attention.varlen", {"varlen_attn": fake_flash.varlen_attn}),
}


def documents() -> Tensor:
    """document_BN of ``LENGTHS``: a document of one token first, and one in the middle."""
    return torch.tensor([[i for i, length in enumerate(row) for _ in range(length)] for row in LENGTHS])


@pytest.fixture(autouse=True)
def nothing_found_yet() -> Iterator[None]:
    packed.flash_function.cache_clear()
    yield
    packed.flash_function.cache_clear()


def install(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Make this one the first that is found, and let it run on the CPU in float64."""
    for module, _ in FAKES.values():
        monkeypatch.setitem(sys.modules, module, None)  # as if it were not there
    monkeypatch.setitem(sys.modules, FAKES[name][0], SimpleNamespace(**FAKES[name][1]))
    monkeypatch.setattr(packed, "common_obstacle", lambda setting: None)
    found = packed.flash_function()
    assert found is not None and found[0] == name


def heads(H: int, G: int, d: int, v: int, batch: int = 3) -> list[Tensor]:
    g = torch.Generator().manual_seed(H + d)
    shapes = ((H, d), (G, d), (G, v))
    return [torch.randn(batch, N, *s, generator=g, dtype=torch.float64, requires_grad=True) for s in shapes]


def gradients(tensors: list[Tensor], places: Places, window: int | None, backend: str) -> list[Tensor]:
    out = attend(*tensors, places, Rule(0.3, window, backend=backend))  # type: ignore[arg-type]
    upstream = torch.arange(out.numel(), dtype=out.dtype).cos().view_as(out)
    return [out, *torch.autograd.grad(out, tensors, upstream)]


@pytest.mark.parametrize("name", FAKES)
@pytest.mark.parametrize(("H", "G", "d", "v"), [(4, 4, 8, 8), (6, 2, 16, 16), (4, 4, 24, 16)], ids=str)
@pytest.mark.parametrize("window", [None, 5, N])
@pytest.mark.parametrize("with_documents", [True, False])
def test_what_flash_gets_gives_what_masks_give(
    name: str, H: int, G: int, d: int, v: int, window: int | None, with_documents: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and gradients: groups of heads, values narrower than keys (latent attention), windows, no documents."""
    install(monkeypatch, name)
    tensors = heads(H, G, d, v)

    def places() -> Places:
        return Places(N, None, documents() if with_documents else None)

    for got, want in zip(
        gradients(tensors, places(), window, "flash"), gradients(tensors, places(), window, "sdpa"), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in TINY if name != "tiny-gpt-oss"])  # which has sinks
def test_a_model_is_the_same_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and all gradients, with documents. What the blocks share is made once."""
    install(monkeypatch, "flash-attn 2")
    cfg = tiny(name)
    cfg.attention.backend = "sdpa"
    plain = build(cfg, {})
    cfg.attention.backend = "flash"
    model, tokens = build(cfg, {}), ids(cfg, len(LENGTHS), N)
    made = []
    monkeypatch.setattr(packed.F, "pad", _counting(packed.F.pad, made))
    for one in (model, plain):
        one(tokens, tokens.roll(-1, 1), document_BN=documents())[0].backward()
    assert sum(t.dtype == torch.int64 for t in made) == 1  # the ends of the documents
    for (fqn, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        assert (p.grad - q.grad).norm() <= 1e-12 * q.grad.norm(), fqn


def _counting(call, seen: list[Tensor]):  # type: ignore[no-untyped-def]
    def inside(t: Tensor, *args: object, **more: object) -> Tensor:
        seen.append(t)
        return call(t, *args, **more)

    return inside


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("with_documents", [True, False])
def test_flex_sees_what_the_mask_sees(
    window: int | None, prefix: bool, with_documents: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward, in float32: torch does not differentiate it on CPU."""
    monkeypatch.setattr(packed, "common_obstacle", lambda setting: None)
    monkeypatch.setattr(packed.importlib.util, "find_spec", lambda name: object())
    tensors = [t.detach().float() for t in heads(6, 2, 16, 16)]
    prefix_BN = (torch.arange(N) < torch.tensor([[9], [1], [24]])) if prefix else None
    places = Places(N, None, documents() if with_documents else None, prefix_BN=prefix_BN)
    got, want = (
        attend(*tensors, places, Rule(0.3, window, backend=b))  # type: ignore[arg-type]
        for b in ("flex", "sdpa")
    )
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


CUDA = packed.Setting(torch.device("cuda"), torch.bfloat16, 64, 64, sinks=False, prefix=False, split=False)


def test_auto_takes_the_first_that_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(**FAKES["flash-attn 2"][1]))
    monkeypatch.setattr(packed.importlib.util, "find_spec", lambda name: object())
    assert choose("auto", CUDA) == ("flash", "by flash-attn 2")
    assert choose("auto", CUDA._replace(prefix=True))[0] == "flex"
    assert choose("auto", CUDA._replace(width=20))[0] == "flex"
    name, why = choose("auto", CUDA._replace(sinks=True))
    assert name == "sdpa" and why == "flash: it has no sinks; flex: it has no sinks"
    monkeypatch.setattr(packed.importlib.util, "find_spec", lambda name: None)
    assert choose("auto", CUDA._replace(prefix=True))[0] == "sdpa"
    assert choose("sdpa", CUDA) == ("sdpa", "asked for")


def test_torch_without_windows_in_varlen_attn_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.10's took is_causal and no scale."""
    for module, _ in FAKES.values():
        monkeypatch.setitem(sys.modules, module, None)
    old = SimpleNamespace(varlen_attn=lambda query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False: 0)
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", old)
    assert packed.flash_function() is None


@pytest.mark.parametrize(
    ("backend", "setting", "complaint"),
    [
        ("flash", CUDA._replace(device=torch.device("cpu")), "it needs CUDA, and this is cpu"),
        ("flash", CUDA._replace(dtype=torch.float32), "it takes bf16, not float32"),
        ("flash", CUDA._replace(prefix=True), "it has no prefix masks"),
        ("flash", CUDA._replace(width=20), "it takes heads of 8 to 256 by 8 and values no wider, not 20 and 64"),
        ("flash", CUDA._replace(v_width=128), ".* not 64 and 128"),
        ("flex", CUDA._replace(sinks=True), "it has no sinks"),
        ("flex", CUDA._replace(split=True), "it has no sequences split over ranks"),
    ],
)
def test_what_was_asked_for_and_cannot_run(backend: str, setting: packed.Setting, complaint: str) -> None:
    with pytest.raises(ConfigError, match=f"model.attention.backend={backend} cannot run: {complaint}; use") as error:
        choose(backend, setting)
    assert "\n" not in str(error.value)


def test_who_is_asked() -> None:
    """Compiled blocks have one graph on the CPU, and a dry run for CUDA one kernel for all."""
    places, cpu, cuda = Places(N, None, documents()), torch.device("cpu"), torch.device("cuda")
    assert not kernels.chooses("auto", cpu, places, None, compiled=True)
    assert not kernels.chooses("flash", torch.device("meta"), places, None, compiled=False)
    assert kernels.chooses("auto", cuda, places, None, compiled=True)
    assert not kernels.chooses("auto", cuda, Places(N), N, compiled=False)


@pytest.mark.skipif(packed.compiled_obstacle(torch.float32) is not None, reason="no compiler here")
@pytest.mark.parametrize(("H", "G", "d", "v"), [(4, 4, 8, 8), (6, 2, 16, 16), (4, 4, 24, 16)], ids=str)
@pytest.mark.parametrize("window", [None, 5, N])
@pytest.mark.parametrize("with_documents", [True, False])
def test_what_the_cpu_takes(H: int, G: int, d: int, v: int, window: int | None, with_documents: bool) -> None:
    """float32 on the CPU is compiled: values and gradients against masks in float64, and no mask is made."""
    places = Places(N, None, documents() if with_documents else None)
    exact = heads(H, G, d, v)
    got = gradients([t.detach().float().requires_grad_() for t in exact], places, window, "auto")
    assert set(places.kept) == {("native", places.effective(window))}
    for mine, want in zip(got, gradients(exact, places, window, "math"), strict=True):
        torch.testing.assert_close(mine.double(), want, rtol=1e-5, atol=1e-5)
