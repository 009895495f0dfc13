"""Checkpoints: live units only, in canonical order, so that any layout loads what any layout saved.

    save_checkpoint, save_weights, AsyncSaver   write (`save`)
    RunRecord                                   what to build the model with, before there is one (`record`)
    load_checkpoint                             fill the model (`load`)
    CheckpointReader                            one tensor at a time, in a single process (`reader`)

Below them: `pieces` (where a rank's tensors lie in the canonical ones: pure), `tensors` (what a rank saves and loads),
`storage` (megatron-core's torch_dist format), `streams` (memory and files on the way there), `files` (names, checksums,
publishing, keeping), `lease` and `owner` (one writer per folder), `fields` (what stored values must be),
`guarded_reader` and `plain` (reading without running what is read), `crc`, `rng`. Importing the package imports none of
them: launchers read `files`, `lease` and `record` without torch.
"""
