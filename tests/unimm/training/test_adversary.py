"""Discriminators, their regularizers, and what reaches the codec."""

import pytest
import torch

from unimm.training.adversary import Adversary
from unimm_tokenizers.discriminators import MotionDiscriminator, PatchDiscriminator
from unimm_tokenizers.losses import feature_distance


def pictures(number: int = 4) -> torch.Tensor:
    return torch.rand(number, 3, 16, 16) * 2 - 1


def films(frames: int = 5) -> torch.Tensor:
    return torch.rand(2, 3, frames, 16, 16) * 2 - 1


def adversary(**options: float) -> Adversary:
    return Adversary(
        [PatchDiscriminator(3, channels=4), MotionDiscriminator(3, channels=4)],
        **options,  # type: ignore[arg-type]
    )


def test_motion_is_scored_in_films_alone() -> None:
    against = adversary(lecam=0.0)
    for signals, expected in ((pictures(), 1), (films(2), 1), (films(), 2)):
        taking = [scorer for scorer in against.discriminators if scorer.accepts(signals)]  # type: ignore[operator]
        assert len(taking) == expected
        assert against.loss([(signals, signals)], 0).keys() == {"hinge"}


def test_the_codec_feels_a_fixed_weight() -> None:
    made, real = films().requires_grad_(), films()
    gradients = []
    for weight in (0.2, 0.1):
        torch.manual_seed(0)
        loss = adversary(weight=weight).fooled([(made, real)])
        gradients += torch.autograd.grad(loss, made)
    assert float(gradients[0].abs().max()) > 0
    torch.testing.assert_close(gradients[0], 2 * gradients[1])


def test_it_does_not_learn_from_the_codecs_loss() -> None:
    against = adversary()
    made = films().requires_grad_()
    against.fooled([(made, films())]).backward()
    assert made.grad is not None
    assert all(p.grad is None and p.requires_grad for p in against.parameters())


def test_terms_come_as_they_are_asked_for() -> None:
    against = adversary(lecam=0.05, r1=1.0, r1_every=4)
    pair = [(films(), films())]
    assert against.loss(pair, 0).keys() == {"hinge", "lecam", "r1"}
    assert against.loss(pair, 3).keys() == {"hinge", "lecam"}
    sum(against.loss(pair, 4).values()).backward()  # type: ignore[union-attr]
    assert all(p.grad is not None for p in against.parameters())


def test_it_is_felt_from_its_start_on() -> None:
    assert adversary().felt(0)
    late = adversary(start=3)
    assert [late.felt(step) for step in (0, 2, 3, 4)] == [False, False, True, True]
    assert not adversary(weight=0.0).felt(0)


def test_bad_options_are_refused() -> None:
    with pytest.raises(ValueError, match="an adversary needs a discriminator"):
        Adversary([])
    with pytest.raises(ValueError, match="r1_every above 0"):
        adversary(r1_every=0)


def test_feature_matching_comes_on_top_and_teaches_no_discriminator() -> None:
    made, real = pictures().requires_grad_(), pictures()
    torch.manual_seed(0)
    plain = adversary(weight=1.0)
    torch.manual_seed(0)
    matching = adversary(weight=1.0, matching=2.0)
    for each in (plain, matching):
        each.eval()  # power iterations would move the weights between the calls
    scorer = matching.discriminators[0]
    inner, wanted = (scorer.features(x)[:-1] for x in (made, real))  # type: ignore[operator]
    expected = plain.fooled([(made, real)]) + 2 * feature_distance(inner, wanted)
    loss = matching.fooled([(made, real)])
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert made.grad is not None
    assert all(p.grad is None for p in matching.parameters())
