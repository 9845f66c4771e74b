"""Checkpoints of a run that did not finish, when their files were damaged: named, never gone on with."""

from __future__ import annotations

import json

import pytest
from transformers import TrainerState

from prunus.errors import CheckpointError, OptionError
from prunus.recovery.checkpoints import Checkpoints, readable

INPUTS = {"model": "a1b2", "seed": 0}
TRAINED = {
    "steps": 4,
    "best_step": 0,
    "seconds": 1.5,
    "before": 3.25,
    "dense": None,
    "trained_parameters": 10,
    "history": [],
    "training_losses": [],
}


@pytest.fixture
def checkpoints(tmp_path) -> Checkpoints:
    """Two complete checkpoints of a run."""
    made = Checkpoints(tmp_path / "out")
    made.begin(INPUTS, overwrite=False)
    for step in (2, 4):
        (made.path / f"checkpoint-{step}").mkdir()
        state = TrainerState(epoch=0.5, global_step=step, max_steps=8, log_history=[{"step": 2, "eval_loss": 3.0}])
        state.stateful_callbacks = {"TrainerControl": {"args": {}, "attributes": {}}}
        state.save_to_json(str(made.path / f"checkpoint-{step}" / "trainer_state.json"))
    return made


def test_whole_ones(checkpoints):
    checkpoints.begin(INPUTS, overwrite=False)
    assert checkpoints.last() == checkpoints.path / "checkpoint-4"
    assert checkpoints.finished() is None
    checkpoints.finish(TRAINED)
    assert checkpoints.finished() == TRAINED


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"seed": NaN}', b"\xff"])
def test_damaged_inputs(checkpoints, content):
    (checkpoints.path / "recovery-inputs.json").write_bytes(content)
    with pytest.raises(OptionError, match=r"recovery-inputs\.json"):
        checkpoints.begin(INPUTS, overwrite=False)
    assert checkpoints.last() is not None, "nothing is taken away"
    checkpoints.begin(INPUTS, overwrite=True)
    assert checkpoints.last() is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"global_step": 3}, "global_step is 3, which is not its folder's"),
        ({"global_step": "4"}, 'global_step is "4"; it must be a whole number'),
        ({"log_history": None}, "log_history is null; it must be an array"),
        ({"log_history": [{"loss": 1.0}]}, "log_history.0.step is missing"),
        ({"epoch": "half"}, "epoch is"),
        ({"stateful_callbacks": 3}, "stateful_callbacks is 3"),
        ({"stateful_callbacks": {}}, "stateful_callbacks.TrainerControl is missing"),
        ({"another": 3}, "another"),
    ],
    ids=repr,
)
def test_damaged_states(checkpoints, changes, message):
    path = checkpoints.path / "checkpoint-4" / "trainer_state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoints.last()
    assert str(path) in str(caught.value)


def test_a_state_that_trainer_itself_cannot_read(checkpoints):
    path = checkpoints.path / "checkpoint-4" / "trainer_state.json"
    path.write_text(path.read_text(), encoding="utf-8-sig")
    with pytest.raises(CheckpointError, match=r"trainer_state\.json cannot be read \(JSONDecodeError"):
        checkpoints.last()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"best_step": 2}, r"checkpoint-2.model\.safetensors, which is not there"),
        ({"best_step": -1}, "best_step is -1"),
        ({"before": "3"}, 'before is "3"; it must be a number'),
        ({"history": {}}, "history is an object of 0; it must be an array"),
    ],
    ids=repr,
)
def test_damaged_records_of_the_end(checkpoints, changes, message):
    checkpoints.finish({**TRAINED, **changes})
    with pytest.raises(CheckpointError, match=message):
        checkpoints.finished()


def test_whatever_a_reader_raises_names_the_file(tmp_path):
    message = r"optimizer\.pt cannot be read \(KeyError: 'state'\).*to begin anew"
    with pytest.raises(CheckpointError, match=message), readable(tmp_path / "optimizer.pt"):
        raise KeyError("state")
