"""The traced peak against what the real trainer's two steps take, and the trace's own promises."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from planned_runs import SHAPES, PlannedRun  # noqa: E402

from charkha.backends.base import TraceRequest  # noqa: E402
from charkha.backends.torch import fake_step, recorder, timeline, trace  # noqa: E402
from charkha.backends.torch.cuda_kernels import CudaStandIns, cuda_temporaries  # noqa: E402
from charkha.backends.torch.fake_model import build_fake_model  # noqa: E402
from charkha.backends.torch.stand_ins import STAND_INS  # noqa: E402
from charkha.backends.torch.trace import trace_here  # noqa: E402
from charkha.errors import EnvironmentProblem, UsageError  # noqa: E402
from families import FAMILIES  # noqa: E402

TOLERANCE = 0.005
QUICK = [
    PlannedRun(method="full", checkpointing="full", accumulation=2),
    PlannedRun(quantization="nf4", checkpointing="full", loss_head="chunked", lengths=(96, 60)),
    PlannedRun(method="prompt_tuning", quantization="int8"),
]
GRID = [
    PlannedRun(shape, method=method, quantization=quantization, dtype=dtype, checkpointing=checkpointing, lengths=rows)
    for (shape, rows), (method, quantization), dtype, checkpointing in itertools.product(
        (("16M", (128, 128)), ("16M", (128, 90, 33)), ("55M", (256, 256))),
        (("full", "none"), ("lora", "none"), ("dora", "none"), ("lora", "nf4")),
        ("bf16", "fp32"),
        ("none", "full", "selective"),
    )
]
OTHERS = [
    PlannedRun(method="dora", dtype="fp32", attention="eager", lora_dropout=0.1),
    PlannedRun(method="ia3", quantization="fp4", accumulation=3),
    PlannedRun(method="rslora", quantization="int8", loss_head="chunked"),
]
OPTIMIZERS = ("adamw_torch", "adafactor", "sgd", "adagrad", "rmsprop", "adamw_8bit", "paged_adamw_8bit", "lion_8bit")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bases")


def require_measured(run: PlannedRun, bases: Path, work: Path) -> None:
    base = run.base(bases)
    measured = run.measured_bytes(base, work)
    assert trace_here(run.request(base)).peak_allocated_bytes == pytest.approx(measured, rel=TOLERANCE)


@pytest.mark.parametrize("run", QUICK, ids=repr)
def test_the_traced_peak_is_the_measured_one(run, bases, tmp_path):
    require_measured(run, bases, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("run", [*GRID, *OTHERS], ids=repr)
def test_the_traced_peak_of_16_and_55_million_parameters_is_the_measured_one(run, bases, tmp_path):
    require_measured(run, bases, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizers_states_and_temporaries_are_counted(optimizer, bases, tmp_path):
    require_measured(PlannedRun(method="full", optimizer=optimizer), bases, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("lengths", [(96, 96), (96, 60)], ids=["even", "padded"])
@pytest.mark.parametrize("changes", [{"method": "full"}, {"checkpointing": "full"}, {"quantization": "nf4"}], ids=repr)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_familys_traced_peak_is_the_measured_one(family, changes, lengths, bases, tmp_path):
    model = FAMILIES[family]
    settings = {**model.settings, "num_hidden_layers": 2}
    attention = "eager" if model.model_type == "gemma2" else "sdpa"
    run = PlannedRun(kind=model.model_type, settings=settings, attention=attention, lengths=lengths, **changes)
    require_measured(run, bases, tmp_path)


class RecorderOfRealTensors(recorder.Recorder):
    """Runs everything for real and keeps the same record."""

    def _run(self, func, args, kwargs):
        return func(*args, **kwargs)


def recorded(request: TraceRequest, *, fake: bool) -> recorder.Recorder:
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode(allow_non_fake_inputs=True) if fake else contextlib.nullcontext()
    record = (recorder.Recorder if fake else RecorderOfRealTensors)(mode, stand_ins=STAND_INS)
    fake_step.run_steps(build_fake_model(request, mode), request, record)
    return record


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_allocates_the_same_on_fake_and_on_real_tensors(family, monkeypatch):
    require_same_record(family, "none", monkeypatch)


@pytest.mark.long
@pytest.mark.parametrize("checkpointing", ["full", "selective"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_recomputes_the_same_on_fake_and_on_real_tensors(family, checkpointing, monkeypatch):
    require_same_record(family, checkpointing, monkeypatch)


def require_same_record(family: str, checkpointing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that look whether they are traced must not find out: every allocation is the same, in the same order."""
    from transformers import AutoConfig

    monkeypatch.setattr(fake_step, "STEPS", 1)
    model = FAMILIES[family]
    tokens = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    layers = 2 if "sliding_window" in model.settings else 1  # one of each kind
    settings = {**SHAPES["1M"], **tokens, "vocab_size": 128, **model.settings, "num_hidden_layers": layers}
    config = json.loads(AutoConfig.for_model(model.model_type, **settings).to_json_string())
    run = PlannedRun(dtype="fp32", lengths=(24, 24, 9))
    attention = "eager" if model.model_type == "gemma2" else "sdpa"
    request = dataclasses.replace(
        TraceRequest(config, run.adapter, 3, 24), attention=attention, device="cpu", dtype="fp32",
        row_lengths=run.lengths, gradient_checkpointing=checkpointing,
    )  # fmt: skip
    fake, real = (recorded(request, fake=fake) for fake in (True, False))
    assert list(fake.sizes) == list(real.sizes)
    peaks = [timeline.find_peak(record, rounded=False) for record in (fake, real)]
    assert peaks[0] == peaks[1]


