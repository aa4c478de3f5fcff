"""Training refuses personal data until its user has decided, and the decision stays with the run."""

from __future__ import annotations

import json

import pytest

from charkha.config import DataSection
from charkha.data.formats import read_rows
from charkha.data.personal_rows import find_in_rows
from charkha.errors import ConfigError, DataError, RunOfAnotherConfig
from charkha.training.personal_gate import decide_personal

VALUES = ("ABCPE1234F", "2341 2341 2346")


def with_personal(project) -> None:
    """Puts a PAN into the third row of the project and an Aadhaar number into the answer of the eighth."""
    path = project.folder / "rows.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    records[2]["messages"][0]["content"] += f" My PAN is {VALUES[0]}."
    records[7]["messages"][1]["content"] += f" Aadhaar {VALUES[1]}."
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def texts(folder, text: str):
    path = folder / "a.jsonl"
    path.write_text(json.dumps({"text": text}) + "\n")
    return read_rows(path)


def looked(file, kept_kinds=()):
    return file, find_in_rows(str(file.path), file.rows, kept_kinds)


def test_training_stops_with_the_places_and_no_value_until_it_is_decided(project):
    made = project("llama")
    with_personal(made)
    with pytest.raises(DataError) as caught:
        made.train()
    text = str(caught.value)
    assert caught.value.exit_code == 4
    assert "rows.jsonl:3: messages[0].content: personal data: pan" in text
    assert "rows.jsonl:8: messages[1].content" in text
    assert all(word in text for word in ("data.personal", "mask", "drop", "report"))
    assert not any(value in text for value in VALUES)
    assert [len(file.problems) for file in caught.value.files] == [2]
    assert not (made.run_folder() / "charkha.yaml").exists()
    assert not (made.run_folder() / "data" / "personal_data.md").exists()


def test_a_masked_run_trains_on_stand_ins_and_its_manifest_tells(project):
    made = project("llama", data={"personal": "mask"}, training={"max_steps": 2})
    with_personal(made)
    result, events = made.train()
    assert result.status == "done"
    manifest = json.loads((made.run_folder() / "manifest.json").read_text())
    personal = manifest["data"]["personal"]
    assert (personal["action"], personal["stated"], personal["masked"]) == ("mask", True, 2)
    assert personal["counts"] == {"pan": 1, "aadhaar": 1}
    assert any("2 places masked" in event.get("text", "") for event in events)
    assert not any(value in json.dumps(manifest) for value in VALUES)
    report = (made.run_folder() / "data" / "personal_data.md").read_text()
    assert "2 places were replaced by typed stand-ins" in report
    assert not any(value in report for value in VALUES)
    again, _ = made.train()
    assert again.status == "done"


@pytest.mark.parametrize(("action", "left"), [("report", 40), ("drop", 38)])
def test_rows_are_trained_as_they_are_or_left_out(project, action, left):
    made = project("llama")
    with_personal(made)
    file = read_rows(made.folder / "rows.jsonl")
    decided = decide_personal([looked(file)], DataSection(train=["x"], personal=action), is_stated=True)
    assert len(file.rows) - decided.treatment.dropped_rows == left
    assert decided.record["action"] == action
    result, _ = made.train(f"data.personal={action}", "training.max_steps=1", "data.eval=null")
    manifest = json.loads((made.run_folder() / "manifest.json").read_text())
    assert (result.status, manifest["data"]["train_rows"]) == ("done", left)


def test_a_refused_change_of_mind_leaves_nothing_unmasked_in_the_run_folder(project):
    made = project("llama", data={"personal": "mask"}, training={"max_steps": 1})
    with_personal(made)
    made.train()
    data = made.run_folder() / "data"
    before = {path: path.read_bytes() for path in data.iterdir() if path.is_file()}
    with pytest.raises(RunOfAnotherConfig):
        made.train("data.personal=report")
    assert {path: path.read_bytes() for path in data.iterdir() if path.is_file()} == before


def test_other_rows_are_scored_and_shown_as_the_run_has_its_own(project):
    from charkha.cli.data_preview import _preview_config
    from charkha.store.runs import RunFolder
    from charkha.training.dataset import encode_file
    from charkha.training.opening import reopen

    made = project("llama", data={"personal": "mask"}, training={"max_steps": 1})
    with_personal(made)
    made.train()
    config, _, data = reopen(RunFolder(made.run_folder()))
    rows = encode_file(made.folder / "rows.jsonl", config, data).rows
    text = " ".join(data.tokenizer.decode(list(row.input_ids)) for row in rows)
    assert not any(value in text for value in VALUES)
    shown = json.dumps(_preview_config(made.config, None, 8))
    assert not any(value in shown for value in VALUES)


def test_finds_that_are_not_sure_and_branch_codes_do_not_stop_a_run(tmp_path):
    file = texts(tmp_path, "mail a@example.com, IFSC SBIN0001234, 9876543210")
    decided = decide_personal([looked(file)], DataSection(train=["x"]), is_stated=False)
    assert decided.record["counts"] == {"email": 1, "ifsc": 1, "mobile": 1}
    assert decided.record["stated"] is False


def test_a_kind_may_be_kept_and_an_unknown_one_is_refused(tmp_path):
    file = texts(tmp_path, "PAN ABCPE1234F")
    wish = DataSection(train=["x"], personal_keep=["pan"])
    assert decide_personal([looked(file, ["pan"])], wish, is_stated=True).record["findings"] == 0
    with pytest.raises(ValueError, match="'pam' is no kind"):
        DataSection(train=["x"], personal_keep=["pam"])


def test_a_config_with_an_unknown_action_is_refused(project):
    made = project("llama", data={"personal": "burn"})
    with pytest.raises(ConfigError, match=r"data\.personal"):
        made.train()
