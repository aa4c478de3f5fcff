from __future__ import annotations

from pathlib import Path

from charkha.caches import VARIABLES, history_folder, hub_cache, own_cache

HOME_CACHE = Path("~/.cache").expanduser()


def test_fetched_models_lie_where_hugging_face_tools_put_them() -> None:
    assert hub_cache({}) == HOME_CACHE / "huggingface/hub"
    assert hub_cache({"XDG_CACHE_HOME": "/c"}) == Path("/c/huggingface/hub")
    assert hub_cache({"XDG_CACHE_HOME": "/c", "HF_HOME": "/h"}) == Path("/h/hub")
    assert hub_cache({"HF_HOME": "/h", "HF_HUB_CACHE": "~/x"}) == Path("~/x").expanduser()


def test_the_hub_cache_is_the_one_that_the_hub_library_uses(tmp_path: Path) -> None:
    import os
    import subprocess
    import sys

    program = "from huggingface_hub.constants import HF_HUB_CACHE; print(HF_HUB_CACHE)"
    clean = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    for changed in ({}, {"XDG_CACHE_HOME": str(tmp_path)}, {"HF_HOME": str(tmp_path / "home")}):
        said = subprocess.run(
            [sys.executable, "-c", program], env=clean | changed, capture_output=True, text=True, check=True
        )
        assert Path(said.stdout.strip()) == hub_cache(changed)


def test_what_is_made_once_lies_where_the_user_says() -> None:
    assert own_cache({}) == HOME_CACHE / "charkha"
    assert own_cache({"XDG_CACHE_HOME": "/xdg"}) == Path("/xdg/charkha")
    assert own_cache({"XDG_CACHE_HOME": "relative"}) == HOME_CACHE / "charkha"
    assert own_cache({"XDG_CACHE_HOME": "/xdg", "CHARKHA_CACHE": "/own"}) == Path("/own")


def test_what_a_machine_remembers_lies_beside_its_caches_unless_told_otherwise() -> None:
    assert history_folder({"CHARKHA_CACHE": "/own"}) == Path("/own/history")
    assert history_folder({"CHARKHA_CACHE": "/own", "CHARKHA_HISTORY": "/else"}) == Path("/else")
    assert history_folder({"CHARKHA_HISTORY": "OFF"}) is None
