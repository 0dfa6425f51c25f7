"""An embedding table that is extended by new ids: their start, the padding, and that nothing else moves."""

import pytest
import torch

from gpt2ft.model.pretrained import extend_vocabulary


class TestExtendVocabulary:
    OLD, NEW, ROWS = 500, 505, 512

    @pytest.fixture(scope="class")
    def table(self):
        """Rows spread around a mean of their own, as GPT-2's are."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(1, 64, generator=generator) + 0.5 * torch.randn(self.OLD, 64, generator=generator)

    def extend(self, table, copies=None, seed=1):
        generator = torch.Generator().manual_seed(seed)
        return extend_vocabulary(table, self.NEW, self.ROWS, copies or {}, generator)

    def test_old_rows_stay_and_padding_is_zero(self, table):
        before = table.clone()
        extended = self.extend(table)
        assert extended.shape == (self.ROWS, 64)
        assert torch.equal(extended[: self.OLD], before)
        assert torch.equal(table, before)
        assert (extended[self.NEW :] == 0).all()
        assert (extended[self.OLD : self.NEW] != 0).any(-1).all()

    def test_new_logits_lie_near_the_mean(self, table):
        """So the new tokens together take about their share, whatever the hidden state; rows of zero would not."""
        extended = self.extend(table)
        hidden = 2 * torch.randn(1000, 64, generator=torch.Generator().manual_seed(2))
        logits = hidden @ extended[: self.NEW].t()
        old, new = logits[:, : self.OLD], logits[:, self.OLD :]
        off_the_mean = (new - old.mean(1, keepdim=True)).abs()
        assert off_the_mean.mean() < 0.15 * old.std(1).mean()
        assert off_the_mean.max() < 0.6 * old.std(1).mean()
        taken = logits.softmax(-1)[:, self.OLD :].sum(1)
        assert taken.max() < 5 / self.OLD
        at_zero = torch.cat([old, torch.zeros(1000, 5)], 1).softmax(-1)[:, self.OLD :].sum(1)
        assert at_zero.max() > 0.5

    def test_new_rows_differ(self, table):
        rows = self.extend(table)[self.OLD : self.NEW]
        assert torch.cdist(rows, rows)[~torch.eye(5, dtype=torch.bool)].min() > 0.1

    def test_copies_start_from_an_old_row(self, table):
        extended, plain = self.extend(table, copies={503: 17}), self.extend(table)
        assert torch.equal(extended[503], table[17])
        assert torch.equal(extended[[500, 501, 502, 504]], plain[[500, 501, 502, 504]])

    def test_a_copy_never_overwrites_an_old_row(self, table):
        assert torch.equal(self.extend(table, copies={3: 17}), self.extend(table))

    def test_the_generator_alone_decides(self, table):
        assert torch.equal(self.extend(table, seed=1), self.extend(table, seed=1))
        assert not torch.equal(self.extend(table, seed=1), self.extend(table, seed=2))

    def test_a_table_that_knows_every_id_is_padded_alone(self, table):
        extended = extend_vocabulary(table, 480, self.ROWS, {479: 17}, torch.Generator())
        assert torch.equal(extended[:480], table[:480])
        assert (extended[480:] == 0).all()
