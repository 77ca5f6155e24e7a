"""Attention against a float64 softmax with a mask built pair by pair from the contract."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from unimm_kernels import attention, attention_tma, tuning
from unimm_kernels.testing import poisoned_memory, relative_error

# Half precision: inputs are exact, so the error is that of rounded weights and gradients.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


def visible(
    length: int, keys: int, causal: bool, window: int | None, documents: Tensor | None
) -> Tensor:
    """(B or 1, T, S): which key each query may see."""
    i = torch.arange(length)[:, None] + keys - length
    j = torch.arange(keys)[None, :]
    mask = torch.ones(1, length, keys, dtype=torch.bool)
    if causal:
        mask = mask & (j <= i)
    if window is not None:
        mask = mask & (i - j < window)
    if documents is not None:
        mask = mask & (documents[:, :, None] == documents[:, None, :])
    return mask


def expected(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    q, k, v = (t.double() for t in (q, k, v))
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = torch.einsum("bthd,bshd->bhts", q, k) * (scale or q.shape[-1] ** -0.5)
    weights = scores.masked_fill(~mask[:, None].to(q.device), float("-inf")).softmax(-1)
    return torch.einsum("bhts,bshd->bthd", weights, v)


def inputs(
    shape: tuple[int, int, int, int, int, int], dtype: torch.dtype, device: str
) -> tuple[list[Tensor], Tensor]:
    """q, k, v as views with strides of their own (a fused projection's output), and a gradient."""
    batch, length, keys, heads, groups, dim = shape
    torch.manual_seed(sum(shape))
    q = torch.randn(batch, length, heads * 2, dim, device=device).to(dtype)[:, :, ::2]
    kv = torch.randn(batch, keys, 2 * groups, dim, device=device).to(dtype)
    k, v = kv[:, :, :groups], kv[:, :, groups:]
    grad = torch.randn(batch, heads, length, dim, device=device).to(dtype).transpose(1, 2)
    return [t.detach().requires_grad_() for t in (q, k, v)], grad


def documents_of(batch: int, length: int) -> Tensor:
    """Runs of uneven length, from 1 token up, other cuts in each row."""
    rows = []
    for row in range(batch):
        cuts = torch.zeros(length, dtype=torch.int64)
        cuts[torch.tensor([7 + row, 8 + row, length // 3, 2 * length // 3 + row])] = 1
        rows.append(cuts.cumsum(0))
    return torch.stack(rows)


def check(
    shape: tuple[int, int, int, int, int, int],
    dtype: torch.dtype,
    device: str,
    implementation: str,
    **options: Any,
) -> None:
    tensors, grad = inputs(shape, dtype, device)
    documents = options.get("segment_ids")
    mask = visible(
        shape[1], shape[2], options.get("causal", True), options.get("window"), documents
    )
    if documents is not None:
        options["segment_ids"] = documents.to(device)
    wide = [t.detach().double().requires_grad_() for t in tensors]
    want = expected(wide[0], wide[1], wide[2], mask, options.get("scale"))
    want_grads = torch.autograd.grad(want, wide, grad.double())
    with poisoned_memory():
        got = attention(*tensors, **options, implementation=implementation)
        grads = torch.autograd.grad(got, tensors, grad)
    assert got.dtype == dtype
    assert relative_error(got, want) < TOLERANCE[dtype]
    for name, a, b in zip("qkv", grads, want_grads, strict=True):
        assert relative_error(a, b) < TOLERANCE[dtype], f"gradient of {name}"


SHAPES = [  # B, T, S, H, G, D
    pytest.param((1, 1, 1, 1, 1, 64), id="one-token"),
    pytest.param((2, 63, 63, 4, 2, 16), id="small-grouped"),
    pytest.param((1, 123, 123, 2, 2, 80), id="D80"),
    pytest.param((1, 257, 257, 2, 1, 64), id="257"),
    pytest.param((1, 123, 257, 2, 1, 96), id="more-keys"),
    pytest.param((1, 63, 63, 1, 1, 128), id="D128"),
    pytest.param((1, 63, 63, 1, 1, 256), id="D256"),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_causal(
    shape: tuple[int, int, int, int, int, int], implementation: str, device: str
) -> None:
    check(shape, torch.float32, device, implementation)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_half_precision(dtype: torch.dtype, implementation: str, device: str) -> None:
    check((2, 123, 123, 4, 2, 64), dtype, device, implementation)


MODES = [
    pytest.param({"causal": False}, id="full"),
    pytest.param({"window": 1}, id="itself"),
    pytest.param({"window": 1000}, id="wide-window"),
    pytest.param({"segment_ids": documents_of(2, 123)}, id="packed"),
    pytest.param({"segment_ids": documents_of(2, 123), "causal": False}, id="packed-full"),
    pytest.param({"segment_ids": documents_of(2, 123), "window": 17}, id="packed-window"),
    pytest.param({"scale": 0.3}, id="scale"),
]


@pytest.mark.parametrize("options", MODES)
@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_masks(options: dict[str, Any], implementation: str, device: str) -> None:
    check((2, 123, 123, 2, 1, 16), torch.float32, device, implementation, **options)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="causal"),
        pytest.param({"causal": False}, id="full"),
        pytest.param({"window": 20}, id="window"),
        pytest.param({"segment_ids": documents_of(1, 63)}, id="packed"),
        pytest.param({"segment_ids": documents_of(1, 63), "causal": False}, id="packed-full"),
        pytest.param({"segment_ids": documents_of(1, 63), "window": 9}, id="packed-window"),
    ],
)
def test_masks_over_many_tiles(
    options: dict[str, Any], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With tiles of 16 each row meets masked, unmasked and skipped tiles."""
    for kernel in tuning.DEFAULTS:
        monkeypatch.setitem(tuning.DEFAULTS, kernel, lambda *_: tuning.Tiles(16, 16, 4, 1))
    check((1, 63, 63, 2, 1, 16), torch.float32, device, "triton", **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        pytest.param((1, 1, 1, 1, 1, 64), {}, id="one-token"),
        pytest.param((1, 257, 257, 2, 1, 32), {}, id="causal"),
        pytest.param((1, 123, 257, 2, 1, 96), {}, id="more-keys"),
        pytest.param((1, 123, 63, 2, 2, 80), {"causal": False}, id="full-D80"),
        pytest.param((2, 123, 123, 2, 1, 128), {"window": 17}, id="window"),
        pytest.param((2, 257, 257, 2, 1, 16), {"segment_ids": documents_of(2, 257)}, id="packed"),
        pytest.param(
            (2, 123, 123, 2, 1, 16),
            {"segment_ids": documents_of(2, 123), "window": 17},
            id="packed-window",
        ),
        pytest.param((1, 63, 63, 1, 1, 256), {}, id="D256"),
    ],
)
def test_tiles_by_descriptor(
    shape: tuple[int, int, int, int, int, int],
    options: dict[str, Any],
    dtype: torch.dtype,
    device: str,
) -> None:
    check(shape, dtype, device, "triton-ws", **options)


def test_a_document_for_each_token_by_descriptor(device: str) -> None:
    """All bits of all words are set."""
    ids = torch.arange(130).expand(1, 130)
    check((1, 130, 130, 1, 1, 16), torch.bfloat16, device, "triton-tma", segment_ids=ids)


def test_words_of_boundaries() -> None:
    starts = torch.tensor([[0, 0, 2] + [3] * 12 + [15, 16] + [16] * 3])
    words = attention_tma.boundary_words(starts.int())
    assert words.tolist() == [[1 + 4 + 8 + 2**15, 1]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": torch.float32}, "needs half precision, these tensors are torch.float32"),
        ({"causal": False, "packed": True}, "packed documents under a causal mask alone"),
        ({"dim": 20}, "needs q and its strides in multiples of 16 bytes"),
    ],
)
def test_what_the_descriptors_cannot_take(
    options: dict[str, Any], message: str, device: str
) -> None:
    dtype = options.get("dtype", torch.bfloat16)
    q = torch.zeros(1, 32, 1, options.get("dim", 16), device=device, dtype=dtype)
    ids = torch.zeros(1, 32, device=device) if options.get("packed") else None
    causal = options.get("causal", True)
    with pytest.raises(ValueError, match=message):
        attention(q, q, q, causal=causal, segment_ids=ids, implementation="triton-ws")


def test_measured_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table decides for the device that it names, and for shapes in it; nothing else."""
    best = {"variant": "triton-ws", "tiles": [128, 64, 4, 2]}
    content = {"NVIDIA H200": {"attention.forward": {"64-bfloat16": best}}}
    monkeypatch.setattr(tuning, "table", lambda: content)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    plain = tuning.Choice("triton-tl", tuning.forward_tiles(64, 2))

    class OnDevice(torch.Tensor):
        is_cuda = True

    q = torch.zeros(1, 32, 1, 64, dtype=torch.bfloat16)
    assert tuning.choice("attention.forward", q) == plain
    q = q.as_subclass(OnDevice)
    assert tuning.choice("attention.forward", q) == ("triton-ws", (128, 64, 4, 2))
    assert tuning.choice("attention.query_gradient", q).variant == "triton-tl"
    assert tuning.choice("attention.forward", q.half()).variant == "triton-tl"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100")
    assert tuning.choice("attention.forward", q) == plain


def test_the_shipped_table_names_what_exists() -> None:
    for kernels in tuning.table().values():
        for kernel, shapes in kernels.items():
            assert kernel in tuning.DEFAULTS
            for found in shapes.values():
                assert found["variant"] in (tuning.PLAIN, *attention_tma.VARIANTS)
                assert len(found["tiles"]) == 4


@pytest.mark.parametrize("options", MODES)
def test_masks_over_many_tiles_on_a_cpu(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles of 16 queries, the rows of the batch one after the other."""
    monkeypatch.setattr("unimm_kernels.attention_tiles.QUERIES", 16)
    monkeypatch.setattr("unimm_kernels.attention_tiles.SCORES", 16 * 123)
    check((2, 123, 123, 4, 2, 16), torch.float32, "cpu", "torch", **options)


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_full_attention_to_fewer_keys(implementation: str, device: str) -> None:
    check((1, 123, 63, 2, 2, 64), torch.float32, device, implementation, causal=False)


@pytest.mark.parametrize("shape", [(0, 5, 2, 16), (2, 0, 2, 16)], ids=["no-rows", "no-tokens"])
def test_nothing_to_attend_to(shape: tuple[int, ...]) -> None:
    q = torch.zeros(shape, requires_grad=True)
    out = attention(q, q, q)
    out.sum().backward()
    assert out.shape == shape
    assert q.grad is not None
    assert q.grad.shape == shape


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_cu_seqlens_is_segment_ids(implementation: str, device: str) -> None:
    (q, k, v), _ = inputs((2, 123, 123, 2, 1, 16), torch.float32, device)
    ids = documents_of(2, 123)
    starts = [0]
    for row in range(2):
        lengths = ids[row].unique(return_counts=True)[1].tolist()
        for n in lengths:
            starts.append(starts[-1] + n)
    padded = torch.tensor(starts + [246] * 5, dtype=torch.int32, device=device)
    one = attention(q, k, v, cu_seqlens=padded, implementation=implementation)
    other = attention(q, k, v, segment_ids=ids.to(device), implementation=implementation)
    assert torch.equal(one, other)


def test_a_document_is_computed_as_if_alone(device: str) -> None:
    (q, k, v), _ = inputs((1, 123, 123, 2, 1, 16), torch.float32, device)
    cuts = [0, 1, 50, 123]
    packed = attention(q, k, v, cu_seqlens=torch.tensor(cuts, device=device))
    for a, b in pairwise(cuts):
        alone = attention(q[:, a:b], k[:, a:b], v[:, a:b])
        assert relative_error(packed[:, a:b], alone) < 1e-6


def test_rows_of_a_batch_are_documents_for_cu_seqlens(device: str) -> None:
    (q, k, v), _ = inputs((2, 63, 63, 2, 1, 16), torch.float32, device)
    one_long = torch.tensor([0, 126], device=device)
    assert torch.equal(attention(q, k, v, cu_seqlens=one_long), attention(q, k, v, window=63))


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_autocast(implementation: str, device: str) -> None:
    (q, k, v), _ = inputs((1, 63, 63, 2, 1, 16), torch.float32, device)
    with torch.autocast(device, torch.bfloat16):
        got = attention(q, k.bfloat16(), v, implementation=implementation)
    got.float().sum().backward()
    assert got.dtype == torch.bfloat16
    assert q.grad is not None
    assert q.grad.dtype == torch.float32


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_compiles_to_one_node(implementation: str, device: str) -> None:
    (q, k, v), grad = inputs((1, 63, 63, 2, 1, 16), torch.float32, device)
    ids = documents_of(1, 63).to(device)

    def double(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q * 2, k, v, segment_ids=ids, implementation=implementation) + 1

    compiled = torch.compile(double, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        torch.autograd.grad(compiled(q, k, v), (q, k, v), grad),
        torch.autograd.grad(double(q, k, v), (q, k, v), grad),
        strict=True,
    ):
        assert relative_error(a, b) < 1e-6


def test_opcheck(device: str) -> None:
    (q, k, v), _ = inputs((1, 17, 17, 2, 1, 16), torch.float32, device)
    starts = torch.zeros(1, 17, dtype=torch.int32, device=device)
    ends = torch.full_like(starts, 17)
    op = torch.ops.unimm.attention.default
    torch.library.opcheck(op, (q, k, v, None, None, True, 5, 0.25, "triton"))
    torch.library.opcheck(op, (q, k, v, starts, ends, False, 0, 0.25, "triton"))
    if device == "cpu":
        op = torch.ops.unimm.attention_tiles.default
        torch.library.opcheck(op, (q, k, v, starts, ends, True, 5, 0.25))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window 0"),
        ({"window": 4, "causal": False}, "needs causal"),
        ({"scale": -1.0}, "scale -1.0"),
        ({"segment_ids": torch.zeros(2, 7)}, r"segment_ids \(2, 7\) must be \(1, 8\)"),
        ({"cu_seqlens": torch.zeros(2, 7)}, "cu_seqlens"),
        ({"cu_seqlens": torch.zeros(2), "segment_ids": torch.zeros(1, 8)}, "not both"),
        ({"implementation": "cuda"}, "implementation is 'cuda'"),
    ],
)
def test_errors(options: dict[str, Any], message: str) -> None:
    q = torch.zeros(1, 8, 2, 16)
    with pytest.raises(ValueError, match=message):
        attention(q, q, q, **options)


def test_shape_errors() -> None:
    q = torch.zeros(1, 8, 3, 16)
    for k, v, message in [
        (torch.zeros(1, 8, 2, 16), torch.zeros(1, 8, 2, 16), "no multiple"),
        (torch.zeros(1, 4, 3, 16), torch.zeros(1, 4, 3, 16), "S >= T"),
        (torch.zeros(1, 8, 3, 8), torch.zeros(1, 8, 3, 8), r"need q \(B, T, H, D\)"),
        (q.bfloat16(), q, "differ in dtype"),
    ]:
        with pytest.raises(ValueError, match=message):
            attention(q, k, v)
    with pytest.raises(ValueError, match="packed documents need S == T"):
        attention(q[:, :4], q, q, segment_ids=torch.zeros(1, 4))
