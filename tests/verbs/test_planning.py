"""`charkha plan`: its JSON contract, other machines, bad input, what it proposes, and how fast and light it answers."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from charkha.cli.app import app
from charkha.errors import EnvironmentProblem

LLAMA_8B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}
KEYS = {
    "fits", "peak_allocated_bytes", "peak_reserved_bytes", "device_limit_bytes", "breakdown", "method",
    "trainable_parameters", "total_parameters", "tokens_per_second", "seconds", "energy_kwh", "cost", "host_ram_bytes",
    "disk_bytes", "reasons", "alternatives",
}  # fmt: skip


@pytest.fixture
def workshop(tmp_path: Path) -> Path:
    """A folder with a base model that is only a config.json, a hundred rows, and a config for them."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text(json.dumps(LLAMA_8B))
    (tmp_path / "rows.jsonl").write_text('{"text": "some words"}\n' * 100)
    (tmp_path / "charkha.yaml").write_text(
        "model: {base: base, quantization: nf4}\n"
        "data: {train: [rows.jsonl], max_length: 2048}\n"
        "training: {batch_size: 16, epochs: 1}\noutput: runs/x\n"
    )
    return tmp_path


def plan(folder: Path, *arguments: str, code: int = 0) -> dict[str, Any]:
    """The command's answer, in closed form unless `arguments` say otherwise."""
    method = () if "--method" in arguments else ("--method", "closed_form")
    result = CliRunner().invoke(app, ["plan", str(folder / "charkha.yaml"), "--json", *method, *arguments])
    assert result.exit_code == code, result.output
    record: dict[str, Any] = json.loads(result.stdout)
    return record


def test_the_answer_has_every_key_of_the_contract(workshop: Path) -> None:
    record = plan(workshop, "--gpu", "rtx-4090")
    assert set(record) >= KEYS
    assert set(record["cost"]) >= {"currency", "electricity", "rental_equivalent"}
    assert record["fits"] is True
    assert sum(record["breakdown"].values()) == record["peak_allocated_bytes"] < record["peak_reserved_bytes"]
    assert record["peak_reserved_bytes"] < record["device_limit_bytes"]
    assert record["total_parameters"] == 8_030_261_248
    assert record["cost"]["electricity"] == pytest.approx(10 * record["energy_kwh"], abs=0.01)
    assert 200_000 / 10_000 < record["seconds"] < 200_000 / 500  # 100 rows of 2048 tokens


def test_without_a_tokenizer_rows_count_as_max_length_and_that_is_said(workshop: Path) -> None:
    record = plan(workshop, "--gpu", "rtx 4090")
    assert any("every row is counted as max_length, 2048 tokens" in reason for reason in record["reasons"])
    (workshop / "rows.jsonl").unlink()
    record = plan(workshop, "--gpu", "rtx 4090")
    assert record["seconds"] is None
    assert record["energy_kwh"] is None
    assert record["cost"]["electricity"] is None
    assert record["tokens_per_second"] > 0


def test_what_does_not_fit_is_printed_whole_with_exit_code_3(workshop: Path) -> None:
    resident = ("--set", "model.placement=resident", "--set", "model.quantization=none")
    record = plan(workshop, "--gpu", "rtx 3050", *resident, code=3)
    assert record["fits"] is False
    assert set(record) >= KEYS
    others = record["alternatives"][-1]
    assert others["name"] == "other_machines"
    assert others["machines"][0]["count"] == 1
    assert any(reason.startswith("does not fit") for reason in record["reasons"])


def test_proposals_fit_and_name_the_keys_to_change(workshop: Path) -> None:
    record = plan(workshop, "--gpu", "rtx 4090")
    proposals = {one["name"]: one for one in record["alternatives"]}
    assert set(proposals) == {"fastest", "safest", "longest_context"}
    assert all(one["fits"] and one["reason"] for one in proposals.values())
    assert proposals["fastest"]["tokens_per_second"] >= record["tokens_per_second"]
    assert proposals["safest"]["peak_reserved_bytes"] < 0.9 * record["device_limit_bytes"]
    assert proposals["longest_context"]["changes"]["data.max_length"] > 4096
    changed = [f"{key}={value}" for key, value in proposals["fastest"]["changes"].items()]
    again = plan(workshop, "--gpu", "rtx 4090", *(part for change in changed for part in ("--set", change)))
    assert again["peak_allocated_bytes"] == proposals["fastest"]["peak_allocated_bytes"]


