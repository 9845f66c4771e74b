"""A model folder brings its own files into a result, and no others."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from plain import PLAIN, UNMEASURED
from tiny_folder import fails, run

from prunus.errors import CheckpointError
from prunus.files.links import check_links

QUICK = ["--ratio", "0.1", *PLAIN, "--method", "magnitude", *UNMEASURED]


@pytest.fixture
def model(folder, tmp_path) -> Path:
    return shutil.copytree(folder, tmp_path / "model")


@pytest.mark.parametrize("name", ["tokenizer.json", "LICENSE", "model.safetensors", "prunus", "prunus/plan.json"])
@pytest.mark.parametrize("away", ["absolute", "relative", "through another link", "dangling"])
def test_links_that_lead_out_are_refused(model, tmp_path, name, away):
    secret = tmp_path / ("secrets" if name == "prunus" else "secret")
    if away != "dangling":
        secret.mkdir() if name == "prunus" else secret.write_text("secret")
    link = model / name
    link.parent.mkdir(exist_ok=True)
    link.unlink(missing_ok=True)
    target = Path(os.path.relpath(secret, link.parent)) if away == "relative" else secret
    if away == "through another link":
        (model / "inside").symlink_to(secret)
        target = model / "inside"
    link.symlink_to(target)
    with pytest.raises(CheckpointError, match="is a link that leads out of the folder"):
        check_links(model)


def test_links_within_and_to_the_folder_itself_are_not(model, tmp_path):
    (model / "LICENSE.txt").symlink_to("config.json")
    check_links(model)
    (tmp_path / "link").symlink_to(model)
    check_links(tmp_path / "link")


def test_the_hubs_cache(model, tmp_path):
    """Its layout, and what only looks like it."""
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in model.iterdir():
        shutil.move(path, blobs / path.name)
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", path.name))
    check_links(snapshot)
    (tmp_path / "secret").write_text("secret")
    (blobs / "tokenizer.json").unlink()
    (blobs / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="leads out of the folder"):
        check_links(snapshot)


def test_commands_refuse_and_write_nothing(capsys, model, tmp_path):
    (tmp_path / "secret").write_text("{{ 'secret' }}")
    (model / "chat_template.jinja").symlink_to(tmp_path / "secret")
    for command in (["prune", model, "--out", tmp_path / "out", *QUICK], ["inspect", model]):
        assert "chat_template.jinja is a link that leads out" in fails(capsys, *command)
    assert sorted(os.listdir(tmp_path)) == ["model", "secret"]


def test_a_result_whose_card_is_a_link(capsys, folder, tmp_path):
    run(capsys, "prune", folder, "--out", tmp_path / "out", *QUICK)
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "out" / "README.md").unlink()
    (tmp_path / "out" / "README.md").symlink_to(tmp_path / "secret")
    for command in (["report", tmp_path / "out"], ["eval", tmp_path / "out", "--update-card"]):
        assert "README.md is a link that leads out" in fails(capsys, *command)
    assert (tmp_path / "secret").read_text() == "secret"
