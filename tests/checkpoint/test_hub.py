"""Models of the Hub: listed before anything is fetched, at any revision. The Hub is a small server on this machine."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest
from huggingface_hub import constants
from tiny_families import make_model
from tiny_folder import SIZES, TEXT, byte_tokenizer, fails, run_json

from prunus.checkpoint import load_model, locate
from prunus.checkpoint.hub import at_revision, hub_id
from prunus.errors import CheckpointError, OptionError, UnsupportedModelError
from prunus.recovery.teacher import find_teacher
from prunus.sweep.engine import ModelOptions


@dataclass
class Hub:
    """Repositories as the Hub serves them: `owner/name` → branch → path → content."""

    repositories: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    served: list[str] = field(default_factory=list)

    def add(self, repository: str, folder: Path | None = None, revision: str = "main", **files: bytes) -> None:
        content = {path.name: path.read_bytes() for path in folder.iterdir()} if folder else {}
        content |= {name.replace("__", "."): data for name, data in files.items()}
        self.repositories.setdefault(repository, {})[revision] = content

    def commit(self, repository: str, revision: str) -> str:
        return hashlib.sha1(f"{repository} {revision}".encode()).hexdigest()

    def at(self, repository: str, revision: str) -> dict[str, bytes] | None:
        branches = self.repositories[repository]
        return next((branches[name] for name in branches if revision in (name, self.commit(repository, name))), None)


def handler_of(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            """Nothing."""

        def do_HEAD(self) -> None:
            self.do_GET()

        def answer(self, content: bytes, status: int = 200, **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def do_GET(self) -> None:
            parts = unquote(urlparse(self.path).path).strip("/")
            api = parts.startswith("api/models/")
            parts = parts.removeprefix("api/models/")
            repository = next((name for name in hub.repositories if parts.startswith(name)), None)
            if repository is None:
                return self.answer(b"{}", 401 if "gated" in parts else 404, X_Error_Code="RepoNotFound")
            kind, _, rest = parts.removeprefix(repository).strip("/").partition("/")
            # Files are asked for by commit, so that no branch with slashes stands before their names.
            revision, _, path = rest.partition("/") if kind == "resolve" else (rest, "", "")
            files = hub.at(repository, revision or "main")
            if files is None:
                return self.answer(b"{}", 404, X_Error_Code="RevisionNotFound")
            sha = next(
                c
                for c in (hub.commit(repository, n) for n in hub.repositories[repository])
                if hub.at(repository, c) is files
            )
            if api and kind == "tree":
                listing = [
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in files.items()
                ]
                return self.answer(json.dumps(listing).encode(), Content_Type="application/json")
            if api:
                siblings = [{"rfilename": name} for name in files]
                info = {"id": repository, "modelId": repository, "sha": sha, "siblings": siblings, "tags": []}
                return self.answer(json.dumps(info).encode(), Content_Type="application/json")
            if path not in files:
                return self.answer(b"", 404, X_Error_Code="EntryNotFound")
            if self.command == "GET":
                hub.served.append(path)
            etag = f'"{hashlib.sha1(files[path]).hexdigest()}"'
            return self.answer(files[path], ETag=etag, X_Repo_Commit=sha)

    return Handler


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(hub))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    # What HF_ENDPOINT does when huggingface_hub is imported.
    endpoint = f"http://127.0.0.1:{server.server_port}"
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, endpoint)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.chdir(tmp_path)
    yield hub
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """Two states of one model."""
    places = tmp_path_factory.mktemp("hub") / "first", tmp_path_factory.mktemp("hub") / "second"
    for seed, place in enumerate(places):
        make_model("llama", vocab_size=260, seed=seed).save_pretrained(place)
        byte_tokenizer().save_pretrained(place)
    return places


def test_a_model_and_its_revisions(hub, folders):
    first, second = folders
    hub.add("someone/model", first, pytorch_model__bin=b"pickle")
    hub.add("someone/model", second, revision="refs/pr/1")
    hub.add("someone/model", second, revision="v2.0")
    for name, folder in (
        ("someone/model", first),
        ("someone/model@main", first),
        ("someone/model@v2.0", second),
        ("someone/model@refs/pr/1", second),
        (f"someone/model@{hub.commit('someone/model', 'v2.0')}", second),
    ):
        fetched = locate(name)
        assert (fetched / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes(), name
    assert "pytorch_model.bin" not in hub.served
    assert hub.served.index("config.json") < hub.served.index("model.safetensors")
    with pytest.raises(CheckpointError, match=r"someone/model has no revision 'v3'"):
        locate("someone/model@v3")
    with pytest.raises(CheckpointError, match=r"'someone/other' is neither .*RepositoryNotFoundError.*hf auth login"):
        locate("someone/other")


def test_what_was_fetched_is_there_without_the_hub(hub, folders, monkeypatch):
    hub.add("someone/model", folders[0])
    online = locate("someone/model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert locate("someone/model") == online
    with pytest.raises(CheckpointError, match=r"'someone/model@v2' is neither a folder here nor"):
        locate("someone/model@v2")
    with pytest.raises(CheckpointError, match=r"'meta-llama/Llama-3\.2-1B' is neither a folder here nor"):
        locate("meta-llama/Llama-3.2-1B")


PLAIN = [
    *("--recipe", "original", "--set", "output.report=false"),
    *("--set", "evaluation.held_out=2", "--set", "run.engine=resident"),
]
CONFIG = b'{"model_type": "llama"}'
HOLDS = {
    "pickles": (
        {"config__json": CONFIG, "pytorch_model__bin": b"x", "tokenizer__json": b"{}"},
        UnsupportedModelError,
        r"weights only as pickles \(pytorch_model\.bin\).*someone/model@refs/pr/1",
    ),
    "GGUF": (
        {"config__json": CONFIG, "a__q4__gguf": b"x", "b__gguf": b"x", "README__md": b"x"},
        UnsupportedModelError,
        r"GGUF files only \(a\.q4\.gguf, b\.gguf\)",
    ),
    "an adapter": (
        {"adapter_config__json": b"{}", "adapter_model__safetensors": b"x"},
        UnsupportedModelError,
        r"adapter only.*merge_and_unload",
    ),
    "an adapter beside a model": (
        {"config__json": CONFIG, "model__safetensors": b"x", "adapter_config__json": b"{}"},
        UnsupportedModelError,
        r"adapter \(adapter_config\.json\) beside its weights.*merge_and_unload",
    ),
    "other safetensors": (
        {"config__json": CONFIG, "consolidated__safetensors": b"x"},
        CheckpointError,
        r"consolidated\.safetensors.*none named model\*\.safetensors",
    ),
    "no config": ({"model__safetensors": b"x"}, CheckpointError, r"has no config\.json"),
    "nothing": ({"README__md": b"x"}, CheckpointError, r"holds no weights; it holds README\.md"),
    "a classifier": (
        {
            "config__json": b'{"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}',
            "model__safetensors": b"x",
        },
        UnsupportedModelError,
        "a classifier of sequences",
    ),
    "another type": (
        {"config__json": b'{"model_type": "mamba"}', "model__safetensors": b"x"},
        UnsupportedModelError,
        "state-space",
    ),
    "sentence-transformers": (
        {"config__json": CONFIG, "model__safetensors": b"x", "modules__json": b"[]"},
        UnsupportedModelError,
        "sentence-transformers",
    ),
}


@pytest.mark.parametrize(("files", "kind", "message"), HOLDS.values(), ids=HOLDS)
def test_what_a_repository_holds_is_said_before_weights_are_fetched(hub, files, kind, message):
    hub.add("someone/model", **files)
    with pytest.raises(kind, match=message):
        load_model("someone/model")
    assert not [name for name in hub.served if name != "config.json"]


def test_the_option_revision(hub, folders, tmp_path, capsys):
    hub.add("someone/model", folders[0])
    hub.add("someone/model", folders[1], revision="v2")
    (tmp_path / "text.txt").write_text(TEXT)
    out = tmp_path / "out"
    words = ["prune", "someone/model", "--revision", "v2", "--out", out, "--ratio", "0.2", "--calibration", "text.txt"]
    result = run_json(capsys, *words, *SIZES, *PLAIN)
    assert result["base_model"] == "someone/model@v2"
    card = (out / "README.md").read_text()
    assert "base_model: someone/model\n" in card
    assert "(https://huggingface.co/someone/model/tree/v2)" in card
    assert find_teacher(out) == (locate("someone/model@v2"), "someone/model@v2")
    facts = run_json(capsys, "inspect", "someone/model@v2")
    assert facts["parameters"] == result["parameters_before"]
    assert "goes with the id of a model on the Hub" in fails(capsys, "eval", folders[0], "--revision", "v2")


@pytest.mark.parametrize("model", ["here", "smollm2-135m", "someone/model@v1", "a/b/c"])
def test_only_models_of_the_hub_have_revisions(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("here").mkdir()
    with pytest.raises(OptionError, match="the revision 'v2' goes with the id of a model on the Hub"):
        ModelOptions(revision="v2").named(model)
    assert ModelOptions().named(model) == model


def test_names():
    assert hub_id("gpt2") == ("gpt2", None)
    assert hub_id("a_b/c.d-e@refs/pr/12") == ("a_b/c.d-e", "refs/pr/12")
    for name in ("a/b/c", "./a", "a/b@", "", "a b"):
        assert hub_id(name) is None
    assert at_revision("a/b", "v1") == "a/b@v1"
    with pytest.raises(OptionError, match="no revision"):
        at_revision("a/b", "v 1")
