"""The config file: what is accepted, and that every mistake is told with its line, key and remedy."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import yaml

from charkha.carried_out import CARRIED_OUT
from charkha.config import Config
from charkha.config_file import ALIASES, LoadedConfig, dump_config, known_keys, load_config
from charkha.config_watching import interval_of
from charkha.errors import ConfigError, ConfigProblem

LEAST = "model: {base: starter}\ndata: {train: [a.jsonl]}\noutput: runs/x\n"
Load = Callable[..., LoadedConfig]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def load_text(text: str, *overrides: str) -> LoadedConfig:
        path = tmp_path / "charkha.yaml"
        path.write_text(text, encoding="utf-8")
        return load_config(path, list(overrides))

    return load_text


def problems_of(load: Load, text: str, *overrides: str) -> list[ConfigProblem]:
    with pytest.raises(ConfigError) as caught:
        load(text, *overrides)
    assert caught.value.exit_code == 2
    return caught.value.problems


def only_problem(load: Load, text: str, *overrides: str) -> ConfigProblem:
    (problem,) = problems_of(load, text, *overrides)
    return problem


def test_three_lines_are_a_whole_config(load: Load) -> None:
    config = load(LEAST).config
    assert config.adapter.method == "lora"
    assert config.training.learning_rate == 2e-4
    assert config.data.eval == "5%"


def test_every_problem_is_told_at_once_with_line_key_and_remedy(load: Load) -> None:
    text = """model:
  base: starter
  quantisation: nf4
data:
  train: [a.jsonl]
  overlong: trim
training:
  learning_rte: 1e-4
  epochs: many
