"""Runs of one layout of Megatron-DeepSpeed, planned one after the other and started together."""

import layouts
import matrix

# a loader made on resume draws from torch's state
STILL = ("--hidden-dropout", "0", "--attention-dropout", "0")
CUT = ("--exit-interval", str(layouts.SAVED))


class Jobs:
    """Planned runs of one layout, in order; flags given to `add` come last."""

    def __init__(self, scratch, folder, layout):
        self.trees, self.data, self.folder = matrix.trees(scratch), matrix.prepare(scratch), folder
        self.layout, self.planned = layout, {}

    def add(self, name, *more, hooked=True, load=None, fault=None, words=None, **of_job):
        """load: the job whose checkpoint is loaded from its folder; words: {old flag and value: new ones}; of_job: more
        entries of driver.py's job."""
        out = self.folder / name
        argv = layouts.flags(self.layout, self.data, out / "save", *more, *STILL)
        if load:
            argv += ["--load", str(self.folder / load / "save")]
        argv = " ".join(argv)
        for old, new in (words or {}).items():
            assert old in argv
            argv = argv.replace(old, new)
        job = {"script": f"{self.trees[hooked]}/pretrain_gpt.py", "argv": argv.split(), "out": str(out)}
        self.planned[name] = {**job, "ranks": layouts.LAYOUTS[self.layout].ranks, "fault": fault, **of_job}

    def mixture(self, mode, every):
        """A mixture file of `matrix.prepare` with another interval of probes."""
        path = self.folder / f"{mode}{every}.yaml"
        path.write_text((self.data / f"{mode}.yaml").read_text().replace("every: 4", f"every: {every}"))
        return path

    def run(self):
        return matrix.run(self.folder, self.planned)

    def record(self, name):
        return matrix.record(self.planned[name])

    def log(self, name, rank=0):
        return (self.folder / name / f"rank{rank}.log").read_text()
