"""A torch file that files.load has read, written again so that its host reads it as before: classes
that only have a stand-in here go back to the file under their own names.
"""

import pickle
import types

import torch

from megatron_commute.checkpoints import files

_OWN_NAMES = dict(files._STAND_INS)


class _Pickler(pickle._Pickler):  # the one in C cannot name a class that is not imported
    def save_global(self, value, name=None):
        """Classes and functions by name."""
        own = _OWN_NAMES.get(value)
        if own is None:
            super().save_global(value, name)
            return
        module, _, name = own.rpartition(".")
        self.write(pickle.GLOBAL + f"{module}\n{name}\n".encode())
        self.memoize(value)

    def reducer_override(self, value):
        """Members of an enumeration are made by its call, all other stand-ins by their
        attributes.
        """
        if isinstance(value, files._Plain) and list(vars(value)) == ["args"]:
            return type(value), value.args
        return NotImplemented


_MODULE = types.ModuleType("pickle")
_MODULE.Pickler = _Pickler


def save(content, path):
    """Write what files.load has returned, with tensors replaced, to a new file."""
    torch.save(content, path, pickle_module=_MODULE, pickle_protocol=2)