output: runs/x
outptu: runs/y
"""
    found = {(problem.line, problem.key): problem for problem in problems_of(load, text)}
    assert list(found) == [
        (3, "model.quantisation"),
        (6, "data.overlong"),
        (8, "training.learning_rte"),
        (9, "training.epochs"),
        (11, "outptu"),
    ]
    assert found[3, "model.quantisation"].remedy == "did you mean model.quantization?"
    assert found[8, "training.learning_rte"].remedy == "did you mean training.learning_rate?"
    assert found[11, "outptu"].remedy == "did you mean output?"
    assert "'trim'" in found[6, "data.overlong"].reason
    assert "'split'" in found[6, "data.overlong"].reason


def test_missing_keys_are_named(load: Load) -> None:
    assert {problem.key for problem in problems_of(load, "training: {seed: 1}\n")} == {"model", "data", "output"}


def test_a_key_in_the_wrong_section_is_pointed_to_the_right_one(load: Load) -> None:
    problem = only_problem(load, LEAST + "training: {max_length: 128}\n")
    assert problem.remedy == "did you mean data.max_length?"


def test_a_dotted_key_is_told_to_be_nested(load: Load) -> None:
    problem = only_problem(load, LEAST + "training.seed: 3\n")
    assert problem.line == 4
    assert "indented below `training:`" in (problem.remedy or "")


@pytest.mark.parametrize("spelling", sorted(ALIASES))
def test_other_tools_spellings_are_accepted_at_the_top_of_the_file(load: Load, spelling: str) -> None:
    values: dict[str, Any] = {
        "model.base": "other", "model.attention": "eager", "model.dtype": "fp32", "adapter.r": 4,
        "adapter.lora_alpha": 8, "adapter.lora_dropout": 0.5, "adapter.target_modules": ["q_proj"],
        "adapter.method": "full", "data.max_length": 99, "data.train": "b.jsonl", "data.eval": 0.5,
        "data.template": "chatml", "data.packing": False, "data.num_proc": 3, "training.learning_rate": 0.5,
            "training.epochs": 9,
        "training.lr_scheduler_type": "linear", "training.optimizer": "adamw_torch", "training.batch_size": 64,
        "training.micro_batch_size": 2, "output": "runs/elsewhere",
    }  # fmt: skip
    target = ALIASES[spelling]
    least = {"model": {"base": "starter"}, "data": {"train": ["a.jsonl"]}, "output": "runs/x"}
    section, _, key = target.rpartition(".")
    inside: Any = least.get(section, least)
    inside.pop(key, None)
    loaded = load(yaml.safe_dump({**least, spelling: values[target]}))
    found: Any = loaded.config
    for part in target.split("."):
        found = getattr(found, part)
    assert found == (["b.jsonl"] if target == "data.train" else values[target])
    assert target in loaded.keys_set
    assert spelling not in loaded.keys_set


def test_an_alias_inside_a_section_is_accepted_too(load: Load) -> None:
    assert load(LEAST + "adapter: {lora_r: 4}\n").config.adapter.r == 4
    assert load(LEAST + "training: {lr: 1e-3}\n").config.training.learning_rate == 1e-3


def test_both_spellings_of_one_key_are_a_problem_that_names_both(load: Load) -> None:
    problem = only_problem(load, LEAST + "adapter: {r: 4}\nlora_r: 8\n")
    assert (problem.line, problem.key) == (5, "lora_r")
    assert "adapter.r" in problem.reason


def test_every_alias_names_a_key_that_exists() -> None:
    assert set(ALIASES.values()) <= set(known_keys())


@pytest.mark.parametrize(
    ("text", "value"),
    [("2e-4", 2e-4), ("1e-05", 1e-5), ("1E-3", 1e-3), (".5", 0.5), ("1.", 1.0), ("1", 1.0), ("+0.1", 0.1)],
)
def test_numbers_are_those_of_yaml_1_2(load: Load, text: str, value: float) -> None:
    assert load(LEAST + f"training: {{learning_rate: {text}}}\n").config.training.learning_rate == value


@pytest.mark.parametrize("text", ["yes", "no", "on", "off", "Yes", "OFF", "y"])
def test_yes_and_no_are_words_and_not_booleans(load: Load, text: str) -> None:
    assert load(LEAST.replace("runs/x", text)).config.output == text
    problem = only_problem(load, LEAST + f"sample_packing: {text}\n")
    assert problem.key == "data.packing"
    assert repr(text) in problem.reason


def test_a_leading_zero_is_decimal_and_a_colon_makes_no_sexagesimal(load: Load) -> None:
    assert load(LEAST + "training: {seed: 010}\n").config.training.seed == 10
    assert load(LEAST.replace("runs/x", "1:30")).config.output == "1:30"
    assert load(LEAST.replace("runs/x", "2024-01-01")).config.output == "2024-01-01"


@pytest.mark.parametrize("text", [".inf", "-.inf", ".nan", "1e999"])
def test_a_number_must_be_finite(load: Load, text: str) -> None:
    assert only_problem(load, LEAST + f"training: {{learning_rate: {text}}}\n").key == "training.learning_rate"


def test_text_is_never_made_into_a_number_nor_a_boolean_into_one(load: Load) -> None:
    assert only_problem(load, LEAST + "training: {learning_rate: '2e-4'}\n").key == "training.learning_rate"
    assert only_problem(load, LEAST + "training: {epochs: true}\n").key == "training.epochs"
    assert only_problem(load, LEAST + "training: {batch_size: 8.0}\n").key == "training.batch_size"


def test_a_repeated_key_is_a_problem_with_both_lines(load: Load) -> None:
    problem = only_problem(load, LEAST + "training:\n  seed: 1\n  epochs: 2\n  seed: 3\n")
    assert (problem.line, problem.key) == (7, "training.seed")
    assert "line 5" in problem.reason


def test_a_repeated_section_is_a_problem(load: Load) -> None:
    assert only_problem(load, LEAST + "data: {train: [b.jsonl]}\n").key == "data"


def test_a_section_whose_keys_are_all_commented_out_means_its_defaults(load: Load) -> None:
    assert load(LEAST + "training:\n  # seed: 3\n").config.training.seed == 42


def test_a_section_that_is_a_single_value_is_told_to_have_keys(load: Load) -> None:
    problem = only_problem(load, LEAST + "adapter: lora\n")
    assert problem.line == 4
    assert "keys indented" in problem.reason


def test_qlora_means_lora_on_nf4(load: Load) -> None:
    config = load(LEAST + "adapter: {method: qlora}\n").config
    assert (config.adapter.method, config.model.quantization) == ("lora", "nf4")


def test_qlora_on_a_base_that_is_not_quantized_is_a_contradiction(load: Load) -> None:
    text = LEAST.replace("{base: starter}", "{base: starter, quantization: none}") + "adapter: {method: qlora}\n"
    assert only_problem(load, text).key == "model.quantization"


def test_load_in_4bit_means_nf4_and_false_means_nothing(load: Load) -> None:
    assert load(LEAST + "load_in_4bit: true\n").config.model.quantization == "nf4"
    assert load(LEAST + "load_in_4bit: false\n").config.model.quantization == "none"
    if "int8" in CARRIED_OUT.get("model.quantization", ("int8",)):
        assert load(LEAST + "load_in_8bit: true\n").config.model.quantization == "int8"
    else:
        assert "int8" in only_problem(load, LEAST + "load_in_8bit: true\n").reason


def test_load_in_4bit_with_a_word_is_not_silently_dropped(load: Load) -> None:
    assert only_problem(load, LEAST + "load_in_4bit: yes\n").key == "load_in_4bit"


def test_full_training_of_a_quantized_base_is_refused(load: Load) -> None:
    text = LEAST + "adapter: {method: full}\nload_in_4bit: true\n"
    assert "quantization" in only_problem(load, text).reason


def test_set_overrides_values_of_the_file_and_its_other_spelling(load: Load) -> None:
    text = LEAST + "lr: 1e-3\ntraining: {seed: 1}\n"
    loaded = load(text, "training.learning_rate=1e-5", "training.seed=2", "cutoff_len=64", "adapter.method=qlora")
    assert loaded.config.training.learning_rate == 1e-5
    assert loaded.config.training.seed == 2
    assert loaded.config.data.max_length == 64
    assert loaded.config.model.quantization == "nf4"


def test_set_reaches_inside_free_mappings(load: Load) -> None:
    loaded = load(LEAST + "trainer: {adam_beta1: 0.8}\n", "trainer.adam_beta2=0.9", "data.map.prompt=q")
    assert loaded.config.trainer == {"adam_beta1": 0.8, "adam_beta2": 0.9}
    assert loaded.config.data.map == {"prompt": "q"}


def test_the_last_set_of_a_key_wins(load: Load) -> None:
    assert load(LEAST, "training.seed=1", "training.seed=2").config.training.seed == 2


@pytest.mark.parametrize(
    "override", ["training.seed", "=3", "training.seed=[1", "training.sede=3", "seed=x", "a.b.c=1"]
)
def test_a_wrong_set_is_told_without_a_line_of_the_file(load: Load, override: str) -> None:
    assert only_problem(load, LEAST + "training: {seed: 1}\n", override).line is None


def test_a_wrong_value_by_set_does_not_blame_the_line_it_overrides(load: Load) -> None:
    problem = only_problem(load, LEAST + "training: {seed: 1}\n", "training.seed=x")
    assert (problem.key, problem.line) == ("training.seed", None)


def not_carried_out() -> list[tuple[str, str]]:
    """(key, value) of every named value that the schema knows and this version does not carry out."""
    found = []
    for key, carried_out in CARRIED_OUT.items():
        section, _, name = key.rpartition(".")
        model: Any = Config.model_fields[section].annotation if section else Config
        annotation = model.model_fields[name].annotation
        for part in (annotation, *get_args(annotation)):
            if get_origin(part) is Literal:
                found += [(key, value) for value in get_args(part) if value not in carried_out]
    return found


def test_a_value_that_would_be_ignored_is_refused_with_what_works(load: Load) -> None:
    for key, value in not_carried_out():
        problem = only_problem(load, LEAST, f"{key}={value}")
        assert problem.key == key
        for works in CARRIED_OUT[key]:
            assert str(works).lower().replace("none", "") in (problem.remedy or ""), key


@pytest.mark.parametrize("key", CARRIED_OUT)
def test_the_default_of_every_key_is_carried_out(key: str) -> None:
    config: Any = Config.model_validate({"model": {"base": "x"}, "data": {"train": ["x"]}, "output": "x"})
    for part in key.split("."):
        config = getattr(config, part)
    assert config in CARRIED_OUT[key]


def test_a_value_refused_inside_a_list_or_as_a_number_is_told_too(load: Load) -> None:
    for key, value in (("devices.hosts", "[a]"), ("guard.max_power_w", "300"), ("guard.windows", "[22:00-06:00]")):
        if key in CARRIED_OUT:
            assert only_problem(load, LEAST, f"{key}={value}").key == key


@pytest.mark.parametrize("value", ["0.05", "50", "'5%'", "5%", "'5 %'", "12.5%", "held_out.jsonl", "null", "0"])
def test_held_out_rows_may_be_a_share_a_count_a_file_or_none(load: Load, value: str) -> None:
    found = load(LEAST.replace("train: [a.jsonl]", f"train: [a.jsonl], eval: {value}")).config.data.eval
    assert found == yaml.safe_load(value)
    assert type(found) is type(yaml.safe_load(value))


@pytest.mark.parametrize(
    "value", ["-1", "1.5", "-0.1", "1.0", "true", "[a.jsonl]", "'150%'", "'-5%'", "'%'", "'x%'", "''"]
)
def test_an_impossible_share_of_held_out_rows_is_refused(load: Load, value: str) -> None:
    text = LEAST.replace("train: [a.jsonl]", f"train: [a.jsonl], eval: {value}")
    assert only_problem(load, text).key == "data.eval"


def test_one_training_file_needs_no_brackets(load: Load) -> None:
    assert load(LEAST.replace("[a.jsonl]", "a.jsonl")).config.data.train == ["a.jsonl"]


def test_a_source_may_carry_its_own_mapping(load: Load) -> None:
    text = LEAST.replace("[a.jsonl]", "[{path: a.csv, map: {prompt: q}}, b.jsonl]")
    first, second = load(text).config.data.train
    assert (first.path, first.map, second) == ("a.csv", {"prompt": "q"}, "b.jsonl")  # type: ignore[union-attr]


def test_a_problem_inside_a_source_names_its_place_in_the_list(load: Load) -> None:
    assert only_problem(load, LEAST.replace("[a.jsonl]", "[a.jsonl, {pth: b.jsonl}]")).key == "data.train[1]"


@pytest.mark.parametrize(
    ("text", "seconds", "steps"), [("5min", 300, None), ("300s", 300, None), ("50 steps", None, 50)]
)
def test_checkpoints_come_by_time_or_by_steps(text: str, seconds: float | None, steps: int | None) -> None:
    interval = interval_of(text)
    assert (interval.seconds, interval.steps) == (seconds, steps)


@pytest.mark.parametrize("text", ["50", "0 steps", "-1 steps", "x steps", "", "5 years"])
def test_a_wrong_checkpoint_interval_shows_both_spellings(load: Load, text: str) -> None:
    problem = only_problem(load, LEAST, f"checkpoint.every='{text}'")
    assert problem.key == "checkpoint.every"
    assert "50 steps" in problem.reason


def test_a_config_survives_being_written_and_read_again(load: Load, tmp_path: Path) -> None:
    text = LEAST + (
        "adapter: {r: 7, target_modules: [q_proj, v_proj]}\n"
        "training: {learning_rate: 1e-05, eval_every: 0.5, warmup_ratio: 0, max_steps: 5}\n"
        "checkpoint: {every: 50 steps}\ntrainer: {adam_beta1: 0.8, lr_scheduler_kwargs: {a: '1e-5'}}\n"
    )
    config = load(text).config
    assert load(dump_config(config)).config == config


ODD_WORDS = (
    "yes", "010", "08", "1e5", "1e-05", "2024-01-01", "null", "~", "true", "0x1f", "1:30", "1_000", ".5", "# x", "a: b",
    "- a", "हिन्दी", "a\nb", " a ", "*x", "&x", "!x", "=",
)  # fmt: skip


@pytest.mark.parametrize("word", ODD_WORDS)
def test_a_path_of_any_spelling_stays_text_when_it_is_written_and_read_again(load: Load, word: str) -> None:
    config = Config.model_validate({"model": {"base": word}, "data": {"train": [word]}, "output": word})
    assert load(dump_config(config)).config == config


@pytest.mark.parametrize(
    ("content", "key"),
    [
        (b"", "(file)"),
        (b"# only a comment\n", "(file)"),
        (b"- a\n- b\n", "(file)"),
        (b"just words\n", "(file)"),
        (b"\xff\xfe\x00", "(file)"),
        (b"model: [\n", "(YAML)"),
        (b"model: {base: *x}\n", "(YAML)"),
        (b"a: &x 1\nb: *x\n", "(YAML)"),
        (b"a: !!python/object/apply:os.system [ls]\n", "(YAML)"),
        (b"a: 1\n--- \nb: 2\n", "(YAML)"),
        (b"a: !!int x\n", "(YAML)"),
        (b"a: " + b"[" * 1500, "(YAML)"),
        (b"a: " + b"1" * 6000, "(YAML)"),
    ],
)
def test_a_file_that_is_no_config_is_told_so(tmp_path: Path, content: bytes, key: str) -> None:
    path = tmp_path / "charkha.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert [problem.key for problem in caught.value.problems] == [key]


def test_a_missing_file_and_a_folder_are_told_so(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(ConfigError, match="cannot be read"):
            load_config(path)


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path: Path) -> None:
    path = tmp_path / "charkha.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + LEAST.replace("\n", "\r\n").encode())
    assert load_config(path).config.output == "runs/x"


def test_garbage_never_gives_anything_but_a_config_error(load: Load) -> None:
    pieces = [
        "model:", "data:", "train:", " ", "\n", "  ", "- ", "[", "]", "{", "}", ":", "?", "|", ">", "'", '"', "#", "&a",
        "*a", "!!int", "!!bool", "!!set", "!!timestamp", "<<", "~", "1e5", "-", "\t", ",", "%", "@", "`", "é", "\u2028",
        "\x01", "1", "null", "base: x", "output: y", "lora_r: 3", "load_in_4bit: 3", "eval: %", "qlora",
    ]  # fmt: skip
    picker = random.Random(7)
    for _ in range(600):
        text = "".join(picker.choices(pieces, k=picker.randint(1, 14)))
        for whole in (text, LEAST + text):
            with contextlib.suppress(ConfigError):
                load(whole)


def test_garbage_values_of_every_key_never_give_anything_but_a_config_error(load: Load) -> None:
    values = ["null", "true", "-1", "0", "1e999", "[]", "[[]]", "{}", "{a: {b: c}}", "''", "x", "[1, x, null]", "1.5"]
    for key in known_keys():
        for value in values:
            with contextlib.suppress(ConfigError):
                load(LEAST, f"{key}={value}")


# The example of the design, with what this version does not carry out marked so.
EXAMPLE = """
model:
  base: meta-llama/Llama-3.1-8B-Instruct
  revision: null
  quantization: nf4
  dtype: auto
  attention: auto
  upcast_unquantized: auto
  placement: auto
