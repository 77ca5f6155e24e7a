"""Pictures and words side by side."""

import torch
from torch import Tensor

from unimm_tokenizers.semantic import WordsContrast


def texts(*words: str) -> Tensor:
    return torch.tensor([[*word.encode(), *(0,) * (16 - len(word))] for word in words]).byte()


def test_texts_are_told_apart_and_padding_is_not_read() -> None:
    torch.manual_seed(0)
    head = WordsContrast(4)
    made = head.embed_text(texts("frog", "ship", "frog"))
    torch.testing.assert_close(made[0], made[2])
    assert float((made[0] * made[1]).sum().detach()) < 0.99
    longer = torch.nn.functional.pad(texts("frog"), (0, 9))
    torch.testing.assert_close(head.embed_text(longer)[0], made[0])


def test_fewer_than_two_texts_teach_nothing() -> None:
    head = WordsContrast(4)
    assert float(head(torch.randn(3, 4), texts("frog", "frog", "")).detach()) == 0
    assert float(head(torch.randn(2, 4), texts("", "")).detach()) == 0


def test_pictures_of_one_text_are_all_right_for_it() -> None:
    """The loss falls to nothing although two pictures share a text, and leaves the untitled out."""
    torch.manual_seed(0)
    head = WordsContrast(4, width=8)
    embedding = torch.nn.Parameter(torch.randn(5, 4))
    names = texts("frog", "ship", "frog", "", "cat")
    optimizer = torch.optim.Adam([embedding, *head.parameters()], 0.05)
    untitled = embedding[3].detach().clone()
    for _ in range(150):
        loss = head(embedding, names)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # Two pictures share what the text's side can give: log(2) / 2 for one of three texts remains.
    assert float(loss.detach()) < 0.13
    assert torch.equal(embedding[3].detach(), untitled)
