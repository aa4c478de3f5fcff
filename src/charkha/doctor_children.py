"""What `charkha doctor` has a process of its own find out: whether torch and bitsandbytes compute right, and how fast.

Each is a program of backends/torch/self_test.py with a time limit, so that a broken CUDA is a finding, not a crash.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import IO, Any

from charkha.doctor_checks import INSTALL_CUDA_TORCH, Check
from charkha.units import format_seconds

_CHILD_LIMIT_S = 60.0
_MATMUL_ERROR, _NF4_ERROR = 0.02, 0.15  # relative; 0.003 and 0.092 where the kernels are right
_ERROR_LINE = re.compile(r"[\w.]*(Error|Exception)\b")
DEVICES, FOUR_BIT, ATTENTION, TRANSFERS = (
    ("-m", "charkha.backends.torch.self_test", name) for name in ("devices", "four_bit", "attention", "transfers")
)


class ChildFailed(Exception):
    """A child process that ended otherwise than with an answer; the text says how. `hung`: it was killed for time."""

    def __init__(self, text: str, hung: bool = False) -> None:
        super().__init__(text)
        self.hung = hung


def ask_child(program: Sequence[str], limit_s: float) -> Any:
    """The JSON of the last line that Python prints, given these arguments; raises ChildFailed.

    It sees nothing that lies in the working folder.
    """
    command = [sys.executable, "-P", *program]
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=errors)
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            process.kill()  # not waited for: one that hangs in the driver cannot even be killed
            raise ChildFailed(f"no answer within {format_seconds(limit_s)}", hung=True) from None
        if code < 0:
            raise ChildFailed(f"crashed with {signal.Signals(-code).name}")
        if code > 0:
            raise ChildFailed(_last_line(errors, _ERROR_LINE) or f"ended with exit code {code}")
        try:
            return json.loads(_last_line(output))
        except ValueError:
            raise ChildFailed(f"answered no JSON but {_last_line(output)!r}") from None


def _last_line(file: IO[bytes], like: re.Pattern[str] = re.compile("")) -> str:
    """The last line that matches, else the last of all: torch writes advice below its errors."""
    file.seek(max(0, file.seek(0, os.SEEK_END) - 8192))
    lines = file.read().decode(errors="replace").strip().splitlines()
    return ([*lines[-1:], *(line for line in lines if like.match(line))] or [""])[-1].strip()


def unanswered(name: str, package: str, failure: ChildFailed, remedy: str) -> Check:
    """What is said of a child that gave no answer."""
    text = f"{package}, in a process of its own: {failure}"
    if failure.hung:
        return Check(name, text, "unknown", "run it again; when it hangs again restart the machine")
    return Check(name, text, "fail", remedy)


def check_cuda(gpus: int, program: Sequence[str] = DEVICES, limit_s: float = _CHILD_LIMIT_S) -> list[Check]:
    """Whether torch computes on every device it finds, and what it was built for.

    `gpus` is how many the NVIDIA driver has.
    """
    try:
        told = ask_child(program, limit_s)
    except ChildFailed as failure:
        remedy = f"`{INSTALL_CUDA_TORCH}`, and `sudo dmesg | tail` for the driver's errors" if gpus else "`make setup`"
        return [unanswered("cuda", "torch", failure, remedy)]
    return [_check_devices(gpus, told), _check_kernels(told)]


def _check_devices(gpus: int, told: dict[str, Any]) -> Check:
    cards = told["cards"]
    fact = "; ".join(map(_card_text, cards))
    wrong = [card["name"] for card in cards if not card["error"] < _MATMUL_ERROR]
    if wrong:
        remedy = "the card, its memory or an overclock is not sound: back to stock clocks, then test it elsewhere"
        return Check("cuda", f"wrong product of two matrices on {', '.join(wrong)}; {fact}", "fail", remedy)
    if cards[0]["kind"] == "cuda":
        emulated = [card["name"] for card in cards if tuple(card["capability"]) < (8, 0)]
        return Check("cuda", fact, "warn" if emulated else "ok", "set model.dtype: fp16" if emulated else None)
    if not gpus:
        return Check("cuda", f"no CUDA GPU: training runs on {fact}", "ok")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    fact = f"torch (CUDA {told['cuda'] or 'left out'}) sees none of the driver's {gpus} GPU{'s' * (gpus != 1)}"
    remedy = f"`{INSTALL_CUDA_TORCH}`, and a driver of series 580 or newer"
    return Check("cuda", fact, "fail", remedy if hidden is None else f"CUDA_VISIBLE_DEVICES is {hidden!r}: unset it")


def _check_kernels(told: dict[str, Any]) -> Check:
    """Whether the build has kernels for the cards here: of their own series, of an older one of it, or as PTX."""
    name = "torch kernels"
    if not told["built_for"]:
        return Check(name, f"{told['torch']}: for no GPU", "ok")
    cudnn = told["cudnn"]
    fact = f"{told['torch']} for {' '.join(told['built_for'])}, "
    fact += "no cuDNN" if cudnn is None else f"cuDNN {cudnn // 10000}.{cudnn % 10000 // 100}.{cudnn % 100}"
    without = [card["name"] for card in told["cards"] if not _has_kernels(card["capability"], told["built_for"])]
    if without:
        return Check(name, f"{fact}; none for {', '.join(without)}", "fail", f"`{INSTALL_CUDA_TORCH}`")
    return Check(name, fact, "ok" if cudnn is not None else "warn", None if cudnn else f"`{INSTALL_CUDA_TORCH}`")


def _has_kernels(capability: Sequence[int] | None, built_for: Sequence[str]) -> bool:
    """A card runs machine code (sm_) of its major number up to its minor one, and compiles PTX (compute_) below it."""
    for built in built_for if capability else ():
        kind, _, number = built.partition("_")
        digits = re.match(r"\d+", number)
        if digits is None:
            continue
        version = divmod(int(digits[0]), 10)
        mine = (capability[0], capability[1]) if capability else (0, 0)
        if version <= mine and (kind == "compute" or version[0] == mine[0]):
            return True
    return capability is None


def _card_text(card: dict[str, Any]) -> str:
    if card["capability"] is None:
        return f"{card['name'].upper()}, bf16 product right"
    major, minor = card["capability"]
    bf16 = "bf16" if major >= 8 else "no bf16 units"
    fp8 = "fp8" if (major, minor) >= (8, 9) else "no fp8"
    return f"{card['name']}: compute capability {major}.{minor}, {bf16}, {fp8}"


def check_4bit(program: Sequence[str] = FOUR_BIT, limit_s: float = _CHILD_LIMIT_S) -> Check:
    """Whether bitsandbytes quantizes a matrix to nf4 and back, and multiplies with it, on every device."""
    name = "4-bit kernels"
    if sys.platform == "darwin":
        return Check(name, "not on a Mac: only model.quantization none", "ok")
    try:
        errors = ask_child(program, limit_s)
    except ChildFailed as failure:
        remedy = "`make setup` installs the locked bitsandbytes; until then set model.quantization: none"
        return unanswered(name, "bitsandbytes", failure, remedy)
    each = (
        f"{device} within {error['back']:.1%}, product with it within {error['product']:.1%}"
        for device, error in errors.items()
    )
    fact = "nf4 and back: " + "; ".join(each)
    good = all(error["back"] < _NF4_ERROR and error["product"] < _MATMUL_ERROR for error in errors.values())
    if not errors or not good:
        return Check(name, f"{fact}, of a normal matrix 9.2% is right", "fail", "set model.quantization: none")
    return Check(name, fact, "ok")


def check_attention(gpus: int, program: Sequence[str] = ATTENTION, limit_s: float = _CHILD_LIMIT_S) -> Check:
    """Whether FlashAttention's kernels, torch's own and those of the package, agree with plain attention."""
    name = "attention"
    if not gpus:
        return Check(name, "no NVIDIA GPU: attention runs in torch's own kernels", "ok")
    try:
        cards = ask_child(program, limit_s)["cards"]
    except ChildFailed as failure:
        return unanswered(name, "torch", failure, "set model.attention: eager until it runs")
    fact = "; ".join(f"{card['name']}: {_kernel('torch', card)}, {_kernel('package', card)}" for card in cards)
    wrong = {kernel for card in cards for kernel in ("torch", "package") if _is_wrong(card[kernel])}
    if wrong:
        way = "sdpa, and rebuild flash-attn for this torch" if wrong == {"package"} else "eager"
        return Check(name, fact, "fail", f"set model.attention: {way}")
    broken = any(isinstance(card["package"], str) for card in cards)
    remedy = "install flash-attn built for this torch and card, or leave it: `model.attention: sdpa` needs it not"
    return Check(name, fact, "warn" if broken else "ok", remedy if broken else None)


def _kernel(name: str, card: dict[str, Any]) -> str:
    words = {"torch": "torch's FlashAttention", "package": "the package flash-attn"}[name]
    told = card[name]
    if told is None:
        return f"{words} is not installed"
    return f"{words} within {told:.1%}" if isinstance(told, float) else f"{words} does not run ({told})"


def _is_wrong(told: float | str | None) -> bool:
    """Runs, and gives something else; NaN too."""
    return isinstance(told, float) and not told < _MATMUL_ERROR
