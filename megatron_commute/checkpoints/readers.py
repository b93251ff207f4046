"""Which reader a checkpoint folder is for."""

from megatron_commute.checkpoints import files as checkpoint_files
from megatron_commute.checkpoints import hugging_face, megatron_deepspeed, pretrain_gpt


def read(folder, extra=None):
    """The Checkpoint in a folder that DeepSpeed or Hugging Face's libraries wrote. extra: {flag:
    value} that count where the checkpoint says nothing.

    Raises CheckpointError for what is damaged, partial or of an unknown kind.
    """
    if checkpoint_files.hugging_face(folder):
        return hugging_face.read(folder, extra or {})
    files = checkpoint_files.files(folder)
    if pretrain_gpt.wrote(files):
        return pretrain_gpt.read(folder, files, extra or {})
    return megatron_deepspeed.read(folder, files)