@pytest.fixture(scope="module")
def on_a_gpu(bases) -> TraceRequest:
    """A small QLoRA run as it would be on an L40S; `lengths` make a mask necessary."""
    run = PlannedRun(quantization="nf4", lengths=(96, 60), settings={"num_hidden_layers": 1})
    return run.request(run.base(bases), device="cuda", compute_capability=(8, 9), optimizer="adamw_torch")


def test_a_plan_for_a_gpu_is_made_without_one(on_a_gpu):
    result = trace_here(on_a_gpu)
    assert sum(result.breakdown.values()) == result.peak_allocated_bytes <= result.peak_reserved_bytes
    assert result.breakdown["workspace"] == 2 * 8519680  # the caller's thread and autograd's
    assert result.between_steps_bytes < result.peak_allocated_bytes
    assert result.fits is None
    # fp32 states of what is trained, each tensor rounded up to 512 bytes; the step counters are on the host.
    assert 8 * result.trainable_parameters <= result.breakdown["optimizer_states"] < 8.5 * result.trainable_parameters
    again = dataclasses.replace(on_a_gpu, device_limit_bytes=result.peak_reserved_bytes - 2**21)
    assert trace_here(again).fits is False


@pytest.mark.parametrize(
    ("capability", "dtype", "masked", "kernel"),
    [
        ((8, 9), "bfloat16", False, "flash"),
        ((8, 9), "bfloat16", True, "efficient"),
        ((7, 5), "float16", False, "efficient"),
        ((9, 0), "bfloat16", True, "cudnn"),
        ((12, 0), "bfloat16", False, "flash"),
        ((8, 9), "float32", False, "efficient"),
    ],
)
def test_attention_takes_the_kernel_that_torch_would_choose_on_that_gpu(capability, dtype, masked, kernel):
    query = torch.empty(1, 2, 8, 64, dtype=getattr(torch, dtype))
    assert CudaStandIns(capability).kernel(query, query, masked=masked) == kernel


@pytest.mark.parametrize("quantization", ["nf4", pytest.param("int8", marks=pytest.mark.long)])
def test_adapters_on_a_planned_gpu_take_their_input_in_16_bits(on_a_gpu, quantization):
    """PEFT asks CUDA's autocast and casts to fp32 on a CPU; padding needs no mask with FlashAttention."""
    result = trace_here(
        dataclasses.replace(on_a_gpu, quantization=quantization, attention="flash_attention_2", max_grad_norm=0.0)
    )
    on_cpu = trace_here(dataclasses.replace(on_a_gpu, quantization=quantization, device="cpu"))
    assert result.breakdown["activations"] < on_cpu.breakdown["activations"]
    assert on_cpu.breakdown["base_weights"] == pytest.approx(result.breakdown["base_weights"], rel=0.02)


def test_flash_attentions_backward_pass_needs_sums_in_fp32_and_keys_for_every_query_head():
    grad, query, key = torch.empty(1, 8, 100, 64), torch.empty(1, 8, 100, 64).half(), torch.empty(1, 2, 100, 64).half()
    operator = torch.ops.aten._scaled_dot_product_flash_attention_backward.default
    taken = list(cuda_temporaries(operator, (grad, query, key), None))
    rows = 8 * 128
    assert taken == [4 * rows, 4 * rows * 64, 2 * 8 * 100 * 64, 2 * 8 * 100 * 64]


def test_a_trace_is_remembered_by_content(on_a_gpu, tmp_path, monkeypatch):
    def run_in_this_process(command: list[str], **settings: object) -> subprocess.CompletedProcess:
        assert command[:3] == [sys.executable, "-m", "charkha.backends.torch.trace"]
        return subprocess.CompletedProcess(command, trace.main(command[3:]), "", "")

    monkeypatch.setattr(subprocess, "run", run_in_this_process)
    first = trace.trace_memory(on_a_gpu, cache=tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(sys, "executable", "/nonexistent")  # a child could not start
    assert trace.trace_memory(on_a_gpu, cache=tmp_path) == first
    with pytest.raises(OSError, match="nonexistent"):
        trace.trace_memory(dataclasses.replace(on_a_gpu, max_grad_norm=0.0), cache=tmp_path)


@pytest.mark.long
def test_a_trace_in_a_child_process_is_that_of_this_process(on_a_gpu, tmp_path):
    in_child = trace.trace_memory(on_a_gpu, cache=tmp_path)
    assert dataclasses.replace(in_child, seconds=0.0) == dataclasses.replace(trace_here(on_a_gpu), seconds=0.0)


def test_a_request_survives_its_json(on_a_gpu):
    assert trace.request_from_json(json.loads(json.dumps(dataclasses.asdict(on_a_gpu)))) == on_a_gpu


def test_an_error_of_the_child_reaches_the_caller_as_it_was(on_a_gpu, tmp_path):
    wrong = dataclasses.replace(on_a_gpu, adapter=dataclasses.replace(on_a_gpu.adapter, target_modules=("no_such",)))
    (tmp_path / "request.json").write_text(json.dumps(dataclasses.asdict(wrong)))
    code = trace.main([str(tmp_path / "request.json"), str(tmp_path / "result.json")])
    told = json.loads((tmp_path / "result.json").read_text())["error"]
    assert code == told["exit_code"] == UsageError.exit_code
    assert "no_such" in told["message"]


def test_a_config_that_transformers_cannot_build_is_an_error_of_the_environment(on_a_gpu):
    with pytest.raises(EnvironmentProblem):
        trace_here(dataclasses.replace(on_a_gpu, config={**on_a_gpu.config, "num_attention_heads": 0}))