def test_several_cards_share_the_work(workshop: Path) -> None:
    full = ("--set", "adapter.method=full", "--set", "model.quantization=none")
    # For auto one card would get states in 8 bits, and eight would get larger micro batches.
    step = ("optimizer=adamw_torch_fused", "micro_batch_size=2", "gradient_checkpointing=full", "loss_head=chunked")
    full += tuple(part for value in step for part in ("--set", f"training.{value}"))
    one = plan(workshop, "--gpu", "a100", *full, code=3)
    eight = plan(workshop, *("--gpu", "a100") * 8, *full)
    assert eight["devices"] == 8
    assert eight["settings"]["strategy"] == "fsdp"
    assert eight["peak_allocated_bytes"] < one["peak_allocated_bytes"] / 3
    narrow = ("--set", "devices.shard_dtype=bf16", "--set", "devices.strategy=fsdp")
    pure = plan(workshop, *("--gpu", "a100") * 8, *full, *narrow)
    assert pure["breakdown"]["optimizer_states"] * 2 == eight["breakdown"]["optimizer_states"]


def test_a_machine_file_of_another_computer_plans_the_same(workshop: Path, tmp_path: Path) -> None:
    file = tmp_path / "office.json"
    here = plan(workshop, "--gpu", "a6000", "--write-machine", str(file))
    there = plan(workshop, "--gpu", str(file))
    for key in ("peak_allocated_bytes", "device_limit_bytes", "tokens_per_second", "seconds"):
        assert here[key] == there[key]


def test_host_memory_that_is_too_small_is_told(workshop: Path, tmp_path: Path) -> None:
    file = tmp_path / "small.json"
    file.write_text(json.dumps({"gpus": ["rtx 4090"], "ram_bytes": 2 * 2**30}))
    record = plan(workshop, "--gpu", str(file), code=3)
    assert any(reason.startswith("host memory") for reason in record["reasons"])


def test_popular_models_need_no_folder(workshop: Path) -> None:
    record = plan(workshop, "--gpu", "rtx 4090", "--set", "model.base=mistralai/Mistral-7B-v0.1")
    assert record["total_parameters"] == 7_241_732_096


def test_values_that_training_does_not_carry_out_yet_are_planned_and_named(workshop: Path) -> None:
    record = plan(workshop, "--gpu", "rtx 4090", "--set", "training.fused_kernels=liger")
    assert any("training.fused_kernels" in reason and "does not carry it out" in reason for reason in record["reasons"])
    streamed = ("--set", "model.placement=streamed", "--set", "model.base=meta-llama/Llama-3.1-70B")
    record = plan(workshop, "--gpu", "rtx 4090", *streamed)
    assert record["breakdown"]["base_weights"] < 16 * 2**30


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "hidden_size is None"),
        ({"num_hidden_layers": -3}, "num_hidden_layers is -3"),
        ({"hidden_size": "4096"}, "'4096'"),
        ({"model_type": "mamba"}, "mamba"),
        ({"model_type": "my_own", "auto_map": {"AutoModelForCausalLM": "x.py"}}, "code of its own"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
    ],
)
def test_a_base_that_cannot_be_planned_for_is_a_users_error(workshop: Path, change: Any, message: str) -> None:
    (workshop / "base/config.json").write_text(json.dumps(LLAMA_8B | change))
    record = plan(workshop, "--gpu", "rtx 4090", code=2)
    assert message in record["error"]["message"]
    assert record["error"]["remedy"]
    assert record["error"]["where"]


