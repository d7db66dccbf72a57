# SPDX-License-Identifier: Apache-2.0
"""The ops of a batch against formulas in float64, as formulas.py does for a layer."""

import torch
from formulas import LayerCall, compare
from library import DTYPES, Adapter, Batch, Library

SCALINGS = (1.5, -0.5, 2.0, 0.25, 1.0)


class BatchCall(LayerCall):
    """Random rows of adapters whose ranks differ. One adapter has no rows, and some rows have no adapter.

    The tensors are those of a layer of ``n_tokens`` rows; ``s`` is in the order of the sorted rows.
    """

    def __init__(self, library: Library, dtype: torch.dtype, adapter: torch.dtype, r: int, n_tokens: int, gap=0):
        super().__init__(library, dtype, adapter, r, n_tokens, gap=gap)
        ranks = [r, max(1, r - 3), 1, r, max(1, r // 2)]
        self.factors = [(self.thin(rank, self.d_in), self.thin(self.d_out, rank)) for rank in ranks]
        self.adapters = (Adapter * len(ranks))(
            *(
                Adapter(a.data_ptr(), b.data_ptr(), len(a), scaling)
                for (a, b), scaling in zip(self.factors, SCALINGS, strict=False)
            )
        )
        indices = torch.randint(-1, len(ranks), (n_tokens,), generator=self.generator, dtype=torch.int32)
        indices[indices == 3] = 0
        self.order, self.ends = torch.empty_like(indices), torch.empty(len(ranks), dtype=torch.int32)
        library.host("sort_rows", n_tokens, len(ranks), indices, self.order, self.ends)
        kinds = DTYPES.index(dtype), DTYPES.index(adapter)
        distances = (self.d_in + gap, self.d_out + gap) if gap else (0, 0)
        table = torch.frombuffer(self.adapters, dtype=torch.uint8)
        places = table.data_ptr(), self.order.data_ptr(), self.ends.data_ptr()
        self.batch = Batch(n_tokens, self.d_in, self.d_out, len(ranks), r, *kinds, *distances, *places)
        library.host("check_adapters", self.batch, table)
        self.sorted = indices[self.order.long()]
        assert (self.sorted[: self.ends[-1]] >= 0).all() and (self.sorted[self.ends[-1] :] < 0).all()
        assert (self.sorted[: self.ends[-1]].diff() >= 0).all() and 3 not in self.sorted

    def ranges(self):
        """Yields each adapter's place among the sorted rows, its factors and its scaling."""
        for k, ((a, b), scaling) in enumerate(zip(self.factors, SCALINGS, strict=True)):
            yield self.sorted == k, a.double(), b.double(), scaling

    def project(self) -> None:
        s = torch.full_like(self.s, torch.nan)
        self.library("batch_project", self.batch, self.x, s)
        x, exact, size = self.x.double()[self.order.long()], torch.zeros(2, *s.shape).double(), None
        for mask, a, _, _ in self.ranges():
            exact[0, mask, : len(a)], exact[1, mask, : len(a)] = x[mask] @ a.T, x[mask].abs() @ a.abs().T
        served = self.sorted >= 0
        exact, size = exact[:, served]
        compare("s", s[served], exact, size, self.halves)
        assert (s[served][exact == 0] == 0).all() and s[~served].isnan().all()

    def add_to_y(self) -> None:
        y = self.rows(self.n_tokens, self.d_out)
        before, s = y.clone(), self.rounded(self.s)
        for mask, a, _, _ in self.ranges():
            self.s[mask, len(a) :] = 0
        self.library("batch_add_to_y", self.batch, self.s, y)
        exact, size = before.double(), before.double().abs()
        for mask, a, b, scaling in self.ranges():
            thin, rows = s[mask, : len(a)], self.order[mask].long()
            exact[rows] += scaling * (thin @ b.T)
            size[rows] += abs(scaling) * (thin.abs() @ b.abs().T)
        compare("y", y, exact, size, self.halves)
        untouched = self.order[self.sorted < 0].long()
        assert torch.equal(y[untouched], before[untouched]), "rows of no adapter are changed"
        self.check_gaps("y", y)
