"""Fetching a model from a hub served on loopback."""

from __future__ import annotations

import fcntl
import json
import os
import random
import subprocess
import sys

import pytest
from loopback_hub import COMMIT, LoopbackHub, Repo

from charkha.errors import DoesNotFit, EnvironmentProblem, UsageError
from charkha.verbs import fetching

MODEL = "spinners/khadi-1b"
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
WEIGHTS = random.Random(7).randbytes(5 << 20)
SIDE_FILES = {
    "tokenizer.json": b'{"model": {}}',
    "tokenizer_config.json": b'{"eos_token": "</s>"}',
    "generation_config.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "LICENSE": b"",
}
UNWANTED = {"pytorch_model.bin": b"pickle", "modeling_khadi.py": b"import os", "model.gguf": b"GGUF", "a/b.onnx": b"x"}


def _config(**more) -> bytes:
    return json.dumps(CONFIG | more).encode()


def _repo(**files: bytes) -> Repo:
    return Repo({"config.json": _config(), "model.safetensors": WEIGHTS, **SIDE_FILES, **files})


@pytest.fixture
def hub(tmp_path, monkeypatch):
    from huggingface_hub import constants

    for name in ("HF_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with LoopbackHub(repos={MODEL: _repo()}) as served:
        monkeypatch.setenv("HF_ENDPOINT", served.endpoint)
        yield served


def _fetch(**options) -> fetching.FetchedModel:
    return fetching.fetch_model(MODEL, sleep=lambda seconds: None, **options)


def _cached_names(tmp_path) -> set[str]:
    return {path.name for path in (tmp_path / "hf").rglob("*") if path.is_file()}


def test_a_model_arrives_whole_with_its_commit_recorded(hub, tmp_path):
    hub.repos[MODEL].files.update(UNWANTED)
    seen = []
    fetched = _fetch(progress=lambda name, done, total: seen.append((name, done, total)))
    assert fetched.revision_sha == COMMIT
    assert fetched.path == tmp_path / "hf/hub/models--spinners--khadi-1b/snapshots" / COMMIT
    assert set(fetched.files) == {"config.json", "model.safetensors", *SIDE_FILES}
    assert fetched.bytes == sum((fetched.path / name).stat().st_size for name in fetched.files)
    assert (fetched.path / "model.safetensors").read_bytes() == WEIGHTS
    assert (fetched.path.parents[1] / "refs/main").read_text() == COMMIT
    assert ("model.safetensors", len(WEIGHTS), len(WEIGHTS)) in seen
    assert ("verifying model.safetensors", len(WEIGHTS), len(WEIGHTS)) in seen
    assert not any(name in path for _, path, _ in hub.requests for name in UNWANTED)


def test_other_hugging_face_tools_find_the_fetched_model(hub):
    from huggingface_hub import hf_hub_download

    fetched = _fetch()
    cache = fetched.path.parents[2]
    found = hf_hub_download(MODEL, "model.safetensors", revision="main", cache_dir=cache, local_files_only=True)
    assert found == str(fetched.path / "model.safetensors")


def test_only_the_listing_and_the_chosen_files_are_asked_for(hub):
    _fetch()
    asked = {path for _, path, _ in hub.requests}
    files = {f"/{MODEL}/resolve/{COMMIT}/{name}" for name in ("config.json", "model.safetensors", *SIDE_FILES)}
    # The empty LICENSE needs no request.
    assert asked == {f"/api/models/{MODEL}/revision/main"} | files - {f"/{MODEL}/resolve/{COMMIT}/LICENSE"}
    assert not any("torch" in agent for agent in hub.user_agents)


def test_a_second_fetch_transfers_no_weights(hub):
    first = _fetch()
    hub.requests.clear()
    assert _fetch() == first
    assert hub.ranges("model.safetensors") == []


def test_a_broken_connection_is_taken_up_where_it_broke(hub):
    hub.cuts["model.safetensors"] = [3 << 20]
    fetched = _fetch()
    first, second = hub.ranges("model.safetensors")
    assert first is None
    assert 0 < int(second.removeprefix("bytes=").removesuffix("-")) <= 3 << 20
    assert (fetched.path / "model.safetensors").read_bytes() == WEIGHTS


def test_a_later_run_goes_on_from_the_bytes_of_an_earlier_one(hub, tmp_path):
    hub.cuts["model.safetensors"] = [3 << 20] + [0] * 9
    with pytest.raises(EnvironmentProblem, match="does not answer") as caught:
        _fetch()
    assert "goes on where it stopped" in caught.value.remedy
    assert "config.json" not in _cached_names(tmp_path)

    hub.cuts.clear()
    hub.requests.clear()
    fetched = _fetch()
    [asked] = hub.ranges("model.safetensors")
    assert int(asked.removeprefix("bytes=").removesuffix("-")) >= 2 << 20
    assert (fetched.path / "model.safetensors").read_bytes() == WEIGHTS
    assert not any(name.endswith(".part") for name in _cached_names(tmp_path))


def test_a_server_that_ignores_ranges_still_gives_the_right_bytes(hub):
    hub.ignores_range = True
    hub.cuts["model.safetensors"] = [1 << 20]
    fetched = _fetch()
    assert (fetched.path / "model.safetensors").read_bytes() == WEIGHTS


def test_a_busy_server_is_asked_again(hub):
    hub.statuses["model.safetensors"] = [503, 429]
    waits = []
    fetching.fetch_model(MODEL, sleep=waits.append)
    assert waits == [2.0, 4.0]


def test_damaged_bytes_are_refused_and_not_kept(hub, tmp_path):
    real = WEIGHTS
    hub.repos[MODEL].files["model.safetensors"] = real
    original = fetching.Hub.download

    def damage(self, listing, file, part, progress):
        original(self, listing, file, part, progress)
        if file.name == "model.safetensors":
            part.write_bytes(b"\0" + real[1:])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fetching.Hub, "download", damage)
        with pytest.raises(EnvironmentProblem, match=r"model\.safetensors arrived damaged") as caught:
            _fetch()
    assert caught.value.exit_code == 5
    assert "config.json" not in _cached_names(tmp_path)
    assert (_fetch().path / "model.safetensors").read_bytes() == real