@pytest.mark.parametrize("text", ["{", "[" * 100_000, '{"a":' * 100_000])
def test_a_config_json_that_is_no_json_is_a_users_error(workshop: Path, text: str) -> None:
    (workshop / "base/config.json").write_text(text)
    assert "config.json" in plan(workshop, "--gpu", "rtx 4090", code=2)["error"]["where"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpu", "rtx 4900"), "RTX 4090"),
        (("--gpu", "rtx 4090", "--method", "guess"), "trace or closed_form"),
        (("--gpu", "rtx 4090", "--set", "data.max_length=100000"), "8192 positions"),
        (("--gpu", "rtx 4090", "--set", "model.base=nobody/nothing"), "config.json is enough"),
        (("--gpu", "t4", "--set", "model.dtype=bf16"), "bf16"),
        (("--gpu", "rtx 4090", "--buy-or-rent", "--hours-per-day", "25"), "at most 24"),
        (("--gpu", "rtx 4090", "--set", "devices.offload=disk"), "parameters"),
        (tuple(["--gpu", "rtx4090"] * 20), "shared out over 20 devices"),
    ],
)
def test_wrong_questions_are_answered_with_what_to_change(workshop: Path, arguments: Any, message: str) -> None:
    assert message in json.dumps(plan(workshop, *arguments, code=2)["error"])


def traced(monkeypatch: pytest.MonkeyPatch, allocated: int, reserved: int) -> list[Any]:
    """Puts figures in the place of a trace, which takes half a minute; gives what was asked for."""
    asked: list[Any] = []

    def trace_memory(request: Any) -> Any:
        asked.append(request)
        if allocated < 0:
            raise EnvironmentProblem("the model has no fake kernels")
        return SimpleNamespace(
            peak_allocated_bytes=allocated,
            peak_reserved_bytes=reserved,
            breakdown={"weights": allocated},
            peak_moment="backward",
        )

    monkeypatch.setattr("charkha.training.planned_trace.trace_memory", trace_memory)
    return asked


