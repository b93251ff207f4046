"""Which reader a checkpoint folder is for."""

from megatron_commute.checkpoints import files as checkpoint_files
from megatron_commute.checkpoints import hugging_face, megatron_deepspeed, pretrain_gpt
from megatron_commute.checkpoints.checkpoint import check


def read(folder, extra=None):
    """The Checkpoint in a folder that DeepSpeed or Hugging Face's libraries wrote. extra: {flag:
    value} that count where the checkpoint says nothing.

    Raises CheckpointError for what is damaged, partial or of an unknown kind.
    """
    with checkpoint_files.reading(folder):
        if checkpoint_files.hugging_face(folder):
            found = hugging_face.read(folder, extra or {})
        else:
            files = checkpoint_files.files(folder)
            if pretrain_gpt.wrote(files):
                found = pretrain_gpt.read(folder, files, extra or {})
            else:
                found = megatron_deepspeed.read(folder, files)
        named = checkpoint_files.iteration(folder, found.iteration)
        if found.iteration != named:
            raise checkpoint_files.CheckpointError(
                f"{folder}: says step {found.iteration}, its name {named}; give the folder its own name"
            )
        check(found)
    return found
