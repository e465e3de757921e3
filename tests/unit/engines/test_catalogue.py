"""The catalogue: names, overrides, and refusals that name the value and the remedy."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import pytest

from complete_fn.engines.catalogue import Model, find_model, load_catalogue
from complete_fn.errors import InputError, UnknownModelError


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "models.toml"
    path.write_text(text)
    return path


def test_every_built_in_entry_has_what_a_person_needs_to_choose() -> None:
    for model in load_catalogue().values():
        assert model.licence != "unknown", model.name
        assert model.download != "unknown", model.name
        assert model.max_model_len, model.name
        assert model.prices.basis == "example", model.name
        assert model.prices.cached_input < model.prices.input < model.prices.output, model.name


def test_every_hub_entry_is_pinned_or_says_that_it_is_not() -> None:
    for model in load_catalogue().values():
        if not model.checkpoint.startswith("package:"):
            assert (model.revision and len(model.revision) == 40) or "Pin `revision`" in model.note, model.name


def test_gpu_models_say_that_they_were_not_run() -> None:
    for model in load_catalogue().values():
        if model.name.startswith("llama-"):
            assert model.tried == "GPU: not run yet"


def test_a_near_miss_is_suggested() -> None:
    with pytest.raises(UnknownModelError, match=r"'lama-8b' is not in the catalogue. Did you mean 'llama-8b'"):
        find_model("lama-8b")


@pytest.mark.parametrize("name", ["", "no-such-thing-at-all", "a/b/c", "../no-such-folder"])
def test_what_is_no_model_is_refused(name: str) -> None:
    with pytest.raises(UnknownModelError, match="complete-fn models"):
        find_model(name)


def test_a_folder_and_a_hub_id_are_models(tmp_path: Path) -> None:
    assert find_model(str(tmp_path)).local_folder == tmp_path.resolve()
    assert find_model("owner/name").checkpoint == "owner/name"
    assert find_model("owner/name").local_folder is None


def test_the_users_file_adds_and_overrides(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        """
        [models.demo-llama]
        prices = { input = 1.5, output = 3, currency = "EUR" }
        [models.mine]
        url = "http://localhost:1/v1"
        """,
    )
    demo = find_model("demo-llama", path)
    assert demo.prices.input == Decimal("1.5")
    assert demo.prices.basis == "yours"
    assert demo.max_model_len == 4096
    assert find_model("mine", path) == Model(name="mine", checkpoint="mine", engine="http", url="http://localhost:1/v1")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[models.x]\nchekpoint = 'a'", "no field 'chekpoint'. Did you mean 'checkpoint'"),
        ("[models.x]\nlicence = 'a'", "needs a checkpoint or a url"),
        ("[models.x]\ncheckpoint = 'a'\nprices = { input = 'dear' }", "not a number"),
        ("[models.x]\ncheckpoint = 'a'\nprices = { input = -1 }", "negative"),
        ("[models.x]\ncheckpoint = 'a'\nprices = { basis = 'guess' }", "'guess' is not one of"),
        ("[models.x]\ncheckpoint = 'a'\nprices = { imput = 1 }", "no field 'imput'"),
        ("[models.x", "is not TOML"),
        ("models = 5", "models = 5 is no table. Write .models.NAME"),
        ("[models]\nx = 5", "model 'x' = 5 is no table"),
        ("[models.x]\nurl = 'http://h'\nprices = 3", "model 'x': prices = 3 is no table"),
        ("[models.x]\nurl = 5", "model 'x': url = 5 is not a text"),
        ("[models.demo-llama]\ndefault_max_tokens = 'many'", "default_max_tokens = 'many' is not a whole number"),
        ("[models.demo-llama]\nmax_model_len = true", "max_model_len = True is not a whole number"),
        ("[models.demo-llama]\ngated = 'no'", "gated = 'no' is not true or false"),
        ("[models.demo-llama]\ninstructions = 'fast'", "instructions = 'fast' is not a list of texts"),
        ("[models.demo-llama]\nengine_args = 5", "engine_args = 5 is not a table"),
    ],
)
def test_a_mistake_in_the_users_file_is_named(tmp_path: Path, text: str, why: str) -> None:
    with pytest.raises(InputError, match=why) as caught:
        load_catalogue(written(tmp_path, text))
    assert "models.toml" in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.toml"):
        load_catalogue(tmp_path / "absent.toml")