def test_a_trace_is_the_authority_for_one_device(workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = traced(monkeypatch, 12 * 2**30, 13 * 2**30)
    record = plan(workshop, "--gpu", "rtx 4090", "--method", "trace")
    assert (record["method"], record["peak_allocated_bytes"]) == ("trace", 12 * 2**30)
    assert record["breakdown"] == {"weights": 12 * 2**30}
    assert (asked[0].sequence_length, asked[0].quantization, asked[0].config["hidden_size"]) == (2048, "nf4", 4096)
    assert plan(workshop, "--gpu", "rtx 4090", "--method", "closed_form")["method"] == "closed_form"
    assert plan(workshop, "--gpu", "a100", "--gpu", "a100", "--method", "trace")["method"] == "closed_form"
    assert len(asked) == 1


def test_a_trace_that_finds_more_than_the_card_has_is_no_fit(workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    traced(monkeypatch, 30 * 2**30, 31 * 2**30)
    assert plan(workshop, "--gpu", "rtx 4090", "--method", "trace", code=3)["fits"] is False


def test_a_step_that_cannot_be_traced_is_counted_and_the_reason_told(
    workshop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced(monkeypatch, -1, 0)
    record = plan(workshop, "--gpu", "rtx 4090", "--method", "trace")
    assert record["method"] == "closed_form"
    assert any("no fake kernels" in reason for reason in record["reasons"])


def test_a_plan_says_what_chatting_with_the_tuned_model_takes(workshop: Path) -> None:
    told = plan(workshop, "--gpu", "rtx 3060")["generation"]
    assert told["kv_cache_bytes_1000_tokens"] == 125 * 2**20
    assert (told["tokens"], told["kv_cache_bytes"]) == (2048, 2048 * 2**17)
    assert (told["adapter"]["fits"], told["merged"]["fits"]) == (True, False)  # 16 GB of weights on a 12 GB card
    assert sum(told["merged"]["breakdown"].values()) == told["merged"]["peak_allocated_bytes"]
    arguments = ["plan", str(workshop / "charkha.yaml"), "--gpu", "rtx 3060", "--method", "closed_form"]
    assert (
        "the merged model (more than is free); 125 MiB of it per 1000 tokens"
        in CliRunner().invoke(app, arguments).output
    )


def test_the_held_out_loss_is_named_where_it_is_the_peak(workshop: Path) -> None:
    short = ("data.max_length=1024", "training.loss_head=full", "training.micro_batch_size=1")
    asked = [word for change in short for word in ("--set", change)]
    record = plan(workshop, "--gpu", "rtx 3060", *asked)
    assert record["peak_moment"] == "evaluation"
    assert record["evaluation"] == {"rows": 4, "tokens": 1024, "peak_allocated_bytes": record["moments"]["evaluation"]}
    assert sum(record["breakdown"].values()) == record["peak_allocated_bytes"] == record["moments"]["evaluation"]
    assert any("held-out loss is the peak (4 rows of 1024 tokens" in reason for reason in record["reasons"])
    alone = plan(workshop, "--gpu", "rtx 3060", *asked, "--set", "data.eval=null")
    assert alone["evaluation"] is None
    assert alone["peak_allocated_bytes"] < record["peak_allocated_bytes"]
    assert not any("held-out loss" in reason for reason in alone["reasons"])


@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        ({}, "training.batch_size=1000000000"),
        ({}, "training.epochs=1e12"),
        ({}, "training.epochs=1e308"),
        ({}, "adapter.rank_pattern={down_proj: " + "9" * 400 + "}"),
        *(({}, f"{key}={'9' * 400}") for key in ("training.max_steps", "training.batch_size", "adapter.r")),
        ({"max_position_embeddings": 10**12}, "data.max_length=1000000000000"),
        ({"num_hidden_layers": 10**9}, "training.batch_size=1"),
        ({"hidden_size": 8 * 10**9, "vocab_size": 10**12}, "adapter.r=1000000"),
    ],
)
def test_absurd_values_are_answered_soon(workshop: Path, shape: Any, settings: str) -> None:
    (workshop / "base/config.json").write_text(json.dumps(LLAMA_8B | shape))
    began = time.process_time()
    config, method = str(workshop / "charkha.yaml"), ("--method", "closed_form")
    result = CliRunner().invoke(app, ["plan", config, "--json", "--gpu", "rtx 4090", *method, "--set", settings])
    assert result.exit_code in (0, 2, 3), result.output
    assert json.loads(result.stdout)
    assert time.process_time() - began < 5


def test_buying_pays_sooner_with_more_hours_a_day(workshop: Path) -> None:
    answers = [
        plan(workshop, "--gpu", "rtx 4090", "--buy-or-rent", "--hours-per-day", hours)["buy_or_rent"]
        for hours in ("4", "16")
    ]
    assert answers[0]["months"] == pytest.approx(4 * answers[1]["months"])
    assert answers[1]["months_if_rent_falls_a_third"] > answers[1]["months"]
    assert answers[1]["currency"] == "INR"
    assert answers[1]["price_origin"] == {"as_of": "2026-11", "source": "estimate", "checked": False}
    reasons = plan(workshop, "--gpu", "rtx 4090", "--buy-or-rent")["reasons"]
    assert any(reason.startswith("price of RTX 4090: as of 2026-11") and "not checked" in reason for reason in reasons)
    assert any(reason.startswith("offer of RunPod community: as of 2026-03") for reason in reasons)


def test_a_person_is_shown_the_verdict_the_terms_and_the_money(workshop: Path) -> None:
    arguments = ["plan", str(workshop / "charkha.yaml"), "--gpu", "rtx 4090", "--method", "closed_form"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0
    for text in ("fits on RTX 4090", "base weights", "kWh", "INR", "fastest"):
        assert text in result.output


def test_this_machine_without_a_gpu_is_planned_as_a_cpu(workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("charkha.hardware.machine.open_nvml", lambda: None)
    tiny = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512}
    (workshop / "base/config.json").write_text(json.dumps(LLAMA_8B | tiny))
    record = plan(workshop, "--set", "model.quantization=none")
    assert record["settings"]["device"] == "cpu"
    assert record["fits"]


def test_real_rows_are_measured_where_the_tokenizer_is(workshop: Path) -> None:
    record = plan(
        workshop,
        "--gpu",
        "rtx 4090",
        "--set",
        "model.base=starter",
        *("--set", "data.eval=null", "--set", "data.max_length=256"),
    )
    assert record["settings"]["tokens"] < 64
    assert not any("no tokenizer" in reason for reason in record["reasons"])


def test_the_plan_says_what_packing_saves(workshop: Path) -> None:
    short, long = '{"text": "a"}\n', '{"text": "' + "some words " * 40 + '"}\n'
    (workshop / "rows.jsonl").write_text((short * 9 + long) * 40)
    starter = ("--gpu", "rtx 4090", "--set", "model.base=starter", "--set", "data.eval=null")
    fixed = (*starter, "--set", "data.max_length=256", "--set", "model.quantization=none")
    record = plan(workshop, *fixed, "--set", "data.packing=false")
    (packed,) = (one for one in record["alternatives"] if one["name"] == "packing")
    assert packed["changes"] == {"data.packing": True}
    assert packed["seconds"] < record["seconds"]
    there = plan(workshop, *fixed, "--set", "data.packing=true")
    assert there["seconds"] == packed["seconds"]
    assert [one["name"] for one in there["alternatives"]][-1] == "no_packing"


def test_hours_are_those_of_the_rows_as_they_are_padded(workshop: Path) -> None:
    """One long row in ten, grouped by length: far from the time of long rows, and not the mean of both either."""
    short, long = '{"text": "a"}\n', '{"text": "' + "some words " * 40 + '"}\n'
    starter = ("--gpu", "rtx 3050", "--set", "model.base=starter", "--set", "data.eval=null")
    fixed = (*starter, "--set", "model.quantization=none", "--set", "training.micro_batch_size=16")
    times = {}
    for name, text in {"long": long * 400, "skewed": (short * 9 + long) * 40}.items():
        (workshop / "rows.jsonl").write_text(text)
        times[name] = plan(workshop, *fixed, "--set", "data.packing=false", "--set", "data.max_length=256")["seconds"]
    assert times["skewed"] < 0.6 * times["long"]


def test_the_closed_form_of_70_billion_parameters_takes_under_a_second_and_no_framework(workshop: Path) -> None:
    big = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    (workshop / "base/config.json").write_text(json.dumps(LLAMA_8B | big))
    program = (
        "import sys; from charkha.cli.app import main\n"
        f"sys.argv = ['charkha', 'plan', {str(workshop / 'charkha.yaml')!r}, '--gpu', 'h200', "
        "'--method', 'closed_form', '--json']\n"
        "try: main()\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'trl', 'peft', 'numpy', 'datasets', 'bitsandbytes'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    began = time.process_time(), time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
    assert json.loads(done.stdout)["total_parameters"] == 70_553_706_496
    assert time.monotonic() - began[1] < 10  # 0.5 s alone; a shared machine may be busy


@pytest.mark.parametrize(
    ("data", "rows"),
    [("eval: 50%", 50), ("eval: 60", 40), ("eval: null", 100), ("eval: held_out.jsonl", 100)],
)
def test_without_a_tokenizer_held_out_rows_are_not_counted_as_trained(workshop: Path, data: str, rows: int) -> None:
    (workshop / "held_out.jsonl").write_text('{"text": "other words"}\n')
    one_step = plan(workshop, "--gpu", "rtx 4090", "--set", "training.max_steps=1", "--set", "data.eval=null")
    text = (workshop / "charkha.yaml").read_text()
    (workshop / "charkha.yaml").write_text(text.replace("max_length: 2048", f"max_length: 2048, {data}"))
    record = plan(workshop, "--gpu", "rtx 4090")
    full_steps = one_step["seconds"] / (100 / 7)  # seven steps of a hundred rows, the last one short
    assert record["seconds"] == pytest.approx(rows * full_steps, rel=0.05)


def test_a_split_that_leaves_nothing_to_train_on_is_said(workshop: Path) -> None:
    whole = plan(workshop, "--gpu", "rtx 4090", "--set", "data.eval=null")
    none = plan(workshop, "--gpu", "rtx 4090", "--set", "data.eval=0%")
    assert not any("leaves no row" in reason for reason in none["reasons"])
    record = plan(workshop, "--gpu", "rtx 4090", "--set", "data.eval=100")
    assert record["seconds"] == none["seconds"] == whole["seconds"]
    assert any("data.eval 100 leaves no row to train on" in reason for reason in record["reasons"])


def test_without_a_tokenizer_sources_count_by_weight_and_rows_that_cannot_be_read_are_refused(workshop: Path) -> None:
    once = plan(workshop, "--gpu", "rtx 4090")["seconds"]
    thrice = plan(workshop, "--gpu", "rtx 4090", "--set", "data.train=[{path: rows.jsonl, weight: 3}]")["seconds"]
    assert thrice == pytest.approx(3 * once, rel=0.05)
    (workshop / "rows.jsonl").write_text('{"text": 1\n')
    assert plan(workshop, "--gpu", "rtx 4090", code=4)["files"]


@pytest.mark.parametrize(
    ("wish", "key"),
    [
        ("adapter.target_modules=[q_prj]", "adapter.target_modules"),
        ("adapter.target_modules='('", "adapter.target_modules"),
        ("adapter.modules_to_save=[lm_haed]", "adapter.modules_to_save"),
        ("adapter.layers_to_transform=[32]", "adapter.layers_to_transform"),
        ("adapter.rank_pattern={'(': 8}", "adapter.rank_pattern"),
        ("devices.processes=3", "devices.processes"),
        ("model.placement=streamed", "model.placement"),
    ],
)
def test_what_training_would_refuse_is_not_planned_for(workshop: Path, wish: str, key: str) -> None:
    record = plan(workshop, "--gpu", "2x rtx 4090", "--set", wish, code=2)
    (problem,) = record["error"]["problems"]
    assert problem["key"] == key
    assert problem["remedy"]


def test_ranks_and_layers_of_their_own_are_counted(workshop: Path) -> None:
    def trained(*wishes: str) -> int:
        found = plan(workshop, "--gpu", "h100", *(part for wish in wishes for part in ("--set", wish)))
        return int(found["trainable_parameters"])

    all_of_it = 41_943_040  # r 16 on every linear layer of 32 blocks
    assert trained("adapter.layers_to_transform=[0, 5]") == all_of_it * 2 // 32
    more = trained("adapter.rank_pattern={down_proj: 64, layers.3.self_attn.q_proj: 17}")
    assert more - all_of_it == 32 * 48 * (14336 + 4096) + (4096 + 4096)
    assert trained(r"adapter.target_modules='.*layers\.(3|4)\..*q_proj'") == 2 * 16 * (4096 + 4096)


def test_a_machine_file_that_cannot_be_written_is_a_users_error(workshop: Path) -> None:
    for place in (workshop / "none" / "office.json", workshop):
        record = plan(workshop, "--gpu", "rtx 4090", "--write-machine", str(place), code=2)
        assert record["error"]["where"] == str(place)


def test_a_way_to_share_out_the_work_that_training_does_not_carry_out_is_said(workshop: Path) -> None:
    full = ("--set", "adapter.method=full", "--set", "model.quantization=none")
    record = plan(workshop, *("--gpu", "h100") * 4, *full)
    assert record["settings"]["strategy"] == "fsdp"
    assert any("devices.strategy: fsdp is planned for, but" in reason for reason in record["reasons"])
    (machines,) = plan(workshop, "--gpu", "rtx 4090", *full, code=3)["alternatives"]
    assert "does not carry out fsdp" in machines["reason"]


def test_further_hosts_draw_power_and_cost_rent_too(workshop: Path) -> None:
    cards = ("--gpu", "2x rtx 4090", "--set", "training.max_steps=10", "--set", "training.batch_size=24")
    one, three = plan(workshop, *cards)["cost"], plan(workshop, *cards, "--set", "devices.hosts=[a, b]")["cost"]
    assert three["wall_w"] == pytest.approx(3 * one["wall_w"], abs=2)


def test_idle_cards_of_a_machine_cost_nothing(workshop: Path) -> None:
    one, of_four = (
        plan(workshop, *("--gpu", "rtx 4090") * count, "--set", "devices.strategy=single") for count in (1, 4)
    )
    assert of_four["energy_kwh"] == one["energy_kwh"]
    assert of_four["cost"] == one["cost"]


def test_too_little_host_memory_is_not_told_as_a_card_too_small(workshop: Path) -> None:
    (workshop / "office.json").write_text(json.dumps({"gpus": ["RTX 4090"] * 8, "ram_bytes": 8 << 30}))
    record = plan(workshop, "--gpu", str(workshop / "office.json"), code=3)
    assert record["settings"]["strategy"] == "ddp"
    assert any("fits on the device, though the host has too little memory" in reason for reason in record["reasons"])
    assert any(reason.startswith("host memory: ") for reason in record["reasons"])


def test_electricity_is_counted_in_the_currency_that_is_asked_for(workshop: Path) -> None:
    def told(*wishes: str) -> dict[str, Any]:
        return plan(workshop, "--gpu", "rtx 4090", *(part for wish in wishes for part in ("--set", wish)))

    rupees, dollars = told("cost.currency=inr"), told("cost.currency=usd")
    assert (rupees["cost"]["currency"], dollars["cost"]["currency"]) == ("INR", "USD")
    assert dollars["cost"]["electricity_per_kwh"] == 0.11
    assert told("cost.currency=USD", "cost.electricity_per_kwh=0.3")["cost"]["electricity_per_kwh"] == 0.3
    assert any("tariff in rupees: give yours in EUR" in reason for reason in told("cost.currency=EUR")["reasons"])
    priced = told("cost.currency=EUR", "cost.electricity_per_kwh=0.3")
    assert not any("tariff" in reason for reason in priced["reasons"])
    assert plan(workshop, "--set", "cost.currency=rupees", code=2)["error"]["problems"][0]["key"] == "cost.currency"


def test_the_disk_that_counts_is_the_runs_own(workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (workshop / "elsewhere").mkdir()
    free = {workshop / "elsewhere": 7 << 40}
    monkeypatch.setattr(
        "charkha.hardware.machine.shutil.disk_usage", lambda folder: SimpleNamespace(free=free.get(Path(folder), 1))
    )
    wishes = ("model.base=starter", "model.quantization=none", "data.eval=null", "data.max_length=64")
    small = [part for wish in wishes for part in ("--set", wish)]
    little = plan(workshop, *small, code=3)
    assert any(reason.startswith("disk: ") for reason in little["reasons"])
    there = ("--set", "output=elsewhere/run")
    assert plan(workshop, *small, *there)["fits"]


def test_a_streamed_base_that_lies_in_the_cache_needs_no_room_again(
    workshop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHARKHA_CACHE", str(workshop / "cache"))
    first = plan(workshop, "--set", "model.placement=streamed")
    slab = first["streaming"]["slab_bytes"]
    (workshop / "cache/slabs/key").mkdir(parents=True)
    with (workshop / "cache/slabs/key/layers.slab").open("wb") as file:
        file.truncate(slab)
    assert plan(workshop, "--set", "model.placement=streamed")["disk_bytes"] == first["disk_bytes"] - slab
    assert plan(workshop, "--gpu", "4090", "--set", "model.placement=streamed")["disk_bytes"] > slab


@pytest.mark.parametrize(
    ("base", "wishes"),
    [
        ("mixtral", ("model.quantization=nf4", "model.placement=resident")),
        ("llama", ("model.quantization=int8", "adapter.method=dora", "model.placement=resident")),
    ],
)
def test_a_storage_that_training_refuses_is_said(workshop: Path, base: str, wishes: tuple[str, ...]) -> None:
    experts = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    small = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2, "vocab_size": 1000}
    shape = LLAMA_8B | small | (experts if base == "mixtral" else {})
    (workshop / "base/config.json").write_text(json.dumps(shape))
    record = plan(workshop, *(part for wish in wishes for part in ("--set", wish)))
    assert any("is planned for, but training refuses it" in reason for reason in record["reasons"])
    assert any("lora_dropout: training refuses" in reason for reason in record["reasons"]) == (base == "mixtral")
