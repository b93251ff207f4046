"""The held-out loss of every domain for two checkpoints of one model, on the same sequences."""

import numpy as np
import torch

from megatron_commute.adapters import megatron_core
from megatron_commute.adapters.one_process import one_process
from megatron_commute.checkpoints.model import LoadedModel
from megatron_commute.checkpoints.readers import read
from megatron_commute.checkpoints.setting import extra_flags, setting
from megatron_commute.data.indexed import drawer


class HeldOut:
    """Domains and sequences of a mixture file on which checkpoints are compared.

    checkpoint: one of the folders, which says model and run; data: the mixture file; wanted:
    setting.Asked, whose `samples` is the number of sequences of each domain. Raises CheckpointError
    and ConfigError, naming the cure, before anything is computed.
    """

    def __init__(self, *, checkpoint, data, wanted):
        self.extra = extra_flags(wanted)
        self.setting = setting(read(checkpoint, self.extra), data, wanted)
        self.names, self.samples = self.setting.plan.names, self.setting.config.probe.samples

    def losses(self, checkpoint):
        """Loss f64[K, samples] of every held-out sequence, nats per token."""
        run = self.setting.run
        draw = drawer(self.setting.config, self.setting.plan, run.seq_length, self.setting.vocabulary)
        found = np.empty((len(self.names), self.samples))
        with one_process(), torch.no_grad():
            module = LoadedModel(read(checkpoint, self.extra)).module.eval()
            device = next(module.parameters()).device
            for k in range(len(self.names)):
                for first in range(0, self.samples, run.micro_batch):
                    numbers = np.arange(first, min(self.samples, first + run.micro_batch))
                    tokens = draw("gradient", k, numbers).to(device)
                    each = megatron_core.token_losses(module, tokens[:, :-1], tokens[:, 1:])
                    found[k, numbers] = each.double().mean(1).cpu()
        return found

    def rows(self, mean, last):
        """One row per domain from the losses of both: their means over the sequences, the
        difference and its standard error, both on the same sequences.
        """
        apart = mean - last
        error = apart.std(1, ddof=1) / np.sqrt(self.samples) if self.samples > 1 else [None] * len(apart)
        return [
            {
                "domain": name,
                "mean": float(mean[k].mean()),
                "last": float(last[k].mean()),
                "difference": float(apart[k].mean()),
                "standard_error": None if error[k] is None else float(error[k]),
                "sequences": self.samples,
            }
            for k, name in enumerate(self.names)
        ]