adapter:
  method: lora
  r: 16
  lora_alpha: 32
  lora_dropout: 0.05
  target_modules: all-linear
data:
  train: [data/support.jsonl]
  eval: 5%
  format: auto
  map: {}
  template: auto
  max_length: auto
  overlong: error
  train_on: responses
  packing: auto
  group_by: null
training:
  objective: sft
  init_from: null
  epochs: 3
  max_steps: null
  learning_rate: 2e-4
  lr_scheduler_type: cosine
  warmup_ratio: 0.03
  weight_decay: 0.0
  batch_size: 16
  micro_batch_size: auto
  gradient_checkpointing: auto
  loss_head: auto
  fused_kernels: auto
  optimizer: auto
  eval_every: auto
  early_stopping: null
  seed: 42
devices:
  strategy: auto
  processes: auto
  hosts: []
  shard_dtype: auto
  offload: none
checkpoint: {every: auto, keep: 2}
guard: {ups: auto, max_gpu_temperature_c: 83, max_power_w: null, budget: null, windows: []}
cost: {currency: INR, electricity_per_kwh: 10}
report_to: none
output: runs/support
"""


def test_the_whole_example_with_every_default_is_accepted(load: Load) -> None:
    config = load(EXAMPLE).config
    defaults = Config.model_validate(
        {
            "model": {"base": config.model.base, "quantization": "nf4"},
            "data": {"train": ["data/support.jsonl"]},
            "output": "runs/support",
        }
    )
    assert config == defaults


def test_the_schema_is_json_and_knows_every_section() -> None:
    schema = json.loads(json.dumps(Config.model_json_schema()))
    assert set(schema["properties"]) == set(Config.model_fields)
    assert schema["additionalProperties"] is False


def test_every_field_has_a_description() -> None:
    for name, info in Config.model_fields.items():
        annotation: Any = info.annotation
        fields = getattr(annotation, "model_fields", None)
        if fields is None:
            assert info.description, name
        for key, inner in (fields or {}).items():
            assert inner.description, f"{name}.{key}"
