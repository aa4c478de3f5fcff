"""What the processor can do, from what Linux tells of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from charkha.hardware.probe import cpu_has_bf16
from charkha.training.choices import BF16_PAYS_FROM, Chooser, DeviceFacts


@pytest.mark.parametrize(
    ("line", "has"),
    [
        ("flags\t\t: fpu sse2 avx512f avx512_bf16 sha_ni", True),
        ("flags\t\t: fpu amx_bf16 amx_tile", True),
        ("Features\t: fp asimd bf16 i8mm", True),
        ("flags\t\t: fpu sse2 avx2 avx512f", False),
        ("bugs\t\t: bf16", False),
    ],
)
def test_bf16_is_read_from_the_flags(tmp_path: Path, line: str, has: bool) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nmodel name\t: bf16 wonder\n{line}\n")
    assert cpu_has_bf16(cpuinfo) is has
    assert cpu_has_bf16(tmp_path / "nothing") is False


@pytest.mark.parametrize(
    ("native", "parameters", "dtype"),
    [(True, BF16_PAYS_FROM, "bf16"), (True, BF16_PAYS_FROM - 1, "fp32"), (False, 10**9, "fp32")],
)
def test_a_cpu_trains_in_bf16_where_it_has_it_and_the_base_is_not_tiny(
    native: bool, parameters: int, dtype: str
) -> None:
    from charkha.config import Config

    config = Config.model_validate({"model": {"base": "x"}, "data": {"train": ["x.jsonl"]}, "output": "run"})
    chooser = Chooser(config, DeviceFacts("cpu", "CPU", True, None, native))
    assert chooser.dtype(parameters) == dtype
    assert chooser.choices[0].key == "model.dtype"