def test_a_file_that_rotted_in_the_cache_is_brought_again(hub):
    weights = _fetch().path / "model.safetensors"
    blob = weights.resolve()
    blob.write_bytes(WEIGHTS[:-1] + b"\0")
    assert (_fetch().path / "model.safetensors").read_bytes() == WEIGHTS


def test_a_disk_that_is_too_small_is_told_before_weights_move(hub):
    with pytest.raises(DoesNotFit) as caught:
        _fetch(free_bytes=lambda path: 1 << 30)
    assert caught.value.exit_code == 3
    assert "needs 5" in caught.value.message
    assert "1 GiB" in caught.value.message
    assert "HF_HOME" in caught.value.remedy
    assert hub.ranges("model.safetensors") == []


def test_bytes_that_are_here_already_are_not_counted_against_the_disk(hub):
    hub.cuts["model.safetensors"] = [4 << 20] + [0] * 9
    with pytest.raises(EnvironmentProblem):
        _fetch()
    hub.cuts.clear()
    assert _fetch(free_bytes=lambda path: fetching.RESERVE_BYTES + (3 << 20)).revision_sha == COMMIT


def test_sharded_weights_are_those_of_the_index(hub):
    shards = {f"model-0000{n}-of-00002.safetensors": WEIGHTS[: n << 10] for n in (1, 2)}
    index = {"weight_map": {f"layer.{n}": name for n, name in enumerate(shards)}}
    files = {"model.safetensors.index.json": json.dumps(index).encode(), "consolidated.safetensors": WEIGHTS}
    hub.repos[MODEL] = Repo({"config.json": _config(), **shards, **files})
    assert set(_fetch().files) == {"config.json", "model.safetensors.index.json", *shards}


def test_an_index_that_names_a_missing_or_outside_file_is_refused(hub):
    index = {"weight_map": {"a": "../../../../outside.safetensors"}}
    files = {"model.safetensors.index.json": json.dumps(index).encode(), "../../../../outside.safetensors": b"x"}
    hub.repos[MODEL] = Repo({"config.json": _config(), **files})
    with pytest.raises(EnvironmentProblem, match="names 1 weight files, the model has 0"):
        _fetch()


def test_a_gated_model_is_answered_with_where_to_accept_its_licence(hub, monkeypatch):
    hub.repos[MODEL].gated, hub.token = True, "hf_right"
    with pytest.raises(EnvironmentProblem, match="gated") as caught:
        _fetch()
    assert f"{hub.endpoint}/{MODEL}" in caught.value.remedy
    assert "HF_TOKEN" in caught.value.remedy
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(EnvironmentProblem, match="your token has no access"):
        _fetch()
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    assert _fetch().revision_sha == COMMIT


def test_a_missing_or_hidden_model_is_told(hub):
    with pytest.raises(EnvironmentProblem, match="no such model") as caught:
        fetching.fetch_model("spinners/no-such")
    assert "HF_TOKEN" in caught.value.remedy
    with pytest.raises(EnvironmentProblem, match="no branch, tag or commit 'v9'"):
        _fetch(revision="v9")


def test_a_commit_or_tag_can_be_asked_for(hub):
    assert _fetch(revision="v1").revision_sha == COMMIT
    fetched = _fetch(revision=COMMIT)
    assert {path.name for path in (fetched.path.parents[1] / "refs").iterdir()} == {"v1"}


