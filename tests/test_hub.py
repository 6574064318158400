"""Finding a model's files: local folders, hub repositories, manifests, and what to do offline."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from dia2_jax import hub
from dia2_jax.errors import ConfigError, HubError

PUBLISHED = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def fill(folder: Path, names=PUBLISHED, **contents) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}" if name.endswith(".json") else "weights")
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


class FakeHub:
    """Repositories as folders below `root`; counts what was downloaded."""

    def __init__(self, root: Path) -> None:
        self.root, self.downloads, self.reachable = root, [], True
        self.network_calls = 0

    def download(self, repo, filename, *, revision=None, local_files_only=False):
        self.downloads.append((repo, filename, revision))
        self.network_calls += not local_files_only
        if not self.reachable or local_files_only:
            raise errors.LocalEntryNotFoundError("no connection")
        if not (self.root / repo).is_dir():
            raise build(errors.RepositoryNotFoundError)
        if revision == "nope":
            raise build(errors.RevisionNotFoundError)
        if (self.root / repo / "GATED").exists():
            raise build(errors.GatedRepoError)
        if not (self.root / repo / filename).is_file():
            raise errors.EntryNotFoundError(f"404 {filename}")
        return str(self.root / repo / filename)


def build(kind):
    """An HTTP error of the hub, without the response object whose class varies by version."""
    return kind.__new__(kind)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    fake = FakeHub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fake.download)
    fill(fake.root / "kyutai/mimi", hub.MIMI_FILES)
    fill(fake.root / "nari/dia")
    return fake


@pytest.fixture
def forbidden(monkeypatch):
    """Fails the test when the hub is asked for anything."""

    def refuse(*args, **kwargs):
        raise AssertionError(f"the hub was asked for {args}")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)


def test_a_complete_folder_needs_no_hub(tmp_path, forbidden):
    folder = fill(tmp_path / "model", (*PUBLISHED, "mimi/config.json", "mimi/model.safetensors"))
    files = hub.resolve(folder)
    assert files == hub.resolve(str(folder))
    assert files == hub.ModelFiles(
        str(folder),
        folder / "config.json",
        folder / "model.safetensors",
        folder / "tokenizer.json",
        hub.MimiFiles(folder / "mimi/model.safetensors", folder / "mimi/config.json"),
    )


def test_a_repository_downloads_only_what_is_needed(fake):
    fill(fake.root / "nari/dia", ("special_tokens_map.json", "README.md", "vocab.json"))
    files = hub.resolve("nari/dia", revision="abc")
    assert files.weights == fake.root / "nari/dia/model.safetensors"
    assert files.tokenizer == fake.root / "nari/dia/tokenizer.json"
    assert files.mimi.weights == fake.root / "kyutai/mimi/model.safetensors"
    found = {(repo, name) for repo, name, _ in fake.downloads if (fake.root / repo / name).exists()}
    assert found == {("nari/dia", name) for name in (*PUBLISHED, "special_tokens_map.json")} | {
        ("kyutai/mimi", name) for name in hub.MIMI_FILES
    }
    assert all(revision == "abc" for repo, _, revision in fake.downloads if repo == "nari/dia")


def test_generation_settings_of_a_model_are_optional(fake, tmp_path):
    assert hub.resolve("nari/dia").generation is None
    folder = fill(tmp_path / "model", (*PUBLISHED, "mimi/config.json", "mimi/model.safetensors"))
    assert hub.resolve(folder).generation is None
    for root, name in ((fake.root / "nari/dia", "nari/dia"), (folder, folder)):
        fill(root, (hub.GENERATION,))
        assert hub.resolve(name).generation == root / "dia2_generation.json"


def test_shards_are_downloaded_with_their_index(fake):
    (fake.root / "nari/dia/model.safetensors").unlink()
    index = {"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors", "c": "m-1.safetensors"}}
    fill(fake.root / "nari/dia", ("m-1.safetensors", "m-2.safetensors"))
    (fake.root / "nari/dia" / hub.INDEX).write_text(json.dumps(index))
    assert hub.resolve("nari/dia").weights.name == hub.INDEX
    assert ("nari/dia", "m-2.safetensors", None) in fake.downloads
    (fake.root / "nari/dia/m-2.safetensors").unlink()
    with pytest.raises(HubError, match="nari/dia has no file m-2.safetensors"):
        hub.resolve("nari/dia")


@pytest.mark.parametrize("where", ["local", "hub"])
def test_manifest_names_other_files_and_places(fake, tmp_path, where):
    manifest = {
        "config": "small.json",
        "weights": "weights/small.safetensors",
        "tokenizer": "words",
        "mimi": "other/codec",
    }
    names = ("small.json", "weights/small.safetensors", "words/tokenizer.json")
    root = tmp_path / "model" if where == "local" else fake.root / "nari/dia"
    fill(root, (*PUBLISHED, *names), dia2_assets=manifest)
    fill(fake.root / "other/codec", hub.MIMI_FILES)
    files = hub.resolve(root if where == "local" else "nari/dia")
    assert files.config == root / "small.json"
    assert files.weights == root / "weights/small.safetensors"
    assert files.tokenizer == root / "words/tokenizer.json"
    assert files.mimi.weights == fake.root / "other/codec/model.safetensors"


def test_manifest_may_name_repositories_and_local_places(fake, tmp_path):
    codec = fill(tmp_path / "codec", hub.MIMI_FILES)
    manifest = {"tokenizer": "nari/dia", "mimi": str(codec)}
    folder = fill(tmp_path / "model", PUBLISHED[:2], dia2_assets=manifest)
    files = hub.resolve(folder)
    assert files.tokenizer == fake.root / "nari/dia/tokenizer.json"
    assert files.mimi == hub.MimiFiles(codec / "model.safetensors", codec / "config.json")


def test_manifest_mistakes_are_named(tmp_path, forbidden):
    folder = fill(tmp_path / "model", dia2_assets={"wieghts": "x"})
    with pytest.raises(
        ConfigError, match=r"dia2_assets.json: unknown key 'wieghts' \(did you mean"
    ):
        hub.resolve(folder)
    fill(folder, (), dia2_assets={"licence": "x"})
    with pytest.raises(ConfigError, match="unknown key 'licence'; known: config, weights, token"):
        hub.resolve(folder)
    for value, shown in ((3, "3"), (["mimi"], r'\["mimi"\]'), ("", '""')):
        fill(folder, (), dia2_assets={"mimi": value})
        with pytest.raises(ConfigError, match=f"mimi: must be a string, got {shown}"):
            hub.resolve(folder)
    fill(folder, (), dia2_assets={"weights": "gone.safetensors"})
    with pytest.raises(HubError, match="gone.safetensors is missing"):
        hub.resolve(folder)
    (folder / "dia2_assets.json").write_text("{")
    with pytest.raises(HubError, match="dia2_assets.json: not valid JSON"):
        hub.resolve(folder)


def test_mimi_is_the_first_of_argument_manifest_config_subfolder_hub(fake, tmp_path):
    places = {}
    for name in ("argument", "manifest", "config"):
        places[name] = fill(tmp_path / name, hub.MIMI_FILES)
    folder = fill(tmp_path / "model")

    def found(**kwargs):
        return hub.resolve(folder, **kwargs).mimi.config.parent

    assert found() == fake.root / "kyutai/mimi"
    fill(folder / "mimi", hub.MIMI_FILES)
    assert found() == folder / "mimi"
    fill(folder, (), config={"assets": {"mimi": str(places["config"])}})
    assert found() == places["config"]
    fill(folder, (), dia2_assets={"mimi": str(places["manifest"])})
    assert found() == places["manifest"]
    assert found(mimi=places["argument"]) == places["argument"]


def test_tokenizer_of_the_folder_comes_before_the_one_the_config_names(fake, tmp_path):
    fill(fake.root / "some/words", ("tokenizer.json",))
    folder = fill(tmp_path / "model", PUBLISHED[:2], config={"assets": {"tokenizer": "some/words"}})
    assert hub.resolve(folder).tokenizer == fake.root / "some/words/tokenizer.json"
    fill(folder, ("tokenizer.json",))
    assert hub.resolve(folder).tokenizer == folder / "tokenizer.json"


def test_mimi_in_a_subfolder_of_the_repository(fake):
    fill(fake.root / "nari/dia/mimi", hub.MIMI_FILES)
    assert hub.resolve("nari/dia").mimi.weights == fake.root / "nari/dia/mimi/model.safetensors"


def test_mimi_as_a_file_with_or_without_its_config(tmp_path, forbidden):
    file = tmp_path / "tokenizer-e351c8d8-checkpoint125.safetensors"
    file.write_text("")
    assert hub.resolve_mimi(file) == hub.MimiFiles(file, None)
    fill(tmp_path, (), config={"model_type": "moshi"})
    assert hub.resolve_mimi(file).config is None
    fill(tmp_path, (), config={"model_type": "mimi"})
    assert hub.resolve_mimi(file).config == tmp_path / "config.json"
    fill(tmp_path, (hub.KYUTAI_CONFIG,))
    assert hub.resolve_mimi(file).config == tmp_path / hub.KYUTAI_CONFIG


def test_orbax_weights_are_found(tmp_path, forbidden):
    folder = fill(tmp_path / "model", ("config.json", "tokenizer.json"))
    (folder / hub.ORBAX).mkdir()
    fill(folder / "mimi", ("config.json",))
    (folder / "mimi" / hub.ORBAX).mkdir()
    files = hub.resolve(folder)
    assert files.weights == folder / hub.ORBAX
    assert files.mimi.weights == folder / "mimi" / hub.ORBAX


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_missing_file_of_a_folder_is_named(tmp_path, forbidden, missing):
    folder = fill(tmp_path / "model", (*PUBLISHED, "mimi/config.json", "mimi/model.safetensors"))
    (folder / missing).unlink()
    with pytest.raises(HubError, match=f"model: {missing} is missing.*copy the file there"):
        hub.resolve(folder)


@pytest.mark.parametrize(
    "name", ["nowhere", "./nowhere", "/no/where", "~/nowhere", "a/b/c", "a b/c", Path("a/b")]
)
def test_what_is_neither_folder_nor_repository_says_so(forbidden, name):
    with pytest.raises(HubError, match=f"there is no folder {name}, and it is no hub repository"):
        hub.resolve(name)


def test_a_file_is_not_a_model_folder(tmp_path, forbidden):
    file = fill(tmp_path, ("model.safetensors",)) / "model.safetensors"
    with pytest.raises(HubError, match="is a file; name the folder"):
        hub.resolve(file)


def test_repository_errors_say_what_to_do(fake):
    with pytest.raises(HubError, match="no hub repository nari/dio .*nor a local folder.*spelling"):
        hub.resolve("nari/dio")
    with pytest.raises(HubError, match="nari/dia has no revision 'nope'"):
        hub.resolve("nari/dia", revision="nope")
    (fake.root / "nari/dia/config.json").unlink()
    with pytest.raises(HubError, match="nari/dia has no file config.json at revision v1"):
        hub.resolve("nari/dia", revision="v1")
    fill(fake.root / "nari/dia", ("GATED",))
    with pytest.raises(HubError, match="accept them, then run `hf auth login`"):
        hub.resolve("nari/dia")


def test_unreachable_hub_says_file_command_and_place(fake, tmp_path):
    fake.reachable = False
    with pytest.raises(HubError) as caught:
        hub.resolve("nari/dia", revision="v1")
    message = str(caught.value)
    assert message.startswith("config.json of nari/dia is not in the local cache")
    assert (
        "  hf download nari/dia config.json model.safetensors tokenizer.json "
        "tokenizer_config.json special_tokens_map.json --revision v1 --local-dir dia\n"
    ) in message
    assert "pass the folder (here dia) instead of nari/dia" in message

    folder = fill(tmp_path / "model")
    with pytest.raises(HubError) as caught:
        hub.resolve(folder)
    message = str(caught.value)
    assert "model.safetensors of kyutai/mimi is not in the local cache" in message
    command = f"hf download kyutai/mimi config.json model.safetensors --local-dir {folder / 'mimi'}"
    assert command in message
    fill(folder / "mimi", hub.MIMI_FILES)
    assert hub.resolve(folder).mimi.config == folder / "mimi/config.json"


def test_offline_mode_of_the_real_library_is_explained(tmp_path, monkeypatch):
    """Nothing is faked but the switch: the library itself refuses, and its error is translated."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(
        HubError, match="(?s)config.json of nari-labs/Dia2-1B.*HF_HUB_OFFLINE.*hf d"
    ):
        hub.resolve("nari-labs/Dia2-1B")


def test_any_network_failure_is_a_hub_error(fake, monkeypatch):
    def break_off(*args, **kwargs):
        raise ConnectionResetError("connection reset by peer")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", break_off)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(HubError, match="could not be reached .connection reset by peer"):
        hub.resolve("nari/dia")


def test_an_unreachable_hub_is_asked_once(fake, monkeypatch):
    """The library retries for half a minute; a model has half a dozen files."""
    fake.reachable = False
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(HubError, match="could not be reached .no connection"):
        hub.resolve("nari/dia")
    assert fake.network_calls == 1
    assert len(fake.downloads) > 1
