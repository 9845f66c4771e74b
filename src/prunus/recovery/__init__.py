"""Training that gives a pruned model back part of what it lost: distillation from the dense model, LoRA or all weights.

    from prunus.recovery import RecoveryOptions, TextOptions, recover_checkpoint

    recover_checkpoint("pruned", "recovered", TextOptions("my-text.jsonl"), RecoveryOptions(max_minutes=20))

Data flow, one file each:

    job                  everything that is asked for, as an object and as a file
    text                 sequences to train on, and others that are held out
    objective            the loss: forward KL from the dense model, next tokens
    student              the pruned model as it is trained: which weights, in which dtype, and back to a checkpoint
    pace                 how far a run is, by steps or by minutes, and the learning rate that belongs there
    trainer              transformers' Trainer with this loss and this pace
    checkpoints          what a killed run goes on from
    teacher              which dense model, and whether it fits
    memory               what training takes
    step                 how many sequences a step has, its learning rate and dtype, where that is left open
    prepared             all checks before weights are read
    training             load, measure, train, and the best step
    result               the model of that step, its card and its record
    run                  all of it, top to bottom
"""

from prunus.recovery.job import PlaceOptions, RecoveryJob
from prunus.recovery.options import RecoveryOptions, TextOptions
from prunus.recovery.run import recover_checkpoint, recover_job

__all__ = ["PlaceOptions", "RecoveryJob", "RecoveryOptions", "TextOptions", "recover_checkpoint", "recover_job"]
