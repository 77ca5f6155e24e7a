"""Codebooks of moving averages: a pooled start, revival that lasts, ranks that agree."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from unimm_tokenizers.quantize import (
    FactorizedResidualQuantizer,
    ResidualVectorQuantizer,
    code_usage,
)
from unimm_tokenizers.quantize.codebooks import KeptScores, MovingCodebooks

DIM = 4


def test_k_means_waits_for_two_vectors_per_code() -> None:
    """Batches before pass through, unquantized: one of 40 vectors is too few for 64 codes."""
    quantizer = ResidualVectorQuantizer(DIM, 64).train()
    before = quantizer.codebooks.codes.clone()
    for _ in range(3):
        latents = torch.randn(1, DIM, 40)
        output = quantizer(latents)
        assert bool((output.codes == -1).all())
        assert float(output.loss) == 0
        torch.testing.assert_close(output.quantized, latents)
    assert torch.equal(quantizer.codebooks.codes, before)
    assert int(quantizer(torch.randn(1, DIM, 40)).codes.min()) >= 0
    assert bool(quantizer.started)
    assert not torch.equal(quantizer.codebooks.codes, before)


@torch.no_grad()
def test_averages_follow_the_vectors() -> None:
    """After many batches each code is the mean of what chooses it."""
    books = MovingCodebooks(1, 4, DIM)
    centres = 10 * torch.eye(DIM)
    books.start(centres.repeat(4, 1))
    for _ in range(300):
        which = torch.arange(400) % 4
        x = centres[which] + torch.randn(400, DIM) + 1.0
        chosen = torch.cdist(x, books.codes[0]).argmin(1)
        books.update(0, x, chosen)
    order = torch.cdist(centres + 1, books.codes[0]).argmin(1)
    assert float((books.codes[0][order] - centres - 1).abs().max()) < 0.15


@torch.no_grad()
def test_dead_codes_come_back_for_good() -> None:
    """62 of 64 codes far from everything: revival alone can bring them, and it must last."""
    quantizer = ResidualVectorQuantizer(DIM, 64).train()
    quantizer(torch.randn(1, DIM, 200))
    quantizer.codebooks.codes[0, 2:] = 1000.0
    quantizer.restart_statistics()
    for _ in range(40):
        codes = quantizer(torch.randn(1, DIM, 200)).codes
    assert float(quantizer.codebooks.codes.abs().max()) < 10
    codes = quantizer.eval()(torch.randn(1, DIM, 4000)).codes
    figures = code_usage(codes, 64)
    assert float(figures.usage) == 1.0
    assert float(figures.perplexity) > 45


@torch.no_grad()
def test_a_large_codebook_on_small_batches_is_not_churned() -> None:
    """One vector for eight codes in a batch: after the start hardly any code is thrown out."""
    quantizer = ResidualVectorQuantizer(DIM, 512).train()
    while not quantizer.started:
        quantizer(torch.randn(1, DIM, 64))
    moved = 0
    for _ in range(200):
        before = quantizer.codebooks.codes.clone()
        quantizer(torch.randn(1, DIM, 64))
        moved += int(((quantizer.codebooks.codes - before).norm(dim=-1) > 0.5).sum())
    assert moved < 0.25 * 512  # 25 windows of 512 vectors
    codes = quantizer.eval()(torch.randn(1, DIM, 20000)).codes
    assert float(code_usage(codes, 512).usage) > 0.95


def test_kept_scores_follow_their_codes() -> None:
    """Values that change, in a view or a load, and another tensor are seen; else none are made."""
    scores, codes = KeptScores(cosine=False), torch.randn(2, 5, DIM)

    def bias() -> Tensor:
        kept = scores.of(codes, slice(2))
        assert kept is not None
        torch.testing.assert_close(kept.bias, codes.square().sum(-1) / 2)
        return kept.bias

    assert bias().data_ptr() == bias().data_ptr()
    codes[1, 3:] = 7.0
    bias()
    codes.copy_(torch.randn(2, 5, DIM))
    bias()
    codes = torch.randn(2, 5, DIM)
    bias()
    with torch.inference_mode():
        assert scores.of(torch.randn(2, 5, DIM), 0) is None  # has no count of its changes


@torch.no_grad()
@pytest.mark.parametrize("quantizer", [ResidualVectorQuantizer, FactorizedResidualQuantizer])
def test_codes_that_change_are_searched_as_they_are(
    quantizer: type[ResidualVectorQuantizer | FactorizedResidualQuantizer],
) -> None:
    made = quantizer(DIM, 16, 2).eval()
    latents = torch.randn(1, DIM, 50)
    made.nearest(latents)
    other = quantizer(DIM, 16, 2).eval()
    made.load_state_dict(other.state_dict())
    assert torch.equal(made.nearest(latents), other.nearest(latents))


WORKER = """
import sys
import torch
from torch import distributed as dist
from unimm_tokenizers.quantize import ResidualVectorQuantizer

rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
quantizer = ResidualVectorQuantizer(4, 16, num_codebooks=2).train()
batches = torch.load(f"{folder}/batches.pt")
codes = [quantizer(batch.chunk(2)[rank]).codes for batch in batches]
torch.save((quantizer.state_dict(), codes), f"{folder}/rank-{rank}.pt")
dist.destroy_process_group()
"""


def test_two_ranks_learn_what_one_would(tmp_path: Path) -> None:
    """Different data on each: both hold the codebooks that one process makes of all data."""
    roots = [str(Path(__file__).parents[2] / name) for name in ("tokenizers", "kernels")]
    batches = [torch.randn(2, DIM, 16) for _ in range(6)]
    batches.append(torch.cat([torch.zeros(1, DIM, 16), torch.ones(1, DIM, 16)]))
    torch.save(batches, tmp_path / "batches.pt")
    script = f"import sys; sys.path[:0] = {roots!r}\n{WORKER}"
    workers = [
        subprocess.Popen([sys.executable, "-c", script, str(rank), str(tmp_path)])
        for rank in range(2)
    ]
    try:
        assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()
    alone = ResidualVectorQuantizer(DIM, 16, num_codebooks=2).train()
    codes = [alone(batch).codes for batch in batches]
    expected: dict[str, Tensor] = alone.state_dict()
    for rank in range(2):
        state, own = torch.load(tmp_path / f"rank-{rank}.pt")
        for name, tensor in expected.items():
            torch.testing.assert_close(state[name], tensor, rtol=1e-5, atol=1e-5)
        for found, whole in zip(own, codes, strict=True):
            assert torch.equal(found[0], whole[rank])


def test_files_of_before_keep_their_codes() -> None:
    """Names of version 0.1 are understood: one (1, K, d) tensor per level."""
    quantizer = ResidualVectorQuantizer(DIM, 16, num_codebooks=2, codebook_dim=3)
    state = quantizer.state_dict()
    old = {f"vq.{k}": v for k, v in state.items() if k.startswith("project")}
    for level in range(2):
        old[f"vq.layers.{level}._codebook.embed"] = state["codebooks.codes"][level][None]
        old[f"vq.layers.{level}._codebook.initted"] = torch.tensor(True)
    new = quantizer.upgraded({**old, "started": torch.tensor(True)})
    expected = {k: v for k, v in state.items() if not k.endswith(quantizer.statistics)}
    assert new.keys() == expected.keys()
    for name in expected.keys() - {"started"}:
        assert torch.equal(new[name], expected[name])
    assert quantizer.upgraded(state) is state


@pytest.mark.parametrize("cosine", [False, True])
def test_codes_are_found_without_the_whole_matrix(cosine: bool) -> None:
    """Peak memory of a training step at K = 16,384: below a tenth of one N x K matrix."""
    quantizer = ResidualVectorQuantizer(8, 16384, cosine=cosine).train()
    quantizer.started.fill_(True)
    latents = torch.randn(1, 8, 4096)
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        quantizer(latents)
    largest = max(abs(event.self_cpu_memory_usage) for event in profile.events() or [])
    assert latents.nbytes <= largest < 0.1 * 4096 * 16384 * 4
