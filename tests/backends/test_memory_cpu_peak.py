"""The measured peak of live tensor bytes on a CPU: exact for known allocations, and without effect on them."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from charkha.backends.torch.memory import CpuPeak  # noqa: E402

MIB = 2**20


def mebibytes(count: int) -> torch.Tensor:
    return torch.zeros(count * MIB, dtype=torch.uint8)


def test_the_highest_moment_counts_not_the_last_nor_the_sum():
    with CpuPeak(torch.nn.Module()) as peak:
        first = mebibytes(3)
        second = mebibytes(5)
        del first
        third = mebibytes(1)
        del second, third
    assert peak.peak_bytes == 8 * MIB


def test_what_a_kernel_needs_inside_counts():
    values = torch.randn(MIB)
    with CpuPeak(torch.nn.Module()) as peak:
        values.sort()  # results of 4 and 8 bytes an element, and room to work in
    assert peak.peak_bytes >= 12 * MIB


def test_weights_and_states_of_before_count_once():
    embedding = torch.nn.Embedding(1000, 64)
    head = torch.nn.Linear(64, 1000, bias=False)
    head.weight = embedding.weight
    model = torch.nn.Sequential(embedding, head)
    optimizer = torch.optim.AdamW(model.parameters())
    embedding.weight.grad = torch.zeros_like(embedding.weight)
    optimizer.step()
    with CpuPeak(model, optimizer) as peak:
        pass
    weight = 4 * 1000 * 64
    assert 4 * weight <= peak.peak_bytes <= 4 * weight + 16  # weight, gradient, two states; a step counter


def test_a_cut_forgets_no_byte():
    with CpuPeak(torch.nn.Module()) as peak:
        first = mebibytes(3)
        peak.cut()
        second = mebibytes(5)
        peak.cut()
        del first, second
        third = mebibytes(6)
        del third
    assert peak.peak_bytes == 8 * MIB


def test_a_second_window_knows_nothing_of_the_first():
    with CpuPeak(torch.nn.Module()):
        kept = mebibytes(7)
    with CpuPeak(torch.nn.Module()) as peak:
        mebibytes(2)
    assert peak.peak_bytes == 2 * MIB
    del kept


def test_closing_twice_and_an_error_inside_leave_the_profiler_free():
    peak = CpuPeak(torch.nn.Module())

    def fails() -> None:
        with peak:
            mebibytes(1)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    peak.close()
    assert peak.peak_bytes == MIB
    with CpuPeak(torch.nn.Module()) as again:
        mebibytes(2)
    assert again.peak_bytes == 2 * MIB


def test_nothing_is_written_to_the_terminal(capfd):
    with CpuPeak(torch.nn.Module()):
        mebibytes(1)
    assert capfd.readouterr() == ("", "")


def test_gradients_are_the_same_bits_inside_a_window():
    def gradient() -> torch.Tensor:
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Dropout(), torch.nn.Linear(256, 8)
        )
        model(torch.randn(32, 64)).square().mean().backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    outside = gradient()
    with CpuPeak(torch.nn.Module()):
        inside = gradient()
    assert torch.equal(inside, outside)