@pytest.mark.parametrize("name", ["../../etc/passwd", "a/b/c", "", "-x", "khadi models", "/abs/folder"])
def test_what_is_no_model_id_is_a_usage_error(hub, name):
    with pytest.raises(UsageError):
        fetching.fetch_model(name)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("files", "message", "remedy"),
    [
        ({"config.json": _config(), "pytorch_model.bin": b"x"}, "pickles .pytorch_model.bin.", "safetensors"),
        ({"khadi-q4.gguf": b"x"}, "GGUF", "original"),
        ({"adapter_config.json": b"{}", "adapter_model.safetensors": b"x"}, "an adapter", "base"),
        ({"model.safetensors": WEIGHTS}, "no config.json", "transformers layout"),
        ({"README.md": b"x"}, "no model.safetensors", "transformers layout"),
        ({"config.json": b"[1]", "model.safetensors": WEIGHTS}, "no JSON object", "transformers layout"),
        (
            {"config.json": _config(quantization_config={"quant_method": "gptq"}), "model.safetensors": WEIGHTS},
            "quantized with gptq",
            "unquantized",
        ),
    ],
)
def test_a_model_that_cannot_be_trained_is_refused_before_its_weights(hub, files, message, remedy):
    hub.repos[MODEL] = Repo(files)
    with pytest.raises(EnvironmentProblem, match=message) as caught:
        _fetch()
    assert remedy in caught.value.remedy
    assert hub.ranges("model.safetensors") == []


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_means_that_nothing_is_asked(hub, monkeypatch, variable):
    monkeypatch.setenv(variable, "1")
    with pytest.raises(EnvironmentProblem, match=variable) as caught:
        _fetch()
    assert "unset" in caught.value.remedy
    assert hub.requests == []


def test_a_hub_that_is_not_there_is_told(hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(EnvironmentProblem, match="does not answer"):
        _fetch()


def test_two_fetches_of_one_model_do_not_mix(hub, tmp_path):
    repo = tmp_path / "hf/hub/models--spinners--khadi-1b"
    repo.mkdir(parents=True)
    with (repo / ".charkha-fetch.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(EnvironmentProblem, match="another process"):
            _fetch()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_cache_that_cannot_be_written_is_told(hub, tmp_path):
    (tmp_path / "hf").mkdir(mode=0o500)
    with pytest.raises(EnvironmentProblem, match="cannot be written"):
        _fetch()


def test_a_disk_without_links_holds_the_files_themselves(hub, monkeypatch):
    def refuse(self, target, target_is_directory=False):
        raise OSError("no links here")

    monkeypatch.setattr("pathlib.Path.symlink_to", refuse)
    weights = _fetch().path / "model.safetensors"
    assert not weights.is_symlink()
    hub.requests.clear()
    assert (_fetch().path / "model.safetensors").read_bytes() == WEIGHTS
    assert hub.ranges("model.safetensors") == []


def _command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "charkha.cli.app", "fetch", *arguments]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)


def test_the_command_prints_one_json_object_and_the_next_step(hub):
    finished = _command(MODEL, "--json")
    assert finished.returncode == 0, finished.stderr
    result = json.loads(finished.stdout)
    assert result["revision"] == COMMIT
    assert result["bytes"] > len(WEIGHTS)
    assert not any("torch" in agent for agent in hub.user_agents)
    again = _command(MODEL)
    assert again.returncode == 0
    assert COMMIT in again.stdout
    assert f"model.base: {MODEL}" in again.stderr


def test_the_command_leaves_with_the_exit_code_of_the_problem(hub):
    hub.repos[MODEL].gated = True
    finished = _command(MODEL, "--json")
    assert finished.returncode == 5
    assert json.loads(finished.stdout)["error"]["kind"] == "environment"
    assert "HF_TOKEN" in finished.stderr
    assert "Traceback" not in finished.stderr
    assert _command(MODEL, HF_HUB_OFFLINE="1").returncode == 5
    assert _command("no such name").returncode == 2


def test_a_data_set_arrives_and_is_found_by_name_without_a_network(hub, tmp_path, monkeypatch):
    from charkha.data.formats import read_rows
    from charkha.data.hub_names import resolve_names

    rows = b'{"text": "a"}\n{"text": "b"}\n'
    files = {"README.md": b"about", "data/train.jsonl": rows, "data/test.jsonl": rows, "loader.py": b"import os"}
    hub.repos["spinners/stories"] = Repo(files)
    fetched = fetching.fetch_data_set("hub:spinners/stories", sleep=lambda seconds: None)
    assert set(fetched.files) == {"README.md", "data/train.jsonl", "data/test.jsonl"}
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (path,) = resolve_names(["hub:spinners/stories"], tmp_path)
    assert len(read_rows(path).rows) == 2
    monkeypatch.delenv("HF_HUB_OFFLINE")
    hub.repos["spinners/code"] = Repo({"loader.py": b"import os"})
    with pytest.raises(EnvironmentProblem, match="no files that are read"):
        fetching.fetch_data_set("hub:spinners/code", sleep=lambda seconds: None)
    with pytest.raises(UsageError, match="no data set"):
        fetching.fetch_data_set("spinners/stories")
