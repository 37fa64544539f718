"""The probes behind decision 0003 must be able to say no."""

from __future__ import annotations

import torch

from bench.kernels import differing_share, ignores_zeros, products


def test_a_product_that_depends_on_the_number_of_rows_is_seen() -> None:
    rows = torch.randn(512, 8)
    shares = differing_share(lambda x: x + (0.0 if len(x) > 4 else 1.0), rows)
    assert {count for count, share in shares.items() if share == 1.0} == {1, 2, 3, 4}
    assert all(share == 0.0 for count, share in shares.items() if count > 4)


def test_every_kernel_multiplies() -> None:
    weight, rows = torch.randn(24, 16), torch.randn(8, 16)
    for product in products(weight).values():
        torch.testing.assert_close(product(rows), rows @ weight.T, rtol=1e-4, atol=1e-4)


def test_a_narrow_sum_ignores_zeros_between_its_terms() -> None:
    assert ignores_zeros(64)
