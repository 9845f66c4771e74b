"""A matrix held in half precision computes what the converted one computes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from prunus.model import compact as module
from prunus.model.compact import Compact, compact, expand_, kept, pieces

HALF = (torch.bfloat16, torch.float16)
#: rows and columns: fewer than a piece, and several pieces with a rest
SHAPES = [(40, 24), (1000, 48), (20000, 48), (3000, 256)]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(module, "PIECE", 2**18)


def matrices(shape=(1000, 48), dtype=torch.bfloat16):
    """Numbers in half precision, the same converted, and the same held as they are."""
    half = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    return half, half.float(), compact(half, torch.float32)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [(1, 1), (3,), (2, 33), (7, 64)])
def test_a_head_and_its_gradient(dtype, shape, bias, tokens):
    _, full, held = matrices(shape, dtype)
    added = torch.randn(shape[0]) if bias else None
    x, by_output = torch.randn(*tokens, shape[1]), torch.randn(*tokens, shape[0])
    found = []
    for weight in (full, nn.Parameter(held, requires_grad=False)):
        leaf = x.clone().requires_grad_()
        output = functional.linear(leaf, weight, added)
        output.backward(by_output)
        found.append((output.detach(), leaf.grad))
    (expected, expected_gradient), (output, gradient) = found
    # the same sums, which BLAS adds up in another order for another number of rows on some processors
    for computed, wanted in ((output, expected), (gradient, expected_gradient)):
        torch.testing.assert_close(computed, wanted, rtol=0, atol=1e-6 * wanted.abs().max().item())


def test_no_more_than_a_piece_is_converted(monkeypatch):
    _, full, held = matrices((20000, 48))
    converted, to = [], torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda self, dtype: converted.append(tuple(self.shape)) or to(self, dtype))
    leaf = torch.ones(2, 48, requires_grad=True)
    functional.linear(leaf, held).sum().backward()
    # 2¹⁸ numbers are 5440 rows, of which four pieces would be needed: equal ones. Of the columns 64 are the least.
    assert converted == [*[(5056, 48)] * 3, (4832, 48), (20000, 48)]
    monkeypatch.undo()
    monkeypatch.setattr(module, "PIECE", 2**18)
    assert [len(piece) for piece in pieces(held)] == [5056] * 3 + [4832]
    assert torch.equal(torch.cat(list(pieces(held))), full)


@pytest.mark.parametrize("dtype", HALF)
def test_rows_that_are_looked_up(dtype):
    _, full, held = matrices(dtype=dtype)
    ids = torch.tensor([[3, 999], [0, 3]])
    for weight in (held, nn.Parameter(held, requires_grad=False)):
        assert torch.equal(functional.embedding(ids, weight, 0), functional.embedding(ids, full, 0))
        assert torch.equal(weight[5], full[5])
        assert torch.equal(weight[5:9], full[5:9])
        assert torch.equal(weight.index_select(0, ids[0]), full[ids[0]])


def test_it_is_a_tensor_of_the_dtype_that_is_computed_with():
    half, full, held = matrices()
    parameter = nn.Parameter(held, requires_grad=False)
    for each in (held, parameter, parameter.detach(), parameter.data):
        assert (each.dtype, each.shape, each.device, each.numel()) == (
            full.dtype,
            full.shape,
            full.device,
            full.numel(),
        )
        assert kept(each).data_ptr() == half.data_ptr(), "no second copy"
    assert torch.equal(held * 2, full * 2), "what is not foreseen converts"
    assert torch.equal(full @ held.T, full @ full.T)
    assert torch.equal(held.to(torch.bfloat16), half)
    assert torch.equal(held.to(torch.float64), full.double())
    assert held.to("meta").dtype == torch.float32
    assert "0." in repr(parameter)
    for write in (lambda: held.mul_(2), lambda: parameter.data.copy_(full), lambda: torch.add(full, 1, out=held)):
        with pytest.raises(TypeError, match="cannot be written to"):
            write()
    assert torch.equal(held.to(torch.float32), full)


def test_what_is_held_compactly():
    half, full, _ = matrices()
    assert type(compact(full, torch.float32)) is torch.Tensor
    assert compact(full, torch.bfloat16).dtype == torch.bfloat16
    assert type(compact(half, torch.float16)) is torch.Tensor, "neither holds all numbers of the other"
    assert type(compact(half[0], torch.float32)) is torch.Tensor, "a vector is small"
    assert torch.equal(compact(half[0], torch.float32), full[0])
    assert kept(full) is full


def test_expanding_keeps_ties():
    _, full, held = matrices()
    model = nn.ModuleDict({"one": nn.Embedding(1000, 48), "other": nn.Linear(48, 1000, bias=False)})
    model["one"].weight = nn.Parameter(held, requires_grad=False)
    model["other"].weight = model["one"].weight
    expand_(model)
    assert model["one"].weight is model["other"].weight
    assert not isinstance(model["one"].weight, Compact)
    assert torch.equal(model["one"].weight, full)
